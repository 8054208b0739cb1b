"""What attention's forward and backward kernels share: a call as they see it, and its tiles in Triton.

A head dim that is no power of two is cut into two chunks of columns (72 = 64 + 8 of 16): a tile is a tuple of one or two
blocks, and a product over the head dim is one or two ``tl.dot``. Padding to the next power of two would take 128 for 72.

Strides are handed over in units of ``UNIT`` values (8 where all of them are multiples of it), so that the compiler knows
16-byte loads to be aligned for head dims like 72, which are no multiples of 16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from longskip.kernels import jit, tables
from longskip.kernels.formulas import attention_chunks

LOG2_E = 1.4426950408889634

Choice = Mapping[str, Any]
# (bytes per value, head dim up to, compute capability from) -> constants that suit such calls, the default first. The first
# key that fits the call counts. In the interpreter, which counts blocks and not bytes, those of 2 bytes serve float32 too.
Choices = Mapping[tuple[int, int, int], tuple[Choice, ...]]


def blocks(queries: int, keys: int, warps: int, stages: int) -> dict[str, Any]:
    """Constants of a kernel."""
    return {"BLOCK_Q": queries, "BLOCK_K": keys, "num_warps": warps, "num_stages": stages}


@dataclass(frozen=True)
class Call:
    """One call on the device: q ``(B, Tq, H, Dh)``, k and v ``(B, Tk, H, Dh)`` with any strides but 1 on the last axis.

    ``mask (B, Tk)`` uint8 or None. Of variable length: B = 1, and ``offsets`` are the first tokens of the sequences of q
    and of k, with one past the end. ``longest`` are the most queries and keys of a sequence.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    offsets: tuple[Tensor, Tensor] | None
    longest: tuple[int, int]
    scale: float

    @property
    def sequences(self) -> int:
        return self.q.shape[0] if self.offsets is None else self.offsets[0].numel() - 1

    @property
    def heads(self) -> int:
        return self.q.shape[2]

    @property
    def head_dim(self) -> int:
        return self.q.shape[3]

    @property
    def programs(self) -> int:
        """One per sequence and head."""
        return self.sequences * self.heads

    def spans(self) -> tuple[Tensor | None, Tensor | None, int, int, int]:
        """Kernel arguments: the offsets, the heads, the queries and the keys."""
        first, second = self.offsets if self.offsets is not None else (None, None)
        return first, second, self.heads, self.q.shape[1], self.k.shape[1]

    def strides(self, *others: Tensor) -> tuple[list[int], int]:
        """(batch, token and head strides of q, k, v and ``others`` in units, the unit)."""
        found = [stride for tensor in (self.q, self.k, self.v, *others) for stride in tensor.stride()[:3]]
        unit = 8 if all(stride % 8 == 0 for stride in found) else 1
        return [stride // unit for stride in found], unit

    def shape(self) -> dict[str, int]:
        """The constants that say how wide a tile is."""
        first, second = attention_chunks(self.head_dim)
        return {"HEAD_DIM": self.head_dim, "D0": first, "D1": second}

    def lse_shape(self) -> tuple[int, ...]:
        batch, queries, heads, _ = self.q.shape
        return (batch, heads, queries)


def suitable(choices: Choices, call: Call) -> tuple[Choice, ...]:
    """The constants for the call's dtype, head dim and device; empty where there are none."""
    size = 2 if jit.INTERPRETED else call.q.element_size()
    capability = jit.target_of(call.q.device).capability
    for (each, widest, since), constants in choices.items():
        if each == size and call.head_dim <= widest and capability >= since:
            return constants
    return ()


def chosen(kernel: str, call: Call, choices: Choices, configuration: Choice | None) -> dict[str, Any]:
    """The constants of a kernel: those given, those measured best where they suit such a call, or the default."""
    if configuration is not None:
        return dict(configuration)
    sizes = {"queries": call.longest[0], "keys": call.longest[1], "heads": call.heads, "head_dim": call.head_dim}
    sizes |= {name: 1 for name, there in (("masked", call.mask), ("varlen", call.offsets)) if there is not None}
    found = tables.best_configuration(call.q.device, kernel, tables.bucket(call.q.dtype, sizes))
    allowed = suitable(choices, call)
    return dict(found if found is not None and (found in allowed or jit.INTERPRETED) else allowed[0])


def every(choices: Choices) -> tuple[dict[str, Any], ...]:
    """All constants, each once."""
    found: list[dict[str, Any]] = []
    for some in choices.values():
        found += [dict(constants) for constants in some if constants not in found]
    return tuple(found)


@triton.jit
def span(sequence, offsets, length):
    """(first token, tokens) of a sequence: in a packed tensor by its offsets, in a batch of equal ones by its number."""
    if offsets is None:
        return tl.cast(sequence, tl.int64) * length, length
    else:
        first = tl.load(offsets + sequence).to(tl.int64)
        return first, (tl.load(offsets + sequence + 1) - first).to(tl.int32)


@triton.jit
def at_head(tensor, sequence, head, first, offsets, of_batch, of_token, of_head, UNIT: tl.constexpr):
    """Pointer to the sequence's first token of one head."""
    step = tl.cast(head, tl.int64) * of_head
    if offsets is None:
        step += tl.cast(sequence, tl.int64) * of_batch
    else:
        step += first * of_token
    return tensor + step * UNIT


@triton.jit
def at_statistics(tensor, sequence, head, first, offsets, heads, queries):
    """Pointer to the sequence's first query in a ``(B, H, Tq)`` tensor."""
    if offsets is None:
        return tensor + (tl.cast(sequence, tl.int64) * heads + head) * queries
    else:
        return tensor + tl.cast(head, tl.int64) * queries + first


@triton.jit
def tile(
    tensor, start, length, stride,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Rows start.. of a ``(length, Dh)`` matrix, 0 past its end."""
    rows = tl.arange(0, ROWS)[:, None]
    inside = start + rows < length
    at = tensor + tl.cast(start, tl.int64) * stride * UNIT + rows * stride * UNIT
    left = tl.load(at + tl.arange(0, D0)[None, :], mask=inside, other=0.0)
    if D1 == 0:
        return (left,)
    else:
        columns = D0 + tl.arange(0, D1)[None, :]
        return (left, tl.load(at + columns, mask=inside & (columns < HEAD_DIM), other=0.0))


@triton.jit
def put(
    tensor, values, start, length, stride,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Store a tile; rows past ``length`` are left out."""
    rows = tl.arange(0, ROWS)[:, None]
    inside = start + rows < length
    at = tensor + tl.cast(start, tl.int64) * stride * UNIT + rows * stride * UNIT
    tl.store(at + tl.arange(0, D0)[None, :], values[0].to(tensor.dtype.element_ty), mask=inside)
    if D1 > 0:
        columns = D0 + tl.arange(0, D1)[None, :]
        tl.store(at + columns, values[1].to(tensor.dtype.element_ty), mask=inside & (columns < HEAD_DIM))


@triton.jit
def nothing(D0: tl.constexpr, D1: tl.constexpr, ROWS: tl.constexpr):
    """A float32 tile of zeros."""
    left = tl.zeros((ROWS, D0), tl.float32)
    if D1 == 0:
        return (left,)
    else:
        return (left, tl.zeros((ROWS, D1), tl.float32))


@triton.jit
def scaled(values, factor):
    """A tile times a number, or times one per row."""
    if len(values) == 1:
        return (values[0] * factor,)
    else:
        return (values[0] * factor, values[1] * factor)


@triton.jit
def added(a, b):
    """The sum of two tiles."""
    if len(a) == 1:
        return (a[0] + b[0],)
    else:
        return (a[0] + b[0], a[1] + b[1])


@triton.jit
def kept(values, condition):
    """A tile where the condition holds, else 0, whatever its values are."""
    if len(values) == 1:
        return (tl.where(condition, values[0], 0.0),)
    else:
        return (tl.where(condition, values[0], 0.0), tl.where(condition, values[1], 0.0))


@triton.jit
def contract(a, b):
    """a bᵀ over the head dim, in float32."""
    total = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if len(a) == 2:
        total = tl.dot(a[1], tl.trans(b[1]), total, input_precision="ieee")
    return total


@triton.jit
def add_product(total, weights, b):
    """total + weights b, the weights rounded to b's dtype."""
    weights = weights.to(b[0].dtype)
    left = tl.dot(weights, b[0], total[0], input_precision="ieee")
    if len(b) == 1:
        return (left,)
    else:
        return (left, tl.dot(weights, b[1], total[1], input_precision="ieee"))


@triton.jit
def attended(mask, start, length, BLOCK: tl.constexpr):
    """Which of the keys start.. exist and are attended to."""
    keys = start + tl.arange(0, BLOCK)
    valid = keys < length
    if mask is not None:
        valid = valid & (tl.load(mask + keys, mask=valid, other=0) != 0)
    return valid
