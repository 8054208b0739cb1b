"""``longskip status``: from known folders, from a lock that is held, and quickly."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longskip.errors import RunFolderError
from longskip.launcher.cli import main
from longskip.launcher.status import lock_is_held, status_of
from longskip.profiling.ledger import Resumed
from tests.profiling.test_goodput import attempt, line, write

NOW = 20_000.0


def run_folder(
    folder: Path, status: str | None = "done", ended: float | None = 10_100.0, why: str | None = "done"
) -> Path:
    """70 of 100 steps in two attempts, 10 of the first done again; a commit at step 60."""
    entries = [Resumed(1, 0), line(1, 0, 20, 20.0), line(1, 20, 30, 10.0), Resumed(2, 20), line(2, 20, 70, 25.0)]
    attempts = [attempt(1, 10_000.0, 10_040.0, "rank 1 died"), attempt(2, 10_045.0, ended, why)]
    incidents = [
        {"time": 1.0, "attempt": 1, "step": 30, "kind": kind, "detail": detail, "token": "s3cret"}
        for kind, detail in (
            ("rank_died", "rank 1 died at step 31"),
            ("restarted", "from step 20"),
            ("spike", "x"),
            ("spike", "y"),
        )
    ]
    write(folder, entries, attempts, incidents)
    metrics = [{"step": s, "attempt": 2, "time": 10_050.0 + s, "loss/global_avg": 1.0} for s in (20, 70)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*metrics, {"step": 71, "x": 1}]))
    if status is not None:
        (folder / "run.json").write_text(json.dumps({"name": folder.name, "status": status}))
    for step in (20, 60):
        commit = folder / "checkpoints" / f"step-{step:08d}"
        commit.mkdir(parents=True)
        (commit / "manifest.json").write_text("{}")
        os.utime(commit / "manifest.json", (NOW - 100 + step, NOW - 100 + step))
    (folder / "checkpoints" / "step-00000070.tmp").mkdir()
    return folder


def test_what_every_rank_tells_is_one_incident(tmp_path: Path) -> None:
    rows = [("spike", 7, 0), ("spike", 7, 1), ("spike", 8, 1), ("bad_checkpoint", 8, 0), ("bad_checkpoint", 8, 0)]
    incidents = [{"attempt": 1, "kind": kind, "step": step, "rank": rank} for kind, step, rank in rows]
    write(tmp_path / "run", [Resumed(1, 0), line(1, 0, 9, 9.0)], [], incidents)
    found = status_of(tmp_path / "run", now=NOW)
    assert found.incident_count == 4 and [row["kind"] for row in found.incidents][1:] == ["bad_checkpoint"] * 2


@pytest.mark.parametrize(("rank_says", "told", "stops"), [(True, ["spike"], 1), (False, ["signal", "spike"], 0)])
def test_a_stop_that_was_asked_for_is_no_incident(tmp_path: Path, rank_says: bool, told: list[str], stops: int) -> None:
    """The supervisor says that ranks were asked, a rank that they saved; where none says so, the asking is kept."""
    incidents = [
        {
            "attempt": 1,
            "kind": "signal",
            "step": 9,
            "node": 0,
            "detail": "SIGINT to node 0: all ranks are asked to save",
        },
        {"attempt": 1, "kind": "spike", "step": 5, "rank": 0},
    ]
    if rank_says:
        incidents.append({"attempt": 1, "kind": "signal", "step": 9, "rank": 0, "detail": "saved and stopped"})
    write(tmp_path / "run", [Resumed(1, 0), line(1, 0, 9, 9.0)], [], incidents)
    found = status_of(tmp_path / "run", now=NOW)
    assert [row["kind"] for row in found.incidents] == told and found.incident_count == len(told)
    assert found.stops == stops and found.as_json()["stops"] == stops


def test_a_commit_after_the_last_line_is_the_step(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    commit = run / "checkpoints" / "step-00000085"
    commit.mkdir()
    (commit / "manifest.json").write_text("{}")
    found = status_of(run, now=NOW)
    assert (found.step, found.committed) == (85, 85)


def test_a_finished_run(tmp_path: Path) -> None:
    found = status_of(run_folder(tmp_path / "run"), now=NOW)
    assert (found.name, found.state, found.step, found.steps, found.eta) == ("run", "done", 70, 100, None)
    assert (found.committed, found.committed_age) == (60, 40.0)
    assert (found.attempts, found.restarts, found.incident_count, found.world) == (2, 1, 4, 2)
    assert [row["kind"] for row in found.incidents] == ["restarted", "spike", "spike"]
    assert found.wall == 40 + 5 + 55 and found.goodput == pytest.approx(45 / 100)
    assert found.images_per_second == pytest.approx(24 / 55) and found.mfu is None
    assert "s3cret" not in json.dumps(found.as_json())


def test_a_running_run(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", "failed", None, None)
    holder = (
        "import fcntl, sys\nfile = open(sys.argv[1], 'a+')\nfcntl.flock(file, fcntl.LOCK_EX)\n"
        "print(flush=True)\nsys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(run / "run.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    found = status_of(run, now=10_145.0)
    assert found.state == "running" and found.eta == pytest.approx(
        30 * 55 / 80
    )  # 30 steps left at the last lines' rate
    assert found.wall == 40 + 5 + 100 and found.goodput == pytest.approx(45 / 145)
    process.communicate(b"")
    assert status_of(run, now=NOW).state == "crashed"  # its attempt has no end, and nobody holds the lock


@pytest.mark.parametrize(
    ("status", "ended", "state"),
    [("saved", 10_100.0, "saved"), ("failed", 10_100.0, "failed"), ("running", 10_100.0, "crashed"), ("done", None, "crashed"),
     (None, None, "crashed"), ("strange", 10_100.0, "crashed")],
)  # fmt: skip
def test_how_a_run_ended(tmp_path: Path, status: str | None, ended: float | None, state: str) -> None:
    assert status_of(run_folder(tmp_path / "run", status, ended), now=NOW).state == state


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("train: {steps: 5}\n")
    found = status_of(tmp_path / "run", now=NOW)
    assert (found.state, found.step, found.goodput, found.committed) == ("new", 0, None, None)
    with pytest.raises(RunFolderError):
        status_of(tmp_path / "nothing")


def test_the_lock_of_a_job_that_starts_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of this machine: not even for a moment may the lock be taken, or a start in that moment would be refused."""
    lock = tmp_path / "run.lock"
    assert not lock_is_held(lock)
    lock.write_text(f"process 1 on {socket.gethostname()}, started 2026-01-01 00:00:00\n")

    def taken(*arguments: Any) -> None:
        raise AssertionError("the lock was taken")

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", taken)
        assert not lock_is_held(lock)
    lock.write_text("process 1 on another-machine, started 2026-01-01 00:00:00\n")
    assert not lock_is_held(lock)
    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert lock_is_held(lock)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    with pytest.raises(SystemExit) as ended:
        main(["status"])
    assert ended.value.code == 2 and "no run under" in capsys.readouterr().err
    for name in ("one", "two"):
        run_folder(tmp_path / "runs" / name)
    with pytest.raises(SystemExit):
        main(["status"])
    said = capsys.readouterr().out
    for word in ("one", "two", "done", "70/100", "60, ", "2 (1 again)", "4 incident(s)", "restarted at step 30"):
        assert word in said, said
    assert "\x1b]" not in said and "\x07" not in said
    monkeypatch.setenv("COLUMNS", "70")
    with pytest.raises(SystemExit):
        main(["status"])
    narrow = capsys.readouterr().out
    table = narrow.partition("one: ")[0].splitlines()
    assert max(map(len, table)) <= 70 and "left out for want of width: starts" in narrow and "(1 again)" not in narrow
    for word in ("one", "two", "done", "70/100", "60, ", "goodput"):
        assert word in narrow, narrow
    with pytest.raises(SystemExit):
        main(["status", "two", "--json"])
    (told,) = json.loads(capsys.readouterr().out)
    assert told["name"] == "two" and told["state"] == "done" and told["goodput"] is not None


def test_without_torch(tmp_path: Path) -> None:
    run_folder(tmp_path / "run")
    code = (
        "import sys\nfrom longskip.launcher.cli import main\ntry:\n    main(['status', 'run'])\nexcept SystemExit:\n    pass\n"
        "sys.exit(3 if {'torch', 'deepspeed', 'scipy', 'matplotlib'} & set(sys.modules) else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, timeout=60).returncode == 0
