"""Digests of what all ranks have, and ranks that are found to differ before anything of it is saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longskip.engine import checkpoint, digests
from longskip.engine.config import Config
from longskip.errors import DesyncError
from tests.engine.test_numbers import lines
from tests.ranks import run_ranks, small_config, train_ranks


def by_python(tensor: torch.Tensor) -> int:
    """The formula in Python's own integers."""
    width = tensor.element_size()
    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    values = [int.from_bytes(raw[i : i + width], "little", signed=width > 1) for i in range(0, len(raw), width)]
    total = sum(value * (2 * i + 1) for i, value in enumerate(values)) % (1 << 64)
    return total - (1 << 64) if total >> 63 else total


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 50), st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.uint8]), st.integers(1, 9),
    st.integers(0, 1 << 30), st.data(),
)  # fmt: skip
def test_the_digest_is_the_formula_and_sees_one_bit(
    n: int, dtype: torch.dtype, piece: int, seed: int, data: st.DataObject
) -> None:
    """In pieces of any size; each bit of each element, and the order, change it."""
    bits = np.random.default_rng(seed).integers(0, 256, n * dtype.itemsize, dtype=np.uint8)
    tensor = torch.from_numpy(bits).view(dtype)
    patch = pytest.MonkeyPatch()
    patch.setattr(digests, "PIECE", piece)
    try:
        own = int(digests.digest(tensor))
        assert own == by_python(tensor)
        flipped = bits.copy()
        bit = data.draw(st.integers(0, 8 * len(bits) - 1))
        flipped[bit // 8] ^= 1 << bit % 8
        assert int(digests.digest(torch.from_numpy(flipped).view(dtype))) != own
        other = bits.reshape(n, -1)[::-1].copy()
        if not np.array_equal(other[0], other[-1]) and n == 2:
            assert int(digests.digest(torch.from_numpy(other.reshape(-1)).view(dtype))) != own
    finally:
        patch.undo()


def test_who_differs_is_named_beside_most() -> None:
    assert digests._difference("step", [7, 7, 7]) == ""
    assert digests._difference("step", [7, 9, 7, 7]) == "step: rank 1 has 9, 3 ranks 7"
    assert digests._difference("step", [7, 9]) == "step: rank 1 has 9, rank 0 7"
    assert (
        digests._difference("a", [-(1 << 60), -(1 << 60), 1 << 50])
        == f"a: rank 2 has {1 << 50:016x}, 2 ranks f{0:015x}"
    )


def test_settings_of_a_node_are_not_compared(shapes: Path) -> None:
    base = small_config(shapes)
    moved = base.model_copy(update={"data": base.data.model_copy(update={"path": "/elsewhere", "workers": 3})})
    assert digests.of_config(base) == digests.of_config(moved)
    assert digests.of_config(base) != digests.of_config(small_config(shapes, optim={"lr": 2e-3}))


def config_of(shapes: Path, stage: int, every: int = 1, **train: Any) -> Config:
    return small_config(
        shapes, train={"steps": 6, "digest_every": every, **train}, checkpoint={"every": 2},
        deepspeed={"zero_stage": stage},
    )  # fmt: skip


def assert_found(run: Path, step: int, what: str, saved: list[str]) -> None:
    (told,) = [line for line in lines(run / "incidents.jsonl") if line["kind"] == "desync"]
    assert told["step"] == step and f"at step {step}" in told["detail"] and what in told["detail"]
    assert "rank 1 has" in told["detail"] and ", rank 0 " in told["detail"]
    assert [p.name for p in checkpoint.steps_in(run / "checkpoints")] == saved
    for name in saved:
        checkpoint.verify(run / "checkpoints" / name)


@pytest.mark.parametrize(
    ("stage", "every"),
    [(0, 1), (2, 1), pytest.param(1, 1, marks=pytest.mark.slow), pytest.param(3, 1, marks=pytest.mark.slow),
     pytest.param(0, 100, marks=pytest.mark.slow)],
)  # fmt: skip
def test_one_flipped_bit_of_a_weight(shapes: Path, tmp_path: Path, stage: int, every: int) -> None:
    """Found at the same step, or before the next save (digests every 100 steps): the commit before it is the last."""
    run = tmp_path / "run"
    step = 4 if every == 1 else 3
    assert train_ranks(2, config_of(shapes, stage, every), run, f"step.done:flip:rank=1:step={step}") == [1, 1]
    assert_found(run, 4, "weights backbone.embed.", ["step-00000002"])
    assert train_ranks(2, config_of(shapes, stage, every), run) == [0, 0]  # a start from the commit makes them alike


def other_cursor(job: Any) -> None:
    job.state.cursor = job.state.cursor.advance(8)


def other_place_in_the_data(job: Any) -> None:
    job.reader.cursor = replace(job.reader.cursor, skipped=((80, 88),))


def other_average(job: Any) -> None:
    job.shards.tensor(job.shards.slices[3], "ema")[0] += 1e-6


def other_moment(job: Any) -> None:
    job.shards.tensor(job.shards.slices[-1], "exp_avg_sq")[-1] += 1e-6


def other_count(job: Any) -> None:
    job.state.bad_samples += 1


def other_rate(job: Any) -> None:
    object.__setattr__(job.config.optim, "lr", 2e-3)


def _differing(cases: list[tuple[Config, Callable[[Any], None], str]], folder: Path) -> None:
    from longskip.engine.distributed import join
    from longskip.engine.prepare import prepare

    world = join()
    for number, (config, differ, what) in enumerate(cases):
        job = prepare(config, folder / f"run-{number}", world)
        job.step(job.read())
        if world.rank == 1:
            differ(job)
        with pytest.raises(DesyncError, match=f"at step 2 .*{what}: rank 1 has [0-9a-f]+, rank 0 [0-9a-f]+") as met:
            job.step(job.read())
        assert met.value.alike and not met.value.final
        with pytest.raises(DesyncError):
            job.save()
        job.close("failed")
        assert not checkpoint.steps_in(folder / f"run-{number}" / "checkpoints")


def test_whatever_differs_is_named_and_not_saved(shapes: Path, tmp_path: Path) -> None:
    config = config_of(shapes, 3, 2)
    cases = [
        (config, other_cursor, "position"),
        (config, other_place_in_the_data, "cursor"),
        (config, other_count, "counters"),
        (config, other_rate, "learning rate"),
        (config_of(shapes, 0, 2), other_average, "ema "),
        (config_of(shapes, 0, 2, dtype="bf16"), other_moment, "weight "),  # the master, not yet what bf16 shows
    ]
    cases = [(c, differ, what if what[-1] != " " else f"{what}[^ ]+") for c, differ, what in cases]
    assert run_ranks(2, _differing, cases, tmp_path) == [0, 0]


def test_switched_off(shapes: Path, tmp_path: Path) -> None:
    """A rank whose average differs is then not found: it is the comparison that finds it."""
    run = tmp_path / "run"
    assert train_ranks(2, config_of(shapes, 2, 0), run, "step.done:flip:rank=1:step=3") == [0, 0]
