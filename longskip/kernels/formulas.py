"""What one call of an op costs, as exact integers: multiply-adds, elementwise FLOPs, bytes. No torch.

**macs**: multiply-adds of contractions only: linear layers, QKᵀ and PV. FLOPs are twice that.
**bytes**: each operand read once and each result written once, ``itemsize`` bytes a value (masks 1). What a real
implementation reads again, or keeps between forward and backward, is not in it.
**elementwise**: every other scalar operation, counted apart, by this table:

| operation | count |
|---|---|
| add, subtract, multiply, divide, negate | 1 each |
| compare and select (max, clamp, mask) | 1 |
| exp, erf, tanh, square root, reciprocal square root | 1 |
| sum or maximum of n values | n |
| a linear layer's bias | 1 per output; its gradient: 1 per output's gradient |
| softmax, per score | 6: scale, maximum, subtract, exp, sum, divide |
| layer norm | 5 per value, + 1 each for weight and bias; 4 per row |
| RMS norm | 3 per value, + 1 for weight; 3 per row |
| GELU (erf / tanh) | 5 / 9 per value; gradient 11 / 18 |
| SiLU times up | 5 per value; gradients 12 |
| rotation | 6 per pair |
| AdamW | 15 per value, + 1 scaled, + 3 with a weight average |

The code below spells each figure out. Backward formulas take ``needs_input`` and ``needs_weight`` where a contraction
hangs on them (a first layer needs no input gradient).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class OpCost:
    """Multiply-adds of contractions, elementwise FLOPs and bytes moved; costs add up and scale by integers."""

    macs: int = 0
    elementwise: int = 0
    bytes: int = 0

    @property
    def flops(self) -> int:
        """Contraction FLOPs: 2 per multiply-add."""
        return 2 * self.macs

    def __add__(self, other: OpCost) -> OpCost:
        return OpCost(self.macs + other.macs, self.elementwise + other.elementwise, self.bytes + other.bytes)

    def __mul__(self, times: int) -> OpCost:
        return OpCost(self.macs * times, self.elementwise * times, self.bytes * times)

    __rmul__ = __mul__


@dataclass(frozen=True)
class OpFormula:
    """An op's cost from its shapes. ``backward`` is None for an op that has none; both take keywords of plain ints."""

    forward: Callable[..., OpCost]
    backward: Callable[..., OpCost] | None


def linear_forward(*, rows: int, width: int, out: int, bias: int | bool = False, itemsize: int = 4) -> OpCost:
    """``(rows, width) -> (rows, out)`` with weight ``(out, width)``."""
    moved = rows * width + out * width + rows * out + bool(bias) * out
    return OpCost(rows * width * out, bool(bias) * rows * out, moved * itemsize)


def linear_backward(
    *,
    rows: int,
    width: int,
    out: int,
    bias: int | bool = False,
    itemsize: int = 4,
    needs_input: bool = True,
    needs_weight: bool = True,
) -> OpCost:
    """Gradients of a linear layer: one contraction for the input, one for the weight."""
    macs = (bool(needs_input) + bool(needs_weight)) * rows * width * out
    moved = rows * out
    if needs_input:
        moved += out * width + rows * width
    if needs_weight:
        moved += rows * width + out * width + bool(bias) * out
    return OpCost(macs, bool(bias and needs_weight) * rows * out, moved * itemsize)


def attention_forward(
    *, batch: int, queries: int, keys: int, heads: int, head_dim: int, masked: int | bool = False, itemsize: int = 4
) -> OpCost:
    """QKᵀ and PV; softmax 6 per score, a mask 1 more per score."""
    scores = batch * heads * queries * keys
    moved = batch * heads * head_dim * (2 * queries + 2 * keys) * itemsize + bool(masked) * batch * keys
    return OpCost(2 * scores * head_dim, (6 + bool(masked)) * scores, moved)


def attention_backward(
    *,
    batch: int,
    queries: int,
    keys: int,
    heads: int,
    head_dim: int,
    masked: int | bool = False,
    itemsize: int = 4,
    recompute: bool = False,
) -> OpCost:
    """dV, dP, dQ, dK from saved weights P; with ``recompute`` (flash) QKᵀ again, from the output and the row sums.

    Per score 5 (dP * P, its sum, subtract, multiply, scale); recomputed: 6 (scale, subtract, exp, then subtract,
    multiply, scale; 1 for a mask) and 2 per output value for the row sums of dO * O.
    """
    scores = batch * heads * queries * keys
    values = batch * heads * head_dim
    moved = values * (3 * queries + 4 * keys)  # q, dO, dQ; k, v, dK, dV
    if recompute:
        elementwise = (6 + bool(masked)) * scores + 2 * values * queries
        moved = (moved + values * queries + batch * heads * queries) * itemsize + bool(masked) * batch * keys
        return OpCost(5 * scores * head_dim, elementwise, moved)
    return OpCost(4 * scores * head_dim, 5 * scores, (moved + scores) * itemsize)


def layer_norm_forward(
    *,
    rows: int,
    width: int,
    weight: int | bool = False,
    bias: int | bool = False,
    residual: int | bool = False,
    itemsize: int = 4,
) -> OpCost:
    """Per value: sum, subtract, square, sum, scale; per row: two divisions, + eps, reciprocal root."""
    affine = bool(weight) + bool(bias)
    each = 5 + affine + bool(residual)
    moved = rows * width * (2 + 2 * bool(residual)) + affine * width
    return OpCost(0, rows * (width * each + 4), moved * itemsize)


def layer_norm_backward(
    *,
    rows: int,
    width: int,
    weight: int | bool = False,
    bias: int | bool = False,
    residual: int | bool = False,
    itemsize: int = 4,
) -> OpCost:
    """dx = rstd (g - mean(g) - x̂ mean(g x̂)), g = dy * weight.

    Per value 9: x̂ (2), sum of g, g x̂ and its sum (3), x̂ times its mean, two subtractions, rstd (4); the weight
    3 more (g; dy x̂ and its sum), the bias 1, a residual 1 (the sum's own gradient is added). Per row two divisions.
    """
    each = 9 + 3 * bool(weight) + bool(bias) + bool(residual)
    moved = rows * width * (3 + bool(residual)) + (2 * bool(weight) + bool(bias)) * width
    return OpCost(0, rows * (width * each + 2), moved * itemsize)


def rms_norm_forward(
    *, rows: int, width: int, weight: int | bool = False, residual: int | bool = False, itemsize: int = 4
) -> OpCost:
    """Per value: square, sum, scale; per row: division, + eps, reciprocal root."""
    each = 3 + bool(weight) + bool(residual)
    moved = rows * width * (2 + 2 * bool(residual)) + bool(weight) * width
    return OpCost(0, rows * (width * each + 3), moved * itemsize)


def rms_norm_backward(
    *, rows: int, width: int, weight: int | bool = False, residual: int | bool = False, itemsize: int = 4
) -> OpCost:
    """dx = rstd (g - x̂ mean(g x̂)): 6 per value, the weight 3 more, a residual 1; per row one division."""
    each = 6 + 3 * bool(weight) + bool(residual)
    moved = rows * width * (3 + bool(residual)) + 2 * bool(weight) * width
    return OpCost(0, rows * (width * each + 1), moved * itemsize)


def adaln_forward(*, batch: int, tokens: int, width: int, itemsize: int = 4) -> OpCost:
    """Layer norm (5 per value, 4 per row), times (1 + scale), plus shift; 1 + scale once per sample."""
    rows = batch * tokens
    moved = 2 * rows * width + 2 * batch * width
    return OpCost(0, rows * (7 * width + 4) + batch * width, moved * itemsize)


def adaln_backward(*, batch: int, tokens: int, width: int, itemsize: int = 4) -> OpCost:
    """Layer norm's 9 with g = dy (1 + scale) (1), the scale's 2 and the shift's 1; per row 2, per sample 1 + scale."""
    rows = batch * tokens
    moved = 3 * rows * width + 3 * batch * width
    return OpCost(0, rows * (13 * width + 2) + batch * width, moved * itemsize)


def gated_residual_forward(*, batch: int, tokens: int, width: int, itemsize: int = 4) -> OpCost:
    """One multiplication and one addition per value."""
    values = batch * tokens * width
    return OpCost(0, 2 * values, (3 * values + batch * width) * itemsize)


def gated_residual_backward(*, batch: int, tokens: int, width: int, itemsize: int = 4) -> OpCost:
    """dy = g gate (1); the gate's gradient: g y and its sum (2). x's gradient is g itself, not written again."""
    values = batch * tokens * width
    return OpCost(0, 3 * values, (3 * values + 2 * batch * width) * itemsize)


def gated_adaln_forward(*, batch: int, tokens: int, width: int, itemsize: int = 4) -> OpCost:
    """The gated residual, and adaln of it; the sum is written but not read again."""
    rows, values = batch * tokens, batch * tokens * width
    moved = 4 * values + 3 * batch * width
    return OpCost(0, rows * (9 * width + 4) + batch * width, moved * itemsize)


def gated_adaln_backward(*, batch: int, tokens: int, width: int, itemsize: int = 4) -> OpCost:
    """adaln's 13 per value, the sum's own gradient added (1), the gated residual's 3."""
    rows, values = batch * tokens, batch * tokens * width
    moved = 6 * values + 5 * batch * width  # s, y, ds, dout read, dx, dy written; gate, scale, and three gradients
    return OpCost(0, rows * (17 * width + 2) + batch * width, moved * itemsize)


def mlp_forward(
    *,
    rows: int,
    width: int,
    hidden: int,
    out: int,
    bias1: int | bool = True,
    bias2: int | bool = True,
    tanh: int | bool = False,
    itemsize: int = 4,
) -> OpCost:
    """Two linear layers and the GELU between them, whose values stay inside."""
    elementwise = rows * hidden * ((9 if tanh else 5) + bool(bias1)) + bool(bias2) * rows * out
    moved = rows * (width + out) + hidden * (width + out) + bool(bias1) * hidden + bool(bias2) * out
    return OpCost(rows * hidden * (width + out), elementwise, moved * itemsize)


def mlp_backward(
    *,
    rows: int,
    width: int,
    hidden: int,
    out: int,
    bias1: int | bool = True,
    bias2: int | bool = True,
    tanh: int | bool = False,
    itemsize: int = 4,
    needs_input: bool = True,
    needs_weight: bool = True,
) -> OpCost:
    """The hidden gradient (always needed here), dx, and the two weights' gradients; the saved values are x and the
    hidden layer before its GELU, whose value is computed again for w2's gradient (5 / 9)."""
    macs = rows * hidden * (out + bool(needs_input) * width + bool(needs_weight) * (width + out))
    value, slope = (9, 18) if tanh else (5, 11)
    elementwise = rows * hidden * (slope + bool(needs_weight) * (value + bool(bias1)))
    elementwise += bool(needs_weight and bias2) * rows * out
    moved = rows * (out + hidden) + hidden * out
    if needs_input:
        moved += hidden * width + rows * width
    if needs_weight:
        moved += rows * width + hidden * (width + out) + bool(bias1) * hidden + bool(bias2) * out
    return OpCost(macs, elementwise, moved * itemsize)


def swiglu_forward(*, rows: int, width: int, hidden: int, out: int, itemsize: int = 4) -> OpCost:
    """Three linear layers; per hidden value negate, exp, + 1, divide, times up."""
    moved = rows * (width + out) + hidden * (2 * width + out)
    return OpCost(rows * hidden * (2 * width + out), 5 * rows * hidden, moved * itemsize)


def swiglu_backward(
    *,
    rows: int,
    width: int,
    hidden: int,
    out: int,
    itemsize: int = 4,
    needs_input: bool = True,
    needs_weight: bool = True,
) -> OpCost:
    """Per hidden value 12: the sigmoid (4), silu (1), up's gradient (1), silu's gradient (1), its slope
    s(1 + g(1 - s)) with the sigmoid s (4), the gate's gradient (1); 1 more where silu * up is computed again for
    w_down's gradient."""
    macs = rows * hidden * (out + bool(needs_input) * 2 * width + bool(needs_weight) * (2 * width + out))
    moved = rows * (out + 2 * hidden) + hidden * out
    if needs_input:
        moved += 2 * hidden * width + rows * width
    if needs_weight:
        moved += rows * width + hidden * (2 * width + out)
    return OpCost(macs, rows * hidden * (12 + bool(needs_weight)), moved * itemsize)


def skip_linear_forward(*, rows: int, width: int, out: int, bias: int | bool = True, itemsize: int = 4) -> OpCost:
    """A linear layer of ``2 * width`` inputs; the two halves' sum is part of the contraction."""
    return linear_forward(rows=rows, width=2 * width, out=out, bias=bias, itemsize=itemsize)


def skip_linear_backward(
    *,
    rows: int,
    width: int,
    out: int,
    bias: int | bool = True,
    itemsize: int = 4,
    needs_input: bool = True,
    needs_weight: bool = True,
) -> OpCost:
    """A linear layer's, with ``2 * width`` inputs."""
    return linear_backward(
        rows=rows,
        width=2 * width,
        out=out,
        bias=bias,
        itemsize=itemsize,
        needs_input=needs_input,
        needs_weight=needs_weight,
    )


def _tables(tokens: int, head_dim: int, rotate: int | bool) -> int:
    return bool(rotate) * 2 * tokens * (head_dim // 2)


def qk_norm_rotary_forward(
    *,
    q_rows: int,
    k_rows: int,
    head_dim: int,
    tokens: int,
    rms: int | bool = True,
    layer: int | bool = False,
    q_weight: int | bool = False,
    k_weight: int | bool = False,
    rotate: int | bool = True,
    itemsize: int = 4,
) -> OpCost:
    """The norm of each (token, head) row of q and k, and 6 per rotated pair; nothing moves where nothing is done."""
    if not (rms or layer or rotate):
        return OpCost()
    total = OpCost(0, 0, _tables(tokens, head_dim, rotate) * itemsize)
    for rows, weight in ((q_rows, q_weight), (k_rows, k_weight)):
        if rms:
            total += rms_norm_forward(rows=rows, width=head_dim, weight=weight, itemsize=itemsize)
        elif layer:
            total += layer_norm_forward(rows=rows, width=head_dim, weight=weight, itemsize=itemsize)
        else:
            total += OpCost(0, 0, 2 * rows * head_dim * itemsize)
        total += OpCost(0, bool(rotate) * 6 * rows * (head_dim // 2), 0)
    return total


def qk_norm_rotary_backward(
    *,
    q_rows: int,
    k_rows: int,
    head_dim: int,
    tokens: int,
    rms: int | bool = True,
    layer: int | bool = False,
    q_weight: int | bool = False,
    k_weight: int | bool = False,
    rotate: int | bool = True,
    itemsize: int = 4,
) -> OpCost:
    """The rotation turned back (6 per pair), then the norm's gradient; the tables get none."""
    if not (rms or layer or rotate):
        return OpCost()
    total = OpCost(0, 0, _tables(tokens, head_dim, rotate) * itemsize)
    for rows, weight in ((q_rows, q_weight), (k_rows, k_weight)):
        if rms:
            total += rms_norm_backward(rows=rows, width=head_dim, weight=weight, itemsize=itemsize)
        elif layer:
            total += layer_norm_backward(rows=rows, width=head_dim, weight=weight, itemsize=itemsize)
        else:
            total += OpCost(0, 0, 2 * rows * head_dim * itemsize)
        total += OpCost(0, bool(rotate) * 6 * rows * (head_dim // 2), 0)
    return total


def diffusion_loss_forward(*, batch: int, values: int, x_kind: int | bool = False, itemsize: int = 4) -> OpCost:
    """Per value: error (v: 2, x: 1), square, sum; per sample: the mean's division and the weight; x adds max, square
    and division. The x kind does not read the noise. Weights, times and losses are float32."""
    each, once = (3, 5) if x_kind else (4, 2)
    moved = batch * values * (2 if x_kind else 3) * itemsize + batch * (3 if x_kind else 2) * 4
    return OpCost(0, batch * (values * each + once), moved)


def diffusion_loss_backward(*, batch: int, values: int, x_kind: int | bool = False, itemsize: int = 4) -> OpCost:
    """The prediction's gradient: the error again (v: 2, x: 1) times one factor per sample (gradient * weight * 2/n,
    x adds max, square and division)."""
    each, once = (2, 5) if x_kind else (3, 2)
    moved = batch * values * (3 if x_kind else 4) * itemsize + batch * (3 if x_kind else 2) * 4
    return OpCost(0, batch * (values * each + once), moved)


def adamw_forward(
    *,
    values: int,
    tensors: int = 1,
    scaled: int | bool = False,
    emas: int | bool = False,
    copies: int = 0,
    itemsize: int = 4,
) -> OpCost:
    """Per value 15: first moment 3, second 4, two corrections, root, + eps, quotient, times lr, decay, subtract (8);
    1 for a gradient scale, 3 for a weight average. Reads p, g, m, v; writes p, m, v; the average is read and written; a
    low-precision copy of ``copies`` bytes a value is written.
    """
    each = 15 + bool(scaled) + 3 * bool(emas)
    return OpCost(0, values * each, values * ((7 + 2 * bool(emas)) * itemsize + copies))


def attention_varlen_forward(
    *, queries: int, keys: int, pairs: int, heads: int, head_dim: int, offset_bytes: int = 0, itemsize: int = 4
) -> OpCost:
    """``attention_forward`` summed over sequences: ``queries`` and ``keys`` are all of them, ``pairs`` the sum of each
    sequence's queries times its keys."""
    moved = heads * head_dim * (2 * queries + 2 * keys) * itemsize + offset_bytes
    return OpCost(2 * heads * pairs * head_dim, 6 * heads * pairs, moved)


def attention_varlen_backward(
    *, queries: int, keys: int, pairs: int, heads: int, head_dim: int, offset_bytes: int = 0, itemsize: int = 4
) -> OpCost:
    """``attention_backward`` from saved weights, summed over sequences."""
    moved = heads * (head_dim * (3 * queries + 4 * keys) + pairs) * itemsize + offset_bytes
    return OpCost(4 * heads * pairs * head_dim, 5 * heads * pairs, moved)


def attention_chunks(head_dim: int) -> tuple[int, int]:
    """Columns that the Triton kernels multiply for a head dim, in one chunk (then the second is 0) or two.

    Powers of two are one chunk; else the largest power of two in it and one that takes the rest, at least 16.
    """
    first = 1 << (head_dim.bit_length() - 1)
    if first == head_dim:
        return first, 0
    return first, max(16, 1 << (head_dim - first - 1).bit_length())


def attention_forward_padded(
    *, batch: int, queries: int, keys: int, heads: int, head_dim: int, block_q: int, block_k: int
) -> int:
    """QKᵀ and PV over whole blocks of ``block_q`` queries and ``block_k`` keys, in multiply-adds.

    Of variable length: the sum over the sequences, each with ``batch`` = 1.
    """
    pairs = batch * heads * _whole(queries, block_q) * _whole(keys, block_k)
    return 2 * pairs * sum(attention_chunks(head_dim))


def attention_backward_padded(
    *,
    batch: int,
    queries: int,
    keys: int,
    heads: int,
    head_dim: int,
    block_q: int,
    block_k: int,
    of_queries: tuple[int, int] | None = None,
) -> int:
    """The backward's five contractions in one kernel; or four for the keys' gradients in blocks of ``block_q`` and
    ``block_k`` and three for the queries', in blocks of ``of_queries`` = (queries, keys)."""
    columns = batch * heads * sum(attention_chunks(head_dim))
    pairs = _whole(queries, block_q) * _whole(keys, block_k)
    if of_queries is None:
        return 5 * columns * pairs
    return columns * (4 * pairs + 3 * _whole(queries, of_queries[0]) * _whole(keys, of_queries[1]))


def _whole(size: int, block: int) -> int:
    """The size in whole blocks."""
    return -(-size // block) * block


def matmul_padded(rows: int, columns: int, inner: int, *, block_m: int, block_n: int, block_k: int) -> int:
    """Multiply-adds that a product in tiles of (block_m, block_n, block_k) executes, past its edges too."""
    return _whole(rows, block_m) * _whole(columns, block_n) * _whole(inner, block_k)


def skip_linear_forward_padded(*, rows: int, width: int, out: int, **blocks: int) -> int:
    """The inner axis runs over x, then over skip, in whole blocks each."""
    return 2 * matmul_padded(rows, out, width, **blocks)


def skip_linear_backward_padded(*, rows: int, width: int, out: int, **blocks: int) -> int:
    """The halves of [dx | dskip] and of the weight's gradient are tiled each by itself."""
    return 2 * matmul_padded(rows, width, out, **blocks) + 2 * matmul_padded(out, width, rows, **blocks)


def mlp_forward_padded(*, rows: int, width: int, hidden: int, out: int, **blocks: int) -> int:
    return matmul_padded(rows, hidden, width, **blocks) + matmul_padded(rows, out, hidden, **blocks)


def mlp_backward_padded(*, rows: int, width: int, hidden: int, out: int, **blocks: int) -> int:
    """The hidden gradient, dx, and the two weights' gradients."""
    of_inputs = matmul_padded(rows, hidden, out, **blocks) + matmul_padded(rows, width, hidden, **blocks)
    return of_inputs + matmul_padded(hidden, width, rows, **blocks) + matmul_padded(out, hidden, rows, **blocks)


def swiglu_forward_padded(*, rows: int, width: int, hidden: int, out: int, **blocks: int) -> int:
    return 2 * matmul_padded(rows, hidden, width, **blocks) + matmul_padded(rows, out, hidden, **blocks)


def swiglu_backward_padded(*, rows: int, width: int, hidden: int, out: int, **blocks: int) -> int:
    """As the MLP's, with two products for dx and for the first weights."""
    of_inputs = matmul_padded(rows, hidden, out, **blocks) + 2 * matmul_padded(rows, width, hidden, **blocks)
    return of_inputs + 2 * matmul_padded(hidden, width, rows, **blocks) + matmul_padded(out, hidden, rows, **blocks)


FORMULAS: dict[str, OpFormula] = {
    "linear": OpFormula(linear_forward, linear_backward),
    "attention": OpFormula(attention_forward, attention_backward),
    "attention_varlen": OpFormula(attention_varlen_forward, attention_varlen_backward),
    "layer_norm": OpFormula(layer_norm_forward, layer_norm_backward),
    "rms_norm": OpFormula(rms_norm_forward, rms_norm_backward),
    "adaln": OpFormula(adaln_forward, adaln_backward),
    "gated_adaln": OpFormula(gated_adaln_forward, gated_adaln_backward),
    "gated_residual": OpFormula(gated_residual_forward, gated_residual_backward),
    "mlp": OpFormula(mlp_forward, mlp_backward),
    "swiglu": OpFormula(swiglu_forward, swiglu_backward),
    "skip_linear": OpFormula(skip_linear_forward, skip_linear_backward),
    "qk_norm_rotary": OpFormula(qk_norm_rotary_forward, qk_norm_rotary_backward),
    "diffusion_loss": OpFormula(diffusion_loss_forward, diffusion_loss_backward),
    "adamw": OpFormula(adamw_forward, None),
}
