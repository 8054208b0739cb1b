from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longskip.engine.data.index import build_index, load_index, load_table
from longskip.engine.data.lint import MAX_EXAMPLES, lint
from longskip.engine.data.pack import write_shards
from longskip.engine.data.show import CELL, contact_sheet
from longskip.engine.data.sources import open_source
from longskip.engine.data.tokens import Vocabulary
from longskip.errors import DataError, ShardError


def png(i: int, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path):
    write_shards(({"png": png(i), "txt": f"number {i}"} for i in range(25)), tmp_path / "data", per_shard=10)
    return tmp_path / "data"


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_sound_data_are_clean(shards):
    report = lint(shards)
    assert report.ok
    assert (report.samples, report.good, report.shards, report.sha256_checked) == (25, 25, 3, 3)
    assert (report.counts, report.examples, report.longest_caption) == ({}, [], 2)
    assert json.loads(json.dumps(report.to_json()))["ok"] is True


def test_every_fault_is_counted_and_the_rest_is_still_checked(shards):
    index = load_index(shards)
    flip(shards / "00000.tar", int(load_table(shards, index.shards[0])[2]["txt_offset"]))
    padding = int(load_table(shards, index.shards[1])[0]["image_offset"]) - 1  # the header's last, unused byte
    flip(shards / "00001.tar", padding)
    with (shards / "00002.tar").open("r+b") as stream:
        stream.truncate(4096)
    report = lint(shards)
    # A flipped byte of the first header fails its checksum, so that shard is not read at all.
    assert report.counts == {"shard": 2, "shard_crc": 1, "shard_sha256": 1}
    assert (report.samples, report.good, report.sha256_checked) == (25, 9, 1)
    assert {name for name, _, _ in report.examples} == {"00000.tar", "00001.tar", "00002.tar", "000000002"}
    assert not report.ok


def test_a_flipped_byte_between_members_is_seen_by_the_hash_alone(shards):
    row = load_table(shards, load_index(shards).shards[0])[4]
    flip(shards / "00000.tar", int(row["txt_offset"] + row["txt_size"]) + 3)  # padding after the member
    open_source(shards)
    report = lint(shards)
    assert report.counts == {"shard_sha256": 1}
    assert report.good == 25


def test_pictures_captions_and_duplicates(tmp_path):
    write_shards(
        [{"__key__": "a", "png": png(0), "txt": "one two three four"}, {"__key__": "b", "png": png(0), "txt": "x"},
         {"__key__": "c", "png": png(1)[:70], "txt": "x"}, {"__key__": "d", "png": png(2)},
         {"__key__": "e", "png": png(3), "txt": b"\xff"}, {"__key__": "f", "png": b"GIF89a", "txt": "x"}],
        tmp_path / "one",
    )  # fmt: skip
    write_shards([{"__key__": "a", "png": png(9), "txt": "unknownword"}], tmp_path / "two")
    build_index([tmp_path / "one" / "00000.tar", tmp_path / "two" / "00000.tar"])
    report = lint(tmp_path, n_txt=3)
    assert report.counts == {
        "caption_encoding": 1, "caption_missing": 1, "duplicate_image": 1, "duplicate_key": 1, "image_decode": 1,
        "image_format": 1, "text_too_long": 1,
    }  # fmt: skip
    assert report.good == 2  # "b" and the second "a" can be trained on
    # by tokens, the unknown word is 11 bytes
    assert lint(tmp_path, vocabulary=Vocabulary(["x"]), n_txt=10).longest_caption == len("one two three four")
    assert lint(tmp_path, vocabulary=Vocabulary(["x"]), n_txt=10).counts["text_too_long"] == 2


def test_a_plain_folder_is_checked_too(tmp_path):
    for name, data in {"a.png": png(0), "a.txt": b"x", "b.png": png(1), "c.png": png(2), "c.jpg": png(2)}.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "c.txt").write_text("y")
    report = lint(tmp_path)
    assert report.counts == {"caption_missing": 1, "duplicate": 1}
    assert (report.samples, report.good, report.shards) == (4, 2, 0)


def test_captions_without_a_picture_are_named_and_no_fault(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("a.png", "sub/b.png"):
        (tmp_path / name).write_bytes(png(len(name)))
    for name in ("a.txt", "sub/b.txt", "lonely.txt", "sub/a.txt", "notes.md", ".dot.txt", ".hidden/x.txt"):
        (tmp_path / name).write_text("x")
    report = lint(tmp_path)
    assert report.captions_alone == ["lonely.txt", "sub/a.txt"] and report.n_captions_alone == 2
    assert report.ok and (report.samples, report.good, report.bad) == (2, 2, 0)


@pytest.mark.parametrize(
    ("limit", "passed_over", "share", "said"),
    [(0.1, False, 0.25, "2 of 8 samples are bad, 25%, above data.max_bad_share 0.1 (10%): a run would stop"),
     (0.3, False, 0.25, "2 of 8 samples are bad, 25%; data.max_bad_share allows 30%"),
     (0.2, True, 0.125, "1 of 8 samples are bad without the 1 of data.quarantine, 12.5%; data.max_bad_share allows 20%")],
)  # fmt: skip
def test_the_command_says_whether_a_run_would_stop(tmp_path, capsys, limit, passed_over, share, said):
    from longskip.launcher.cli import main

    data = tmp_path / "data"
    data.mkdir()
    for i in range(8):
        (data / f"{i}.png").write_bytes(b"no picture" if i in (2, 5) else png(i))
        (data / f"{i}.txt").write_text("x")
    (data / "lonely.txt").write_text("x")
    group = f"data: {{path: {data}, max_bad_share: {limit}" + (f", quarantine: {tmp_path}/list" if passed_over else "")
    (tmp_path / "list").write_text("5\n")
    (tmp_path / "run.yaml").write_text(f"model: {{preset: uvit-tiny, resolution: 32}}\n{group}}}\n")
    for json_too in (False, True):
        with pytest.raises(SystemExit) as ended:
            main(["data", "lint", str(data), "--config", str(tmp_path / "run.yaml"), *(["--json"] if json_too else [])])
        assert ended.value.code == 1
        out = capsys.readouterr().out
        if json_too:
            told = json.loads(out)
            assert (told["bad"], told["bad_share"], told["max_bad_share"]) == (2, share, limit)
        else:
            assert said in out and "1 caption file(s) without a picture" in out and "    lonely.txt\n" in out


def test_examples_are_bounded(tmp_path):
    for i in range(MAX_EXAMPLES + 20):
        (tmp_path / f"{i}.png").write_bytes(b"x")
        (tmp_path / f"{i}.txt").write_text("x")
    report = lint(tmp_path)
    assert report.counts["image_format"] == MAX_EXAMPLES + 20
    assert len(report.examples) == MAX_EXAMPLES


def test_nothing_to_check_is_an_error(tmp_path, shards):
    with pytest.raises(DataError, match="does not exist"):
        lint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no pictures"):
        lint(tmp_path / "empty")
    (shards / "index.json").unlink()
    with pytest.raises(ShardError, match="longskip data index"):
        lint(shards)


def test_a_contact_sheet_shows_the_pixels(tmp_path):
    write_shards([{"png": png(0, (32, 32)), "txt": "first " * 100}, {"png": png(1, (300, 600)), "txt": "wide"},
                  {"png": b"broken", "txt": "x"}], tmp_path / "a")  # fmt: skip
    source = open_source(tmp_path / "a")
    assert contact_sheet(source, tmp_path / "out" / "sheet.png", n=10, columns=3) == [0, 1, 2]
    sheet = np.asarray(Image.open(tmp_path / "out" / "sheet.png"))
    stored = np.asarray(Image.open(io.BytesIO(png(0, (32, 32)))))
    enlarged = stored.repeat(CELL // 32, 0).repeat(CELL // 32, 1)
    assert np.array_equal(sheet[14 : 14 + CELL, 14 : 14 + CELL], enlarged)
    below = sheet[14 + CELL :, 14 : 14 + CELL]
    assert (below < 100).any()  # ink of the caption
    assert sheet.shape[0] < 500  # a long caption is cut
    chosen = contact_sheet(source, tmp_path / "sheet.png", n=2, seed=1)
    assert len(set(chosen)) == 2
    with pytest.raises(DataError, match="columns 0"):
        contact_sheet(source, tmp_path / "sheet.png", columns=0)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def test_feature_shards_are_read_and_their_numbers_looked_at(tmp_path: Path) -> None:
    latents = [np.full((4, 2, 2), i, np.float16) for i in range(4)]
    latents[2][1, 1, 1] = np.inf
    damaged = _npy(latents[3])[:-2]
    samples = [
        {"__key__": f"{i}", "latent.npy": damaged if i == 3 else _npy(latents[i]), "txt": f"caption {i}"}
        for i in range(4)
    ]
    write_shards(samples, tmp_path / "features")
    report = lint(tmp_path / "features")
    assert (report.samples, report.good) == (4, 2)
    assert report.counts == {"feature_format": 1, "feature_values": 1}
