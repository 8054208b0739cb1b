"""The two feed-forward layers of the transformers here.

    mlp(x)    = act(x W₁ᵀ + b₁) W₂ᵀ + b₂         act: GELU with erf, or its tanh form (Hendrycks & Gimpel 2016)
    swiglu(x) = (silu(x W_gᵀ) * x W_uᵀ) W_dᵀ     (Shazeer 2020)

Activations are computed in float32 (float64 for float64 inputs) and rounded to x's dtype, as each product is.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from longskip.kernels.arguments import check_choice, check_like, check_rows, wide
from longskip.kernels.backends import register, register_formula, register_triton, serve

ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh"}


def _gelu_reference(x: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def _linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = x @ weight.transpose(0, 1)
    return out if bias is None else out + bias


@register("mlp", "reference")
def mlp_reference(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, activation: str = "gelu"
) -> Tensor:
    """The definition of ``mlp``."""
    hidden = _linear_reference(x, w1, b1)
    return _linear_reference(_gelu_reference(wide(hidden), activation).to(x.dtype), w2, b2)


@register("mlp", "torch")
def mlp_torch(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, activation: str = "gelu"
) -> Tensor:
    """Two ``F.linear`` round ``F.gelu``."""
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate=ACTIVATIONS[activation]), w2, b2)


def mlp(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, activation: str = "gelu") -> Tensor:
    """``act(x W₁ᵀ + b₁) W₂ᵀ + b₂`` for x ``(..., h)``, w1 ``(m, h)``, b1 ``(m,)``, w2 ``(h_out, m)``, b2 ``(h_out,)``.

    ``activation`` is ``"gelu"`` (erf) or ``"gelu_tanh"``; a bias may be None. Returns ``(..., h_out)`` in x's dtype.
    Raises KernelArgumentError on shapes, dtypes or devices that do not fit.
    """
    op = "mlp"
    width = check_rows(op, "x", x)
    check_like(op, "w1", w1, "x", x, (None, width), "(hidden, h)")
    check_like(op, "w2", w2, "x", x, (None, w1.shape[0]), "(h_out, hidden)")
    if b1 is not None:
        check_like(op, "b1", b1, "x", x, (w1.shape[0],), "(hidden,)")
    if b2 is not None:
        check_like(op, "b2", b2, "x", x, (w2.shape[0],), "(h_out,)")
    check_choice(op, "activation", activation, tuple(ACTIVATIONS))
    return serve(op, x, x, w1, b1, w2, b2, activation=activation)


@register("swiglu", "reference")
def swiglu_reference(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """The definition of ``swiglu``."""
    gate = wide(_linear_reference(x, w_gate))
    hidden = gate / (1 + torch.exp(-gate)) * wide(_linear_reference(x, w_up))
    return _linear_reference(hidden.to(x.dtype), w_down)


@register("swiglu", "torch")
def swiglu_torch(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """Three ``F.linear`` round ``F.silu``."""
    return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


def swiglu(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """``(silu(x W_gᵀ) * x W_uᵀ) W_dᵀ`` for x ``(..., h)``, w_gate and w_up ``(m, h)``, w_down ``(h_out, m)``.

    Returns ``(..., h_out)`` in x's dtype. Raises KernelArgumentError on shapes, dtypes or devices that do not fit.
    """
    op = "swiglu"
    width = check_rows(op, "x", x)
    check_like(op, "w_gate", w_gate, "x", x, (None, width), "(hidden, h)")
    check_like(op, "w_up", w_up, "x", x, w_gate.shape, "(hidden, h)")
    check_like(op, "w_down", w_down, "x", x, (None, w_gate.shape[0]), "(h_out, hidden)")
    return serve(op, x, x, w_gate, w_up, w_down)


def _mlp_shapes(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, activation: str = "gelu"
) -> dict[str, int]:
    return {
        "rows": x.numel() // x.shape[-1],
        "width": x.shape[-1],
        "hidden": w1.shape[0],
        "out": w2.shape[0],
        "bias1": b1 is not None,
        "bias2": b2 is not None,
        "tanh": activation == "gelu_tanh",
        "itemsize": x.element_size(),
    }


def _swiglu_shapes(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> dict[str, int]:
    return {
        "rows": x.numel() // x.shape[-1],
        "width": x.shape[-1],
        "hidden": w_gate.shape[0],
        "out": w_down.shape[0],
        "itemsize": x.element_size(),
    }


register_formula("mlp", _mlp_shapes)
register_formula("swiglu", _swiglu_shapes)
register_triton("mlp")
