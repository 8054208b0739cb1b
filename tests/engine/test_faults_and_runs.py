"""Fault points, the run folder's lock and files, and what a real full disk does."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from longskip.engine import checkpoint, faults
from longskip.engine.runs import RunFolder, append_json, write_atomic
from longskip.errors import CheckpointError, ConfigError, RunMismatchError
from tests.ranks import run_ranks, small_config, train_ranks


def test_fault_points_are_named() -> None:
    assert faults.parse("save.begin:kill:rank=1:step=6;step.done:sleep") == (
        faults.Fault("save.begin", "kill", 1, 6),
        faults.Fault("step.done", "sleep"),
    )
    for wrong in ("nowhere:kill", "save.begin:explode", "save.begin:kill:rank=x", "save.begin:kill:when=3"):
        with pytest.raises(ConfigError, match="LONGSKIP_FAULT"):
            faults.parse(wrong)
    passed = {line.split('faults.point("')[1].split('"')[0]
              for file in Path(faults.__file__).parent.glob("*.py") for line in file.read_text().splitlines()
              if 'faults.point("' in line}  # fmt: skip
    assert passed == set(faults.POINTS)


def test_writes_are_atomic_and_lines_whole(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.json", "one")
    write_atomic(tmp_path / "a.json", "two")
    assert (tmp_path / "a.json").read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    for i in range(3):
        append_json(tmp_path / "lines", {"i": i, "text": "é\n"})
    assert [json.loads(line)["i"] for line in (tmp_path / "lines").read_text().splitlines()] == [0, 1, 2]


def test_another_configuration_is_refused_with_the_differing_keys(shapes: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    config = small_config(shapes)
    assert run.check(config) is False
    run.write_identity(config, {}, {"name": "run"})
    assert run.check(config) is True
    assert run.check(small_config(shapes, train={"steps": 99}, logging={"every": 7})) is True
    with pytest.raises(RunMismatchError, match=r"optim\.lr: 0.001 saved, 0.0005 now.*train\.seed"):
        run.check(small_config(shapes, optim={"lr": 5e-4}, train={"seed": 4}))
    assert run.check(small_config(shapes, deepspeed={"zero_stage": 1}, engine={"layout": "named"})) is True


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", "no readable manifest"),
        ("[]", "is not a longskip-checkpoint"),
        ('{"format": "longskip-checkpoint", "version": 99}', "version 99"),
        ('{"format": "longskip-checkpoint", "version": 1}', "lists no files"),
        ('{"format": "longskip-checkpoint", "version": 1, "tensors": {"a": [1]}, "files": {"../x": {}}}', "not a file of"),
        ('{"format": "longskip-checkpoint", "version": 1, "tensors": {"a": [1]}, "files": {"/etc/passwd": {}}}', "not a file"),
        ('{"format": "longskip-checkpoint", "version": 1, "tensors": {"a": [1]}, "files": {"a.st": {"bytes": 1}}}', "no size"),
        ('{"format": "longskip-checkpoint", "version": 1, "tensors": {"a": [1]}, "files": {}}', "lists no files"),
    ],
)  # fmt: skip
def test_hostile_manifests_are_refused(tmp_path: Path, manifest: str, message: str) -> None:
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.verify(folder)
    assert checkpoint.newest(tmp_path)[0] is None


@pytest.fixture
def small_disk(tmp_path: Path):  # type: ignore[no-untyped-def]
    """A file system of 6 MiB; needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder]).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_really_full(shapes: Path, small_disk: Path) -> None:
    """One checkpoint (5 MB) fits, a second beside it does not: the run says so, goes on, and the first one verifies."""
    run = small_disk / "run"
    config = small_config(shapes, train={"steps": 8}, checkpoint={"every": 3}, logging={"every": 4})
    assert train_ranks(2, config, run) == [1, 1]  # the last save is the result: without it the run has failed
    assert [p.name for p in checkpoint.steps_in(run / "checkpoints")] == ["step-00000003"]
    checkpoint.verify(run / "checkpoints" / "step-00000003")
    incidents = [json.loads(line) for line in (run / "incidents.jsonl").read_text().splitlines()]
    assert {i["kind"] for i in incidents} == {"not_saved", "error"}
    where = rf"{re.escape(str(run))}\S*checkpoints needs [\d,]+ bytes for 2 rank\(s\), [\d,]+ are free"
    assert re.search(where, incidents[0]["detail"])  # before a byte of it was written


def test_records_that_cannot_be_written_are_complained_of_and_tolerated(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk is full to the last byte."""
    from longskip.engine.runs import append_json, tolerant

    filler = small_disk / "filler"
    with pytest.raises(OSError), open(filler, "wb") as file:
        while True:
            file.write(b"x" * 65536)
    with pytest.raises(OSError):
        append_json(small_disk / "lines", {"text": "y" * 100_000})
    for _ in range(2):
        with tolerant("lines"):
            append_json(small_disk / "lines", {"text": "y" * 100_000})
    assert capsys.readouterr().err.count("lines cannot be written") == 1


def _non_finite(config: object, run: Path) -> None:
    import torch

    from longskip.engine.distributed import join
    from longskip.engine.trainer import fit, prepare
    from longskip.errors import NonFiniteLossError

    world = join()
    job = prepare(config, run, world)  # type: ignore[arg-type]
    before = {item.name: job.shards.tensor(item, "weight").clone() for item in job.shards.slices}
    if world.rank == 1:
        loss = job.objective.loss  # one rank's loss turns NaN
        object.__setattr__(job.objective, "loss", lambda *a: loss(*a) * float("nan"))
    with pytest.raises(NonFiniteLossError, match="loss is not finite"):
        fit(job)
    for item in job.shards.slices:
        assert torch.equal(job.shards.tensor(item, "weight"), before[item.name])
    job.close("failed")


def _non_finite_gradient(config: object, run: Path) -> None:
    import torch

    from longskip.engine.distributed import join
    from longskip.engine.trainer import prepare
    from longskip.errors import NonFiniteLossError

    world = join()
    job = prepare(config, run, world)  # type: ignore[arg-type]
    job.step(next(job.reader))
    if world.rank == 1:  # a finite loss whose gradient is not
        backward = job.engine.backward
        job.engine.backward = lambda loss: backward(loss * torch.tensor(1e38) * 1e38)
    kept = {item.name: job.shards.tensor(item, "weight").clone() for item in job.shards.slices}
    with pytest.raises(NonFiniteLossError, match=r"gradient is not finite at step 2"):
        job.step(next(job.reader))
    assert job.state.step == 1
    for item in job.shards.slices:
        assert torch.equal(job.shards.tensor(item, "weight"), kept[item.name])
    job.close("failed")


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_gradient_that_is_not_finite_moves_no_weight(shapes: Path, tmp_path: Path, stage: int) -> None:
    config = small_config(shapes, deepspeed={"zero_stage": stage}, train={"not_finite": "stop"})
    assert run_ranks(2, _non_finite_gradient, config, tmp_path / "run") == [0, 0]


@pytest.mark.parametrize("stage", [0, 3])
def test_a_loss_that_is_not_finite_stops_all_ranks_before_the_step(shapes: Path, tmp_path: Path, stage: int) -> None:
    run, config = tmp_path / "run", small_config(shapes, deepspeed={"zero_stage": stage}, train={"not_finite": "stop"})
    assert run_ranks(2, _non_finite, config, run) == [0, 0]
    assert json.loads((run / "incidents.jsonl").read_text().splitlines()[0])["kind"] == "not_finite"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (3, 4, 1)),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}, (5, 8, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1, 0)),  # a batch script outside srun is one process
        ({"RANK": "4", "WORLD_SIZE": "4"}, "not below"),
        ({"WORLD_SIZE": "many"}, "whole numbers"),
    ],
)
def test_the_world_that_the_environment_names(
    variables: dict[str, str], expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longskip.engine.distributed import NAMES, world_from_environment

    for name in [*NAMES, *NAMES.values()]:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            world_from_environment()
    else:
        assert world_from_environment() == expected


def _listening() -> int:
    """The addresses that this process listens on after joining a local world."""
    import psutil

    from longskip.engine.distributed import barrier, join

    join()
    barrier()
    open_ports = [c.laddr.ip for c in psutil.Process().net_connections(kind="tcp") if c.status == "LISTEN"]
    barrier()
    return 0 if all(ip.startswith("127.") for ip in open_ports) else 5


def test_local_ranks_listen_on_loopback_only() -> None:
    assert run_ranks(2, _listening) == [0, 0]


def test_a_deepspeed_file_of_the_users_own(shapes: Path, tmp_path: Path) -> None:
    from longskip.engine.build import deepspeed_config

    file = tmp_path / "ds.json"
    config = small_config(shapes, deepspeed={"config": str(file)})

    def merged(user: dict) -> dict:  # type: ignore[type-arg]
        file.write_text(json.dumps(user))
        return deepspeed_config(config, config.batch(2), n_parameters=1000, cuda=False)

    tuned = merged({"train_batch_size": "auto", "zero_optimization": {"stage": 3, "overlap_comm": True}})
    assert tuned["zero_optimization"]["overlap_comm"] is True and tuned["train_batch_size"] == 8
    for user, word in (
        ({"train_batch_size": 9}, "train_batch_size = 9"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage = 2"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"optimizer": {"type": "Adam"}}, "optimizer"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "zero_optimization.offload_param"),
    ):
        with pytest.raises(ConfigError, match=word.replace(".", r"\.")):
            merged(user)
