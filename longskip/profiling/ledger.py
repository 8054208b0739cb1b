"""The budget ledger: what a run executed, line by line, and the two sums over it.

*Spent* is everything that was executed, redone steps included. *Committed* holds each step once: after a resume the
lines past the checkpoint are superseded (they stay in the file, and in *spent*). A line covers the steps
``(from_step, step]``, and every commit ends an interval, so a resume never cuts through a line.

A line is appended with one write. A crash can cut the last one short: readers skip such lines and count them. Write
the line before the checkpoint's commit, then a lost line is always one that the next attempt redoes.
"""

from __future__ import annotations

import json
import math
import os
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


@dataclass(frozen=True, slots=True)
class LedgerFile:
    """The entries of a ledger in file order, and how many lines could not be read."""

    entries: tuple[Entry, ...]
    skipped: int

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
    def goodput(self) -> float | None:
        """Committed time as a share of the time spent, 0 to 1; None before the first line."""
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
    return LedgerFile(tuple(entries), skipped + len(rows) - len(entries))


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
    """The lines that count once: those not past the step from which a later attempt resumed, in order of steps."""
    kept: list[LedgerLine] = []
    for entry in entries:
        if isinstance(entry, Resumed):
            kept = [line for line in kept if line.step <= entry.resumed_from]
        else:
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
        body = json.loads(raw)
    except ValueError:  # also UnicodeDecodeError: the line was cut or overwritten
        return None
    return body if isinstance(body, dict) else None


def _entry(body: dict[str, Any]) -> Entry | None:
    if "resumed_from" in body:
        if not _is_count(body.get("attempt")) or not _is_count(body["resumed_from"]):
            return None
        return Resumed(attempt=body["attempt"], resumed_from=body["resumed_from"])
    body = dict.fromkeys(_ADDED_LATER) | body
    if not body.keys() >= _LINE_FIELDS or not all(_is_count(body[name]) for name in _INTEGERS):
        return None
    if not all(_is_number(body[name]) for name in ("seconds", "data_wait_seconds")):
        return None
    if not all(body[name] is None or _is_number(body[name]) for name in ("mfu", "hfu", "loss", *_ADDED_LATER)):
        return None
    return LedgerLine(**{name: body[name] for name in _LINE_FIELDS})


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
