"""Where a run's wall time went: known histories, added up by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longskip.profiling import reportdata
from longskip.profiling.goodput import Goodput, attempts_of, goodput
from longskip.profiling.ledger import LedgerLine, Resumed, append
from longskip.profiling.runlog import RunLog


def line(attempt: int, from_step: int, step: int, seconds: float) -> LedgerLine:
    counts = {"images": 8, "image_tokens": 8, "tokens": 8, "model_flops": 1, "hardware_flops": 1, "six_nd": 1}
    return LedgerLine(
        attempt=attempt, from_step=from_step, step=step, seconds=seconds, data_wait_seconds=0.0, mfu=None, hfu=None, loss=1.0,
        devices=2, device_name="cpu", **counts,
    )  # fmt: skip


def write(folder: Path, entries: list[Any], attempts: list[dict[str, Any]], incidents: list[dict[str, Any]]) -> RunLog:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("train: {steps: 100}\n")
    for entry in entries:
        append(folder / "ledger.jsonl", entry)
    (folder / "launch").mkdir()
    (folder / "launch" / "attempts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in attempts))
    (folder / "incidents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in incidents))
    return RunLog.open(folder)


def attempt(number: int, started: float, ended: float | None, why: str | None) -> dict[str, Any]:
    return {"attempt": number, "nodes": [0], "world": 2, "started": started, "ended": ended, "why": why, "step": 0}


def test_a_run_that_was_killed_and_started_again(tmp_path: Path) -> None:
    """Attempt 1: 40 s, 30 of steps, 10 of them lost. 5 s later attempt 2: 50 s, 35 of steps, saved on a signal. A night.
    Attempt 3: 20 s, 15 of steps."""
    entries = [
        Resumed(1, 0), line(1, 0, 20, 20.0), line(1, 20, 30, 10.0), Resumed(2, 20), line(2, 20, 60, 35.0), Resumed(3, 60),
        line(3, 60, 70, 15.0),
    ]  # fmt: skip
    attempts = [
        attempt(1, 1000.0, None, None), attempt(1, 1000.0, 1040.0, "rank 1 died"), attempt(2, 1045.0, None, None),
        attempt(2, 1045.0, 1095.0, "saved"), attempt(3, 9000.0, None, None), attempt(3, 9000.0, 9020.0, "done"),
    ]  # fmt: skip
    incidents = [
        {"attempt": 1, "kind": "rank_died"},
        {"attempt": 1, "kind": "restarted"},
        {"attempt": 2, "kind": "signal"},
    ]
    log = write(tmp_path / "run", entries, attempts, incidents)
    found = goodput(log)
    assert found == Goodput(wall=115.0, useful=70.0, redone=10.0, around=30.0, pauses=5.0, watched=True)
    assert found.share == pytest.approx(70 / 115) and found.as_json()["share"] == found.share
    assert [each.why for each in attempts_of(log)] == ["rank 1 died", "saved", "done"]
    figure = next(f for f in reportdata.headline(log) if f.label == "Goodput")
    assert (figure.value, figure.note) == ("60.9%", "of 1 min 55 s from start to end was kept")
    assert [row["share"] for row in reportdata.wall_rows(log)] == ["60.9%", "8.7%", "26.1%", "4.3%", "100.0%"]


def test_a_pause_for_nodes_that_came_counts(tmp_path: Path) -> None:
    attempts = [attempt(1, 0.0, 10.0, "saved"), attempt(2, 13.0, 20.0, "done")]
    entries = [line(1, 0, 5, 5.0), line(2, 5, 10, 5.0)]
    assert goodput(write(tmp_path / "grown", entries, attempts, [])).pauses == 3.0
    asked = [{"attempt": 1, "kind": "signal"}]
    assert goodput(write(tmp_path / "asked", entries, attempts, asked)).pauses == 0.0


def test_an_attempt_that_runs_or_ended_unwritten(tmp_path: Path) -> None:
    log = write(tmp_path / "run", [line(1, 0, 5, 4.0)], [attempt(1, 100.0, None, None)], [])
    (tmp_path / "run" / "metrics.jsonl").write_text(
        '{"step": 5, "attempt": 1, "time": 107.0}\n{"step": 6, "attempt": 2, "time": 900}\n'
    )
    assert goodput(log, now=150.0).wall == 50.0  # it runs
    assert goodput(RunLog.open(tmp_path / "run")).wall == 7.0  # it ended with its supervisor
    bare = write(tmp_path / "bare", [line(1, 0, 5, 4.0)], [attempt(1, 100.0, None, None)], [])
    assert goodput(bare).wall == 4.0  # at least what it logged


def test_attempts_without_a_supervisor(tmp_path: Path) -> None:
    """Only the ledger knows of them: goodput is then its committed share."""
    log = write(tmp_path / "run", [line(1, 0, 10, 10.0), Resumed(2, 5), line(2, 5, 10, 5.0)], [], [])
    found = goodput(log)
    assert found == Goodput(wall=15.0, useful=log.sums.committed.seconds, redone=15.0 - log.sums.committed.seconds, around=0.0,
                            pauses=0.0, watched=False)  # fmt: skip
    assert found.share == log.sums.committed_share and reportdata.wall_rows(log) == []
    mixed = write(
        tmp_path / "mixed", [line(1, 0, 10, 10.0), line(2, 10, 20, 8.0)], [attempt(2, 50.0, 60.0, "done")], []
    )
    assert goodput(mixed).wall == 20.0


def test_nothing_yet_and_lines_that_are_none(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty", [], [], [])
    assert goodput(empty).share is None and attempts_of(empty) == []
    broken = write(tmp_path / "broken", [], [attempt(1, 0.0, 4.0, "done")], [])
    with open(tmp_path / "broken" / "launch" / "attempts.jsonl", "a") as file:
        file.write(
            '{"attempt": true, "started": 1}\n{"attempt": 2, "started": "x"}\n'
            '{"attempt": 3, "started": NaN}\n[1]\n{"attempt": 4, "st'
        )
    assert [each.attempt for each in attempts_of(RunLog.open(tmp_path / "broken"))] == [1]
    assert goodput(broken).share == 0.0
