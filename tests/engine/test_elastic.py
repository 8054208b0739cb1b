"""The same run on other ranks, at other ZeRO stages, in another layout, on the way: nothing that it computes changes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from longskip.engine import checkpoint
from longskip.engine.config import Config
from longskip.engine.job import Job
from tests.engine.test_training import losses, relative, weights
from tests.figures import figure
from tests.ranks import run_ranks, small_config

END = 40


def config_of(shapes: Path, steps: int, stage: Any, layout: str = "flat", **groups: Any) -> Config:
    return small_config(
        shapes,
        train={"steps": steps, "batch_size": 8, "micro_batch": 2},
        checkpoint={"every": 5, "keep_last": 2},
        deepspeed={"zero_stage": stage} | groups.pop("deepspeed", {}),
        engine={"layout": layout} | groups.pop("engine", {}),
        **groups,
    )


def train_and_tell(config: Config, run: Path) -> int:
    """``train`` that also writes which samples each step was made of (of this rank)."""
    from longskip.engine.trainer import train

    plain = Job.step

    def step(self: Job, micro_batches: list[Any]) -> None:
        ids = [int(i) for micro in micro_batches for i in micro.samples]
        with open(f"{run}.ids-{os.environ['RANK']}", "a") as file:
            file.write(json.dumps([self.state.step + 1, ids]) + "\n")
        plain(self, micro_batches)

    Job.step = step  # type: ignore[method-assign]
    return train(config, run)


def train_with_ballast(config: Config, run: Path) -> int:
    """``train`` on ranks of which rank R holds R × 256 MiB more; each writes its resident bytes after every step."""
    from longskip.engine.trainer import train

    ballast, plain, rank = b"x" * (int(os.environ["RANK"]) << 28), Job.log, os.environ["RANK"]

    def log(self: Job) -> None:
        Path(f"{run}.resident-{rank}").write_text(str(psutil.Process().memory_info().rss))
        plain(self)

    Job.log = log  # type: ignore[method-assign]
    code = train(config, run)
    return code if len(ballast) == int(rank) << 28 else 1


def samples_of(run: Path) -> dict[int, list[int]]:
    """Step → the ids of its global batch, sorted."""
    seen: dict[int, list[int]] = {}
    for path in run.parent.glob(f"{run.name}.ids-*"):
        for line in path.read_text().splitlines():
            step, ids = json.loads(line)
            seen.setdefault(step, []).extend(ids)
    return {step: sorted(ids) for step, ids in sorted(seen.items())}


@pytest.mark.slow
def test_two_one_four_two_ranks_with_other_stages_and_layouts(shapes: Path, tmp_path: Path) -> None:
    straight, changed = tmp_path / "straight", tmp_path / "changed"
    assert run_ranks(2, train_and_tell, config_of(shapes, END, 3), straight) == [0, 0]
    way = [(2, 10, 3, "flat"), (1, 15, 1, "named"), (4, 20, 2, "flat"), (2, END, 3, "named")]
    for world, steps, stage, layout in way:
        config = config_of(shapes, steps, stage, layout)
        assert run_ranks(world, train_and_tell, config, changed) == [0] * world
        manifest = checkpoint.read_manifest(changed / "checkpoints" / f"step-{steps:08d}")
        assert (manifest["world"], manifest["zero_stage"]) == (world, stage)
    assert samples_of(changed) == samples_of(straight)
    assert list(samples_of(changed)) == list(range(1, END + 1))
    worst = relative(losses(changed), losses(straight), END)
    figure(f"2→1→4→2 ranks, stages 3→1→2→3, layouts flat→named→flat→named: worst relative loss difference {worst:.1e}")
    assert worst <= 1e-6
    for kind in ("weight", "ema"):
        ours, theirs = weights(changed, kind, END), weights(straight, kind, END)
        # Adam divides by a root of what may be nothing but rounding: single elements differ more than a tensor's norm.
        far = max(float((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-3)) for n in theirs)
        figure(f"the same way, {kind} at the end: worst difference of a tensor relative to its norm {far:.1e}")
        assert far <= 1e-5
    state = [checkpoint.read_state(run / "checkpoints" / f"step-{END:08d}") for run in (changed, straight)]
    assert state[0]["cursor"] == state[1]["cursor"]
    assert all(state[0][count] == state[1][count] for count in ("images", "tokens", "model_flops", "six_nd"))


def test_auto_takes_the_saved_stage_on_a_resume(shapes: Path, tmp_path: Path) -> None:
    """The smallest stage that fits is 0 on this machine; a run saved at stage 2 goes on at stage 2."""
    run = tmp_path / "run"
    assert run_ranks(2, train_and_tell, config_of(shapes, 5, 2), run) == [0, 0]
    assert run_ranks(2, train_and_tell, config_of(shapes, 10, "auto"), run) == [0, 0]
    assert checkpoint.read_manifest(run / "checkpoints" / "step-00000010")["zero_stage"] == 2
    fresh = tmp_path / "fresh"
    assert run_ranks(2, train_with_ballast, config_of(shapes, 5, "auto"), fresh) == [0, 0]
    assert checkpoint.read_manifest(fresh / "checkpoints" / "step-00000005")["zero_stage"] == 0
    check_memory(fresh)


def check_memory(run: Path) -> None:
    """The metrics tell each rank's own peak, near what the operating system says that it holds."""
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    peaks = line["memory/per_rank(GiB)"]
    resident = [int(Path(f"{run}.resident-{rank}").read_text()) / 2**30 for rank in range(2)]
    assert len(peaks) == 2 and line["memory/max_rss(GiB)"] == max(peaks)
    assert 0.2 < peaks[1] - peaks[0] < 0.3  # a quarter of a GiB
    for peak, held in zip(peaks, resident, strict=True):
        assert 0.98 * held <= peak <= 1.2 * held, (peaks, resident)


@pytest.mark.parametrize(
    ("stage", "groups"),
    [
        (3, {"deepspeed": {"offload_optimizer": "cpu", "offload_param": "cpu"}}),
        (3, {"engine": {"ema_device": "cpu"}}),
        pytest.param(3, {"deepspeed": {"offload_optimizer": "cpu"}}, marks=pytest.mark.slow),
        pytest.param(2, {"deepspeed": {"offload_optimizer": "cpu"}}, marks=pytest.mark.slow),
        pytest.param(1, {"deepspeed": {"offload_optimizer": "cpu"}}, marks=pytest.mark.slow),
        pytest.param(0, {"engine": {"ema_device": "cpu"}}, marks=pytest.mark.slow),
    ],
)
def test_offload_and_the_ema_in_host_memory_change_nothing(
    shapes: Path, tmp_path: Path, stage: int, groups: dict[str, Any]
) -> None:
    plain, away = tmp_path / "plain", tmp_path / "away"
    assert run_ranks(2, train_and_tell, config_of(shapes, 10, stage), plain) == [0, 0]
    assert run_ranks(2, train_and_tell, config_of(shapes, 5, stage, **groups), away) == [0, 0]
    assert run_ranks(2, train_and_tell, config_of(shapes, 10, stage, **groups), away) == [0, 0]  # saved and read again
    assert relative(losses(away), losses(plain), 10) <= 1e-6
    for kind in ("weight", "ema", "exp_avg", "exp_avg_sq"):
        ours, theirs = weights(away, kind, 10), weights(plain, kind, 10)
        assert all(torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-7) for name in theirs), kind
