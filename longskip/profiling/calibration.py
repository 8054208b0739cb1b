"""What this machine does: its ceilings, and the seconds of every op of a model at the model's own sizes.

Each op is called as the models call it, through the public functions of ``longskip.kernels`` (and ``F.linear``,
``F.conv2d``, …), forward and backward through autograd. Times are medians by two clocks: processor time of the process,
divided by its threads, which a busy machine disturbs little, and the wall clock. Standard library and torch only.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longskip import kernels
from longskip.errors import ConfigError
from longskip.models.calls import Call
from longskip.models.conditioning import Conditioning
from longskip.models.formulas import FORMULAS
from longskip.models.specs import UViTSpec
from longskip.models.uvit import UViT
from longskip.profiling.efficiency import DIRECTIONS, Efficiencies, Measured
from longskip.profiling.op_works import Work, cost_of, work_of

__all__ = ["DTYPES", "Calibration", "Ceilings", "Seconds", "calibrate", "calls_of", "ceilings", "clock_of"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SHORT = 2e-3  # seconds: shorter work is repeated within a round
_MOST = 20  # times within a round
_LEAST = 0.05  # of a backward's time with the engine's start: what is its own is not told from noise below that
_AGAIN = 5  # turns more for a backward that was not told from the engine's start


class Seconds(NamedTuple):
    """One instant, or one span, by two clocks: processor seconds per thread, and the wall's."""

    cpu: float
    wall: float

    def since(self, start: Seconds) -> Seconds:
        return Seconds(self.cpu - start.cpu, self.wall - start.wall)


ReadClock = Callable[[], Seconds]
_NOTHING = Seconds(0.0, 0.0)


def clock_of(device: torch.device) -> ReadClock:
    """The clocks for work on ``device``; on a GPU both are the wall's, after everything has ended."""
    if device.type == "cuda":

        def after() -> Seconds:
            torch.cuda.synchronize(device)
            now = time.perf_counter()
            return Seconds(now, now)

        return after
    threads = torch.get_num_threads()
    return lambda: Seconds(time.process_time() / threads, time.perf_counter())


def _median(spans: Sequence[Seconds]) -> Seconds:
    return Seconds(statistics.median(s.cpu for s in spans), statistics.median(s.wall for s in spans))


def _told(own: Seconds, whole: Seconds) -> bool:
    """Whether what is left of a backward without the engine's start is more than noise, by both clocks."""
    return all(left > _LEAST * took for left, took in zip(own, whole, strict=True))


# -- what is beside the ops --------------------------------------------------------------------------------------------

# The smallest model with every part of a usual one: what its step takes beyond its ops is what modules, views of
# parameters and autograd's bookkeeping take.
SMALLEST = UViTSpec(width=16, depth=4, n_heads=2, patch=8, channels=3, latent_size=(8, 8), n_txt=1, text_width=16)


@dataclass
class _Small:
    """The step of the smallest model, and the calls that it is made of."""

    forward: Callable[[], Tensor]
    forget: Callable[[], None]
    calls: list[Call]

    @classmethod
    def build(cls, device: torch.device, dtype: torch.dtype) -> _Small:
        spec = SMALLEST
        with torch.random.fork_rng(devices=[]):
            model = UViT(spec, device=device).to(dtype)
            latents = torch.randn(1, spec.channels, *spec.latent_size, device=device)
            text = torch.randn(1, spec.n_txt, spec.text_width, device=device)
        now, condition, weight = torch.rand(1, device=device), Conditioning(text=text), torch.ones(1, device=device)

        def forward() -> Tensor:
            noised = (1 - now) * latents + now * latents
            return kernels.diffusion_loss(model(noised, now, condition), latents, latents, now, weight).mean()

        def forget() -> None:
            for parameter in model.parameters():
                parameter.grad = None

        return cls(forward, forget, calls_of(spec, 1))


def calls_of(spec: UViTSpec, batch: int) -> list[Call]:
    """Every call of a training step of ``batch`` images, each as often as it is made: model, noising and loss."""
    values = spec.c_out * math.prod(spec.latent_size)
    calls = [call for unit in spec.calls(batch) for _ in unit.units for call in unit.calls]
    calls.append(Call("noising", "noising", {"values": batch * values}, {}))
    return [*calls, Call("loss", "diffusion_loss", {"batch": batch, "values": values, "x_kind": 0}, {})]


# -- many calls --------------------------------------------------------------------------------------------------------


_Key = tuple[str, tuple[tuple[str, int], ...], bool]


def _key(call: Call) -> _Key:
    return call.op, tuple(sorted(call.sizes.items())), call.needs_input


@dataclass
class _Slot:
    call: Call
    work: Work
    cotangents: list[Tensor]
    times: int = 1
    whole: Seconds = _NOTHING  # of the last backward with the engine's start
    forward: list[Seconds] = field(default_factory=list)
    backward: list[Seconds] = field(default_factory=list)


class Calibration:
    """Times every different call of ``calls`` once a ``round``; between rounds other work may be measured.

    ``parameters``: numbers of elements of the tensors that AdamW steps over (none: it is not measured). ``read`` gives
    the clocks. ConfigError for an unknown dtype, BackendError for an op that cannot be calibrated.
    """

    def __init__(
        self,
        calls: Iterable[Call],
        device: torch.device | str = "cpu",
        dtype: str = "fp32",
        *,
        parameters: Sequence[int] = (),
        read: ReadClock | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype!r} cannot be calibrated", cure=f"one of {', '.join(DTYPES)}")
        self.device, self.dtype = torch.device(device), dtype
        self._read = read or clock_of(self.device)
        self._probe, self._one = (
            torch.zeros(1, device=self.device, requires_grad=True),
            torch.ones(1, device=self.device),
        )
        self._small = _Small.build(self.device, DTYPES[dtype])
        self._small_spans: list[tuple[Seconds, Seconds]] = []
        self._slots: dict[_Key, _Slot] = {}
        asked = list(calls)
        self._asked = {_key(call) for call in asked}
        for call in (*asked, *self._small.calls):
            if _key(call) not in self._slots:
                self._slots[_key(call)] = self._slot(call)
        self._parameters = tuple(parameters)
        self._optimizer: list[Seconds] = []
        self._step = self._adamw() if parameters else None

    def _slot(self, call: Call) -> _Slot:
        work = work_of(call, self.device, DTYPES[self.dtype])
        slot = _Slot(call, work, [torch.randn_like(out) for out in work.run()])
        for _ in range(2):
            start = self._read()
            self._once(slot)
            took = self._read().since(start).wall
        slot.times = max(1, min(_MOST, int(_SHORT / max(took, 1e-9))))
        return slot

    def _once(self, slot: _Slot) -> tuple[Seconds, Seconds | None]:
        """Seconds forward and backward; None where nothing needs a gradient.

        A whole step starts the autograd engine once: the start, of a graph of one view taken just before, is subtracted.
        What is left may be nothing, or less: ``_told`` says of the medians whether it was a measurement.
        """
        start = self._read()
        outputs = slot.work.run()
        forward = self._read().since(start)
        if not slot.work.leaves:
            return forward, None
        view = self._probe.view_as(self._probe)
        start = self._read()
        torch.autograd.grad(view, self._probe, self._one)
        middle = self._read()
        torch.autograd.grad(outputs, slot.work.leaves, slot.cotangents, allow_unused=True)
        engine, took = middle.since(start), self._read().since(middle)
        slot.whole = took
        return forward, Seconds(*(a - b for a, b in zip(took, engine, strict=True)))

    def _adamw(self) -> Callable[[], None]:
        lists = [[torch.randn(n, device=self.device) for n in self._parameters] for _ in range(4)]
        for v in lists[3]:
            v.square_()
        settings: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01, "step": 7}
        return lambda: kernels.adamw(*lists, **settings)

    def round(self) -> None:
        """Every call once, short ones several times; calls take turns, so that each finds the caches as in a step."""
        slots = tuple(self._slots.values())
        found: list[list[tuple[Seconds, Seconds | None]]] = [[] for _ in slots]
        for turn in range(max(slot.times for slot in slots)):
            for spans, slot in zip(found, slots, strict=True):
                if turn < slot.times:
                    spans.append(self._once(slot))
            self._small_once()
        for spans, slot in zip(found, slots, strict=True):
            slot.forward.append(_median([forward for forward, _ in spans]))
            backward = [backward for _, backward in spans if backward is not None]
            for _ in range(_AGAIN):
                if not backward or _told(_median(backward), slot.whole):
                    break
                backward.append(self._once(slot)[1] or backward[-1])
            if backward:
                slot.backward.append(_median(backward))
        if self._step is not None:
            start = self._read()
            self._step()
            self._optimizer.append(self._read().since(start))

    def _small_once(self) -> None:
        start = self._read()
        loss = self._small.forward()
        middle = self._read()
        loss.backward()
        self._small_spans.append((middle.since(start), self._read().since(middle)))
        self._small.forget()

    def _took(self, slot: _Slot, direction: str) -> Seconds | None:
        spans = slot.forward if direction == "forward" else slot.backward
        return _median(spans) if spans else None

    def overhead(self) -> dict[str, dict[str, float]]:
        """Seconds beside the ops, per call of an op and direction: of the smallest model, its step less its ops, and 0
        where that is less than nothing (``notes`` says so)."""
        return {
            direction: {clock: max(0.0, seconds) for clock, seconds in rest.items()}
            for direction, rest in self._rest().items()
        }

    def _rest(self) -> dict[str, dict[str, float]]:
        found = {}
        for at, direction in enumerate(("forward", "backward")):
            whole = _median([spans[at] for spans in self._small_spans])
            parts = [self._took(self._slots[_key(call)], direction) for call in self._small.calls]
            count = len(self._small.calls)
            rest = (
                (whole[clock] - sum(part[clock] for part in parts if part is not None)) / count for clock in range(2)
            )
            found[direction] = dict(zip(Seconds._fields, rest, strict=True))
        return found

    def notes(self) -> list[str]:
        """What was measured and is no measurement: backwards left out, overheads below nothing."""
        found = [
            f"{slot.call.op} {' '.join(f'{name}={size}' for name, size in slot.call.sizes.items())} backward: not told from "
            "the start of the autograd engine, left out"
            for key, slot in self._slots.items()
            if key in self._asked and self._lost(slot)
        ]
        for direction, rest in self._rest().items():
            if rest["cpu"] < 0:
                found.append(
                    f"{direction}: the smallest model's ops took longer by themselves than its step, overhead 0"
                )
        return found

    def _lost(self, slot: _Slot) -> bool:
        took = self._took(slot, "backward")
        return took is not None and not _told(took, slot.whole)

    def result(self, device_name: str, about: Mapping[str, Any] | None = None) -> Efficiencies:
        """The medians over the rounds so far; ConfigError before the first."""
        if not self._small_spans:
            raise ConfigError("nothing was measured", cure="call round() first")
        itemsize = torch.empty(0, dtype=DTYPES[self.dtype]).element_size()
        entries = []
        for key, slot in self._slots.items():
            if key not in self._asked:
                continue
            for direction in DIRECTIONS:
                cost, took = cost_of(slot.call, direction, itemsize), self._took(slot, direction)
                if direction == "backward" and self._lost(slot):
                    continue
                if took is not None and cost is not None:
                    sizes = dict(slot.call.sizes)
                    entries.append(
                        Measured(slot.call.op, direction, sizes, cost.macs, cost.elementwise, cost.bytes, *took)
                    )
        if self._optimizer:
            sizes = {"values": sum(self._parameters), "tensors": len(self._parameters)}
            cost = FORMULAS["adamw"].forward(**sizes)
            took = _median(self._optimizer)
            entries.append(Measured("adamw", "forward", sizes, 0, cost.elementwise, cost.bytes, *took))
        said = {"notes": notes} if (notes := self.notes()) else {}
        return Efficiencies(device_name, self.dtype, tuple(entries), self.overhead(), {**(about or {}), **said})


@dataclass(frozen=True)
class Ceilings:
    """What a machine reaches: FLOP/s of a large matrix product by dtype, bytes/s (read and written) of a large copy.

    ``by_cpu`` are rates by processor time per thread, which a busy machine hides little of; ``by_wall`` by the wall clock.
    """

    threads: int
    size: int
    copied: int
    by_cpu: Mapping[str, float]
    by_wall: Mapping[str, float]


def ceilings(
    dtypes: Sequence[str] = ("fp32", "bf16"),
    device: torch.device | str = "cpu",
    *,
    size: int = 1024,
    copied: int = 1 << 27,
    repeats: int = 5,
    read: ReadClock | None = None,
) -> Ceilings:
    """Medians of ``size``³ products of each dtype and of copies of ``copied`` bytes, in turns; keys: dtypes, ``copy``."""
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype!r} cannot be calibrated", cure=f"one of {', '.join(DTYPES)}")
    device = torch.device(device)
    read = read or clock_of(device)
    works: dict[str, tuple[Callable[[], Any], float]] = {}
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
        works[dtype] = (partial(torch.mm, a, b), 2.0 * size**3)
    source = torch.randint(0, 127, (copied,), dtype=torch.int8, device=device)
    works["copy"] = (partial(torch.empty_like(source).copy_, source), 2.0 * copied)
    spans: dict[str, list[Seconds]] = {name: [] for name in works}
    for at in range(repeats + 1):
        for name, (work, _) in works.items():
            start = read()
            work()
            took = read().since(start)
            if at:  # the first is warm-up
                spans[name].append(took)
    medians = {name: _median(found) for name, found in spans.items()}
    rates = [{name: works[name][1] / median[at] for name, median in medians.items()} for at in range(2)]
    return Ceilings(torch.get_num_threads(), size, copied, *rates)


def calibrate(
    calls: Iterable[Call],
    device: torch.device | str = "cpu",
    dtype: str = "fp32",
    repeats: int = 5,
    *,
    device_name: str = "",
    parameters: Sequence[int] = (),
    about: Mapping[str, Any] | None = None,
) -> Efficiencies:
    """Median seconds, forward and backward, of every different call in ``calls`` (a spec's ``calls(batch)``)."""
    found = Calibration(calls, device, dtype, parameters=parameters)
    for _ in range(repeats):
        found.round()
    return found.result(device_name or str(device), about)
