"""Adaptive layer norm and the gated residual round it, as in diffusion transformers (DiT, Peebles & Xie 2022).

    adaln(x)          = LN(x) * (1 + scale) + shift               LN without affine; shift, scale, gate: one per sample
    gated_residual    = x + gate * y
    gated_adaln       = (s, adaln(s))  with  s = x + gate * y

By definition statistics and modulation are computed in float32 (float64 for float64 inputs) and rounded once; s is
rounded to x's dtype before it is normed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longskip.kernels.arguments import check_epsilon, check_float, check_like, cpu_half, refuse, wide
from longskip.kernels.backends import register, register_formula, register_triton, serve


@register("adaln", "reference")
def adaln_reference(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6) -> Tensor:
    """The definition of ``adaln``."""
    up = wide(x)
    centred = up - up.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    out = centred * rstd * (1 + wide(scale))[:, None, :] + wide(shift)[:, None, :]
    return out.to(x.dtype)


@register("gated_residual", "reference")
def gated_residual_reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """The definition of ``gated_residual``."""
    return (wide(x) + wide(gate)[:, None, :] * wide(y)).to(x.dtype)


@register("gated_adaln", "reference")
def gated_adaln_reference(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The definition of ``gated_adaln``."""
    total = gated_residual_reference(x, y, gate)
    return total, adaln_reference(total, shift, scale, eps=eps)


@register("adaln", "torch")
def adaln_torch(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6) -> Tensor:
    """``F.layer_norm`` and one ``addcmul``, in float32 for half precision on the CPU; elsewhere each step rounds."""
    dtype = x.dtype
    if cpu_half(x):
        x, shift, scale = x.float(), shift.float(), scale.float()
    normed = F.layer_norm(x, (x.shape[-1],), eps=eps)
    return torch.addcmul(shift[:, None, :], normed, (1 + scale)[:, None, :]).to(dtype)


@register("gated_residual", "torch")
def gated_residual_torch(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """One ``addcmul``."""
    return torch.addcmul(x, gate[:, None, :], y)


@register("gated_adaln", "torch")
def gated_adaln_torch(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """``gated_residual_torch``, then ``adaln_torch``."""
    total = gated_residual_torch(x, y, gate)
    return total, adaln_torch(total, shift, scale, eps=eps)


def adaln(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6) -> Tensor:
    """``LN(x) * (1 + scale) + shift`` for ``x (B, T, h)``, shift and scale ``(B, h)``, all of one dtype; ``(B, T, h)``.

    Raises KernelArgumentError on shapes, dtypes or devices that do not fit.
    """
    _check_tokens("adaln", x)
    _check_vectors("adaln", x, shift=shift, scale=scale)
    check_epsilon("adaln", eps)
    return serve("adaln", x, x, shift, scale, eps=eps)


def gated_adaln(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """``(s, adaln(s, shift, scale))`` with ``s = x + gate * y``: the end of one branch and the start of the next.

    x, y ``(B, T, h)``; gate, shift, scale ``(B, h)``; all of one dtype. Raises KernelArgumentError on shapes, dtypes
    or devices that do not fit.
    """
    _check_tokens("gated_adaln", x)
    check_like("gated_adaln", "y", y, "x", x, x.shape, "x's shape (B, T, h)")
    _check_vectors("gated_adaln", x, gate=gate, shift=shift, scale=scale)
    check_epsilon("gated_adaln", eps)
    return serve("gated_adaln", x, x, y, gate, shift, scale, eps=eps)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """``x + gate * y`` for x, y ``(B, T, h)`` and gate ``(B, h)``, all of one dtype.

    Raises KernelArgumentError on shapes, dtypes or devices that do not fit.
    """
    _check_tokens("gated_residual", x)
    check_like("gated_residual", "y", y, "x", x, x.shape, "x's shape (B, T, h)")
    _check_vectors("gated_residual", x, gate=gate)
    return serve("gated_residual", x, x, y, gate)


def _check_tokens(op: str, x: Tensor) -> None:
    check_float(op, "x", x, (None, None, None), "(B, T, h)")
    if x.shape[-1] < 1:
        refuse(op, "x", f"of shape {tuple(x.shape)}", "(B, T, h) with h >= 1")


def _check_vectors(op: str, x: Tensor, **vectors: Tensor) -> None:
    for name, vector in vectors.items():
        check_like(op, name, vector, "x", x, (x.shape[0], x.shape[2]), "(B, h)")


def _adaln_shapes(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6) -> dict[str, int]:
    return _token_shapes(x)


def _gated_adaln_shapes(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6
) -> dict[str, int]:
    return _token_shapes(x)


def _gated_residual_shapes(x: Tensor, y: Tensor, gate: Tensor) -> dict[str, int]:
    return _token_shapes(x)


def _token_shapes(x: Tensor) -> dict[str, int]:
    return {"batch": x.shape[0], "tokens": x.shape[1], "width": x.shape[2], "itemsize": x.element_size()}


register_formula("adaln", _adaln_shapes)
register_formula("gated_adaln", _gated_adaln_shapes)
register_formula("gated_residual", _gated_residual_shapes)
register_triton("adaln")
