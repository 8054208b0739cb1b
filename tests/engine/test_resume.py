"""Killed anywhere and started again, a run ends bitwise where the unbroken run ends."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from longskip.engine import checkpoint
from longskip.engine.config import Config
from longskip.errors import EXIT_SAVED
from longskip.profiling import ledger
from tests.engine.test_training import losses
from tests.figures import figure
from tests.ranks import small_config, train_ranks

KINDS = ("weight", "ema", "exp_avg", "exp_avg_sq")
STEPS = 9


def config_of(shapes: Path, *, background: bool = True) -> Config:
    group = {"every": 3, "keep_last": 2, "background": background}
    return small_config(shapes, train={"steps": STEPS}, checkpoint=group, logging={"every": 2})


@pytest.fixture(scope="module")
def straight(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unbroken run: 2 ranks, ZeRO-3, 9 steps."""
    run = tmp_path_factory.mktemp("straight") / "run"
    assert train_ranks(2, config_of(shapes), run) == [0, 0]
    return run


def assert_same_run(run: Path, straight: Path, steps: int = STEPS) -> None:
    """Losses, tensors of every kind, cursor and counters, committed ledger sums: all bitwise equal."""
    final = f"step-{steps:08d}"
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
    assert ours_sums.spent.steps >= ours_sums.committed.steps == steps


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
    assert codes[int(fault.split("rank=")[1][0])] == -signal.SIGKILL, codes
    assert train_ranks(2, config, run) == [0, 0]
    assert_same_run(run, straight)
    figure(f"SIGKILL at {fault}, same command again: losses, tensors, cursor, ledger's committed sums bitwise equal")


@pytest.mark.parametrize(
    ("fault", "saved"),
    [
        ("step.begin:term:rank=1:step=5", 5),
        ("step.done:term:rank=1:step=5", 6),  # past the step's agreement: agreed at the next one
        pytest.param("save.shard_written:term:rank=0:step=6", 7, marks=pytest.mark.slow),
        pytest.param("save.done:term:rank=1:step=3", 4, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_same_command_goes_on(
    shapes: Path, straight: Path, tmp_path: Path, fault: str, saved: int
) -> None:
    """SIGTERM to one rank at any place: all ranks save at the same step's end and exit 75; nothing differs afterwards.

    Where the place is in a save it is one in the foreground: a thread that writes meets no particular step.
    """
    run, config = tmp_path / "run", config_of(shapes, background=fault.startswith("step."))
    assert train_ranks(2, config, run, fault) == [EXIT_SAVED, EXIT_SAVED]
    assert checkpoint.steps_in(run / "checkpoints")[-1].name == f"step-{saved:08d}"
    assert json.loads((run / "run.json").read_text())["status"] == "saved"
    assert train_ranks(2, config, run) == [0, 0]
    assert_same_run(run, straight)
    kinds = [json.loads(line)["kind"] for line in (run / "incidents.jsonl").read_text().splitlines()]
    assert kinds == ["signal"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_killed_in_bf16_at_every_stage(shapes: Path, tmp_path: Path, stage: int) -> None:
    runs = []
    for name, fault in (("straight", ""), ("killed", "step.backward:kill:rank=0:step=8")):
        config = small_config(
            shapes,
            train={"steps": STEPS, "dtype": "bf16"},
            checkpoint={"every": 3},
            logging={"every": 2},
            deepspeed={"zero_stage": stage},
        )
        runs.append(tmp_path / name)
        if fault:
            assert train_ranks(2, config, runs[-1], fault)[0] == -signal.SIGKILL
        assert train_ranks(2, config, runs[-1]) == [0, 0]
    assert_same_run(runs[1], runs[0])


@pytest.mark.parametrize("worlds", [(2, 1), pytest.param((2, 4), marks=pytest.mark.slow)])
def test_another_number_of_ranks_goes_on(shapes: Path, straight: Path, tmp_path: Path, worlds: tuple[int, int]) -> None:
    """The micro-batch is kept, accumulation follows; losses within 1e-6 relative of the unbroken run."""
    run, config = tmp_path / "run", config_of(shapes)
    assert train_ranks(worlds[0], config, run, "step.begin:kill:rank=0:step=4")[0] == -signal.SIGKILL
    if (
        worlds[1] > worlds[0]
    ):  # the kept micro-batch of 4 does not divide a batch of 8 over 4 ranks: refused, with the cure
        assert train_ranks(worlds[1], config, run) == [2] * worlds[1]
        return
    assert train_ranks(worlds[1], config, run) == [0] * worlds[1]
    ours, theirs = losses(run), losses(straight)
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[s] - theirs[s]) / theirs[s] for s in ours) <= 1e-6
    assert json.loads((run / "ds_config.json").read_text())["gradient_accumulation_steps"] == 2


def test_a_finished_run_is_done_and_can_be_made_longer(shapes: Path, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    before = {p: p.stat().st_mtime_ns for p in (run / "checkpoints").rglob("*") if p.is_file()}
    assert train_ranks(2, config_of(shapes), run) == [0, 0]
    assert {p: p.stat().st_mtime_ns for p in (run / "checkpoints").rglob("*") if p.is_file()} == before
    longer = small_config(
        shapes, train={"steps": STEPS + 2}, checkpoint={"every": 3, "keep_last": 2}, logging={"every": 2}
    )
    assert train_ranks(2, longer, run) == [0, 0]
    assert checkpoint.steps_in(run / "checkpoints")[-1].name == f"step-{STEPS + 2:08d}"
    assert f"steps: {STEPS + 2}" in (run / "config.yaml").read_text()


def test_other_data_in_the_same_place_is_refused(shapes: Path, straight: Path, tmp_path: Path) -> None:
    from longskip.engine.data.shapes import write_shapes

    run, data = tmp_path / "run", tmp_path / "data"
    write_shapes(data / "train", 60, seed=5)
    write_shapes(data / "validation", 20, seed=6)
    groups = {"train": {"steps": 2}, "checkpoint": {"every": 2}}
    assert train_ranks(1, small_config(data, **groups), run) == [0]
    shutil.rmtree(data / "train")
    write_shapes(data / "train", 60, seed=7)
    assert train_ranks(1, small_config(data, train={"steps": 4}, checkpoint={"every": 2}), run) == [2]


def test_pruning_never_takes_the_only_good_checkpoint(tmp_path: Path) -> None:
    """A bad folder past the committed one, whose ``.bad`` name is taken, must not push the good one out."""
    for name in ("step-00000006", "step-00000009", "step-00000009.bad"):
        (tmp_path / name).mkdir()
    checkpoint._prune(tmp_path, 1, tmp_path / "step-00000006")
    assert (tmp_path / "step-00000006").is_dir()
    found, complaints = checkpoint.newest(tmp_path, mark_bad=True)
    assert found is None and len(complaints) == 2
    assert (tmp_path / "step-00000009.bad2").is_dir()


@pytest.mark.parametrize("point", ["save.shard_half:disk_full:rank=1", "save.before_manifest:disk_full:rank=0"])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_training_goes_on(
    shapes: Path, straight: Path, tmp_path: Path, point: str
) -> None:
    run, config = tmp_path / "run", config_of(shapes)
    assert train_ranks(2, config, run, f"{point}:step=6") == [0, 0]
    assert [p.name for p in checkpoint.steps_in(run / "checkpoints")] == ["step-00000003", "step-00000009"]
    assert not list((run / "checkpoints").glob("*.tmp"))
    said = [json.loads(line) for line in (run / "incidents.jsonl").read_text().splitlines()]
    assert {entry["kind"] for entry in said} == {"not_saved"} and "No space left" in said[0]["detail"]
    assert_same_run(run, straight)


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "manifest"])
def test_a_damaged_checkpoint_is_passed_over(shapes: Path, straight: Path, tmp_path: Path, damage: str) -> None:
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
