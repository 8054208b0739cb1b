"""The optimizer kernel inside DeepSpeed: clipping and write-back in its own pass give what DeepSpeed's passes give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longskip.engine import build, fused_step
from tests.engine.test_training import losses, relative, weights
from tests.figures import figure
from tests.ranks import small_config, train_ranks

STEPS = 20


@pytest.mark.parametrize("stage", [3, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_the_interpreted_kernel_trains_as_torch_does(shapes: Path, tmp_path: Path, stage: int) -> None:
    """Two ranks, a clip that binds at every step: AdamW + EMA by the kernel with the factor handed over, and by torch."""
    runs = {}
    for backend in ("torch", "triton"):
        config = small_config(
            shapes, deepspeed={"zero_stage": stage}, kernels={"backend": {"adamw": backend}}, optim={"clip": 0.05}
        )
        runs[backend] = tmp_path / backend
        assert train_ranks(2, config, runs[backend]) == [0, 0]
    worst = relative(losses(runs["triton"]), losses(runs["torch"]))
    figure(f"AdamW by the interpreted kernel, ZeRO-{stage}, 2 ranks: worst relative loss difference {worst:.2e}")
    assert worst <= 1e-6
    for kind in ("weight", "ema", "exp_avg", "exp_avg_sq"):
        ours, theirs = weights(runs["triton"], kind), weights(runs["torch"], kind)
        assert max(float((ours[n] - theirs[n]).abs().max()) for n in ours) <= 2e-5


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_clip_and_write_back_are_deepspeeds_to_the_bit(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """torch's AdamW with the factor and the copies handed to it, against DeepSpeed's own two passes, at stage 3."""
    runs = {}
    for taken in (False, True):
        monkeypatch.setattr(fused_step, "wanted", lambda device, taken=taken: taken)
        config = small_config(
            shapes, deepspeed={"zero_stage": 3}, train={"dtype": dtype, "steps": 6}, optim={"clip": 0.05}
        )
        runs[taken] = tmp_path / str(taken)
        assert train_ranks(2, config, runs[taken]) == [0, 0]
    assert losses(runs[True]) == losses(runs[False])
    for kind in ("weight", "ema"):
        ours, theirs = weights(runs[True], kind, 6), weights(runs[False], kind, 6)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_it_is_wanted_where_the_kernel_serves() -> None:
    from longskip import kernels

    cpu = torch.device("cpu")
    assert not fused_step.wanted(cpu)
    with kernels.use("triton", "adamw"):
        assert fused_step.wanted(cpu)
    assert build.fused_step is fused_step
