"""What one rank cannot read ends the run on all of them, within seconds and with nothing lost."""

from __future__ import annotations

import json
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from longskip.engine import checkpoint
from longskip.engine.config import Config
from longskip.engine.data.plan import Plan
from longskip.engine.data.shapes import write_shapes
from longskip.engine.data.sources import open_source
from longskip.engine.data.workers import Workers
from longskip.engine.distributed import agree, join
from longskip.engine.validation import Validation
from longskip.errors import DataError, RemoteError, ShardError
from tests.engine.test_resume import assert_same_run
from tests.ranks import run_ranks, small_config, train_ranks

STEPS = 7
LOST = 6  # the step whose samples cannot be read: no multiple of what is saved
SECONDS = 60.0  # start-up included; the collectives wait for 30 minutes


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data that a test may damage: 100 pictures, and 16 to validate on."""
    folder = tmp_path_factory.mktemp("damaged")
    write_shapes(folder / "train", 100, seed=0)
    write_shapes(folder / "validation", 16, seed=1, held_out=None)
    return folder


def config_of(data: Path, /, **groups: Any) -> Config:
    return small_config(
        data, **({"train": {"steps": STEPS}, "checkpoint": {"every": 3}, "logging": {"every": 2}} | groups)
    )


@contextmanager
def damaged(folder: Path, sample: int) -> Iterator[None]:
    """One byte in the middle of a sample's picture flipped; mended at the end."""
    (shard,) = folder.glob("*.tar")
    with tarfile.open(shard) as archive:
        member = archive.getmember(f"{open_source(str(folder)).key(sample)}.png")
    place = member.offset_data + member.size // 2

    def flip() -> None:
        with open(shard, "r+b") as file:
            file.seek(place)
            (value,) = file.read(1)
            file.seek(place)
            file.write(bytes([value ^ 1]))

    flip()
    yield
    flip()


def sample_of(config: Config, step: int, rank: int) -> int:
    """A sample that only ``rank`` of 2 reads, at ``step``."""
    batch, source = config.batch(2), open_source(config.data.path)
    plan = Plan(len(source), batch.total, config.train.seed)
    slots = plan.slots(plan.cursor().advance((step - 1) * batch.total), rank, 2, batch.micro, batch.accumulation)
    return int(slots[-1][1][-1])


def incidents(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "incidents.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", [3, pytest.param(0, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_a_shard_that_one_rank_cannot_read(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], stage: int
) -> None:
    """Both ranks end with the same typed error and the last finished step saved; mended, the run ends bitwise alike."""
    straight, run, config = tmp_path / "straight", tmp_path / "run", config_of(data, deepspeed={"zero_stage": stage})
    assert train_ranks(2, config, straight) == [0, 0]
    capfd.readouterr()
    with damaged(data / "train", sample_of(config, LOST, rank=1)):
        begin = time.monotonic()
        assert train_ranks(2, config, run) == [1, 1]
        assert time.monotonic() - begin < SECONDS
    said = capfd.readouterr().out
    for rank in (0, 1):
        assert f"rank {rank}: DataError: rank 1 cannot read its samples of step {LOST}: ShardError: 00000.tar" in said
    assert [(entry["kind"], entry["step"], entry["rank"]) for entry in incidents(run)] == [("error", LOST - 1, 0)]
    assert [p.name for p in checkpoint.steps_in(run / "checkpoints")] == ["step-00000003", f"step-{LOST - 1:08d}"]
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    assert train_ranks(2, config, run) == [0, 0]
    assert_same_run(run, straight, STEPS)


def _train_with_a_dying_worker(config: Config, run: Path) -> int:
    """``longskip train``, and on rank 1 the data worker is killed once four batches have come."""
    from longskip.engine.trainer import train

    take = Workers.take

    def killing(workers: Workers) -> Any:
        if workers._taken == 4:
            (process,) = workers._processes
            process.kill()
            process.join()
        return take(workers)

    if join().rank == 1:
        Workers.take = killing  # type: ignore[method-assign]
    return train(config, run)


@pytest.mark.slow
def test_a_data_worker_that_dies(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run, config = tmp_path / "run", config_of(data, data={"workers": 1}, checkpoint={"every": 100})
    assert run_ranks(2, _train_with_a_dying_worker, config, run) == [1, 1]
    said = capfd.readouterr().out
    for rank in (0, 1):
        assert f"rank {rank}: DataError: rank 1 cannot read its samples of step " in said
    assert "a data worker died" in said
    (saved,) = checkpoint.steps_in(run / "checkpoints")
    assert incidents(run)[0]["step"] == int(saved.name.removeprefix("step-")) >= 4


def test_validation_that_one_rank_cannot_read(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The last of 16 pictures, rank 1's in the second of two forward passes."""
    run, config = tmp_path / "run", config_of(data, eval={"every": 4, "samples": 16, "time_bins": 4})
    with damaged(data / "validation", 15):
        assert train_ranks(2, config, run) == [1, 1]
    said = capfd.readouterr().out
    for rank in (0, 1):
        assert f"rank {rank}: DataError: rank 1 cannot read its samples of {config.data.validation}: ShardError" in said
    assert [p.name for p in checkpoint.steps_in(run / "checkpoints")] == ["step-00000003", "step-00000004"]


def _train_without_samples(config: Config, run: Path) -> int:
    from longskip.engine.trainer import train

    def broken(*_: Any) -> None:
        raise RuntimeError("the library's fault")

    Validation.samples = broken  # type: ignore[method-assign,assignment]
    return train(config, run)


def test_an_unexpected_error_of_the_samples_comes_after_the_save(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = config_of(data, logging={"every": 2, "samples_every": 3, "sample_steps": 1, "tensorboard": False})
    assert run_ranks(1, _train_without_samples, config, run) == [99]
    assert [p.name for p in checkpoint.steps_in(run / "checkpoints")] == ["step-00000003"]
    assert json.loads((run / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("groups", "code"),
    [
        ({"diffusion": {"objective": "ddpm", "prediction": "epsilon", "train_steps": 20}}, 2),  # 25 sampler steps
        ({"eval": {"every": 5, "samples": 16, "time_bins": 4}}, 1),  # with a damaged first picture
    ],
)
def test_what_will_be_looked_at_is_tried_before_the_first_step(
    data: Path, tmp_path: Path, groups: dict[str, Any], code: int
) -> None:
    run = tmp_path / "run"
    config = config_of(data, **({"logging": {"every": 2, "samples_every": 5, "tensorboard": False}} | groups))
    with damaged(data / "validation", 0):
        assert train_ranks(2, config, run) == [code, code]
    assert not (run / "metrics.jsonl").exists() and not (run / "checkpoints").exists()


def _agree(failing: dict[int, Exception], expected: str) -> int:
    world = join()
    agree(None, "wait", torch.device("cpu"))
    try:
        agree(failing.get(world.rank), "read", torch.device("cpu"))  # type: ignore[arg-type]
    except DataError as error:
        alone = world.size == 1
        return 0 if str(error) == expected and (error is failing[0] if alone else error.alike) else 3
    return 4


@pytest.mark.parametrize(
    ("world", "failing", "expected"),
    [
        (2, {1: ShardError("cut", cure="mend it")}, "rank 1 cannot read: ShardError: cut\n  cure: mend it"),
        (
            3,
            {0: RemoteError("gone"), 2: ShardError("cut", cure="mend it")},
            "rank 0 cannot read (nor can rank 2): RemoteError: gone",
        ),
        (1, {0: ShardError("cut")}, "cut"),
    ],
)
def test_ranks_agree_on_what_failed(world: int, failing: dict[int, Exception], expected: str) -> None:
    assert run_ranks(world, _agree, failing, expected) == [0] * world
