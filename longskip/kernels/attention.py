"""Softmax attention over all tokens, with an optional mask of keys.

    out = softmax(scale * q kᵀ) v          per sample and head ("Attention is all you need", eq. 1)

A masked key has weight exactly 0. A query with no key to attend to (every key masked, or no keys) gives 0, and its
gradients are 0. Softmax is computed in float32 (float64 for float64 inputs) whatever the inputs' dtype.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from longskip.kernels.arguments import check_device, check_float, check_like, check_shape, refuse, wide
from longskip.kernels.backends import register, register_formula, register_triton, serve


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


register_formula("attention", _shapes)
register_triton("attention")
