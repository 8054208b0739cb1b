"""Layer norm and RMS norm over the last axis, with an optional residual added before.

    layer_norm(x) = (x - mean) / sqrt(var + eps) * weight + bias      (Ba et al. 2016, biased variance)
    rms_norm(x)   = x / sqrt(mean(x²) + eps) * weight                 (Zhang & Sennrich 2019)

Statistics and the affine map are computed in float32 (float64 for float64 inputs), then rounded to x's dtype once.
With a residual both the sum ``s = x + residual`` (rounded to x's dtype) and the norm of that s are returned.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longskip.kernels.arguments import check_affine, check_epsilon, check_like, check_rows, cpu_half, wide
from longskip.kernels.backends import register, register_formula, register_triton, serve

Normed = Tensor | tuple[Tensor, Tensor]


def _affine(normed: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        normed = normed * wide(weight)
    if bias is not None:
        normed = normed + wide(bias)
    return normed


@register("layer_norm", "reference")
def layer_norm_reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Normed:
    """The definition of ``layer_norm``."""
    total = x if residual is None else x + residual
    up = wide(total)
    centred = up - up.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    out = _affine(centred * rstd, weight, bias).to(x.dtype)
    return out if residual is None else (total, out)


@register("layer_norm", "torch")
def layer_norm_torch(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Normed:
    """``F.layer_norm``, in float32 for mixed dtypes and for half precision on the CPU."""
    total = x if residual is None else x + residual
    dtype = torch.float32 if cpu_half(x) else x.dtype
    for affine in (weight, bias):
        if affine is not None:
            dtype = torch.promote_types(dtype, affine.dtype)
    weight = weight if weight is None else weight.to(dtype)
    bias = bias if bias is None else bias.to(dtype)
    out = F.layer_norm(total.to(dtype), (x.shape[-1],), weight, bias, eps).to(x.dtype)
    return out if residual is None else (total, out)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Normed:
    """Layer norm of ``x (..., h)`` over h with ``weight (h,)`` and ``bias (h,)`` (x's dtype or float32, each optional).

    With ``residual`` (x's shape and dtype) returns ``(x + residual, layer_norm of that)``, otherwise the norm alone.
    Raises KernelArgumentError on shapes, dtypes or devices that do not fit.
    """
    op = "layer_norm"
    width = check_rows(op, "x", x)
    if weight is not None:
        check_affine(op, "weight", weight, "x", x, width)
    if bias is not None:
        check_affine(op, "bias", bias, "x", x, width)
    if residual is not None:
        check_like(op, "residual", residual, "x", x, x.shape, "x's shape")
    check_epsilon(op, eps)
    return serve(op, x, x, weight, bias, eps=eps, residual=residual)


@register("rms_norm", "reference")
def rms_norm_reference(
    x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, residual: Tensor | None = None
) -> Normed:
    """The definition of ``rms_norm``."""
    total = x if residual is None else x + residual
    up = wide(total)
    rstd = (up.square().mean(-1, keepdim=True) + eps).rsqrt()
    out = _affine(up * rstd, weight, None).to(x.dtype)
    return out if residual is None else (total, out)


@register("rms_norm", "torch")
def rms_norm_torch(
    x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, residual: Tensor | None = None
) -> Normed:
    """``F.rms_norm``, in float32 where the weight is float32 and x is not."""
    total = x if residual is None else x + residual
    dtype = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
    weight = weight if weight is None else weight.to(dtype)
    out = F.rms_norm(total.to(dtype), (x.shape[-1],), weight, eps).to(x.dtype)
    return out if residual is None else (total, out)


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, residual: Tensor | None = None) -> Normed:
    """RMS norm of ``x (..., h)`` over h with ``weight (h,)`` (x's dtype or float32, optional).

    With ``residual`` (x's shape and dtype) returns ``(x + residual, rms_norm of that)``, otherwise the norm alone.
    Raises KernelArgumentError on shapes, dtypes or devices that do not fit.
    """
    op = "rms_norm"
    width = check_rows(op, "x", x)
    if weight is not None:
        check_affine(op, "weight", weight, "x", x, width)
    if residual is not None:
        check_like(op, "residual", residual, "x", x, x.shape, "x's shape")
    check_epsilon(op, eps)
    return serve(op, x, x, weight, eps=eps, residual=residual)


def _layer_shapes(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> dict[str, int]:
    return {"bias": bias is not None, **_rms_shapes(x, weight, residual=residual)}


def _rms_shapes(
    x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, residual: Tensor | None = None
) -> dict[str, int]:
    return {
        "rows": x.numel() // x.shape[-1],
        "width": x.shape[-1],
        "weight": weight is not None,
        "residual": residual is not None,
        "itemsize": x.element_size(),
    }


register_formula("layer_norm", _layer_shapes)
register_formula("rms_norm", _rms_shapes)
register_triton("norm")
