"""Goodput: the share of a run's wall time in which it took steps that were kept.

Useful time is that of the committed lines of the ledger: every step once. Wall time is that of the attempts, from the start
of their ranks to the end, as the supervisor wrote them into ``launch/attempts.jsonl``, and of the pauses in which it started
ranks again; the time in which nobody ran the run (a queue, a night) is none. Of attempts that no supervisor watched only
the ledger knows: there wall time runs from the first step to the last logged one.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from longskip.profiling.ledger import LedgerLine, json_rows
from longskip.profiling.runlog import RunLog


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of the ranks; times in seconds since the epoch. ``ended`` is None where nobody wrote its end."""

    attempt: int
    nodes: tuple[int, ...]
    world: int
    started: float
    ended: float | None
    why: str
    step: int


@dataclass(frozen=True, slots=True)
class Goodput:
    """Where the wall time went, in seconds: ``useful`` + ``redone`` + ``around`` + ``pauses`` = ``wall``.

    ``redone``: steps that were taken and lost; ``around``: starting up, saving at the end, dying; ``pauses``: between an
    attempt and its restart.
    """

    wall: float
    useful: float
    redone: float
    around: float
    pauses: float
    watched: bool

    @property
    def share(self) -> float | None:
        """Useful ÷ wall time, 0 to 1; None before the first line of the ledger."""
        return self.useful / self.wall if self.wall > 0 else None

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share}


def attempts_of(log: RunLog) -> list[Attempt]:
    """The attempts that a supervisor wrote down, in order; an end counts over the beginning that it repeats."""
    file = log.path / "launch" / "attempts.jsonl"
    rows, _ = json_rows(file.read_bytes()) if file.is_file() else ([], 0)
    found: dict[int, Attempt] = {}
    for row in rows:
        if (attempt := _attempt(row)) is not None:
            found[attempt.attempt] = attempt
    return [found[number] for number in sorted(found)]


def goodput(log: RunLog, *, now: float | None = None) -> Goodput:
    """The run's goodput so far. ``now`` is given while it runs, and ends the attempt whose end is not written yet.

    An attempt that ended with its supervisor, unwritten, ended at its last line of metrics.
    """
    spent: dict[int, float] = defaultdict(float)
    for entry in log.ledger.entries:
        if isinstance(entry, LedgerLine):
            spent[entry.attempt] += entry.seconds
    attempts = attempts_of(log)
    wall, pauses = 0.0, 0.0
    for i, each in enumerate(attempts):
        ended = each.ended
        if ended is None:
            ended = now if now is not None and i == len(attempts) - 1 else _last_heard(log, each)
        # Clocks are set: an attempt is never shorter than what it logged.
        wall += max(ended - each.started, spent.pop(each.attempt, 0.0))
        if i + 1 < len(attempts) and _goes_on(log, each):
            pauses += max(0.0, attempts[i + 1].started - ended)
    wall += pauses + sum(spent.values())
    useful, all_steps = log.sums.committed.seconds, log.sums.spent.seconds
    return Goodput(
        wall=wall, useful=useful, redone=all_steps - useful, around=wall - pauses - all_steps, pauses=pauses,
        watched=bool(attempts),
    )  # fmt: skip


def _last_heard(log: RunLog, attempt: Attempt) -> float:
    times = [
        row["time"]
        for row in log.metrics.values()
        if row.get("attempt") == attempt.attempt and isinstance(row.get("time"), (int, float))
    ]
    return max([attempt.started, *times])


def _goes_on(log: RunLog, attempt: Attempt) -> bool:
    """Whether the supervisor itself started the next attempt: after a failure, or to take more nodes in."""
    kinds = {row.get("kind") for row in log.incidents if row.get("attempt") == attempt.attempt}
    return "restarted" in kinds or (attempt.why == "saved" and "signal" not in kinds)


def _attempt(row: dict[str, Any]) -> Attempt | None:
    """A line of attempts.jsonl; None where it is none."""
    number, started, ended = row.get("attempt"), row.get("started"), row.get("ended")
    if not isinstance(number, int) or isinstance(number, bool) or not _is_time(started):
        return None
    nodes, world, step = row.get("nodes"), row.get("world"), row.get("step")
    return Attempt(
        attempt=number,
        nodes=tuple(nodes) if isinstance(nodes, list) else (),
        world=world if isinstance(world, int) else 0,
        started=float(row["started"]),
        ended=float(row["ended"]) if _is_time(ended) else None,
        why=str(row.get("why") or ""),
        step=step if isinstance(step, int) else 0,
    )


def _is_time(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 2**40
