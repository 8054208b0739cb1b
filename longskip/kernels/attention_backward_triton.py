"""Attention's backward in Triton: weights recomputed from q, k and the saved ``lse``; no atomics, a fixed order of sums.

Short sequences of narrow heads: one kernel with five products. A program owns a (sequence, head): for each block of keys,
whose gradients stay in registers, it passes over the queries and adds their gradients to float32 sums of its own, which a
last pass writes out. The programs are as many as run at once and take head after head, so that these sums stay in the
cache.

All others: ``delta``, the row sums of dO * O, then a kernel per block of keys (four products: dK and dV) and one per block
of queries (three: dQ).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    added,
    at_head,
    at_statistics,
    attended,
    blocks,
    chosen,
    contract,
    every,
    nothing,
    put,
    scaled,
    span,
    tile,
)  # fmt: skip

_SHORT: Choices = {
    (2, 64, 100): (blocks(64, 64, 8, 1),),
    (2, 48, 90): (blocks(64, 64, 8, 2), blocks(64, 64, 8, 1)),
    (2, 64, 90): (blocks(64, 64, 8, 2), blocks(64, 64, 8, 1)),
    (2, 48, 80): (blocks(32, 32, 8, 1),),
    (2, 64, 80): (blocks(32, 32, 8, 1),),
    (4, 64, 80): (blocks(16, 32, 4, 1),),
}
# Two stages of loads and the offsets' arithmetic are more than the registers hold.
_SHORT_VARLEN: Choices = {**_SHORT, (2, 64, 90): (blocks(64, 64, 8, 1), blocks(64, 64, 8, 2))}
if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7):  # it takes more registers for the same
    _SHORT = {
        **_SHORT_VARLEN,
        (2, 48, 90): (blocks(64, 64, 8, 1), blocks(64, 64, 8, 2)),
        (2, 64, 80): (blocks(32, 32, 8, 2), blocks(32, 32, 8, 1)),
    }
    _SHORT_VARLEN = _SHORT
_KEYS: Choices = {
    (2, 64, 80): (blocks(64, 128, 8, 2),),
    (2, 128, 90): (blocks(64, 64, 8, 2),),
    (2, 128, 80): (blocks(32, 64, 8, 2),),
    (2, 160, 90): (blocks(32, 64, 8, 1),),
    (2, 160, 80): (blocks(16, 64, 8, 2),),
    (2, 256, 100): (blocks(32, 64, 8, 1),),
    (2, 256, 90): (blocks(16, 64, 8, 2),),
    (2, 256, 80): (blocks(32, 64, 8, 1),),
    (4, 256, 80): (blocks(16, 16, 8, 1),),
}
_QUERIES: Choices = {
    (2, 128, 80): (blocks(128, 64, 8, 2),),
    (2, 256, 90): (blocks(64, 32, 8, 2),),
    (2, 160, 80): (blocks(64, 32, 8, 2),),
    (2, 256, 80): (blocks(64, 32, 8, 1),),
    (4, 256, 80): (blocks(16, 16, 8, 1),),
}
_DELTA: dict[str, Any] = {"BLOCK_Q": 64, "num_warps": 4}
CONFIGURATIONS = {
    "_attention_backward_short": every(_SHORT),
    "_attention_backward_keys": every(_KEYS),
    "_attention_backward_queries": every(_QUERIES),
    "_attention_delta": (_DELTA,),
}
LONGEST_SHORT = 512
WIDEST_SHORT = 64  # wider heads do not fit into the registers of the kernel that makes all three gradients
PROGRAMS_PER_MULTIPROCESSOR = 2


@triton.jit
def _slopes(rows, columns, row_values, column_values, lse, delta, valid, factor, CHECK: tl.constexpr):
    """(weights, gradients of the scores) of a block: rows and columns are keys and queries, or queries and keys.

    ``lse`` and ``delta`` are broadcast along the keys, ``valid`` along the queries.
    """
    weights = tl.exp2(contract(rows, columns) * factor - lse)
    if CHECK:
        weights = tl.where(valid, weights, 0.0)
    slopes = weights * (contract(row_values, column_values) - delta)
    if CHECK:
        slopes = tl.where(valid, slopes, 0.0)  # 0 also where 0 times a NaN of dO came in
    return weights, slopes


@triton.jit
def _row_sums(
    out,
    grad,
    start,
    length,
    of_token,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Sums of dO * O over the head dim."""
    o = tile(out, start, length, of_token, HEAD_DIM, D0, D1, BLOCK_Q, 1)
    g = tile(grad, start, length, of_token, HEAD_DIM, D0, D1, BLOCK_Q, 1)
    total = tl.sum(o[0].to(tl.float32) * g[0].to(tl.float32), 1)
    if D1 > 0:
        total += tl.sum(o[1].to(tl.float32) * g[1].to(tl.float32), 1)
    return total


@triton.jit
def _attention_delta(
    out, grad, delta, offsets_q, offsets_k, heads, queries, keys, count,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Program (sequence, head, block of queries): ``delta (B, H, Tq)``."""
    program = tl.program_id(0)
    start = program % count * BLOCK_Q
    head = program // count % heads
    sequence = program // count // heads
    first, length = span(sequence, offsets_q, queries)
    if start >= length:
        return
    place = (first * heads + head) * HEAD_DIM
    total = _row_sums(out + place, grad + place, start, length, heads * HEAD_DIM, HEAD_DIM, D0, D1, BLOCK_Q)
    rows = start + tl.arange(0, BLOCK_Q)
    delta = at_statistics(delta, sequence, head, first, offsets_q, heads, queries)
    tl.store(delta + rows, total, mask=rows < length)


@triton.jit
def _attention_backward_short(
    q, k, v, mask, lse, out, grad, dq, dk, dv, partial, delta, offsets_q, offsets_k, heads, queries, keys,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, dq_token, dk_token,
    programs, rows_of_program, scale, factor,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program p: the (sequence, head) pairs p, p + programs, ...; ``partial (programs, rows, Dh)`` and ``delta`` are its own.

    Keys are compared with the end also where blocks have none: without the comparison the compiler takes more registers.
    """
    partial += tl.program_id(0).to(tl.int64) * rows_of_program * HEAD_DIM
    delta += tl.program_id(0).to(tl.int64) * rows_of_program
    for pair in range(tl.program_id(0), programs, tl.num_programs(0)):
        head = pair % heads
        sequence = pair // heads
        first_q, length_q = span(sequence, offsets_q, queries)
        first_k, length_k = span(sequence, offsets_k, keys)
        q_at = at_head(q, sequence, head, first_q, offsets_q, q_batch, q_token, q_head, UNIT)
        k_at = at_head(k, sequence, head, first_k, offsets_k, k_batch, k_token, k_head, UNIT)
        v_at = at_head(v, sequence, head, first_k, offsets_k, v_batch, v_token, v_head, UNIT)
        place = (first_q * heads + head) * HEAD_DIM
        lse_at = at_statistics(lse, sequence, head, first_q, offsets_q, heads, queries)
        dq_at = dq + first_q * dq_token * UNIT + head * HEAD_DIM
        mask_at = mask
        if mask is not None:
            mask_at += tl.cast(sequence, tl.int64) * keys
        for start in range(0, length_q, BLOCK_Q):
            rows = start + tl.arange(0, BLOCK_Q)
            sums = _row_sums(out + place, grad + place, start, length_q, heads * HEAD_DIM, HEAD_DIM, D0, D1, BLOCK_Q)
            tl.store(delta + rows, sums, mask=rows < length_q)
        tl.debug_barrier()
        for at in range(0, length_k, BLOCK_K):
            k_block = tile(k_at, at, length_k, k_token, HEAD_DIM, D0, D1, BLOCK_K, UNIT)
            v_block = tile(v_at, at, length_k, v_token, HEAD_DIM, D0, D1, BLOCK_K, UNIT)
            valid = attended(mask_at, at, length_k, BLOCK_K)[:, None]
            of_keys = nothing(D0, D1, BLOCK_K)
            of_values = nothing(D0, D1, BLOCK_K)
            earlier = tl.where(at > 0, length_q, 0)  # rows of sums that exist already
            for start in range(0, length_q, BLOCK_Q):
                rows = start + tl.arange(0, BLOCK_Q)
                q_block = tile(q_at, start, length_q, q_token, HEAD_DIM, D0, D1, BLOCK_Q, UNIT)
                g_block = tile(grad + place, start, length_q, heads * HEAD_DIM, HEAD_DIM, D0, D1, BLOCK_Q, 1)
                lse_rows = tl.load(lse_at + rows, mask=rows < length_q, other=float("inf"))
                delta_rows = tl.load(delta + rows, mask=rows < length_q, other=0.0)
                weights, slopes = _slopes(
                    k_block, q_block, v_block, g_block, lse_rows[None, :], delta_rows[None, :], valid, factor, True
                )
                of_values = add_product(of_values, weights, g_block)
                of_keys = add_product(of_keys, slopes, q_block)
                of_queries = add_product(nothing(D0, D1, BLOCK_Q), tl.trans(slopes.to(q.dtype.element_ty)), k_block)
                before = tile(partial, start, earlier, HEAD_DIM, HEAD_DIM, D0, D1, BLOCK_Q, 1)
                put(partial, added(before, of_queries), start, length_q, HEAD_DIM, HEAD_DIM, D0, D1, BLOCK_Q, 1)
            of_head = first_k * dk_token * UNIT + head * HEAD_DIM
            put(dk + of_head, scaled(of_keys, scale), at, length_k, dk_token, HEAD_DIM, D0, D1, BLOCK_K, UNIT)
            put(dv + of_head, of_values, at, length_k, dk_token, HEAD_DIM, D0, D1, BLOCK_K, UNIT)
            tl.debug_barrier()  # the next pass reads sums that other threads stored
        summed = tl.where(length_k > 0, length_q, 0)
        for start in range(0, length_q, BLOCK_Q):
            of_queries = scaled(tile(partial, start, summed, HEAD_DIM, HEAD_DIM, D0, D1, BLOCK_Q, 1), scale)
            put(dq_at, of_queries, start, length_q, dq_token, HEAD_DIM, D0, D1, BLOCK_Q, UNIT)
        tl.debug_barrier()


@triton.jit
def _attention_backward_keys(
    q, k, v, mask, lse, grad, dk, dv, delta, offsets_q, offsets_k, heads, queries, keys,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, dk_token, scale, factor, count,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (sequence, head, block of keys). Keys past the end have gradients that are not stored: only masks count."""
    program = tl.program_id(0)
    at = program % count * BLOCK_K
    head = program // count % heads
    sequence = program // count // heads
    first_q, length_q = span(sequence, offsets_q, queries)
    first_k, length_k = span(sequence, offsets_k, keys)
    if at >= length_k:
        return
    q = at_head(q, sequence, head, first_q, offsets_q, q_batch, q_token, q_head, UNIT)
    k = at_head(k, sequence, head, first_k, offsets_k, k_batch, k_token, k_head, UNIT)
    v = at_head(v, sequence, head, first_k, offsets_k, v_batch, v_token, v_head, UNIT)
    grad += (first_q * heads + head) * HEAD_DIM
    lse = at_statistics(lse, sequence, head, first_q, offsets_q, heads, queries)
    delta = at_statistics(delta, sequence, head, first_q, offsets_q, heads, queries)
    if mask is not None:
        mask += tl.cast(sequence, tl.int64) * keys
    k_block = tile(k, at, length_k, k_token, HEAD_DIM, D0, D1, BLOCK_K, UNIT)
    v_block = tile(v, at, length_k, v_token, HEAD_DIM, D0, D1, BLOCK_K, UNIT)
    valid = attended(mask, at, length_k, BLOCK_K)[:, None]
    of_keys = nothing(D0, D1, BLOCK_K)
    of_values = nothing(D0, D1, BLOCK_K)
    for start in range(0, length_q, BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q)
        q_block = tile(q, start, length_q, q_token, HEAD_DIM, D0, D1, BLOCK_Q, UNIT)
        g_block = tile(grad, start, length_q, heads * HEAD_DIM, HEAD_DIM, D0, D1, BLOCK_Q, 1)
        lse_rows = tl.load(lse + rows, mask=rows < length_q, other=float("inf"))
        delta_rows = tl.load(delta + rows, mask=rows < length_q, other=0.0)
        weights, slopes = _slopes(
            k_block, q_block, v_block, g_block, lse_rows[None, :], delta_rows[None, :], valid, factor, mask is not None
        )
        of_values = add_product(of_values, weights, g_block)
        of_keys = add_product(of_keys, slopes, q_block)
    of_head = first_k * dk_token * UNIT + head * HEAD_DIM
    put(dk + of_head, scaled(of_keys, scale), at, length_k, dk_token, HEAD_DIM, D0, D1, BLOCK_K, UNIT)
    put(dv + of_head, of_values, at, length_k, dk_token, HEAD_DIM, D0, D1, BLOCK_K, UNIT)


@triton.jit
def _attention_backward_queries(
    q, k, v, mask, lse, grad, dq, delta, offsets_q, offsets_k, heads, queries, keys,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, dq_token, scale, factor, count,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (sequence, head, block of queries)."""
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
    grad += (first_q * heads + head) * HEAD_DIM
    rows = start + tl.arange(0, BLOCK_Q)
    lse = at_statistics(lse, sequence, head, first_q, offsets_q, heads, queries)
    delta = at_statistics(delta, sequence, head, first_q, offsets_q, heads, queries)
    lse_rows = tl.load(lse + rows, mask=rows < length_q, other=float("inf"))[:, None]
    delta_rows = tl.load(delta + rows, mask=rows < length_q, other=0.0)[:, None]
    if mask is not None:
        mask += tl.cast(sequence, tl.int64) * keys
    q_block = tile(q, start, length_q, q_token, HEAD_DIM, D0, D1, BLOCK_Q, UNIT)
    g_block = tile(grad, start, length_q, heads * HEAD_DIM, HEAD_DIM, D0, D1, BLOCK_Q, 1)
    of_queries = nothing(D0, D1, BLOCK_Q)
    unchecked = 0
    if mask is None:
        unchecked = length_k // BLOCK_K * BLOCK_K  # blocks without an end need no comparison
        for at in range(0, unchecked, BLOCK_K):
            k_block = tile(k, at, length_k, k_token, HEAD_DIM, D0, D1, BLOCK_K, UNIT)
            v_block = tile(v, at, length_k, v_token, HEAD_DIM, D0, D1, BLOCK_K, UNIT)
            _, slopes = _slopes(q_block, k_block, g_block, v_block, lse_rows, delta_rows, None, factor, False)
            of_queries = add_product(of_queries, slopes, k_block)
    for at in range(unchecked, length_k, BLOCK_K):
        valid = attended(mask, at, length_k, BLOCK_K)[None, :]
        k_block = tile(k, at, length_k, k_token, HEAD_DIM, D0, D1, BLOCK_K, UNIT)
        v_block = tile(v, at, length_k, v_token, HEAD_DIM, D0, D1, BLOCK_K, UNIT)
        _, slopes = _slopes(q_block, k_block, g_block, v_block, lse_rows, delta_rows, valid, factor, True)
        of_queries = add_product(of_queries, slopes, k_block)
    dq += first_q * dq_token * UNIT + head * HEAD_DIM
    put(dq, scaled(of_queries, scale), start, length_q, dq_token, HEAD_DIM, D0, D1, BLOCK_Q, UNIT)


def is_short(longest: tuple[int, int], head_dim: int) -> bool:
    """Whether one kernel with five products makes all three gradients."""
    return max(longest) <= LONGEST_SHORT and head_dim <= WIDEST_SHORT


def backward(
    call: Call, out: Tensor, lse: Tensor, grad: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    configurations: Mapping[str, Choice] | None = None,
) -> None:  # fmt: skip
    """Write the gradients into dq, dk and dv, whose heads lie next to each other: a token's stride is a tensor's own."""
    given = configurations or {}
    # The queries' and the keys' gradients have the strides of a token; batches and heads follow from them.
    strides, unit = call.strides(dq, dk)
    strides, of_query, of_key = strides[:9], strides[10], strides[13]
    fixed = {**call.shape(), "UNIT": unit}
    scale, factor = call.scale, call.scale * LOG2_E
    inputs = (call.q, call.k, call.v, call.mask, lse)
    device = call.q.device
    if is_short(call.longest, call.head_dim):
        choices = _SHORT if call.offsets is None else _SHORT_VARLEN
        constants = chosen("_attention_backward_short", call, choices, given.get("_attention_backward_short"))
        programs = min(call.programs, PROGRAMS_PER_MULTIPROCESSOR * jit.target_of(device).multiprocessors)
        rows = call.longest[0]
        partial = jit.empty((programs, rows, call.head_dim), torch.float32, device)
        delta = jit.empty((programs, rows), torch.float32, device)
        jit.launch(
            _attention_backward_short, (programs,), *inputs, out, grad, dq, dk, dv, partial, delta, *call.spans(),
            *strides, of_query, of_key, call.programs, rows, scale, factor, **fixed, **constants,
        )  # fmt: skip
        return
    delta = jit.empty(lse.shape, torch.float32, device)
    constants = dict(given.get("_attention_delta", _DELTA))
    count = jit.cdiv(call.longest[0], constants["BLOCK_Q"])
    grid = (call.programs * count,)
    jit.launch(_attention_delta, grid, out, grad, delta, *call.spans(), count, **call.shape(), **constants)
    constants = chosen("_attention_backward_keys", call, _KEYS, given.get("_attention_backward_keys"))
    count = jit.cdiv(call.longest[1], constants["BLOCK_K"])
    jit.launch(
        _attention_backward_keys, (call.programs * count,), *inputs, grad, dk, dv, delta, *call.spans(),
        *strides, of_key, scale, factor, count, **fixed, **constants,
    )  # fmt: skip
    constants = chosen("_attention_backward_queries", call, _QUERIES, given.get("_attention_backward_queries"))
    count = jit.cdiv(call.longest[0], constants["BLOCK_Q"])
    jit.launch(
        _attention_backward_queries, (call.programs * count,), *inputs, grad, dq, delta, *call.spans(),
        *strides, of_query, scale, factor, count, **fixed, **constants,
    )  # fmt: skip
