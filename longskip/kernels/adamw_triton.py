"""AdamW as one Triton kernel: gradient scale, both moments, the step, the weight average and a low-precision copy.

Reads g, m, v, p (and the average) once and writes m, v, p (the average, the copy) once: 28 bytes a value, 8 more with the
average, 2 more with a bfloat16 copy. One launch per tensor: a rank's shards are few and long.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longskip.kernels import jit, tables
from longskip.kernels.adamw import Tensors
from longskip.kernels.backends import Sizes, register

CONFIGURATIONS = {
    "_adamw": (
        {"BLOCK": 1024, "num_warps": 4},
        {"BLOCK": 2048, "num_warps": 4},
        {"BLOCK": 2048, "num_warps": 8},
        {"BLOCK": 4096, "num_warps": 8},
    )
}


@triton.jit
def _adamw(
    param, grad, exp_avg, exp_avg_sq, ema, copy, scale_at, scale, values,
    lr, decay, beta1, beta2, rest1, rest2, correction1, correction2, eps, ema_rest,
    SCALE_AT: tl.constexpr, EMA: tl.constexpr, COPY: tl.constexpr, MOVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i: values i·BLOCK and on. ``decay`` is 1 - lr · weight decay; MOVE is False for a rate of exactly 0."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < values
    g = tl.load(grad + at, mask=inside, other=0.0)
    g = g * tl.load(scale_at).to(tl.float32) if SCALE_AT else g * scale
    m = beta1 * tl.load(exp_avg + at, mask=inside, other=0.0) + rest1 * g
    v = beta2 * tl.load(exp_avg_sq + at, mask=inside, other=0.0) + rest2 * g * g
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)
    p = tl.load(param + at, mask=inside, other=0.0)
    if MOVE:
        step = tl.div_rn(m, correction1) / (tl.sqrt_rn(tl.div_rn(v, correction2)) + eps)
        p = decay * p - lr * step
        tl.store(param + at, p, mask=inside)
    if EMA:
        average = tl.load(ema + at, mask=inside, other=0.0)
        tl.store(ema + at, average + ema_rest * (p - average), mask=inside)
    if COPY:
        tl.store(copy + at, p.to(copy.dtype.element_ty), mask=inside)


def _unfit(dtype: torch.dtype, sizes: Sizes) -> str | None:
    return None if dtype == torch.float32 else f"its kernel takes float32, not {dtype}"


@register("adamw", "triton", unusable=jit.unusable, unfit=_unfit)
def adamw_triton(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors,
    *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int,
    grad_scale: float | Tensor = 1.0, emas: Tensors | None = None, ema_decay: float = 0.0, copies: Tensors | None = None,
) -> None:  # fmt: skip
    """In place, as the definition; the scale as a tensor is read by the kernel, so that the host does not wait for it."""
    device = params[0].device
    where = tables.bucket(torch.float32, {"values": max(p.numel() for p in params)})
    constants = tables.best_configuration(device, "_adamw", where) or CONFIGURATIONS["_adamw"][2]
    by_tensor = isinstance(grad_scale, Tensor)
    beta1, beta2 = betas
    settings = (lr, 1 - lr * weight_decay, beta1, beta2, 1 - beta1, 1 - beta2, 1 - beta1**step, 1 - beta2**step, eps)
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        jit.launch(
            _adamw, (jit.cdiv(p.numel(), constants["BLOCK"]),),
            p, g, m, v, p if emas is None else emas[i], p if copies is None else copies[i],
            grad_scale if by_tensor else p, 1.0 if by_tensor else float(grad_scale), p.numel(), *settings, 1 - ema_decay,
            SCALE_AT=by_tensor, EMA=emas is not None, COPY=copies is not None, MOVE=lr != 0.0, **constants,
        )  # fmt: skip
