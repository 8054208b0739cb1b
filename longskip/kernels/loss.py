"""The training loss of rectified flow (Liu et al. 2022; FLOPs-matched studies use it as in 2410.08184).

    x_t = (1 - t) x0 + t eps,     v = eps - x0
    prediction_kind "v":  mean (prediction - v)²
    prediction_kind "x":  mean (prediction - x0)² / max(t, time_floor)²

Since v = (x_t - x0) / t, an x-prediction's error divided by t is the velocity's error, so both kinds are one loss where
t >= time_floor; the floor bounds the weight as t goes to 0. Computed in float32 (float64 for float64 predictions).
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from longskip.kernels.arguments import check_choice, check_device, check_float, check_rows, refuse, wide
from longskip.kernels.backends import register, register_formula, register_triton, serve

PREDICTION_KINDS = ("v", "x")


@register("diffusion_loss", "reference")
def diffusion_loss_reference(
    prediction: Tensor,
    clean: Tensor,
    noise: Tensor,
    time: Tensor,
    weight: Tensor,
    *,
    prediction_kind: str = "v",
    time_floor: float = 0.05,
) -> Tensor:
    """The definition of ``diffusion_loss``."""
    prediction, clean, noise = wide(prediction), wide(clean), wide(noise)
    factor = weight.to(prediction.dtype)
    if prediction_kind == "v":
        error = prediction - (noise - clean)
    else:
        error = prediction - clean
        factor = factor / time.to(prediction.dtype).clamp(min=time_floor).square()
    return error.square().flatten(1).mean(1) * factor


@register("diffusion_loss", "torch")
def diffusion_loss_torch(
    prediction: Tensor,
    clean: Tensor,
    noise: Tensor,
    time: Tensor,
    weight: Tensor,
    *,
    prediction_kind: str = "v",
    time_floor: float = 0.05,
) -> Tensor:
    """``F.mse_loss`` per value, which skips one temporary.

    A dot product per sample is faster still, but it is a matrix product to a counter of contractions.
    """
    prediction, clean, noise = wide(prediction), wide(clean), wide(noise)
    factor = weight.to(prediction.dtype)
    target = noise - clean if prediction_kind == "v" else clean
    if prediction_kind == "x":
        factor = factor / time.to(prediction.dtype).clamp(min=time_floor).square()
    return F.mse_loss(prediction, target, reduction="none").flatten(1).mean(1) * factor


def diffusion_loss(
    prediction: Tensor,
    clean: Tensor,
    noise: Tensor,
    time: Tensor,
    weight: Tensor,
    *,
    prediction_kind: str = "v",
    time_floor: float = 0.05,
) -> Tensor:
    """Mean squared error per sample in velocity space, times weight: ``(B,)`` in float32 (or float64).

    prediction, clean, noise ``(B, ...)`` of one shape, any floating dtypes; time ``(B,)`` in [0, 1], weight ``(B,)``.
    A sample of weight 0 counts 0 while its values are finite; NaN propagates. Raises KernelArgumentError on shapes or
    devices that do not fit.
    """
    op = "diffusion_loss"
    check_rows(op, "prediction", prediction)
    if prediction.ndim < 2 or math.prod(prediction.shape[1:]) < 1:
        refuse(op, "prediction", f"of shape {tuple(prediction.shape)}", "(B, ...) with at least one value per sample")
    for name, tensor in (("clean", clean), ("noise", noise)):
        check_float(op, name, tensor, prediction.shape, "prediction's shape")
        check_device(op, name, tensor, "prediction", prediction)
    for name, tensor in (("time", time), ("weight", weight)):
        check_float(op, name, tensor, (prediction.shape[0],), "(B,)")
        check_device(op, name, tensor, "prediction", prediction)
    check_choice(op, "prediction_kind", prediction_kind, PREDICTION_KINDS)
    if not 0.0 < time_floor <= 1.0:
        refuse(op, "time_floor", time_floor, "0 < time_floor <= 1")
    return serve(
        op, prediction, prediction, clean, noise, time, weight, prediction_kind=prediction_kind, time_floor=time_floor
    )


def _shapes(
    prediction: Tensor,
    clean: Tensor,
    noise: Tensor,
    time: Tensor,
    weight: Tensor,
    *,
    prediction_kind: str = "v",
    time_floor: float = 0.05,
) -> dict[str, int]:
    return {
        "batch": prediction.shape[0],
        "values": math.prod(prediction.shape[1:]),
        "x_kind": prediction_kind == "x",
        "itemsize": prediction.element_size(),
    }


register_formula("diffusion_loss", _shapes)
register_triton("loss")
