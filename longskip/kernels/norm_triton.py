"""Layer norm and RMS norm by the row-wise Triton kernels: the residual is added, and both results written, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from longskip.kernels import library, rows_triton
from longskip.kernels.backends import register
from longskip.kernels.jit import unusable

Normed = Tensor | tuple[Tensor, Tensor]


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return rows_triton.forward(x, residual, None, weight, bias, eps=eps, centred=centred)


def _fake_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    return (
        x.new_empty(x.shape if residual is not None else (0,)),
        x.new_empty(x.shape),
        x.new_empty(rows if centred else 0, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.float32),
    )


def _backward(
    s: Tensor, dout: Tensor, dtotal: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    mean: Tensor | None, rstd: Tensor, needs_weight: bool, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx, _, d_weight, d_bias, _ = rows_triton.backward(
        s, dout, dtotal, None, None, weight, mean, rstd,
        weight_like=weight if needs_weight else None, bias_like=bias if needs_bias else None,
    )  # fmt: skip
    return dx, d_weight, d_bias


def _fake_backward(
    s: Tensor, dout: Tensor, dtotal: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    mean: Tensor | None, rstd: Tensor, needs_weight: bool, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        s.new_empty(s.shape),
        rows_triton.fake_like(weight, needs_weight, s),
        rows_triton.fake_like(bias, needs_bias, s),
    )


forward_op = library.custom("norm", _forward, _fake_forward)
backward_op = library.custom("norm_backward", _backward, _fake_backward)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, residual, weight, bias, _, centred = inputs
    total, _, mean, rstd = output
    ctx.save_for_backward(x if residual is None else total, weight, bias, mean if centred else None, rstd)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dtotal, dout, _, __):  # type: ignore[no-untyped-def]
    if dout is None:  # the sum alone was used; neither was: None
        return dtotal, dtotal if ctx.needs_input_grad[1] else None, None, None, None, None
    s, weight, bias, mean, rstd = ctx.saved_tensors
    wants = ctx.needs_input_grad
    dx, d_weight, d_bias = backward_op(s, dout, dtotal, weight, bias, mean, rstd, wants[2], wants[3])
    return dx, dx if wants[1] else None, d_weight if wants[2] else None, d_bias if wants[3] else None, None, None


library.differentiable(forward_op, backward_op, _differentiate, _save)


@register("layer_norm", "triton", unusable=unusable, unfit=rows_triton.unfit)
def layer_norm_triton(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Normed:
    return _norm("layer_norm", x, weight, bias, eps, residual, True)


@register("rms_norm", "triton", unusable=unusable, unfit=rows_triton.unfit)
def rms_norm_triton(
    x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, residual: Tensor | None = None
) -> Normed:
    return _norm("rms_norm", x, weight, None, eps, residual, False)


def _norm(
    op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None, centred: bool
) -> Normed:
    library.plain(op, x, weight, bias, residual)
    total, out, _, _ = forward_op(x, residual, weight, bias, eps, centred)
    return out if residual is None else (total, out)
