"""A folder in the making: killed and started again, by several ranks, and with other settings."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from longskip.engine.data import encode as encode_module
from longskip.engine.data.encode import encode_shards
from longskip.engine.data.encoding import Encoding
from longskip.engine.data.pack import write_shards
from longskip.engine.data.sources import open_source
from longskip.engine.encoders import Encoders
from longskip.errors import DataError, EncoderError, RunLockedError
from tests.engine.encode_folders import (
    encode_again,
    encode_whole,
    make_folder,
    of,
    sample,
    tree,
)
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("encode"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    return encode_whole(folder)


def kill_after(samples: int):
    def progress(done: int, total: int) -> None:
        if done >= samples:
            os.kill(os.getpid(), signal.SIGKILL)

    return progress


@pytest.mark.parametrize("samples", [3, 4, 7, 10])
def test_a_killed_run_started_again_gives_the_same_bytes(folder, whole, tmp_path, samples):
    """Killed in the first shard, at its end, in the second, and at the end of the last, before the index."""
    out = tmp_path / "out"
    assert run_ranks(1, partial(encode_again, progress=kill_after(samples)), folder, out) == [-signal.SIGKILL]
    assert not (out / "index.json").exists()
    assert list(out.glob("*.part"))
    with pytest.raises(DataError):
        open_source(out)
    seen = []
    report = encode_again(folder, out, progress=lambda done, total: seen.append((done, total)))
    assert (report.encoded, report.finished) == {3: (3, 0), 4: (3, 0), 7: (2, 1), 10: (1, 2)}[samples]
    assert report.samples == 10
    assert seen[-1] == (10, 10)
    assert tree(out) == tree(whole)


@pytest.mark.parametrize("step", ["write_table", "replace", "record", "finish"])
def test_a_kill_between_any_two_steps_loses_nothing(folder, whole, tmp_path, step):
    out = tmp_path / "out"

    def dying(*arguments, **keywords):
        os.kill(os.getpid(), signal.SIGKILL)

    def act():
        from longskip.engine.data import encoding

        if step == "write_table":
            encoding.write_table = dying
        elif step == "replace":
            encoding.os.replace = lambda a, b: dying() if str(b).endswith("00001.tar") else os.rename(a, b)
        elif step == "record":
            Encoding._record_path = lambda self, file, path=Encoding._record_path: (
                dying() if (out / "00001.tar").exists() else path(self, file)
            )
        else:
            encoding.save_index = dying
        encode_again(folder, out)

    assert run_ranks(1, act) == [-signal.SIGKILL]
    assert not (out / "index.json").exists()
    report = encode_again(folder, out)
    assert report.finished == {"write_table": 0, "replace": 1, "record": 1, "finish": 3}[step]
    assert tree(out) == tree(whole)


def test_two_ranks_one_after_the_other_give_what_one_gives(folder, whole, tmp_path):
    out = tmp_path / "out"
    second = encode_again(folder, out, rank=1, world=2)
    assert (second.shards, second.encoded, second.samples, second.complete) == (1, 1, 4, False)
    assert not (out / "index.json").exists()
    with pytest.raises(DataError, match=r"2 of 3 shards are not encoded, the first is 00000\.tar"):
        Encoding(out).finish(0.05)
    first = encode_again(folder, out, rank=0, world=2)
    assert (first.shards, first.samples, first.complete) == (2, 6, True)
    assert tree(out) == tree(whole)
    for rank in range(5):  # more ranks than shards
        report = encode_again(folder, out, rank=rank, world=5)
        assert (report.encoded, report.shards, report.complete) == (0, int(rank < 3), True)
    assert tree(out) == tree(whole)


def test_two_ranks_at_once_give_what_one_gives(folder, whole, tmp_path):
    out = tmp_path / "out"

    def act():
        encode_again(folder, out, rank=int(os.environ["RANK"]), world=2)

    assert run_ranks(2, act) == [0, 0]
    assert tree(out) == tree(whole)


def test_a_damaged_or_missing_shard_is_made_again(folder, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    data = bytearray((out / "00000.tar").read_bytes())
    data[5000] ^= 1
    (out / "00000.tar").write_bytes(data)
    (out / "00001.tar").unlink()
    (out / "00002.idx.npy").unlink()
    report = encode_again(folder, out)
    assert (report.encoded, report.finished) == (3, 0)
    assert tree(out) == tree(whole)
    (out / "encoding" / "shards" / "00001.tar.json").write_text("{")
    assert encode_again(folder, out).encoded == 1
    assert tree(out) == tree(whole)


def test_a_finished_folder_is_only_verified(folder, whole, monkeypatch):
    def never(self):
        raise AssertionError("weights were loaded")

    before = tree(whole)
    monkeypatch.setattr(Encoders, "load", never)
    monkeypatch.setattr(encode_module, "_made_with", lambda encoders: {"torch": "another"})
    report = encode_again(folder, whole)
    assert (report.encoded, report.finished, report.samples, report.complete) == (0, 3, 10, True)
    assert tree(whole) == before


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda f: {"encoders": of(f, vae="other_vae")}, r"encoders\.vae\.sha256: '\w{64}' there, '\w{64}' now"),
        (lambda f: {"encoders": of(f, "clip")}, r"encoders\.text\.kind: 't5' there, 'clip' now"),
        (lambda f: {"encoders": of(f, n_tokens=19)}, r"encoders\.text\.n_tokens: 20 there, 19 now"),
        (lambda f: {"encoders": of(f, too_long="truncate")}, r"too_long: 'error' there, 'truncate' now"),
        (lambda f: {"encoders": of(f, None)}, r"encoders\.text\.kind: 't5' there, None now"),
        (lambda f: {"encoders": of(f, dtype=torch.bfloat16)}, r"computed_in: 'fp32' there, 'bf16' now"),
        (
            lambda f: {"encoders": Encoders.at(f / "vae", f / "t5", (64, 32), "cpu", n_tokens=20)},
            r"encoders\.vae\.resolution: \[32, 32\] there, \[64, 32\] now",
        ),
        (lambda f: {"dtype": "fp32"}, r"encoders\.text\.dtype: 'fp16' there, 'fp32' now"),
        (lambda f: {"buckets": [(32, 32)]}, r"encoders\.vae\.buckets: None there, \[\[32, 32\]\] now"),
        (lambda f: {"keep_pictures": True}, "pictures: False there, True now"),
    ],
)
def test_a_folder_encoded_with_other_settings_is_refused(folder, whole, how, message):
    before = tree(whole)
    with pytest.raises(EncoderError, match=message) as caught:
        encode_shards(folder / "shards", whole, **({"encoders": of(folder)} | how(folder)))
    assert "another folder" in caught.value.cure
    assert tree(whole) == before


def test_other_data_and_other_versions_are_refused(folder, whole, tmp_path, monkeypatch):
    write_shards((sample(i) for i in range(9)), tmp_path / "shards", per_shard=4)
    with pytest.raises(EncoderError, match=r"source: '\w{64}' there, '\w{64}' now"):
        encode_shards(tmp_path / "shards", whole, of(folder))
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "encoding" / "shards" / "00001.tar.json").unlink()
    monkeypatch.setattr(encode_module, "_made_with", lambda encoders: {"torch": "another"})
    with pytest.raises(EncoderError, match=r"made_with\.torch: '2\.\S+' there, 'another' now"):
        encode_again(folder, out)


def test_a_shard_that_another_process_writes_is_left_alone(folder, whole, tmp_path):
    out = tmp_path / "out"
    encode_again(folder, out, rank=1, world=3)
    with (out / "00000.tar.part").open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.write(b"half")
        stream.flush()
        with pytest.raises(RunLockedError, match=r"00000\.tar\.part is being written by another process"):
            encode_again(folder, out, rank=0, world=3)
        assert (out / "00000.tar.part").read_bytes() == b"half"
    with (out / "00000.tar.part").open("ab") as stream:
        stream.write(bytes(1 << 20))  # longer than the shard: what a killed process left
    assert encode_again(folder, out).complete
    assert tree(out) == tree(whole)
