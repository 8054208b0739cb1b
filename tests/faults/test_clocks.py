"""Clocks that differ between ranks, and that are set back while a run goes on."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from longskip.engine.config import Config
from longskip.profiling import ledger
from tests.engine.test_resume import assert_same_run, config_of
from tests.ranks import run_ranks

DAY = 86400.0


def _train_by_other_clocks(config: Config, run: Path, back: float) -> int:
    """``train`` where rank R's wall clock is R days ahead and is set back by ``back`` seconds every tenth of a second."""
    from longskip.engine.trainer import train

    real, begin, ahead = time.time, time.monotonic(), int(os.environ["RANK"]) * DAY
    time.time = lambda: real() + ahead - back * int(10 * (time.monotonic() - begin))
    return train(config, run)


@pytest.mark.slow
def test_ranks_with_other_clocks_make_one_run(shapes: Path, unbroken: Path, tmp_path: Path) -> None:
    """The same run as by one clock, in one folder; every duration in its ledger is one that could be."""
    run, config = tmp_path / "run", config_of(shapes)
    begin = time.monotonic()
    kill = {"LONGSKIP_FAULT": "step.begin:kill:rank=0:step=5"}
    assert run_ranks(2, _train_by_other_clocks, config, run, DAY, environment=kill)[0] < 0
    assert run_ranks(2, _train_by_other_clocks, config, run, -DAY) == [0, 0]
    took = time.monotonic() - begin
    assert_same_run(run, unbroken)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    lines = ledger.read(run / "ledger.jsonl").lines
    assert all(0 < line.seconds < took and 0 <= line.data_wait_seconds <= line.seconds for line in lines)
    assert sum(line.seconds for line in lines) < took
