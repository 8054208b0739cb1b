"""Remote shards against a real HTTP server on this machine that breaks, hangs, errs and lies as it is told."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image

from longskip.engine.data import remote
from longskip.engine.data.cache import Cache
from longskip.engine.data.index import load_index, write_table
from longskip.engine.data.pack import write_shards
from longskip.engine.data.reader import Assembler, MicroBatch, Reader
from longskip.engine.data.remote import RemoteSource, open_remote
from longskip.engine.data.sources import ShardSource
from longskip.engine.data.streams import plan_of
from longskip.engine.data.tokens import Vocabulary
from longskip.engine.data.transport import Patience, Transport, checked_url
from longskip.engine.data.windows import WindowOrder
from longskip.errors import ConfigError, DataError, RemoteError, ShardError
from tests.figures import figure

SAMPLES, PER_SHARD, WINDOW, SEED = 46, 5, 2, 9
QUICK = Patience(attempts=5, silence=5.0, total=20.0, pause=0.01, longest_pause=0.02)
GIB = 1 << 30
WEBDATASET = ["webdataset"] if shutil.which("curl") else []
TRANSPORTS = pytest.mark.parametrize("transport", ["fsspec", *WEBDATASET])


class Server:
    """Serves a folder. ``faults[file]`` is consumed one per GET; ``log`` has every GET's file and Range."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranges = True
        self.faults: dict[str, list[tuple]] = {}
        self.log: list[tuple[str, str | None]] = []
        self.headers: list[dict[str, str]] = []
        self.sent: Counter[str] = Counter()
        self.released = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def answer(self, body):
                file = unquote(urlsplit(self.path).path).removeprefix("/data/")
                asked = self.headers.get("Range")
                fault: tuple = ("fine",)
                if body:
                    server.log.append((file, asked))
                    server.headers.append(dict(self.headers))
                    fault = (server.faults.get(file) or [fault]).pop(0)
                path = server.folder / file
                if fault[0] == "status" or not path.is_file():
                    self.send_response(fault[1] if fault[0] == "status" else 404)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                data = path.read_bytes()
                if fault[0] == "wrong":
                    data = bytes(byte ^ 0x41 for byte in data[:600]) + data[600:]
                elif fault[0] == "instead":
                    data = fault[1]
                start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked and server.ranges else 0
                self.send_response(206 if asked and server.ranges else 200)
                if asked and server.ranges:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                self.send_header("Content-Length", str(len(data) - start))
                self.send_header("ETag", '"an etag"')
                self.end_headers()
                if not body:
                    return
                with contextlib.suppress(OSError):
                    self.body(file, data[start:], fault)

            def body(self, file, data, fault):
                if fault[0] in ("break", "hang"):
                    self.wfile.write(data[: fault[1]])
                    self.wfile.flush()
                    server.sent[file] += fault[1]
                    server.released.wait(0.1 if fault[0] == "break" else 30)
                    self.close_connection = True
                elif fault[0] == "drip":
                    for byte in data:
                        self.wfile.write(bytes([byte]))
                        if server.released.wait(0.02):
                            return
                else:
                    self.wfile.write(data)
                    server.sent[file] += len(data)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/data"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def gets(self, file: str) -> list[str | None]:
        return [asked for name, asked in self.log if name == file]

    def close(self) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 21 + i % 3, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module", autouse=True)
def no_connections_left():
    """fsspec keeps file systems for ever; in a forked rank of a later test their end would wait for a thread that is
    not there."""
    yield
    import fsspec

    for scheme in ("http", "s3", "memory"):
        with contextlib.suppress(ImportError):
            fsspec.get_filesystem_class(scheme).clear_instance_cache()
    gc.collect()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("remote") / "shards"
    rows = ({"png": png(i), "txt": f"number {i}", "json": {"nr": i}} for i in range(SAMPLES))
    write_shards(rows, out, per_shard=PER_SHARD)
    return out


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    served = Server(folder)
    yield served
    served.close()


@pytest.fixture
def opened(server, tmp_path):
    """``open_remote`` on the server with a cache of the test's own; closes what it opened."""
    sources = []

    def open_(url: str | None = None, **options) -> RemoteSource:
        options = {"transport": "fsspec", "cache": tmp_path / "cache", "patience": QUICK} | options
        source = open_remote(url or server.url, **({"window_shards": WINDOW, "seed": SEED} | options))
        sources.append(source)
        return source

    yield open_
    for source in sources:
        source.close()


def everything(source: ShardSource, stop: int | None = None) -> list[tuple]:
    """All there is to read of the first ``stop`` samples, sample by sample."""
    return [
        (source.key(i), tuple(source.read(i)), source.size(i), source.captions(i), source.member(i, "json"),
         source.member(i, "latent.npy"))
        for i in range(stop or len(source))
    ]  # fmt: skip


def on_disk(root: Path) -> int:
    """Shards, on their way as well, and tables."""
    total = 0
    for path in [*root.glob("data/*.npy"), *root.glob("*/*.tar")]:
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


@TRANSPORTS
def test_a_url_reads_as_the_folder_does(opened, server, folder, transport):
    source, local = opened(transport=transport), ShardSource(folder)
    assert len(source) == len(local) == SAMPLES
    assert everything(source) == everything(local)
    assert source.fingerprint() == local.fingerprint()
    assert set(Counter(server.log).values()) == {1}  # the index, and each shard and table, once
    order = WindowOrder([shard.count for shard in local.index.shards], WINDOW, SEED)
    for epoch in range(2):
        places = np.arange(SAMPLES)
        assert source.order.lookup(epoch, places).tolist() == order.lookup(epoch, places).tolist()
    again = opened(server.url + "/index.json")  # the same data in the same cache
    assert everything(again) == everything(local)
    assert Counter(file for file, _ in server.log) == Counter(
        {"index.json": 2} | {name: 1 for shard in local.index.shards for name in (shard.file, shard.table)}
    )


@TRANSPORTS
@pytest.mark.parametrize("ranges", [True, False])
def test_broken_connections_are_resumed_or_begun_again(opened, server, folder, transport, ranges):
    server.ranges = ranges
    shard = load_index(folder).shards[1]
    server.faults = {shard.file: [("break", 7000), ("break", 3000), ("break", 0)], "index.json": [("break", 40)]}
    source = opened(transport=transport)
    assert source.read(PER_SHARD) == ShardSource(folder).read(PER_SHARD)
    assert len(server.gets("index.json")) == 2
    if transport == "webdataset":
        assert server.gets(shard.file) == [None] * 4
    elif ranges:
        assert server.gets(shard.file) == [None, "bytes=7000-", "bytes=10000-", "bytes=10000-"]
        assert server.sent[shard.file] == shard.bytes  # no byte came twice
        figure("a transfer that breaks three times is resumed: no byte fetched twice, 4 requests")
    else:
        assert server.gets(shard.file)[:2] == [None, "bytes=7000-"]
        assert len(server.gets(shard.file)) == 4


def test_sizes_and_keys_need_the_tables_alone(opened, server, folder):
    source, local = opened(), ShardSource(folder)
    assert np.concatenate(list(source.sizes())).tolist() == np.concatenate(list(local.sizes())).tolist()
    assert [source.key(i) for i in range(0, SAMPLES, 7)] == [local.key(i) for i in range(0, SAMPLES, 7)]
    assert not [file for file, _ in server.log if file.endswith(".tar")]


def test_errors_of_the_server_are_tried_again_and_missing_files_are_not(opened, server, folder, tmp_path):
    shard = load_index(folder).shards[0]
    server.faults = {shard.file: [("status", 500), ("status", 503), ("status", 429)]}
    assert opened().read(0) == ShardSource(folder).read(0)
    assert len(server.gets(shard.file)) == 4
    for status in (403, 404):
        server.log.clear()
        server.faults = {"index.json": [("status", status)] * 9}
        with pytest.raises(RemoteError, match=r"/data/index\.json could not be fetched: 1 attempt "):
            opened(cache=tmp_path / "other")
        assert len(server.gets("index.json")) == 1
    server.faults = {"index.json": [("status", 502)] * 9}
    with pytest.raises(RemoteError, match=r"5 attempts in .*the last time: HTTP 502"):
        opened(cache=tmp_path / "other")


@TRANSPORTS
def test_a_server_that_hangs_ends_in_an_error_in_time(opened, server, folder, transport):
    shard = load_index(folder).shards[2]
    server.faults = {shard.file: [("hang", 4000)] * 9}
    source = opened(transport=transport, patience=Patience(attempts=2, silence=0.6, pause=0.05))
    begin = time.monotonic()
    with pytest.raises(RemoteError) as caught:
        source.read(2 * PER_SHARD)
    seconds = time.monotonic() - begin
    assert 1.2 < seconds < 15  # two attempts; a test's server lets go after 30 s
    assert f"{server.url}/{shard.file} could not be fetched: 2 attempts" in caught.value.message
    assert "imeout" in caught.value.message and "the server answers" in caught.value.cure
    assert len(server.gets(shard.file)) <= 2
    figure(f"a server that hangs, {transport}: RemoteError after {seconds:.1f} s (2 attempts of 0.6 s of silence)")


@pytest.mark.parametrize(
    ("fault", "patience"),
    [
        (("drip",), Patience(silence=20, total=0.8, pause=20)),  # every byte in time, all of them in ten minutes
        (("hang", 4000), Patience(silence=20, total=0.8, pause=0.05)),
        (("status", 500), Patience(silence=20, total=20, pause=60, longest_pause=60)),  # no use in waiting so long
    ],
)
def test_a_shard_takes_no_longer_than_its_total(opened, server, folder, fault, patience):
    server.faults = {load_index(folder).shards[0].file: [fault] * 9}
    source = opened(patience=patience)
    begin = time.monotonic()
    with pytest.raises(RemoteError, match=r"not done within 0\.8 s|no byte for|HTTP 500"):
        source.read(0)
    assert time.monotonic() - begin < 10


def test_a_host_that_does_not_answer(tmp_path):
    with pytest.raises(RemoteError, match="2 attempts"):
        open_remote("http://127.0.0.1:9/x", transport="fsspec", cache=tmp_path,
                    patience=Patience(attempts=2, silence=1, pause=0.01))  # fmt: skip


def test_messages_keep_keys_and_passwords_to_themselves(opened, server, tmp_path):
    url = server.url.replace("http://", "http://someone:secret1@") + "?sig=secret2"
    for status in (500, 404):
        server.faults = {"index.json": [("status", status)] * 9}
        with pytest.raises(RemoteError) as caught:
            opened(url)
        assert "secret" not in str(caught.value)
    server.faults = {}
    source = opened(url)
    source.read(0)
    assert all("Authorization" in headers for headers in server.headers)
    for transport in WEBDATASET:  # where nobody listens, after which curl waits and tries again itself
        with pytest.raises(RemoteError) as caught:
            opened("http://someone:secret1@127.0.0.1:9/x?sig=secret2", transport=transport, cache=tmp_path / "other",
                   patience=Patience(attempts=1, silence=0.5))  # fmt: skip
        assert "secret" not in str(caught.value)


def test_corrupted_transfers_are_fetched_again_and_then_an_error(opened, server, folder, tmp_path):
    shard = load_index(folder).shards[0]
    server.faults = {shard.file: [("wrong",)] * 2}
    assert opened().read(0) == ShardSource(folder).read(0)
    assert server.gets(shard.file) == [None] * 3
    server.faults = {shard.file: [("wrong",)] * 9}
    source = opened(cache=tmp_path / "other")
    with pytest.raises(ShardError, match=f"{shard.file}: what comes is wrong after 3 attempts.*SHA-256") as caught:
        source.read(0)
    assert "restore it on the server" in caught.value.cure
    assert len(server.gets(shard.file)) == 6
    server.faults = {shard.file: [("instead", (folder / shard.file).read_bytes() + b"more")]}
    assert source.read(0) == ShardSource(folder).read(0)  # what follows the shard is not even read
    assert not list(source._store.cache.parts.rglob("*.*"))


@pytest.mark.parametrize("damage", ["crc", "cut", "place", "key", "rows", "pickle", "huge"])
@pytest.mark.parametrize("first", ["shard", "table"])
def test_damaged_tables_are_fetched_again(opened, server, folder, damage, first, tmp_path, monkeypatch):
    shard = load_index(folder).shards[0]
    table = np.load(folder / shard.table)
    buffer = io.BytesIO()
    if damage == "crc":
        table["image_crc32"][3] ^= 1
    elif damage == "place":
        table["txt_offset"][0] = shard.bytes - 1
    elif damage == "key":
        table["key"][1] = b"../../x"
    elif damage == "rows":
        table = table[:-1]
    np.save(buffer, table.astype(object) if damage == "pickle" else table)
    bad = buffer.getvalue()[:-9] if damage == "cut" else buffer.getvalue()
    if damage == "huge":
        monkeypatch.setattr(remote, "_TABLE_BYTES", (len(bad), 0))
        bad += b"\0"
    server.faults = {shard.table: [("instead", bad)]}
    source = opened()
    if first == "table":
        assert source.key(0) == "000000000"  # from the table alone
        assert not server.gets(shard.file)
    assert everything(source, PER_SHARD) == everything(ShardSource(folder), PER_SHARD)
    assert len(server.gets(shard.table)) == 2
    server.faults = {shard.table: [("instead", bad)] * 9}
    with pytest.raises(ShardError, match="what comes is wrong after 3 attempts"):
        opened(cache=tmp_path / "other").read(0)


def test_hostile_indexes_are_refused(opened, server, tmp_path):
    good = json.loads((server.folder / "index.json").read_text())
    outside = tmp_path / "x.tar"
    for change, message in [
        ({"file": "../../../../x.tar"}, r"'\.\.'"),
        ({"file": str(outside)}, "absolute"),
        ({"file": "pipe:touch x.tar"}, "shard file"),
        ({"file": good["shards"][1]["file"]}, "twice"),
        ({"bytes": 1 << 60, "count": 1 << 59}, "samples in"),
        ({"sha256": "0" * 63 + "\n"}, "SHA-256"),
        ({"count": -5}, "count is -5"),
    ]:
        index = json.loads(json.dumps(good))
        index["shards"][0].update(change)
        index["total"] = sum(shard["count"] for shard in index["shards"])
        server.faults = {"index.json": [("instead", json.dumps(index).encode())] * 3}
        with pytest.raises(ShardError, match=message):
            opened()
    server.faults = {"index.json": [("instead", b"[" * 100_000)] * 3}
    with pytest.raises(ShardError, match="not valid JSON"):
        opened()
    assert not list(tmp_path.rglob("*.tar"))


def test_an_index_without_end_is_not_read_to_its_end(opened, server, monkeypatch):
    monkeypatch.setattr(remote, "MAX_INDEX_BYTES", 100)
    with pytest.raises(ShardError, match="more than the 100 bytes"):
        opened()


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


def test_the_cache_stays_within_its_bound(opened, server, folder, tmp_path):
    shards = load_index(folder).shards
    limit = sum(sorted((shard.bytes for shard in shards), reverse=True)[: 2 * WINDOW]) + 1
    with pytest.raises(ConfigError, match="does not hold two windows of 2 shards"):
        opened(cache_gib=(limit - 2) / GIB)
    stranger = tmp_path / "cache" / "mine.tar"
    stranger.write_bytes(b"x" * limit)  # not of the cache's making: neither counted nor removed
    limit += max((folder / shard.table).stat().st_size for shard in shards) * 2 * WINDOW
    source, local = opened(cache_gib=limit / GIB), ShardSource(folder)
    seen, done = [], threading.Event()

    def watch():
        while not done.is_set():
            seen.append(on_disk(tmp_path / "cache" / source._store.cache.data.parent.name))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for epoch in range(3):
        for place in range(SAMPLES):
            (sample,) = source.order.lookup(epoch, [place])
            source.follow([epoch], [sample])
            assert source.read(int(sample)) == local.read(int(sample))
    done.set()
    watcher.join()
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


def test_what_the_disk_changed_is_removed_and_fetched_again(opened, server, folder):
    source = opened()
    path = source._store.cache.data / source.index.shards[0].file
    expected = source.read(0)
    data = bytearray(path.read_bytes())
    data[int(source.table(0)["image_offset"][0]) + 50] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match="crc32") as caught:
        source.read(0)
    assert "fetches it again" in caught.value.cure
    source.close()
    assert source.read(0) == expected == ShardSource(folder).read(0)


def test_the_empty_captions_feature_comes_along(server, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "features")
    server.folder = tmp_path / "features"
    data = b"stands for a safetensors file"
    index = json.loads((server.folder / "index.json").read_text())
    index["encoders"] = {"text": {"kind": "t5", "empty_sha256": hashlib.sha256(data).hexdigest()}}
    (server.folder / "index.json").write_text(json.dumps(index))
    options = {"transport": "fsspec", "cache": tmp_path / "cache", "patience": QUICK}
    with pytest.raises(RemoteError, match=r"empty\.safetensors could not be fetched: 1 attempt"):
        open_remote(server.url, **options)
    (server.folder / "empty.safetensors").write_bytes(data)
    server.faults = {"empty.safetensors": [("wrong",)]}
    for _ in range(2):
        source = open_remote(server.url, **options)
        assert (source.index.folder / "empty.safetensors").read_bytes() == data
    assert len(server.gets("empty.safetensors")) == 3


def same_bits(ours: MicroBatch, theirs: MicroBatch) -> None:
    assert ours.keys == theirs.keys and ours.captions == theirs.captions and ours.bad == theirs.bad == []
    assert ours.conditions.keys() == theirs.conditions.keys() != set()
    for name in ("clean", "dropped", "time_normal", "noise", "weight", "samples", "epochs"):
        assert getattr(ours, name).numpy().tobytes() == getattr(theirs, name).numpy().tobytes(), name
    for name, condition in ours.conditions.items():
        assert condition.numpy().tobytes() == theirs.conditions[name].numpy().tobytes(), name


def micro_batches(source: ShardSource, count: int, **settings) -> list[MicroBatch]:
    settings = {"resolution": (16, 16), "n_txt": 8, "seed": 3, "caption_dropout": 0.3, "workers": 0} | settings
    plan = plan_of(source, 6, SEED, window_shards=WINDOW)
    with Reader(source, plan, micro=3, accumulation=2, start_method="forkserver",
                **settings) as reader:  # fmt: skip
        return [micro for _ in range(count) for micro in next(reader)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_reader_gives_the_same_micro_batches_bit_by_bit(opened, server, folder, workers):
    server.faults = {shard.file: [("break", 2000)] for shard in load_index(folder).shards[::3]}
    settings = {"vocabulary": Vocabulary.build(["number"], 300), "flip": True, "crop": "random"}
    ours = micro_batches(opened(), 10, workers=workers, **settings)
    for one, other in zip(ours, micro_batches(ShardSource(folder), 10, **settings), strict=True):
        same_bits(one, other)
    assert {len(server.gets(shard.file)) for shard in load_index(folder).shards} == {1, 2}


def test_a_reader_gives_the_same_features_bit_by_bit(server, tmp_path):
    from safetensors.numpy import save_file

    def npy(array) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, array)
        return buffer.getvalue()

    random = np.random.default_rng(0)
    rows = (
        {
            "png": png(i), "txt": f"number {i}", "latent.npy": npy(random.standard_normal((4, 2, 2)).astype(np.float16)),
            "text.npy": npy(random.standard_normal((8, 6)).astype(np.float16)),
            "mask.npy": npy(random.integers(0, 2, 8, dtype=np.uint8)),
        }
        for i in range(20)
    )  # fmt: skip
    server.folder = tmp_path / "features"
    server.folder.mkdir()
    empty = server.folder / "empty.safetensors"
    save_file({"text": np.full((8, 6), 7, np.float16), "mask": np.ones(8, np.uint8)}, empty)
    sha256 = hashlib.sha256(empty.read_bytes()).hexdigest()
    write_shards(rows, server.folder, per_shard=6, encoders={"text": {"empty_sha256": sha256}})
    settings = {"vocabulary": None, "latent_shape": (4, 2, 2)}
    for transport in ("fsspec", *WEBDATASET):
        source = open_remote(server.url, transport=transport, cache=tmp_path / transport, patience=QUICK)
        ours = micro_batches(source, 6, **settings)
        for one, other in zip(ours, micro_batches(ShardSource(server.folder), 6, **settings), strict=True):
            same_bits(one, other)
        assert any(one.dropped.any() for one in ours)
        source.close()


def test_windows_of_a_resumed_run_are_the_unbroken_ones(opened, server, folder):
    """Batches of the window order, from the start and from the middle, over the URL and the folder."""
    vocabulary = Vocabulary.build(["number"], 300)

    def keys(source, follow):
        assembler = Assembler(source, vocabulary, (16, 16), 8)
        order = WindowOrder([shard.count for shard in source.index.shards], WINDOW, SEED)
        out = []
        for start in range(0, 2 * SAMPLES, 8):
            epochs, within = np.divmod(np.arange(start, start + 8), SAMPLES)
            samples = np.array([order.lookup(int(e), int(w)) for e, w in zip(epochs, within, strict=True)])
            if follow:
                source.follow(epochs, samples)
            out.append(assembler.assemble(epochs, samples).keys)
        return out

    straight = keys(ShardSource(folder), False)
    source = opened()
    source.follow([0], [0])
    source.read(0)
    assert keys(pickle.loads(pickle.dumps(source)), True) == keys(source, False) == straight
    assert set(Counter(key for batch in straight for key in batch).values()) <= {1, 2, 3}


def test_urls_that_are_refused(tmp_path, monkeypatch, server):
    for url, message in [
        ("pipe:cat /etc/passwd", "run a command"),
        (" PIPE:touch x", "run a command"),
        ("pipe://touch x", "run a command"),
        ("simplecache::http://127.0.0.1/x", "not a URL of one folder"),
        ("zip://a.zip::http://127.0.0.1/x", "not a URL of one folder"),
        ("/a/folder", "not a URL of one folder"),
    ]:
        for transport in ("fsspec", "webdataset", "none"):
            with pytest.raises(ShardError, match=message):
                open_remote(url, transport=transport, cache=tmp_path)
    with pytest.raises(ShardError, match=r"data\.remote is none"):
        open_remote(server.url, transport="none", cache=tmp_path)
    with pytest.raises(ConfigError, match=r"data\.remote 'curl'; it is one of fsspec, webdataset"):
        open_remote(server.url, transport="curl", cache=tmp_path)
    with pytest.raises(ConfigError, match="fsspec cannot read nosuch://"):
        open_remote("nosuch://host/x", transport="fsspec", cache=tmp_path)
    with pytest.raises(ConfigError, match="webdataset opens no s3://"):
        open_remote("s3://bucket/x", transport="webdataset", cache=tmp_path)
    monkeypatch.setenv("GOPEN_REWRITE", "http://127=pipe:touch /tmp/never")
    with pytest.raises(ShardError, match="GOPEN_REWRITE"):
        open_remote(server.url, transport="webdataset", cache=tmp_path)
    assert not server.log
    monkeypatch.delenv("GOPEN_REWRITE")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="curl, which is not there"):
        open_remote(server.url, transport="webdataset", cache=tmp_path)


def test_a_cache_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"the cache .* cannot be written"):
        open_remote(server.url, transport="fsspec", cache=tmp_path / "file" / "cache", patience=QUICK)


def test_names_with_signs_and_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    write_shards(({"png": png(i), "txt": "x"} for i in range(4)), tmp_path / "plain", per_shard=2)
    index = json.loads((tmp_path / "plain" / "index.json").read_text())
    for shard, name in zip(index["shards"], ["a b/100%?#.tar", "ä+&.tar"], strict=True):
        target = tmp_path / "odd" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "plain" / shard["file"], target)
        table = shard["file"][:-4] + ".idx.npy"
        write_table(target.with_name(target.name[:-4] + ".idx.npy"), np.load(tmp_path / "plain" / table))
        shard["file"] = name
    (tmp_path / "odd" / "index.json").write_text(json.dumps(index))
    served = Server(tmp_path / "odd")
    expected = everything(ShardSource(tmp_path / "plain"))
    for number, (url, transport) in enumerate(
        [((tmp_path / "odd").as_uri(), "fsspec"), ((tmp_path / "odd").as_uri(), "webdataset"),
         *((served.url, transport) for transport in ("fsspec", *WEBDATASET))]
    ):  # fmt: skip
        source = open_remote(url, transport=transport, cache=tmp_path / f"cache{number}", patience=QUICK)
        assert everything(source) == expected
    served.close()


def test_another_filesystem_of_fsspec(folder, tmp_path):
    """memory:// takes the way that s3:// takes: a file that is opened and sought."""
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/bucket/shards", recursive=True)
    try:
        source = open_remote("memory://bucket/shards", transport="fsspec", cache=tmp_path, patience=QUICK)
        assert everything(source) == everything(ShardSource(folder))
    finally:
        memory.rm("/bucket", recursive=True)


def test_s3_through_s3fs(server, folder, tmp_path, monkeypatch):
    """The requests that reading a public bucket takes, answered by this server: no signatures, no listings."""
    pytest.importorskip("s3fs")
    from fsspec.config import conf

    monkeypatch.setitem(conf, "s3", {"anon": True, "endpoint_url": server.url.removesuffix("/data")})
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    shard = load_index(folder).shards[1]
    server.faults = {shard.file: [("break", 5000)]}
    source = open_remote("s3://data", transport="fsspec", cache=tmp_path, patience=QUICK)
    assert everything(source) == everything(ShardSource(folder))


def test_urls_of_folders():
    assert checked_url("https://host/a/index.json") == checked_url("https://host/a/") == "https://host/a"
    assert checked_url("https://host/a/?k=v") == "https://host/a?k=v"


def test_a_transport_travels(tmp_path, server):
    carrier = pickle.loads(pickle.dumps(Transport("fsspec", server.url, QUICK)))
    with (tmp_path / "x").open("w+b") as stream:
        carrier.fetch("index.json", stream, size=None, limit=1 << 20, check=lambda: None)
    assert (tmp_path / "x").read_bytes() == (server.folder / "index.json").read_bytes()
