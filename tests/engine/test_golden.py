"""Today's losses against the golden ones in docs/results/bf16.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longskip.engine.configio import load_config
from longskip.engine.data.shapes import write_shapes
from tests.golden import GOLDEN, curve, differences
from tests.ranks import train_ranks

ROOT = Path(__file__).parents[2]
STEPS = 60


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-4), ("bf16", 0.05)])
def test_the_golden_losses_come_again(tmp_path: Path, dtype: str, bound: float) -> None:
    """60 steps of the golden run. fp32 differs by the rounding of other processors, bf16 by its growth in 60 steps."""
    golden = json.loads((ROOT / GOLDEN).read_text("utf-8"))["curves"][dtype]["loss"]
    write_shapes(tmp_path / "train", 20_000)
    overrides = [f"train.dtype={dtype}", f"data.path={tmp_path / 'train'}", "data.validation=null"]
    config = load_config(ROOT / "configs/golden.yaml", overrides)
    # stopped early by its last step alone, which the schedule must not see: the warm-up ends at step 100
    config = config.model_copy(update={"train": config.train.model_copy(update={"steps": STEPS})})
    assert train_ranks(1, config, tmp_path / "run") == [0]
    ours = curve(tmp_path / "run")["loss"]
    assert len(ours) == STEPS // 5
    assert max(abs(ours[step] - golden[str(step)]) / golden[str(step)] for step in ours) <= bound


def test_bf16_with_fp32_masters_follows_fp32() -> None:
    """The committed curves themselves: no drift beside the noise of bf16's rounding."""
    recorded = json.loads((ROOT / GOLDEN).read_text("utf-8"))
    fp32, bf16 = ({int(s): v for s, v in recorded["curves"][d]["loss"].items()} for d in ("fp32", "bf16"))
    assert len(fp32) == 100
    assert differences(fp32, bf16) == recorded["relative"]
    assert abs(recorded["relative"]["signed_mean"]) <= 2e-3
    assert recorded["relative"]["mean"] <= 0.02
    last = [recorded["curves"][d]["validation"]["500"] for d in ("fp32", "bf16")]
    assert abs(last[1] - last[0]) / last[0] <= 0.01
