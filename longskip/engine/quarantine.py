"""Samples that are passed over without being read (``data.quarantine``), and what bad samples are counted by (no torch).

A list is a run's own ``bad_samples.jsonl``, what ``longskip data lint --quarantine`` writes, or a text with a key a line.
A sample on it keeps its slot in the plan with loss weight 0, as one that turns out to be bad does: whether it is on the
list changes no other sample's place, neither when the list grows between two attempts nor when ranks differ about it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from longskip.engine.data.hashes import file_sha256
from longskip.engine.data.mix import MixedSource
from longskip.engine.data.sources import ShardSource, Source
from longskip.engine.runs import append_json
from longskip.errors import ConfigError, DataError

QUARANTINED = "quarantined"
OTHER = "other"
REASONS = (
    "caption_encoding", "caption_json", "caption_missing", "feature_dtype", "feature_format", "feature_too_large",
    "feature_values", "file_unreadable", "image_decode", "image_empty", "image_format", "image_missing", "image_mode",
    "image_size", "image_too_large", "latent_missing", "latent_shape", "mask_missing", "mask_shape", "mask_values",
    "shard_crc", "text_missing", "text_shape", "text_too_large", "text_too_long", OTHER, QUARANTINED,
)  # fmt: skip
"""Every reason of a ``BadSampleError``, so that ranks count the same ones in one all-reduce."""

MAX_BYTES = 1 << 30
MAX_LINE = 1 << 20
_CURE = 'a line is a key, or {"key": …, "sample": …} as in a run\'s bad_samples.jsonl'


@dataclass(frozen=True)
class Quarantine:
    """``samples`` are numbers of the source, int64 and sorted; ``entries`` of the list named them, ``unknown`` named none."""

    samples: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    entries: int = 0
    unknown: int = 0
    file: str = ""
    sha256: str = ""

    def to_json(self) -> dict[str, Any]:
        """All but the samples, of which only the number: what run.json says."""
        told = {"file": self.file, "sha256": self.sha256, "entries": self.entries, "unknown": self.unknown}
        return told | {"samples": len(self.samples)}


def quarantine_of(path: str | None, source: Source) -> Quarantine:
    """The samples of ``source`` that the list at ``path`` names; none without one. Reads the keys of all samples, of shards
    in their tables.

    Raises ConfigError for a list that cannot be read, and DataError where it names no sample of the data at all.
    """
    if path is None:
        return Quarantine()
    entries = read_list(Path(path))
    found = _numbers(source, {key for key, _ in entries})
    samples: set[int] = set()
    unknown = 0
    for key, number in entries:
        same = found.get(key, [])
        unknown += not same
        samples.update([number] if number in same else same)  # a number of other data, or before they were packed anew
    if entries and not samples:
        raise DataError(
            f"data.quarantine {path}: none of its {len(entries)} entries is a sample of the data, the first is "
            f"{entries[0][0][:80]!r}",
            cure="name the list that was made of these data, or leave data.quarantine out",
        )
    return Quarantine(np.array(sorted(samples), np.int64), len(entries), unknown, path, file_sha256(Path(path)))


def read_list(path: Path) -> list[tuple[str, int | None]]:
    """(key, sample's number or None) of every line, each once. Raises ConfigError naming the line that is neither a key
    nor such an object; a last line that a crash cut short is left out."""
    entries: dict[tuple[str, int | None], None] = {}
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"data.quarantine {path} is larger than {MAX_BYTES} bytes", cure=_CURE)
        with open(path, "rb") as lines:
            number = 0
            while line := lines.readline(MAX_LINE + 1):
                number += 1
                try:
                    entry = _entry(line)
                except ValueError as error:
                    if not line.endswith(b"\n") and len(line) <= MAX_LINE:
                        break
                    raise ConfigError(f"data.quarantine {path}, line {number}: {error}", cure=_CURE) from None
                if entry is not None:
                    entries[entry] = None
    except OSError as error:
        raise ConfigError(f"data.quarantine {path} cannot be read: {error.strerror}", cure=_CURE) from None
    return list(entries)


def _entry(line: bytes) -> tuple[str, int | None] | None:
    """Raises ValueError; None for a blank line."""
    if len(line) > MAX_LINE:
        raise ValueError(f"longer than {MAX_LINE} bytes")
    text = line.decode("utf-8").rstrip("\r\n")
    if not text.strip():
        return None
    if not text.startswith("{"):
        return text, None
    try:
        body = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    key, sample = body.get("key"), body.get("sample")
    if not isinstance(key, str) or not key or not (sample is None or type(sample) is int):
        raise ValueError("no key, or a sample that is no whole number")
    return key, sample


def _numbers(source: Source, keys: set[str]) -> dict[str, list[int]]:
    """The samples of each key; several where data sets of a mix, or shards, have the same."""
    found: dict[str, list[int]] = {}
    if not keys:
        return found
    if isinstance(source, MixedSource):
        for start, member in zip(source.starts.tolist(), source.members, strict=True):
            for key, numbers in _numbers(member, keys).items():
                found.setdefault(key, []).extend(start + number for number in numbers)
    elif isinstance(source, ShardSource):
        wanted = np.array(sorted(key.encode("utf-8", "surrogatepass") for key in keys))
        first = 0
        for shard, entry in enumerate(source.index.shards):
            there = np.asarray(source.table(shard)["key"])
            for row in np.flatnonzero(np.isin(there, wanted)).tolist():
                found.setdefault(there[row].decode("utf-8", "replace"), []).append(first + row)
            first += entry.count
    else:
        for number in range(len(source)):
            key = source.key(number)
            if key in keys:
                found.setdefault(key, []).append(number)
    return found


class Noted:
    """``bad_samples.jsonl``: a line for each bad sample when it is first met, however often and by whichever rank it is met.

    What is there already, of earlier attempts and of other ranks, is read on from where it was read last, and only when a
    sample comes that this rank has not seen in it: an epoch later, another rank's line has been there for long.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._samples: set[int] = set()
        self._read = 0  # bytes

    def add(self, bad: Iterable[Mapping[str, Any]], step: int) -> None:
        """Append those of ``bad`` that are not listed yet, with the step; those of data.quarantine never are.

        Raises OSError, after which what was not written counts as not listed.
        """
        new = [entry for entry in bad if entry["reason"] != QUARANTINED and entry["sample"] not in self._samples]
        if new:
            self._read_on()
        for entry in new:
            if entry["sample"] not in self._samples:
                append_json(self.path, {**entry, "step": step})
                self._samples.add(entry["sample"])

    def _read_on(self) -> None:
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # another rank writes it, or a crash has cut it short
                self._read += len(line)
                with suppress(ValueError, TypeError, AttributeError, RecursionError):
                    self._samples.add(int(json.loads(line).get("sample")))


def count_reasons(bad: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many of the bad samples have each of ``REASONS``, in their order, those with none among them."""
    counts = Counter(entry["reason"] if entry["reason"] in REASONS else OTHER for entry in bad)
    return {reason: counts[reason] for reason in REASONS}


def told(counts: Mapping[str, int]) -> str:
    """``image_decode 3, caption_missing 1``: the most frequent first; empty where there are none.

    Those of data.quarantine are left out: they are known, and were told of when the run began.
    """
    counts = {reason: count for reason, count in counts.items() if reason != QUARANTINED}
    some = sorted((reason for reason, count in counts.items() if count), key=lambda reason: (-counts[reason], reason))
    return ", ".join(f"{reason} {counts[reason]:,}" for reason in some)
