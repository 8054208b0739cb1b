"""The long skip connection without a concatenated tensor, forward and backward.

    out = x W₁ᵀ + skip W₂ᵀ + b        one product whose inner axis runs over x, then over skip
    [dx | dskip] = g W                one launch, whose column tiles are of dx or of dskip
    dW = gᵀ [x | skip]                one launch into the two halves of dW
    db = Σ g                          sums in a fixed order

The halves of W and dW are views. By cuBLAS (what a product takes until a table says otherwise) each is two products, the
forward's second one added to the first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longskip.kernels import jit, library
from longskip.kernels.backends import Sizes, register
from longskip.kernels.formulas import skip_linear_forward
from longskip.kernels.gemm_triton import CHOICES, Configuration, column_sums, flat, products, unfit_sizes

CONFIGURATIONS: dict[str, tuple[Configuration, ...]] = {
    f"skip_linear_{product}": CHOICES for product in ("out", "input_gradient", "weight_gradient")
}


def _halves(weight: Tensor) -> tuple[Tensor, Tensor]:
    width = weight.shape[1] // 2
    return weight[:, :width], weight[:, width:]


def forward(
    x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None, configuration: Configuration | None = None
) -> Tensor:
    """``x W₁ᵀ + skip W₂ᵀ + b`` for ``(..., h)``; ``configuration`` goes before the tables'."""
    out = jit.empty((*x.shape[:-1], weight.shape[0]), x.dtype, x.device)
    pairs = [(flat(rows), half.t()) for rows, half in zip((x, skip), _halves(weight), strict=True)]
    products("skip_linear_out", pairs, [flat(out)], bias=bias, configuration=configuration)
    return out


def backward(
    g: Tensor, x: Tensor, skip: Tensor, weight: Tensor, wants: list[bool], configuration: Configuration | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, skip, weight and bias; empty where ``wants`` says no."""
    rows = flat(g)
    sizes = [t.shape if want else (0,) for t, want in zip((x, skip, weight), wants, strict=False)]
    dx, dskip, dweight = (jit.empty(shape, x.dtype, x.device) for shape in sizes)
    chosen = [(flat(d), half) for d, half, want in zip((dx, dskip), _halves(weight), wants, strict=False) if want]
    products(
        "skip_linear_input_gradient",
        [(rows, half) for _, half in chosen],
        [d for d, _ in chosen],
        configuration=configuration,
    )
    if wants[2]:
        pairs = [(rows.t(), flat(x)), (rows.t(), flat(skip))]
        products("skip_linear_weight_gradient", pairs, _halves(dweight), of_weight=True, configuration=configuration)
    return dx, dskip, dweight, column_sums(rows) if wants[3] else jit.empty((0,), x.dtype, x.device)


def _forward(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return forward(x, skip, weight, bias)


def _fake_forward(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _backward(
    g: Tensor, x: Tensor, skip: Tensor, weight: Tensor, wants: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backward(g, x, skip, weight, wants)


def _fake_backward(
    g: Tensor, x: Tensor, skip: Tensor, weight: Tensor, wants: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = (x.shape, skip.shape, weight.shape, weight.shape[:1])
    dx, dskip, dweight, dbias = (x.new_empty(s if want else (0,)) for s, want in zip(shapes, wants, strict=True))
    return dx, dskip, dweight, dbias


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _forward_flops(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    return skip_linear_forward(rows=_rows(x), width=x.shape[-1], out=weight.shape[0]).flops


def _backward_flops(g: Tensor, x: Tensor, skip: Tensor, weight: Tensor, wants: list[bool]) -> int:
    halves = wants[0] + wants[1] + 2 * wants[2]
    return 2 * halves * _rows(x) * x.shape[-1] * weight.shape[0]


forward_op = library.custom("skip_linear", _forward, _fake_forward, flops=_forward_flops)
backward_op = library.custom("skip_linear_backward", _backward, _fake_backward, flops=_backward_flops)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:3])


def _differentiate(ctx, g):  # type: ignore[no-untyped-def]
    wants = list(ctx.needs_input_grad)
    gradients = backward_op(g, *ctx.saved_tensors, wants)
    return tuple(grad if want else None for grad, want in zip(gradients, wants, strict=True))


library.differentiable(forward_op, backward_op, _differentiate, _save)


def _unfit(dtype: torch.dtype, sizes: Sizes) -> str | None:
    return unfit_sizes(dtype, sizes["rows"], 2 * sizes["width"], sizes["out"])


@register("skip_linear", "triton", unusable=jit.unusable, unfit=_unfit)
def skip_linear_triton(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Saves x, skip and the weight for the backward; allocates the results and nothing else."""
    library.plain("skip_linear", x, skip, weight, bias)
    out: Tensor = forward_op(x, skip, weight, bias)
    return out
