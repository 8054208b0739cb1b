"""Aspect buckets: pictures sorted by their aspect ratio, so that each is cut as little as possible.

Sizes come from the index's tables. These hold a picture's size as it is stored; where EXIF says that it is to be turned
by 90°, which no table knows, it is sorted as stored and cut as seen. (A folder of pictures is read header by header,
EXIF with it.) Stored latents are in the bucket whose size they have.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from longskip.engine.data.index import write_atomically
from longskip.engine.data.npy import MAX_HEADER, header_of
from longskip.engine.data.sources import SizedSource
from longskip.errors import BadSampleError, ConfigError, DataError

Size = tuple[int, int]
"""(H, W) in pixels."""

LEFT_OUT = 255
"""The code of samples that are in no bucket; so there are at most 255 buckets."""

RATIOS = tuple(Fraction(*pair) for pair in ((1, 1), (4, 3), (3, 2), (16, 9), (2, 1)))
"""The usual ratios of the longer side to the shorter one."""

_BLOCK = 1024
_CHUNK = 4096
_CODES, _ABOUT = "buckets.npy", "buckets.json"


def auto_buckets(resolution: Size, multiple: int) -> tuple[Size, ...]:
    """The resolution and ``RATIOS`` either way, sides in multiples of ``multiple`` (patch × factor) pixels.

    No bucket has more pixels than the resolution, and each is the one of its ratio that rounding moves least, so a
    batch costs about the same in any of them. Raises ``ConfigError`` where the resolution's sides are no multiples.
    """
    check_buckets([resolution], multiple)
    area = resolution[0] * resolution[1]
    found = [resolution]
    for ratio in RATIOS:
        for wanted in dict.fromkeys((ratio, 1 / ratio)):
            heights = [side for side in _near(area * wanted, multiple) if side * multiple <= area]
            widths = [side for side in _near(area / wanted, multiple) if side * multiple <= area]
            shapes = [(side, area // (side * multiple) * multiple) for side in heights]
            shapes += [(area // (side * multiple) * multiple, side) for side in widths]
            best = min(shapes, key=lambda size: (max(Fraction(*size) / wanted, wanted / Fraction(*size)), size))
            if all(best[0] * size[1] != best[1] * size[0] for size in found):
                found.append(best)
    return tuple(sorted(found, key=lambda size: Fraction(*size)))


def _near(square: Fraction, multiple: int) -> list[int]:
    """The multiples about √square."""
    below = math.isqrt(int(square)) // multiple * multiple
    return [side for side in (below - multiple, below, below + multiple) if side > 0]


def check_buckets(buckets: Sequence[Size], multiple: int) -> None:
    """Raises ``ConfigError`` for buckets that no model can take, that pictures cannot be sorted into, or too many."""
    if not 0 < len(buckets) <= LEFT_OUT:
        raise ConfigError(f"{len(buckets)} aspect buckets", cure=f"give 1 to {LEFT_OUT}, or data.buckets: off")
    ratios: dict[Fraction, Size] = {}
    for height, width in buckets:
        if height < 1 or width < 1 or height % multiple or width % multiple:
            raise ConfigError(
                f"the bucket {height}x{width} does not divide into patches of {multiple} x {multiple} pixels",
                cure=f"take sides that are multiples of {multiple} (the model's patch times encoders.vae.factor)",
            )
        other = ratios.setdefault(Fraction(height, width), (height, width))
        if other != (height, width) or list(buckets).count(other) > 1:
            raise ConfigError(
                f"the buckets {other[0]}x{other[1]} and {height}x{width} have the same aspect ratio",
                cure="keep one of them: pictures are sorted by their aspect ratio alone",
            )


def resolve_buckets(
    setting: Literal["off", "auto"] | Sequence[Size], resolution: Size, multiple: int
) -> tuple[Size, ...]:
    """The buckets that ``data.buckets`` means; none for ``off``. Raises ``ConfigError`` as ``check_buckets``."""
    if setting == "off":
        return ()
    if setting == "auto":
        return auto_buckets(resolution, multiple)
    buckets = tuple((size[0], size[1]) for size in setting if not isinstance(size, str))
    check_buckets(buckets, multiple)
    return buckets


def nearest(buckets: Sequence[Size], heights: ArrayLike, widths: ArrayLike) -> np.ndarray:
    """Which bucket has the aspect ratio nearest to each picture's, on a logarithmic scale; the wider of equals.

    Heights and widths are 1 or more. Only divisions and square roots are taken, which round alike on all machines.
    """
    order = sorted(range(len(buckets)), key=lambda i: Fraction(*buckets[i]))
    ends = [buckets[i] for i in order]
    borders = [_root(Fraction(a[0] * b[0], a[1] * b[1])) for a, b in pairwise(ends)]
    return np.array(order, dtype=np.int64)[np.searchsorted(borders, np.asarray(heights) / np.asarray(widths))]


def _root(square: Fraction) -> float:
    """√square, rounded once where it is a fraction itself: pictures of just that ratio are then found equal to it."""
    above, below = math.isqrt(square.numerator), math.isqrt(square.denominator)
    if above * above == square.numerator and below * below == square.denominator:
        return above / below
    return math.sqrt(square)


@dataclass(frozen=True)
class BucketCount:
    """One line of the histogram.

    ``cropped``: the mean share of a picture's area that is cut away; ``enlarged``: how many pictures are smaller than
    the bucket (neither is known of stored latents: 0). ``fate``: what became of the bucket. One with fewer samples than
    a batch is ``merged`` into the nearest ones, or ``left out`` where its latents are stored and cannot be cut again.
    """

    height: int
    width: int
    samples: int
    cropped: float = 0.0
    enlarged: int = 0
    fate: Literal["kept", "empty", "merged", "left out"] = "kept"


@dataclass(frozen=True)
class Histogram:
    """What lies in which bucket, for global batches of ``batch`` samples.

    ``unknown``: samples of unreadable size, which stay in the fullest bucket, where the reader counts them as bad.
    ``strange``: stored latents that have the size of no bucket, which are left out.
    """

    rows: tuple[BucketCount, ...]
    batch: int
    unknown: int = 0
    strange: int = 0

    @property
    def served(self) -> int:
        """Samples in buckets, those of unknown size among them."""
        return self.unknown + sum(row.samples for row in self.rows if row.fate == "kept")

    @property
    def left_out(self) -> int:
        """Samples that are never served."""
        return self.strange + sum(row.samples for row in self.rows if row.fate == "left out")

    def to_json(self) -> dict[str, Any]:
        """All fields, ``served`` and ``left_out``."""
        return {**asdict(self), "served": self.served, "left_out": self.left_out}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Histogram:
        """The inverse of ``to_json``."""
        return cls(tuple(BucketCount(**row) for row in data["rows"]), data["batch"], data["unknown"], data["strange"])

    def lines(self) -> list[str]:
        """The histogram for people; its warnings are ``warnings``."""
        most = max(row.samples for row in self.rows)
        out = [f"{self.served:,} samples in aspect buckets (height x width)"]
        for row in self.rows:
            tail = f"cropped {row.cropped:.1%}, enlarged {row.enlarged:,}" if row.fate == "kept" else row.fate
            bar = "#" * math.ceil(24 * row.samples / max(most, 1))
            out.append(f"  {row.height:>5} x {row.width:<5} {row.samples:>13,}  {bar:<24}  {tail}")
        return out

    def warnings(self) -> list[str]:
        """What a user should know before the first step."""
        where = {
            "merged": "put into the nearest buckets",
            "left out": "left out, as stored latents cannot be cut again",
        }
        out = [
            f"the bucket {row.height}x{row.width} has {row.samples:,} samples, fewer than a batch of {self.batch:,}; "
            f"they are {where[row.fate]}"
            for row in self.rows
            if row.fate in where
        ]
        if enlarged := sum(row.enlarged for row in self.rows):
            out.append(f"{enlarged:,} pictures are smaller than their bucket and are enlarged")
        if self.strange:
            out.append(f"{self.strange:,} stored latents have the size of no bucket and are left out")
        if self.unknown:
            out.append(f"the size of {self.unknown:,} samples is not known; they count as bad when they are read")
        return out


class Assignment:
    """The bucket of every sample in one byte each, and where the samples of a bucket lie.

    ``codes`` (n,) uint8 are numbers of ``buckets``, or ``LEFT_OUT``. Beside them there are 4 bytes (8 from 2³² samples
    on) per bucket and 1024 samples, made at the first question.
    """

    def __init__(self, buckets: Sequence[Size], codes: np.ndarray, histogram: Histogram) -> None:
        self.buckets = tuple(buckets)
        self.codes = np.asarray(codes)  # numpy's memmap class is slow to index
        self.histogram = histogram

    def __len__(self) -> int:
        return len(self.codes)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Samples of each bucket."""
        return tuple(int(self._before[b, -1]) for b in range(len(self.buckets)))

    def rank(self, bucket: int, places: ArrayLike) -> np.ndarray:
        """How many of the samples 0 … place − 1 are in the bucket, for places from 0 to n; int64, one axis."""
        places = np.asarray(places, dtype=np.int64)
        out = np.empty_like(places)
        for at in range(0, len(places), _CHUNK):
            blocks, inside = np.divmod(places[at : at + _CHUNK], _BLOCK)
            ours = (self._rows(blocks) == bucket) & (np.arange(_BLOCK) < inside[:, None])
            out[at : at + _CHUNK] = self._before[bucket, blocks] + np.count_nonzero(ours, axis=1)
        return out

    def select(self, bucket: int, ranks: ArrayLike) -> np.ndarray:
        """The samples that are the bucket's number 0, 1, …, at ``ranks``; int64, shaped as ``ranks``."""
        shape, flat = np.shape(ranks), np.asarray(ranks, dtype=np.int64).reshape(-1)
        out = np.empty_like(flat)
        for at in range(0, len(flat), _CHUNK):
            asked = flat[at : at + _CHUNK].astype(self._before.dtype)  # searchsorted would convert the long side
            blocks = np.searchsorted(self._before[bucket], asked, side="right") - 1
            hits = self._rows(blocks) == bucket
            ones = _ones(hits)
            seen = np.cumsum(ones, axis=1, dtype=np.uint16)
            missing = (asked - self._before[bucket, blocks]).astype(np.uint16)
            words = np.count_nonzero(seen <= missing[:, None], axis=1)
            each = np.arange(len(words))
            missing -= seen[each, words] - ones[each, words]
            inside = hits.reshape(len(words), -1, 8)[each, words]
            last = np.count_nonzero(np.cumsum(inside, axis=1) <= missing[:, None], axis=1)
            out[at : at + _CHUNK] = blocks * _BLOCK + words * 8 + last
        return out.reshape(shape)

    @cached_property
    def _whole(self) -> np.ndarray:
        """The whole blocks, (m, 1024); what comes after them is ``_tail``."""
        blocks = len(self.codes) // _BLOCK
        return self.codes[: blocks * _BLOCK].reshape(blocks, _BLOCK)

    @cached_property
    def _tail(self) -> np.ndarray:
        tail = np.full(_BLOCK, LEFT_OUT, dtype=np.uint8)
        rest = self.codes[len(self._whole) * _BLOCK :]
        tail[: len(rest)] = rest
        return tail

    def _rows(self, blocks: np.ndarray) -> np.ndarray:
        whole = blocks < len(self._whole)
        if whole.all():
            return self._whole[blocks]
        rows = np.broadcast_to(self._tail, (len(blocks), _BLOCK)).copy()
        rows[whole] = self._whole[blocks[whole]]
        return rows

    @cached_property
    def _before(self) -> np.ndarray:
        """(buckets, blocks + 1): the bucket's samples before each block."""
        blocks = len(self._whole) + 1
        out = np.zeros((len(self.buckets), blocks + 1), dtype=np.uint32 if len(self) < 1 << 32 else np.int64)
        for at in range(0, blocks, _CHUNK):
            rows = self._rows(np.arange(at, min(at + _CHUNK, blocks)))
            for bucket, counts in enumerate(out):
                # 128 words of eight 0-or-1 bytes add up without a carry from one byte into the next.
                bytewise = (rows == bucket).view(np.uint64).sum(axis=1).view(np.uint8).reshape(len(rows), 8)
                counts[at + 1 : at + 1 + len(rows)] = bytewise.sum(axis=1)
        return np.cumsum(out, axis=1, dtype=out.dtype)

    def save(self, folder: Path, fingerprint: str) -> None:
        """Writes ``buckets.npy`` and ``buckets.json``, so that other ranks and a resume need not read all tables."""
        part = folder / f"{_CODES}.{os.getpid()}.part"
        try:
            with part.open("wb") as stream:
                np.save(stream, self.codes, allow_pickle=False)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(part, folder / _CODES)
        finally:
            part.unlink(missing_ok=True)
        about = {"fingerprint": fingerprint, "samples": len(self), "buckets": self.buckets}
        about["histogram"] = self.histogram.to_json()
        write_atomically(folder / _ABOUT, (json.dumps(about, indent=1) + "\n").encode())

    @classmethod
    def load(cls, folder: Path, fingerprint: str) -> Assignment:
        """What ``save`` wrote, memory-mapped. Raises ``DataError`` where it is not there or of other data."""
        cure = "start a new run, which sorts its data anew"
        try:
            about = json.loads((folder / _ABOUT).read_text("utf-8"))
            codes = _mapped(folder / _CODES)
            buckets = [(int(size[0]), int(size[1])) for size in about["buckets"]]
            histogram = Histogram.from_json(about["histogram"])
            same = about["fingerprint"] == fingerprint and codes.shape == (about["samples"],)
        except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError, BadSampleError) as error:
            raise DataError(f"{folder}: the buckets of the data cannot be read: {error}", cure=cure) from error
        if not same or codes.dtype != np.uint8:
            raise DataError(f"{folder}: the buckets are of other data", cure=cure)
        return cls(buckets, codes, histogram)


def _mapped(path: Path) -> np.ndarray:
    """The array of a ``.npy`` file, memory-mapped; not by ``np.load``, which takes archives and any length of header."""
    with path.open("rb") as stream:
        header = header_of(stream.read(MAX_HEADER))
        if header.size != os.fstat(stream.fileno()).st_size:
            raise ValueError(f"{path.name} has not the {header.size} bytes that its header says")
        return np.memmap(stream, header.dtype, "r", header.offset, header.shape)


def _ones(hits: np.ndarray) -> np.ndarray:
    """(m, 1024) bool → (m, 128) uint16: how many of every eight are set, by one product per eight."""
    return (hits.view(np.uint64) * np.uint64(0x0101010101010101) >> np.uint64(56)).astype(np.uint16)


def stored_sizes(source: SizedSource, factor: int) -> tuple[Size, ...]:
    """The sizes of the stored latents in pixels (× ``factor``), from the tables; unreadable ones do not count.

    Raises ``DataError`` where there are none, or more than 255.
    """
    found: set[Size] = set()
    for sizes in source.sizes(latents=True):
        known = np.unique(sizes[sizes.min(axis=1) > 0], axis=0)
        found |= {(int(height) * factor, int(width) * factor) for height, width in known}
        if len(found) > LEFT_OUT:
            raise DataError(f"the stored latents have more than {LEFT_OUT} sizes", cure="encode them in fewer buckets")
    if not found:
        raise DataError(
            "the data hold no latents whose size can be read", cure="encode them again: longskip data encode"
        )
    return tuple(sorted(found, key=lambda size: (Fraction(*size), size)))


def assign(source: SizedSource, buckets: Sequence[Size], batch: int = 1, *, factor: int | None = None) -> Assignment:
    """Sorts all samples of a source into ``buckets`` by the tables' sizes; the histogram is in the result.

    Pictures go to the ``nearest``. With a ``factor`` stored latents are sorted, whose size × factor is the bucket's. Of
    buckets with fewer samples than a ``batch`` the smallest is dissolved, again and again: its pictures go to the nearest
    of the others (latents are left out). Buckets that are left without samples are not in the result.

    Raises ``DataError`` where no sample is left.
    """
    sorting = _Sorting(source, buckets, factor)
    sorting.read()
    if factor is None:
        sorting.merge(batch)
    else:
        sorting.leave_out(batch)
    return sorting.finish(batch)


class _Sorting:
    """One call of ``assign``."""

    def __init__(self, source: SizedSource, buckets: Sequence[Size], factor: int | None) -> None:
        self.source, self.buckets, self.factor = source, list(buckets), factor
        self.codes = np.full(len(source), LEFT_OUT, dtype=np.uint8)
        self.counts = np.zeros(len(buckets), dtype=np.int64)
        self.cropped = np.zeros(len(buckets))
        self.enlarged = np.zeros(len(buckets), dtype=np.int64)
        self.fates: dict[int, tuple[Literal["empty", "merged", "left out"], int]] = {}
        self.unknown = np.zeros(0, dtype=np.int64)
        self.strange = 0

    def read(self) -> None:
        at, unknown = 0, []
        for sizes in self.source.sizes(latents=self.factor is not None):
            known = sizes.min(axis=1) > 0
            places = at + np.flatnonzero(known)
            unknown.append(at + np.flatnonzero(~known))
            if self.factor is None:
                self._put(places, sizes[known], range(len(self.buckets)))
            else:
                codes = self._equal(sizes[known] * self.factor)
                self.codes[places] = codes
                self.counts += np.bincount(codes, minlength=LEFT_OUT + 1)[: len(self.buckets)]
                self.strange += int((codes == LEFT_OUT).sum())
            at += len(sizes)
        self.unknown = np.concatenate(unknown)

    def _equal(self, sizes: np.ndarray) -> np.ndarray:
        codes = np.full(len(sizes), LEFT_OUT, dtype=np.uint8)
        for bucket, size in enumerate(self.buckets):
            codes[(sizes == size).all(axis=1)] = bucket
        return codes

    def _put(self, places: np.ndarray, sizes: np.ndarray, among: Sequence[int], sign: int = 1) -> None:
        """Puts pictures of (m, 2) known sizes into the nearest of the buckets ``among``; -1 takes them out of there."""
        shapes = np.array([self.buckets[bucket] for bucket in among])
        chosen = nearest([self.buckets[bucket] for bucket in among], sizes[:, 0], sizes[:, 1])
        stretch = sizes[:, 0] / sizes[:, 1] / (shapes[chosen, 0] / shapes[chosen, 1])
        codes = np.asarray(among)[chosen]
        self.codes[places] = codes
        size = len(self.buckets)
        self.counts += sign * np.bincount(codes, minlength=size)
        self.cropped += sign * np.bincount(codes, 1 - np.minimum(stretch, 1 / stretch), size)
        self.enlarged += sign * np.bincount(codes, (sizes < shapes[chosen]).any(axis=1), size).astype(np.int64)

    def merge(self, batch: int) -> None:
        """Dissolves the smallest bucket while it has fewer pictures than a batch and is not the last."""
        live = [int(bucket) for bucket in np.flatnonzero(self.counts)]
        while len(live) > 1:
            small = min(live, key=lambda bucket: (self.counts[bucket], bucket))
            if self.counts[small] >= batch:
                return
            live.remove(small)
            places = np.flatnonzero(self.codes == small)
            sizes = np.array([self.source.size(int(place)) for place in places])
            self.fates[small] = ("merged", len(places))
            self._put(places, sizes, [small], sign=-1)
            self._put(places, sizes, live)

    def leave_out(self, batch: int) -> None:
        for small in np.flatnonzero((self.counts > 0) & (self.counts < batch)):
            self.codes[self.codes == small] = LEFT_OUT
            self.fates[int(small)] = ("left out", int(self.counts[small]))
            self.counts[small] = 0

    def finish(self, batch: int) -> Assignment:
        if not self.counts.any():
            raise DataError(
                f"no aspect bucket holds a batch of {batch} samples",
                cure="lower train.batch_size, add data, or set data.buckets: off",
            )
        self.codes[self.unknown] = int(np.argmax(self.counts))
        rows = []
        for bucket, (height, width) in enumerate(self.buckets):
            count = int(self.counts[bucket])
            if count:
                cropped = max(float(self.cropped[bucket]) / count, 0.0)
                rows.append(BucketCount(height, width, count, cropped, int(self.enlarged[bucket])))
            else:
                fate, count = self.fates.get(bucket, ("empty", 0))
                rows.append(BucketCount(height, width, count, fate=fate))
        kept = np.flatnonzero(self.counts)
        renumbered = np.full(LEFT_OUT + 1, LEFT_OUT, dtype=np.uint8)
        renumbered[kept] = np.arange(len(kept))
        for at in range(0, len(self.codes), 1 << 20):  # numpy makes 8-byte indices of the codes
            self.codes[at : at + (1 << 20)] = renumbered[self.codes[at : at + (1 << 20)]]
        histogram = Histogram(tuple(rows), batch, len(self.unknown), self.strange)
        return Assignment([self.buckets[bucket] for bucket in kept], self.codes, histogram)
