"""The time of a training step before it is run: a roofline per op, communication, and which term binds (no torch).

Per call of an op, with the device's rates and the efficiencies that the op reaches (``efficiency.py``):

    seconds = max(FLOPs / (rate · compute efficiency), bytes / (bandwidth · memory efficiency)) + launch overhead

A step is ``accumulation`` times (forward, loss, backward, recomputation), then the collectives as far as they are not
hidden behind the passes, then the optimizer, then what is put off to the host; and it is no shorter than what the host
needs to start all of it. Measured efficiencies go before assumed ones; every assumption that the
result rests on is named in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

from longskip.errors import ConfigError
from longskip.kernels.formulas import OpCost
from longskip.profiling.efficiency import (
    ASSUMED,
    CASES,
    Case,
    Clock,
    Direction,
    Efficiencies,
    Share,
    assumed,
    ideal,
)
from longskip.profiling.flop_ledger import FlopLedger, Row
from longskip.profiling.hardware import Device, Network

__all__ = ["GPUS_PER_NODE", "GUESSES", "Communication", "HostWork", "OpTime", "Sent", "StepTime", "step_time"]

Term = Literal["compute", "memory", "launch", "network", "host"]
Phase = Literal["forward", "backward", "recompute", "optimizer"]
TERMS: tuple[Term, ...] = ("compute", "memory", "launch", "network", "host")
GPUS_PER_NODE = 8


@dataclass(frozen=True, slots=True)
class Guess:
    """A number that was not measured: its likely value, and the ends between which it is taken to lie."""

    slow: float
    likely: float
    fast: float

    def of(self, case: Case) -> float:
        return {"slow": self.slow, "likely": self.likely, "fast": self.fast}[case]

    def text(self, unit: str, scale: float = 1.0) -> str:
        low, high = sorted((self.slow * scale, self.fast * scale))
        return f"{self.likely * scale:.3g} {unit} ({low:.3g} to {high:.3g})"

    @property
    def percent(self) -> str:
        return f"{self.likely:.0%} ({self.slow:.0%} to {self.fast:.0%})"


GUESSES: Mapping[str, Guess] = {
    "launch": Guess(6e-6, 4e-6, 2e-6),  # seconds between two kernels of one stream
    "dispatch": Guess(45e-6, 25e-6, 10e-6),  # seconds of the host for a call of an op
    "engine": Guess(1e-2, 3e-3, 1e-3),  # seconds of the host for the rest of a step
    "wire": Guess(0.60, 0.80, 0.90),  # of a link's or network's rate
    "message": Guess(6e-5, 3e-5, 1.5e-5),  # seconds that a collective takes beside its bytes
    "overlap": Guess(0.50, 0.80, 1.0),  # of what may run beside the passes
    "host link": Guess(0.20, 0.50, 0.85),  # of the rate between device and host memory
    "host memory": Guess(8e9, 25e9, 50e9),  # bytes/s that a rank's share of the host's processor reads and writes
}
LAUNCH, WIRE, MESSAGE, OVERLAP = (GUESSES[name].likely for name in ("launch", "wire", "message", "overlap"))
HOST_LINK = 32 * 10**9  # bytes/s, PCIe 4.0 x16, of a device whose row does not say
_REASONS = {
    "launch": f"{GUESSES['launch'].text('µs', 1e6)} between two kernels, two kernels for the backward of a product",
    "dispatch": f"the host takes {GUESSES['dispatch'].text('µs', 1e6)} to start a call of an op, in either direction, and "
    f"{GUESSES['engine'].text('ms', 1e3)} for the rest of a step (DeepSpeed, data, optimizer); no step is shorter than both "
    "together. On a server core the smallest model took 43 µs a call forward and 36 backward, the processor's own tiny "
    "kernels among them; compiled blocks need less; the engine's part was not measured",
    "wire": f"collectives reach {GUESSES['wire'].percent} of the slower of link and network; a collective takes "
    f"{GUESSES['message'].text('µs', 1e6)} beside its bytes",
    "overlap": f"{GUESSES['overlap'].percent} of what may run beside the passes is hidden behind them",
}


class Sent(Protocol):
    """One row of ``profiling.traffic``: ``count`` collectives for one purpose."""

    @property
    def count(self) -> int: ...
    @property
    def why(self) -> str: ...
    def wire_bytes(self, world: int) -> float: ...


@dataclass(frozen=True, slots=True)
class OpTime:
    """One op in one phase: ``calls`` calls of it in a step, and their ``seconds`` in all.

    ``compute`` and ``memory`` are the two terms at the efficiencies reached, ``launch`` the overhead, each of all calls.
    ``binds``: the longest of the three. ``origin``: where the efficiencies come from.
    """

    phase: Phase
    name: str
    op: str
    unit: str
    calls: int
    seconds: float
    compute: float
    memory: float
    launch: float
    binds: Term
    origin: str

    @property
    def compute_bound(self) -> bool:
        """Whether arithmetic takes longer than bytes."""
        return self.compute >= self.memory


@dataclass(frozen=True, slots=True)
class Communication:
    """Collectives of one purpose in a step: seconds on the wire, and those that no pass hides."""

    why: str
    count: int
    bytes: float
    seconds: float
    exposed: float


@dataclass(frozen=True, slots=True)
class HostWork:
    """What is put off to the host in a step of one rank: bytes that cross to its memory or back, and bytes that its
    processor reads and writes. ``optimizer``: the optimizer steps there, and its rows take no time of the device."""

    transferred: float
    touched: float
    optimizer: bool = False


@dataclass(frozen=True)
class StepTime:
    """A predicted optimizer step of one device; seconds.

    ``by_phase`` and ``by_term`` sum to ``seconds``. ``binds``: the term with the largest sum; ``network`` wherever what
    could be hidden behind the passes takes longer than they (``network_floor``: seconds of all collectives then, else 0).
    ``slowest`` and ``fastest``: seconds with every assumption at its one end and at its other; both ``seconds`` where
    nothing is assumed. ``mfu`` and ``hfu`` are None for a device whose rates are no datasheet's. ``assumptions``: what was
    not measured, a sentence each. ``measured_share``: of the ops' seconds, how many rest on measured efficiencies.
    """

    device: str
    dtype: str
    accumulation: int
    world: int
    ops: tuple[OpTime, ...]
    communication: tuple[Communication, ...]
    by_phase: Mapping[str, float]
    by_term: Mapping[Term, float]
    seconds: float
    images: int
    model_flops: int
    hardware_flops: int
    mfu: float | None
    hfu: float | None
    measured_share: float
    assumptions: tuple[str, ...]
    network_floor: float = 0.0
    slowest: float = 0.0
    fastest: float = 0.0

    @property
    def binds(self) -> Term:
        terms = {**self.by_term, "network": max(self.by_term["network"], self.network_floor)}
        return max(TERMS, key=lambda term: terms[term])

    @property
    def images_per_second(self) -> float:
        """Over all devices."""
        return self.images / self.seconds

    @property
    def certain(self) -> bool:
        """Whether nothing that it rests on was assumed."""
        return self.slowest == self.seconds == self.fastest

    def to_json(self) -> dict[str, Any]:
        tree = asdict(self)
        return tree | {"binds": self.binds, "images_per_second": self.images_per_second}


def step_time(
    ledger: FlopLedger,
    device: Device,
    *,
    dtype: str = "bf16",
    measured: Efficiencies | None = None,
    clock: Clock = "cpu",
    accumulation: int = 1,
    world: int = 1,
    collectives: Iterable[Sent] = (),
    gpus_per_node: int = GPUS_PER_NODE,
    network: Network | None = None,
    overlap: float | None = None,
    launch: float | None = None,
    dispatch: float | None = None,
    host: HostWork | None = None,
) -> StepTime:
    """Predict the step of ``ledger``: one micro-batch of one device, with a loss row and an optimizer row where they are
    to count (``profiling.flop_ledger``; the optimizer's over this rank's share of the parameters).

    ``dtype``: the contractions'. ``measured``: efficiencies of this device and dtype, ``clock`` which of their times.
    ``accumulation``: micro-steps; ``collectives``: those of the whole step (``profiling.traffic``) of ``world`` ranks,
    ``gpus_per_node`` of them in a node and ``network`` between nodes. ``overlap``: the share of the gathers of weights and
    of the reductions of gradients that runs beside the passes; ``launch``: seconds of overhead per call; ``dispatch``: of the
    host's time per call, which a processor's own ops have none of. None takes the measured value or the assumption.
    ``host``: what is put off to host memory; it adds to the step and hides behind nothing.
    ConfigError for impossible numbers, a dtype without a rate, a link or network that is not known, efficiencies of
    another dtype.
    """
    _check(accumulation, world, gpus_per_node, overlap, launch, dispatch)
    if measured is not None and measured.dtype != dtype:
        raise ConfigError(
            f"efficiencies were measured in {measured.dtype}, the step is in {dtype}", cure="measure them in this dtype"
        )
    device.peak(dtype)
    sent = tuple(collectives)
    found: dict[Case, StepTime] = {}
    for case in CASES:
        clockwork = _Clockwork(device, dtype, measured, clock, launch, case)
        found[case] = _predict(
            ledger, clockwork, sent, host, accumulation, world, gpus_per_node, network, overlap, dispatch
        )
    slowest, fastest = found["slow"].seconds, found["fast"].seconds
    every = dict.fromkeys(line for case in ("likely", "slow") for line in found[case].assumptions)  # type: ignore[index]
    return replace(found["likely"], slowest=slowest, fastest=fastest, assumptions=tuple(every))


def _predict(
    ledger: FlopLedger,
    clockwork: _Clockwork,
    collectives: Sequence[Sent],
    host: HostWork | None,
    accumulation: int,
    world: int,
    gpus_per_node: int,
    network: Network | None,
    overlap: float | None,
    dispatch: float | None,
) -> StepTime:
    """One of the three cases."""
    device, case = clockwork.device, clockwork.case
    ops: list[OpTime] = []
    for row in ledger.rows:
        if not (host is not None and host.optimizer and row.part == "optimizer"):
            ops += clockwork.times(row, 1 if row.part == "optimizer" else accumulation)
    passes = sum(op.seconds for op in ops if op.phase != "optimizer")
    sent, floor, reasons = _communication(collectives, device, world, gpus_per_node, network, overlap, passes, case)
    exposed, of_ops = sum(part.exposed for part in sent), sum(op.seconds for op in ops)
    put_off, said = _put_off(host, device, case)
    if not of_ops + exposed:
        raise ConfigError("the ledger has no rows: there is nothing to predict", cure="give it a model's")
    waiting = max(0.0, _starting(ops, device, dispatch, case) - of_ops - exposed)
    seconds = of_ops + exposed + waiting + put_off
    by_phase = {phase: sum(op.seconds for op in ops if op.phase == phase) for phase in _PHASES}
    by_term = _by_term(ops)
    by_term |= {"launch": by_term["launch"] + waiting, "network": exposed, "host": put_off}
    model, hardware = ledger.model_flops * accumulation, ledger.hardware_flops * accumulation
    peak = None if device.measured else device.peak(clockwork.dtype) * seconds
    return StepTime(
        device=device.name,
        dtype=clockwork.dtype,
        accumulation=accumulation,
        world=world,
        ops=tuple(ops),
        communication=sent,
        by_phase=by_phase | {"communication": exposed, "host": put_off, "dispatch": waiting},
        by_term=by_term,
        seconds=seconds,
        images=ledger.batch * accumulation * world,
        model_flops=model,
        hardware_flops=hardware,
        mfu=None if peak is None else model / peak,
        hfu=None if peak is None else hardware / peak,
        measured_share=clockwork.measured_seconds / max(of_ops, 1e-300),
        assumptions=(
            *clockwork.assumptions(),
            *([_REASONS["dispatch"]] if waiting and dispatch is None else []),
            *reasons,
            *said,
        ),
        network_floor=floor,
    )


def _starting(ops: Iterable[OpTime], device: Device, dispatch: float | None, case: Case) -> float:
    """Seconds that the host takes to start the step's work; a processor that is measured itself starts its own."""
    if dispatch is None and device.measured:
        return 0.0
    each = GUESSES["dispatch"].of(case) if dispatch is None else dispatch
    rest = GUESSES["engine"].of(case) if dispatch is None else 0.0
    return rest + each * sum(op.calls for op in ops)


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:,.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"


def _put_off(host: HostWork | None, device: Device, case: Case) -> tuple[float, list[str]]:
    """Seconds of the host's work and of the way there, one after the other; what was assumed for them."""
    if host is None or not (host.transferred or host.touched):
        return 0.0, []
    link, share, rate = device.host_link or HOST_LINK, GUESSES["host link"], GUESSES["host memory"]
    seconds = host.transferred / (link * share.of(case)) + host.touched / rate.of(case)
    whose = "" if device.host_link else ", assumed: PCIe 4.0 x16"
    return seconds, [
        f"host memory: {_gib(host.transferred)} a rank and step go there or back, at {share.percent} of "
        f"{link / 1e9:.0f} GB/s{whose} (copies of memory that is not pinned reach half or less), and "
        f"{_gib(host.touched)} are read or written there at {rate.text('GB/s', 1e-9)} a rank (a server's memory, "
        "shared by its GPUs' ranks); nothing of it hides behind the passes"
    ]


_PHASES: tuple[Phase, ...] = ("forward", "backward", "recompute", "optimizer")


def _by_term(ops: Iterable[OpTime]) -> dict[Term, float]:
    """Seconds by the term that decides them; launch overhead stands apart, also where it does not decide."""
    sums: dict[Term, float] = dict.fromkeys(TERMS, 0.0)
    for op in ops:
        sums["launch"] += op.launch
        sums["compute" if op.compute_bound else "memory"] += op.seconds - op.launch
    return sums


class _Clockwork:
    """Turns rows into seconds, and remembers what it had to assume."""

    def __init__(
        self,
        device: Device,
        dtype: str,
        measured: Efficiencies | None,
        clock: Clock,
        launch: float | None,
        case: Case = "likely",
    ) -> None:
        self.case = case
        self.device, self.dtype, self.measured, self.clock, self.launch = device, dtype, measured, clock, launch
        self.measured_seconds = 0.0
        self._assumed: dict[str, None] = {}
        self._far: dict[str, None] = {}

    def times(self, row: Row, repeats: int) -> list[OpTime]:
        """The row's phases; a unit's costs are the row's, shared out evenly."""
        units = len(row.units)
        backward = row.backward + OpCost(row.repeated_macs)
        phases: tuple[tuple[Phase, Direction, OpCost], ...] = (
            ("optimizer" if row.part == "optimizer" else "forward", "forward", row.forward),
            ("recompute", "forward", row.recomputed),
            ("backward", "backward", backward),
        )
        found = []
        for phase, direction, cost in phases:
            if cost != OpCost():
                one, known = _part(cost, units), _part(row.forward if direction == "forward" else backward, units)
                found.append(self._time(row, phase, direction, one, known, units * repeats))
        return found

    def _time(self, row: Row, phase: Phase, direction: Direction, cost: OpCost, known: OpCost, calls: int) -> OpTime:
        share = self._share(row, direction, known)
        best = ideal(cost, self.device, self.dtype)
        compute, memory = best.compute / share.compute if best.compute else 0.0, best.memory / share.memory
        launch = self._launch(direction, cost)
        longest = max(compute, memory)
        if share.measured:
            self.measured_seconds += calls * (longest + launch)
        binds: Term = "launch" if launch > longest else "compute" if compute >= memory else "memory"
        return OpTime(
            phase, row.name, row.op, row.kind, calls, calls * (longest + launch), calls * compute, calls * memory,
            calls * launch, binds, share.origin,
        )  # fmt: skip

    def _share(self, row: Row, direction: Direction, cost: OpCost) -> Share:
        if self.measured is not None:
            found = self.measured.share(row.op, direction, row.sizes, cost, self.device, self.clock)
            if found is not None:
                if not found.measured:
                    self._far[f"{row.op} {direction}: {found.origin}"] = None
                return found
        found = assumed(row.op, direction, row.sizes, bool(cost.macs), self.case)
        self._assumed[found.origin.removeprefix("assumed: ")] = None
        return found

    def _launch(self, direction: Direction, cost: OpCost) -> float:
        if self.launch is not None:
            return self.launch
        if self.measured is not None and direction in self.measured.overhead:
            return self.measured.overhead[direction][self.clock]
        self._assumed["launch"] = None
        return GUESSES["launch"].of(self.case) * (2 if direction == "backward" and cost.macs else 1)

    def assumptions(self) -> list[str]:
        """A sentence for everything that was not measured, in the order in which it was needed."""
        found = [_REASONS[name] if name == "launch" else str(ASSUMED[name]) for name in self._assumed]
        if self.device.measured:
            clock = (
                "processor time a thread: what it is when nothing else runs" if self.clock == "cpu" else "wall clock"
            )
            found.append(f"times are {clock}")
        return found + [f"{line}, used as it is" for line in self._far]


def _part(cost: OpCost, units: int) -> OpCost:
    return OpCost(cost.macs // units, cost.elementwise // units, cost.bytes // units)


def _communication(
    collectives: Sequence[Sent],
    device: Device,
    world: int,
    gpus_per_node: int,
    network: Network | None,
    overlap: float | None,
    passes: float,
    case: Case,
) -> tuple[tuple[Communication, ...], float, list[str]]:
    """Seconds of each row, and what of it the passes do not hide; seconds of all where the passes are too short for
    what could be hidden; assumptions."""
    if world == 1 or not collectives:
        return (), 0.0, []
    rate = _rate(device, world, gpus_per_node, network) * GUESSES["wire"].of(case)
    message = GUESSES["message"].of(case)
    took = [row.wire_bytes(world) / rate + row.count * message for row in collectives]
    beside = [_beside(row.why) for row in collectives]
    share = GUESSES["overlap"].of(case) if overlap is None else overlap
    wanted = sum(seconds for seconds, may in zip(took, beside, strict=True) if may) * share
    fits = share * min(1.0, passes / wanted) if wanted else 0.0  # no more is hidden than the passes last
    found = tuple(
        Communication(row.why, row.count, row.wire_bytes(world), seconds, seconds * (1 - fits) if may else seconds)
        for row, seconds, may in zip(collectives, took, beside, strict=True)
    )
    reasons = [_REASONS["wire"], *([_REASONS["overlap"]] if overlap is None and any(beside) else [])]
    return found, sum(took) if wanted > passes else 0.0, reasons


def _beside(why: str) -> bool:
    """Whether collectives of this purpose may run beside the passes: gathers of weights for a pass, gradients."""
    return why == "gradients" or why.startswith("weights,")


def _rate(device: Device, world: int, gpus_per_node: int, network: Network | None) -> float:
    """Bytes/s that each rank's share of a ring's traffic passes at.

    Rings are laid so that each leaves a node by another port: the ports of a node together carry what one rank sends.
    """
    inside = min(world, gpus_per_node)
    rates = []
    if inside > 1:
        if device.link is None:
            raise ConfigError(
                f"{device.name}: no link between the devices of a node is known",
                cure="give link_gb_s and link_name in a hardware file (--hardware)",
            )
        rates.append(float(device.link))
    if world > gpus_per_node:
        if network is None:
            raise ConfigError(
                f"{world} ranks of {gpus_per_node} a node: the network between the nodes is not known",
                cure="name it: --network ndr",
            )
        rates.append(network.per_gpu(inside) * inside)
    return min(rates)


def _check(
    accumulation: int,
    world: int,
    gpus_per_node: int,
    overlap: float | None,
    launch: float | None,
    dispatch: float | None,
) -> None:
    for name, value in (("accumulation", accumulation), ("world", world), ("gpus_per_node", gpus_per_node)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} = {value!r}", cure="give a whole number of at least 1")
    if overlap is not None and not 0 <= overlap <= 1:
        raise ConfigError(f"overlap = {overlap}", cure="give a share from 0 (nothing hidden) to 1")
    for name, seconds in (("launch", launch), ("dispatch", dispatch)):
        if seconds is not None and not 0 <= seconds < math.inf:
            raise ConfigError(f"{name} = {seconds}", cure="give seconds of at least 0")
