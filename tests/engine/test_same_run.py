"""What may differ when a run is started again: where its data lie, what it is called, how many ranks there are."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from longskip.engine.config import Config
from longskip.engine.data.shapes import write_shapes
from longskip.engine.runs import RunFolder
from longskip.errors import RunMismatchError
from tests.engine.test_training import losses
from tests.ranks import small_config, train_ranks

STEPS = 4


def mixed(root: Path, *names: str, **train: object) -> Config:
    mix = [{"path": str(root / name), "weight": 1} for name in names]
    return small_config(
        root,
        data={"path": "", "mix": mix, "validation": None},
        encoders={"text": {"n_tokens": 32}},
        train={"steps": STEPS, "micro_batch": 4, "accumulation": 1, **train},
        checkpoint={"every": 2},
    )


def test_moved_data_another_rank_and_its_own_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """2 ranks with micro-batch and accumulation named, then 1 of a moved mix under the name that it had all along."""
    for name, seed in (("a", 1), ("b", 2)):
        write_shapes(tmp_path / "here" / name, 40, seed=seed)
    run = tmp_path / "run"
    begun = train_ranks(2, mixed(tmp_path / "here", "a", "b"), run, "step.begin:kill:rank=0:step=4")
    assert begun[0] == -signal.SIGKILL
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert train_ranks(1, mixed(tmp_path / "there", "b", "a"), run) == [2]  # the same weights, other data
    assert "is not the data that" in capfd.readouterr().out
    assert train_ranks(1, mixed(tmp_path / "there", "a", "b", name="run"), run) == [0]
    assert sorted(losses(run)) == [1, 2, 3, 4]
    batch = json.loads((run / "ds_config.json").read_text())
    assert batch["gradient_accumulation_steps"] == 2 and batch["train_micro_batch_size_per_gpu"] == 4
    assert train_ranks(1, mixed(tmp_path / "there", "a", "b"), tmp_path / "new") == [2]  # a first start takes no other
    assert "1 rank(s) with micro_batch 4" in capfd.readouterr().out


def test_a_name_that_is_the_folders_own_is_no_difference(shapes: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    unnamed, named = small_config(shapes), small_config(shapes, train={"name": "run"})
    for first, second in ((unnamed, named), (named, unnamed)):
        run.write_identity(first, {}, {"name": "run"})
        assert run.check(second) is True
        with pytest.raises(RunMismatchError, match=r"train\.seed"):
            run.check(small_config(shapes, train={"name": "run", "seed": 9}))
