from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from longskip.engine.data import pack
from longskip.engine.data.pack import pack_folder, write_shards
from longskip.engine.data.sources import FolderSource, RawSample, ShardSource, open_source
from longskip.errors import BadSampleError, DataError, ShardError, UnfitDataError


def picture(i: int, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 9, 3), dtype=np.uint8)).save(buffer, format)
    return buffer.getvalue()


def raw(n: int) -> list[RawSample]:
    formats = ("PNG", "JPEG", "WEBP")
    captions = [((f"number {i}", 1.0),) if i % 2 else ((f"number {i}", 2.0), ("étude", 0.5)) for i in range(n)]
    return [RawSample(f"{i:09d}", picture(i, formats[i % 3]), captions[i]) for i in range(n)]


def fill(folder, samples) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in samples.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())


def test_what_is_written_is_read_back(tmp_path):
    samples = raw(23)
    calls = []
    index = write_shards(samples, tmp_path / "a", per_shard=10, progress=calls.append)
    assert [shard.file for shard in index.shards] == ["00000.tar", "00001.tar", "00002.tar"]
    assert [shard.count for shard in index.shards] == [10, 10, 3]
    source = open_source(tmp_path / "a")
    assert [source.read(i) for i in range(len(source))] == samples
    assert [source.key(i) for i in range(len(source))] == [sample.key for sample in samples]
    assert calls == list(range(1, 24))
    assert sorted(os.listdir(tmp_path / "a")) == sorted(
        ["index.json"] + [f"{i:05d}{end}" for i in range(3) for end in (".tar", ".idx.npy")]
    )


def test_the_same_samples_give_the_same_bytes(tmp_path):
    first = write_shards(raw(5), tmp_path / "a")
    second = write_shards(iter(raw(5)), tmp_path / "b")
    assert first.shards == second.shards
    assert first.fingerprint() == second.fingerprint()
    assert (tmp_path / "a" / "00000.tar").read_bytes() == (tmp_path / "b" / "00000.tar").read_bytes()
    assert write_shards(raw(6), tmp_path / "c").fingerprint() != first.fingerprint()


def test_webdataset_itself_reads_the_shards(tmp_path):
    import webdataset

    samples = raw(23)
    write_shards(samples, tmp_path / "a", per_shard=10)
    urls = [str(path) for path in sorted((tmp_path / "a").glob("*.tar"))]
    found = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [item["__key__"] for item in found] == [sample.key for sample in samples]
    for item, sample in zip(found, samples, strict=True):
        assert next(item[end] for end in ("jpg", "png", "webp") if end in item) == sample.image
        assert item["txt"].decode() == sample.captions[0][0]
        if len(sample.captions) > 1:
            written = [(c["text"], c["weight"]) for c in json.loads(item["json"])["captions"]]
            assert written == list(sample.captions)


def test_shards_end_before_they_grow_past_the_bound(tmp_path):
    index = write_shards(({"png": bytes(picture(i)) + bytes(20_000), "txt": "x"} for i in range(20)), tmp_path / "a",
                         max_bytes=100_000)  # fmt: skip
    assert index.total == 20
    assert len(index.shards) > 3
    assert max(shard.bytes for shard in index.shards) <= 100_000 + 10_240  # tar pads to records of 10,240 bytes


def test_mappings_keep_their_keys_and_derived_members(tmp_path):
    write_shards([{"__key__": "cat/7", "png": picture(0), "txt": "a cat", "json": {"scene": [1]}, "latent.npy": b"L"}],
                 tmp_path / "a")  # fmt: skip
    source = open_source(tmp_path / "a")
    assert source.read(0) == RawSample("cat/7", picture(0), (("a cat", 1.0),))
    assert json.loads(source.member(0, "json")) == {"scene": [1]}
    assert source.member(0, "latent.npy") == b"L"


@pytest.mark.parametrize(
    "change",
    [{"__key__": "../x"}, {"__key__": "/x"}, {"__key__": "a.b"}, {"__key__": ""}, {"__key__": "a\nb"},
     {"pkl": b"x"}, {"x.pyd": b"x"}, {"PTH": b"x"}, {"../x": b"x"}, {"a/b": b"x"}, {"x": 3}],
)  # fmt: skip
def test_hostile_samples_are_refused_and_leave_nothing(tmp_path, change):
    with pytest.raises(DataError):
        write_shards([{"png": picture(0), "txt": "x"}, {"png": picture(1), "txt": "x", **change}], tmp_path / "a")
    assert os.listdir(tmp_path / "a") == []


def test_empty_repeated_and_second_writing_is_refused(tmp_path):
    with pytest.raises(DataError, match="no samples"):
        write_shards([], tmp_path / "a")
    with pytest.raises(ShardError, match="'k' comes twice"):
        write_shards([{"__key__": "k", "png": picture(0)}] * 2, tmp_path / "a")
    with pytest.raises(DataError, match="no picture"):
        write_shards([{"txt": "x"}], tmp_path / "a")
    write_shards(raw(1), tmp_path / "a")
    with pytest.raises(DataError, match=r"already holds index\.json"):
        write_shards(raw(1), tmp_path / "a")


@pytest.mark.parametrize("name", ["a.png", "below/b.JPEG", "metadata.jsonl"])
def test_a_folder_with_pictures_takes_no_shards(tmp_path, name):
    """An index among them would stand for all of them from then on."""
    fill(tmp_path / "mine", {name: b"x", "notes.md": "x"})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UnfitDataError, match=f"holds pictures .{name}"):
        write_shards(raw(1), tmp_path / "mine")
    assert sorted(tmp_path.rglob("*")) == before


def test_other_files_and_hidden_pictures_are_no_pictures(tmp_path):
    fill(tmp_path / "mine", {".a.png": b"x", ".thumbs/b.png": b"x", "notes.md": "x", "a.txt": "x"})
    assert write_shards(raw(1), tmp_path / "mine").total == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError])
def test_what_is_interrupted_leaves_nothing_behind(tmp_path, error):
    """The third shard is being written: neither it nor the two that are whole, which no index would list."""

    def samples():
        yield from raw(25)
        assert (tmp_path / "a" / "00002.tar.part").exists() and (tmp_path / "a" / "00001.tar").exists()
        raise error

    fill(tmp_path / "a", {"notes.md": "x"})
    with pytest.raises(error):
        write_shards(samples(), tmp_path / "a", per_shard=10)
    assert os.listdir(tmp_path / "a") == ["notes.md"]


def test_an_interrupt_between_a_shard_and_the_next_leaves_nothing(tmp_path, monkeypatch):
    for place in ("__init__", "finish"):
        with monkeypatch.context() as patched:
            kept = getattr(pack._OpenShard, place)

            def ended(self, *arguments, kept=kept):
                kept(self, *arguments)
                raise KeyboardInterrupt

            patched.setattr(pack._OpenShard, place, ended)
            with pytest.raises(KeyboardInterrupt):
                write_shards(raw(3), tmp_path / "a", per_shard=1)
        assert os.listdir(tmp_path / "a") == []


def test_sigterm_ends_what_is_counted_tidily(tmp_path):
    """Sent to the process itself in the middle of a shard."""
    code = (
        "import os, signal, sys\nfrom longskip.launcher.progress import counting\n"
        "from longskip.engine.data.shapes import write_shapes\n"
        "with counting('drawing', 50) as tell:\n"
        "    write_shapes(sys.argv[1], 50, progress=lambda n: os.kill(os.getpid(), signal.SIGTERM) if n == 20 else tell(n))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 143 and os.listdir(tmp_path / "a") == [], done.stderr


def test_a_folder_trains_as_it_is_and_packs_to_the_same_samples(tmp_path):
    names = {"b/two.jpg": picture(1, "JPEG"), "b/two.txt": "second ", "a.png": picture(0), "a.txt": "first",
             "c.v1.webp": picture(2, "WEBP"), "c.v1.json": '{"captions": [{"text": "x", "weight": 3}, {"text": "y"}]}',
             ".hidden.png": b"", ".dir/x.png": b"", "notes.md": "not a picture"}  # fmt: skip
    fill(tmp_path / "in", names)
    folder = open_source(tmp_path / "in")
    assert isinstance(folder, FolderSource)
    assert [folder.key(i) for i in range(len(folder))] == ["a", "b/two", "c.v1"]
    assert folder.read(1) == RawSample("b/two", names["b/two.jpg"], (("second", 1.0),))
    assert folder.read(2).captions == (("x", 3.0), ("y", 1.0))
    report = pack_folder(tmp_path / "in", tmp_path / "out")
    assert (report.packed, report.shards, report.bad, report.counts) == (3, 1, [], {})
    packed = open_source(tmp_path / "out")
    assert isinstance(packed, ShardSource)
    assert [packed.read(i)[1:] for i in range(3)] == [folder.read(i)[1:] for i in range(3)]


def test_metadata_lists_the_pictures(tmp_path):
    lines = [{"file_name": "z.png", "text": "last"}, {"file_name": "sub/a.jpg", "text": "first"}]
    fill(tmp_path / "in", {"z.png": picture(0), "sub/a.jpg": picture(1, "JPEG"), "unlisted.png": picture(2),
                           "metadata.jsonl": "\n".join(json.dumps(line) for line in lines) + "\n\n"})  # fmt: skip
    source = open_source(tmp_path / "in")
    assert [source.read(i).captions[0][0] for i in range(len(source))] == ["first", "last"]


def test_bad_files_are_listed_with_reasons_and_the_rest_is_packed(tmp_path):
    fill(tmp_path / "in", {
        "good.png": picture(0), "good.txt": "good", "broken.png": picture(1)[:60], "broken.txt": "x",
        "text.png": b"hello", "text.txt": "x", "silent.png": picture(2), "blank.png": picture(3), "blank.txt": " \n",
        "bytes.png": picture(4), "bytes.txt": b"\xff\xfe\x00", "json.png": picture(5), "json.json": "[1]",
        "nested.png": picture(6), "nested.json": "[" * 50_000, "half.png": picture(8),
        "half.json": '{"captions": [{"text": "\\ud800"}]}', "huge.png": picture(9), "huge.txt": "x" * (1 << 20) + "yy",
        "twice.png": picture(10), "twice.jpg": picture(10, "JPEG"), "twice.txt": "x",
        "weight.png": picture(11), "weight.json": '{"captions": [{"text": "x", "weight": NaN}]}',
    })  # fmt: skip
    os.mkfifo(tmp_path / "in" / "pipe.png")
    report = pack_folder(tmp_path / "in", tmp_path / "out")
    assert report.packed == 2
    assert report.counts == {
        "caption_encoding": 2, "caption_json": 3, "caption_missing": 2, "duplicate": 1, "file_unreadable": 1,
        "image_decode": 1, "image_format": 1, "text_too_large": 1,
    }  # fmt: skip
    assert {name for name, _, _ in report.bad} >= {"broken.png", "text.png", "twice.png", "pipe.png"}
    with pytest.raises(DataError, match=r"twice\.png \(duplicate: twice\.jpg has the same name\)"):
        open_source(tmp_path / "in")
    os.unlink(tmp_path / "in" / "twice.jpg")
    source = open_source(tmp_path / "in")
    reasons = {}
    for i in range(len(source)):
        try:
            source.read(i)
        except BadSampleError as error:
            reasons[source.key(i)] = error.reason
    assert reasons["silent"] == "caption_missing"
    assert reasons["bytes"] == "caption_encoding"
    assert reasons["huge"] == "text_too_large"


@pytest.mark.parametrize(
    ("line", "reason"),
    [('{"file_name": "../x.png", "text": "a"}', "hostile_name"),
     ('{"file_name": "/x.png", "text": "a"}', "hostile_name"),
     ('{"file_name": "x.gif", "text": "a"}', "image_format"), ("{", "caption_json"), ('{"text": "a"}', "caption_json"),
     ('{"file_name": "x.png"}', "caption_missing"), ('{"file_name": "x.png", "text": 3}', "caption_json"),
     ('{"file_name": "missing.png", "text": "a"}', "image_missing")],
)  # fmt: skip
def test_bad_lines_of_metadata_are_listed(tmp_path, line, reason):
    (tmp_path / "x.png").write_bytes(picture(1))
    fill(tmp_path / "in", {"a.png": picture(0), "x.png": picture(1),
                           "metadata.jsonl": '{"file_name": "a.png", "text": "a"}\n' + line})  # fmt: skip
    report = pack_folder(tmp_path / "in", tmp_path / "out")
    assert (report.packed, report.counts) == (1, {reason: 1})


def test_nothing_to_pack_or_open_is_said_with_a_cure(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="holds no pictures"):
        open_source(tmp_path / "in")
    with pytest.raises(DataError, match="does not exist"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no pictures that can be packed"):
        pack_folder(tmp_path / "in", tmp_path / "out")
    fill(tmp_path / "in", {"a.png": b"x", "a.txt": "x"})
    with pytest.raises(DataError, match=r"none of 1 pictures .* can be used: \{'image_format': 1\}"):
        pack_folder(tmp_path / "in", tmp_path / "out")
    with pytest.raises(DataError, match="pack into another folder"):
        pack_folder(tmp_path / "in", tmp_path / "in")


def test_a_folder_is_another_one_when_a_file_changes(tmp_path):
    fill(tmp_path / "in", {"a.png": picture(0), "a.txt": "first"})
    before = open_source(tmp_path / "in").fingerprint()
    assert open_source(tmp_path / "in").fingerprint() == before
    fill(tmp_path / "in", {"a.txt": "second"})
    assert open_source(tmp_path / "in").fingerprint() != before


def test_reading_data_needs_no_torch():
    code = (
        "import sys\n"
        "from longskip.engine.data import decode, draws, index, lint, pack, plan, show, sources, tokens\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
