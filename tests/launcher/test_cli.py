"""The commands as a user types them, on real data and real runs, in processes of their own where it matters."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longskip.engine.configio import dump_yaml
from longskip.launcher.local import rank_environment
from tests.ranks import small_config

Result = subprocess.CompletedProcess


def longskip(*arguments: str | Path, ranks: int = 1, timeout: float = 240, **environment: str) -> Result[str]:
    return subprocess.run(
        [sys.executable, "-m", "longskip.launcher", *map(str, arguments)],
        env=rank_environment(ranks) | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="module")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``run.yaml`` and the finished ``runs/run`` of ``longskip launch --local 2``."""
    home = tmp_path_factory.mktemp("home")
    config = small_config(
        shapes,
        train={"steps": 6, "batch_size": 8},
        checkpoint={"every": 3},
        eval={"every": 3, "judge": "shapes", "judge_count": 8, "sample_steps": 2},
        logging={"samples_every": 3, "sample_steps": 2, "tensorboard": True, "every": 2},
    )
    (home / "run.yaml").write_text(dump_yaml(config))
    old = Path.cwd()
    os.chdir(home)
    try:
        done = longskip("launch", "--local", "2", "--", "train", "run.yaml", ranks=2)
    finally:
        os.chdir(old)
    assert done.returncode == 0, done.stderr
    assert "step 6/6" in done.stdout and "images/s" in done.stdout and "eta" in done.stdout
    return home


def test_the_run_folder(trained: Path) -> None:
    run = trained / "runs" / "run"
    for name in ("config.yaml", "ds_config.json", "environment.json", "metrics.jsonl", "ledger.jsonl", "run.json"):
        assert (run / name).is_file(), name
    assert json.loads((run / "ds_config.json").read_text())["zero_optimization"]["stage"] == 3
    assert json.loads((run / "run.json").read_text())["status"] == "done"
    assert list((run / "events").iterdir()) and (run / "logs" / "rank-0.log").is_file()
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["step-00000003", "step-00000006"]
    assert not [p for p in run.rglob("*") if p.suffix in (".pt", ".pkl", ".pth", ".bin")]


def test_sample_is_deterministic(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    (trained / "prompts.txt").write_text("# two\na small red circle, center\n\na big blue star at the top left\n")
    pictures = []
    for out in ("one", "two"):
        done = longskip("sample", "run", "--prompts", "prompts.txt", "--steps", "3", "--out", out, "--json")
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert said["checkpoint"] == "step-00000006" and said["weights"] == "ema" and len(said["files"]) == 2
        pictures.append([np.asarray(Image.open(file)) for file in said["files"]])
    assert all(np.array_equal(a, b) for a, b in zip(*pictures, strict=True))
    raw = longskip("sample", "run", "--prompt", "a small red circle, center", "--weights", "raw", "--out", "raw",
                   "--checkpoint", "3")  # fmt: skip
    assert raw.returncode == 0 and "step-00000003 (raw weights)" in raw.stdout


def test_sample_overwrites_nothing_and_names_words_it_does_not_know(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    for number in ("001", "002"):
        done = longskip("sample", "run", "--prompt", "a small red zebra, center", "--steps", "1")
        assert done.returncode == 0 and "zebra" in done.stderr and "red" not in done.stderr.partition("captions:")[2]
        assert (trained / "runs" / "run" / "drawn" / number / "grid.png").is_file()


def test_evaluate_and_report(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    done = longskip("evaluate", "run", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((trained / "runs" / "run" / "eval" / result["file"]).read_text())
    for key in ("weights", "sampler", "steps", "guidance", "seed", "count", "checkpoint"):
        assert key in result
    assert result["judge"]["seen"]["count"] == result["judge"]["held_out"]["count"] == 4
    assert len(result["loss"]["bins"]) == 4
    page = longskip("report", "run")
    assert page.returncode == 0, page.stderr
    html = (trained / "runs" / "run" / "report.html").read_text()
    assert (
        page.stdout.strip().endswith("report.html")
        and "uvit-tiny" in html
        and "http://" not in html.replace("http://www.w3.org", "")
    )


def test_refusals_on_a_run(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is one message with a cure and a usage or failure code, and the run stays as it was."""
    monkeypatch.chdir(trained)
    before = (trained / "runs" / "run" / "metrics.jsonl").read_bytes()
    cases = [
        (("train", "run.yaml", "optim.lr=9e-9"), 2, ["optim.lr", "train.name"]),
        (("sample", "run", "--prompt", "red " * 40), 2, ["40 tokens", "the limit is 16"]),
        (("sample", "run"), 2, ["--prompt"]),
        (("sample", "nowhere", "--prompt", "x"), 2, ["nowhere", "run"]),
        (("sample", "run", "--prompt", "x", "--checkpoint", "77"), 2, ["77", "step-00000006"]),
        (("sample", "run", "--prompt", "x", "--weights", "best"), 2, ["best", "ema, raw"]),
        (("sample", "run", "--prompt", "x", "--sampler", "magic"), 2, ["magic", "euler"]),
        (("launch", "--local", "3", "--", "train", "run.yaml", "train.name=other"), 2, ["3 rank(s)", "[1, 2, 4, 8]"]),
        (("launch", "--local", "2", "--", "evaluate", "run"), 2, ["train only"]),
        (("report", "nothing"), 2, ["nothing"]),
    ]
    for arguments, code, words in cases:
        done = longskip(*arguments)
        assert done.returncode == code, (arguments, done.stderr)
        assert "Traceback" not in done.stderr
        for word in words:
            assert word in done.stderr, (arguments, word, done.stderr)
    assert (trained / "runs" / "run" / "metrics.jsonl").read_bytes() == before


def test_two_jobs_in_one_folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longskip.engine.runs import RunFolder
    from longskip.errors import RunLockedError

    monkeypatch.chdir(trained)
    first = RunFolder(trained / "runs" / "run")
    first.lock()
    try:
        done = longskip("train", "run.yaml")
        assert done.returncode == 1 and f"process {os.getpid()}" in done.stderr and "Traceback" not in done.stderr
    finally:
        first.unlock()
    with pytest.raises(RunLockedError, match="in use"):
        again = [RunFolder(trained / "runs" / "run") for _ in range(2)]
        try:
            for folder in again:
                folder.lock()
        finally:
            for folder in again:
                folder.unlock()


def test_a_plain_folder_trains_without_conversion(shapes: Path, in_tmp: Path) -> None:
    """Pictures with .txt beside them, a configuration from ``config new``, one rank, one bad picture among them."""
    from longskip.engine.data.sources import open_source

    source = open_source(shapes / "train")
    folder = in_tmp / "pictures"
    folder.mkdir()
    for i in range(24):
        raw = source.read(i)
        (folder / f"{i:03d}.png").write_bytes(raw.image)
        (folder / f"{i:03d}.txt").write_text(raw.captions[0][0])
    (folder / "007.png").write_bytes(b"this is no picture")
    made = longskip(
        "config", "new", "--preset", "uvit-tiny", "--data", "pictures", "--out", "mine.yaml", "--steps", "3"
    )
    assert made.returncode == 0, made.stderr
    overrides = ["train.batch_size=8", "logging.samples_every=0", "logging.every=1", "data.max_bad_share=0.2"]
    done = longskip("train", "mine.yaml", *overrides)
    assert done.returncode == 0, done.stderr
    bad = [json.loads(line) for line in (in_tmp / "runs" / "mine" / "bad_samples.jsonl").read_text().splitlines()]
    assert [entry["key"] for entry in bad] == ["007"] and bad[0]["reason"]
    nothing = longskip("evaluate", "mine")
    assert nothing.returncode == 2 and "--judge nearest" in nothing.stderr
    near = longskip("evaluate", "mine", "--judge", "nearest", "--count", "4", "--steps", "1", "--json")
    assert near.returncode == 0, near.stderr
    result = json.loads(near.stdout)["nearest"]
    assert result["count"] == 4 and result["chance"] == 0.25 and result["among_all"] == 23
    strict = longskip("train", "mine.yaml", *overrides[:3], "train.name=strict", "data.max_bad_share=0")
    assert strict.returncode == 1 and "data.max_bad_share" in strict.stderr and "bad_samples.jsonl" in strict.stderr


def test_bad_data_is_refused_before_work(shapes: Path, in_tmp: Path) -> None:
    (in_tmp / "run.yaml").write_text(dump_yaml(small_config(shapes)))
    (in_tmp / "empty").mkdir()
    shutil.copytree(shapes / "train", in_tmp / "cut")
    shard = in_tmp / "cut" / "00000.tar"
    shard.write_bytes(shard.read_bytes()[:-20480])
    shutil.copytree(shapes / "train", in_tmp / "lost")
    (in_tmp / "lost" / "00000.tar").unlink()
    shutil.copytree(shapes / "train", in_tmp / "plain")
    for name in ("index.json", "00000.idx.npy"):
        (in_tmp / "plain" / name).unlink()
    cases = [
        ("data.path=empty", ["empty"]),
        ("data.path=nowhere", ["nowhere"]),
        ("data.path=cut", ["00000.tar", "bytes"]),
        ("data.path=lost", ["00000.tar"]),
        ("data.path=plain", ["longskip data index"]),
        ("data.path='pipe:cat x.tar'", ["pipe:"]),
        ("train.batch_size=4000", ["300 samples", "4000"]),
    ]
    for override, words in cases:
        done = longskip("train", "run.yaml", override)
        assert done.returncode in (1, 2) and "Traceback" not in done.stderr, (override, done.stderr)
        for word in words:
            assert word in done.stderr, (override, done.stderr)
    assert not list(in_tmp.glob("runs/*"))  # a start that never became a run leaves nothing behind


def test_data_commands(in_tmp: Path) -> None:
    assert longskip("data", "make", "shapes", "--out", "s", "--count", "30", "--objects", "mixed").returncode == 0
    assert longskip("data", "show", "s", "--out", "sheet.png", "--count", "6").returncode == 0
    assert min(Image.open("sheet.png").size) > 100
    clean = longskip("data", "lint", "s", "--json")
    assert clean.returncode == 0 and json.loads(clean.stdout)["samples"] == 30
    shard = in_tmp / "s" / "00000.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 255
    shard.write_bytes(data)
    assert longskip("data", "lint", "s").returncode == 1
    (in_tmp / "run.yaml").write_text("encoders: {text: {n_tokens: 4}}\n")
    long = longskip("data", "lint", "s", "--config", "run.yaml", "--json")
    assert long.returncode == 1 and json.loads(long.stdout)["counts"]["text_too_long"] >= 25
    (in_tmp / "p").mkdir()
    Image.new("RGB", (20, 20), "red").save(in_tmp / "p" / "a.png")
    (in_tmp / "p" / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "red"}\n{"file_name": "b.png", "text": "no"}\n'
    )
    packed = longskip("data", "pack", "p", "out", "--json")
    assert packed.returncode == 0 and json.loads(packed.stdout)["packed"] == 1, packed.stderr
    (in_tmp / "out" / "index.json").unlink()
    assert longskip("data", "index", "out").returncode == 0
    refused = longskip("data", "make", "faces")
    assert refused.returncode == 2 and "shapes, emoji" in refused.stderr


def test_doctor_presets_and_dry_run(shapes: Path, in_tmp: Path) -> None:
    found = json.loads(longskip("doctor", "--json").stdout)
    assert {f["what"] for f in found} >= {"torch", "deepspeed", "kernels", "devices"}
    rows = {row["preset"]: row for row in json.loads(longskip("presets", "--json").stdout)}
    assert rows["uvit-8b"]["parameters"] == 7_971_360_932
    (in_tmp / "run.yaml").write_text(dump_yaml(small_config(shapes)))
    shown = longskip("train", "run.yaml", "--dry-run", "--verbose", "optim.lr=5e-4")
    assert shown.returncode == 0 and "lr: 0.0005" in shown.stdout and '"stage": 3' in shown.stdout
    assert not (in_tmp / "runs").exists()


@pytest.mark.slow
def test_ranks_started_by_torchrun(shapes: Path, in_tmp: Path) -> None:
    """The same command under torchrun: the same losses as under the deepspeed launcher."""
    from tests.engine.test_training import losses

    (in_tmp / "run.yaml").write_text(dump_yaml(small_config(shapes, train={"steps": 4}, checkpoint={"every": 4})))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "longskip.launcher", "train", "run.yaml", "train.name=torchrun"],
        env=rank_environment(2),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert longskip("launch", "--local", "2", "--", "train", "run.yaml", ranks=2).returncode == 0
    assert losses(in_tmp / "runs" / "torchrun") == losses(in_tmp / "runs" / "run")
