"""Buckets, mixes and windows through a whole training: order, exact costs, validation, resume."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longskip.engine import checkpoint
from longskip.engine.config import Config
from longskip.engine.data.pack import write_shards
from longskip.engine.data.shapes import write_shapes
from longskip.engine.data.sources import open_source
from longskip.errors import ConfigError
from tests.engine.test_resume import assert_same_run
from tests.engine.test_training import losses
from tests.ranks import small_config, train_ranks

STEPS = 8
SIZES = ((32, 32), (24, 40), (40, 24))


@pytest.fixture(scope="module")
def mixed_aspects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 pictures of three aspect ratios, and 24 for validation."""
    root = tmp_path_factory.mktemp("aspects")
    rng = np.random.default_rng(0)
    for part, count in (("train", 90), ("validation", 24)):
        samples = []
        for i in range(count):
            height, width = SIZES[i % 3]
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
            samples.append({"__key__": f"{i:06d}", "png": buffer.getvalue(), "txt": f"a picture number {i % 7}"})
        write_shards(samples, root / part, per_shard=40)
    return root


def bucketed(data: Path, **groups: object) -> Config:
    return small_config(
        data,
        data={"path": str(data / "train"), "validation": str(data / "validation"), "buckets": [list(s) for s in SIZES]},
        train={"steps": STEPS},
        checkpoint={"every": 4},
        eval={"every": STEPS, "samples": 24, "time_bins": 4},
        **groups,
    )


def test_buckets_train_resume_and_cost_exactly(mixed_aspects: Path, tmp_path: Path) -> None:
    config = bucketed(mixed_aspects)
    assert train_ranks(2, config, tmp_path / "straight") == [0, 0]
    assert train_ranks(2, config, tmp_path / "broken", "step.begin:kill:rank=1:step=6") != [0, 0]
    assert train_ranks(2, config, tmp_path / "broken") == [0, 0]
    assert_same_run(tmp_path / "broken", tmp_path / "straight", STEPS)
    state = checkpoint.read_state(tmp_path / "straight" / "checkpoints" / f"step-{STEPS:08d}")
    # uvit-tiny has patch 8: 16 image tokens of 32×32, 15 of 24×40; 30 pictures of each in batches of 8
    spec = config.backbone()
    by_bucket = {size: spec.flops(8, size) for size in SIZES}
    assert {by_bucket[size].image_tokens for size in SIZES} == {8 * 16, 8 * 15}
    log = (tmp_path / "straight" / "logs" / "rank-0.log").read_text()
    assert "aspect buckets" in log and "32 x 32" in log
    square = (state["image_tokens"] - STEPS * 8 * 15) // 8
    assert 2 <= square <= 4  # every third batch is square, whatever the interleaving begins with
    sides = STEPS - square
    assert state["model_flops"] == square * by_bucket[(32, 32)].model_flops + sides * by_bucket[(24, 40)].model_flops
    lines = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    assert next(line for line in lines if "validation/loss" in line)["validation/samples"] == 24


def test_a_mix_trains_and_its_data_are_its_identity(
    shapes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_shapes(tmp_path / "two", 60, seed=5, objects=2)

    def mixed(*weights: int, steps: int = 4) -> Config:
        paths = (shapes / "train", tmp_path / "two")
        mix = [{"path": str(path), "weight": weight} for path, weight in zip(paths, weights, strict=True)]
        groups = {"data": {"path": "", "mix": mix, "validation": None}, "encoders": {"text": {"n_tokens": 32}}}
        return small_config(shapes, train={"steps": steps}, checkpoint={"every": 4}, **groups)

    run = tmp_path / "run"
    assert train_ranks(2, mixed(3, 1), run) == [0, 0]
    assert len(losses(run)) == 4
    own = json.loads((run / "run.json").read_text())["data"]
    members = [open_source(str(path)).fingerprint() for path in (shapes / "train", tmp_path / "two")]
    identity = hashlib.sha256(json.dumps([[members[0], 3], [members[1], 1]]).encode()).hexdigest()
    assert own == {"samples": 360, "fingerprint": identity}
    assert train_ranks(1, mixed(1, 1, steps=5), run) == [2]
    assert "RunMismatchError" in (said := capfd.readouterr().out) and "data.mix" in said
    shutil.rmtree(tmp_path / "two")
    write_shapes(tmp_path / "two", 60, seed=6, objects=2)  # as many others in the same place
    assert train_ranks(1, mixed(3, 1, steps=5), run) == [2]
    assert "RunMismatchError" in (said := capfd.readouterr().out) and "is not the data that" in said
    assert json.loads((run / "run.json").read_text())["data"] == own and len(losses(run)) == 4


def test_windows_train_the_same_whatever_the_ranks(mixed_aspects: Path, tmp_path: Path) -> None:
    config = bucketed(mixed_aspects, deepspeed={"zero_stage": 0}).model_copy()
    data = config.data.model_copy(update={"shuffle": "window", "window_shards": 2, "buckets": "off"})
    config = config.model_copy(update={"data": data})
    assert train_ranks(1, config, tmp_path / "one") == [0]
    assert train_ranks(2, config, tmp_path / "two") == [0, 0]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert max(abs(one[s] - two[s]) / one[s] for s in one) <= 1e-6


def test_urls_want_windows(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.shuffle: window"):
        small_config(tmp_path, data={"path": "https://example.org/shards", "validation": None})
