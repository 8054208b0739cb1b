"""GELU and SwiGLU's gate in Triton: the functions that the fused products share, and one pass over memory each.

The passes serve the products that cuBLAS makes. A backward pass reads the hidden gradient and the saved values once and
writes the gradient over the former, the activation anew (for the second weight's gradient), and the sums over rows that
the first bias's gradient is made of.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longskip.kernels import jit, tables
from longskip.kernels.gemm_triton import Configuration, add_partials, chunks_of, sum_rows

CONFIGURATIONS: dict[str, tuple[Configuration, ...]] = {
    "mlp_pointwise": (
        {"BLOCK": 2048, "num_warps": 8},
        {"BLOCK": 4096, "num_warps": 8},
        {"BLOCK": 1024, "num_warps": 4},
    ),
    "mlp_pointwise_rows": (
        {"ROWS": 16, "COLUMNS": 256, "num_warps": 4},
        {"ROWS": 16, "COLUMNS": 128, "num_warps": 4},
        {"ROWS": 32, "COLUMNS": 256, "num_warps": 8},
    ),
}


@triton.jit
def gelu(x, TANH: tl.constexpr, HALF: tl.constexpr):
    """(GELU(x), its slope) in float32. HALF: to the precision of a 16-bit result.

    There the normal distribution's tail is exp(-x²/2) times a polynomial (Abramowitz and Stegun 7.1.26, at most 7.5e-8
    off), so that one exponential serves both; erf costs twice the instructions.
    """
    if TANH:
        # 0.5 (1 + tanh u) is the logistic function of 2u, whose slope is e / (1 + e)² with e = exp(-|2u|).
        e = tl.exp(-1.5957691216057308 * tl.abs(x) * (1.0 + 0.044715 * x * x))
        right = 1.0 / (1.0 + e)
        weight = tl.where(x < 0, e * right, right)
        slope = weight + x * (e * right * right * (1.5957691216057308 * (1.0 + 0.134145 * x * x)))
    else:
        density = tl.exp(-0.5 * x * x)
        if HALF:
            t = 1.0 / (1.0 + 0.23164188 * tl.abs(x))
            tail = t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
            tail = density * t * (0.127414796 + tail)
            weight = tl.where(x < 0, tail, 1.0 - tail)
        else:
            weight = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = weight + x * (density * 0.3989422804014327)
    return x * weight, slope


@triton.jit
def gated(gate, up):
    """silu(gate) * up in float32."""
    return gate * (1.0 / (1.0 + tl.exp(-gate))) * up


@triton.jit
def gated_gradient(gate, up, grad):
    """(silu(gate) * up, the gate's gradient, up's gradient) in float32."""
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    return silu * up, grad * up * (sigmoid * (1.0 + gate * (1.0 - sigmoid))), grad * silu


@triton.jit
def _gelu_forward(pre, act, size, TANH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(pre + at, mask=at < size, other=0.0)
    value, _ = gelu(x.to(tl.float32), TANH, x.dtype.primitive_bitwidth == 16)
    tl.store(act + at, value.to(act.dtype.element_ty), mask=at < size)


@triton.jit
def _gelu_backward(
    pre, grad, act, partial, rows, columns, chunk,
    TANH: tl.constexpr, ACT: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (i, j): column block i of chunk j's rows; ``grad`` becomes the gradient before the activation."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < columns)[None, :]
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, rows)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        mask = (row < last)[:, None] & inside
        x = tl.load(pre + at, mask=mask, other=0.0)
        value, slope = gelu(x.to(tl.float32), TANH, x.dtype.primitive_bitwidth == 16)
        slope *= tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad + at, slope.to(grad.dtype.element_ty), mask=mask)
        if ACT:
            tl.store(act + at, value.to(act.dtype.element_ty), mask=mask)
        if SUMS:
            sums += slope
    if SUMS:
        where = partial + tl.program_id(1).to(tl.int64) * columns + column
        tl.store(where, sum_rows(sums, ROWS, COLUMNS), mask=column < columns)


@triton.jit
def _gated_forward(gate, up, act, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < size, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(act + at, gated(g, u).to(act.dtype.element_ty), mask=at < size)


@triton.jit
def _gated_backward(gate, up, grad, dup, act, size, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """``grad`` becomes the gate's gradient."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < size, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < size, other=0.0).to(tl.float32)
    d = tl.load(grad + at, mask=at < size, other=0.0).to(tl.float32)
    value, of_gate, of_up = gated_gradient(g, u, d)
    tl.store(grad + at, of_gate.to(grad.dtype.element_ty), mask=at < size)
    tl.store(dup + at, of_up.to(dup.dtype.element_ty), mask=at < size)
    if ACT:
        tl.store(act + at, value.to(act.dtype.element_ty), mask=at < size)


def _options(kernel: str, like: Tensor, configuration: Configuration | None) -> Configuration:
    if configuration is not None:
        return configuration
    sizes = {"rows": like.shape[0], "columns": like.shape[1]}
    measured = tables.best_configuration(like.device, kernel, tables.bucket(like.dtype, sizes))
    return measured or CONFIGURATIONS[kernel][0]


def gelu_forward(pre: Tensor, act: Tensor, tanh: bool, configuration: Configuration | None = None) -> None:
    """``act`` = GELU(``pre``), both ``(rows, hidden)``; they may be one."""
    options = _options("mlp_pointwise", pre, configuration)
    grid = (jit.cdiv(pre.numel(), options["BLOCK"]),)
    jit.launch(_gelu_forward, grid, pre, act, pre.numel(), TANH=tanh, **options)


def gelu_backward(
    pre: Tensor, grad: Tensor, act: Tensor | None, tanh: bool, *, sums: bool, configuration: Configuration | None = None
) -> Tensor | None:
    """``grad`` times GELU's slope, in place; writes ``act`` where given; the sums over rows where asked for."""
    rows, columns = pre.shape
    options = _options("mlp_pointwise_rows", pre, configuration)
    column_blocks = jit.cdiv(columns, options["COLUMNS"])
    chunk, chunks = chunks_of(pre, rows, column_blocks, options["ROWS"])
    partial = jit.empty((chunks, columns), torch.float32, pre.device) if sums else pre
    jit.launch(
        _gelu_backward, (column_blocks, chunks), pre, grad, pre if act is None else act, partial, rows, columns, chunk,
        TANH=tanh, ACT=act is not None, SUMS=sums, **options,
    )  # fmt: skip
    return add_partials(partial, pre.dtype) if sums else None


def gated_forward(gate: Tensor, up: Tensor, act: Tensor, configuration: Configuration | None = None) -> None:
    """``act`` = silu(``gate``) * ``up``, all ``(rows, hidden)``; it may be one of them."""
    options = _options("mlp_pointwise", gate, configuration)
    jit.launch(_gated_forward, (jit.cdiv(gate.numel(), options["BLOCK"]),), gate, up, act, gate.numel(), **options)


def gated_backward(
    gate: Tensor, up: Tensor, grad: Tensor, dup: Tensor, act: Tensor | None, configuration: Configuration | None = None
) -> None:
    """``grad`` becomes the gate's gradient; writes up's, and ``act`` where given."""
    options = _options("mlp_pointwise", gate, configuration)
    jit.launch(
        _gated_backward, (jit.cdiv(gate.numel(), options["BLOCK"]),),
        gate, up, grad, dup, gate if act is None else act, gate.numel(), ACT=act is not None, **options,
    )  # fmt: skip
