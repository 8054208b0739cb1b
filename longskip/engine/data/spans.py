"""Samples whose members lie side by side, read each with one system call: large arrays straight to their rows.

What can be said of all samples of a batch is said of them at once: members that lie alike in the file are found, placed
and checked together, so that a sample costs its bytes, their crc32 and little else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from longskip.engine.data.crc import crc32
from longskip.engine.data.npy import header_of
from longskip.errors import BadSampleError

HEAD = 128
"""Bytes of numpy's header of any array this small."""
GAP = 1 << 13
"""Bytes between members that are read along: tar headers, padding."""
ASIDE = 1 << 16
"""Bytes of a sample, at most, that do not go straight to their rows."""
LONG = 1 << 14
"""Bytes of a text that is read alone: the others of the group would be read as far as it goes."""
STRAIGHT = 1 << 12
"""Bytes from which a row is read to its place; smaller ones cost less when they are read aside and copied."""


@dataclass
class Wanted:
    """A kind of member that goes into an array of the batch (m, …), one row of it per slot.

    ``shapes`` are those that a member may have.
    """

    kind: str
    array: np.ndarray
    shapes: tuple[tuple[int, ...], ...]
    rows: np.ndarray = field(init=False)  # (m, bytes) uint8, the same memory
    views: list[memoryview] = field(init=False)  # of the rows that are read straight
    size: int = field(init=False)  # of the whole member, where it holds one row

    def __post_init__(self) -> None:
        stride = self.array[0].nbytes
        flat = self.array.reshape(-1).view(np.uint8)
        self.rows = flat.reshape(len(self.array), stride)
        straight = range(0, flat.size, stride) if stride >= STRAIGHT else ()
        self.views = [flat.data[i : i + stride] for i in straight]
        self.size = HEAD + stride

    def fits(self, head: bytes) -> bool:
        """Whether this is the header of an array that is a row."""
        try:
            header = header_of(head)
        except BadSampleError:
            return False
        return header.offset == HEAD and header.dtype == self.array.dtype and header.shape in self.shapes


def bare(records: np.ndarray) -> np.ndarray:
    """Records as plain bytes (void), the same memory: of those numpy copies many at once, of fields one by one."""
    return records.view(np.dtype((np.void, records.itemsize)))


def alike(
    records: np.ndarray, wanted: Sequence[Wanted], texts: Sequence[str]
) -> Iterator[tuple[np.ndarray, Span | None]]:
    """Indices of records (rows of tables) whose members lie at the same distances, and how to read them.

    None where members are missing, of other sizes, or too long or too far apart to be read at once.
    """
    kinds = [*(one.kind for one in wanted), *texts]
    offsets, sizes = np.empty((2, len(kinds), len(records)), np.int64)
    for i, kind in enumerate(kinds):
        offsets[i], sizes[i] = records[f"{kind}_offset"], records[f"{kind}_size"]
    apart = offsets - offsets[0]
    apart[sizes < 0] = np.iinfo(np.int64).min
    usual = (sizes[: len(wanted)] == [[one.size] for one in wanted]).all(axis=0) & (sizes[len(wanted) :] < LONG).all(
        axis=0
    )
    if not usual.all():
        yield np.flatnonzero(~usual), None
    left = np.flatnonzero(usual)
    while len(left):
        first = apart[:, left[0]]
        same = (apart[:, left] == first[:, None]).all(axis=0)
        group, left = left[same], left[~same]
        lengths = sizes[:, group].max(axis=1)
        places = zip(first.tolist(), lengths.tolist(), kinds, (*wanted, *(None for _ in texts)), strict=True)
        yield group, _span([place for place in places if place[1] >= 0])


def _span(places: list[tuple[int, int, str, Wanted | None]]) -> Span | None:
    """From (distance to the first array, bytes at most, kind, array) of the members that are there."""
    places.sort(key=lambda place: place[0])
    lead = position = places[0][0]
    used = begun = 0
    cuts, columns = [], {}
    for distance, length, kind, wanted in places:
        if not 0 <= distance - position <= GAP:
            return None
        used += distance - position
        columns[kind] = used
        if wanted is not None and wanted.views:
            cuts.append((begun, used + HEAD, wanted))
            used = begun = used + HEAD
        else:
            used += length
        position = distance + length
    if used > ASIDE:
        return None
    return Span(lead, tuple(cuts), begun, used, columns, places[-1][2])


@dataclass(frozen=True)
class Span:
    """How samples that lie alike are read, from ``lead`` bytes after the first wanted member on (0 or less).

    A sample has ``width`` bytes aside: ``cuts`` are (begin, end) of those before each row that is read straight, those
    from ``rest`` on follow the last row. ``columns`` say where a member begins there; the span ends with the kind
    ``last``, and is read as far as the longest of them goes.
    """

    lead: int
    cuts: tuple[tuple[int, int, Wanted], ...]
    rest: int
    width: int
    columns: Mapping[str, int]
    last: str

    def read(
        self, descriptors: Sequence[int], records: np.ndarray, slots: Sequence[int], wanted: Sequence[Wanted]
    ) -> tuple[np.ndarray, dict[str, list[bytes]]]:
        """Reads the samples to their slots: which of them are whole (bool), and the bytes of their texts.

        A sample is not whole where a byte, a crc32 or a header is not what it should be; its rows then hold anything.
        """
        width = self.width
        aside = np.empty((len(records), width), np.uint8)
        begins = range(0, aside.size, width)
        flat = aside.reshape(-1).data
        starts = (records[f"{wanted[0].kind}_offset"] + self.lead).tolist()
        heads = {one.kind: _head(descriptors[0], int(records[f"{one.kind}_offset"][0])) for one in wanted}
        found: dict[str, list[int]] = {one.kind: [] for _, _, one in self.cuts}
        now = [(2 * i + 1, crc32(heads[kind]), crcs.append) for i, (kind, crcs) in enumerate(found.items())]

        pieces: list[list[memoryview]] = []
        for begin, stop, one in self.cuts:
            pieces.append([flat[i + begin : i + stop] for i in begins])
            pieces.append([one.views[slot] for slot in slots])
        pieces.append([flat[i + self.rest : i + width] for i in begins])
        got: list[int] = []
        for descriptor, start, into in zip(descriptors, starts, zip(*pieces, strict=True), strict=True):
            try:
                got.append(os.preadv(descriptor, into, start))
            except OSError:
                got.append(-1)
            for i, seed, append in now:  # while the row lies in the cache; the header is compared below
                append(crc32(into[i], seed))

        texts: dict[str, list[bytes]] = {}
        for kind, column in self.columns.items():
            if kind not in heads:
                ends = (records[f"{kind}_size"] + column).tolist()
                texts[kind] = [flat[i + column : i + stop].tobytes() for i, stop in zip(begins, ends, strict=True)]
                found[kind] = [crc32(text) for text in texts[kind]]
        for one in wanted:
            column = self.columns[one.kind]
            if not one.views:
                found[one.kind] = [crc32(flat[i + column : i + column + one.size]) for i in begins]
                one.rows[slots] = aside[:, column + HEAD : column + one.size]
        stored = {kind: records[f"{kind}_crc32"].tolist() for kind in self.columns}
        asked = width + sum(len(one.views[0]) for _, _, one in self.cuts)

        def same_heads(one: Wanted) -> bool:
            column = self.columns[one.kind]
            return aside[:, column : column + HEAD].tobytes() == heads[one.kind] * len(records)

        if (
            min(got) == asked
            and found == stored
            and all(one.fits(heads[one.kind]) and same_heads(one) for one in wanted)
        ):
            return np.ones(len(records), bool), texts
        needed = (records[f"{self.last}_offset"] + records[f"{self.last}_size"] - starts).tolist()

        def whole(i: int) -> bool:
            for one in wanted:
                column = i * width + self.columns[one.kind]
                head = flat[column : column + HEAD].tobytes()
                if not one.fits(head) or crc32(one.rows[slots[i]], crc32(head)) != stored[one.kind][i]:
                    return False
            return got[i] >= needed[i] and all(found[kind][i] == stored[kind][i] for kind in texts)

        return np.array([whole(i) for i in range(len(records))]), texts


def _head(descriptor: int, offset: int) -> bytes:
    """The header of the first sample, which those of the others are expected to be."""
    try:
        return os.pread(descriptor, HEAD, offset)
    except OSError:
        return b""
