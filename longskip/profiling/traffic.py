"""The collectives of one optimizer step under ZeRO, counted and sized before a run, without torch.

What DeepSpeed 0.19.8 does with what longskip's engine gives it, and what the engine adds: at the stages 0 to 2 sums over
the stored tensors, at stage 3 a walk through the modules with DeepSpeed's own rules for fetching, fetching ahead and
releasing. ``engine.trace`` records the same of a real step; the tests compare the two to the byte.

**Bytes** of a collective are its payload, the same on every rank: what goes in for an all-reduce, a reduce-scatter and a
broadcast, what comes out of an all-gather; padding that is sent is counted. ``wire_bytes`` is what a rank sends in a ring.

The EMA is cut as the weights are and costs no collective. Nor does activation checkpointing: DeepSpeed gathers a unit for
its backward pass before it is computed again, and keeps it until that is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from longskip.errors import ConfigError
from longskip.models.specs import ParamSpec
from longskip.profiling import zero3

__all__ = ["Collective", "Kind", "StoredTensor", "Zero", "reduce_bucket", "stored_tensors", "total", "traffic"]

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "reduce", "broadcast", "barrier"]
Layout = Literal["named", "flat"]

ALIGN = 64  # elements, as ``models.packed``
STAGE0_BUCKET = 500_000_000  # elements after which DeepSpeed's plain engine sends what it has gathered so far
GROUP_ALIGN = 2  # elements a rank, to whose multiple the stages 1 and 2 pad a group of parameters
STEADY = 4  # step from which all are alike: by then DeepSpeed knows the order and has made all its decisions
BAD_REASONS = 27  # counters of bad samples that a step's control figures carry: engine.quarantine
RING = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "reduce": 1, "broadcast": 1, "barrier": 0}


@dataclass(frozen=True)
class Collective:
    """``count`` collectives of one kind and one purpose in a step, ``bytes`` of payload in all of them together."""

    kind: Kind
    count: int
    bytes: int
    why: str

    def wire_bytes(self, world: int) -> float:
        """Bytes that a rank sends when the ranks stand in a ring: 2(n-1)/n of the payload for an all-reduce, (n-1)/n for
        the others (of a broadcast the mean over the ranks: the last one sends nothing)."""
        return RING[self.kind] * (world - 1) * self.bytes / world


@dataclass(frozen=True)
class Zero:
    """The part of DeepSpeed's configuration that decides on collectives, in elements; the defaults are a longskip run's.

    ``reduce_bucket`` None is what the engine sets (``reduce_bucket()``), ``prefetch`` None a quarter of it and one.
    ``overlap``: gradients are reduced while the backward pass goes on (the engine's choice on a GPU), which at stage 1
    changes their order. ``offload``: the optimizer's states are in host memory, where stage 3 adds up the gradient norm.
    """

    reduce_bucket: int | None = None
    prefetch: int | None = None
    persistence: int = 100_000
    max_live: int = 1_000_000_000
    max_reuse: int = 1_000_000_000
    sub_group: int = 1_000_000_000
    overlap: bool = False
    offload: bool = False


class StoredTensor(NamedTuple):
    """A stored parameter; ``elements`` with the flat layout's padding."""

    name: str
    elements: int
    decay: bool


_Units = Mapping[str, Sequence[ParamSpec]]


def traffic(
    units: _Units,
    *,
    text: Sequence[ParamSpec] = (),
    world: int,
    stage: int,
    dtype_bytes: int,
    layout: Layout = "flat",
    accumulation: int = 1,
    checkpointing: int = 0,
    clip: bool = True,
    zero: Zero | None = None,
    logs: bool = False,
    step: int | None = None,
    gathered: bool | None = None,
) -> tuple[Collective, ...]:
    """The collectives of one step of ``world`` ranks, a row per kind and purpose; nothing for a rank alone.

    ``units``: the backbone's ``parameters()``; ``text``: the trained text encoder's. ``dtype_bytes``: of the weights, 4
    (fp32) or 2 (bf16). ``checkpointing`` k: every k-th block is computed again. ``clip``: whether gradients are clipped.
    ``logs``: the step ends with a line of metrics. ``step``: the how-manieth of its process, from 1 on; None is the
    steady state. Only stage 3 has another beginning: in the first micro-batch it gathers every unit for each pass
    and keeps none, while it takes down the order of the modules; in the second it makes sure that all ranks saw the same.
    ``gathered``: whether small tensors have been gathered before the first step, as at a resume and always with bf16;
    None: with bf16.

    What evaluations and checkpoints send between steps is not covered.
    Raises ConfigError for an impossible stage, number or size.
    """
    _check(stage, world=world, dtype_bytes=dtype_bytes, accumulation=accumulation)
    if checkpointing < 0 or (step is not None and step < 1):
        raise ConfigError(f"checkpointing {checkpointing}, step {step}: neither may be less", cure="0 and 1 at least")
    if world == 1:
        return ()
    zero = zero or Zero()
    stored = {name: stored_tensors(name, specs, layout) for name, specs in units.items()}
    if text:
        stored["text"] = stored_tensors("text", text, layout)
    bucket = zero.reduce_bucket or reduce_bucket(units, text=text, layout=layout)
    order = list(_ready_order(stored, layout))
    if stage in (1, 2) and (largest := max(tensor.elements for tensor in order)) > bucket:
        raise ConfigError(
            f"a reduce bucket of {bucket:,} elements does not hold a tensor of {largest:,}: how DeepSpeed reduces that one "
            "is not predicted",
            cure="leave reduce_bucket_size to longskip",
        )
    groups = [
        [tensor for unit in stored.values() for tensor in unit if tensor.decay == decay] for decay in (True, False)
    ]
    groups = [group for group in groups if group]
    rows = _control(world, logs)
    if stage == 0:
        every = [tensor.elements for unit in stored.values() for tensor in unit]
        rows += _row("all_reduce", [dtype_bytes * n for n in _filled(every, STAGE0_BUCKET)], "gradients")
        if clip and dtype_bytes == 4:
            rows += _row("all_reduce", [4], "gradient norm")
    elif stage < 3:
        ready = [tensor for group in groups for tensor in group] if stage == 1 and not zero.overlap else order
        sums = [dtype_bytes * sum(tensor.elements for tensor in part) for part in _packed(ready, bucket)]
        rows += _row("all_reduce", sums * (accumulation if stage == 2 else 1), "gradients")
        if dtype_bytes == 2:
            rows += _row("all_reduce", [1], "overflow flag")
        rows += _row("all_reduce", [4] * len(groups), "gradient norm")
        sizes = [_up(sum(tensor.elements for tensor in group), GROUP_ALIGN * world) for group in groups]
        rows += _row("all_gather", [dtype_bytes * elements for elements in sizes], "updated weights")
    else:
        prefetch = bucket // 4 + 1 if zero.prefetch is None else zero.prefetch
        rows += _stage3(
            stored,
            groups,
            list(_packed(order, bucket)),
            zero3.passes(
                list(units), text=bool(text), checkpointing=checkpointing, time_gradient=_time_has_gradient(units)
            ),
            zero3.Limits(zero.persistence, prefetch, zero.max_live, zero.max_reuse),
            world=world,
            dtype_bytes=dtype_bytes,
            accumulation=accumulation,
            step=STEADY if step is None else step,
            gathered=dtype_bytes == 2 if gathered is None else gathered,
            sub_group=zero.sub_group,
            norm_bytes=4 if zero.offload else 8,
        )
    return tuple(rows)


def total(rows: Iterable[Collective]) -> dict[Kind, tuple[int, int]]:
    """Kind → (count, bytes) over all purposes."""
    sums: dict[Kind, tuple[int, int]] = {}
    for row in rows:
        count, size = sums.get(row.kind, (0, 0))
        sums[row.kind] = (count + row.count, size + row.bytes)
    return sums


def reduce_bucket(units: _Units, *, text: Sequence[ParamSpec] = (), layout: Layout = "flat") -> int:
    """Elements of the reduce bucket that the engine sets: the model as it is stored, at most 5e8, never less than a unit
    of the backbone."""
    sizes = [sum(tensor.elements for tensor in stored_tensors(name, specs, layout)) for name, specs in units.items()]
    beside = sum(tensor.elements for tensor in stored_tensors("text", text, layout))
    return max(*sizes, min(STAGE0_BUCKET, sum(sizes) + beside))


def _check(stage: int, **numbers: int) -> None:
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"ZeRO has no stage {stage}", cure="take 0, 1, 2 or 3")
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}", cure="1 at least")


def _row(kind: Kind, sizes: Sequence[int], why: str) -> list[Collective]:
    return [Collective(kind, len(sizes), sum(sizes), why)] if sizes else []


def _up(n: int, multiple: int) -> int:
    return n + -n % multiple


def _control(world: int, logs: bool) -> list[Collective]:
    """What the engine's own loop sends, in float64: see ``engine.job``."""
    rows = [
        Collective("all_reduce", 1, 8, "every rank has read its samples"),
        Collective("all_reduce", 1, 8 * (4 + BAD_REASONS), "loss, bad samples, stop, not finite, save written"),
    ]
    return rows + ([Collective("all_reduce", 1, 8 * world, "peak memory of every rank")] if logs else [])


# -- what is stored ----------------------------------------------------------------------------------------------------


def stored_tensors(unit: str, specs: Sequence[ParamSpec], layout: Layout) -> tuple[StoredTensor, ...]:
    """A unit's tensors in the order in which its module holds them; see ``models.packed``."""
    if layout == "named":
        return tuple(StoredTensor(spec.name, spec.numel, spec.decay) for spec in specs)
    flats = []
    for decay in (True, False):
        sizes = [_up(spec.numel, ALIGN) for spec in specs if spec.decay == decay]
        if sizes:
            flats.append(StoredTensor(f"{unit}.{'decay' if decay else 'plain'}", sum(sizes), decay))
    return tuple(flats)


def _time_has_gradient(units: _Units) -> bool:
    """Whether the time embedding is both trained and read by the blocks (adaLN)."""
    names = {spec.name.partition(".")[2] for unit in ("embed", "head") for spec in units.get(unit, ())}
    return {"time.fc1.weight", "ada.weight"} <= names


def _ready_order(stored: Mapping[str, Sequence[StoredTensor]], layout: Layout) -> Iterator[StoredTensor]:
    """All tensors in the order in which the backward pass has their gradients: units and layers from the last one back.

    In a unit's flat layout the tensor that is split off last comes first. Of named tensors a linear's bias comes before
    its weight and a norm's or convolution's after it.
    """
    first = [unit for unit in ("text",) if unit in stored]  # the encoder runs before the backbone
    for unit in reversed(first + [unit for unit in stored if unit not in first]):
        if layout == "flat":
            yield from reversed(stored[unit])
            continue
        layers: dict[str, list[StoredTensor]] = {}
        for tensor in stored[unit]:
            layers.setdefault(tensor.name.rpartition(".")[0] if "." in tensor.name else tensor.name, []).append(tensor)
        for layer in reversed(_used(unit, list(layers))):
            weight_first = layer.rpartition(".")[2] in ("norm", "norm1", "norm2", "conv")
            yield from layers[layer] if weight_first else reversed(layers[layer])


def _used(unit: str, layers: list[str]) -> list[str]:
    """A unit's layers in the order of use, which is the table's, but in the embedding."""
    if unit != "embed":
        return layers
    rank = {name: index for index, name in enumerate(("time.fc1", "time.fc2", "label", "text", "patch", "pos"))}
    return sorted(layers, key=lambda layer: rank.get(layer.removeprefix("embed."), len(rank)))


# -- buckets -----------------------------------------------------------------------------------------------------------


def _filled(sizes: Iterable[int], limit: int) -> Iterator[int]:
    """Sums of neighbours, each closed as soon as it is above ``limit``."""
    held = 0
    for size in sizes:
        held += size
        if held > limit:
            yield held
            held = 0
    if held:
        yield held


def _packed(tensors: Iterable[StoredTensor], limit: int) -> Iterator[list[StoredTensor]]:
    """Neighbours together, closed before their elements would be above ``limit``."""
    held, elements = list[StoredTensor](), 0
    for tensor in tensors:
        if held and elements + tensor.elements > limit:
            yield held
            held, elements = [], 0
        held.append(tensor)
        elements += tensor.elements
    if held:
        yield held


# -- stage 3 -----------------------------------------------------------------------------------------------------------


def _stage3(
    stored: Mapping[str, Sequence[StoredTensor]],
    groups: Sequence[Sequence[StoredTensor]],
    reductions: Sequence[Sequence[StoredTensor]],
    walk: zero3.Passes,
    limits: zero3.Limits,
    *,
    world: int,
    dtype_bytes: int,
    accumulation: int,
    step: int,
    gathered: bool,
    sub_group: int,
    norm_bytes: int,
) -> list[Collective]:
    sizes = {unit: [tensor.elements for tensor in tensors] for unit, tensors in stored.items()}
    coordinator = zero3.Coordinator(sizes, walk, world, limits)
    if gathered:
        coordinator.update()
    gathers: list[zero3.Gather] = []
    updated: list[int] = []
    for _ in range(step):
        gathers = [gather for _ in range(accumulation) for gather in coordinator.micro_batch()]
        updated = coordinator.update()
    rows = []
    for backward, name in ((False, "forward"), (True, "backward")):
        for ahead, how in ((False, "on demand"), (True, "ahead")):
            chosen = [dtype_bytes * g.elements for g in gathers if (g.backward, g.ahead) == (backward, ahead)]
            rows += _row("all_gather", chosen, f"weights, {name} pass, {how}")
    sums = [dtype_bytes * sum(_up(tensor.elements, world) for tensor in part) for part in reductions]
    rows += _row("reduce_scatter", sums * accumulation, "gradients")
    shares = [[-(-tensor.elements // world) for tensor in group] for group in groups]
    norms = sum(1 if sum(group) <= sub_group else len(list(_filled(group, sub_group - 1))) for group in shares)
    rows += _row("all_reduce", [norm_bytes] * norms, "gradient norm")
    rows += _row("all_gather", [dtype_bytes * elements for elements in updated], "updated small weights")
    entered, used = len(walk.calls), sum(len(sizes[call.unit]) for call in walk.calls if call.unit)
    for micro in range((step - 1) * accumulation, step * accumulation):
        if micro == 0:
            rows += _row("broadcast", [8, 0], "no order of modules yet")
        elif micro == 1:
            rows += _row(
                "broadcast", [8, 8 * entered, 8, 8 * used, 8, 8 * used], "order of modules, the same everywhere"
            )
    return rows
