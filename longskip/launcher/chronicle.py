"""What node 0's supervisor writes into the run folder, and says: incidents, and when attempts began and ended (no torch)."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from longskip.engine.runs import RunFolder, append_json, tolerant
from longskip.launcher.members import Note
from longskip.profiling import ledger

_STEP = re.compile(r"step-(\d{8})")


def newest_commit(run: Path) -> int:
    """The newest committed step of a run folder, −1 for none; what a commit holds is not looked at."""
    names = (_STEP.fullmatch(path.name) for path in (run / "checkpoints").glob("step-*"))
    return max((int(name[1]) for name in names if name), default=-1)


class Chronicle:
    """Lines of ``incidents.jsonl`` and ``launch/attempts.jsonl``, written once the folder is a run's.

    A start that never becomes a run leaves nothing behind: what was made for its ranks is taken away again.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._lock = RunFolder(run / "launch")
        self._waiting: list[tuple[Path, dict[str, Any]]] = []
        self._attempt: dict[str, Any] = {}

    def lock(self) -> None:
        """Be the only supervisor of this run until ``close``; raises RunLockedError naming the other one."""
        self._lock.lock()

    def last_attempt(self) -> int:
        """The newest attempt's number in the run's records, so that numbers go on; 0 for a new run."""
        numbers = [entry.attempt for entry in ledger.read(self.run / "ledger.jsonl").entries]
        path = self.run / "launch" / "attempts.jsonl"
        for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
            try:
                numbers.append(int(json.loads(line)["attempt"]))
            except (ValueError, TypeError, KeyError):
                continue  # a line that a crash has cut short
        return max(numbers, default=0)

    def write(self, notes: list[Note]) -> None:
        """Take the notes out of the list: say them, and write what is to be kept."""
        while notes:
            self._take(notes.pop(0))
        if self._waiting and (self.run / "config.yaml").is_file():
            for path, line in self._waiting:
                with tolerant(path.name):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    append_json(path, line)
            self._waiting.clear()

    def _take(self, note: Note) -> None:
        now = time.time()
        if note.kind in ("started", "ended"):
            if note.kind == "started":
                nodes = [node for node, share in enumerate(note.shares) if share]
                self._attempt = {"attempt": note.attempt, "nodes": nodes, "world": sum(note.shares), "started": now}
            ended = {"ended": now, "why": note.detail} if note.kind == "ended" else {"ended": None, "why": None}
            line = self._attempt | ended | {"step": max(note.step, 0)}
            self._waiting.append((self.run / "launch" / "attempts.jsonl", line))
            return
        if note.kind == "restarted":
            self._say(f"the ranks start again {note.detail}")
        else:
            self._say(note.detail)
        if note.kind == "stopped":
            return
        line = {
            "time": now,
            "attempt": note.attempt,
            "step": max(note.step, 0),
            "kind": note.kind,
            "detail": note.detail,
        }
        line |= {name: value for name in ("node", "rank") if (value := getattr(note, name)) is not None}
        self._waiting.append((self.run / "incidents.jsonl", line))

    def _say(self, text: str) -> None:
        print(f"longskip: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """At the end: a folder that never became a run is left without what was made for its ranks."""
        self._lock.unlock()
        if (self.run / "config.yaml").exists() or not self.run.is_dir():
            return
        (self.run / "launch" / "run.lock").unlink(missing_ok=True)
        for log in (self.run / "logs").glob("*"):
            if re.fullmatch(r"rank-\d+\.log|stacks-\d+-rank-\d+\.txt", log.name):
                log.unlink(missing_ok=True)
        for folder in (self.run / "logs", self.run / "launch", self.run):
            with tolerant("the empty run folder"):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
