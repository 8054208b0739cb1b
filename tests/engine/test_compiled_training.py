"""``engine.compile`` at every ZeRO stage, in both layouts, with checkpointing: the losses of the run without it."""

from __future__ import annotations

from functools import partialmethod
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from longskip.engine.config import Config
from longskip.engine.trainer import train
from longskip.models.uvit import UViT
from tests.engine.test_training import losses
from tests.figures import figure
from tests.ranks import run_ranks, small_config

STEPS = 10


def compare(shapes: Path, tmp_path: Path, backend: str, stage: int, ranks: int, **engine: object) -> float:
    """Worst relative difference of a step's loss between a compiled run and the same run without."""

    def train_with(config: Config, run: Path) -> int:
        UViT.compile_blocks = partialmethod(UViT.compile_blocks, backend)  # in the forked rank alone
        torch._dynamo.reset()  # whatever the forking process compiled before
        counters.clear()
        code = train(config, run)
        # Blocks with and without a skip, in training and in the validation at steps 5 and 10.
        assert counters["stats"]["unique_graphs"] == (4 if config.engine.compile else 0)
        return code

    curves = []
    for compiled in (False, True):
        config = small_config(
            shapes, train={"steps": STEPS}, deepspeed={"zero_stage": stage}, eval={"every": 5, "samples": 8},
            engine={"compile": compiled, **engine},
        )  # fmt: skip
        run = tmp_path / f"{'compiled' if compiled else 'plain'}"
        assert run_ranks(ranks, train_with, config, run) == [0] * ranks
        curves.append(losses(run))
    assert curves[0].keys() == curves[1].keys() == set(range(1, STEPS + 1))
    return max(abs(curves[1][step] / curves[0][step] - 1) for step in curves[0])


def test_compiled_zero3(shapes: Path, tmp_path: Path) -> None:
    """Traced and differentiated ahead, but run op by op, which needs no C++ compiler."""
    assert compare(shapes, tmp_path, "aot_eager", 3, 2, checkpointing=2) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "engine"),
    [(0, {}), (1, {"layout": "named"}), (2, {"checkpointing": 1}), (3, {}), (3, {"layout": "named"}),
     (3, {"checkpointing": 2})],
)  # fmt: skip
def test_compiled_by_inductor(shapes: Path, tmp_path: Path, stage: int, engine: dict[str, object]) -> None:
    worst = compare(shapes, tmp_path, "inductor", stage, 2, **engine)
    figure(f"engine.compile, stage {stage}, {engine}, 2 ranks: worst relative loss difference {worst:.1e}")
    assert worst <= 1e-5
