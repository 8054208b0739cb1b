"""Shards at a URL: fetched whole and in order into a cache, window by window ahead of use, and read from there.

``index.json`` at the URL says what there is. A shard is used when it has the size and the SHA-256 of the index, and its
table when it has the SHA-256 of the index too and every member it names lies inside the shard and has its crc32; what
does not is fetched again. (An index made before tables were hashed leaves pictures' sizes in them unchecked.) Nothing
that a server says is taken as a path, a size to allocate or a pickle before it was checked.

Reading is ``ShardSource``'s. The order of the samples is the plan's, so a remote source gives the same samples in the
same order as the same shards in a local folder.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from longskip.engine.data.cache import Cache, default_folder
from longskip.engine.data.crc import crc32
from longskip.engine.data.features import EMPTY_NAME
from longskip.engine.data.hashes import file_sha256
from longskip.engine.data.index import (
    INDEX_NAME,
    MAX_INDEX_BYTES,
    Index,
    ShardEntry,
    check_table_hash,
    checked_key,
    load_index,
    load_table,
    save_index,
)
from longskip.engine.data.sources import ShardSource
from longskip.engine.data.transport import Patience, Stopped, Transport, checked_url, shown
from longskip.engine.data.windows import WindowOrder
from longskip.errors import ConfigError, LongskipError, RemoteError, ShardError

MAX_EMPTY_BYTES = 1 << 26

_BLOCK = 512
_END = 2 * _BLOCK
_TABLE_BYTES = (1 << 20, 1 << 12)  # the most a table may have: so many, and so many per sample
_TRIES = 8
_RECENT = 16


def open_remote(
    url: str,
    *,
    transport: str,
    cache: str | os.PathLike[str] | None = None,
    cache_gib: float = 64.0,
    window_shards: int = 8,
    seed: int = 0,
    on_damage: Literal["stop", "skip"] = "stop",
    fields: Mapping[str, float] | None = None,
    patience: Patience | None = None,
) -> RemoteSource:
    """The source over the indexed shards of the folder at ``url`` (or of its ``index.json``).

    ``transport`` is ``fsspec`` or ``webdataset``; ``none`` refuses URLs. ``cache`` is a folder on a local disk, shared
    by the processes of a node (None: the user's cache folder), and ``cache_gib`` bounds its files, those of other data
    sets in it included. ``window_shards`` and ``seed`` are the plan's: they tell what will be needed next.
    ``on_damage`` and ``fields`` are those of ``ShardSource``.

    Raises ``ShardError`` for a refused URL and an index that is malformed or hostile, ``ConfigError`` for a transport
    that cannot read it here and a cache that does not hold two windows, ``RemoteError`` where the server does not give
    the index, and ``DataError`` where the cache cannot be written.
    """
    if transport == "none":
        checked_url(url)
        raise ShardError(
            f"{shown(url)} is a URL and data.remote is none; only local files are read",
            cure="set data.remote: fsspec (or webdataset; of longskip data encode: --remote), or copy the data to a "
            "local folder",
        )
    carrier = Transport(transport, url, patience)
    listed = _fetch_index(carrier)
    store = Cache(cache or default_folder(), listed.fingerprint()[:32], int(cache_gib * (1 << 30)))
    order = WindowOrder([shard.count for shard in listed.shards], window_shards, seed)
    two_windows = sum(sorted((shard.bytes for shard in listed.shards), reverse=True)[: 2 * window_shards])
    if two_windows > store.limit:
        raise ConfigError(
            f"data.cache_gib {cache_gib:g} does not hold two windows of {window_shards} shards, which take up to "
            f"{two_windows / (1 << 30):.3g} GiB",
            cure="raise data.cache_gib or lower data.window_shards",
        )
    index = replace(listed, folder=store.data)
    save_index(index)
    _fetch_empty(carrier, store, index)
    return RemoteSource(index, carrier, store, order, on_damage=on_damage, fields=fields)


def _fetch_index(transport: Transport) -> Index:
    found: list[Index] = []
    with tempfile.TemporaryDirectory(prefix="longskip-") as folder:
        path = Path(folder) / INDEX_NAME

        def check() -> None:
            found[:] = [load_index(path, check=False)]

        with path.open("w+b") as stream:
            transport.fetch(INDEX_NAME, stream, size=None, limit=MAX_INDEX_BYTES, check=check)
    return found[0]


def _fetch_empty(transport: Transport, cache: Cache, index: Index) -> None:
    """The feature of the empty caption, where the shards hold features; it lies beside the index."""
    text = index.encoders.get("text") if isinstance(index.encoders, dict) else None
    expected = text.get("empty_sha256") if isinstance(text, dict) else None
    target = cache.data / EMPTY_NAME
    if expected is None or (target.exists() and file_sha256(target) == expected):
        return

    def check() -> None:
        if (found := file_sha256(cache.parts / EMPTY_NAME)) != expected:
            raise ShardError(f"{EMPTY_NAME} has the SHA-256 {found}, expected {expected}")

    with cache.part(EMPTY_NAME, lambda: not target.exists()) as part:
        if part is not None:
            transport.fetch(EMPTY_NAME, part, size=None, limit=MAX_EMPTY_BYTES, check=check)
            cache.land(EMPTY_NAME)


class RemoteSource(ShardSource):
    """Samples of indexed shards at a URL, read from a cache that is filled while they are read; see ``open_remote``.

    Whatever is asked for is fetched when it is not there, and the one who asks waits. ``follow`` tells where a reader
    stands, and from then on a thread fetches ahead of it. Threads may share a source; it may be sent to processes,
    which share the cache.
    """

    def __init__(
        self,
        index: Index,
        transport: Transport,
        cache: Cache,
        order: WindowOrder,
        *,
        on_damage: Literal["stop", "skip"] = "stop",
        fields: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(index, on_damage=on_damage, check=False, fields=fields)
        self.order = order
        self._store = _Store(index, transport, cache)
        self._sound: set[int] = set()  # shards whose table, as it lies in the cache, has the index's hash
        self._near: tuple[ShardEntry, ...] = ()
        self._recent: deque[frozenset[tuple[int, int]]] = deque(maxlen=_RECENT)
        self._windows: frozenset[tuple[int, int]] = frozenset()
        self._ahead: _Ahead | None = None

    def __getstate__(self) -> dict[str, Any]:
        idle: dict[str, Any] = {"_ahead": None, "_near": (), "_recent": deque(maxlen=_RECENT), "_windows": frozenset()}
        return super().__getstate__() | idle | {"_sound": set()}

    def follow(self, epochs: Sequence[int] | np.ndarray, samples: Sequence[int] | np.ndarray) -> None:
        """Says that these samples of these epochs are read next: their windows and the one after are fetched ahead.

        The windows of the calls just before count as well: aspect buckets do not cross from one to the next together.
        """
        epochs = np.asarray(epochs, dtype=np.int64)
        shards, _ = self.locate(np.asarray(samples, dtype=np.int64))
        self._recent.append(
            frozenset(
                (int(epoch), int(window))
                for epoch in np.unique(epochs)
                for window in np.unique(self.order.windows_with(int(epoch), shards[epochs == epoch]))
            )
        )
        windows = frozenset().union(*self._recent)
        if windows == self._windows:
            return
        self._windows = windows
        epoch, window = max(windows)
        after = (epoch, window + 1) if window + 1 < self.order.n_windows else (epoch + 1, 0)
        self.ahead(int(shard) for place in [*sorted(windows), after] for shard in self.order.shards_of(*place))

    def ahead(self, shards: Iterable[int]) -> None:
        """Says that these shards are read next, in this order: a thread fetches them ahead of whoever reads."""
        self._near = tuple(self.index.shards[shard] for shard in dict.fromkeys(shards))
        if self._ahead is None or not self._ahead.is_alive():
            self._ahead = _Ahead(self._store)
            self._ahead.start()
            weakref.finalize(self, self._ahead.end)
        self._ahead.want(self._near)

    def close(self) -> None:
        """Closes the open shards and ends fetching ahead; reading opens them again, ``follow`` begins it again."""
        ahead, self._ahead, self._windows = self._ahead, None, frozenset()
        self._recent.clear()
        if ahead is not None:
            ahead.end()
            ahead.join()
        super().close()

    def opened(self, shard: int) -> tuple[int, np.ndarray, tuple[str, ...]]:
        """As ``ShardSource.opened``, the shard fetched where it is not there.

        Raises ``RemoteError``, and ``ShardError`` where what the server has is not what the index says.
        """
        entry = self.index.shards[shard]
        for _ in range(_TRIES):
            if shard in self._kept:
                return super().opened(shard)
            self._store.bring(entry, _Errand(self._near))
            try:
                self._check_hash(shard)
                found = super().opened(shard)
            except ShardError:
                if self._store.has(entry):
                    raise
                continue  # removed by another process before it was opened here
            self._let_go()
            return found
        raise self._crowded(entry)

    def table(self, shard: int) -> np.ndarray:
        """The memory-mapped table of a shard, fetched where it is not there; the shard itself is not."""
        entry = self.index.shards[shard]
        for _ in range(_TRIES):
            self._store.bring_table(entry, _Errand(self._near))
            try:
                self._check_hash(shard)
                return load_table(self.index.folder, entry)
            except ShardError:
                if self._store.cache.has(entry.table):
                    raise
        raise self._crowded(entry)

    def _check_hash(self, shard: int) -> None:
        """Hashes the cached table once; one that is not the index's is removed, so that it is fetched again."""
        if shard in self._sound:
            return
        entry = self.index.shards[shard]
        try:
            check_table_hash(self.index.folder, entry)
        except ShardError:
            self._store.cache.drop(entry.table)
            raise
        self._sound.add(shard)

    def key(self, i: int) -> str:
        """The key of sample ``i``, from the table alone."""
        (shard,), (row,) = self.locate(np.array([i]))
        return self.table(shard)["key"][row].decode("utf-8", "replace")

    def size(self, i: int) -> tuple[int, int]:
        """(height, width) of the stored picture in pixels, from the table alone; (0, 0) where they are not known."""
        (shard,), (row,) = self.locate(np.array([i]))
        table = self.table(shard)
        return int(table["height"][row]), int(table["width"][row])

    def _let_go(self) -> None:
        """Closes shards that were removed from the cache, so that their bytes become free."""
        with self._lock:
            for shard, (descriptor, *_) in list(self._kept.items()):
                if os.fstat(descriptor).st_nlink == 0:
                    del self._kept[shard]

    def _crowded(self, entry: ShardEntry) -> RemoteError:
        return RemoteError(
            f"{entry.file} was removed from the cache {self._store.cache.root} {_TRIES} times before it could be read",
            cure="raise data.cache_gib: several runs or data sets share the cache",
        )

    def _member(self, entry: ShardEntry, descriptor: int, row: dict[str, Any], kind: str, limit: int) -> bytes | None:
        try:
            return super()._member(entry, descriptor, row, kind, limit)
        except ShardError as error:  # it was whole when it was fetched: the disk has changed it
            self._store.cache.drop(entry.file)
            self._store.cache.drop(entry.table)
            raise ShardError(
                error.message, cure="it was removed from the cache; the same command fetches it again"
            ) from error


class _Errand:
    """What something is fetched for: the shards that are needed as soon, and whether somebody waits for it.

    What nobody waits for is left alone where it is busy or has no room, and ends when ``stop`` is set.
    """

    def __init__(self, keep: Sequence[ShardEntry], stop: threading.Event | None = None) -> None:
        self.keep = {file for entry in keep for file in (entry.file, entry.table)}
        self.waits = stop is None
        self.stop = stop


class _Store:
    """Brings the shards and tables of an index from their URL into the cache; may be sent to other processes."""

    def __init__(self, index: Index, transport: Transport, cache: Cache) -> None:
        self.index, self.transport, self.cache = index, transport, cache
        self._errors: dict[str, tuple[float, LongskipError]] = {}  # of this process, and when

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_errors": {}}

    def has(self, entry: ShardEntry) -> bool:
        """Whether the shard and its table are here."""
        return self.cache.has(entry.file, entry.bytes) and self.cache.has(entry.table)

    def bring(self, entry: ShardEntry, errand: _Errand) -> bool:
        """Has the shard and its table here; False where nobody waits and it is busy or there is no room."""

        def check() -> None:
            path = self.cache.parts / entry.file
            if (found := file_sha256(path)) != entry.sha256:
                raise ShardError(f"{entry.file} has the SHA-256 {found}, the index expects {entry.sha256}")
            if self.cache.has(entry.table):  # fetched alone, before the shard
                try:
                    _check_table(entry, load_table(self.cache.data, entry), path)
                except ShardError:
                    self.cache.drop(entry.table)

        return self._file(entry.file, entry.bytes, entry.bytes, check, errand) and self.bring_table(entry, errand)

    def bring_table(self, entry: ShardEntry, errand: _Errand) -> bool:
        """Has the shard's table here, as ``bring``."""

        def check() -> None:
            shard = self.cache.data / entry.file
            there = self.cache.has(entry.file, entry.bytes)
            check_table_hash(self.cache.parts, entry)
            _check_table(entry, load_table(self.cache.parts, entry), shard if there else None)

        fixed, per_sample = _TABLE_BYTES
        return self._file(entry.table, None, fixed + per_sample * entry.count, check, errand)

    def _file(self, file: str, size: int | None, limit: int, check: Callable[[], None], errand: _Errand) -> bool:
        if self.cache.has(file, size):
            self.cache.touch(file)
            return True
        begin = time.monotonic()

        def wait_on() -> bool:
            """Whether to wait for whoever is fetching it, or for room."""
            if not errand.waits or self.cache.has(file, size):
                return False
            if time.monotonic() > begin + self.transport.patience.total:
                raise RemoteError(
                    f"{shown(self.transport.url)}: another process has been fetching {file}, or taking the cache's "
                    f"room, for {self.transport.patience.total:.3g} s",
                    cure=f"see what runs on {self.cache.root}, or raise data.cache_gib",
                )
            return True

        with self.cache.part(file, wait_on) as part:
            if part is None or self.cache.has(file, size):
                return self.cache.has(file, size)
            when, error = self._errors.get(file, (0.0, None))
            if error is not None and when > begin:  # another thread's, for which this one has waited
                raise error
            try:
                if size is not None and not self._room(part, size, errand, wait_on):
                    return False
                self.transport.fetch(file, part, size=size, limit=limit, check=check, stop=errand.stop)
                if size is None and not self._room(part, os.fstat(part.fileno()).st_size, errand, wait_on):
                    return False
                self.cache.land(file)
            except LongskipError as error:
                self._errors[file] = (time.monotonic(), error)
                raise
        return True

    def _room(self, part: Any, size: int, errand: _Errand, wait_on: Callable[[], bool]) -> bool:
        while not self.cache.make_room(part, size, errand.keep, force=errand.waits):
            if not wait_on():
                return False
            time.sleep(0.05)
        return True


def _check_table(entry: ShardEntry, table: np.ndarray, shard: Path | None) -> None:
    """Raises ``ShardError`` where a table's keys or places are impossible or, given the shard, its members differ."""
    for key in table["key"].tolist():
        try:
            checked_key(key.decode("utf-8"))
        except UnicodeDecodeError:
            raise ShardError(f"{entry.table}: the key {key!r} is not UTF-8") from None
    names = table.dtype.names or ()
    kinds = [name.removesuffix("_offset") for name in names if name.endswith("_offset")]
    members = []
    for kind in kinds:
        offsets, sizes, sums = (table[f"{kind}_{what}"] for what in ("offset", "size", "crc32"))
        there = sizes >= 0
        if not ((offsets >= _BLOCK) & (sizes <= entry.bytes - _END - offsets))[there].all():
            raise ShardError(f"{entry.table} places a {kind} outside the {entry.bytes} bytes of its shard")
        members += list(zip(offsets[there].tolist(), sizes[there].tolist(), sums[there].tolist(), strict=True))
    if shard is None:
        return
    with shard.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        view = memoryview(data)
        try:
            if any(crc32(view[start : start + size]) != crc for start, size, crc in sorted(members)):
                raise ShardError(f"{entry.table} has other crc32 than the members of {entry.file}")
        finally:
            view.release()


class _Ahead(threading.Thread):
    """Fetches what will be needed next, in that order, while others read."""

    def __init__(self, store: _Store) -> None:
        super().__init__(name="longskip-ahead", daemon=True)
        self._store = store
        self._wanted: Sequence[ShardEntry] = ()
        self._changed = threading.Condition()
        self._ended = threading.Event()

    def want(self, entries: Sequence[ShardEntry]) -> None:
        """From now on these, instead of those before."""
        with self._changed:
            self._wanted = entries
            self._changed.notify()

    def end(self) -> None:
        """Ends the thread, and the transfer that it is at."""
        self._ended.set()
        with self._changed:
            self._changed.notify()

    def run(self) -> None:
        done: Sequence[ShardEntry] = ()
        while True:
            with self._changed:
                while self._wanted is done and not self._ended.is_set():
                    self._changed.wait()
                wanted = done = self._wanted
            errand = _Errand(wanted, self._ended)
            for entry in wanted:
                if self._ended.is_set():
                    return
                if self._wanted is not wanted:
                    break
                try:
                    self._store.bring(entry, errand)
                except Stopped:
                    return
                except LongskipError:
                    continue  # whoever needs it meets it again, and reports it
