"""What one rank needs in memory under DeepSpeed's ZeRO, predicted before a run, without torch.

Weights, gradients and states are what DeepSpeed 0.19.8 keeps of what longskip's engine gives it, tensor by tensor with its
padding; activations are the tape of ``activations.py``. A rank's peak is the worst of three moments:

- ``backward``: the worst moment of the activations, beside everything that stands between steps.
- ``reduce``: the gradients of a bucket are joined into one tensor, which is then summed over the ranks.
- ``step``: the gradients are joined and converted to float32 for the optimizer, the largest group first.

Bytes per element that stand (e: 4 fp32, 2 bf16; N elements, S a rank's share with padding; 1910.02054):

    stage   weights   gradients   masters        moments   EMA   buffers
    0       e·N       e·N         4·N in bf16    8·N       4·N
    1, 2    e·N       e·G         4·S            8·S       4·S   in the backward pass e·bucket, twice where overlapped
    3       e·S       e·S         4·S            8·S       4·S   e·bucket

At the stages 1 to 3 the masters are a copy in fp32 too. G is the elements of the parameters that a rank's share touches,
whole ones: at least S. At stage 3 small tensors stay gathered, and DeepSpeed keeps a unit gathered from its forward to its
backward pass where fewer than ``max_reuse`` elements are used between the two: of a model below half a billion that is
all of it. Not predicted: the allocator's rounding and fragmentation, workspaces of libraries, the process itself.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Literal

from longskip.errors import ConfigError
from longskip.models.specs import TextEncoderSpec, UViTSpec
from longskip.profiling import zero3
from longskip.profiling.activations import Activations, Kernels, activations
from longskip.profiling.traffic import (
    GROUP_ALIGN,
    STAGE0_BUCKET,
    Layout,
    StoredTensor,
    Zero,
    reduce_bucket,
    stored_tensors,
)

Stage = Literal[0, 1, 2, 3]
__all__ = ["Moment", "RankMemory", "Stage", "rank_memory"]


@dataclass(frozen=True)
class Moment:
    """Bytes on the device at one moment. ``weights`` as they are stored; ``gathered``: whole units at stage 3;
    ``gradients`` of weights, wherever they are; ``states``: masters, moments, EMA; ``buffers``: what is reduced, joined or
    converted."""

    weights: int
    gathered: int
    gradients: int
    states: int
    activations: int
    buffers: int

    @property
    def total(self) -> int:
        return self.weights + self.gathered + self.gradients + self.states + self.activations + self.buffers


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank.

    On the device between steps: ``weights``, ``gathered`` (small tensors that stay gathered at stage 3), ``gradients``
    (from the backward pass to the step), ``masters``, ``moments``, ``ema``, ``bucket`` (of stage 3, or what gradients pass
    through on their way to the host). ``host``: all that is put off to host memory. ``activations``: of one micro-batch;
    ``text``: what the word encoder keeps of it. ``backward``, ``reduce``, ``step``: the three moments of which the worst
    is the ``peak``. ``owned``: elements of the states that are its own, padding included.
    """

    weights: int
    gathered: int
    gradients: int
    masters: int
    moments: int
    ema: int
    bucket: int
    host: int
    activations: Activations
    text: int
    backward: Moment
    reduce: Moment
    step: Moment
    owned: int

    @property
    def states(self) -> int:
        return self.masters + self.moments + self.ema

    @property
    def device(self) -> int:
        """What stands on the device after the backward pass, before the step."""
        return self.weights + self.gathered + self.gradients + self.states + self.bucket

    @property
    def worst(self) -> Moment:
        return max(self.backward, self.reduce, self.step, key=lambda moment: moment.total)

    @property
    def peak(self) -> int:
        return self.worst.total


@dataclass(frozen=True)
class _Shares:
    """Elements that a rank holds, as the stage cuts them."""

    whole: int  # of the weights that it computes with, between steps
    owned: int  # of the states
    touched: int  # of the gradients between the backward pass and the step
    largest: int  # of the group that the optimizer is given first
    small: int = 0  # that stay gathered
    gathered: int = 0  # at the most in the backward pass, the small ones included
    joined: int = 0  # of the largest bucket, with padding
    bucket: int = 0
    tensor: int = 0  # the largest
    all_in_one: bool = True  # one bucket holds all gradients


def rank_memory(
    spec: UViTSpec,
    *,
    world: int,
    stage: Stage,
    micro: int,
    dtype_bytes: int,
    text: TextEncoderSpec | None = None,
    layout: Layout = "flat",
    accumulation: int = 1,
    checkpointing: int = 0,
    latent_size: tuple[int, int] | None = None,
    kernels: Kernels = "torch",
    prediction: Literal["v", "x"] = "v",
    zero: Zero | None = None,
    rank: int | None = None,
    offload_optimizer: bool = False,
    offload_weights: bool = False,
    ema_on_host: bool = False,
) -> RankMemory:
    """The memory of one of ``world`` ranks at ``micro`` images a micro-batch; ``rank`` None is the one that needs the most.

    ``dtype_bytes``: 4 (fp32) or 2 (bf16, with fp32 masters). ``text``: the word encoder that is trained along.
    ``zero``: DeepSpeed's sizes and whether it overlaps communication, as ``traffic`` takes them. The rest as
    ``activations``. Raises ConfigError for an impossible stage or number, SpecError for sizes that do not fit.
    """
    for name, value in (("world", world), ("micro", micro), ("accumulation", accumulation)):
        if value < 1:
            raise ConfigError(f"{name} is {value}", cure="1 at least")
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"ZeRO has no stage {stage}", cure="take 0, 1, 2 or 3")
    if rank is not None and not 0 <= rank < world:
        raise ConfigError(f"rank {rank} is not one of {world}", cure=f"take 0 to {world - 1}")
    if (offload_optimizer and not stage) or (offload_weights and stage < 3):
        raise ConfigError(
            f"stage {stage} puts nothing off to the host", cure="take stage 1 to 3 for states, 3 for weights"
        )
    zero = zero or Zero()
    share = _shares(spec, text, layout, world, stage, zero, checkpointing, rank)
    kept: Literal["given", "kept"] = "given"
    if accumulation == 1 and (stage == 0 or (stage == 1 and not zero.overlap)):
        kept = "kept"
    passes = activations(
        spec, micro, dtype_bytes, checkpointing, latent_size,
        kernels=kernels, prediction=prediction, layout=layout, gradients=kept,
    )  # fmt: skip
    return _laid_out(
        share, passes, text.saved_bytes(micro, dtype_bytes) if text else 0, stage, dtype_bytes, world, accumulation, zero.overlap,
        offload_optimizer, offload_weights, ema_on_host,
    )  # fmt: skip


def _laid_out(
    share: _Shares, passes: Activations, text: int, stage: Stage, size: int, world: int, accumulation: int,
    overlap: bool, offload_optimizer: bool, offload_weights: bool, ema_on_host: bool,
) -> RankMemory:  # fmt: skip
    weights, gradients, small = size * share.whole, size * share.touched, size * share.small
    masters = 4 * share.owned if stage or size == 2 else 0
    moments, ema, host = 8 * share.owned, 4 * share.owned, 0
    bucket = size * share.bucket
    standing_bucket = bucket if stage == 3 else 0
    passing_buckets = bucket * (2 if overlap else 1) if stage in (1, 2) else standing_bucket
    if offload_optimizer:  # the step on the host reads fp32 gradients there
        if stage < 3:  # gradients pass through buffers of the largest tensor on their way, one on either side
            standing_bucket = size * share.tensor
            passing_buckets, host = passing_buckets + standing_bucket, host + standing_bucket
        host += masters + moments + ema + 4 * share.owned + size * share.owned
        masters = moments = ema = gradients = 0
    elif ema_on_host:
        host, ema = host + ema, 0
    if offload_weights:
        host, weights = host + weights, 0
    states = masters + moments + ema
    joined = size * share.joined if world > 1 or stage else 0
    # What lies in wait from one micro-batch to the next, or all through the backward pass.
    waiting = gradients
    if stage < 3:
        whole = size * share.whole
        waiting = (whole if stage < 2 else gradients) if accumulation > 1 else 0
        if stage and not share.all_in_one:
            waiting = max(waiting, gradients)  # the first full bucket has left a share
    on_the_way = passes.weight_gradients
    full = 0 if share.all_in_one or stage == 0 else joined  # reduced while activations are still there
    backward = Moment(
        weights,
        size * share.gathered,
        waiting + on_the_way,
        states,
        passes.peak + text - on_the_way,
        passing_buckets + full,
    )
    # What of them is not in the bucket: all at stage 0; else the rank's own, taken out while the rest is still there.
    summed = size * share.whole if stage == 0 else gradients
    reduce = Moment(weights, small, summed, states, passes.batch, passing_buckets + joined)
    converted = 0 if offload_optimizer else 4 * share.largest if size == 2 else 0
    flat = 0 if stage == 0 or offload_optimizer else size * share.largest
    # Stage 3 lets go of the small tensors before it converts, so the worst may be the moment before.
    at_step = (small, 0) if small > flat + converted else (0, flat + converted)
    step = Moment(weights, at_step[0], gradients, states, 0, standing_bucket + at_step[1])
    return RankMemory(
        weights, small, gradients, masters, moments, ema, standing_bucket, host, passes, text, backward, reduce, step,
        share.owned,
    )  # fmt: skip


@lru_cache(maxsize=512)
def _shares(
    spec: UViTSpec, text: TextEncoderSpec | None, layout: Layout, world: int, stage: Stage, zero: Zero,
    checkpointing: int, rank: int | None,
) -> _Shares:  # fmt: skip
    units = spec.parameters()
    beside = text.parameters()["embedding"] if text else ()
    held = {name: stored_tensors(name, specs, layout) for name, specs in units.items()}
    if beside:
        held["text"] = stored_tensors("text", beside, layout)
    everything = [tensor for unit in held.values() for tensor in unit]
    total = sum(tensor.elements for tensor in everything)
    groups = [[t.elements for t in everything if t.decay == decay] for decay in (True, False)]
    groups = [group for group in groups if group]
    bucket = zero.reduce_bucket or reduce_bucket(units, text=beside, layout=layout)
    if stage == 0:
        joined = min(total, STAGE0_BUCKET + max(t.elements for t in everything))
        return _Shares(total, total, total, total, joined=joined)
    if stage < 3:
        padded = [_up(sum(group), GROUP_ALIGN * world) for group in groups]
        owned = [size // world for size in padded]
        ranks = range(world) if rank is None else (rank,)
        ends = [list(accumulate(group)) for group in groups]
        touched = max(sum(_touched(each, r, own) for each, own in zip(ends, owned, strict=True)) for r in ranks)
        return _Shares(
            sum(padded), sum(owned), touched, max(owned),
            joined=min(total, bucket), bucket=bucket, tensor=max(t.elements for t in everything),
            all_in_one=total <= bucket,
        )  # fmt: skip
    shares = [[-(-size // world) for size in group] for group in groups]
    owned_all = sum(map(sum, shares))
    small, most = _gathered(held, world, zero, bucket, checkpointing)
    return _Shares(
        owned_all, owned_all, owned_all, max(_sub_group(group, zero.sub_group) for group in shares), small, most,
        joined=min(world * owned_all, bucket), bucket=bucket, all_in_one=total <= bucket,
    )  # fmt: skip


def _touched(ends: Sequence[int], rank: int, share: int) -> int:
    """Elements of the tensors, laid end to end and ending at ``ends``, that overlap the rank's share."""
    first, last = bisect_right(ends, rank * share), bisect_left(ends, min((rank + 1) * share, ends[-1]))
    if rank * share >= ends[-1]:
        return 0
    return ends[last] - (ends[first - 1] if first else 0)


def _sub_group(shares: Sequence[int], limit: int) -> int:
    """The largest part of a group that DeepSpeed steps at a time: closed once it is at ``limit``."""
    if sum(shares) <= limit:
        return sum(shares)
    most = held = 0
    for share in shares:
        held += share
        most = max(most, held)
        held = 0 if held >= limit else held
    return most


def _gathered(
    held: Mapping[str, Sequence[StoredTensor]], world: int, zero: Zero, bucket: int, checkpointing: int
) -> tuple[int, int]:
    """(elements that stay gathered between steps, the most in the backward pass of a step once the order is known)."""
    sizes = {unit: [tensor.elements for tensor in tensors] for unit, tensors in held.items()}
    units = [unit for unit in sizes if unit != "text"]
    walk = zero3.passes(units, text="text" in sizes, checkpointing=checkpointing, time_gradient=False)
    prefetch = bucket // 4 + 1 if zero.prefetch is None else zero.prefetch
    coordinator = zero3.Coordinator(
        sizes, walk, world, zero3.Limits(zero.persistence, prefetch, zero.max_live, zero.max_reuse)
    )
    small = sum(size for unit in sizes.values() for size in unit if size <= zero.persistence)
    if world == 1:
        return 0, 0
    coordinator.update()
    for _ in range(3):  # the order is known from the second on, and all decisions are made
        coordinator.micro_batch()
        most = coordinator.most
        coordinator.update()
    return small, most


def _up(n: int, multiple: int) -> int:
    return n + -n % multiple
