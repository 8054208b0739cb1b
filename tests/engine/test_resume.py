"""Killed anywhere and started again, a run ends bitwise where the unbroken run ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from longskip.engine import checkpoint
from longskip.engine.config import Config
from longskip.errors import EXIT_SAVED
from longskip.launcher.local import rank_environment
from longskip.profiling import ledger
from tests.engine.test_training import losses
from tests.ranks import small_config, train_ranks

KINDS = ("weight", "ema", "exp_avg", "exp_avg_sq")
STEPS = 9


def config_of(shapes: Path) -> Config:
    return small_config(shapes, train={"steps": STEPS}, checkpoint={"every": 3, "keep_last": 2}, logging={"every": 2})


@pytest.fixture(scope="module")
def straight(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unbroken run: 2 ranks, ZeRO-3, 9 steps."""
    run = tmp_path_factory.mktemp("straight") / "run"
    assert train_ranks(2, config_of(shapes), run) == [0, 0]
    return run


def assert_same_run(run: Path, straight: Path) -> None:
    """Losses, tensors of every kind, cursor and counters, committed ledger sums: all bitwise equal."""
    final = f"step-{STEPS:08d}"
    assert losses(run) == losses(straight)
    with (
        checkpoint.Archive(run / "checkpoints" / final) as ours,
        checkpoint.Archive(straight / "checkpoints" / final) as theirs,
    ):
        for kind in KINDS:
            a, b = ours.full(kind), theirs.full(kind)
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) for name in b), kind
    assert checkpoint.read_state(run / "checkpoints" / final) == checkpoint.read_state(straight / "checkpoints" / final)
    ours_sums, their_sums = (ledger.sums(ledger.read(r / "ledger.jsonl").entries) for r in (run, straight))
    for count in ("steps", "images", "image_tokens", "tokens", "model_flops", "hardware_flops", "six_nd"):
        assert getattr(ours_sums.committed, count) == getattr(their_sums.committed, count), count
    assert ours_sums.missing_steps == 0
    assert ours_sums.spent.steps >= ours_sums.committed.steps == STEPS


FAST = [
    "step.backward:kill:rank=1:step=5",
    "save.shard_half:kill:rank=1:step=6",
    "save.before_rename:kill:rank=0:step=6",
]
SLOW = [
    "step.begin:kill:rank=0:step=1",
    "step.done:kill:rank=0:step=8",
    "save.begin:kill:rank=1:step=3",
    "save.shard_written:kill:rank=0:step=6",
    "save.before_manifest:kill:rank=0:step=6",
    "save.before_latest:kill:rank=0:step=6",
    "save.done:kill:rank=1:step=6",
    "save.done:kill:rank=0:step=9",
]


@pytest.mark.parametrize("fault", [*FAST, *(pytest.param(f, marks=pytest.mark.slow) for f in SLOW)])
def test_killed_and_started_again(shapes: Path, straight: Path, tmp_path: Path, fault: str) -> None:
    run, config = tmp_path / "run", config_of(shapes)
    codes = train_ranks(2, config, run, fault)
    assert -signal.SIGKILL in codes
    assert train_ranks(2, config, run) == [0, 0]
    assert_same_run(run, straight)


def test_a_signal_saves_and_the_same_command_goes_on(shapes: Path, straight: Path, tmp_path: Path) -> None:
    """SIGTERM to one rank: all ranks save at the step's end and exit 75."""
    run, config = tmp_path / "run", config_of(shapes)
    assert train_ranks(2, config, run, "step.begin:term:rank=1:step=5") == [EXIT_SAVED, EXIT_SAVED]
    assert [p.name for p in checkpoint.steps_in(run / "checkpoints")] == ["step-00000003", "step-00000005"]
    assert train_ranks(2, config, run) == [0, 0]
    saved_at = {
        entry.resumed_from for entry in ledger.read(run / "ledger.jsonl").entries if hasattr(entry, "resumed_from")
    }
    assert saved_at == {0, 5}
    final = f"step-{STEPS:08d}"
    with (
        checkpoint.Archive(run / "checkpoints" / final) as a,
        checkpoint.Archive(straight / "checkpoints" / final) as b,
    ):
        for kind in KINDS:
            ours, theirs = a.full(kind), b.full(kind)
            assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    kinds = [json.loads(line)["kind"] for line in (run / "incidents.jsonl").read_text().splitlines()]
    assert kinds == ["signal"]


def test_a_finished_run_is_done(shapes: Path, straight: Path, tmp_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (straight / "checkpoints").rglob("*") if p.is_file()}
    assert train_ranks(2, config_of(shapes), straight) == [0, 0]
    assert {p: p.stat().st_mtime_ns for p in (straight / "checkpoints").rglob("*") if p.is_file()} == before


def test_a_full_disk_leaves_the_earlier_checkpoint_and_training_goes_on(
    shapes: Path, straight: Path, tmp_path: Path
) -> None:
    run, config = tmp_path / "run", config_of(shapes)
    assert train_ranks(2, config, run, "save.shard_half:disk_full:rank=1:step=6") == [0, 0]
    assert [p.name for p in checkpoint.steps_in(run / "checkpoints")] == ["step-00000003", "step-00000009"]
    assert not list((run / "checkpoints").glob("*.tmp"))
    assert json.loads((run / "incidents.jsonl").read_text().splitlines()[0])["kind"] == "disk_full"
    assert_same_run(run, straight)


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "manifest"])
def test_a_damaged_checkpoint_is_passed_over(shapes: Path, straight: Path, tmp_path: Path, damage: str) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(straight, run)
    newest = checkpoint.steps_in(run / "checkpoints")[-1]
    victim = newest / ("manifest.json" if damage == "manifest" else "moments-00001.safetensors")
    data = bytearray(victim.read_bytes())
    if damage == "flip":
        data[-5] ^= 1
        victim.write_bytes(data)
    elif damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(data[: len(data) // 2])
    found, complaints = checkpoint.newest(run / "checkpoints", mark_bad=True)
    assert found is not None and found.name == "step-00000006"
    assert len(complaints) == 1 and victim.name in complaints[0]
    assert newest.with_name(newest.name + ".bad").is_dir()
    if damage == "flip":
        assert train_ranks(2, config_of(shapes), run) == [0, 0]
        assert_same_run(run, straight)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.7, 1.9, 3.4])
def test_sigkill_at_any_moment_through_the_launcher(shapes: Path, straight: Path, in_tmp: Path, seconds: float) -> None:
    """``longskip launch`` and SIGKILL of a random rank some seconds after the first step; then the same command."""
    from longskip.engine.configio import dump_yaml

    (in_tmp / "run.yaml").write_text(dump_yaml(config_of(shapes)))
    command = [sys.executable, "-m", "longskip.launcher", "launch", "--local", "2", "--", "train", "run.yaml"]
    run = in_tmp / "runs" / "run"
    process = subprocess.Popen(command, env=rank_environment(2), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (run / "run.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(seconds)
    ranks = [c for c in psutil.Process(process.pid).children(recursive=True) if "-u" in c.cmdline()]
    if ranks:
        ranks[int(seconds * 10) % len(ranks)].kill()
    assert process.wait(60) in (0, 1)
    assert not [c for c in ranks if c.is_running() and c.status() != psutil.STATUS_ZOMBIE]
    assert subprocess.run(command, env=rank_environment(2), capture_output=True, timeout=180).returncode == 0
    assert_same_run(run, straight)
