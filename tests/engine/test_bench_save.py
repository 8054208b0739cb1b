"""``longskip bench save``: what it measures is there, adds up, and is judged as it says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from longskip.engine import bench_save
from longskip.errors import ConfigError


def test_a_small_one_measures_all_of_it(tmp_path: Path) -> None:
    result = bench_save.bench_save(depth=2, width=64, batch=2, ranks=(1,), steps=1, repeats=1, folder=tmp_path)
    (row,) = result["ranks"]
    assert not os.listdir(tmp_path)  # nothing of it is left
    # fp32 weights, two moments, the EMA, with DeepSpeed's padding.
    assert 16 * row["parameters"] <= row["bytes_per_rank"] <= 16.2 * result["parameters"]
    seconds = {name: each["median"] for name, each in row["seconds"].items()}
    assert set(bench_save.TIMES) - {"step_meanwhile"} <= set(seconds)
    assert all(value > 0 for name, value in seconds.items())
    assert seconds["plain"] <= 3 * (seconds["write"] + seconds["fsync"] + seconds["hash"])
    assert max(seconds["write"], seconds["fsync"], seconds["hash"]) <= seconds["plain"] * 1.001 + 1e-3
    page = bench_save.to_markdown(json.loads(json.dumps(result)))
    assert "## 1 rank(s)" in page and page.count("≤ 1.5") == page.count("≤ 2.0") == 2


def test_the_slowest_rank_of_a_turn_counts_and_goals_are_compared(tmp_path: Path) -> None:
    names = [name for name in bench_save.TIMES if name != "step_meanwhile"]
    times = [{name: [1.0, 1.0, 1.0] for name in names} | more for more in (
        {"held_warm": [1.0, 1.6, 1.0], "copy_warm": [1.0, 1.0, 1.0], "whole_warm": [3.9, 1.0, 1.0]},
        {"held_warm": [1.6, 1.0, 1.4], "copy_warm": [1.0, 1.0, 0.5], "whole_warm": [1.0, 4.0, 2.1]},
    )]  # fmt: skip
    for rank, found in enumerate(times):
        record = {"bytes": 160 + rank, "parameters": 10, "times": found}
        (tmp_path / f"rank-{rank}.json").write_text(json.dumps(record))
    row = bench_save._row(tmp_path, 2)
    assert row["seconds"]["held_warm"]["median"] == 1.6 and row["bytes_per_rank"] == 161
    assert row["ratios"]["held_warm"]["median"] == 1.6 and row["ratios"]["whole_warm"]["median"] == 3.9
    assert row["met"] == {"held_fresh": True, "held_warm": False, "whole_fresh": True, "whole_warm": False}


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="--batch 3 does not divide over 2 ranks"):
        bench_save.bench_save(batch=3, ranks=(1, 2))
