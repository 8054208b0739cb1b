"""The plan: which samples make which global batch, in constant memory and whatever the ranks and workers.

Positions p = 0, 1, 2, … run through the epochs: position p is the sample π_e(p mod n) of epoch e = p // n, where π_e is
a keyed permutation of [0, n). Global batch k holds the positions [kB, (k+1)B), so a remainder carries over into the
next epoch and every sample comes once per epoch.

π_e is a generalised Feistel network on Z_a × Z_b with a·b slightly above n (Black and Rogaway, "Ciphers with arbitrary
finite domains", CT-RSA 2002, method 3) followed by cycle walking for the few values past n.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from longskip.errors import ConfigError, DataError

ROUNDS = 8
MAX_SAMPLES = 1 << 48


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> np.ndarray:
    text = b"%d,%d" % (seed, epoch)
    digest = hashlib.blake2b(text, digest_size=8 * ROUNDS, person=b"longskip plan").digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _mix(value: np.ndarray, key: np.uint64) -> np.ndarray:
    """The SplitMix64 finaliser of value + key: 64 well-mixed bits per element."""
    z = value + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permute(values: ArrayLike, n: int, seed: int, epoch: int) -> np.ndarray:
    """π_epoch of ``values``, an integer array in [0, n); returns int64 of the same shape. A bijection of [0, n)."""
    if not 0 < n <= MAX_SAMPLES:
        raise DataError(f"{n} samples; a plan takes 1 to {MAX_SAMPLES}")
    out = np.asarray(values).astype(np.uint64)
    if out.size and int(out.max()) >= n:
        raise ValueError(f"value {int(out.max())} is not below n = {n}")
    flat = out.reshape(-1)
    keys = _round_keys(int(seed), int(epoch))
    side = math.isqrt(n - 1) + 1
    a, b = np.array(side, np.uint64), np.array(-(-n // side), np.uint64)
    walking = np.arange(flat.size)
    current = flat.copy()
    while walking.size:  # the domain a·b is below n + √n + 1, so a second turn is rare
        left: np.ndarray = current % a
        right: np.ndarray = current // a
        for i in range(0, ROUNDS, 2):
            left = (left + _mix(right, keys[i]) % a) % a
            right = (right + _mix(left, keys[i + 1]) % b) % b
        current = right * a + left
        inside = current < np.uint64(n)
        flat[walking[inside]] = current[inside]
        walking, current = walking[~inside], current[~inside]
    return flat.reshape(out.shape).astype(np.int64)


@dataclass(frozen=True)
class Cursor:
    """A place in the stream of positions: the next one, and the half-open intervals that are never served.

    ``skipped`` is kept sorted, merged and disjoint. ``n_samples`` (0 = unknown) gives ``epoch`` its meaning; a reader
    and ``Plan.cursor`` fill it in. Immutable: ``advance`` and ``skip`` return a new cursor.
    """

    position: int = 0
    skipped: tuple[tuple[int, int], ...] = ()
    n_samples: int = 0

    def __post_init__(self) -> None:
        for name, value in (("position", self.position), ("n_samples", self.n_samples)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise DataError(f"cursor {name} is {value!r}; it must be an integer of 0 or more")
        object.__setattr__(self, "skipped", _merged(self.skipped))

    @property
    def epoch(self) -> int:
        """The epoch of the next position that is served."""
        if not self.n_samples:
            raise DataError("the cursor has no sample count, so no epoch", cure="make it with Plan.cursor(position)")
        return self.settled().position // self.n_samples

    def settled(self) -> Cursor:
        """This cursor with a position outside every skipped interval."""
        position = self.position
        for start, stop in self.skipped:
            if start <= position < stop:
                position = stop
        return self if position == self.position else Cursor(position, self.skipped, self.n_samples)

    def take(self, count: int) -> tuple[np.ndarray, Cursor]:
        """The next ``count`` served positions as int64, and the cursor after them."""
        pieces = []
        position, missing = self.position, count
        ahead = [interval for interval in self.skipped if interval[1] > position]
        while missing:
            if ahead and ahead[0][0] <= position:
                position = ahead.pop(0)[1]
                continue
            end = position + missing if not ahead else min(position + missing, ahead[0][0])
            pieces.append(np.arange(position, end, dtype=np.int64))
            missing -= end - position
            position = end
        taken = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
        return taken, Cursor(position, self.skipped, self.n_samples)

    def advance(self, count: int) -> Cursor:
        """The cursor after ``count`` more served positions."""
        return self.take(count)[1]

    def skip(self, interval: tuple[int, int]) -> Cursor:
        """This cursor with the positions [start, stop) never served again. Raises ``DataError`` for a bad interval."""
        return Cursor(self.position, (*self.skipped, interval), self.n_samples)

    def to_json(self) -> dict[str, Any]:
        """``{"position", "skipped", "samples", "epoch"?}``; the epoch is there for people, position decides."""
        out: dict[str, Any] = {"position": self.position, "skipped": [list(pair) for pair in self.skipped]}
        out["samples"] = self.n_samples
        if self.n_samples:
            out["epoch"] = self.epoch
        return out

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Cursor:
        """The inverse of ``to_json``. Raises ``DataError`` for anything else."""
        try:
            pairs = tuple((pair[0], pair[1]) for pair in data["skipped"])
            return cls(data["position"], pairs, data.get("samples", 0))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise DataError(f"not a cursor: {data!r}") from error


def _merged(intervals: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    out: list[tuple[int, int]] = []
    for interval in intervals:
        if len(interval) != 2 or any(isinstance(end, bool) or not isinstance(end, int) for end in interval):
            raise DataError(f"skipped interval {interval!r}; it must be two integers [start, stop)")
        if not 0 <= interval[0] < interval[1]:
            raise DataError(f"skipped interval {interval!r}; it must satisfy 0 <= start < stop")
    for start, stop in sorted(tuple(interval) for interval in intervals):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], stop))
        else:
            out.append((start, stop))
    return tuple(out)


@dataclass(frozen=True)
class Plan:
    """Global batches of ``batch`` samples out of ``n_samples``; see the module's text.

    Raises ``DataError`` where the data hold fewer samples than one batch.
    """

    n_samples: int
    batch: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise DataError(f"global batch {self.batch}; it must be 1 or more")
        if not 0 < self.n_samples <= MAX_SAMPLES:
            raise DataError(f"{self.n_samples} samples; a plan takes 1 to {MAX_SAMPLES}")
        if self.n_samples < self.batch:
            raise DataError(
                f"the data hold {self.n_samples} samples, fewer than the global batch of {self.batch}",
                cure=f"set train.batch_size to {self.n_samples} or less, or add data",
            )

    def cursor(self, position: int = 0) -> Cursor:
        """A cursor of this plan at ``position``."""
        return Cursor(position, (), self.n_samples)

    def batch_cursor(self, k: int) -> Cursor:
        """The cursor at which global batch ``k`` starts when nothing is skipped."""
        return self.cursor(k * self.batch)

    def lookup(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, samples), both int64 and shaped as ``positions``."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, within = np.divmod(positions, self.n_samples)
        samples = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            samples[chosen] = permute(within[chosen], self.n_samples, self.seed, int(epoch))
        return epochs, samples

    def batch_at(self, at: int | Cursor) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, samples), each ``(batch,)``, of global batch number ``at`` or of the one that starts at a cursor."""
        cursor = at if isinstance(at, Cursor) else self.batch_cursor(at)
        return self.lookup(cursor.take(self.batch)[0])

    def slots(
        self, at: int | Cursor, rank: int, world: int, micro: int, accumulation: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """This rank's micro-batches of a global batch: ``accumulation`` pairs (epochs, samples) of ``(micro,)``.

        In micro-step j, rank r takes the slots [(j·world + r)·micro, …+micro). Raises ``ConfigError`` where
        micro × accumulation × world is not the global batch.
        """
        if not 0 <= rank < world:
            raise ConfigError(f"rank {rank} of {world}; it must lie in [0, {world})")
        if micro < 1 or accumulation < 1 or micro * accumulation * world != self.batch:
            raise ConfigError(
                f"micro-batch {micro} x accumulation {accumulation} x world {world} = "
                f"{micro * accumulation * world}, but the global batch is {self.batch}",
                cure="give two of the three and let the third be derived",
            )
        epochs, samples = self.batch_at(at)
        starts = [(j * world + rank) * micro for j in range(accumulation)]
        return [(epochs[s : s + micro], samples[s : s + micro]) for s in starts]
