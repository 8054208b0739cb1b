"""Every op and its gradient on single numbers that count what is done to them: the oracle of values and of counts.

Written from the formulas in the ops' docstrings with loops over lists, without torch. ``dot`` is a contraction (its
multiply-adds are counted as such); everything else is one elementwise operation per operator or function.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

TALLY: Counter[str] = Counter()


class Num:
    """A float whose arithmetic is counted."""

    __slots__ = ("value",)

    def __init__(self, value: float) -> None:
        self.value = value

    def __add__(self, other: Num | float) -> Num:
        return _count(self.value + _float(other))

    def __sub__(self, other: Num | float) -> Num:
        return _count(self.value - _float(other))

    def __mul__(self, other: Num | float) -> Num:
        return _count(self.value * _float(other))

    def __truediv__(self, other: Num | float) -> Num:
        return _count(self.value / _float(other))

    def __rsub__(self, other: float) -> Num:
        return _count(other - self.value)

    def __rtruediv__(self, other: float) -> Num:
        return _count(other / self.value)

    def __neg__(self) -> Num:
        return _count(-self.value)

    __radd__ = __add__
    __rmul__ = __mul__


Row = list[Num]
Rows = list[Row]


def _float(value: Num | float) -> float:
    return value.value if isinstance(value, Num) else value


def _count(value: float) -> Num:
    TALLY["elementwise"] += 1
    return Num(value)


def apply(function: Callable[[float], float], x: Num) -> Num:
    return _count(function(x.value))


def rsqrt(x: Num) -> Num:
    return apply(lambda value: value**-0.5, x)


def total(values: Sequence[Num]) -> Num:
    result = Num(0.0)
    for value in values:
        result = result + value
    return result


def largest(values: Sequence[Num]) -> Num:
    result = Num(-math.inf)
    for value in values:
        result = _count(max(result.value, value.value))
    return result


def dot(a: Sequence[Num], b: Sequence[Num]) -> Num:
    TALLY["macs"] += len(a)
    return Num(sum(x.value * y.value for x, y in zip(a, b, strict=True)))


def columns(rows: Rows) -> Rows:
    return [list(column) for column in zip(*rows, strict=True)]


def product(a: Rows, b_transposed: Rows) -> Rows:
    return [[dot(row, other) for other in b_transposed] for row in a]


def plus(a: Rows, b: Rows) -> Rows:
    return [[x + y for x, y in zip(r, s, strict=True)] for r, s in zip(a, b, strict=True)]


def sums(rows: Rows) -> Row:
    return [total(column) for column in columns(rows)]


def linear(x: Rows, weight: Rows, bias: Row | None) -> Rows:
    out = product(x, weight)
    return out if bias is None else [[v + b for v, b in zip(row, bias, strict=True)] for row in out]


def linear_grads(dy: Rows, x: Rows, weight: Rows, bias: bool) -> tuple[Rows, Rows, Row | None]:
    return product(dy, columns(weight)), product(columns(dy), columns(x)), sums(dy) if bias else None


def softmax(row: Row, scale: float, mask: Sequence[bool] | None) -> Row:
    row = [x * scale for x in row]
    if mask is not None:
        row = [_count(x.value if keep else -math.inf) for x, keep in zip(row, mask, strict=True)]
    top = largest(row)
    powers = [apply(math.exp, x - top) for x in row]
    whole = total(powers)
    return [p / whole for p in powers]


def attention(q: Rows, k: Rows, v: Rows, scale: float, mask: Sequence[bool] | None) -> tuple[Rows, Rows]:
    """One sample and head: (output, weights)."""
    weights = [softmax(row, scale, mask) for row in product(q, k)]
    return product(weights, columns(v)), weights


def attention_grads(do: Rows, q: Rows, k: Rows, v: Rows, p: Rows, scale: float) -> tuple[Rows, Rows, Rows]:
    dv = product(columns(p), columns(do))
    ds = []
    for dp, weights in zip(product(do, v), p, strict=True):
        inner = total([a * b for a, b in zip(dp, weights, strict=True)])
        ds.append([(a - inner) * w * scale for a, w in zip(dp, weights, strict=True)])
    return product(ds, columns(k)), product(columns(ds), columns(q)), dv


def normed(x: Row, eps: float, centre: bool) -> tuple[Row, Num, Num | None]:
    """(x̂, reciprocal deviation, mean or None) of one row."""
    mean = total(x) / len(x) if centre else None
    centred = [v - mean for v in x] if mean is not None else x
    rstd = rsqrt(total([v * v for v in centred]) / len(x) + eps)
    return [v * rstd for v in centred], rstd, mean


def norm(x: Rows, weight: Row | None, bias: Row | None, residual: Rows | None, eps: float, centre: bool) -> Rows:
    x = x if residual is None else plus(x, residual)
    out = [normed(row, eps, centre)[0] for row in x]
    if weight is not None:
        out = [[v * w for v, w in zip(row, weight, strict=True)] for row in out]
    return out if bias is None else [[v + b for v, b in zip(row, bias, strict=True)] for row in out]


def norm_input_grad(g: Row, x: Row, rstd: Num, mean: Num | None) -> tuple[Row, Row]:
    """(dx, x̂) of one row from the gradient of x̂."""
    hat = [(v - mean) * rstd if mean is not None else v * rstd for v in x]
    first = total(g) / len(x) if mean is not None else None
    second = total([a * b for a, b in zip(g, hat, strict=True)]) / len(x)
    dx = []
    for a, h in zip(g, hat, strict=True):
        a = a if first is None else a - first
        dx.append((a - h * second) * rstd)
    return dx, hat


def norm_grads(
    dy: Rows, ds: Rows | None, x: Rows, stats: list[tuple[Num, Num | None]], weight: Row | None, bias: bool
) -> tuple[Rows, Row | None, Row | None]:
    """(dx, dweight, dbias); ``ds`` is the gradient of the returned sum, ``x`` that sum."""
    dxs, hats = [], []
    for g, row, (rstd, mean) in zip(dy, x, stats, strict=True):
        scaled = g if weight is None else [a * w for a, w in zip(g, weight, strict=True)]
        dx, hat = norm_input_grad(scaled, row, rstd, mean)
        dxs.append(dx)
        hats.append(hat)
    dxs = dxs if ds is None else plus(dxs, ds)
    dweight = None
    if weight is not None:
        dweight = sums([[a * h for a, h in zip(g, hat, strict=True)] for g, hat in zip(dy, hats, strict=True)])
    return dxs, dweight, sums(dy) if bias else None


def adaln(x: Rows, shift: Row, scale: Row, eps: float) -> Rows:
    """One sample."""
    factor = [1 + s for s in scale]
    return [[v * f + b for v, f, b in zip(normed(row, eps, True)[0], factor, shift, strict=True)] for row in x]


def adaln_grads(dy: Rows, x: Rows, stats: list[tuple[Num, Num | None]], scale: Row) -> tuple[Rows, Row, Row]:
    """One sample: (dx, dshift, dscale)."""
    factor = [1 + s for s in scale]
    dxs, dscales = [], []
    for g, row, (rstd, mean) in zip(dy, x, stats, strict=True):
        dx, hat = norm_input_grad([a * f for a, f in zip(g, factor, strict=True)], row, rstd, mean)
        dxs.append(dx)
        dscales.append([a * h for a, h in zip(g, hat, strict=True)])
    return dxs, sums(dy), sums(dscales)


def gated(x: Rows, y: Rows, gate: Row) -> Rows:
    return [[a + g * b for a, g, b in zip(r, gate, s, strict=True)] for r, s in zip(x, y, strict=True)]


def gated_grads(g: Rows, y: Rows, gate: Row) -> tuple[Rows, Row]:
    """(dy, dgate) of one sample; x's gradient is g."""
    dy = [[a * w for a, w in zip(row, gate, strict=True)] for row in g]
    return dy, sums([[a * b for a, b in zip(r, s, strict=True)] for r, s in zip(g, y, strict=True)])


ROOT = math.sqrt(0.5)
TANH = math.sqrt(2 / math.pi)
CUBE = 0.044715


def gelu(x: Num, tanh: bool) -> Num:
    if tanh:
        return x * 0.5 * (apply(math.tanh, (x + x * x * x * CUBE) * TANH) + 1)
    return x * 0.5 * (apply(math.erf, x * ROOT) + 1)


def gelu_grad(x: Num, g: Num, tanh: bool) -> Num:
    if tanh:
        square = x * x
        t = apply(math.tanh, (square * CUBE + 1) * x * TANH)
        slope = (square * (3 * CUBE) + 1) * TANH
        return g * ((t + 1) * 0.5 + x * 0.5 * (1 - t * t) * slope)
    density = apply(math.exp, x * x * -0.5) * (1 / math.sqrt(2 * math.pi))
    return g * ((apply(math.erf, x * ROOT) + 1) * 0.5 + x * density)


def sigmoid(x: Num) -> Num:
    return 1.0 / (apply(math.exp, -x) + 1)


def swiglu_hidden(gate: Num, up: Num) -> Num:
    return gate / (apply(math.exp, -gate) + 1) * up


def swiglu_hidden_grads(gate: Num, up: Num, g: Num) -> tuple[Num, Num, Num]:
    """(d gate, d up, the hidden value again)."""
    s = sigmoid(gate)
    silu = gate * s
    d_up = g * silu
    d_silu = g * up
    return d_silu * (s * (gate * (1 - s) + 1)), d_up, silu * up


def rotate(x: Row, cos: Sequence[float], sin: Sequence[float], back: bool = False) -> Row:
    out = []
    for i, (c, s) in enumerate(zip(cos, sin, strict=True)):
        a, b = x[2 * i], x[2 * i + 1]
        out += [a * c + b * s, b * c - a * s] if back else [a * c - b * s, a * s + b * c]
    return out


def loss(p: Row, clean: Row, noise: Row, time: Num, weight: Num, floor: float | None) -> Num:
    """One sample; ``floor`` for the x kind, None for the v kind."""
    if floor is None:
        errors = [a - (n - c) for a, c, n in zip(p, clean, noise, strict=True)]
        return total([e * e for e in errors]) / len(p) * weight
    bound = _count(max(time.value, floor))
    return total([e * e for e in (a - c for a, c in zip(p, clean, strict=True))]) / len(p) * (weight / (bound * bound))


def loss_grad(g: Num, p: Row, clean: Row, noise: Row, time: Num, weight: Num, floor: float | None) -> Row:
    factor = g * weight * (2 / len(p))
    if floor is None:
        return [(a - (n - c)) * factor for a, c, n in zip(p, clean, noise, strict=True)]
    bound = _count(max(time.value, floor))
    factor = factor / (bound * bound)
    return [(a - c) * factor for a, c in zip(p, clean, strict=True)]


def adamw(
    p: Num, g: Num, m: Num, v: Num, lr: float, betas: tuple[float, float], eps: float, decay: float, step: int
) -> tuple[Num, Num, Num]:
    m = m * betas[0] + g * (1 - betas[0])
    v = v * betas[1] + g * g * (1 - betas[1])
    root = apply(math.sqrt, v / (1 - betas[1] ** step)) + eps
    return p * (1 - lr * decay) - m / (1 - betas[0] ** step) / root * lr, m, v
