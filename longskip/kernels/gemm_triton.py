"""Matrix products in Triton: the tiled kernel, the choice of its tiles, and the same products by cuBLAS.

``products`` makes one product, the sum of two or two beside each other in one launch, each operand and result being a
matrix of its own or a view: that is a linear layer over two inputs without a concatenated tensor, and its gradients.
``column_sums`` is a bias's gradient. The parts of the kernel serve the fused layers of ``mlp_gemm_triton`` as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longskip.kernels import jit, tables

Configuration = Mapping[str, Any]

# Rows of a matrix may lie this far apart: offsets inside a tile are 32-bit, from one tile to the next 64-bit.
WIDEST = 1 << 22
MOST_ROWS = (1 << 31) - 1024


def _tile(m: int, n: int, k: int, warps: int, stages: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}


TILES = (
    _tile(128, 256, 64, 8, 4),
    _tile(128, 256, 64, 8, 3),
    _tile(256, 128, 64, 8, 3),
    _tile(128, 128, 64, 8, 4),
    _tile(128, 128, 64, 4, 4),
    _tile(64, 128, 64, 4, 4),
    _tile(64, 64, 64, 4, 4),
    _tile(64, 32, 32, 4, 3),
)
# float32 is multiplied in full precision, which is plain multiply-adds and no tensor core.
FLOAT32_TILES = (_tile(64, 64, 32, 4, 2), _tile(64, 32, 32, 4, 2))
# The share of a device's rate that a tile reaches, from its reuse of what it loads. Only the order matters: until a table
# says otherwise, the best tile is that whose whole waves over the multiprocessors hold the most wanted products.
_SHARE = {128 * 256: 1.0, 128 * 128: 0.9, 64 * 128: 0.7, 64 * 64: 0.5, 64 * 32: 0.3}
BLAS: Configuration = {"gemm": "blas"}
# What a table may choose for a product.
CHOICES: tuple[Configuration, ...] = (BLAS, *({"gemm": "triton", **tile} for tile in TILES + FLOAT32_TILES))
CONFIGURATIONS: dict[str, tuple[Configuration, ...]] = {"column_sums": ({"ROWS": 32, "COLUMNS": 128, "num_warps": 4},)}
GROUP = 8  # row tiles that share the columns' operand in the L2 cache


@triton.jit
def tile_at(row_tiles, column_tiles, GROUP: tl.constexpr):
    """This program's tile: down GROUP row tiles, then one column on."""
    program = tl.program_id(0)
    first = program // (GROUP * column_tiles) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    within = program % (GROUP * column_tiles)
    return first + within % size, within // size


@triton.jit
def axes(BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, LEFT: tl.constexpr):
    """(outer, inner) indices in an operand's tile: (BLOCK, BLOCK_K) for the LEFT one, (BLOCK_K, BLOCK) for the other."""
    if LEFT:
        outer = tl.arange(0, BLOCK)[:, None]
        inner = tl.arange(0, BLOCK_K)[None, :]
    else:
        outer = tl.arange(0, BLOCK)[None, :]
        inner = tl.arange(0, BLOCK_K)[:, None]
    return outer, inner


@triton.jit
def reach(
    matrix, stride, first, size,
    LEFT: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile's start and the offsets in it; LAST: the inner axis is the contiguous one.

    Rows beyond the last are the last one again where they lie ``stride`` apart: what they give is not stored.
    """
    outer, k = axes(BLOCK, BLOCK_K, LEFT)
    if LAST:
        start = matrix + first.to(tl.int64) * stride
        at = tl.minimum(outer, size - 1 - first) * stride + k
    else:
        start = matrix + first
        at = outer + k * stride
    return start, at


@triton.jit
def load(
    at, first, size, left, LEFT: tl.constexpr, LAST: tl.constexpr, EVEN: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of whose inner axis ``left`` are left; zero beyond the edges that must not be read."""
    outer, k = axes(BLOCK, BLOCK_K, LEFT)
    if LAST or EVEN:
        if EVEN_K:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=k < left, other=0.0)
    elif EVEN_K:
        tile = tl.load(at, mask=outer < size - first, other=0.0)
    else:
        tile = tl.load(at, mask=(outer < size - first) & (k < left), other=0.0)
    return tile


@triton.jit
def accumulate(
    sums, a, b, row, column, rows, columns, inner, a_stride, b_stride,
    A_LAST: tl.constexpr, B_LAST: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``sums`` + the tile at (row, column) of the product of a (rows, inner) and b (columns, inner)."""
    a_start, a_at = reach(a, a_stride, row, rows, True, A_LAST, BLOCK_M, BLOCK_K)
    b_start, b_at = reach(b, b_stride, column, columns, False, B_LAST, BLOCK_N, BLOCK_K)
    for k in range(0, inner, BLOCK_K):
        a_tile = load(a_start + a_at, row, rows, inner - k, True, A_LAST, EVEN_M, EVEN_K, BLOCK_M, BLOCK_K)
        b_tile = load(b_start + b_at, column, columns, inner - k, False, B_LAST, EVEN_N, EVEN_K, BLOCK_N, BLOCK_K)
        sums = tl.dot(a_tile, b_tile, sums, input_precision="ieee")
        a_start += BLOCK_K if A_LAST else BLOCK_K * a_stride
        b_start += BLOCK_K if B_LAST else BLOCK_K * b_stride
    return sums


@triton.jit
def places(row, column, rows, columns, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Offsets of the tile at (row, column) in a result, and which of them lie inside."""
    m = tl.arange(0, BLOCK_M)[:, None]
    n = tl.arange(0, BLOCK_N)[None, :]
    at = row.to(tl.int64) * stride + column + (m * stride + n)
    return at, (m < rows - row) & (n < columns - column)


@triton.jit
def _products(
    a, b, c, a2, b2, c2, bias, rows, columns, inner, a_stride, b_stride, a2_stride, b2_stride, c_stride,
    TERMS: tl.constexpr, SIDES: tl.constexpr, BIAS: tl.constexpr, A_LAST: tl.constexpr, B_LAST: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of c = a bᵀ + bias; TERMS 2: + a2 b2ᵀ; SIDES 2: half of the column tiles are of c2 = a2 b2ᵀ.

    The second side's tiles start at its first column, wherever the first side's end.
    """
    side_tiles = tl.cdiv(columns, BLOCK_N)
    row_tile, column_tile = tile_at(tl.cdiv(rows, BLOCK_M), side_tiles * SIDES, GROUP)
    if SIDES == 2:
        second = column_tile >= side_tiles
        column_tile = column_tile % side_tiles
        a = tl.where(second, a2, a)
        b = tl.where(second, b2, b)
        c = tl.where(second, c2, c)
        a_stride = tl.where(second, a2_stride, a_stride)
        b_stride = tl.where(second, b2_stride, b_stride)
    row = row_tile * BLOCK_M
    column = column_tile * BLOCK_N
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums = accumulate(
        sums, a, b, row, column, rows, columns, inner, a_stride, b_stride,
        A_LAST, B_LAST, EVEN_M, EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if TERMS == 2:
        sums = accumulate(
            sums, a2, b2, row, column, rows, columns, inner, a2_stride, b2_stride,
            A_LAST, B_LAST, EVEN_M, EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if BIAS:
        sums += load_bias(bias, column, columns, BLOCK_N)
    at, inside = places(row, column, rows, columns, c_stride, BLOCK_M, BLOCK_N)
    tl.store(c + at, sums.to(c.dtype.element_ty), mask=inside)


@triton.jit
def load_bias(bias, column, columns, BLOCK_N: tl.constexpr):
    n = column + tl.arange(0, BLOCK_N)
    return tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]


@triton.jit
def sum_rows(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sums over a tile's rows, in two levels: each addition rounds, and this way fewer follow one another."""
    return tl.sum(tl.sum(tl.reshape(tile, (4, ROWS // 4, COLUMNS)), 1), 0)


@triton.jit
def _column_sums(matrix, partial, rows, columns, stride, chunk, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Program (i, j): the sums over chunk j's rows of column block i, into ``partial (chunks, columns)``."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, rows)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * stride + column[None, :]
        sums += tl.load(matrix + at, mask=(row < last)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    tl.store(partial + tl.program_id(1).to(tl.int64) * columns + column, sum_rows(sums, ROWS, COLUMNS), mask=inside)


@triton.jit
def _add_partials(partial, out, count, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Adds ``partial (count, columns)`` in a fixed order."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        sums += tl.load(partial + at, mask=(row < count)[:, None] & (column < columns)[None, :], other=0.0)
    tl.store(out + column, sum_rows(sums, ROWS, COLUMNS).to(out.dtype.element_ty), mask=column < columns)


def flat(tensor: Tensor) -> Tensor:
    """``(..., width)`` as a matrix; a view where the rows lie evenly."""
    return tensor.reshape(tensor.numel() // tensor.shape[-1] if tensor.shape[-1] else 0, tensor.shape[-1])


def oriented(*matrices: Tensor) -> tuple[bool, list[Tensor]]:
    """(whether the second axis is the contiguous one, the matrices): as they lie, or copied where they lie otherwise."""
    for axis in (1, 0):
        if all(m.stride(axis) == 1 and 0 <= m.stride(1 - axis) <= WIDEST for m in matrices):
            return axis == 1, list(matrices)
    return True, [m.contiguous() for m in matrices]


def choose(
    kernel: str,
    like: Tensor,
    rows: int,
    columns: int,
    inner: int,
    configuration: Configuration | None = None,
    *,
    sides: int = 1,
    accumulators: int = 1,
    most_sums: int = 128,
    of_weight: bool = False,
) -> Configuration | None:
    """The tile of a product, or None where cuBLAS makes it: as given, as measured for ``kernel``, else cuBLAS.

    ``{"gemm": "triton"}`` without a tile, or with one that does not fit the device and the dtype, takes the best by
    ``_SHARE``. A thread holds up to ``most_sums`` of the ``accumulators``' sums. ``of_weight``: the inner axis is that
    over tokens, which buckets round.
    """
    if configuration is None:
        sizes = {"out": rows, "columns": columns, "rows": inner}
        if not of_weight:
            sizes = {"rows": rows, "columns": columns, "inner": inner}
        configuration = tables.best_configuration(like.device, kernel, tables.bucket(like.dtype, sizes)) or BLAS
    if configuration["gemm"] == "blas":
        return None
    target = jit.target_of(like.device)
    most_sums = most_sums if target.capability >= 90 else min(most_sums, 64)

    def fits(tile: Configuration) -> bool:
        m, n, k = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]
        staged = tile["num_stages"] * (m + accumulators * n) * k * like.element_size()
        return staged <= target.shared_bytes - 2048 and accumulators * m * n <= most_sums * 32 * tile["num_warps"]

    def worth(tile: Configuration) -> float:
        m, n = tile["BLOCK_M"], tile["BLOCK_N"]
        waves = jit.cdiv(jit.cdiv(rows, m) * jit.cdiv(columns, n) * sides, target.multiprocessors)
        return _SHARE[m * n] * rows * columns / max(waves * m * n, 1)

    if "BLOCK_M" in configuration and fits(configuration):
        return configuration
    return max(filter(fits, FLOAT32_TILES if like.dtype == torch.float32 else TILES), key=worth)


@dataclass(frozen=True)
class Operands:
    """The operands of products of one shape as the kernels take them: a (rows, inner) and b (columns, inner)."""

    a: list[Tensor]
    b: list[Tensor]
    a_last: bool
    b_last: bool

    @classmethod
    def of(cls, pairs: Sequence[tuple[Tensor, Tensor]]) -> Operands:
        a_last, a = oriented(*(a for a, _ in pairs))
        b_last, b = oriented(*(b.t() for _, b in pairs))
        return cls(a, b, a_last, b_last)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(rows, columns, inner)."""
        return self.a[0].shape[0], self.b[0].shape[0], self.a[0].shape[1]

    def strides(self, at: int) -> tuple[int, int]:
        return self.a[at].stride(int(not self.a_last)), self.b[at].stride(int(not self.b_last))

    def constants(self, tile: Configuration) -> dict[str, Any]:
        """What ``accumulate`` takes as constants, and the compiler's options."""
        rows, columns, inner = self.sizes
        return {
            **{name: tile[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")},
            "A_LAST": self.a_last,
            "B_LAST": self.b_last,
            "EVEN_M": rows % tile["BLOCK_M"] == 0,
            "EVEN_N": columns % tile["BLOCK_N"] == 0,
            "EVEN_K": inner % tile["BLOCK_K"] == 0,
            "GROUP": GROUP,
        }

    def grid(self, tile: Configuration, sides: int = 1) -> tuple[int]:
        rows, columns, _ = self.sizes
        return (jit.cdiv(rows, tile["BLOCK_M"]) * jit.cdiv(columns, tile["BLOCK_N"]) * sides,)


def products(
    kernel: str,
    pairs: Sequence[tuple[Tensor, Tensor]],
    outs: Sequence[Tensor],
    *,
    bias: Tensor | None = None,
    of_weight: bool = False,
    configuration: Configuration | None = None,
) -> None:
    """Write the product of each pair, a ``(rows, inner)`` and b ``(inner, columns)``, plus ``bias (columns,)``.

    Two pairs and one result: the sum of the two products. Two pairs and two results: one each, in one launch. Results
    have contiguous rows. ``kernel`` is the name in the tables, ``configuration`` goes before them (see ``choose``);
    ``of_weight``: the product is a weight's gradient, whose inner axis is over tokens.
    """
    if not pairs:
        return
    (rows, inner), columns, sides = pairs[0][0].shape, pairs[0][1].shape[1], len(outs)
    tile = choose(kernel, outs[0], rows, columns, inner, configuration, sides=sides, of_weight=of_weight)
    if tile is None:
        _by_blas(pairs, outs, bias)
        return
    o = Operands.of(pairs)
    jit.launch(
        _products, o.grid(tile, sides),
        o.a[0], o.b[0], outs[0], o.a[-1], o.b[-1], outs[-1], outs[0] if bias is None else bias.contiguous(),
        rows, columns, inner, *o.strides(0), *o.strides(-1), outs[0].stride(0),
        TERMS=len(pairs) // sides, SIDES=sides, BIAS=bias is not None, **o.constants(tile),
    )  # fmt: skip


def _by_blas(pairs: Sequence[tuple[Tensor, Tensor]], outs: Sequence[Tensor], bias: Tensor | None) -> None:
    for at, (a, b) in enumerate(pairs):
        if at >= len(outs):
            outs[0].addmm_(a, b)
        elif bias is None:
            torch.mm(a, b, out=outs[at])
        else:
            torch.addmm(bias, a, b, out=outs[at])


def column_sums(matrix: Tensor) -> Tensor:
    """The sums over the rows of ``(rows, columns)`` in its dtype, added in float32 in an order fixed by the shape."""
    last, (matrix,) = oriented(matrix)
    if not last:
        matrix = matrix.contiguous()
    rows, columns = matrix.shape
    options = CONFIGURATIONS["column_sums"][0]
    chunk, chunks = chunks_of(matrix, rows, jit.cdiv(columns, options["COLUMNS"]), options["ROWS"])
    partial = jit.empty((chunks, columns), torch.float32, matrix.device)
    grid = (jit.cdiv(columns, options["COLUMNS"]), chunks)
    jit.launch(_column_sums, grid, matrix, partial, rows, columns, matrix.stride(0), chunk, **options)
    return add_partials(partial, matrix.dtype)


def chunks_of(like: Tensor, rows: int, column_blocks: int, step: int) -> tuple[int, int]:
    """(rows per chunk, chunks): about eight programs for each multiprocessor, whole steps each."""
    wanted = max(1, 8 * jit.target_of(like.device).multiprocessors // max(column_blocks, 1))
    chunk = max(1, jit.cdiv(jit.cdiv(rows, wanted), step)) * step
    return chunk, jit.cdiv(rows, chunk)


def add_partials(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sums over the first axis of ``(count, columns)``."""
    count, columns = partial.shape
    out = jit.empty((columns,), dtype, partial.device)
    options = {"ROWS": 16, "COLUMNS": 64, "num_warps": 4}
    jit.launch(_add_partials, (jit.cdiv(columns, 64),), partial, out, count, columns, **options)
    return out


def unfit_sizes(dtype: torch.dtype, rows: int, *widths: int) -> str | None:
    """Why these products cannot be served; None where they can."""
    if max(widths) > WIDEST or rows > MOST_ROWS:
        return f"its products take up to {MOST_ROWS} rows and widths of up to {WIDEST}, not {rows} and {max(widths)}"
    return jit.unfit_dtype(dtype)
