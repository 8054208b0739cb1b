"""Shards at a URL: fetched whole and in order into a cache, window by window ahead of use, and read from there.

``index.json`` at the URL says what there is. A shard is used when it has the size and the SHA-256 of the index, and its
table when every member it names lies inside the shard and has its crc32; what does not is fetched again. Nothing that a
server says is taken as a path, a size to allocate or a pickle before it was checked.

Reading is ``ShardSource``'s. The order of the samples is the plan's, so a remote source gives the same samples in the
same order as the same shards in a local folder.
"""

from __future__ import annotations

import mmap
import os
import re
import tempfile
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from longskip.engine.data.cache import Cache, default_folder
from longskip.engine.data.index import INDEX_NAME, Index, ShardEntry, checked_key, load_index, load_table, save_index
from longskip.engine.data.lint import file_sha256
from longskip.engine.data.sources import ShardSource
from longskip.engine.data.transport import Patience, Stopped, Transport, beside, checked_url, shown
from longskip.engine.data.windows import WindowOrder
from longskip.errors import ConfigError, DataError, LongskipError, RemoteError, ShardError

EMPTY_NAME = "empty.safetensors"
MAX_INDEX_BYTES = 1 << 28
MAX_EMPTY_BYTES = 1 << 26

_BLOCK = 512
_TABLE_BYTES = (1 << 20, 1 << 12)  # the most a table may have: so many, and so many per sample
_SHA256 = re.compile(r"[0-9a-f]{64}")


def open_remote(
    url: str,
    *,
    transport: str,
    cache: str | os.PathLike[str] | None = None,
    cache_gib: float = 64.0,
    window_shards: int = 8,
    seed: int = 0,
    on_damage: Literal["stop", "skip"] = "stop",
    patience: Patience | None = None,
) -> RemoteSource:
    """The source over the indexed shards of the folder at ``url`` (or of its ``index.json``).

    ``transport`` is ``fsspec`` or ``webdataset``; ``none`` refuses URLs. ``cache`` is a folder on a local disk, shared
    by the processes of a node (None: the user's cache folder), and ``cache_gib`` bounds its files, those of other data
    sets in it included. ``window_shards`` and ``seed`` are the plan's: they tell what will be needed next.

    Raises ``ShardError`` for a refused URL and an index that is malformed or hostile, ``ConfigError`` for a transport
    that cannot read it here and a cache that does not hold two windows, ``RemoteError`` where the server does not give
    the index, and ``DataError`` where the cache cannot be written.
    """
    if transport == "none":
        checked_url(url)
        raise ShardError(
            f"{shown(url)} is a URL and data.remote is none; only local files are read",
            cure="set data.remote: fsspec (or webdataset), or copy the data to a local folder",
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
    return RemoteSource(index, carrier, store, order, on_damage=on_damage)


def _fetch_index(transport: Transport) -> Index:
    found: list[Index] = []
    with tempfile.TemporaryDirectory(prefix="longskip-") as folder:
        path = Path(folder) / INDEX_NAME

        def check() -> None:
            found[:] = [_checked(load_index(path, check=False))]

        with path.open("w+b") as stream:
            transport.fetch(INDEX_NAME, stream, size=None, limit=MAX_INDEX_BYTES, check=check)
    return found[0]


def _checked(index: Index) -> Index:
    """The index itself. Raises ``ShardError`` where it names a shard twice or what no shard can have."""
    seen = set()
    for shard in index.shards:
        if shard.file in seen:
            raise ShardError(f"the index names {shard.file} twice")
        seen.add(shard.file)
        if shard.count * _BLOCK > shard.bytes or not _SHA256.fullmatch(shard.sha256):
            raise ShardError(f"the index gives {shard.file} {shard.count} samples in {shard.bytes} bytes with the "
                             f"SHA-256 {shard.sha256[:80]!r}")  # fmt: skip
    return index


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
    ) -> None:
        super().__init__(index, on_damage=on_damage, check=False)
        self.order = order
        self._store = _Store(index, transport, cache)
        self._near: tuple[ShardEntry, ...] = ()
        self._at: Any = None
        self._ahead: _Ahead | None = None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_ahead": None, "_at": None, "_near": ()}

    def follow(self, epochs: Sequence[int] | np.ndarray, samples: Sequence[int] | np.ndarray) -> None:
        """Says that these samples of these epochs are read next: their windows and the one after are fetched ahead."""
        epochs = np.asarray(epochs, dtype=np.int64)
        shards = np.searchsorted(self._ends, np.asarray(samples, dtype=np.int64), side="right")
        windows = {
            (int(epoch), int(window))
            for epoch in np.unique(epochs)
            for window in np.unique(self.order.windows_with(int(epoch), shards[epochs == epoch]))
        }
        if not windows or windows == self._at:
            return
        self._at = windows
        epoch, window = max(windows)
        after = (epoch, window + 1) if window + 1 < self.order.n_windows else (epoch + 1, 0)
        wanted = [int(shard) for place in [*sorted(windows), after] for shard in self.order.shards_of(*place)]
        self._near = tuple(self.index.shards[shard] for shard in dict.fromkeys(wanted))
        if self._ahead is None or not self._ahead.is_alive():
            self._ahead = _Ahead(self._store)
            self._ahead.start()
            weakref.finalize(self, self._ahead.stopped.set)
        self._ahead.want(self._near)

    def close(self) -> None:
        """Closes the open shards and stops fetching ahead; reading opens them again, ``follow`` starts it again."""
        ahead, self._ahead, self._at = self._ahead, None, None
        if ahead is not None:
            ahead.stopped.set()
            ahead.join()
        super().close()

    def table(self, shard: int) -> np.ndarray:
        """The memory-mapped table of a shard, fetched where it is not there; the shard itself is not."""
        entry = self.index.shards[shard]
        self._retried(entry, lambda: self._store.bring_table(entry, self._waiter(entry)))
        return load_table(self.index.folder, entry)

    def key(self, i: int) -> str:
        """The key of sample ``i``, from the table alone."""
        shard, row = self._locate(i)
        return self.table(shard)["key"][row].decode("utf-8", "replace")

    def size(self, i: int) -> tuple[int, int]:
        """(height, width) of the stored picture in pixels, from the table alone; (0, 0) where they are not known."""
        shard, row = self._locate(i)
        table = self.table(shard)
        return int(table["height"][row]), int(table["width"][row])
