"""What is read of shards at a URL: the same as of the folder, whatever the server says."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
from collections import Counter

import numpy as np
import pytest

from longskip.engine.data import remote
from longskip.engine.data.index import load_index, write_table
from longskip.engine.data.pack import write_shards
from longskip.engine.data.reader import Assembler, MicroBatch, Reader
from longskip.engine.data.remote import open_remote
from longskip.engine.data.sources import ShardSource
from longskip.engine.data.streams import plan_of
from longskip.engine.data.tokens import Vocabulary
from longskip.engine.data.windows import WindowOrder
from longskip.errors import RemoteError, ShardError
from tests.engine.remote_server import (
    PER_SHARD,
    QUICK,
    SAMPLES,
    SEED,
    TRANSPORTS,
    WEBDATASET,
    WINDOW,
    Server,
    everything,
    png,
)


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


def test_sizes_and_keys_need_the_tables_alone(opened, server, folder):
    source, local = opened(), ShardSource(folder)
    assert np.concatenate(list(source.sizes())).tolist() == np.concatenate(list(local.sizes())).tolist()
    assert [source.key(i) for i in range(0, SAMPLES, 7)] == [local.key(i) for i in range(0, SAMPLES, 7)]
    assert not [file for file, _ in server.log if file.endswith(".tar")]


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
