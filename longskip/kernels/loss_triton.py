"""The diffusion loss as one Triton kernel: target, squared error, weight and the prediction's gradient in one pass.

The gradient for a cotangent of 1 is written in the forward pass, while prediction and target are at hand; the backward
multiplies it by each sample's cotangent. Sums are made per block and added in a fixed order: same call, same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longskip.errors import BackendError
from longskip.kernels import jit, library
from longskip.kernels.backends import Sizes, register

BLOCK = 2048
OPTIONS = {"BLOCK": BLOCK, "num_warps": 8}


@triton.jit
def _factor(time, weight, sample, time_floor, X_KIND: tl.constexpr):
    factor = tl.load(weight + sample).to(tl.float32)
    if X_KIND:
        floored = tl.load(time + sample).to(tl.float32)
        floored = tl.maximum(floored, time_floor, propagate_nan=tl.PropagateNan.ALL)
        factor = factor / (floored * floored)
    return factor


@triton.jit
def _loss_forward(
    prediction, clean, noise, time, weight, partial, gradient, values, time_floor,
    X_KIND: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, j): block j of sample b. ``partial (B, blocks)`` takes the block's sum of squared errors."""
    sample = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < values
    where = sample * values + at
    guess = tl.load(prediction + where, mask=inside, other=0.0).to(tl.float32)
    target = tl.load(clean + where, mask=inside, other=0.0).to(tl.float32)
    if not X_KIND:
        target = tl.load(noise + where, mask=inside, other=0.0).to(tl.float32) - target
    error = guess - target
    tl.store(partial + sample * tl.num_programs(1) + block, tl.sum(error * error, 0))
    if GRADIENT:
        slope = 2.0 * error / values * _factor(time, weight, sample, time_floor, X_KIND)
        tl.store(gradient + where, slope.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def _loss_sum(partial, time, weight, loss, blocks, values, time_floor, X_KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Program b adds the sums of sample b in order, and weighs their mean."""
    sample = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, blocks, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partial + sample * blocks + at, mask=at < blocks, other=0.0)
    mean = tl.sum(total, 0) / values
    tl.store(loss + sample, mean * _factor(time, weight, sample, time_floor, X_KIND))


@triton.jit
def _loss_backward(gradient, cotangent, out, values, BLOCK: tl.constexpr):
    """Program (b, j): the saved gradient times the sample's cotangent."""
    sample = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    where = sample * values + at
    slope = tl.load(gradient + where, mask=at < values, other=0.0).to(tl.float32)
    slope *= tl.load(cotangent + sample).to(tl.float32)
    tl.store(out + where, slope.to(out.dtype.element_ty), mask=at < values)


def _forward(
    prediction: Tensor, clean: Tensor, noise: Tensor, time: Tensor, weight: Tensor,
    x_kind: bool, time_floor: float, keep_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch = prediction.shape[0]
    values = prediction[0].numel() if batch else 1
    blocks = jit.cdiv(values, BLOCK)
    partial = jit.empty((batch, blocks), torch.float32, prediction.device)
    loss = jit.empty((batch,), torch.float32, prediction.device)
    gradient = jit.empty(prediction.shape if keep_gradient else (0,), prediction.dtype, prediction.device)
    tensors = [t.contiguous() for t in (prediction, clean, noise, time, weight)]
    jit.launch(
        _loss_forward, (batch, blocks), *tensors, partial, gradient, values, time_floor,
        X_KIND=x_kind, GRADIENT=keep_gradient, **OPTIONS,
    )  # fmt: skip
    times = tensors[3:]
    jit.launch(
        _loss_sum, (batch,), partial, *times, loss, blocks, values, time_floor, X_KIND=x_kind, BLOCK=128, num_warps=1
    )  # fmt: skip
    return loss, gradient


def _fake_forward(
    prediction: Tensor, clean: Tensor, noise: Tensor, time: Tensor, weight: Tensor,
    x_kind: bool, time_floor: float, keep_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    gradient = prediction.new_empty(prediction.shape if keep_gradient else (0,))
    return prediction.new_empty(prediction.shape[0], dtype=torch.float32), gradient


def _backward(gradient: Tensor, cotangent: Tensor) -> Tensor:
    out = jit.empty(gradient.shape, gradient.dtype, gradient.device)
    batch = gradient.shape[0]
    values = gradient[0].numel() if batch else 1
    grid = (batch, jit.cdiv(values, BLOCK))
    jit.launch(_loss_backward, grid, gradient, cotangent.contiguous(), out, values, **OPTIONS)
    return out


def _fake_backward(gradient: Tensor, cotangent: Tensor) -> Tensor:
    return gradient.new_empty(gradient.shape)


forward_op = library.custom("diffusion_loss", _forward, _fake_forward)
backward_op = library.custom("diffusion_loss_backward", _backward, _fake_backward)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, clean, noise, _, _, ctx.x_kind, _, _ = inputs
    ctx.dtypes = clean.dtype, noise.dtype
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, cotangent, _):  # type: ignore[no-untyped-def]
    """The error is prediction - clean, or prediction - noise + clean: the others' gradients are its own, or minus it."""
    wants = ctx.needs_input_grad
    if cotangent is None:
        return (None,) * 8
    slope = backward_op(ctx.saved_tensors[0], cotangent)
    of_clean = (-slope if ctx.x_kind else slope.clone()).to(ctx.dtypes[0]) if wants[1] else None
    of_noise = (torch.zeros_like(slope) if ctx.x_kind else -slope).to(ctx.dtypes[1]) if wants[2] else None
    return slope if wants[0] else None, of_clean, of_noise, None, None, None, None, None


library.differentiable(forward_op, backward_op, _differentiate, _save)


def _unfit(dtype: torch.dtype, sizes: Sizes) -> str | None:
    if sizes["values"] > BLOCK * 65535:  # a grid's second axis
        return f"it takes at most {BLOCK * 65535:,} values a sample, not {sizes['values']:,}"
    return jit.unfit_dtype(dtype)


@register("diffusion_loss", "triton", unusable=jit.unusable, unfit=_unfit)
def diffusion_loss_triton(
    prediction: Tensor, clean: Tensor, noise: Tensor, time: Tensor, weight: Tensor,
    *, prediction_kind: str = "v", time_floor: float = 0.05,
) -> Tensor:  # fmt: skip
    """Gradients flow to prediction, clean and noise; BackendError where time or weight asks for one."""
    library.plain("diffusion_loss", prediction, clean, noise, time, weight)
    if torch.is_grad_enabled() and (time.requires_grad or weight.requires_grad):
        raise BackendError(
            "diffusion_loss by triton gives no gradient to time or weight",
            cure='use kernels.use("reference") or "torch"',
        )
    keep = torch.is_grad_enabled() and (prediction.requires_grad or clean.requires_grad or noise.requires_grad)
    loss: Tensor = forward_op(prediction, clean, noise, time, weight, prediction_kind == "x", time_floor, keep)[0]
    return loss
