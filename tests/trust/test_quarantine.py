"""Samples on ``data.quarantine`` are not read, and nothing else changes: neither the others' places nor what is drawn."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from longskip.engine import checkpoint
from longskip.engine.data.assembler import Assembler
from longskip.engine.data.index import build_index
from longskip.engine.data.lint import lint
from longskip.engine.data.mix import MixedSource
from longskip.engine.data.plan import Plan
from longskip.engine.data.reader import Reader
from longskip.engine.data.sources import ShardSource, open_source
from longskip.engine.data.tokens import Vocabulary
from longskip.engine.quarantine import REASONS, count_reasons, quarantine_of, read_list, told
from longskip.errors import ConfigError, DataError
from longskip.launcher.cli import app
from tests.engine.test_resume import KINDS, losses
from tests.ranks import small_config, train_ranks
from tests.trust.data import features, picture, pictures, tar

ROOT = Path(__file__).resolve().parents[2]


def spoil(folder: Path, sample: int) -> str:
    """One byte in the middle of a sample's picture flipped; returns its key."""
    source = ShardSource(folder)
    shard, (row,) = int(source.locate(np.array([sample]))[0][0]), source.locate(np.array([sample]))[1]
    table, key = source.table(shard), source.key(sample)
    source.close()
    with open(folder / source.index.shards[shard].file, "r+b") as file:
        at = int(table["image_offset"][row] + table["image_size"][row] // 2)
        file.seek(at)
        (value,) = file.read(1)
        file.seek(at)
        file.write(bytes([value ^ 1]))
    return key


def batches(source: Any, quarantine: np.ndarray | None, workers: int = 0) -> list[Any]:
    words = Vocabulary.build(["number 1"], 300)
    with Reader(
        source, Plan(len(source), 4, 3), words, resolution=(8, 8), n_txt=16, micro=4, seed=3, flip=True, workers=workers,
        caption_dropout=0.3, quarantine=quarantine,
    ) as reader:  # fmt: skip
        return [next(reader)[0] for _ in range(5)]


@pytest.mark.parametrize("workers", [0, 1])
def test_others_are_bitwise_the_same(tmp_path: Path, workers: int) -> None:
    folder = pictures(tmp_path / "a")
    straight = batches(open_source(folder), None)
    for sample in (2, 7):
        spoil(folder, sample)  # would stop the reader
    for found, expected in zip(batches(open_source(folder), np.array([2, 7]), workers), straight, strict=True):
        out = torch.isin(expected.samples, torch.tensor([2, 7]))
        assert found.keys == expected.keys and found.samples.tolist() == expected.samples.tolist()
        assert found.weight.tolist() == (~out).float().tolist()
        assert torch.equal(found.noise, expected.noise) and torch.equal(found.time_normal, expected.time_normal)
        assert torch.equal(found.clean[~out], expected.clean[~out]) and not found.clean[out].any()
        tokens = found.conditions["tokens"]
        assert torch.equal(tokens[~out], expected.conditions["tokens"][~out])
        assert [(bad["sample"], bad["reason"]) for bad in found.bad] == [
            (int(sample), "quarantined") for sample in expected.samples[out]
        ]


def test_features_are_passed_over_too(tmp_path: Path) -> None:
    source = open_source(features(tmp_path / "a"))
    whole = Assembler(source, None, (4, 4), 3, latent_shape=(4, 4, 4))
    out = Assembler(source, None, (4, 4), 3, latent_shape=(4, 4, 4), quarantine=np.array([1, 5]))
    numbers = np.array([0, 1, 2, 5])
    expected, found = whole.assemble(np.zeros(4), numbers), out.assemble(np.zeros(4), numbers)
    assert found.weight.tolist() == [1, 0, 1, 0] and found.keys == expected.keys
    for name in ("text", "text_mask"):
        assert torch.equal(found.conditions[name][::2], expected.conditions[name][::2])
        assert not found.conditions[name][1::2].any()
    assert torch.equal(found.clean[::2], expected.clean[::2]) and not found.clean[1::2].any()


class Watched:
    """A source that tells which samples were read."""

    features = None

    def __init__(self, inner: Any) -> None:
        self.inner, self.read_ones = inner, []

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def read(self, i: int) -> Any:
        self.read_ones.append(i)
        return self.inner.read(i)


def test_nothing_of_them_is_read(tmp_path: Path) -> None:
    source = Watched(open_source(pictures(tmp_path / "a")))
    batches(source, np.array([0, 3, 11]))
    assert set(source.read_ones) == set(range(12)) - {0, 3, 11}


# --- lists ------------------------------------------------------------------------------------------------------------


def listed(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_lists_name_samples_by_key_and_number(tmp_path: Path) -> None:
    source = open_source(pictures(tmp_path / "a"))
    keys = [source.key(i) for i in range(12)]
    entry = json.dumps({"key": keys[4], "sample": 4, "reason": "image_decode", "detail": "x", "step": 3})
    # by key; by both; the number is of other data; twice; unknown; blank lines; Windows' line ends
    text = f"{keys[1]}\r\n\n{entry}\n{json.dumps({'key': keys[7], 'sample': 2})}\n{keys[1]}\nnobody\n"
    found = quarantine_of(listed(tmp_path / "list", text), source)
    assert found.samples.tolist() == [1, 4, 7] and found.samples.dtype == np.int64
    assert (found.entries, found.unknown) == (4, 1)
    assert quarantine_of(None, source).to_json()["samples"] == 0


def test_a_key_of_several_data_sets_is_all_of_them_and_a_number_tells_them_apart(tmp_path: Path) -> None:
    members = [open_source(pictures(tmp_path / name, 6)) for name in ("a", "b")]
    mixed = MixedSource(members, [1, 1], ["a", "b"])
    key = mixed.key(2)
    assert mixed.key(8) == key
    assert quarantine_of(listed(tmp_path / "list", key), mixed).samples.tolist() == [2, 8]
    text = json.dumps({"key": key, "sample": 8})
    assert quarantine_of(listed(tmp_path / "list", text), mixed).samples.tolist() == [8]


def test_a_folder_of_pictures_has_keys_too(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / "f").mkdir(exist_ok=True)
        (tmp_path / "f" / f"{name}.png").write_bytes(picture(1))
        (tmp_path / "f" / f"{name}.txt").write_text(name)
    assert quarantine_of(listed(tmp_path / "list", "b"), open_source(tmp_path / "f")).samples.tolist() == [1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nobody\n", "none of its 1 entries"),
        ('{"key": 3}\n', "line 1"),
        ('a\n{"key": "a", "sample": "x"}\n', "line 2"),
        ('{"sample": 3}\n', "line 1"),
        ("{\n", "line 1"),
        ("{" + '"a":{' * 100_000 + "\n", "line 1"),
        (b"\xff\xfe\n", "line 1"),
        (b"x" * (1 << 21), "line 1: longer than"),
    ],
)
def test_lists_that_are_none(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises((ConfigError, DataError), match=said):
        quarantine_of(listed(tmp_path / "list", text), open_source(pictures(tmp_path / "a")))
    with pytest.raises(ConfigError, match="cannot be read"):
        quarantine_of(str(tmp_path / "no-list"), open_source(tmp_path / "a"))


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path: Path) -> None:
    assert read_list(Path(listed(tmp_path / "list", '{"key": "a", "sample": 1}\n{"key": "b", "sam'))) == [("a", 1)]


# --- counters ---------------------------------------------------------------------------------------------------------


def test_reasons_are_those_of_the_code() -> None:
    """A reason that is not among them would be counted as another one."""
    found = set()
    for path in (ROOT / "longskip").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("BadSampleError", "_rows_differ"):
                first = node.args[0]
                if isinstance(first, ast.Constant):
                    found.add(str(first.value))
                elif isinstance(first, ast.JoinedStr):
                    end = str(getattr(first.values[-1], "value", ""))
                    found |= {f"{name}{end}" for name in ("latent", "text", "mask")}
    assert {"image_decode", "text_shape", "quarantined"} <= found
    assert found <= set(REASONS), found - set(REASONS)
    assert list(count_reasons([])) == list(REASONS)
    counts = count_reasons([{"reason": "image_decode"}, {"reason": "strange"}, {"reason": "image_decode"}])
    assert (counts["image_decode"], counts["other"], sum(counts.values())) == (2, 1, 3)
    assert told({"caption_missing": 1, "image_decode": 3, "image_size": 0}) == "image_decode 3, caption_missing 1"


# --- a run ------------------------------------------------------------------------------------------------------------

STEPS = 6


def test_a_list_that_grows_between_attempts(tmp_path: Path, shapes: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two ranks. A run with two spoilt samples counts them; its own list, from the middle on, gives the same weights bit
    for bit, and counts them as known."""
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    numbers = {"train": {"steps": STEPS}, "checkpoint": {"every": 3}, "logging": {"every": 1}}
    config = small_config(data, **numbers, data={"on_damage": "skip", "max_bad_share": 0.5})
    plan = Plan(300, 8, config.train.seed)
    early, late = (int(plan.batch_at(k)[1][slot]) for k, slot in ((0, 1), (4, 6)))
    keys = {spoil(data / "train", sample): sample for sample in (early, late)}

    assert train_ranks(2, config, tmp_path / "straight") == [0, 0]
    rows = [json.loads(line) for line in (tmp_path / "straight" / "bad_samples.jsonl").read_text().splitlines()]
    assert {(row["key"], row["sample"], row["reason"]) for row in rows} == {
        (k, s, "shard_crc") for k, s in keys.items()
    }
    last = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()][-1]
    assert (last["bad_samples"], last["bad/shard_crc"]) == (2, 2)
    assert "bad: shard_crc 2" in capfd.readouterr().out
    assert json.loads((tmp_path / "straight" / "run.json").read_text())["bad_samples"] == {"shard_crc": 2}

    own = str(tmp_path / "run" / "bad_samples.jsonl")
    half = config.model_copy(update={"train": config.train.model_copy(update={"steps": 3})})
    assert train_ranks(2, half, tmp_path / "run") == [0, 0]
    grown = listed(
        tmp_path / "grown", Path(own).read_text() + f"{next(key for key, sample in keys.items() if sample == late)}\n"
    )
    rest = small_config(data, **numbers, data={"on_damage": "stop", "max_bad_share": 0.5, "quarantine": grown})
    assert train_ranks(2, rest, tmp_path / "run") == [0, 0]  # on_damage: stop would end it if any of them were read
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    with (
        checkpoint.Archive(tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}") as ours,
        checkpoint.Archive(tmp_path / "straight" / "checkpoints" / f"step-{STEPS:08d}") as theirs,
    ):
        for kind in KINDS:
            a, b = ours.full(kind), theirs.full(kind)
            assert all(torch.equal(a[name], b[name]) for name in b), kind
    summary = json.loads((tmp_path / "run" / "run.json").read_text())
    assert summary["bad_samples"] == {"shard_crc": 1, "quarantined": 1}
    assert (summary["quarantine"]["samples"], summary["quarantine"]["unknown"]) == (2, 0)
    assert [json.loads(line)["sample"] for line in Path(own).read_text().splitlines()] == [early]


# --- lint -------------------------------------------------------------------------------------------------------------


def test_lint_writes_the_list(tmp_path: Path) -> None:
    members = []
    for i in range(6):
        members += [(f"{i}.png", picture(i) if i != 2 else b"no picture"), (f"{i}.txt", f"number {i}".encode())]
    members += [("7.png", picture(0)), ("7.txt", b"the same picture"), ("8.png", picture(8))]  # no caption
    (tmp_path / "a").mkdir()
    tar(tmp_path / "a" / "0.tar", members)
    build_index(tmp_path / "a")
    out = tmp_path / "list.jsonl"
    result = CliRunner().invoke(app, ["data", "lint", str(tmp_path / "a"), "--quarantine", str(out)])
    assert result.exit_code == 1 and "2 sample(s) written" in result.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["key"], row["sample"], row["reason"]) for row in rows] == [
        ("2", 2, "image_format"), ("8", 7, "caption_missing"),
    ]  # fmt: skip
    source = open_source(tmp_path / "a")
    found = quarantine_of(str(out), source)
    assert found.samples.tolist() == [2, 7]
    bad = [bad for batch in batches(source, found.samples) for bad in batch.bad]
    assert {item["reason"] for item in bad} == {"quarantined"}
    report = lint(tmp_path / "a")
    assert report.samples - report.good == 2 and report.counts["duplicate_image"] == 1
