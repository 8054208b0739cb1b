"""The MLP's products with the activation in their epilogue: what the hidden layer needs is written once, in one launch.

    x W₁ᵀ + b₁ → pre, act             g W₂ → dpre (with pre), act again, the sums of b₁'s gradient
    x W_gᵀ, x W_uᵀ → gate, up, act    g W_d → dgate, dup (with gate and up), act again

Values before the activation are rounded to the tensors' dtype first, so that forward and backward see the same ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longskip.kernels import jit
from longskip.kernels.gemm_triton import (
    Configuration,
    Operands,
    accumulate,
    add_partials,
    load,
    load_bias,
    places,
    reach,
    tile_at,
)
from longskip.kernels.mlp_pointwise_triton import gated, gated_gradient, gelu


@triton.jit
def halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile's columns: an epilogue on each in turn needs half the registers."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _gelu_product(
    a, b, bias, pre, act, rows, columns, inner, a_stride, b_stride,
    TANH: tl.constexpr, KEEP: tl.constexpr, BIAS: tl.constexpr, A_LAST: tl.constexpr, B_LAST: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of pre = a bᵀ + bias (KEEP: written) and of act = GELU(pre)."""
    row_tile, column_tile = tile_at(tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP)
    row = row_tile * BLOCK_M
    column = column_tile * BLOCK_N
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums = accumulate(
        sums, a, b, row, column, rows, columns, inner, a_stride, b_stride,
        A_LAST, B_LAST, EVEN_M, EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if BIAS:
        sums += load_bias(bias, column, columns, BLOCK_N)
    left, right = halves(sums, BLOCK_M, BLOCK_N)
    _gelu_half(left, pre, act, row, column, rows, columns, TANH, KEEP, BLOCK_M, BLOCK_N // 2)
    _gelu_half(right, pre, act, row, column + BLOCK_N // 2, rows, columns, TANH, KEEP, BLOCK_M, BLOCK_N // 2)


@triton.jit
def _gelu_half(
    sums, pre, act, row, column, rows, columns,
    TANH: tl.constexpr, KEEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    left, right = halves(sums, BLOCK_M, BLOCK_N)
    _gelu(left, pre, act, row, column, rows, columns, TANH, KEEP, BLOCK_M, BLOCK_N // 2)
    _gelu(right, pre, act, row, column + BLOCK_N // 2, rows, columns, TANH, KEEP, BLOCK_M, BLOCK_N // 2)


@triton.jit
def _gelu(
    sums, pre, act, row, column, rows, columns,
    TANH: tl.constexpr, KEEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    at, inside = places(row, column, rows, columns, columns, BLOCK_M, BLOCK_N)
    rounded = sums.to(act.dtype.element_ty)
    if KEEP:
        tl.store(pre + at, rounded, mask=inside)
    value, _ = gelu(rounded.to(tl.float32), TANH, rounded.dtype.primitive_bitwidth == 16)
    tl.store(act + at, value.to(act.dtype.element_ty), mask=inside)


@triton.jit
def _gelu_gradient_product(
    a, b, pre, dpre, act, partial, rows, columns, inner, a_stride, b_stride,
    TANH: tl.constexpr, ACT: tl.constexpr, SUMS: tl.constexpr, A_LAST: tl.constexpr, B_LAST: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of dpre = a bᵀ * GELU'(pre), of act = GELU(pre), and dpre's sums over the tile's rows.

    ``partial`` is (row tiles, columns).
    """
    row_tile, column_tile = tile_at(tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP)
    row = row_tile * BLOCK_M
    column = column_tile * BLOCK_N
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums = accumulate(
        sums, a, b, row, column, rows, columns, inner, a_stride, b_stride,
        A_LAST, B_LAST, EVEN_M, EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    left, right = halves(sums, BLOCK_M, BLOCK_N)
    _gelu_gradient(
        left, pre, dpre, act, partial, row_tile, row, column, rows, columns, TANH, ACT, SUMS, BLOCK_M, BLOCK_N // 2
    )
    column += BLOCK_N // 2
    _gelu_gradient(
        right, pre, dpre, act, partial, row_tile, row, column, rows, columns, TANH, ACT, SUMS, BLOCK_M, BLOCK_N // 2
    )


@triton.jit
def _gelu_gradient(
    sums, pre, dpre, act, partial, row_tile, row, column, rows, columns,
    TANH: tl.constexpr, ACT: tl.constexpr, SUMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    at, inside = places(row, column, rows, columns, columns, BLOCK_M, BLOCK_N)
    x = tl.load(pre + at, mask=inside, other=0.0)
    value, slope = gelu(x.to(tl.float32), TANH, x.dtype.primitive_bitwidth == 16)
    if ACT:
        tl.store(act + at, value.to(act.dtype.element_ty), mask=inside)
    slope *= sums
    tl.store(dpre + at, slope.to(dpre.dtype.element_ty), mask=inside)
    if SUMS:
        n = column + tl.arange(0, BLOCK_N)
        of_tile = tl.sum(tl.where(inside, slope, 0.0), 0)
        tl.store(partial + row_tile.to(tl.int64) * columns + n, of_tile, mask=n < columns)


@triton.jit
def _gated_product(
    a, b, b2, gate, up, act, rows, columns, inner, a_stride, b_stride, b2_stride,
    KEEP: tl.constexpr, A_LAST: tl.constexpr, B_LAST: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of gate = a bᵀ, up = a b2ᵀ (KEEP: written) and act = silu(gate) * up; a is loaded once for both."""
    row_tile, column_tile = tile_at(tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP)
    row = row_tile * BLOCK_M
    column = column_tile * BLOCK_N
    a_start, a_at = reach(a, a_stride, row, rows, True, A_LAST, BLOCK_M, BLOCK_K)
    b_start, b_at = reach(b, b_stride, column, columns, False, B_LAST, BLOCK_N, BLOCK_K)
    b2_start, b2_at = reach(b2, b2_stride, column, columns, False, B_LAST, BLOCK_N, BLOCK_K)
    of_gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    of_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, inner, BLOCK_K):
        a_tile = load(a_start + a_at, row, rows, inner - k, True, A_LAST, EVEN_M, EVEN_K, BLOCK_M, BLOCK_K)
        b_tile = load(b_start + b_at, column, columns, inner - k, False, B_LAST, EVEN_N, EVEN_K, BLOCK_N, BLOCK_K)
        b2_tile = load(b2_start + b2_at, column, columns, inner - k, False, B_LAST, EVEN_N, EVEN_K, BLOCK_N, BLOCK_K)
        of_gate = tl.dot(a_tile, b_tile, of_gate, input_precision="ieee")
        of_up = tl.dot(a_tile, b2_tile, of_up, input_precision="ieee")
        a_start += BLOCK_K if A_LAST else BLOCK_K * a_stride
        b_start += BLOCK_K if B_LAST else BLOCK_K * b_stride
        b2_start += BLOCK_K if B_LAST else BLOCK_K * b2_stride
    left, right = halves(of_gate, BLOCK_M, BLOCK_N)
    up_left, up_right = halves(of_up, BLOCK_M, BLOCK_N)
    _gated(left, up_left, gate, up, act, row, column, rows, columns, KEEP, BLOCK_M, BLOCK_N // 2)
    _gated(right, up_right, gate, up, act, row, column + BLOCK_N // 2, rows, columns, KEEP, BLOCK_M, BLOCK_N // 2)


@triton.jit
def _gated(
    of_gate, of_up, gate, up, act, row, column, rows, columns,
    KEEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    at, inside = places(row, column, rows, columns, columns, BLOCK_M, BLOCK_N)
    gate_value = of_gate.to(act.dtype.element_ty)
    up_value = of_up.to(act.dtype.element_ty)
    if KEEP:
        tl.store(gate + at, gate_value, mask=inside)
        tl.store(up + at, up_value, mask=inside)
    value = gated(gate_value.to(tl.float32), up_value.to(tl.float32))
    tl.store(act + at, value.to(act.dtype.element_ty), mask=inside)


@triton.jit
def _gated_gradient_product(
    a, b, gate, up, dgate, dup, act, rows, columns, inner, a_stride, b_stride,
    ACT: tl.constexpr, A_LAST: tl.constexpr, B_LAST: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of the gradients of gate and up, from that of the hidden layer, a bᵀ; and of act again."""
    row_tile, column_tile = tile_at(tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP)
    row = row_tile * BLOCK_M
    column = column_tile * BLOCK_N
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums = accumulate(
        sums, a, b, row, column, rows, columns, inner, a_stride, b_stride,
        A_LAST, B_LAST, EVEN_M, EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    left, right = halves(sums, BLOCK_M, BLOCK_N)
    _gated_gradient(left, gate, up, dgate, dup, act, row, column, rows, columns, ACT, BLOCK_M, BLOCK_N // 2)
    column += BLOCK_N // 2
    _gated_gradient(right, gate, up, dgate, dup, act, row, column, rows, columns, ACT, BLOCK_M, BLOCK_N // 2)


@triton.jit
def _gated_gradient(
    sums, gate, up, dgate, dup, act, row, column, rows, columns,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    at, inside = places(row, column, rows, columns, columns, BLOCK_M, BLOCK_N)
    gate_value = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    up_value = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    value, of_gate, of_up = gated_gradient(gate_value, up_value, sums)
    if ACT:
        tl.store(act + at, value.to(act.dtype.element_ty), mask=inside)
    tl.store(dgate + at, of_gate.to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + at, of_up.to(dup.dtype.element_ty), mask=inside)


def gelu_product(
    x: Tensor, w1: Tensor, b1: Tensor | None, pre: Tensor | None, act: Tensor, tanh: bool, tile: Configuration
) -> None:
    """Writes ``pre`` (where given) and ``act (rows, hidden)``."""
    o = Operands.of([(x, w1.t())])
    jit.launch(
        _gelu_product, o.grid(tile),
        o.a[0], o.b[0], act if b1 is None else b1.contiguous(), act if pre is None else pre, act, *o.sizes, *o.strides(0),
        TANH=tanh, KEEP=pre is not None, BIAS=b1 is not None, **o.constants(tile),
    )  # fmt: skip


def gelu_gradient_product(
    g: Tensor, w2: Tensor, pre: Tensor, dpre: Tensor, act: Tensor | None, tanh: bool, tile: Configuration, *, sums: bool
) -> Tensor | None:
    """Writes ``dpre`` and ``act`` (where given); the sums of dpre over rows where asked for."""
    o = Operands.of([(g, w2)])
    rows, columns, _ = o.sizes
    partial = jit.empty((jit.cdiv(rows, tile["BLOCK_M"]), columns), torch.float32, g.device) if sums else dpre
    jit.launch(
        _gelu_gradient_product, o.grid(tile),
        o.a[0], o.b[0], pre, dpre, dpre if act is None else act, partial, *o.sizes, *o.strides(0),
        TANH=tanh, ACT=act is not None, SUMS=sums, **o.constants(tile),
    )  # fmt: skip
    return add_partials(partial, pre.dtype) if sums else None


def gated_product(
    x: Tensor, w_gate: Tensor, w_up: Tensor, gate: Tensor | None, up: Tensor | None, act: Tensor, tile: Configuration
) -> None:
    """Writes ``gate`` and ``up`` (where given) and ``act (rows, hidden)``."""
    o = Operands.of([(x, w_gate.t()), (x, w_up.t())])
    jit.launch(
        _gated_product, o.grid(tile),
        o.a[0], *o.b, act if gate is None else gate, act if up is None else up, act,
        *o.sizes, *o.strides(0), o.strides(1)[1], KEEP=gate is not None, **o.constants(tile),
    )  # fmt: skip


def gated_gradient_product(
    g: Tensor, w_down: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, act: Tensor | None,
    tile: Configuration,
) -> None:  # fmt: skip
    """Writes ``dgate``, ``dup`` and ``act`` (where given)."""
    o = Operands.of([(g, w_down)])
    jit.launch(
        _gated_gradient_product, o.grid(tile),
        o.a[0], o.b[0], gate, up, dgate, dup, dgate if act is None else act, *o.sizes, *o.strides(0),
        ACT=act is not None, **o.constants(tile),
    )  # fmt: skip
