"""What a run is at, from its folder alone: nothing is asked of the running job, and no lock of it is touched (no torch)."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from longskip.engine.secrets import redacted
from longskip.profiling.goodput import attempts_of, goodput
from longskip.profiling.ledger import totals
from longskip.profiling.runlog import RunLog

State = Literal["running", "done", "saved", "failed", "crashed", "new"]

INCIDENTS = 3
_STEP = re.compile(r"step-(\d+)")
_OWNER = re.compile(r"process (\d+) on (\S+), started")
_RECENT_LINES = 5


@dataclass(frozen=True)
class Status:
    """``step`` is the last one known, logged or committed; ``committed`` the newest checkpoint's; times in seconds, shares 0
    to 1. ``stops`` are attempts that saved and ended because they were asked to: no incidents.

    ``state``: ``running`` while a job holds the run's lock; else how its last job ended; ``crashed`` without a word.
    """

    name: str
    path: str
    state: State
    step: int
    steps: int | None
    eta: float | None
    images_per_second: float | None
    mfu: float | None
    committed: int | None
    committed_age: float | None
    attempts: int
    restarts: int
    world: int | None
    incidents: tuple[dict[str, Any], ...]
    incident_count: int
    stops: int
    goodput: float | None
    wall: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def status_of(run: str | Path, *, now: float | None = None) -> Status:
    """The status of a run's folder, or of its name under ``runs/``; raises RunFolderError where it is none."""
    now = time.time() if now is None else now
    log = RunLog.open(run)
    stopped = _stopped(log.incidents)
    incidents = [
        row for row in _told_once(log.incidents) if row.get("kind") != "signal" or row.get("attempt") not in stopped
    ]
    held = lock_is_held(log.path / "run.lock")
    lines = log.ledger.lines
    recent = totals(lines[-_RECENT_LINES:])
    steps = log.config.get("train", {}).get("steps") if isinstance(log.config.get("train"), dict) else None
    step = max((step for step, row in log.metrics.items() if "loss/global_avg" in row), default=log.sums.last_step)
    committed, when = _newest_commit(log.path)
    step = max(step, committed or 0)  # a save between two lines, on a signal above all
    eta = None
    if held and isinstance(steps, int) and recent.steps and recent.seconds:
        eta = max(0, steps - step) * recent.seconds / recent.steps
    watched = attempts_of(log)
    ledgers = {entry.attempt for entry in log.ledger.entries}
    spent = goodput(log, now=now if held else None)
    return Status(
        name=log.name, path=str(log.path), state=_state(log, held), step=step,
        steps=steps if isinstance(steps, int) else None, eta=eta, images_per_second=recent.images_per_second,
        mfu=recent.mfu, committed=committed, committed_age=None if when is None else max(0.0, now - when),
        attempts=len(ledgers | {each.attempt for each in watched}),
        restarts=sum(row.get("kind") == "restarted" for row in log.incidents),
        world=watched[-1].world if watched else lines[-1].devices if lines else None,
        incidents=tuple(redacted(row) for row in incidents[-INCIDENTS:]), incident_count=len(incidents),
        stops=len(stopped),
        goodput=spent.share, wall=spent.wall,
    )  # fmt: skip


def _stopped(incidents: Sequence[dict[str, Any]]) -> set[int]:
    """Attempts of which a rank says that it saved and stopped on a signal.

    A supervisor's word that the ranks were asked to is of the same stop, and an incident where none of them came to it.
    """
    own = (row for row in incidents if row.get("kind") == "signal" and isinstance(row.get("rank"), int))
    return {row["attempt"] for row in own if isinstance(row.get("attempt"), int)}


def _told_once(incidents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What several ranks tell of the same step once, in the words of the first of them."""
    first: dict[tuple[Any, ...], Any] = {}
    kept = []
    for row in incidents:
        what, rank = (row.get("attempt"), row.get("step"), row.get("kind")), row.get("rank")
        if first.setdefault(what, rank) == rank:
            kept.append(row)
    return kept


def lock_is_held(lock: Path) -> bool:
    """Whether a process has the run's lock. It is taken, and for a moment, only where it cannot be a job's on this machine.

    Where this machine's list of locks knows it, or its owner was of this machine, the file's lock is left alone: a job that
    starts in the same moment would be told that the run is in use.
    """
    try:
        what = lock.stat()
        owner = _OWNER.match(lock.read_text("utf-8", errors="replace"))
    except OSError:
        return False
    listed = _listed(what)
    if listed is not None and (listed or (owner is not None and owner[2] == socket.gethostname())):
        return listed
    try:
        with open(lock, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _listed(what: os.stat_result) -> bool | None:
    """Whether the kernel's list of locks has this file; None without such a list."""
    try:
        text = Path("/proc/locks").read_text("ascii", errors="replace")
    except OSError:
        return None
    place = f"{os.major(what.st_dev):02x}:{os.minor(what.st_dev):02x}:{what.st_ino}"
    return any(place in line.split() for line in text.splitlines() if "->" not in line)


def _state(log: RunLog, held: bool) -> State:
    if held:
        return "running"
    if not log.metrics and not log.ledger.entries and log.status in (None, "running"):
        return "new"
    match log.status:
        case "done" | "saved" | "failed":
            # A later attempt may have died without a word over what an earlier one left.
            last = attempts_of(log)[-1:]
            return "crashed" if last and last[0].ended is None else log.status  # type: ignore[return-value]
    return "crashed"


def _newest_commit(run: Path) -> tuple[int | None, float | None]:
    """(step, time) of the newest committed checkpoint; whether it is whole, `longskip checkpoint verify` says."""
    found: tuple[int, float] | None = None
    for manifest in (run / "checkpoints").glob("step-*/manifest.json"):
        match = _STEP.fullmatch(manifest.parent.name)
        try:
            if match and (found is None or int(match[1]) > found[0]):
                found = int(match[1]), manifest.stat().st_mtime
        except OSError:
            continue  # pruned in this moment
    return found if found is not None else (None, None)
