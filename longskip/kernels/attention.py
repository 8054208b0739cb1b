"""Softmax attention over all tokens, with an optional mask of keys.

    out = softmax(scale * q kᵀ) v          per sample and head ("Attention is all you need", eq. 1)

A masked key has weight exactly 0. A query with no key to attend to (every key masked, or no keys) gives 0, and its
gradients are 0. Softmax is computed in float32 (float64 for float64 inputs) whatever the inputs' dtype.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from longskip.kernels.arguments import check_device, check_float, check_like, check_shape, refuse, wide
from longskip.kernels.backends import register, register_formula, register_triton, resolve, serve


def _unpack(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as views. ``unbind`` and not three ``select``: its backward is one stack, not three zero-filled adds."""
    if k is None or v is None:
        q, k, v = q.unbind(2)
    return q, k, v


def _safe_mask(key_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(mask with no empty row ``(B, Tk)``, which samples had one ``(B,)``).

    A row without keys attends to all of them instead, and its output is then set to 0: a softmax over nothing but
    -inf is NaN, and NaN times a zero gradient stays NaN.
    """
    none = ~key_mask.any(dim=-1)
    return key_mask | none[:, None], none


@register("attention", "reference")
def attention_reference(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The definition of ``attention``."""
    q, k, v = _unpack(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    qh, kh, vh = (wide(t).transpose(1, 2) for t in (q, k, v))  # (B, H, T, Dh)
    scores = (qh @ kh.transpose(-2, -1)) * scale  # (B, H, Tq, Tk)
    if key_mask is None:
        out = scores.softmax(-1) @ vh
    else:
        mask, none = _safe_mask(key_mask)
        out = scores.masked_fill(~mask[:, None, None, :], float("-inf")).softmax(-1) @ vh
        out = out.masked_fill(none[:, None, None, None], 0.0)
    return out.transpose(1, 2).to(q.dtype)  # (B, Tq, H, Dh)


# torch's CPU kernel takes a row's maximum vector by vector; with fewer keys than a vector holds and no mask, a row of
# nothing but NaN scores comes out as 0 (torch 2.13, AVX-512, float32 and bfloat16). The definition serves those sizes.
_FEWEST_KEYS = 16


@register("attention", "torch")
def attention_torch(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """``F.scaled_dot_product_attention`` on transposed views: it reads any strides and writes ``(B, T, H, Dh)``."""
    first, second, third = _unpack(q, k, v)
    too_few = key_mask is None and second.shape[1] < _FEWEST_KEYS and q.device.type == "cpu"
    if too_few or first.numel() == 0 or second.numel() == 0:
        return attention_reference(first, second, third, key_mask=key_mask, scale=scale)
    qh, kh, vh = (t.transpose(1, 2) for t in (first, second, third))
    if key_mask is None:
        return F.scaled_dot_product_attention(qh, kh, vh, scale=scale).transpose(1, 2)
    mask, none = _safe_mask(key_mask)
    out = F.scaled_dot_product_attention(qh, kh, vh, attn_mask=mask[:, None, None, :], scale=scale)
    return out.transpose(1, 2).masked_fill(none[:, None, None, None], 0.0)


def attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of every query to every unmasked key.

    q ``(B, Tq, H, Dh)``, k and v ``(B, Tk, H, Dh)``; or q packed ``(B, T, 3, H, Dh)`` (q, k, v along axis 2) with
    k = v = None. ``key_mask (B, Tk)`` bool, True = attend. ``scale`` defaults to ``Dh ** -0.5``. Returns
    ``(B, Tq, H, Dh)`` in q's dtype; 0 where no key is attended. A non-finite v poisons the output even where its key
    is masked (0 times it). Raises KernelArgumentError on shapes, dtypes or devices that do not fit.
    """
    op = "attention"
    if k is None and v is None:
        check_float(op, "q (packed)", q, (None, None, 3, None, None), "(B, T, 3, H, Dh)")
        batch, keys = q.shape[0], q.shape[1]
    elif k is None or v is None:
        refuse(op, "k and v", "only one of them given", "both, or neither with q packed (B, T, 3, H, Dh)")
    else:
        check_float(op, "q", q, (None, None, None, None), "(B, Tq, H, Dh)")
        batch = q.shape[0]
        check_like(op, "k", k, "q", q, (batch, None, q.shape[2], q.shape[3]), "(B, Tk, H, Dh)")
        keys = k.shape[1]
        check_like(op, "v", v, "q", q, (batch, keys, q.shape[2], q.shape[3]), "(B, Tk, H, Dh)")
    if q.shape[-1] < 1 or q.shape[-2] < 1:
        refuse(op, "q", f"of shape {tuple(q.shape)}", "at least one head (H >= 1) and a head dim Dh >= 1")
    if scale is not None and not -math.inf < scale < math.inf:
        refuse(op, "scale", scale, "a finite number, or None for Dh ** -0.5")
    if key_mask is not None:
        if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
            came = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
            refuse(op, "key_mask", came, "a bool tensor, True = attend", "compare it: key_mask = lengths > position")
        check_shape(op, "key_mask", key_mask, (batch, keys), "(B, Tk)")
        check_device(op, "key_mask", key_mask, "q", q)
    return serve(op, q, q, k, v, key_mask=key_mask, scale=scale)


def offsets_of(name: str, offsets: Tensor, tokens: int) -> list[int]:
    """The offsets' values, read from the host; KernelArgumentError unless they ascend from 0 to ``tokens``."""
    op, allowed = "attention_varlen", f"ascending from 0 to the {tokens} tokens"
    values: list[int] = offsets.tolist()
    if values[0] != 0:
        refuse(op, f"{name}[0]", values[0], allowed)
    if values[-1] != tokens:
        refuse(op, f"{name}[-1]", values[-1], allowed, "give the first token of every sequence, and the number of all")
    for at, (start, end) in enumerate(itertools.pairwise(values)):
        if end < start:
            refuse(op, f"{name}[{at + 1}]", f"{end} after {start}", allowed)
    return values


Batched = Callable[..., Tensor]


def _by_sequence(
    function: Batched, q: Tensor, k: Tensor | None, v: Tensor | None,
    cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, scale: float | None,
) -> Tensor:  # fmt: skip
    """``function``, attention of a batch, on one sequence after the other."""
    q, k, v = _unpack(q[None], k if k is None else k[None], v if v is None else v[None])
    starts = cu_seqlens.tolist()
    starts_k = starts if cu_seqlens_k is None else cu_seqlens_k.tolist()
    spans = zip(itertools.pairwise(starts), itertools.pairwise(starts_k), strict=True)
    outs = [function(q[:, a:b], k[:, c:d], v[:, c:d], scale=scale) for (a, b), (c, d) in spans]
    return torch.cat(outs or [function(q, k, v, scale=scale)], dim=1)[0]


@register("attention_varlen", "reference")
def attention_varlen_reference(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The definition of ``attention_varlen``: ``attention`` of every sequence by itself."""
    return _by_sequence(attention_reference, q, k, v, cu_seqlens, cu_seqlens_k, scale)


@register("attention_varlen", "torch")
def attention_varlen_torch(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Sequence by sequence; while tracing, when the offsets have no values, one call under a mask of the sequences."""
    if not torch.compiler.is_compiling():
        return _by_sequence(attention_torch, q, k, v, cu_seqlens, cu_seqlens_k, scale)
    first, second, third = _unpack(q[None], k if k is None else k[None], v if v is None else v[None])
    of_query = _sequence_of(cu_seqlens, first)
    of_key = _sequence_of(cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, second)
    mask = of_query[:, None] == of_key
    none = ~mask.any(-1)
    qh, kh, vh = (t.transpose(1, 2) for t in (first, second, third))
    out = F.scaled_dot_product_attention(qh, kh, vh, attn_mask=mask | none[:, None], scale=scale)
    return out.transpose(1, 2).masked_fill(none[None, :, None, None], 0.0)[0]


def _sequence_of(offsets: Tensor, tensor: Tensor) -> Tensor:
    """The number of the sequence that each token of ``(1, N, H, Dh)`` belongs to."""
    tokens = torch.arange(tensor.shape[1], device=tensor.device)
    return torch.searchsorted(offsets[1:].to(tensor.device), tokens.to(offsets.dtype), right=True)


def attention_varlen(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """``attention`` within sequences of different lengths that lie one after the other.

    q ``(N, H, Dh)``, k and v ``(Nk, H, Dh)``; or q packed ``(N, 3, H, Dh)`` with k = v = None. ``cu_seqlens (S + 1,)``
    int32 or int64: sequence i has the tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1; it ascends from 0 to N, and equal
    neighbours are an empty sequence. ``cu_seqlens_k`` the same of the keys (None: as of the queries). Offsets lie on the
    CPU or on q's device; from there they are copied once, which waits for the device. ``scale`` defaults to
    ``Dh ** -0.5``. Returns ``(N, H, Dh)`` in q's dtype; 0 where a sequence has no keys. Raises KernelArgumentError on
    shapes, dtypes, devices or offsets that do not fit; inside ``torch.compile`` offsets have no values, and are checked
    by the triton backend only.
    """
    op = "attention_varlen"
    if k is None and v is None:
        check_float(op, "q (packed)", q, (None, 3, None, None), "(N, 3, H, Dh)")
        keys = q.shape[0]
        if cu_seqlens_k is not None:
            refuse(op, "cu_seqlens_k", "given with q packed", "None: queries and keys are the same tokens")
    elif k is None or v is None:
        refuse(op, "k and v", "only one of them given", "both, or neither with q packed (N, 3, H, Dh)")
    else:
        check_float(op, "q", q, (None, None, None), "(N, H, Dh)")
        check_like(op, "k", k, "q", q, (None, q.shape[1], q.shape[2]), "(Nk, H, Dh)")
        keys = k.shape[0]
        check_like(op, "v", v, "q", q, (keys, q.shape[1], q.shape[2]), "(Nk, H, Dh)")
    if q.shape[-1] < 1 or q.shape[-2] < 1:
        refuse(op, "q", f"of shape {tuple(q.shape)}", "at least one head (H >= 1) and a head dim Dh >= 1")
    if scale is not None and not -math.inf < scale < math.inf:
        refuse(op, "scale", scale, "a finite number, or None for Dh ** -0.5")
    cu_seqlens = _on_host("cu_seqlens", cu_seqlens, q, q.shape[0])
    if cu_seqlens_k is not None:
        cu_seqlens_k = _on_host("cu_seqlens_k", cu_seqlens_k, q, keys)
        check_shape(op, "cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens.shape), "as many as cu_seqlens")
    elif keys != q.shape[0]:
        refuse(op, "cu_seqlens_k", "None", f"offsets from 0 to the {keys} keys, where there are {q.shape[0]} queries")
    sizes = _varlen_sizes(q, k, v, cu_seqlens=cu_seqlens)
    serving = resolve(op, q.device, q.dtype, sizes)
    out: Tensor = serving(q, k, v, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, scale=scale)
    return out


def _varlen_sizes(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
) -> dict[str, int]:
    """What the choice of a backend hangs on: the shapes, by their mean lengths; the lengths differ from call to call."""
    sequences = max(1, cu_seqlens.shape[0] - 1)
    keys = q.shape[0] if k is None else k.shape[0]
    return {
        "queries": -(-q.shape[0] // sequences),
        "keys": -(-keys // sequences),
        "heads": q.shape[-2],
        "head_dim": q.shape[-1],
        "itemsize": q.element_size(),
    }


def _on_host(name: str, offsets: Tensor, q: Tensor, tokens: int) -> Tensor:
    op = "attention_varlen"
    if not isinstance(offsets, Tensor) or offsets.dtype not in (torch.int32, torch.int64):
        came = offsets.dtype if isinstance(offsets, Tensor) else type(offsets).__name__
        refuse(op, name, f"of dtype {came}", "an int32 or int64 tensor")
    if offsets.ndim != 1 or offsets.shape[0] < 1:
        refuse(op, name, f"of shape {tuple(offsets.shape)}", "(S + 1,) for S sequences")
    if offsets.device.type == "meta" or (offsets.device.type != "cpu" and offsets.device != q.device):
        refuse(op, name, f"on {offsets.device}", f"the CPU or q's device {q.device}", "keep offsets on the CPU")
    offsets = offsets.to("cpu")
    if not torch.compiler.is_compiling():
        offsets_of(name, offsets, tokens)
    return offsets


def _shapes(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> dict[str, int]:
    keys = q.shape[1] if k is None else k.shape[1]
    return {
        "batch": q.shape[0],
        "queries": q.shape[1],
        "keys": keys,
        "heads": q.shape[-2],
        "head_dim": q.shape[-1],
        "masked": key_mask is not None,
        "itemsize": q.element_size(),
    }


def _varlen_shapes(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
) -> dict[str, int]:
    lengths = cu_seqlens.diff()
    return {
        "queries": q.shape[0],
        "keys": q.shape[0] if k is None else k.shape[0],
        "pairs": int((lengths * (lengths if cu_seqlens_k is None else cu_seqlens_k.diff())).sum()),
        "heads": q.shape[-2],
        "head_dim": q.shape[-1],
        "offset_bytes": cu_seqlens.nbytes + (0 if cu_seqlens_k is None else cu_seqlens_k.nbytes),
        "itemsize": q.element_size(),
    }


register_formula("attention_varlen", _varlen_shapes, choice=_varlen_sizes)
register_formula("attention", _shapes)
register_triton("attention")
importlib.import_module("longskip.kernels.attention_adapters")  # registers flash_attn and xformers
