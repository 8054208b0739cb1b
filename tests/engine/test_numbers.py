"""A step whose loss or gradient is not finite on one rank moves nothing on any rank, and leaves no trace behind."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from longskip.engine import checkpoint, fused_step
from longskip.engine.config import Config
from longskip.engine.faults import VARIABLE
from longskip.engine.identity import differing_keys
from longskip.engine.optim import ema_decay, learning_rate
from longskip.errors import ConfigError, NonFiniteLossError
from longskip.profiling import ledger
from tests.engine.test_resume import assert_same_run
from tests.engine.test_training import bare_loop, losses, weights
from tests.ranks import run_ranks, small_config, train_ranks

STEPS = 5
MISSED = (2, 4)
FAULTS = "step.loss:nan:rank=1:step=2;step.loss:inf_grad:rank=0:step=4"
KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")


def tensors(job: Any) -> dict[str, torch.Tensor]:
    """Copies of this rank's slices of all kinds, and of what the model computes with."""
    found = {
        f"{kind} {s.name}@{s.offset}": job.shards.tensor(s, kind).clone() for s in job.shards.slices for kind in KINDS
    }
    whole = {n: p for n, p in job.engine.module.named_parameters() if p.numel()}  # not what stage 3 has shared out
    return found | {f"computed {n}": p.detach().clone() for n, p in whole.items()}


def written_by_hand(job: Any) -> list[dict[str, torch.Tensor]]:
    """The loop without guards: batches of the missed steps are read, and nothing else is done with them."""
    states, missed, optim = [], 0, job.config.optim
    for step in range(1, STEPS + 1):
        batches = next(job.reader)
        if step in MISSED:
            missed += 1
        else:
            job.optimizer.set_step(step - missed, learning_rate(optim, step, STEPS), ema_decay(optim, step))
            for micro in batches:
                job._backward(micro)
                job.engine.step()
        states.append(tensors(job))
    return states


def _guarded_and_by_hand(cases: list[Config], folder: Path) -> None:
    from longskip.engine.distributed import join
    from longskip.engine.prepare import prepare

    world = join()
    for number, config in enumerate(cases):
        by_hand = prepare(config, folder / f"by-hand-{number}", world)
        expected = written_by_hand(by_hand)
        by_hand.close("done")
        job = prepare(config, folder / f"guarded-{number}", world)
        os.environ[VARIABLE] = FAULTS
        for step in range(1, STEPS + 1):
            job.step(job.read())
            found = tensors(job)
            names = found.keys() & expected[step - 1].keys()
            assert len(names) >= 4 * len(job.shards.slices)
            differing = [name for name in sorted(names) if not torch.equal(found[name], expected[step - 1][name])]
            assert not differing, (config.deepspeed, config.train, step, differing[:3])
        del os.environ[VARIABLE]
        state = job.state
        assert (state.step, state.skipped, state.skipped_in_a_row) == (STEPS, len(MISSED), 0)
        assert state.images == STEPS * config.train.batch_size and state.cursor == job.reader.cursor
        assert any(not torch.equal(expected[0][name], expected[-1][name]) for name in expected[0])  # it trains
        job.close("done")


def case(shapes: Path, stage: int, dtype: str, layout: str, micro: int | None = None, **deepspeed: Any) -> Config:
    return small_config(
        shapes, train={"steps": STEPS, "dtype": dtype, "micro_batch": micro}, engine={"layout": layout},
        deepspeed={"zero_stage": stage, **deepspeed},
    )  # fmt: skip


def test_a_skipped_step_is_a_step_that_was_not_taken(shapes: Path, tmp_path: Path) -> None:
    """Weights, moments, EMA and what the model computes with, after every step, bitwise those of a loop by hand."""
    cases = [
        case(shapes, 0, "fp32", "named", micro=2),  # where DeepSpeed would take the step
        case(shapes, 2, "bf16", "flat"),
    ]
    assert run_ranks(2, _guarded_and_by_hand, cases, tmp_path) == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_at_every_stage(shapes: Path, tmp_path: Path, stage: int, dtype: str) -> None:
    """Both layouts, with accumulation and with what can be put off to the host."""
    cases = [
        case(shapes, stage, dtype, "flat"),
        case(shapes, stage, dtype, "named", micro=2),
    ]
    if stage > 0:
        cases.append(case(shapes, stage, dtype, "flat", micro=2, offload_optimizer="cpu"))
    if stage == 3:
        cases.append(case(shapes, stage, dtype, "flat", offload_optimizer="cpu", offload_param="cpu"))
    assert run_ranks(2, _guarded_and_by_hand, cases, tmp_path) == [0, 0]


@pytest.mark.slow
def test_with_the_clip_taken_out_of_deepspeed(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the optimizer's kernel clips and writes the bf16 shards."""
    monkeypatch.setattr(fused_step, "wanted", lambda device: True)
    cases = [case(shapes, stage, "bf16", "flat") for stage in (1, 2, 3)]
    assert run_ranks(2, _guarded_and_by_hand, cases, tmp_path) == [0, 0]


def test_what_is_done_about_bad_steps_may_change_on_a_resume(shapes: Path) -> None:
    was = small_config(shapes)
    now = small_config(shapes, train={"not_finite": "stop", "spikes": "rollback", "spike_factor": 9, "digest_every": 7})
    assert differing_keys(was, now) == {}
    assert differing_keys(was, small_config(shapes, train={"not_finite_limit": 9})) == {}
    for idle in ({"not_finite": "stop", "not_finite_limit": 5}, {"spikes": "off", "spike_factor": 5}):
        with pytest.raises(ConfigError, match="has no effect"):
            small_config(shapes, train=idle)


def _looked_at_by_threads(config: Config, run: Path) -> int:
    """DeepSpeed's parameter dictionaries tell who looks into them while the checkpoint is written."""
    from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict

    from longskip.engine.trainer import train

    look, main, seen = ZeROOrderedDict.__getitem__, threading.main_thread(), []

    def looked(self: Any, key: str) -> Any:
        seen.append(threading.current_thread() is main)
        return look(self, key)

    ZeROOrderedDict.__getitem__ = looked
    assert train(config, run) == 0
    return 0 if seen and all(seen) else 5


def test_no_thread_looks_at_a_parameter(shapes: Path, tmp_path: Path) -> None:
    """It would gather it, alone among the ranks, where it was looked at during a forward pass."""
    config = small_config(shapes, train={"steps": 4}, checkpoint={"every": 2})
    assert run_ranks(2, _looked_at_by_threads, config, tmp_path / "run") == [0, 0]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run with two skipped steps."""
    run = tmp_path_factory.mktemp("skipping") / "run"
    assert train_ranks(2, of_run(shapes), run, FAULTS) == [0, 0]
    return run


def of_run(shapes: Path) -> Config:
    """Saved in the foreground: step 3 is committed when step 4 begins, however quick the steps are."""
    return small_config(
        shapes, train={"steps": STEPS}, checkpoint={"every": 3, "background": False}, logging={"every": 1}
    )


@pytest.mark.slow
def test_killed_behind_a_skipped_step(shapes: Path, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train_ranks(2, of_run(shapes), run, f"{FAULTS};step.begin:kill:rank=0:step=5")[0] == -signal.SIGKILL
    assert checkpoint.read_state(run / "checkpoints" / "step-00000003")["skipped"] == 1
    assert train_ranks(2, of_run(shapes), run, FAULTS) == [0, 0]
    assert_same_run(run, straight, steps=STEPS)


def test_skipped_steps_are_told(shapes: Path, straight: Path) -> None:
    """The samples of both ranks are listed; what was computed for them is in the sums as that of any step."""
    state = checkpoint.read_state(straight / "checkpoints" / f"step-{STEPS:08d}")
    assert state["skipped"] == 2 and state["images"] == STEPS * 8
    assert ledger.sums(ledger.read(straight / "ledger.jsonl").entries).committed.images == STEPS * 8

    assert sorted(losses(straight)) == [1, 3, 4, 5]  # that of step 4 is finite, its gradient is not
    metrics = {line["step"]: line for line in lines(straight / "metrics.jsonl") if "images" in line}
    assert [step for step in metrics if "grad_norm" not in metrics[step]] == [2, 4]
    told = [line for line in lines(straight / "incidents.jsonl") if line["kind"] == "skipped_step"]
    assert [(line["step"], line["rank"]) for line in sorted(told, key=lambda line: (line["step"], line["rank"]))] == [
        (2, 0), (2, 1), (4, 0), (4, 1)
    ]  # fmt: skip
    for step, reason in ((2, "loss is not finite on 1 rank(s)"), (4, "gradient is not finite")):
        of_step = [line for line in told if line["step"] == step]
        assert {line["reason"] for line in of_step} == {reason}
        assert sorted(i for line in of_step for i in line["samples"]) == sorted(samples_of_batch(shapes, step - 1))
        assert all(len(line["keys"]) == 4 for line in of_step)


def test_adam_counts_the_steps_that_it_took(shapes: Path, tmp_path: Path) -> None:
    """Against torch's own AdamW, which is not called for the skipped step, in the bare loop of another test."""
    config = small_config(shapes, train={"steps": STEPS}, checkpoint={"every": STEPS})
    run = tmp_path / "run"
    assert train_ranks(2, config, run, "step.loss:nan:rank=0:step=2") == [0, 0]
    values, _, ema = bare_loop(config, run / "vocabulary.json", missed=(2,))
    ours = losses(run)
    assert sorted(ours) == [1, 3, 4, 5]
    assert max(abs(ours[step] - values[step - 1]) / values[step - 1] for step in ours) <= 1e-6
    averaged = weights(run, "ema", step=STEPS)
    assert max(float((averaged[name] - ema[name]).abs().max()) for name in ema) <= 1e-6


def _to_the_limit(config: Config, run: Path) -> None:
    from longskip.engine.distributed import join
    from longskip.engine.prepare import prepare
    from longskip.engine.trainer import fit

    job = prepare(config, run, join())
    with pytest.raises(
        NonFiniteLossError, match=r"at step 4, 3 steps in a row .*no weight has moved since step 1;"
    ) as met:
        fit(job)
    assert met.value.alike and met.value.final
    job.saving.settle()
    assert job.state.step == 3 and job.state.skipped == 2
    job.close("failed")


def test_three_in_a_row_stop_all_ranks(shapes: Path, tmp_path: Path) -> None:
    """Two in a row and then one apart do not; a commit between them does not break the row."""
    run, config = tmp_path / "run", small_config(shapes, checkpoint={"every": 3})
    faults = ";".join(f"step.loss:nan:rank={rank}:step={step}" for rank, step in ((0, 2), (1, 3), (0, 4)))
    assert run_ranks(2, _to_the_limit, config, run, environment={VARIABLE: faults}) == [0, 0]
    assert [p.name for p in checkpoint.steps_in(run / "checkpoints")] == ["step-00000003"]
    kinds = [(line["kind"], line["step"]) for line in lines(run / "incidents.jsonl")]
    assert sorted(kinds) == [("not_finite", 4)] * 2 + [("skipped_step", 2)] * 2 + [("skipped_step", 3)] * 2


def samples_of_batch(shapes: Path, k: int) -> list[int]:
    """The samples of global batch ``k``, by the plan alone."""
    from longskip.engine.data.plan import Plan

    return [int(i) for i in Plan(300, 8, 3).batch_at(k)[1]]
