"""Losses that jump: which do, what is told of them, and a run that goes back and leaves the batch out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longskip.engine import checkpoint, spikes
from longskip.engine.config import Config
from longskip.engine.data.plan import Plan
from longskip.errors import SpikeError
from longskip.profiling import ledger
from tests.engine import test_opening
from tests.engine.test_numbers import lines, tensors
from tests.engine.test_training import losses
from tests.ranks import run_ranks, small_config

STEPS, COMMIT, ODD = 9, 4, 7  # the step whose loss jumps lies three behind the commit
of_three_aspects = test_opening.mixed_aspects  # a fixture
finite = st.floats(-1e6, 1e6, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(finite, max_size=200), finite, st.floats(0.1, 100))
def test_a_spike_is_what_the_formula_says(before: list[float], loss: float, factor: float) -> None:
    """Against numpy on the last 128."""
    found = spikes.judge(loss, before, factor)
    if len(before) < 32:
        assert found is None
        return
    recent = np.array(before[-128:])
    median = np.median(recent)
    limit = median + factor * max(np.median(abs(recent - median)), 0.01 * abs(median))
    assert (found is not None) == (loss > limit)
    assert found is None or (found.median == median and found.limit == limit)


def test_losses_that_hardly_vary_are_no_measure() -> None:
    """They spread by a hundredth of the median at least: with factor 20 the limit is 1.2 times it."""
    assert spikes.judge(1.19, [1.0] * 40, 20.0) is None
    assert spikes.judge(1.21, [1.0] * 40, 20.0) == spikes.Spike(1.21, 1.0, 1.2)


def test_outliers_do_not_hide_the_next_one() -> None:
    """Where the mean and the deviation would: 20 spikes among the last 128 losses."""
    calm = [1.0 + 0.01 * (-1) ** i for i in range(108)]
    noisy = [*calm, *[50.0] * 20]
    assert spikes.judge(3.0, noisy, 20.0) is not None
    assert np.mean(noisy) + 20 * np.std(noisy) > 3.0
    assert spikes.judge(1.1, noisy, 20.0) is None


def odd_batches(job: Any, *batches: int) -> None:
    """From now on a sample of each of these global batches has a loss a million times as large."""
    odd = {int(job.reader.plan.batch_at(batch)[1][5]) for batch in batches}
    backward, loss = job._backward, job.objective.loss

    def _backward(micro: Any) -> torch.Tensor:
        grown = torch.tensor([1e6 if sample in odd else 1.0 for sample in micro.samples.tolist()])
        object.__setattr__(job.objective, "loss", lambda *given: loss(*given) * grown)
        return backward(micro)  # type: ignore[no-any-return]

    job._backward = _backward


def by_hand(job: Any) -> None:
    """The straight run: up to the commit, then without the batch."""
    from longskip.engine.trainer import fit

    for _ in range(COMMIT):
        job.step(job.read())
    job.state.losses.clear()  # a line of metrics.jsonl at every step
    cursor = job.state.cursor.skip(((ODD - 1) * 8, ODD * 8))
    job.state.cursor = cursor
    job.reader.seek(cursor)
    assert fit(job) == 0


def _rolled_back_and_by_hand(configs: list[Config], folder: Path) -> None:
    from longskip.engine.distributed import join
    from longskip.engine.prepare import prepare
    from longskip.engine.trainer import fit

    world = join()
    for number, config in enumerate(configs):
        straight = prepare(config, folder / f"straight-{number}", world)
        by_hand(straight)
        job = prepare(config, folder / f"run-{number}", world)
        odd_batches(job, ODD - 1)
        assert fit(job) == 0
        assert job.state.to_json() == straight.state.to_json()
        assert job.state.cursor.skipped == (((ODD - 1) * 8, ODD * 8),) and job.state.images == STEPS * 8
        ours, theirs = tensors(job), tensors(straight)
        assert ours.keys() == theirs.keys()
        assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
        straight.close("done")
        job.close("done")


def config_of(shapes: Path, spikes: str, stage: int = 3, dtype: str = "fp32", **train: Any) -> Config:
    factor = {} if spikes == "off" else {"spike_factor": 100}  # a batch of eight has losses that vary
    return small_config(
        shapes, train={"steps": STEPS, "spikes": spikes, "dtype": dtype, **factor, **train}, checkpoint={"every": COMMIT},
        deepspeed={"zero_stage": stage},
    )  # fmt: skip


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are judged from the fourth on, in the ranks too, which are forked."""
    monkeypatch.setattr(spikes, "WARM_UP", 3)


def test_rolled_back_is_the_straight_run_without_that_batch(shapes: Path, tmp_path: Path, soon: None) -> None:
    """Weights, moments, EMA, counters and losses bitwise; steps done again are spent and not committed."""
    assert run_ranks(2, _rolled_back_and_by_hand, [config_of(shapes, "rollback")], tmp_path) == [0, 0]
    run, straight = tmp_path / "run-0", tmp_path / "straight-0"
    told = losses(straight)
    assert {step: loss for step, loss in losses(run).items() if step in told} == told
    sums = ledger.sums(ledger.read(run / "ledger.jsonl").entries)
    assert (sums.committed.steps, sums.spent.steps, sums.missing_steps) == (STEPS, STEPS + ODD - COMMIT, 0)
    assert sums.committed.images == STEPS * 8 and sums.spent.images == (STEPS + ODD - COMMIT) * 8
    incidents = lines(run / "incidents.jsonl")
    assert [(i["kind"], i["step"]) for i in incidents if i["rank"] == 0] == [("spike", ODD), ("rolled_back", ODD)]
    of_both = sorted(sample for i in incidents if i["kind"] == "spike" for sample in i["samples"])
    assert of_both == sorted(int(i) for i in Plan(300, 8, 3).batch_at(ODD - 1)[1])
    assert {i["attempt"] for i in lines(run / "metrics.jsonl")} == {1, 2}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rolled_back_at_every_stage(shapes: Path, tmp_path: Path, soon: None, dtype: str) -> None:
    cases = [config_of(shapes, "rollback", stage, dtype, micro_batch=2) for stage in (0, 1, 2, 3)]
    assert run_ranks(2, _rolled_back_and_by_hand, cases, tmp_path) == [0, 0]


@pytest.mark.slow
def test_rolled_back_in_buckets(of_three_aspects: Path, tmp_path: Path, soon: None) -> None:
    """A batch of one bucket is left out whole: those behind it keep theirs, and their costs."""
    config = config_of(of_three_aspects, "rollback")
    data = config.data.model_copy(update={"buckets": test_opening.SIZES})
    assert run_ranks(2, _rolled_back_and_by_hand, [config.model_copy(update={"data": data})], tmp_path) == [0, 0]


def _always(config: Config, run: Path) -> None:
    """The loss jumps at step 7 whatever its batch."""
    from longskip.engine.distributed import join
    from longskip.engine.prepare import prepare
    from longskip.engine.trainer import fit

    job = prepare(config, run, join())
    odd_batches(job, *range(ODD - 1, ODD + 9))
    with pytest.raises(SpikeError, match=r"jumped at step 7, after 3 rollbacks to .*step-00000004") as met:
        fit(job)
    assert met.value.alike and met.value.final
    assert job.state.cursor.skipped == (((ODD - 1) * 8, (ODD + 2) * 8),)
    job.saving.settle()
    job.close("failed")


def test_a_run_that_jumps_again_and_again_stops(shapes: Path, tmp_path: Path, soon: None) -> None:
    run = tmp_path / "run"
    assert run_ranks(2, _always, config_of(shapes, "rollback"), run) == [0, 0]
    assert [p.name for p in checkpoint.steps_in(run / "checkpoints")] == ["step-00000004"]
    assert [i["kind"] for i in lines(run / "incidents.jsonl")].count("rolled_back") == 3


def _noted(config: Config, run: Path, batches: list[int]) -> None:
    from longskip.engine.distributed import join
    from longskip.engine.prepare import prepare
    from longskip.engine.trainer import fit

    job = prepare(config, run, join())
    odd_batches(job, *batches)
    assert fit(job) == 0
    job.close("done")


@pytest.mark.parametrize(("policy", "noted"), [("note", [5, 8]), ("off", []), ("rollback", [4])])
def test_what_is_noted(shapes: Path, tmp_path: Path, soon: None, policy: str, noted: list[int]) -> None:
    """One note where the loss stays up for a while, another where it jumps again; without a checkpoint none goes back."""
    run = tmp_path / "run"
    batches = {"rollback": [3]}.get(policy, [4, 5, 7])
    assert run_ranks(1, _noted, config_of(shapes, policy), run, batches) == [0]
    found = lines(run / "incidents.jsonl") if (run / "incidents.jsonl").exists() else []
    assert [(i["kind"], i["step"]) for i in found] == [("spike", step) for step in noted]
    assert len(losses(run)) == STEPS
    assert len(json.loads((run / "checkpoints" / f"step-{STEPS:08d}" / "state.json").read_text())["recent"]) == STEPS
