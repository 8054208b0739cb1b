"""Several streams served as one in fixed shares, without a state: which stream step k takes, and the how-manieth of it.

Two streams with the shares p and 1 − p: after m steps the first has served ⌊mp + ½⌋. More streams are split in two
again and again, along the Huffman tree of their weights (Huffman, "A method for the construction of
minimum-redundancy codes", Proc. IRE 1952), so that a step is found in as many integer divisions as its leaf is deep.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike

from longskip.errors import DataError

_FAST = 1 << 31  # up to this denominator 2·r·share fits 64 bits

Weight = int | float | Fraction


@dataclass(frozen=True)
class _Fork:
    """Of every ``whole`` steps the left side takes ``share``, 0 < share < whole, without a common divisor."""

    left: _Fork | int
    right: _Fork | int
    share: int
    whole: int

    def taken(self, steps: int) -> int:
        """How many of the first ``steps`` go left: ⌊steps·share/whole + ½⌋."""
        return (2 * steps * self.share + self.whole) // (2 * self.whole)

    def split(self, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(``taken`` of each step, whether it goes left itself)."""
        if self.whole > _FAST:
            steps = steps.astype(object)  # Python's integers
        doubled = 2 * self.share * (steps % self.whole) + self.whole
        taken = steps // self.whole * self.share + doubled // (2 * self.whole)
        left = doubled % (2 * self.whole) >= 2 * (self.whole - self.share)
        return taken.astype(np.int64), left.astype(bool)


class Interleave:
    """Steps 0, 1, 2, … shared out over streams by ``weights`` (relative, above 0; floats mean their shortest decimal).

    After k steps the count c of a stream with the share w satisfies |c − kw| < 1.68, whatever the weights and however
    many streams there are, and ≤ ½ where there are two. (Each fork on the way to a leaf adds at most ½ to the error of
    its node, and what came from above shrinks by the fork's share. In a Huffman tree a node's weight is at least that
    of its child and grandchild together, so the errors add up to less than ½·Σ 1/F_i over the Fibonacci numbers.) All
    arithmetic is of integers: there is no drift, and every machine finds the same.

    Raises ``DataError`` for no weight and for weights that are not above 0.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        exact = [_exact(weight) for weight in weights]
        if not exact:
            raise DataError("no weights; at least one stream is needed")
        scale = math.lcm(*(weight.denominator for weight in exact))
        whole = [int(weight * scale) for weight in exact]
        divisor = math.gcd(*whole)
        self.weights = tuple(weight // divisor for weight in whole)
        """The same weights as integers without a common divisor."""
        self._root = _tree(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def at(self, steps: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """(streams, indices in them) of steps from 0 on, int64 and shaped as ``steps``."""
        asked = np.asarray(steps, dtype=np.int64)
        flat = asked.reshape(-1)
        if flat.size and flat.min() < 0:
            raise ValueError(f"step {flat.min()}; steps count from 0")
        streams, indices = np.empty_like(flat), np.empty_like(flat)
        pending: list[tuple[_Fork | int, np.ndarray, np.ndarray]] = [(self._root, np.arange(flat.size), flat)]
        while pending:
            node, where, inside = pending.pop()
            if not where.size:
                continue
            if isinstance(node, int):
                streams[where], indices[where] = node, inside
                continue
            taken, left = node.split(inside)
            pending.append((node.left, where[left], taken[left]))
            pending.append((node.right, where[~left], (inside - taken)[~left]))
        return streams.reshape(asked.shape), indices.reshape(asked.shape)

    def counts(self, steps: int) -> tuple[int, ...]:
        """How many of the first ``steps`` each stream takes."""
        out = [0] * len(self)
        pending: list[tuple[_Fork | int, int]] = [(self._root, steps)]
        while pending:
            node, inside = pending.pop()
            if isinstance(node, int):
                out[node] = inside
                continue
            taken = node.taken(inside)
            pending += [(node.left, taken), (node.right, inside - taken)]
        return tuple(out)


def _exact(weight: Weight) -> Fraction:
    try:
        exact = Fraction(str(weight)) if isinstance(weight, float) else Fraction(weight)
    except (ValueError, TypeError) as error:
        raise DataError(f"weight {weight!r}; it must be a number above 0") from error
    if exact <= 0:
        raise DataError(f"weight {weight!r}; it must be a number above 0")
    return exact


def _tree(weights: Sequence[int]) -> _Fork | int:
    """The Huffman tree of the streams; equal weights are taken in the order of the streams."""
    heap: list[tuple[int, int, _Fork | int]] = [(weight, i, i) for i, weight in enumerate(weights)]
    heapq.heapify(heap)
    for made in range(len(weights), 2 * len(weights) - 1):
        small, _, right = heapq.heappop(heap)
        large, _, left = heapq.heappop(heap)
        divisor = math.gcd(small, large)
        fork = _Fork(left, right, large // divisor, (small + large) // divisor)
        heapq.heappush(heap, (small + large, made, fork))
    return heap[0][2]
