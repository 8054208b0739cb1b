"""Rivals of ``attention_varlen`` in ``bench kernels``: a padded batch under a mask, torch's jagged tensors and its call
with offsets, flash-attn's and xformers'. What can be made ready before a call is: offsets on the device, the mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longskip.profiling.kernel_cases import KernelCase, Shape

Call = Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[Tensor, ...]]
Extra = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """How a rival's tensors lie: ``there`` takes one of the public op's to it, ``back`` brings one back; neither is timed."""

    there: Callable[[Tensor, Extra], Tensor]
    back: Callable[[Tensor, Extra], Tensor]


def _lengths(extra: Extra) -> Shape:
    return tuple(extra["cu_seqlens"].diff().tolist())


@functools.lru_cache(maxsize=4)
def _mask(lengths: Shape, device: torch.device) -> Tensor:
    """``(S, longest)`` bool: which places of the padded batch are tokens."""
    return torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]


@functools.lru_cache(maxsize=4)
def _offsets(lengths: Shape, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor((0, *lengths), device=device).cumsum(0).to(dtype)


def _pad(packed: Tensor, extra: Extra) -> Tensor:
    lengths = _lengths(extra)
    padded = packed.new_zeros((len(lengths), max(lengths), *packed.shape[1:]))
    padded[_mask(lengths, packed.device)] = packed
    return padded


def _unpad(padded: Tensor, extra: Extra) -> Tensor:
    return padded[_mask(_lengths(extra), padded.device)]


PADDED = Layout(_pad, _unpad)


def _refused(case: KernelCase) -> str | None:
    return None if case.op == "attention_varlen" else "attention of packed sequences only"


def padded(case: KernelCase) -> Call | str:
    """``scaled_dot_product_attention`` of a padded batch under a mask of its keys; torch takes the backend."""
    if reason := _refused(case):
        return reason

    def call(leaves: Mapping[str, Any], extra: Extra) -> tuple[Tensor, ...]:
        q, k, v = (t.transpose(1, 2) for t in leaves["q"].unbind(2))
        mask = _mask(_lengths(extra), q.device)[:, None, None]
        return (F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2),)

    return call


def nested(case: KernelCase) -> Call | str:
    """``scaled_dot_product_attention`` of jagged nested tensors over the packed ones."""
    if reason := _refused(case):
        return reason

    def call(leaves: Mapping[str, Any], extra: Extra) -> tuple[Tensor, ...]:
        lengths = _lengths(extra)
        offsets = _offsets(lengths, leaves["q"].device, torch.int64)
        jagged = functools.partial(
            torch.nested.nested_tensor_from_jagged, offsets=offsets, min_seqlen=min(lengths), max_seqlen=max(lengths)
        )
        parts = leaves["q"].unbind(1)
        if offsets.device.type != "cuda":  # on a GPU torch copies them itself, or its kernel takes them as they lie
            parts = tuple(part.contiguous() for part in parts)
        q, k, v = (jagged(part).transpose(1, 2) for part in parts)
        return (F.scaled_dot_product_attention(q, k, v).transpose(1, 2).values(),)

    return call


def by_offsets(case: KernelCase) -> Call | str:
    """torch's own call with offsets, ``torch.nn.attention.varlen`` (from 2.10 on)."""
    if reason := _refused(case):
        return reason
    from torch.nn.attention.varlen import varlen_attn

    def call(leaves: Mapping[str, Any], extra: Extra) -> tuple[Tensor, ...]:
        lengths = _lengths(extra)
        q, k, v = leaves["q"].unbind(1)
        offsets = _offsets(lengths, q.device, torch.int32)
        out = varlen_attn(q, k, v, offsets, offsets, max(lengths), max(lengths))
        return (out if isinstance(out, Tensor) else out[0],)

    return call


def flash_attn(case: KernelCase) -> Call:
    """The flash-attn package's packed call with offsets."""
    from flash_attn import flash_attn_varlen_qkvpacked_func

    def call(leaves: Mapping[str, Any], extra: Extra) -> tuple[Tensor, ...]:
        lengths = _lengths(extra)
        offsets = _offsets(lengths, leaves["q"].device, torch.int32)
        return (flash_attn_varlen_qkvpacked_func(leaves["q"], offsets, max(lengths)),)

    return call


def xformers(case: KernelCase) -> Call:
    """xformers' memory-efficient attention under its mask of blocks."""
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    blocks = functools.lru_cache(maxsize=4)(BlockDiagonalMask.from_seqlens)

    def call(leaves: Mapping[str, Any], extra: Extra) -> tuple[Tensor, ...]:
        bias = blocks(_lengths(extra), device=leaves["q"].device)
        q, k, v = (t[None] for t in leaves["q"].unbind(1))
        return (memory_efficient_attention(q, k, v, attn_bias=bias)[0],)

    return call
