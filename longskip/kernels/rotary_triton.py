"""Normalisation and rotation of queries and keys as one Triton launch per direction.

q and k may be views of packed ``(B, T, 3, H, Dh)``: they are read by their strides, once, and written once. A program
takes a tile of (token, head) rows of one sample; q's programs come first, then k's. The backward reads q, k and the two
cotangents, turns the rotation back, makes the rows' statistics again and goes through the norm; a program goes through a
fixed chunk of tiles and keeps float32 sums of its weight's gradient, which are added in order: same call, same bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from longskip.errors import BackendError
from longskip.kernels import jit, library, rows_triton, tables
from longskip.kernels.backends import register
from longskip.kernels.rows_triton import reciprocal_deviation

MAX_HEAD_DIM = 512

# VALUES: values of q or k that a program holds at a time. The first is the default.
CONFIGURATIONS: dict[str, tuple[dict[str, int], ...]] = {
    "rotary_forward": (
        {"VALUES": 4096, "num_warps": 4},
        {"VALUES": 2048, "num_warps": 4},
        {"VALUES": 8192, "num_warps": 8},
    ),
    "rotary_backward": (
        {"VALUES": 2048, "num_warps": 4},
        {"VALUES": 4096, "num_warps": 8},
        {"VALUES": 1024, "num_warps": 4},
    ),
}
_RMS, _LAYER = 1, 2
_NORMS = {None: 0, "rms": _RMS, "layer": _LAYER}


@triton.jit
def _mask(inside, DIM: tl.constexpr, BLOCK: tl.constexpr):
    return inside[:, None] & (tl.arange(0, BLOCK) < DIM)[None, :]


@triton.jit
def _load(pointer, where, inside, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """(ROWS, BLOCK) float32: rows of DIM values that start at ``where``; 0 outside."""
    at = pointer + where[:, None] + tl.arange(0, BLOCK)[None, :]
    return tl.load(at, mask=_mask(inside, DIM, BLOCK), other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, values, where, inside, DIM: tl.constexpr, BLOCK: tl.constexpr):
    at = pointer + where[:, None] + tl.arange(0, BLOCK)[None, :]
    tl.store(at, values.to(pointer.dtype.element_ty), mask=_mask(inside, DIM, BLOCK))


@triton.jit
def _turned(x, cos, sin, token, inside, BACK: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Neighbouring pairs turned by their token's angles, or back."""
    where = token.to(tl.int64) * (DIM // 2)
    c = _load(cos, where, inside, DIM // 2, BLOCK // 2)
    s = _load(sin, where, inside, DIM // 2, BLOCK // 2)
    if BACK:
        s = -s
    a, b = tl.split(tl.reshape(x, (x.shape[0], BLOCK // 2, 2)))
    return tl.reshape(tl.join(a * c - b * s, a * s + b * c), (x.shape[0], BLOCK))


@triton.jit
def _standard(x, eps, EXACT: tl.constexpr, LAYER: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """x less its mean (layer norm), and the reciprocal deviation (ROWS, 1) of its rows."""
    if LAYER:
        x = tl.where((tl.arange(0, BLOCK) < DIM)[None, :], x - (tl.sum(x, 1) / DIM)[:, None], 0.0)
    return x, reciprocal_deviation(tl.sum(x * x, 1), eps, DIM, EXACT)[:, None]


@triton.jit
def _weight(pointer, DIM: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    return tl.load(pointer + at, mask=at < DIM, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _forward_tile(
    x, weight, cos, sin, out, program, tokens, of_sample, of_token, of_head, eps,
    HEADS: tl.constexpr, RMS: tl.constexpr, LAYER: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(tokens * HEADS, ROWS)
    sample = (program // tiles).to(tl.int64)
    row = program % tiles * ROWS + tl.arange(0, ROWS)
    inside = row < tokens * HEADS
    token = row // HEADS
    where = sample * of_sample + token.to(tl.int64) * of_token + (row % HEADS).to(tl.int64) * of_head
    values = _load(x, where, inside, DIM, BLOCK)
    if RMS or LAYER:
        values, scale = _standard(values, eps, out.dtype.element_ty == tl.float32, LAYER, DIM, BLOCK)
        values *= scale
        if weight is not None:
            values *= _weight(weight, DIM, BLOCK)
    if cos is not None:
        values = _turned(values, cos, sin, token, inside, False, DIM, BLOCK)
    _store(out, values, (sample * tokens * HEADS + row) * DIM, inside, DIM, BLOCK)


@triton.jit
def _rotary_forward(
    q, k, q_weight, k_weight, cos, sin, q_out, k_out, q_programs, q_tokens, k_tokens,
    q_sample, q_token, q_head, k_sample, k_token, k_head, eps,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, RMS: tl.constexpr, LAYER: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < q_programs:
        _forward_tile(
            q, q_weight, cos, sin, q_out, program, q_tokens, q_sample, q_token, q_head, eps,
            Q_HEADS, RMS, LAYER, DIM, BLOCK, ROWS,
        )  # fmt: skip
    else:
        _forward_tile(
            k, k_weight, cos, sin, k_out, program - q_programs, k_tokens, k_sample, k_token, k_head, eps,
            K_HEADS, RMS, LAYER, DIM, BLOCK, ROWS,
        )  # fmt: skip


@triton.jit
def _backward_chunk(
    x, upper, weight, cos, sin, dx, partial, program, chunks, per, tokens, of_sample, of_token, of_head, eps,
    HEADS: tl.constexpr, RMS: tl.constexpr, LAYER: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``per`` rows of x's gradient from ``upper``, and the sum of upper * x̂ over them, which is the weight's."""
    sample = (program // chunks).to(tl.int64)
    if weight is not None:
        w = _weight(weight, DIM, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, per, ROWS):
        row = program % chunks * per + start + tl.arange(0, ROWS)
        inside = row < tokens * HEADS
        token = row // HEADS
        packed = (sample * tokens * HEADS + row) * DIM
        slope = _load(upper, packed, inside, DIM, BLOCK)
        if RMS or LAYER:
            where = sample * of_sample + token.to(tl.int64) * of_token + (row % HEADS).to(tl.int64) * of_head
            values = _load(x, where, inside, DIM, BLOCK)
        if cos is not None:
            slope = _turned(slope, cos, sin, token, inside, True, DIM, BLOCK)
        if RMS or LAYER:
            values, scale = _standard(values, eps, dx.dtype.element_ty == tl.float32, LAYER, DIM, BLOCK)
            if partial is not None:
                # Rows outside are zeros, whose x̂ is not a number where eps is 0.
                total += tl.where(inside[:, None], slope * scale * values, 0.0)
            if weight is not None:
                slope *= w
            along = (tl.sum(slope * (values * scale), 1) / DIM)[:, None] * scale
            across = tl.zeros((ROWS, 1), tl.float32)
            if LAYER:
                across = (tl.sum(slope, 1) / DIM)[:, None]
            slope = scale * (slope - across - values * along)
        _store(dx, slope, packed, inside, DIM, BLOCK)
    if partial is not None:
        at = tl.arange(0, BLOCK)
        tl.store(partial + program.to(tl.int64) * DIM + at, tl.sum(total, 0), mask=at < DIM)


@triton.jit
def _rotary_backward(
    q, k, q_upper, k_upper, q_weight, k_weight, cos, sin, dq, dk, q_partial, k_partial, q_programs,
    q_chunks, k_chunks, q_per, k_per, q_tokens, k_tokens, q_sample, q_token, q_head, k_sample, k_token, k_head, eps,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, RMS: tl.constexpr, LAYER: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < q_programs:
        if q_upper is not None:
            _backward_chunk(
                q, q_upper, q_weight, cos, sin, dq, q_partial, program, q_chunks, q_per, q_tokens,
                q_sample, q_token, q_head, eps, Q_HEADS, RMS, LAYER, DIM, BLOCK, ROWS,
            )  # fmt: skip
    elif k_upper is not None:
        _backward_chunk(
            k, k_upper, k_weight, cos, sin, dk, k_partial, program - q_programs, k_chunks, k_per, k_tokens,
            k_sample, k_token, k_head, eps, K_HEADS, RMS, LAYER, DIM, BLOCK, ROWS,
        )  # fmt: skip


def forward(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str | None,
    eps: float,
    configuration: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """q and k normed and rotated, contiguous; arguments as ``qk_norm_rotary`` takes them."""
    q, k = _rowwise(q), _rowwise(k)
    small = [t if t is None else t.contiguous() for t in (q_weight, k_weight, cos, sin)]
    out = [jit.empty(x.shape, x.dtype, x.device) for x in (q, k)]
    constants = _constants("rotary_forward", q, k, norm, cos, configuration)
    programs = [x.shape[0] * jit.cdiv(x.shape[1] * x.shape[2], constants["ROWS"]) for x in (q, k)]
    jit.launch(
        _rotary_forward, (sum(programs),),
        q, k, *small, *out, programs[0], q.shape[1], k.shape[1],
        *q.stride()[:3], *k.stride()[:3], eps, **constants,
    )  # fmt: skip
    return out[0], out[1]


def backward(
    q: Tensor,
    k: Tensor,
    q_upper: Tensor | None,
    k_upper: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str | None,
    eps: float,
    configuration: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(dq, dk, dq_weight, dk_weight)``; empty where a cotangent (``…_upper``) or a weight is None."""
    inputs, uppers, weights = (_rowwise(q), _rowwise(k)), (q_upper, k_upper), (q_weight, k_weight)
    constants = _constants("rotary_backward", q, k, norm, cos, configuration)
    multiprocessors = jit.target_of(q.device).multiprocessors
    slopes, gradients, partials, chunks, per, programs = [], [], [], [], [], []
    for x, upper, weight in zip(inputs, uppers, weights, strict=True):
        asked = upper is not None and weight is not None
        tiles = jit.cdiv(x.shape[1] * x.shape[2], constants["ROWS"])
        # Without a weight there is nothing to sum up: a program per tile.
        chunks.append(rows_triton.chunks_of(x.shape[0], tiles, multiprocessors) if asked else tiles)
        per.append(jit.cdiv(tiles, max(1, chunks[-1])) * constants["ROWS"])
        programs.append(x.shape[0] * chunks[-1] if upper is not None else 0)
        slopes.append(jit.empty(x.shape if upper is not None else (0,), x.dtype, x.device))
        gradients.append(
            jit.empty(weight.shape, weight.dtype, x.device)
            if asked and weight is not None
            else jit.empty((0,), x.dtype, x.device)
        )
        partials.append(jit.empty((1, programs[-1], 1, x.shape[3]), torch.float32, x.device) if asked else None)
    jit.launch(
        _rotary_backward, (sum(programs),),
        *inputs, *(t if t is None else t.contiguous() for t in (*uppers, *weights, cos, sin)),
        *slopes, *partials, programs[0], *chunks, *per, q.shape[1], k.shape[1],
        *(stride for x in inputs for stride in x.stride()[:3]), eps, **constants,
    )  # fmt: skip
    for partial, gradient in zip(partials, gradients, strict=True):
        if partial is not None:
            rows_triton.add_up(partial, [gradient])
    return slopes[0], slopes[1], gradients[0], gradients[1]


def _rowwise(x: Tensor) -> Tensor:
    """The tensor, copied only where a head's values are not neighbours."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _constants(
    kernel: str, q: Tensor, k: Tensor, norm: str | None, cos: Tensor | None, configuration: Mapping[str, int] | None
) -> dict[str, int]:
    """How the rows lie in a program."""
    batch, tokens, heads, head_dim = q.shape
    if configuration is None:
        sizes = {"rows": batch * tokens * heads, "head_dim": head_dim, "norm": _NORMS[norm], "rotate": cos is not None}
        where = tables.bucket(q.dtype, sizes)
        configuration = tables.best_configuration(q.device, kernel, where) or CONFIGURATIONS[kernel][0]
    configuration = dict(configuration)
    block = max(2, jit.next_power_of_2(head_dim))
    most = jit.next_power_of_2(max(x.shape[1] * x.shape[2] for x in (q, k)))
    return {
        "ROWS": min(max(1, configuration.pop("VALUES") // block), most),
        **configuration,
        "Q_HEADS": heads,
        "K_HEADS": k.shape[2],
        "RMS": norm == "rms",
        "LAYER": norm == "layer",
        "DIM": head_dim,
        "BLOCK": block,
        "maxnreg": min(255, 65536 // (32 * configuration["num_warps"])),
    }


def _fake_forward(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    norm: str | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _forward(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    norm: str | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return forward(q, k, q_weight, k_weight, cos, sin, norm, eps)


def _backward(
    q: Tensor, k: Tensor, q_upper: Tensor | None, k_upper: Tensor | None, q_weight: Tensor | None,
    k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, norm: str | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return backward(q, k, q_upper, k_upper, q_weight, k_weight, cos, sin, norm, eps)


def _fake_backward(
    q: Tensor, k: Tensor, q_upper: Tensor | None, k_upper: Tensor | None, q_weight: Tensor | None,
    k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, norm: str | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        rows_triton.fake_like(q, q_upper is not None, q),
        rows_triton.fake_like(k, k_upper is not None, k),
        rows_triton.fake_like(q_weight, q_upper is not None, q),
        rows_triton.fake_like(k_weight, k_upper is not None, k),
    )


forward_op = library.custom("qk_norm_rotary", _forward, _fake_forward)
backward_op = library.custom("qk_norm_rotary_backward", _backward, _fake_backward)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.norm, ctx.eps = inputs
    if ctx.norm is None:
        tensors[:2] = None, None  # a rotation's gradient does not need them
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, q_upper, k_upper):  # type: ignore[no-untyped-def]
    if q_upper is None and k_upper is None:
        return (None,) * 8
    q, k, *rest = ctx.saved_tensors
    if ctx.norm is None:  # not read: anything of the shape of what is asked for
        q, k = (
            (q_upper, k_upper)
            if q_upper is not None and k_upper is not None
            else (q_upper if k_upper is None else k_upper,) * 2
        )
    found = backward_op(q, k, q_upper, k_upper, *rest, ctx.norm, ctx.eps)
    asked = (q_upper is not None, k_upper is not None) * 2
    gradients = (g if a and n else None for g, a, n in zip(found, asked, ctx.needs_input_grad, strict=False))
    return *gradients, None, None, None, None


library.differentiable(forward_op, backward_op, _differentiate, _save)


def unfit(dtype: torch.dtype, sizes: Mapping[str, int]) -> str | None:
    """Why a call of these sizes cannot be served; None where it can."""
    if sizes.get("head_dim", 1) > MAX_HEAD_DIM:
        return f"its kernels take head dims up to {MAX_HEAD_DIM}, not {sizes['head_dim']}"
    return jit.unfit_dtype(dtype)


@register("qk_norm_rotary", "triton", unusable=jit.unusable, unfit=unfit)
def qk_norm_rotary_triton(
    q: Tensor,
    k: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    norm: str | None = "rms",
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Gradients flow to q, k and the weights; BackendError where cos or sin asks for one."""
    library.plain("qk_norm_rotary", q, k, q_weight, k_weight, cos, sin)
    if torch.is_grad_enabled() and any(table is not None and table.requires_grad for table in (cos, sin)):
        raise BackendError(
            "qk_norm_rotary by triton gives no gradient to cos or sin", cure='use kernels.use("reference") or "torch"'
        )
    if norm is None and cos is None:
        return q, k
    out: tuple[Tensor, Tensor] = forward_op(q, k, q_weight, k_weight, cos, sin, norm, eps)
    return out
