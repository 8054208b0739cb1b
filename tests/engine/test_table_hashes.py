"""The index holds the hash of every table: what was changed in one is met, on a server and in a folder."""

from __future__ import annotations

import hashlib
import io
import json
import shutil

import numpy as np
import pytest

from longskip.engine.data.index import build_index, load_index
from longskip.engine.data.lint import lint
from longskip.engine.data.sources import ShardSource
from longskip.errors import ShardError
from longskip.launcher.cli import main
from tests.engine.remote_server import Server, forget_connections, opening, write_folder


@pytest.fixture(scope="module", autouse=True)
def no_connections_left():
    yield
    forget_connections()


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "shards")


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    served = Server(folder)
    yield served
    served.close()


@pytest.fixture
def opened(server, tmp_path):
    with opening(server, tmp_path / "cache") as open_:
        yield open_


def sizes(source) -> list:
    return np.concatenate(list(source.sizes())).tolist()


def tampered(folder) -> bytes:
    """The first shard's table with other picture sizes: no member's place or crc32 tells."""
    table = np.load(folder / load_index(folder).shards[0].table)
    table["width"] *= 3
    table["height"][2] = 7
    buffer = io.BytesIO()
    np.save(buffer, table)
    return buffer.getvalue()


def without_hashes(folder) -> None:
    index = json.loads((folder / "index.json").read_text())
    for shard in index["shards"]:
        del shard["table_sha256"]
    (folder / "index.json").write_text(json.dumps(index))


def test_the_index_has_the_hash_of_every_table_and_the_data_their_old_name(folder):
    index = load_index(folder)
    for shard in index.shards:
        assert shard.table_sha256 == hashlib.sha256((folder / shard.table).read_bytes()).hexdigest()
    assert build_index(folder).to_json() == index.to_json()
    without_hashes(folder)
    assert all(shard.table_sha256 is None for shard in load_index(folder).shards)
    assert load_index(folder).fingerprint() == index.fingerprint()  # a run goes on with data that are indexed again
    entry = json.loads((folder / "index.json").read_text())
    entry["shards"][1]["table_sha256"] = "0" * 63
    (folder / "index.json").write_text(json.dumps(entry))
    with pytest.raises(ShardError, match=r"malformed.*table_sha256 is '0{63}'"):
        load_index(folder)


def test_a_tampered_table_on_the_server_is_fetched_again_and_then_an_error(opened, server, folder, tmp_path):
    table, bad, right = load_index(folder).shards[0].table, tampered(folder), sizes(ShardSource(folder))
    server.faults = {table: [("instead", bad)]}
    assert sizes(opened()) == right
    assert len(server.gets(table)) == 2
    server.faults = {table: [("instead", bad)] * 9}
    for ask in (sizes, lambda source: source.read(0), lambda source: source.size(0)):
        with pytest.raises(ShardError, match=f"{table}: what comes is wrong after 3 attempts.*SHA-256"):
            ask(opened(cache=tmp_path / "other"))
    assert not list((tmp_path / "other").rglob(table))


def test_a_table_that_was_changed_in_the_cache_is_fetched_again(opened, server, folder):
    table, right = load_index(folder).shards[0].table, sizes(ShardSource(folder))
    first = opened()
    assert first.read(0) == ShardSource(folder).read(0) and sizes(first) == right
    cached = first.index.folder / table
    for ask in (sizes, lambda source: (source.read(0), sizes(source))[1]):
        cached.write_bytes(tampered(folder))
        assert ask(opened()) == right  # another source, as of the next run
    assert len(server.gets(table)) == 3


def test_an_old_index_on_a_server_opens_and_its_sizes_are_believed(opened, server, folder):
    table, bad, right = load_index(folder).shards[0].table, tampered(folder), sizes(ShardSource(folder))
    without_hashes(folder)
    server.faults = {table: [("instead", bad)]}
    source = opened()
    assert source.read(0) == ShardSource(folder).read(0)
    assert sizes(source) != right and len(server.gets(table)) == 1


def test_lint_reads_the_hashes_and_says_where_there_are_none(folder, tmp_path, capsys):
    def said(path) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(["data", "lint", str(path)])
        return int(ended.value.code or 0), capsys.readouterr().out

    table, bad = load_index(folder).shards[0].table, tampered(folder)
    assert lint(folder).ok and lint(folder).tables_unhashed == 0
    assert "no hash" not in said(folder)[1]
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    without_hashes(old)
    report = lint(old)
    assert report.ok and report.tables_unhashed == len(load_index(old).shards)
    code, text = said(old)
    assert code == 0 and f"no hash of {report.tables_unhashed} table(s)" in text and f"data index {old}" in text
    build_index(old)
    assert lint(old).tables_unhashed == 0
    (folder / table).write_bytes(bad)
    report = lint(folder)
    assert report.counts == {"table_sha256": 1} and report.good == report.samples
    ((name, _, detail),) = report.examples
    assert name == table and hashlib.sha256(bad).hexdigest() in detail
    assert said(folder)[0] == 1
