"""The cache of fetched shards: its bound, what is fetched ahead, and the processes that share it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import multiprocessing
import os
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from longskip.engine.data.cache import Cache
from longskip.engine.data.index import load_index
from longskip.engine.data.remote import open_remote
from longskip.engine.data.sources import ShardSource
from longskip.engine.data.transport import Patience
from longskip.engine.data.windows import WindowOrder
from longskip.errors import ConfigError, DataError, RemoteError
from tests.engine.remote_server import (
    GIB,
    QUICK,
    SAMPLES,
    SEED,
    WINDOW,
)
from tests.figures import figure


def _read_all(url: str, cache: Path, results, barrier) -> None:
    source = open_remote(url, transport="fsspec", cache=cache, window_shards=WINDOW, seed=SEED, patience=QUICK)
    barrier.wait()
    source.follow([0], source.order.lookup(0, [0]))
    found = [source.read(int(i)) for i in source.order.lookup(0, np.arange(len(source)))]
    results.put(hashlib.sha256(repr(found).encode()).hexdigest())


def test_processes_share_a_cache_and_fetch_each_shard_once(server, folder, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["longskip.engine.data.reader", "longskip.engine.data.remote"])
    results, barrier = context.Queue(), context.Barrier(2)
    processes = [context.Process(target=_read_all, args=(server.url, tmp_path, results, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    local = ShardSource(folder)
    order = WindowOrder([shard.count for shard in local.index.shards], WINDOW, SEED)
    expected = [local.read(int(i)) for i in order.lookup(0, np.arange(SAMPLES))]
    assert found == [hashlib.sha256(repr(expected).encode()).hexdigest()] * 2
    counts = Counter(file for file, _ in server.log)
    assert counts.pop("index.json") == 2
    assert set(counts.values()) == {1} and len(counts) == 2 * len(local.index.shards)
    figure(f"two processes on one cache: {len(counts) // 2} shards, each fetched once")


def on_disk(root: Path) -> int:
    """Bytes of shards, on their way as well, and tables; a file that is renamed meanwhile counts once."""
    sizes = {}
    for path in [*root.glob("data/*.npy"), *root.glob("*/*.tar")]:
        with contextlib.suppress(FileNotFoundError):
            state = path.stat()
            sizes[state.st_ino] = state.st_size
    return sum(sizes.values())


def test_the_cache_stays_within_its_bound(opened, server, folder, tmp_path, monkeypatch):
    """Measured whenever room was made, which alone lets the cache grow, while nobody else can make any."""
    shards = load_index(folder).shards
    limit = sum(sorted((shard.bytes for shard in shards), reverse=True)[: 2 * WINDOW]) + 1
    with pytest.raises(ConfigError, match="does not hold two windows of 2 shards"):
        opened(cache_gib=(limit - 2) / GIB)
    stranger = tmp_path / "cache" / "mine.tar"
    stranger.write_bytes(b"x" * limit)  # not of the cache's making: neither counted nor removed
    limit += max((folder / shard.table).stat().st_size for shard in shards) * 2 * WINDOW
    source, local = opened(cache_gib=limit / GIB), ShardSource(folder)
    seen, make_room = [], Cache.make_room

    def measured(cache, *arguments, **how) -> bool:
        made = make_room(cache, *arguments, **how)
        with (cache.root / ".lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            seen.append(on_disk(cache.data.parent))
        return made

    monkeypatch.setattr(Cache, "make_room", measured)
    for epoch in range(3):
        for place in range(SAMPLES):
            (sample,) = source.order.lookup(epoch, [place])
            source.follow([epoch], [sample])
            assert source.read(int(sample)) == local.read(int(sample))
    assert max(seen) <= source._store.cache.limit
    assert max(seen) > limit / 2
    assert sum(len(server.gets(shard.file)) for shard in shards) > len(shards)  # evicted, and fetched again
    assert stranger.exists()
    kept = [os.fstat(descriptor).st_nlink for descriptor, *_ in source._kept.values()]
    assert sum(links == 0 for links in kept) <= 2 * WINDOW  # what was removed is not held open for long


def test_reading_anywhere_in_a_small_cache_is_slow_and_right(opened, folder):
    shards = load_index(folder).shards
    source, local = opened(cache_gib=sum(shard.bytes for shard in shards[:4]) / GIB + 1e-9), ShardSource(folder)
    for sample in np.random.default_rng(0).integers(0, SAMPLES, 30).tolist():
        assert source.read(sample) == local.read(sample)


def test_following_fetches_this_window_and_the_next(opened, server):
    source = opened()
    order, shards = source.order, source.index.shards
    expected = [shards[i].file for window in (0, 1) for i in order.shards_of(3, window)]

    def fetched() -> list[str]:
        return [file for file, _ in server.log if file.endswith(".tar")]

    def wait_for(count: int) -> None:
        until = time.monotonic() + 10
        while len(fetched()) < count and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.1)  # what comes too much comes now

    source.follow([3], order.lookup(3, [0]))
    wait_for(2 * WINDOW)
    assert fetched() == expected
    before = len(server.log)
    start = int((order.window_of(3, np.arange(SAMPLES)) == 0).sum())
    for place in range(start):
        source.read(int(order.lookup(3, [place])[0]))
    assert len(server.log) == before  # nobody had to wait
    source.follow([3, 3], order.lookup(3, [start - 1, start]))  # a batch over the border
    wait_for(3 * WINDOW)
    assert fetched() == expected + [shards[i].file for i in order.shards_of(3, 2)]
    source.follow([3], order.lookup(3, [SAMPLES - 1]))  # the last window, then the first of the next epoch
    ahead = {shards[i].file for i in [*order.shards_of(3, order.n_windows - 1), *order.shards_of(4, 0)]}
    wait_for(len(ahead | set(fetched())))
    assert set(fetched()) == set(expected) | {shards[i].file for i in order.shards_of(3, 2)} | ahead


def test_an_error_while_fetching_ahead_reaches_the_reader_once_it_needs_the_shard(opened, server, folder):
    source = opened(patience=Patience(attempts=2, silence=0.4, pause=0.01))
    order = source.order
    second = source.index.shards[order.shards_of(0, 0)[1]]
    server.faults = {second.file: [("hang", 100)] * 2}
    source.follow([0], order.lookup(0, [0]))
    row = int(np.cumsum([0, *(shard.count for shard in source.index.shards)])[order.shards_of(0, 0)[1]])
    until = time.monotonic() + 10
    while not server.gets(second.file) and time.monotonic() < until:
        time.sleep(0.01)
    begin = time.monotonic()
    with pytest.raises(RemoteError, match=f"{second.file} could not be fetched: 2 attempts"):
        source.read(row)  # it waits for the other thread, and does not begin again
    assert time.monotonic() - begin < 2
    assert len(server.gets(second.file)) == 2
    assert source.read(row) == ShardSource(folder).read(row)  # the server has recovered


def test_parts_that_a_killed_process_left_do_not_count(opened, server, folder, tmp_path):
    source = opened()
    shard = source.index.shards[0]
    part = source._store.cache.parts / shard.file
    part.write_bytes(b"half of something else")
    other = source._store.cache.parts / "other.tar"
    other.write_bytes(b"x" * 5000)
    assert source._store.cache.used() == 0 and not other.exists()
    part.write_bytes(b"half of something else")
    assert source.read(0) == ShardSource(folder).read(0)
    assert server.gets(shard.file) == [None]


def _read_one(url: str, cache: Path) -> None:
    open_remote(url, transport="fsspec", cache=cache, patience=QUICK).read(0)


def test_a_process_that_is_killed_while_it_fetches_hands_over(opened, server, folder, tmp_path):
    shard = load_index(folder).shards[0]
    server.faults = {shard.file: [("hang", 3000)]}
    source = opened()
    process = multiprocessing.get_context("forkserver").Process(target=_read_one, args=(server.url, tmp_path / "cache"))
    process.start()
    until = time.monotonic() + 30
    while not server.gets(shard.file) and time.monotonic() < until:
        time.sleep(0.01)
    found = []
    waiting = threading.Thread(target=lambda: found.append(source.read(0)))
    waiting.start()
    time.sleep(0.3)
    assert not found and len(server.gets(shard.file)) == 1
    process.kill()
    process.join()
    waiting.join(timeout=10)
    assert found == [ShardSource(folder).read(0)]
    assert server.gets(shard.file) == [None, None]


def test_a_held_part_is_neither_taken_nor_counted_out(tmp_path):
    one, two = Cache(tmp_path, "a", 100), Cache(tmp_path, "b", 100)
    with one.part("x.tar", lambda: False) as mine:
        assert one.make_room(mine, 60, (), force=False)
        with one.part("x.tar", lambda: False) as same:
            assert same is None
        with two.part("y.tar", lambda: False) as other:
            assert not two.make_room(other, 50, (), force=True)  # another data set's, on its way
            assert two.make_room(other, 40, (), force=False)
            two.land("y.tar")
        one.land("x.tar")
    assert one.has("x.tar", 60) and two.has("y.tar", 40) and one.used() == two.used() == 100
    one.touch("x.tar")
    with two.part("z.tar", lambda: False) as third:
        assert two.make_room(third, 30, (), force=False)  # what was used longest ago goes
        assert one.has("x.tar") and not two.has("y.tar")
        two.land("z.tar")
    with one.part("w.tar", lambda: False) as fourth:
        assert not one.make_room(fourth, 75, ("x.tar",), force=False)
        assert two.has("z.tar")  # nothing goes where it does not help
        assert one.make_room(fourth, 75, ("x.tar",), force=True)
    assert not one.has("x.tar")
    assert one.used() == 0


def test_a_cache_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"the cache .* cannot be written"):
        open_remote(server.url, transport="fsspec", cache=tmp_path / "file" / "cache", patience=QUICK)
