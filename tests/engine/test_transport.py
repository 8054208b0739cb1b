"""How files come from a server: transfers that break, hang or come damaged, and which URLs are read at all."""

from __future__ import annotations

import pickle
import time

import pytest

from longskip.engine.data.index import load_index
from longskip.engine.data.remote import open_remote
from longskip.engine.data.sources import ShardSource
from longskip.engine.data.transport import Patience, Transport, checked_url
from longskip.errors import ConfigError, RemoteError, ShardError
from tests.engine.remote_server import (
    PER_SHARD,
    QUICK,
    TRANSPORTS,
    WEBDATASET,
    everything,
)
from tests.figures import figure


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
    for transport in WEBDATASET:  # it would put them on curl's command line
        with pytest.raises(ConfigError, match="command line") as caught:
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
