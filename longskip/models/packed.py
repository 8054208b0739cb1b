"""Modules that own a declared table of parameters, stored one by one or as flat tensors.

ZeRO-3 gathers one module at a time and pays per tensor: a block kept as at most two flat tensors (one with weight
decay, one without) is gathered in two collectives instead of seventeen. Names, state dicts and initial values do not
see the difference: they always speak of the canonical parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from longskip.errors import LongskipError, SpecError
from longskip.models.init import initial_value
from longskip.models.specs import ParamSpec

__all__ = ["ALIGN", "Layout", "Packed", "local_table"]

ALIGN = 64  # elements: 128 bytes in bf16, what vector loads and matmul kernels like
Layout = Literal["named", "flat"]


def local_table(unit: str, specs: Iterable[ParamSpec]) -> tuple[ParamSpec, ...]:
    """The same parameters with names relative to their unit."""
    return tuple(ParamSpec(s.name.removeprefix(f"{unit}."), s.shape, s.init, s.decay) for s in specs)


class _Slot(NamedTuple):
    """Where a canonical parameter lives: attribute, offset in elements, its declaration."""

    attribute: str
    offset: int
    spec: ParamSpec


class _Handle(NamedTuple):
    """A saved tensor that is a view of a flat parameter, without a hold on the parameter's storage."""

    parameter: nn.Parameter
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


class Packed(nn.Module):
    """A leaf module whose parameters are declared by ``table``: local names, shapes, kinds of initial value, decay.

    ``layout`` "named": one parameter per entry. "flat": at most two, ``flat_decay`` and ``flat_plain``; entries begin
    at multiples of 64 elements, the padding is zero and has no name. ``prefix`` is the canonical name of the unit
    within the whole system ("backbone.blocks.3"), which keys the initial values. Parameters are made on ``device``
    without values (use "meta" to count); ``materialize`` fills them.
    """

    def __init__(
        self,
        table: Sequence[ParamSpec],
        layout: Layout = "named",
        prefix: str = "",
        device: torch.device | str | None = "meta",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if layout not in ("named", "flat"):
            raise SpecError(f"unknown layout {layout!r}", cure="take 'named' or 'flat'")
        self.table = tuple(table)
        self.layout: Layout = layout
        self.prefix = prefix
        self._slots: dict[str, _Slot] = {}
        self._splits: dict[str, list[int]] = {}  # flat: sizes of the pieces, padding pieces included
        self._pieces: dict[str, int] = {}  # flat: local name -> index of its piece
        if layout == "named":
            for spec in self.table:
                self._slots[spec.name] = _Slot(spec.name.replace(".", "__"), 0, spec)
        else:
            self._plan("flat_decay", [s for s in self.table if s.decay])
            self._plan("flat_plain", [s for s in self.table if not s.decay])
        for attribute, shape in self._storage_shapes().items():
            self.register_parameter(attribute, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))

    def _plan(self, attribute: str, specs: list[ParamSpec]) -> None:
        offset, sizes = 0, list[int]()
        for spec in specs:
            self._slots[spec.name] = _Slot(attribute, offset, spec)
            self._pieces[spec.name] = len(sizes)
            padding = -spec.numel % ALIGN
            sizes += [spec.numel, padding] if padding else [spec.numel]
            offset += spec.numel + padding
        if specs:
            self._splits[attribute] = sizes

    def _storage_shapes(self) -> dict[str, tuple[int, ...]]:
        if self.layout == "named":
            return {slot.attribute: slot.spec.shape for slot in self._slots.values()}
        return {attribute: (sum(sizes),) for attribute, sizes in self._splits.items()}

    # -- names and views -----------------------------------------------------------------------------------------------

    def canonical_name(self, local: str) -> str:
        """The name of a local parameter within the whole system."""
        return f"{self.prefix}.{local}" if self.prefix else local

    def canonical(self) -> Iterator[tuple[str, nn.Parameter, int, tuple[int, ...]]]:
        """(canonical name, the parameter that holds it, offset in it in elements, shape), in the table's order."""
        for spec in self.table:
            slot = self._slots[spec.name]
            yield self.canonical_name(spec.name), self._held(slot.attribute), slot.offset, spec.shape

    def specs(self) -> dict[str, ParamSpec]:
        """Canonical name → declaration (its own name is local)."""
        return {self.canonical_name(spec.name): spec for spec in self.table}

    def views(self) -> dict[str, Tensor]:
        """Local name → tensor of its shape, differentiable.

        One split per flat tensor, so the backward pass is one concatenation. Raises ``LongskipError`` where the
        parameters are partitioned and not gathered.
        """
        if self.layout == "named":
            return {local: self._held(slot.attribute) for local, slot in self._slots.items()}
        pieces = {}
        for attribute, sizes in self._splits.items():
            flat = self._held(attribute)
            if flat.dim() != 1 or flat.numel() != sum(sizes):
                raise LongskipError(
                    f"{self.canonical_name(attribute)} has shape {tuple(flat.shape)}, not ({sum(sizes)},)",
                    cure="gather the partitioned parameters of this module first",
                )
            pieces[attribute] = torch.split(flat, sizes)
        return {
            spec.name: pieces[self._slots[spec.name].attribute][self._pieces[spec.name]].view(spec.shape)
            for spec in self.table
        }

    def _held(self, attribute: str) -> nn.Parameter:
        parameter = self._parameters[attribute]
        assert parameter is not None
        return parameter

    # -- saved tensors -------------------------------------------------------------------------------------------------

    def guard(self, enabled: bool = True) -> AbstractContextManager[Any]:
        """Context for a forward pass over ``views()``: autograd keeps no hold on the flat parameters' storage.

        ZeRO-3 swaps ``param.data`` between forward and backward. A named parameter is a leaf, which autograd saves as
        such; a view of a flat one would keep the gathered storage alive. Inside this context such saved tensors become
        (parameter, offset, size, stride), looked up in ``param.data`` of the moment of the backward pass.

        Only the innermost hooks see a tensor, so the context must be off (``enabled=False``) inside
        ``torch.utils.checkpoint``, which keeps nothing anyway. It is off by itself without grad mode, on meta, while
        compiling and inside torch.func transforms, which allow no hooks.
        """
        flats = [self._held(attribute) for attribute in self._splits]
        off = not enabled or not flats or not torch.is_grad_enabled() or any(flat.is_meta for flat in flats)
        if off or torch.compiler.is_compiling() or not _hooks_allowed():
            return nullcontext()
        # A gathered parameter may be a slice of a larger buffer: the same storage is not enough, the range decides.
        held = [
            (flat, flat.untyped_storage()._cdata, int(flat.storage_offset()), int(flat.storage_offset()) + flat.numel())
            for flat in flats
        ]

        def pack(tensor: Tensor) -> Tensor | _Handle:
            storage, offset = tensor.untyped_storage()._cdata, int(tensor.storage_offset())
            for parameter, own, start, stop in held:
                if storage == own and start <= offset < stop and tensor.dtype == parameter.dtype:
                    return _Handle(parameter, offset - start, tensor.size(), tensor.stride())
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, _unpack)

    # -- values --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def materialize(self, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> None:
        """Give every parameter its initial value: a pure function of seed and canonical name, bitwise independent of
        layout. Meta parameters are replaced by new ones on ``device`` (dtype: their own unless given); others of
        the same device and dtype are filled in place.
        """
        self._allocate(torch.device(device), dtype)
        for spec, (name, parameter, offset, shape) in zip(self.table, self.canonical(), strict=True):
            view = parameter.view(-1)[offset : offset + spec.numel].view(shape)
            view.copy_(initial_value(seed, name, shape, spec.init))

    def _allocate(self, device: torch.device, dtype: torch.dtype | None) -> None:
        """Zeros of the declared shapes, in place where the parameters are there already."""
        for attribute, shape in self._storage_shapes().items():
            old = self._held(attribute)
            kind = dtype or old.dtype
            if old.device.type == device.type and old.dtype == kind and old.shape == shape and not old.is_meta:
                old.zero_()
            else:
                new = torch.zeros(shape, device=device, dtype=kind)
                self._parameters[attribute] = nn.Parameter(new, requires_grad=old.requires_grad)

    # -- state dicts, always by canonical names ------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for local, tensor in self.views().items():
            destination[prefix + local] = tensor if keep_vars else tensor.detach()

    @torch.no_grad()
    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        wanted = {prefix + spec.name: spec for spec in self.table}
        if strict:
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in wanted]
        found = {key: state_dict[key] for key in wanted if key in state_dict}
        missing_keys += [key for key in wanted if key not in found] if strict else []
        for key, value in found.items():
            if tuple(value.shape) != wanted[key].shape:
                error_msgs.append(f"{key} has shape {tuple(value.shape)}, the model {wanted[key].shape}")
        if not found or any(tuple(value.shape) != wanted[key].shape for key, value in found.items()):
            return
        if any(self._held(attribute).is_meta for attribute in self._storage_shapes()):
            if not local_metadata.get("assign_to_params_buffers", False) or len(found) < len(wanted):
                error_msgs.append(
                    f"{prefix}* are meta parameters: materialize them first, or load all with assign=True"
                )
                return
            first = next(iter(found.values()))
            self._allocate(first.device, first.dtype)
        views = {prefix + local: tensor for local, tensor in self.views().items()}
        for key, value in found.items():
            views[key].detach().copy_(value)

    def extra_repr(self) -> str:
        parameters = sum(spec.numel for spec in self.table)
        tensors = len(self._storage_shapes())
        return f"{parameters:,} parameters in {tensors} tensors ({self.layout}): " + ", ".join(
            f"{spec.name} {'x'.join(map(str, spec.shape))}" for spec in self.table
        )


def _hooks_allowed() -> bool:
    """False inside torch.func.grad and its kin; torch has no public name for this question."""
    return bool(torch._C._autograd._saved_tensors_hooks_is_enabled())  # type: ignore[attr-defined]


def _unpack(saved: Tensor | _Handle) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    data = saved.parameter.data
    reach = saved.offset + 1 + sum((n - 1) * s for n, s in zip(saved.size, saved.stride, strict=True))
    if data.numel() < reach and saved.size.numel():
        raise LongskipError(
            f"the backward pass needs {reach} elements of a flat parameter that holds {data.numel()}",
            cure="gather the module's parameters before its backward pass",
        )
    return data.as_strided(saved.size, saved.stride, data.storage_offset() + saved.offset)
