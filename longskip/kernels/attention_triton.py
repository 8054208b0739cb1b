"""Attention by Triton kernels, of one length per batch and of variable length: custom ops, derivatives, registration.

Packed q, k, v are read in place, and their gradients are written straight into one packed tensor. A tensor whose last
axis is not contiguous is copied first. Nothing of size queries times keys is stored.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from longskip.kernels import attention_backward_triton, attention_forward_triton, jit, library
from longskip.kernels.attention import offsets_of
from longskip.kernels.attention_backward_triton import backward, is_short
from longskip.kernels.attention_forward_triton import forward
from longskip.kernels.attention_tiles_triton import Call
from longskip.kernels.backends import Sizes, register
from longskip.kernels.formulas import attention_backward, attention_forward

HEAD_DIMS = (32, 48, 64, 72, 80, 96, 128, 160, 256)
CONFIGURATIONS = {**attention_forward_triton.CONFIGURATIONS, **attention_backward_triton.CONFIGURATIONS}


def _apart(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v ``(B, T, H, Dh)`` with a contiguous last axis."""
    q = q if q.stride(-1) == 1 else q.contiguous()
    if k is None or v is None:
        packed = q.unbind(2)
        return packed[0], packed[1], packed[2]
    return q, k if k.stride(-1) == 1 else k.contiguous(), v if v.stride(-1) == 1 else v.contiguous()


def _batch(q: Tensor, k: Tensor | None, v: Tensor | None, key_mask: Tensor | None, scale: float) -> Call:
    q, k, v = _apart(q, k, v)
    mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    return Call(q, k, v, mask, None, (q.shape[1], k.shape[1]), scale)


def _sequences(
    q: Tensor, k: Tensor | None, v: Tensor | None, offsets_q: Tensor, offsets_k: Tensor, scale: float
) -> Call:
    """``(N, H, Dh)`` or packed ``(N, 3, H, Dh)`` as a batch of 1; the offsets are on the host, and are checked here."""
    q, k, v = _apart(q[None], k if k is None else k[None], v if v is None else v[None])
    longest = [0, 0]
    for at, (name, offsets, rows) in enumerate((("cu_seqlens", offsets_q, q), ("cu_seqlens_k", offsets_k, k))):
        ends = offsets_of(name, offsets, rows.shape[1])
        longest[at] = max((end - start for start, end in itertools.pairwise(ends)), default=0)
    places = tuple(offsets.to(device=q.device, dtype=torch.int64) for offsets in (offsets_q, offsets_k))
    return Call(q, k, v, None, (places[0], places[1]), (longest[0], longest[1]), scale)


def _gradients(
    call: Call, grad: Tensor, out: Tensor, lse: Tensor, packed: bool, like: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv); packed: (dqkv in the shape ``like``, nothing, nothing)."""
    dtype, device = call.q.dtype, call.q.device
    grad = grad.contiguous()
    if packed:
        whole = jit.empty(like, dtype, device)
        parts = whole.view(*call.q.shape[:2], 3, *call.q.shape[2:]).unbind(2)
        backward(call, out, lse, grad, parts[0], parts[1], parts[2])
        return whole, whole.new_empty(0), whole.new_empty(0)
    dq, dk, dv = (jit.empty(t.shape, dtype, device) for t in (call.q, call.k, call.v))
    backward(call, out, lse, grad, dq, dk, dv)
    return dq, dk, dv


def _forward(
    q: Tensor, k: Tensor | None, v: Tensor | None, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return forward(_batch(q, k, v, key_mask, scale))


def _fake_forward(
    q: Tensor, k: Tensor | None, v: Tensor | None, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, head_dim = q.shape[0], q.shape[1], q.shape[-2], q.shape[-1]
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    return q.new_empty((batch, queries, heads, head_dim)), lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, key_mask: Tensor | None, out: Tensor, lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _gradients(_batch(q, k, v, key_mask, scale), grad, out, lse, k is None, tuple(q.shape))


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, key_mask: Tensor | None, out: Tensor, lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _fakes(q, k, v)


def _varlen_forward(
    q: Tensor, k: Tensor | None, v: Tensor | None, offsets_q: Tensor, offsets_k: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = forward(_sequences(q, k, v, offsets_q, offsets_k, scale))
    return out[0], lse[0]


def _fake_varlen_forward(
    q: Tensor, k: Tensor | None, v: Tensor | None, offsets_q: Tensor, offsets_k: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    rows, heads, head_dim = q.shape[0], q.shape[-2], q.shape[-1]
    return q.new_empty((rows, heads, head_dim)), q.new_empty((heads, rows), dtype=torch.float32)


def _varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, offsets_q: Tensor, offsets_k: Tensor, out: Tensor,
    lse: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    call = _sequences(q, k, v, offsets_q, offsets_k, scale)
    found = _gradients(call, grad[None], out[None], lse[None], k is None, tuple(q.shape))
    return found if k is None else (found[0][0], found[1][0], found[2][0])


def _fake_varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, offsets_q: Tensor, offsets_k: Tensor, out: Tensor,
    lse: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _fakes(q, k, v)


def _fakes(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if k is None or v is None:
        return q.new_empty(q.shape), q.new_empty(0), q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


# --- contractions ---------------------------------------------------------------------------------------------------


def _calls(q: Tensor, k: Tensor | None) -> list[dict[str, Any]]:
    return [
        {
            "batch": q.shape[0], "queries": q.shape[1], "keys": q.shape[1] if k is None else k.shape[1],
            "heads": q.shape[-2], "head_dim": q.shape[-1],
        }
    ]  # fmt: skip


def _varlen_calls(q: Tensor, offsets_q: Tensor, offsets_k: Tensor) -> list[dict[str, Any]]:
    lengths = zip(offsets_q.diff().tolist(), offsets_k.diff().tolist(), strict=True)
    return [
        {"batch": 1, "queries": int(m), "keys": int(n), "heads": q.shape[-2], "head_dim": q.shape[-1]}
        for m, n in lengths
    ]


def _forward_flops(calls: list[dict[str, Any]]) -> int:
    return sum(attention_forward(**call).flops for call in calls)


def _recomputed(calls: list[dict[str, Any]]) -> int:
    """FLOPs of the products that the backward makes again: QKᵀ; with two kernels QKᵀ twice, and dO Vᵀ once more."""
    longest = max((call["queries"] for call in calls), default=0), max((call["keys"] for call in calls), default=0)
    once = sum(attention_backward(**call, recompute=True).flops - attention_backward(**call).flops for call in calls)
    return once if not calls or is_short(longest, calls[0]["head_dim"]) else 3 * once


def _backward_flops(calls: list[dict[str, Any]]) -> int:
    """Everything that the kernels execute, but for the padding of blocks and head dims."""
    return sum(attention_backward(**call).flops for call in calls) + _recomputed(calls)


forward_op = library.custom(
    "attention", _forward, _fake_forward, flops=lambda q, k, v, mask, scale: _forward_flops(_calls(q, k))
)
backward_op = library.custom(
    "attention_backward", _backward, _fake_backward,
    flops=lambda grad, q, k, *rest: _backward_flops(_calls(q, k)),
    recomputed=lambda grad, q, k, *rest: _recomputed(_calls(q, k)),
)  # fmt: skip
varlen_forward_op = library.custom(
    "attention_varlen", _varlen_forward, _fake_varlen_forward,
    flops=lambda q, k, v, offsets_q, offsets_k, scale: _forward_flops(_varlen_calls(q, offsets_q, offsets_k)),
)  # fmt: skip
varlen_backward_op = library.custom(
    "attention_varlen_backward", _varlen_backward, _fake_varlen_backward,
    flops=lambda grad, q, k, v, first, second, *rest: _backward_flops(_varlen_calls(q, first, second)),
    recomputed=lambda grad, q, k, v, first, second, *rest: _recomputed(_varlen_calls(q, first, second)),
)  # fmt: skip


# --- derivatives ----------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _derivative(op: library.Op) -> Any:
    def differentiate(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        rest = (None,) * (len(ctx.needs_input_grad) - 3)
        if grad is None:
            return None, None, None, *rest
        found = op(grad, *ctx.saved_tensors, ctx.scale)
        wanted = ctx.needs_input_grad[:3]
        return *(tensor if wants else None for tensor, wants in zip(found, wanted, strict=True)), *rest

    return differentiate


library.differentiable(forward_op, backward_op, _derivative(backward_op), _save)
library.differentiable(varlen_forward_op, varlen_backward_op, _derivative(varlen_backward_op), _save)


# --- registration ---------------------------------------------------------------------------------------------------


def _unfit(dtype: torch.dtype, sizes: Sizes) -> str | None:
    if sizes["head_dim"] not in HEAD_DIMS:
        return f"its kernels take the head dims {', '.join(map(str, HEAD_DIMS))}, not {sizes['head_dim']}"
    return jit.unfit_dtype(dtype)


@register("attention", "triton", unusable=jit.unusable, unfit=_unfit)
def attention_triton(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    library.plain("attention", q, k, v)
    out: Tensor = forward_op(q, k, v, key_mask, q.shape[-1] ** -0.5 if scale is None else float(scale))[0]
    return out


@register("attention_varlen", "triton", unusable=jit.unusable, unfit=_unfit)
def attention_varlen_triton(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    library.plain("attention_varlen", q, k, v)
    other = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    out: Tensor = varlen_forward_op(q, k, v, cu_seqlens, other, q.shape[-1] ** -0.5 if scale is None else float(scale))[
        0
    ]
    return out
