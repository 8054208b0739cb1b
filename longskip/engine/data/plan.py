"""The plan: which samples make which global batch, in constant memory and whatever the ranks and workers.

Positions p = 0, 1, 2, … run through the epochs: position p is the sample π_e(p mod n) of epoch e = p // n, where π_e is
a keyed permutation of [0, n). Global batch k holds the positions [kB, (k+1)B), so a remainder carries over into the
next epoch and every sample comes once per epoch.

Data sets that are mixed by weight, and aspect buckets, are streams with epochs of their own: a *lane* per bucket, in it
a *stream* per data set. Where there are several lanes every global batch is of one of them, an ``Interleave`` says of
which; another one says which stream a place of a lane belongs to. So nothing is carried along here either, and each
stream's remainders go over into its own next epoch.

π_e is a generalised Feistel network on Z_a × Z_b with a·b slightly above n (Black and Rogaway, "Ciphers with arbitrary
finite domains", CT-RSA 2002, method 3) followed by cycle walking for the few values past n.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from longskip.engine.data.interleave import Interleave, Weight
from longskip.errors import ConfigError, DataError, UnfitDataError

ROUNDS = 8
MAX_SAMPLES = 1 << 48
MAX_POSITION = 1 << 62


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
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_POSITION:
                raise DataError(f"cursor {name} is {str(value)[:80]}; it must be an integer from 0 to {MAX_POSITION}")
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
            raise DataError(f"not a cursor: {str(data)[:200]}") from error


def _merged(intervals: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    out: list[tuple[int, int]] = []
    for interval in intervals:
        if len(interval) != 2 or any(isinstance(end, bool) or not isinstance(end, int) for end in interval):
            raise DataError(f"skipped interval {interval!r}; it must be two integers [start, stop)")
        if not 0 <= interval[0] < interval[1] <= MAX_POSITION:
            raise DataError(
                f"skipped interval {str(interval)[:80]}; it must satisfy 0 <= start < stop <= {MAX_POSITION}"
            )
    for start, stop in sorted(tuple(interval) for interval in intervals):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], stop))
        else:
            out.append((start, stop))
    return tuple(out)


class Order(Protocol):
    """In which order the samples of a stream come in each of its epochs; they are numbered from 0 within the stream."""

    def __len__(self) -> int: ...

    def lookup(self, epoch: int, within: np.ndarray) -> np.ndarray:
        """The samples at the places ``within`` of an epoch, int64 of the same shape: a bijection of [0, len)."""
        ...


@dataclass(frozen=True)
class Shuffled:
    """The keyed permutation of all samples (``data.shuffle: full``)."""

    n_samples: int
    seed: int = 0

    def __len__(self) -> int:
        return self.n_samples

    def lookup(self, epoch: int, within: np.ndarray) -> np.ndarray:
        """π_epoch, as ``permute``."""
        return permute(within, self.n_samples, self.seed, epoch)


@dataclass(frozen=True)
class Stream:
    """Samples with epochs of their own: a data set, or what of it is in one bucket.

    ``numbers`` turns the order's samples into those of the source; None where they are the same. ``name`` is the data
    set's.
    """

    order: Order
    name: str = "data"
    numbers: Callable[[np.ndarray], np.ndarray] | None = None

    def lookup(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, samples) of places in the endless stream, both int64 and shaped as ``places``."""
        epochs, within = np.divmod(places, len(self.order))
        samples = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            samples[chosen] = self.order.lookup(int(epoch), within[chosen])
        return epochs, samples if self.numbers is None else self.numbers(samples)


@dataclass(frozen=True)
class Lane:
    """Streams that share batches by their ``weights``: those of one ``bucket`` (H, W) in pixels, or all (None).

    ``weight`` is the lane's share of the batches. Weights are relative.
    """

    streams: tuple[Stream, ...]
    weights: tuple[Weight, ...] = (1,)
    weight: Weight = 1
    bucket: tuple[int, int] | None = None

    @property
    def n_samples(self) -> int:
        return sum(len(stream.order) for stream in self.streams)

    @cached_property
    def interleave(self) -> Interleave:
        """Which stream a place belongs to."""
        return Interleave(self.weights)

    def lookup(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, samples) of places in the lane; epochs are those of the streams."""
        if len(self.streams) == 1:
            return self.streams[0].lookup(places)
        of, inside = self.interleave.at(places)
        return _gather(self.streams, of, inside)


def _gather(
    parts: tuple[Stream, ...] | tuple[Lane, ...], of: np.ndarray, at: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """``lookup`` of each place ``at`` in the part that it is ``of``."""
    epochs, samples = np.empty_like(at), np.empty_like(at)
    for part in np.unique(of):
        chosen = of == part
        epochs[chosen], samples[chosen] = parts[int(part)].lookup(at[chosen])
    return epochs, samples


@dataclass(frozen=True)
class Plan:
    """Global batches of ``batch`` samples out of ``n_samples``; see the module's text.

    Without ``lanes`` all samples are one stream in a keyed permutation; ``streams.plan_of`` makes those of a source.
    Raises ``DataError`` where the data, or a lane, hold fewer samples than one batch.
    """

    n_samples: int
    batch: int
    seed: int = 0
    lanes: tuple[Lane, ...] = ()

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise DataError(f"global batch {self.batch}; it must be 1 or more")
        if not 0 < self.n_samples <= MAX_SAMPLES:
            raise DataError(f"{self.n_samples} samples; a plan takes 1 to {MAX_SAMPLES}")
        lanes = self.lanes or (Lane((Stream(Shuffled(self.n_samples, self.seed)),)),)
        object.__setattr__(self, "lanes", lanes)
        for lane in lanes:
            if lane.n_samples < self.batch:
                where = f"the bucket {lane.bucket[0]}x{lane.bucket[1]} holds" if lane.bucket else "the data hold"
                raise UnfitDataError(
                    f"{where} {lane.n_samples} samples, fewer than the global batch of {self.batch}",
                    cure=f"set train.batch_size to {lane.n_samples} or less, or add data",
                )

    @property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """The aspect buckets (H, W) in pixels; none where all samples share one resolution."""
        return tuple(lane.bucket for lane in self.lanes if lane.bucket is not None)

    @cached_property
    def interleave(self) -> Interleave:
        """Which lane a global batch is of."""
        return Interleave([lane.weight for lane in self.lanes])

    def cursor(self, position: int = 0) -> Cursor:
        """A cursor of this plan at ``position``."""
        return Cursor(position, (), self.n_samples)

    def batch_cursor(self, k: int) -> Cursor:
        """The cursor at which global batch ``k`` starts when nothing is skipped."""
        return self.cursor(k * self.batch)

    def check(self, cursor: Cursor) -> None:
        """Raises ``DataError`` where a batch from this cursor on would be of two buckets."""
        if len(self.lanes) == 1:
            return
        for what, place in [
            ("position", cursor.position),
            *(("skipped", end) for pair in cursor.skipped for end in pair),
        ]:
            if place % self.batch:
                raise DataError(
                    f"the cursor's {what} {place} is inside a global batch of {self.batch}; with buckets every batch is "
                    "of one of them",
                    cure=f"skip whole batches, from and to multiples of {self.batch}; keep train.batch_size",
                )

    def lookup(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, samples), both int64 and shaped as ``positions``; epochs are those of each sample's stream."""
        positions = np.asarray(positions, dtype=np.int64)
        if len(self.lanes) == 1:
            return self.lanes[0].lookup(positions)
        batches, slots = np.divmod(positions, self.batch)
        of, inside = self.interleave.at(batches)
        return _gather(self.lanes, of, inside * self.batch + slots)

    def batch_at(self, at: int | Cursor) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, samples), each ``(batch,)``, of global batch number ``at`` or of the one that starts at a cursor."""
        cursor = at if isinstance(at, Cursor) else self.batch_cursor(at)
        self.check(cursor)
        return self.lookup(cursor.take(self.batch)[0])

    def bucket_at(self, at: int | Cursor) -> tuple[int, int] | None:
        """The bucket (H, W) in pixels of that global batch; None where all samples share one resolution."""
        if len(self.lanes) == 1:
            return self.lanes[0].bucket
        cursor = at if isinstance(at, Cursor) else self.batch_cursor(at)
        self.check(cursor)
        return self.lanes[int(self.interleave.at(cursor.settled().position // self.batch)[0])].bucket

    def passes(self, at: int | Cursor) -> dict[str, float]:
        """How often each data set has been gone through where that global batch starts, by name; skipped ones count."""
        position = at.settled().position if isinstance(at, Cursor) else at * self.batch
        if len(self.lanes) == 1:
            places = [position]
        else:
            places = [count * self.batch for count in self.interleave.counts(position // self.batch)]
        served: dict[str, int] = {}
        samples: dict[str, int] = {}
        for lane, place in zip(self.lanes, places, strict=True):
            for stream, count in zip(lane.streams, lane.interleave.counts(place), strict=True):
                served[stream.name] = served.get(stream.name, 0) + count
                samples[stream.name] = samples.get(stream.name, 0) + len(stream.order)
        return {name: count / samples[name] for name, count in served.items()}

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
