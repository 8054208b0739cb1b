"""``longskip data encode``: what is typed, what is printed, and what is refused before anything is done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from longskip.engine.configio import validate
from longskip.engine.data.encode import encode_shards
from longskip.engine.data.encoding import Encoding
from longskip.engine.encoders import Encoders
from longskip.errors import ConfigError, DataError, EncoderError, ShardError, UnfitDataError
from longskip.launcher.cli import main
from longskip.launcher.cli_encode import parse_size
from tests.engine.encode_folders import (
    encode_again,
    encode_whole,
    make_folder,
    of,
    opened,
    tree,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("encode"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    return encode_whole(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "bf16"}, "stored in 'bf16'"),
        ({"batch": 0}, "batch 0"),
        ({"per_shard": 0}, "per_shard 0"),
        ({"rank": 2, "world": 2}, "rank 2 of 2"),
        ({"rank": 0, "world": 0}, "rank 0 of 0"),
        ({"max_bad_share": 1.5}, r"max_bad_share 1\.5"),
        ({"buckets": [(32, 30)]}, "the bucket 32x30 does not divide"),
        ({"buckets": [(0, 32)]}, "the bucket 0x32 does not divide"),
        ({"buckets": [(32, 32), (16, 16)]}, "same aspect ratio"),
        ({"encoders": lambda f: of(f, None, None)}, "no encoder is named"),
        ({"encoders": lambda f: of(f, vae=None)}, "pictures must be kept"),
        ({"encoders": lambda f: of(f, vae=None), "keep_pictures": True, "buckets": [(8, 8)]}, "pictures must be kept"),
        ({"encoders": lambda f: Encoders.at(f / "vae", None, (32, 36), "cpu")}, "32x36 is not divisible"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything(folder, tmp_path, settings, message):
    make = settings.get("encoders", of)
    with pytest.raises(ConfigError, match=message):
        encode_shards(folder / "shards", tmp_path / "out", **{**settings, "encoders": make(folder)})
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_are_refused(folder, whole, tmp_path):
    with pytest.raises(ConfigError, match="is the folder that is encoded"):
        encode_shards(folder / "shards", folder / "shards", of(folder))
    with pytest.raises(DataError, match="holds no pictures but features already"):
        encode_shards(whole, tmp_path / "out", of(folder))
    shutil.copytree(folder / "shards", tmp_path / "other")
    with pytest.raises(DataError, match="already holds data that were not encoded here"):
        encode_shards(folder / "shards", tmp_path / "other", of(folder))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.jpg").write_bytes(b"x")
    with pytest.raises(UnfitDataError, match="holds pictures"):
        encode_shards(folder / "shards", tmp_path / "mine", of(folder))
    with pytest.raises(ShardError, match="URL or a pipe"):
        encode_shards(folder / "shards", "s3://bucket/out", of(folder))
    with pytest.raises(DataError, match="holds no encoding"):
        Encoding(tmp_path / "nowhere").finish(0.05)
    out = tmp_path / "broken"
    shutil.copytree(whole, out)
    (out / "encoding" / "settings.json").write_text("{}")
    with pytest.raises(DataError, match=r"settings\.json cannot be read"):
        encode_again(folder, out)


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["data", "encode", *arguments])
    return int(ended.value.code or 0)


def test_the_command_encodes_by_rank_and_finishes(folder, whole, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    typed = [
        str(folder / "shards"), "--out", str(out), "--vae", str(folder / "vae"), "--text", str(folder / "t5"),
        "--resolution", "32", "--n-tokens", "20", "--batch", "3", "--device", "cpu",
    ]  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert command(*typed, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["rank"], told["world"], told["samples"], told["complete"]) == (0, 2, 6, False)
    assert command("--out", str(out), "--finish") == 1
    assert "1 of 3 shards are not encoded" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert command(*typed) == 0
    printed = capsys.readouterr().out
    for line in (
        f"data.path={out}",
        "model.resolution=32",
        "encoders.vae.scale=0.18215",
        "encoders.text.width=32",
    ):
        assert line in printed
    assert command("--out", str(out), "--finish", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(out), "samples": 10, "shards": 3, "complete": True}
    assert tree(out) == tree(whole)
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert command(*typed, "--dtype", "fp32") == 2
    assert "encoded with other settings" in capsys.readouterr().err


def test_the_command_makes_the_buckets_that_a_run_of_auto_expects(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    typed = ["--vae", str(folder / "vae"), "--resolution", "64", "--buckets", "auto", "--patch", "1"]
    assert command(str(folder / "shards"), "--out", str(out), "--device", "cpu", *typed, "--json") == 0
    assert json.loads(capsys.readouterr().out)["complete"]
    tree = {
        "model": {"preset": "uvit-tiny", "resolution": 64, "patch": 1},
        "data": {"path": str(out), "buckets": "auto"},
        "encoders": {"vae": {"kind": "vae"}},
    }
    assert len(opened(validate(tree), out)) == 10
    tree["model"]["patch"] = 2
    with pytest.raises(EncoderError, match=r"in the buckets .* data\.buckets is"):
        opened(validate(tree), out)


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["--resolution", "big"], {}, "is no size in pixels"),
        (["--buckets", "32x32,"], {}, "is no size in pixels"),
        (["--text-kind", "bert"], {}, "one of auto, t5, clip"),
        (["--dtype", "fp8"], {}, "one of fp16, fp32"),
        (["--compute", "fp16"], {}, "one of fp32, bf16"),
        (["--too-long", "cut"], {}, "one of error, truncate"),
        (["--on-damage", "ignore"], {}, "one of stop, skip"),
        (["--device", "tpu9"], {}, "CUDA devices are here"),
        (["--device", "cuda:99"], {}, "CUDA devices are here"),
        (["--vae", "nowhere"], {}, "nowhere is not a folder"),
        ([], {"RANK": "x"}, "RANK='x' is no whole number"),
        ([], {"RANK": "1"}, "rank 1 of 1"),
        ([], {}, "no encoder is named"),
    ],
)
def test_what_is_typed_wrongly_is_said(folder, tmp_path, capsys, monkeypatch, arguments, variables, message):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if variables.get("RANK") == "1":
        arguments = ["--vae", str(folder / "vae")]
    assert command(str(folder / "shards"), "--out", str(tmp_path / "out"), *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_sizes_are_read():
    assert parse_size("256") == (256, 256)
    assert parse_size(" 192X320") == (192, 320)
    for text in ("", "x", "0", "12x", "1x2x3", "-4", "4.5", "999999"):
        with pytest.raises(ConfigError):
            parse_size(text)
