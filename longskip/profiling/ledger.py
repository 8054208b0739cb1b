"""The budget ledger: what a run executed, line by line, and the two sums over it.

*Spent* is everything that was executed, redone steps included. *Committed* holds each step once: after a resume the
lines past the checkpoint are superseded (they stay in the file, and in *spent*). A line covers the steps
``(from_step, step]``, and every commit ends an interval, so a resume never cuts through a line.

A line is appended with one write. A crash can cut the last one short: readers skip such lines and count them, as they do
with lines whose values cannot be. An attempt executes a step once: of its lines that cover the same steps (a file that was
copied together) the first counts, the others are kept apart. Write the line before the checkpoint's commit, then a lost
line is always one that the next attempt redoes.

Wall time runs from the first step of an attempt to the last step that it logged; what lies before and behind is in no line.
"""

from __future__ import annotations

import json
import math
import os
import sys
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class LedgerLine:
    """One interval ``(from_step, step]`` of one attempt; counts are of the interval, over all devices.

    Tokens and images are counts, ``seconds`` wall time, FLOPs 2 per multiply-add (``model_flops`` and
    ``hardware_flops`` as the glossary defines them), ``six_nd`` = 6·N·tokens. ``mfu`` and ``hfu`` are shares 0 to 1,
    None on a device without a datasheet peak; ``loss`` is None when it was not finite. ``communication_seconds`` is the
    time that the first rank stood in collectives, waits for slower ranks included; None where it is not known (on CUDA,
    where the host does not stand still, and in ledgers of before it was measured).
    """

    attempt: int
    from_step: int
    step: int
    images: int
    image_tokens: int
    tokens: int
    seconds: float
    data_wait_seconds: float
    model_flops: int
    hardware_flops: int
    six_nd: int
    mfu: float | None
    hfu: float | None
    loss: float | None
    devices: int
    device_name: str
    communication_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Resumed:
    """The first line of an attempt: it goes on from the checkpoint of step ``resumed_from`` (0 for a fresh start)."""

    attempt: int
    resumed_from: int


Entry = LedgerLine | Resumed
_LINE_FIELDS = {f.name for f in fields(LedgerLine)}
_ADDED_LATER = {"communication_seconds"}
_COUNTS = ("images", "image_tokens", "tokens", "model_flops", "hardware_flops", "six_nd")
_INTEGERS = ("attempt", "from_step", "step", *_COUNTS, "devices")
_SECONDS = ("seconds", "data_wait_seconds", "communication_seconds")
MOST_COUNT = 2**100  # of any count: above the FLOPs of any training, and far below what a float cannot hold
MOST_SECONDS = 2.0**40  # of one interval
_MOST_SHARE = 1e6
_LIMITS = dict.fromkeys(_SECONDS, MOST_SECONDS) | {"mfu": _MOST_SHARE, "hfu": _MOST_SHARE}


@dataclass(frozen=True, slots=True)
class LedgerFile:
    """The entries of a ledger in file order, and how many lines could not be read.

    ``overlapping``: lines that are in no sum, since another line of their attempt covers some of their steps already.
    """

    entries: tuple[Entry, ...]
    skipped: int
    overlapping: tuple[LedgerLine, ...] = ()

    @property
    def lines(self) -> tuple[LedgerLine, ...]:
        return tuple(entry for entry in self.entries if isinstance(entry, LedgerLine))


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over ledger lines. ``mfu``, ``hfu`` and ``communication_share`` are means over time, ``communication_seconds``
    a sum, of the lines that have one; None without any."""

    steps: int = 0
    images: int = 0
    image_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0
    data_wait_seconds: float = 0.0
    model_flops: int = 0
    hardware_flops: int = 0
    six_nd: int = 0
    mfu: float | None = None
    hfu: float | None = None
    communication_seconds: float | None = None
    communication_share: float | None = None

    @property
    def images_per_second(self) -> float | None:
        return self.images / self.seconds if self.seconds > 0 else None

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds > 0 else None

    @property
    def data_wait_share(self) -> float | None:
        return self.data_wait_seconds / self.seconds if self.seconds > 0 else None


@dataclass(frozen=True, slots=True)
class Sums:
    """Committed and spent, and the steps up to the last committed one that no line covers (0 in a whole ledger)."""

    committed: Totals
    spent: Totals
    last_step: int
    missing_steps: int
    attempts: int

    @property
    def committed_share(self) -> float | None:
        """Committed time as a share of the time spent, 0 to 1; None before the first line. Goodput (``goodput.py``) is
        of the wall time, of which starting up, ending and pauses are part too.
        """
        return self.committed.seconds / self.spent.seconds if self.spent.seconds > 0 else None


def append(path: str | os.PathLike[str], entry: Entry, *, durable: bool = False) -> None:
    """Append one entry as one line, with one write; ``durable`` also waits for the disk (before a commit).

    A line that a crash cut short is closed first, so that it costs only itself.
    """
    body = {key: _finite(value) for key, value in asdict(entry).items()}
    data = (json.dumps(body, allow_nan=False) + "\n").encode()
    with open(path, "ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END) > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                data = b"\n" + data
        file.write(data)
        if durable:
            os.fsync(file.fileno())


def read(path: str | os.PathLike[str]) -> LedgerFile:
    """All entries of a ledger in file order; lines that are no ledger entry are skipped and counted.

    A missing file is an empty ledger: a run that was killed before its first interval has none.
    """
    file = Path(path)
    if not file.exists():
        return LedgerFile((), 0)
    rows, skipped = json_rows(file.read_bytes())
    entries = [entry for entry in map(_entry, rows) if entry is not None]
    once, overlapping = _once(entries)
    return LedgerFile(tuple(once), skipped + len(rows) - len(entries), tuple(overlapping))


def json_rows(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of a file with one object a line, and how many lines (or parts of lines) were not readable.

    Where a writer that knew nothing of the crash went on behind a line cut short, the whole line behind it is kept:
    it starts with the same first key.
    """
    rows: list[dict[str, Any]] = []
    skipped = 0
    for raw in data.split(b"\n"):
        if not raw.strip():
            continue
        row = _object(raw)
        if row is None:
            skipped += 1
            start = raw[: raw.find(b'"', 2) + 1]  # {"key"
            behind = raw.rfind(start) if start else -1
            row = _object(raw[behind:]) if behind > 0 else None
        if row is not None:
            rows.append(row)
    return rows, skipped


def committed_lines(entries: Iterable[Entry]) -> list[LedgerLine]:
    """The lines that count once: those not past the step from which a later attempt resumed, in order of steps.

    An attempt whose first line was lost resumed at the latest where its own lines begin.
    """
    kept: list[LedgerLine] = []
    attempt, others_end = None, 0  # the last step that another attempt's lines reach
    for entry in entries:
        if isinstance(entry, Resumed):
            kept = [line for line in kept if line.step <= entry.resumed_from]
            attempt = None
            continue
        if entry.attempt != attempt:
            attempt = entry.attempt
            others_end = max((line.step for line in kept if line.attempt != attempt), default=0)
        if entry.from_step < others_end:
            kept = [line for line in kept if line.attempt == attempt or line.step <= entry.from_step]
            others_end = entry.from_step
        kept.append(entry)
    return kept


def totals(lines: Iterable[LedgerLine]) -> Totals:
    """Sums over the given lines, each as often as it is given."""
    lines = list(lines)
    counts = {name: sum(getattr(line, name) for line in lines) for name in _COUNTS}
    measured = [(inside, line.seconds) for line in lines if (inside := line.communication_seconds) is not None]
    return Totals(
        steps=sum(line.step - line.from_step for line in lines),
        seconds=math.fsum(line.seconds for line in lines),
        data_wait_seconds=math.fsum(line.data_wait_seconds for line in lines),
        mfu=_mean_over_time((line.mfu, line.seconds) for line in lines),
        hfu=_mean_over_time((line.hfu, line.seconds) for line in lines),
        communication_seconds=math.fsum(inside for inside, _ in measured) if measured else None,
        communication_share=_mean_over_time((inside / seconds, seconds) for inside, seconds in measured if seconds > 0),
        **counts,
    )


def sums(entries: Iterable[Entry]) -> Sums:
    """Committed and spent of a ledger's entries (from ``read(path).entries``)."""
    entries = list(entries)
    committed = committed_lines(entries)
    lines = [entry for entry in entries if isinstance(entry, LedgerLine)]
    last_step = max((line.step for line in committed), default=0)
    of_committed = totals(committed)
    return Sums(
        committed=of_committed,
        spent=totals(lines),
        last_step=last_step,
        missing_steps=last_step - of_committed.steps,
        attempts=len({entry.attempt for entry in entries}),
    )


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mean_over_time(pairs: Iterable[tuple[float | None, float]]) -> float | None:
    known = [(share, seconds) for share, seconds in pairs if share is not None and seconds > 0]
    if not known:
        return None
    return math.fsum(share * seconds for share, seconds in known) / math.fsum(seconds for _, seconds in known)


def _object(raw: bytes) -> dict[str, Any] | None:
    try:
        body = json.loads(raw, parse_int=_integer)
    except (ValueError, RecursionError):  # also UnicodeDecodeError: the line was cut or overwritten
        return None
    return body if isinstance(body, dict) else None


def _once(entries: Iterable[Entry]) -> tuple[list[Entry], list[LedgerLine]]:
    """The entries without lines that repeat steps of their own attempt, and those lines."""
    kept: list[Entry] = []
    repeated: list[LedgerLine] = []
    covered: dict[int, list[tuple[int, int]]] = defaultdict(list)  # attempt -> its intervals, disjoint and in order
    for entry in entries:
        if isinstance(entry, LedgerLine):
            mine, own = covered[entry.attempt], (entry.from_step, entry.step)
            at = bisect_left(mine, own)
            before = at > 0 and mine[at - 1][1] > entry.from_step
            if before or (at < len(mine) and mine[at][0] < entry.step):
                repeated.append(entry)
                continue
            insort(mine, own)
        kept.append(entry)
    return kept, repeated


def _entry(body: dict[str, Any]) -> Entry | None:
    """The line of a ledger; None for values of another kind, negative ones, no device, and counts that cannot be."""
    if "resumed_from" in body:
        if not _is_count(body.get("attempt")) or not _is_count(body["resumed_from"]):
            return None
        return Resumed(attempt=body["attempt"], resumed_from=body["resumed_from"])
    body = dict.fromkeys(_ADDED_LATER) | body
    if not body.keys() >= _LINE_FIELDS or not all(_is_count(body[name]) for name in _INTEGERS):
        return None
    if not (body["loss"] is None or _is_number(body["loss"])) or not isinstance(body["device_name"], str):
        return None
    for name, limit in _LIMITS.items():
        if body[name] is None and name not in ("seconds", "data_wait_seconds"):
            continue
        if not _is_number(body[name]) or not 0 <= body[name] <= limit:
            return None
    if body["devices"] < 1 or body["step"] <= body["from_step"]:
        return None
    return LedgerLine(**{name: body[name] for name in _LINE_FIELDS})


def _integer(digits: str) -> int:
    """ValueError for what no float holds: every figure here is once divided or drawn."""
    value = int(digits)
    if abs(value) > sys.float_info.max:
        raise ValueError(f"an integer of {len(digits)} digits")
    return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_COUNT


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
