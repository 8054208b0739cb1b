"""What the plain ops between the fused ones cost, in the manner of ``kernels.formulas``, whose table this one goes on. No torch.

| operation | elementwise count |
|---|---|
| SiLU | 4 per value; gradient 9 |
| a residual, added positions | 1 per value; 1 where its gradients meet, or are summed over the batch |
| a looked-up row | none; its gradient 1 per value, added to its row |
| the time sinusoid | 2 per frequency; 3 per frequency and sample |
| noising (x_t = a x + b ε) | 3 per value |
"""

from __future__ import annotations

from longskip.kernels import formulas
from longskip.kernels.formulas import OpCost, OpFormula

__all__ = ["FORMULAS"]


def conv2d_forward(
    *,
    batch: int,
    channels: int,
    out: int,
    height: int,
    width: int,
    kernel: int = 3,
    bias: int | bool = True,
    itemsize: int = 4,
) -> OpCost:
    """A convolution of stride 1 that keeps ``(height, width)``; the padding's products count, as they are executed."""
    places, taps = batch * height * width, channels * kernel**2
    moved = places * (channels + out) + taps * out + bool(bias) * out
    return OpCost(places * taps * out, bool(bias) * places * out, moved * itemsize)


def conv2d_backward(
    *,
    batch: int,
    channels: int,
    out: int,
    height: int,
    width: int,
    kernel: int = 3,
    bias: int | bool = True,
    itemsize: int = 4,
    needs_input: bool = True,
    needs_weight: bool = True,
) -> OpCost:
    """As a linear layer's: one contraction for the input, one for the weight."""
    places, taps = batch * height * width, channels * kernel**2
    moved = places * out
    if needs_input:
        moved += taps * out + places * channels
    if needs_weight:
        moved += places * channels + taps * out + bool(bias) * out
    macs = (bool(needs_input) + bool(needs_weight)) * places * taps * out
    return OpCost(macs, bool(bias and needs_weight) * places * out, moved * itemsize)


def add_forward(*, values: int, itemsize: int = 4) -> OpCost:
    """A residual, or positions that are added to tokens."""
    return OpCost(0, values, 3 * values * itemsize)


def add_backward(*, values: int, itemsize: int = 4) -> OpCost:
    """The gradient itself is handed on; where it meets another one, or is summed over the batch, 1 per value."""
    return OpCost(0, values, 3 * values * itemsize)


def silu_forward(*, values: int, itemsize: int = 4) -> OpCost:
    """x / (1 + exp(-x)): negate, exp, + 1, divide."""
    return OpCost(0, 4 * values, 2 * values * itemsize)


def silu_backward(*, values: int, itemsize: int = 4) -> OpCost:
    """The sigmoid s (4), the slope s(1 + x(1 - s)) (4), times the gradient (1)."""
    return OpCost(0, 9 * values, 3 * values * itemsize)


def gelu_forward(*, values: int, tanh: int | bool = False, itemsize: int = 4) -> OpCost:
    """A GELU by itself (5 / 9), as between the word encoder's layers."""
    return OpCost(0, (9 if tanh else 5) * values, 2 * values * itemsize)


def gelu_backward(*, values: int, tanh: int | bool = False, itemsize: int = 4) -> OpCost:
    return OpCost(0, (18 if tanh else 11) * values, 3 * values * itemsize)


def lookup_forward(*, rows: int, width: int, itemsize: int = 4) -> OpCost:
    """Rows of a table by ids of 8 bytes."""
    return OpCost(0, 0, 2 * rows * width * itemsize + 8 * rows)


def lookup_backward(*, rows: int, width: int, itemsize: int = 4) -> OpCost:
    """Every row's gradient is added to its row of the table's."""
    return OpCost(0, rows * width, 3 * rows * width * itemsize + 8 * rows)


def sinusoid_forward(*, batch: int, frequencies: int, itemsize: int = 4) -> OpCost:
    """cat(cos, sin) of time times exp(-i c): float32 inside."""
    return OpCost(0, (2 + 3 * batch) * frequencies, 4 * batch + 2 * batch * frequencies * itemsize)


def noising_forward(*, values: int, itemsize: int = 4) -> OpCost:
    """x_t = a x + b ε."""
    return OpCost(0, 3 * values, 3 * values * itemsize)


FORMULAS: dict[str, OpFormula] = {
    **formulas.FORMULAS,
    "conv2d": OpFormula(conv2d_forward, conv2d_backward),
    "add": OpFormula(add_forward, add_backward),
    "silu": OpFormula(silu_forward, silu_backward),
    "gelu": OpFormula(gelu_forward, gelu_backward),
    "lookup": OpFormula(lookup_forward, lookup_backward),
    "sinusoid": OpFormula(sinusoid_forward, None),
    "noising": OpFormula(noising_forward, None),
}
