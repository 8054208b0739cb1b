"""Attention's forward in Triton: online softmax over key blocks, in base 2, with float32 statistics.

Two kernels make the same result. ``_attention_forward``: a program per block of queries, keys and values streamed through
shared memory. ``_attention_forward_resident``: a program per (sequence, head) that loads all keys and values once and
keeps them in shared memory for all its queries. q, k and v are read in place and the output is written once; beside it
the base-2 logarithm of each row's sum of powers, ``lse (B, H, Tq)`` float32, is kept for the backward (+inf where a row
has no keys: all its weights are then 0 there).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longskip.kernels import jit
from longskip.kernels.attention_tiles_triton import (
    LOG2_E,
    Call,
    Choice,
    Choices,
    add_product,
    at_head,
    at_statistics,
    attended,
    blocks,
    chosen,
    contract,
    every,
    kept,
    nothing,
    put,
    scaled,
    span,
    suitable,
    tile,
)  # fmt: skip

_STREAMED: Choices = {
    (2, 64, 90): (blocks(128, 64, 8, 3), blocks(128, 64, 4, 3), blocks(128, 128, 8, 2), blocks(64, 64, 4, 2)),
    (2, 64, 80): (blocks(128, 64, 8, 3), blocks(128, 128, 8, 2), blocks(64, 64, 4, 2)),
    (2, 128, 80): (blocks(128, 64, 8, 3), blocks(128, 64, 8, 2)),
    (2, 256, 90): (blocks(128, 32, 8, 2), blocks(64, 32, 8, 2)),
    (2, 256, 80): (blocks(64, 32, 8, 2),),
    (4, 64, 80): (blocks(32, 32, 8, 1),),
    (4, 256, 80): (blocks(16, 16, 4, 1),),
}
_RESIDENT: Choices = {
    (2, 32, 90): (blocks(64, 64, 4, 1), blocks(128, 64, 8, 1)),
    (2, 48, 90): (blocks(128, 64, 8, 1),),
    (2, 64, 90): (blocks(64, 64, 4, 1), blocks(128, 64, 8, 1), blocks(128, 64, 8, 2)),
}
CONFIGURATIONS = {"_attention_forward": every(_STREAMED), "_attention_forward_resident": every(_RESIDENT)}
LONGEST_RESIDENT = 512


@triton.jit
def _online(q, k, v, sums, top, total, valid, factor, CHECK: tl.constexpr, POSITIVE: tl.constexpr):
    """One block of keys: (weighted sums of v, the row's largest exponent, its sum of powers) with it added."""
    scores = contract(q, k)
    if POSITIVE:
        slope = factor
    else:
        scores *= factor
        slope = 1.0
    if CHECK:
        scores = tl.where(valid[None, :], scores, float("-inf"))
    highest = tl.maximum(top, tl.max(scores, 1) * slope)
    shift = tl.where(highest == float("-inf"), 0.0, highest)  # nothing attended yet: -inf less -inf is NaN
    weights = tl.exp2(scores * slope - shift[:, None])
    keep = tl.exp2(top - shift)
    total = total * keep + tl.sum(weights, 1)
    return add_product(scaled(sums, keep[:, None]), weights, v), highest, total


@triton.jit
def _finish(
    out, lse, sums, top, total, some, start, length, of_token,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Divide by the row's sum and store; ``some``: whether the sequence has a key to attend to."""
    total = tl.where(some, total, 1.0)
    result = kept(scaled(sums, (1.0 / total)[:, None]), some)
    put(out, result, start, length, of_token, HEAD_DIM, D0, D1, BLOCK_Q, 1)
    rows = start + tl.arange(0, BLOCK_Q)
    tl.store(lse + rows, tl.where(some, top + tl.log2(total), float("inf")), mask=rows < length)


@triton.jit
def _attention_forward(
    q, k, v, mask, out, lse, offsets_q, offsets_k, heads, queries, keys,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, factor, count,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, POSITIVE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (sequence, head, block of queries), blocks next to each other: they share keys in the cache."""
    program = tl.program_id(0)
    start = program % count * BLOCK_Q
    head = program // count % heads
    sequence = program // count // heads
    first_q, length_q = span(sequence, offsets_q, queries)
    first_k, length_k = span(sequence, offsets_k, keys)
    if start >= length_q:
        return
    q = at_head(q, sequence, head, first_q, offsets_q, q_batch, q_token, q_head, UNIT)
    k = at_head(k, sequence, head, first_k, offsets_k, k_batch, k_token, k_head, UNIT)
    v = at_head(v, sequence, head, first_k, offsets_k, v_batch, v_token, v_head, UNIT)
    if mask is not None:
        mask += tl.cast(sequence, tl.int64) * keys
    queries_of_block = tile(q, start, length_q, q_token, HEAD_DIM, D0, D1, BLOCK_Q, UNIT)
    sums = nothing(D0, D1, BLOCK_Q)
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    if mask is None:
        some = length_k > 0
        unchecked = length_k // BLOCK_K * BLOCK_K  # blocks without an end need no comparison
        for at in range(0, unchecked, BLOCK_K):
            k_block = tile(k, at, length_k, k_token, HEAD_DIM, D0, D1, BLOCK_K, UNIT)
            v_block = tile(v, at, length_k, v_token, HEAD_DIM, D0, D1, BLOCK_K, UNIT)
            sums, top, total = _online(
                queries_of_block, k_block, v_block, sums, top, total, None, factor, False, POSITIVE
            )
    else:
        some = length_k < 0
        unchecked = 0
    for at in range(unchecked, length_k, BLOCK_K):
        valid = attended(mask, at, length_k, BLOCK_K)
        some = some | (tl.max(valid.to(tl.int32), 0) > 0)
        k_block = tile(k, at, length_k, k_token, HEAD_DIM, D0, D1, BLOCK_K, UNIT)
        v_block = tile(v, at, length_k, v_token, HEAD_DIM, D0, D1, BLOCK_K, UNIT)
        sums, top, total = _online(queries_of_block, k_block, v_block, sums, top, total, valid, factor, True, POSITIVE)
    out += (first_q * heads + head) * HEAD_DIM
    lse = at_statistics(lse, sequence, head, first_q, offsets_q, heads, queries)
    _finish(out, lse, sums, top, total, some, start, length_q, heads * HEAD_DIM, HEAD_DIM, D0, D1, BLOCK_Q)


@triton.jit
def _attention_forward_resident(
    q, k, v, out, lse, heads, queries, keys,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, factor,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, POSITIVE: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (sequence, head): ``BLOCKS`` blocks of keys and values, loaded before the loop over the queries."""
    program = tl.program_id(0)
    head = program % heads
    sequence = program // heads
    first, _ = span(sequence, None, queries)
    q = at_head(q, sequence, head, first, None, q_batch, q_token, q_head, UNIT)
    k = at_head(k, sequence, head, first, None, k_batch, k_token, k_head, UNIT)
    v = at_head(v, sequence, head, first, None, v_batch, v_token, v_head, UNIT)
    out += (first * heads + head) * HEAD_DIM
    lse = at_statistics(lse, sequence, head, first, None, heads, queries)
    k_blocks = ()
    v_blocks = ()
    for at in tl.static_range(BLOCKS):
        k_blocks = k_blocks + (tile(k, at * BLOCK_K, keys, k_token, HEAD_DIM, D0, D1, BLOCK_K, UNIT),)  # type: ignore[assignment]
        v_blocks = v_blocks + (tile(v, at * BLOCK_K, keys, v_token, HEAD_DIM, D0, D1, BLOCK_K, UNIT),)  # type: ignore[assignment]
    last = attended(None, (BLOCKS - 1) * BLOCK_K, keys, BLOCK_K)
    for start in range(0, queries, BLOCK_Q):
        queries_of_block = tile(q, start, queries, q_token, HEAD_DIM, D0, D1, BLOCK_Q, UNIT)
        sums = nothing(D0, D1, BLOCK_Q)
        top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_Q,), tl.float32)
        for at in tl.static_range(BLOCKS):
            sums, top, total = _online(
                queries_of_block, k_blocks[at], v_blocks[at], sums, top, total, last, factor, at == BLOCKS - 1, POSITIVE
            )
        _finish(out, lse, sums, top, total, True, start, queries, heads * HEAD_DIM, HEAD_DIM, D0, D1, BLOCK_Q)


def resident(call: Call) -> bool:
    """Whether the resident kernel serves the call: a batch of short sequences with narrow heads, and enough of them.

    Its operands must stay in shared memory: so by wgmma only (compute capability 9.x). On 8.x they pass through
    registers, which do not hold them; on 10.x the unrolled scores do not fit into tensor memory. Masks and offsets would
    take it past the registers.
    """
    target = jit.target_of(call.q.device)
    plain = call.mask is None and call.offsets is None and call.longest[1] > 0
    short = plain and max(call.longest) <= LONGEST_RESIDENT and call.programs >= target.multiprocessors
    return short and target.capability // 10 == 9 and bool(suitable(_RESIDENT, call))


def forward(call: Call, configuration: Choice | None = None) -> tuple[Tensor, Tensor]:
    """(output ``(B, Tq, H, Dh)``, lse)."""
    out = jit.empty(call.q.shape, call.q.dtype, call.q.device)
    lse = jit.empty(call.lse_shape(), torch.float32, call.q.device)
    strides, unit = call.strides()
    factor = call.scale * LOG2_E
    fixed = {**call.shape(), "UNIT": unit, "POSITIVE": call.scale > 0}
    inputs = (call.q, call.k, call.v)
    if resident(call):
        constants = chosen("_attention_forward_resident", call, _RESIDENT, configuration)
        count = jit.cdiv(call.longest[1], constants["BLOCK_K"])
        jit.launch(
            _attention_forward_resident, (call.programs,), *inputs, out, lse, *call.spans()[2:], *strides, factor,
            BLOCKS=count, **fixed, **constants,
        )  # fmt: skip
        return out, lse
    constants = chosen("_attention_forward", call, _STREAMED, configuration)
    count = jit.cdiv(call.longest[0], constants["BLOCK_Q"])
    jit.launch(
        _attention_forward, (call.programs * count,), *inputs, call.mask, out, lse, *call.spans(), *strides, factor, count,
        **fixed, **constants,
    )  # fmt: skip
    return out, lse
