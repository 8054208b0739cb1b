"""Everything that works row by row of (samples, tokens, width), in one forward and one backward Triton kernel.

    s   = x,  x + y,  or  x + gate * y                        rounded to x's dtype, returned where something was added
    out = norm(s) * weight + bias                             weight and bias of the tensor (layer norm, RMS norm)
    out = norm(s) * (1 + weight) + bias                       weight and bias of the sample (adaptive layer norm)

``norm.py`` and ``adaln.py`` are cuts of it; what is absent (None) costs nothing. Every tensor is read once and written
once; a row's mean and reciprocal deviation (float32) are kept for the backward.

**Layout.** A row lies in registers, as one piece of a power of two or, for widths such as 1152, 1536 and 3072, as two.
Forward: a program takes a tile of rows of one sample, so that the sample's vectors are read once per tile. Backward: a
program goes through a fixed chunk of one sample's rows and keeps float32 sums of the vectors' gradients in registers; a
second kernel adds the chunks' sums in order. The number of chunks follows from the shapes and the number of
multiprocessors alone: same call, same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from longskip.kernels import jit, tables

MAX_WIDTH = 4096  # wider rows do not fit in a multiprocessor's registers together with the backward's sums

# VALUES: values of a tensor that a program holds at a time: several rows where they are short; a longer row takes
# more warps than num_warps. The first is the default.
CONFIGURATIONS: dict[str, tuple[dict[str, int], ...]] = {
    "rows_forward": (
        {"VALUES": 4096, "num_warps": 4},
        {"VALUES": 2048, "num_warps": 4},
        {"VALUES": 1024, "num_warps": 1},
        {"VALUES": 8192, "num_warps": 8},
    ),
    "rows_backward": (
        {"VALUES": 1024, "num_warps": 4, "STAGES": 2},
        {"VALUES": 1024, "num_warps": 4, "STAGES": 1},
        {"VALUES": 1024, "num_warps": 4, "STAGES": 3},
        {"VALUES": 2048, "num_warps": 4, "STAGES": 2},
        {"VALUES": 2048, "num_warps": 8, "STAGES": 2},
    ),
}

_PROGRAMS = 4  # of the backward, per multiprocessor, at a time
_START = 8  # what a chunk costs beside its rows (its start, its sums), in rows


@triton.jit
def _mask(inside, START: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    mask = inside[:, None]
    if START + BLOCK > WIDTH:
        mask = mask & (START + tl.arange(0, BLOCK) < WIDTH)[None, :]
    return mask


@triton.jit
def _places(pointer, first, inside, START: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Where the columns from START on lie, in the rows from ``first`` (int64) on: within a tile int32 is enough."""
    within = tl.arange(0, inside.shape[0])[:, None] * WIDTH + (START + tl.arange(0, BLOCK))[None, :]
    return pointer + first * WIDTH + within


@triton.jit
def _read(pointer, first, inside, START: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """(ROWS, BLOCK) float32: the rows' columns from START on; 0 outside."""
    where = _places(pointer, first, inside, START, BLOCK, WIDTH)
    return tl.load(where, mask=_mask(inside, START, BLOCK, WIDTH), other=0.0).to(tl.float32)


@triton.jit
def _write(pointer, values, first, inside, START: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    where = _places(pointer, first, inside, START, BLOCK, WIDTH)
    tl.store(where, values.to(pointer.dtype.element_ty), mask=_mask(inside, START, BLOCK, WIDTH))


@triton.jit
def _vector(pointer, START: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """(1, BLOCK) float32: a vector's values from START on; 0 outside."""
    at = START + tl.arange(0, BLOCK)
    return tl.load(pointer + at, mask=at < WIDTH, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _sum_of(x, y, gate, total, first, inside, START: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """One piece of s; where something is added it is written to ``total`` and rounded as it is there."""
    s = _read(x, first, inside, START, BLOCK, WIDTH)
    if y is not None:
        more = _read(y, first, inside, START, BLOCK, WIDTH)
        if gate is not None:
            more *= _vector(gate, START, BLOCK, WIDTH)
        s = (s + more).to(total.dtype.element_ty)
        _write(total, s, first, inside, START, BLOCK, WIDTH)
        s = s.to(tl.float32)
    return s


@triton.jit
def _centred(s, mean, START: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    s = s - mean[:, None]
    if START + BLOCK > WIDTH:
        s = tl.where((START + tl.arange(0, BLOCK) < WIDTH)[None, :], s, 0.0)
    return s


@triton.jit
def _normed(
    s, rstd, weight, bias, out, first, inside,
    MODULATE: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write one piece of the result, from s less its mean."""
    normed = s * rstd[:, None]
    if weight is not None:
        normed *= _weight(weight, MODULATE, START, BLOCK, WIDTH)
    if bias is not None:
        normed += _vector(bias, START, BLOCK, WIDTH)
    _write(out, normed, first, inside, START, BLOCK, WIDTH)


@triton.jit
def _weight(pointer, MODULATE: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    weight = _vector(pointer, START, BLOCK, WIDTH)
    if MODULATE:
        weight += 1.0
    return weight


@triton.jit
def reciprocal_deviation(square, eps, WIDTH: tl.constexpr, EXACT: tl.constexpr):
    """1 / sqrt(square / WIDTH + eps); ``EXACT``: rounded once, by a Newton step in float64 (0 and infinity stay)."""
    scale = tl.rsqrt(square / WIDTH + eps)
    if EXACT:
        variance = square.to(tl.float64) * (1.0 / WIDTH) + eps
        wide = scale.to(tl.float64)
        better = wide * (1.5 - 0.5 * variance * wide * wide)
        scale = tl.where((scale > 0.0) & (scale < float("inf")), better.to(tl.float32), scale)
    return scale


@triton.jit
def _rows_forward(
    x, y, gate, weight, bias, total, out, mean, rstd, tokens, eps,
    MODULATE: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (sample, tile): ROWS rows. Without ``out`` only the sum is made, without ``mean`` the norm is RMS."""
    tiles = tl.cdiv(tokens, ROWS)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * ROWS
    first = sample * tokens + token
    row = tl.arange(0, ROWS)
    inside = token + row < tokens
    # Not a function of the pointer: Triton 3.6 cannot hand back None.
    if gate is not None:
        gate += sample * WIDTH
    if weight is not None:
        weight += sample * WIDTH
    if bias is not None:
        bias += sample * WIDTH

    s = _sum_of(x, y, gate, total, first, inside, 0, FIRST, WIDTH)
    if SECOND:
        s2 = _sum_of(x, y, gate, total, first, inside, FIRST, SECOND, WIDTH)
    if out is not None:
        if mean is not None:
            centre = tl.sum(s, 1)
            if SECOND:
                centre += tl.sum(s2, 1)
            centre = centre / WIDTH
            tl.store(mean + first + row, centre, mask=inside)
            s = _centred(s, centre, 0, FIRST, WIDTH)
            if SECOND:
                s2 = _centred(s2, centre, FIRST, SECOND, WIDTH)
        square = tl.sum(s * s, 1)
        if SECOND:
            square += tl.sum(s2 * s2, 1)
        scale = reciprocal_deviation(square, eps, WIDTH, out.dtype.element_ty == tl.float32)
        tl.store(rstd + first + row, scale, mask=inside)
        _normed(s, scale, weight, bias, out, first, inside, MODULATE, 0, FIRST, WIDTH)
        if SECOND:
            _normed(s2, scale, weight, bias, out, first, inside, MODULATE, FIRST, SECOND, WIDTH)


@triton.jit
def _tile(
    s, dout, dtotal, y, centre, first, inside,
    ROWS: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One piece of dout, s less its mean, dtotal and y; 0 for what is absent."""
    upper = tl.zeros((ROWS, BLOCK), tl.float32)
    apart, slope, other = upper, upper, upper
    if dout is not None:
        upper = _read(dout, first, inside, START, BLOCK, WIDTH)
        apart = _read(s, first, inside, START, BLOCK, WIDTH) - centre[:, None]
    if dtotal is not None:
        slope = _read(dtotal, first, inside, START, BLOCK, WIDTH)
    if y is not None:
        other = _read(y, first, inside, START, BLOCK, WIDTH)
    return upper, apart, slope, other


@triton.jit
def _slopes(slope, gates, dx, dy, first, inside, START: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Write one piece of the gradients of x and y."""
    if dx is not None:
        _write(dx, slope, first, inside, START, BLOCK, WIDTH)
    if dy is not None:
        _write(dy, slope * gates, first, inside, START, BLOCK, WIDTH)


@triton.jit
def _keep(partial, sums, START: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    at = START + tl.arange(0, BLOCK)
    tl.store(partial + at, tl.sum(sums, 0), mask=at < WIDTH)


@triton.jit
def _rows_backward(
    s, dout, dtotal, y, gate, weight, mean, rstd, dx, dy, partial, tokens, chunks, per,
    D_WEIGHT: tl.constexpr, D_BIAS: tl.constexpr, D_GATE: tl.constexpr, STAGES: tl.constexpr,
    MODULATE: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (sample, chunk): ``per`` rows. With g = dout * weight and x̂ the normed row,

        ds = rstd (g - mean(g) - x̂ mean(g x̂)) + dtotal,      dx = ds,      dy = gate * ds

    and the sums over the chunk's rows of dout x̂ (weight), dout (bias) and ds y (gate), those that are asked for, go to
    ``partial (samples, chunks, sums, width)``. Without ``dout`` there is no norm: ds = dtotal.
    """
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    w = tl.full((1, FIRST), 1.0, tl.float32)
    gates = w
    if SECOND:
        w2 = tl.full((1, SECOND), 1.0, tl.float32)
        gates2 = w2
    if weight is not None:
        weight += sample * WIDTH
        w = _weight(weight, MODULATE, 0, FIRST, WIDTH)
        if SECOND:
            w2 = _weight(weight, MODULATE, FIRST, SECOND, WIDTH)
    if gate is not None:
        gate += sample * WIDTH
        gates = _vector(gate, 0, FIRST, WIDTH)
        if SECOND:
            gates2 = _vector(gate, FIRST, SECOND, WIDTH)
    # The sums, one value per place of the tile: nothing crosses threads before the chunk's end. (A 2: the second piece.)
    d_weight = tl.zeros((ROWS, FIRST), tl.float32)
    d_bias = tl.zeros((ROWS, FIRST), tl.float32)
    d_gate = tl.zeros((ROWS, FIRST), tl.float32)
    if SECOND:
        d_weight2 = tl.zeros((ROWS, SECOND), tl.float32)
        d_bias2 = tl.zeros((ROWS, SECOND), tl.float32)
        d_gate2 = tl.zeros((ROWS, SECOND), tl.float32)

    row = tl.arange(0, ROWS)
    for start in tl.range(0, per, ROWS, num_stages=STAGES):
        token = chunk * per + start
        first = sample * tokens + token
        inside = token + row < tokens
        scale = tl.zeros((ROWS,), tl.float32)
        centre = scale
        if dout is not None:
            scale = tl.load(rstd + first + row, mask=inside, other=0.0)
            if mean is not None:
                centre = tl.load(mean + first + row, mask=inside, other=0.0)
        # All of a tile is asked for before any of it is used.
        upper, apart, slope, other = _tile(s, dout, dtotal, y, centre, first, inside, ROWS, 0, FIRST, WIDTH)
        if SECOND:
            upper2, apart2, slope2, other2 = _tile(
                s, dout, dtotal, y, centre, first, inside, ROWS, FIRST, SECOND, WIDTH
            )  # fmt: skip
        scale = scale[:, None]
        if dout is not None:
            along = tl.sum(upper * w * apart, 1)
            across = tl.sum(upper * w, 1)
            if SECOND:
                along += tl.sum(upper2 * w2 * apart2, 1)
                across += tl.sum(upper2 * w2, 1)
            along = (along / WIDTH)[:, None] * (scale * scale)
            across = (across / WIDTH)[:, None]
            if mean is None:
                across = tl.zeros((ROWS, 1), tl.float32)
            slope += scale * (upper * w - across - apart * along)
            if SECOND:
                slope2 += scale * (upper2 * w2 - across - apart2 * along)
        _slopes(slope, gates, dx, dy, first, inside, 0, FIRST, WIDTH)
        d_weight += upper * scale * apart
        d_bias += upper
        d_gate += slope * other
        if SECOND:
            _slopes(slope2, gates2, dx, dy, first, inside, FIRST, SECOND, WIDTH)
            d_weight2 += upper2 * scale * apart2
            d_bias2 += upper2
            d_gate2 += slope2 * other2

    if partial is not None:
        partial += tl.program_id(0).to(tl.int64) * (D_WEIGHT + D_BIAS + D_GATE) * WIDTH
    if D_WEIGHT:
        _keep(partial, d_weight, 0, FIRST, WIDTH)
        if SECOND:
            _keep(partial, d_weight2, FIRST, SECOND, WIDTH)
    if D_BIAS:
        _keep(partial + D_WEIGHT * WIDTH, d_bias, 0, FIRST, WIDTH)
        if SECOND:
            _keep(partial + D_WEIGHT * WIDTH, d_bias2, FIRST, SECOND, WIDTH)
    if D_GATE:
        _keep(partial + (D_WEIGHT + D_BIAS) * WIDTH, d_gate, 0, FIRST, WIDTH)
        if SECOND:
            _keep(partial + (D_WEIGHT + D_BIAS) * WIDTH, d_gate2, FIRST, SECOND, WIDTH)


@triton.jit
def _added_up(partial, out, sample, chunks, row, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``out``'s columns of one sample: the chunks' sums, ``row`` values apart, added in order."""
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, chunks, ROWS):
        chunk = start + tl.arange(0, ROWS)
        where = (sample * chunks + chunk)[:, None] * row + at[None, :]
        total += tl.load(partial + where, mask=(chunk < chunks)[:, None] & (at < WIDTH)[None, :], other=0.0)
    tl.store(out + sample * WIDTH + at, tl.sum(total, 0).to(out.dtype.element_ty), mask=at < WIDTH)


@triton.jit
def _rows_sum(
    partial, d_weight, d_bias, d_gate, chunks, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Program (sample, block of columns): the gradients of the vectors that are asked for."""
    sample = tl.program_id(0).to(tl.int64)
    row = ((d_weight is not None) + (d_bias is not None) + (d_gate is not None)) * WIDTH
    if d_weight is not None:
        _added_up(partial, d_weight, sample, chunks, row, WIDTH, ROWS, BLOCK)
        partial += WIDTH
    if d_bias is not None:
        _added_up(partial, d_bias, sample, chunks, row, WIDTH, ROWS, BLOCK)
        partial += WIDTH
    if d_gate is not None:
        _added_up(partial, d_gate, sample, chunks, row, WIDTH, ROWS, BLOCK)


def unfit(dtype: torch.dtype, sizes: Mapping[str, int]) -> str | None:
    """Why a call of these sizes cannot be served; None where it can."""
    if sizes.get("width", 1) > MAX_WIDTH:
        return f"its kernels take widths up to {MAX_WIDTH}, not {sizes['width']}"
    return jit.unfit_dtype(dtype)


def forward(
    x: Tensor,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 0.0,
    norm: bool = True,
    centred: bool = True,
    per_sample: bool = False,
    configuration: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(s, out, mean, rstd)``: s and out of x's shape, mean and rstd one float32 per row.

    x, y ``(..., width)``; gate, weight, bias ``(width,)``, or with ``per_sample`` ``(samples, width)`` for x
    ``(samples, tokens, width)`` and a weight round 1. Empty where there is nothing to return: s without y, out and rstd
    without ``norm``, mean unless ``centred``.
    """
    samples, tokens, _ = _sizes(x, per_sample)
    rows = samples * tokens
    total = _empty_like(x, y is not None)
    out = _empty_like(x, norm)
    mean = jit.empty((rows if norm and centred else 0,), torch.float32, x.device)
    rstd = jit.empty((rows if norm else 0,), torch.float32, x.device)
    constants = _constants("rows_forward", x, samples, tokens, (y, gate, weight, bias), configuration)
    grid = (samples * jit.cdiv(tokens, constants["ROWS"]),)
    jit.launch(
        _rows_forward, grid,
        *(tensor if tensor is None else tensor.contiguous() for tensor in (x, y, gate, weight, bias)),
        *(tensor if wanted else None for tensor, wanted in (
            (total, y is not None), (out, norm), (mean, norm and centred), (rstd, norm)
        )),
        tokens, eps, MODULATE=per_sample, **constants,
    )  # fmt: skip
    return total, out, mean, rstd


def backward(
    s: Tensor | None,
    dout: Tensor | None,
    dtotal: Tensor | None,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    *,
    dx: bool = True,
    dy: bool = False,
    weight_like: Tensor | None = None,
    bias_like: Tensor | None = None,
    gate_like: Tensor | None = None,
    per_sample: bool = False,
    configuration: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(dx, dy, d_weight, d_bias, d_gate)`` from the cotangents of out and of s (``dtotal``), either of them None.

    Without ``dout`` s, mean, rstd and weight are None; mean is None for an RMS norm. ``dx`` and ``dy`` say whether they
    are written, ``…_like`` gives shape and dtype of a vector's gradient that is asked for (the gate's needs y). What is
    not asked for comes back empty.
    """
    like = dout if dout is not None else dtotal
    assert like is not None
    samples, tokens, width = _sizes(like, per_sample)
    constants = _constants(
        "rows_backward", like, samples, tokens, (dout, dtotal, y, gate, bias_like), configuration
    )  # fmt: skip
    out = (_empty_like(like, dx), _empty_like(like, dy))
    vectors = [v if v is None else jit.empty(v.shape, v.dtype, v.device) for v in (weight_like, bias_like, gate_like)]
    asked = [v is not None for v in vectors]
    chunks = chunks_of(samples, tokens, jit.target_of(like.device).multiprocessors)
    per = jit.cdiv(jit.cdiv(tokens, chunks), constants["ROWS"]) * constants["ROWS"]
    partial = jit.empty((samples, chunks, sum(asked), width), torch.float32, like.device)
    jit.launch(
        _rows_backward, (samples * chunks,),
        *(tensor if tensor is None else tensor.contiguous() for tensor in (s, dout, dtotal, y, gate, weight)),
        mean, rstd, out[0] if dx else None, out[1] if dy else None, partial if any(asked) else None,
        tokens, chunks, per, D_WEIGHT=asked[0], D_BIAS=asked[1], D_GATE=asked[2], MODULATE=per_sample, **constants,
    )  # fmt: skip
    if any(asked):
        add_up(partial, vectors)
    return *out, *(jit.empty((0,), like.dtype, like.device) if v is None else v for v in vectors)  # type: ignore


def add_up(partial: Tensor, vectors: list[Tensor | None]) -> None:
    """Write into the (at most three) vectors, each (samples, width) or (width,) for one sample, their sums in order
    over the chunks of ``partial (samples, chunks, vectors that are not None, width)``."""
    samples, chunks, _, width = partial.shape
    rows = min(jit.next_power_of_2(chunks), 64)
    block = max(32, 2048 // rows)
    grid = (samples, jit.cdiv(width, block))
    vectors = [*vectors, None, None][:3]
    jit.launch(_rows_sum, grid, partial, *vectors, chunks, WIDTH=width, ROWS=rows, BLOCK=block, num_warps=4)


def fake_like(tensor: Tensor | None, wanted: bool, like: Tensor) -> Tensor:
    """What stands for a gradient in a fake: of the tensor's shape and dtype, or empty where it is not asked for."""
    if tensor is None or not wanted:
        return like.new_empty(0)
    return tensor.new_empty(tensor.shape)


def _sizes(x: Tensor, per_sample: bool) -> tuple[int, int, int]:
    width = x.shape[-1]
    if per_sample:
        return x.shape[0], x.shape[1], width
    return 1, x.numel() // width, width


def _empty_like(x: Tensor, wanted: bool) -> Tensor:
    return jit.empty(x.shape if wanted else (0,), x.dtype, x.device)


def _constants(
    kernel: str, x: Tensor, samples: int, tokens: int, parts: tuple[Tensor | None, ...],
    configuration: Mapping[str, int] | None,
) -> dict[str, int]:  # fmt: skip
    """How the rows lie in a program: their pieces, how many at a time, on how many warps."""
    width = x.shape[-1]
    if configuration is None:
        flags = {f"part{at}": part is not None for at, part in enumerate(parts)}
        where = tables.bucket(x.dtype, {"rows": samples * tokens, "width": width, **flags})
        configuration = tables.best_configuration(x.device, kernel, where) or CONFIGURATIONS[kernel][0]
    first, second = pieces(width)
    held = jit.next_power_of_2(first + second)
    configuration = dict(configuration)
    values, warps = configuration.pop("VALUES"), configuration.pop("num_warps")
    rows = min(max(1, values // (first + second)), jit.next_power_of_2(tokens))
    rows = jit.next_power_of_2(rows + 1) // 2  # down to a power of two
    warps *= max(1, held // values)
    return {
        **configuration,
        "WIDTH": width,
        "FIRST": first,
        "SECOND": second,
        "ROWS": rows,
        "num_warps": warps,
        "maxnreg": min(
            255, 65536 // (32 * warps)
        ),  # no bound: without one ptxas spills a value to save a few registers
    }


def pieces(width: int) -> tuple[int, int]:
    """Two powers of two (the second may be 0) that hold a row: 1152 = 1024 + 128, 3072 = 2048 + 1024."""
    whole = jit.next_power_of_2(width)
    if whole == width or width < 512:
        return whole, 0
    rest = max(16, jit.next_power_of_2(width - whole // 2))
    return (whole // 2, rest) if rest < whole // 2 else (whole, 0)


@functools.cache
def chunks_of(samples: int, tokens: int, multiprocessors: int) -> int:
    """Into how many chunks a sample's rows are cut: those that end first, if a round of programs ends together."""
    at_a_time = _PROGRAMS * multiprocessors
    most = max(1, min(tokens // 16, at_a_time))
    return min(range(1, most + 1), key=lambda n: (jit.cdiv(samples * n, at_a_time) * (jit.cdiv(tokens, n) + _START), n))
