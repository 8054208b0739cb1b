"""Each rank's own slices of weights, moments and EMA by canonical name, at any ZeRO stage and in any layout.

DeepSpeed keeps the fp32 master weights as flat tensors whose pieces belong to parameters; our layouts keep several named
tensors in one parameter. This file joins the two maps once, so that checkpoints, EMA and reports speak canonical names only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from longskip.engine.optim import STATES, AdamW
from longskip.errors import LongskipError

Kind = Literal["weight", "exp_avg", "exp_avg_sq", "ema"]
KINDS: tuple[Kind, ...] = ("weight", "exp_avg", "exp_avg_sq", "ema")


@dataclass(frozen=True)
class Fragment:
    """``numel`` elements of ``parameter`` from ``start`` on, whose fp32 master is ``master[position:position+numel]``."""

    parameter: torch.nn.Parameter
    start: int
    master: torch.Tensor
    position: int
    numel: int


@dataclass(frozen=True)
class Slice:
    """``numel`` elements of the canonical tensor ``name`` (of ``shape``) from ``offset`` on, in a master tensor."""

    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int
    master: torch.Tensor
    position: int


class Shards:
    """The rank's slices of a model in a DeepSpeed engine, or of a bare model (``engine=None``: everything)."""

    def __init__(self, engine: Any, optimizer: AdamW, stage: int) -> None:
        self.engine, self.optimizer, self.stage = engine, optimizer, stage
        self.rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self.world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        self.model = engine.module
        self.parameters = list(self.model.parameters())
        self.fragments = list(self._fragments())
        self.slices = list(self._slices())

    def tensor(self, item: Slice, kind: Kind) -> torch.Tensor:
        """A view of the slice's fp32 values of ``kind``, 1-D."""
        whole = item.master if kind == "weight" else self.optimizer.state_of(item.master)[kind]
        return whole.detach().view(-1).narrow(0, item.position, item.numel)

    def owned(self) -> list[Slice]:
        """The slices that this rank writes to a checkpoint; over all ranks every element exactly once.

        Stages 1–3 own disjoint slices already; at stage 0 every rank has everything and writes its even share.
        """
        if self.stage > 0 or self.world == 1:
            return self.slices
        return [part for item in self.slices if (part := _share(item, self.rank, self.world)) is not None]

    def publish(self, kind: Kind = "weight") -> None:
        """Write the masters' values of ``kind`` into the parameters that the model computes with."""
        with torch.no_grad():
            if self.stage == 3:
                for piece in self.fragments:
                    values = self._of_fragment(piece, kind)
                    piece.parameter.ds_tensor.data.view(-1)[: piece.numel].copy_(values)  # type: ignore[attr-defined]
                self._regather()
                return
            for parameter in self.parameters:
                # Of −0.0 and not of 0.0: added to any number it leaves it as it is, −0.0 too.
                full = torch.full((parameter.numel(),), -0.0, dtype=torch.float32, device=parameter.device)
                pieces = [p for p in self.fragments if p.parameter is parameter]
                for piece in pieces:
                    full[piece.start : piece.start + piece.numel] = self._of_fragment(piece, kind)
                if self.stage > 0 and self.world > 1:
                    torch.distributed.all_reduce(full)  # disjoint fragments: the sum is exact
                parameter.data.view(-1).copy_(full)

    @contextmanager
    def weights(self, kind: Kind) -> Iterator[None]:
        """Compute with the EMA (or the raw weights) inside; bitwise the same state as before afterwards.

        No second copy of the weights is made: the masters have them. After a LongskipError, which all ranks raise
        together, all is as before too; after any other the rank is lost, and does not enter the collectives alone.
        """
        if kind == "weight":
            yield
            return
        self._turn_to(kind, kind)
        failure = None
        try:
            yield
        except LongskipError as error:
            failure = error
        self._turn_to("weight", kind)
        if failure is not None:
            raise failure

    def _turn_to(self, wanted: Kind, other: Kind) -> None:
        """Make the model compute with ``wanted``; ``other`` is the kind that is not the weights."""
        if any(piece.master is not piece.parameter for piece in self.fragments):
            self.publish(wanted)
            return
        # Stage 0 in fp32: the model computes with the masters themselves, which change places with the others.
        with torch.no_grad():
            for piece in self.fragments:
                own, others = piece.master.data, self.optimizer.state_of(piece.master)[other]
                kept = own.clone()
                own.copy_(others)
                others.copy_(kept)

    def _of_fragment(self, piece: Fragment, kind: Kind) -> torch.Tensor:
        whole = piece.master if kind == "weight" else self.optimizer.state_of(piece.master)[kind]
        return whole.detach().view(-1)[piece.position : piece.position + piece.numel]

    def _regather(self) -> None:
        """Drop every gathered copy at stage 3, then gather the small parameters that stay gathered between steps.

        DeepSpeed keeps parameters that are used again soon; such copies would be of the values before.
        """
        zero = self.engine.optimizer
        zero.parameter_offload.partition_all_parameters()
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def _fragments(self) -> Iterator[Fragment]:
        if self.stage == 3:
            yield from self._fragments_of_stage3()
        elif self.stage in (1, 2):
            yield from self._fragments_of_stage12()
        else:
            yield from self._fragments_of_stage0()

    def _fragments_of_stage3(self) -> Iterator[Fragment]:
        zero = self.engine.optimizer
        for parameter in self.parameters:
            group, position, padded = zero.grad_position[zero.get_param_id(parameter)]
            start = self.rank * padded
            numel = min(padded, parameter.ds_numel - start)  # type: ignore[attr-defined]
            if numel > 0:
                yield Fragment(parameter, start, zero.fp32_partitioned_groups_flat[group], position, numel)

    def _fragments_of_stage12(self) -> Iterator[Fragment]:
        zero = self.engine.optimizer
        masters = getattr(zero, "single_partition_of_fp32_groups", None)
        if masters is None:  # BF16_Optimizer serves stage 1 with fp32 gradient accumulation
            masters = zero.fp32_groups_flat_partition
        for parameter in self.parameters:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                continue
            address = mapping.hp_fragment_address
            master = masters[mapping.param_group_index]
            yield Fragment(parameter, mapping.lp_fragment_address.start, master, address.start, address.numel)

    def _fragments_of_stage0(self) -> Iterator[Fragment]:
        optimizer = self.engine.optimizer
        masters: dict[int, torch.Tensor] = {}
        if hasattr(optimizer, "fp32_groups"):  # bf16: DeepSpeed's wrapper keeps one fp32 master per parameter
            for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                masters |= {id(p): m for p, m in zip(low, high, strict=True)}
        for parameter in self.parameters:
            yield Fragment(parameter, 0, masters.get(id(parameter), parameter), 0, parameter.numel())

    def _slices(self) -> Iterator[Slice]:
        """Where a fragment of a parameter and a canonical tensor in it overlap."""
        inside: dict[int, list[tuple[str, int, tuple[int, ...]]]] = {}
        for name, parameter, start, shape in self.model.canonical():
            inside.setdefault(id(parameter), []).append((name, start, tuple(shape)))
        for piece in self.fragments:
            for name, start, shape in inside[id(piece.parameter)]:
                low = max(start, piece.start)
                high = min(start + _numel(shape), piece.start + piece.numel)
                if low < high:
                    yield Slice(name, shape, low - start, high - low, piece.master, piece.position + low - piece.start)


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def _share(item: Slice, rank: int, world: int) -> Slice | None:
    low, high = item.numel * rank // world, item.numel * (rank + 1) // world
    if low == high:
        return None
    return Slice(item.name, item.shape, item.offset + low, high - low, item.master, item.position + low)


assert set(KINDS) == {"weight", *STATES}
