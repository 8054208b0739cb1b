"""Adaptive layer norm and the gated residual by the row-wise Triton kernels, each direction one pass.

Forward and backward of ``gated_adaln`` take x, y and the cotangents of both results once and write s, the modulated row
and the gradients of x and y once; the gradients of gate, shift and scale are summed in the same pass, without atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longskip.kernels import library, rows_triton
from longskip.kernels.backends import register
from longskip.kernels.jit import unusable


def _forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return rows_triton.forward(x, y, gate, scale, shift, eps=eps, per_sample=True)


def _fake_forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.shape[0] * x.shape[1]
    return (
        x.new_empty(x.shape if y is not None else (0,)),
        x.new_empty(x.shape),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.float32),
    )


def _backward(
    s: Tensor, dout: Tensor, dtotal: Tensor | None, y: Tensor | None, gate: Tensor | None, scale: Tensor,
    mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return rows_triton.backward(
        s, dout, dtotal, y, gate, scale, mean, rstd,
        dy=y is not None, weight_like=scale, bias_like=scale, gate_like=gate, per_sample=True,
    )  # fmt: skip


def _fake_backward(
    s: Tensor, dout: Tensor, dtotal: Tensor | None, y: Tensor | None, gate: Tensor | None, scale: Tensor,
    mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    vectors = (scale.new_empty(scale.shape), scale.new_empty(scale.shape), rows_triton.fake_like(gate, True, s))
    return s.new_empty(s.shape), rows_triton.fake_like(y, True, s), *vectors


forward_op = library.custom("adaln", _forward, _fake_forward)
backward_op = library.custom("adaln_backward", _backward, _fake_backward)


def _gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return rows_triton.forward(x, y, gate, norm=False, per_sample=True)[0]


def _fake_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _gated_backward(cotangent: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    _, dy, _, _, d_gate = rows_triton.backward(
        None, None, cotangent, y, gate, None, None, None, dx=False, dy=True, gate_like=gate, per_sample=True
    )
    return dy, d_gate


def _fake_gated_backward(cotangent: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


gated_op = library.custom("gated_residual", _gated, _fake_gated)
gated_backward_op = library.custom("gated_residual_backward", _gated_backward, _fake_gated_backward)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, y, gate, _, scale, _ = inputs
    total, _, mean, rstd = output
    ctx.save_for_backward(x if y is None else total, y, gate, scale, mean, rstd)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dtotal, dout, _, __):  # type: ignore[no-untyped-def]
    s, y, gate, scale, mean, rstd = ctx.saved_tensors
    if dout is None:  # the sum alone was used, or neither
        if dtotal is None:
            return (None,) * 6
        return dtotal, *gated_backward_op(dtotal, y, gate), None, None, None
    dx, dy, d_scale, d_shift, d_gate = backward_op(s, dout, dtotal, y, gate, scale, mean, rstd)
    return dx, None if y is None else dy, None if y is None else d_gate, d_shift, d_scale, None


def _save_gated(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.set_materialize_grads(False)


def _differentiate_gated(ctx, cotangent):  # type: ignore[no-untyped-def]
    """The gradient of x is the cotangent itself."""
    if cotangent is None:
        return None, None, None
    return cotangent, *gated_backward_op(cotangent, *ctx.saved_tensors)


library.differentiable(forward_op, backward_op, _differentiate, _save)
library.differentiable(gated_op, gated_backward_op, _differentiate_gated, _save_gated)


@register("adaln", "triton", unusable=unusable, unfit=rows_triton.unfit)
def adaln_triton(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6) -> Tensor:
    library.plain("adaln", x, shift, scale)
    out: Tensor = forward_op(x, None, None, shift, scale, eps)[1]
    return out


@register("gated_adaln", "triton", unusable=unusable, unfit=rows_triton.unfit)
def gated_adaln_triton(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    library.plain("gated_adaln", x, y, gate, shift, scale)
    total, out, _, _ = forward_op(x, y, gate, shift, scale, eps)
    return total, out


@register("gated_residual", "triton", unusable=unusable, unfit=rows_triton.unfit)
def gated_residual_triton(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    library.plain("gated_residual", x, y, gate)
    total: Tensor = gated_op(x, y, gate)
    return total
