"""A folder of feature shards in the making: its settings, what is finished of it, and its index (no torch).

Beside the shards stands ``encoding/``: ``settings.json``, which the first process writes and all others must agree
with, and one record per finished shard. A record is written last, so that a shard without one is made again, to the
same bytes. Processes share nothing but this folder: whoever finds every shard recorded writes ``index.json``.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from longskip.engine.config import leaves
from longskip.engine.data.features import EMPTY_NAME
from longskip.engine.data.hashes import file_sha256
from longskip.engine.data.index import (
    INDEX_NAME,
    Index,
    ShardEntry,
    check_shard,
    index_shard,
    save_index,
    write_atomically,
    write_table,
)
from longskip.errors import ConfigError, DataError, EncoderError, RunLockedError, ShardError, UnfitDataError

VERSION = 1
FOLDER = "encoding"
BAD_NAME = "bad_samples.jsonl"


@dataclass(frozen=True)
class Record:
    """A finished shard: its entry for the index (None where not one sample could be used), and its bad samples."""

    file: str
    entry: ShardEntry | None
    bad: tuple[Mapping[str, Any], ...]

    @property
    def samples(self) -> int:
        return self.entry.count if self.entry else 0


class Encoding:
    """The folder ``out`` while feature shards are written into it, by this process and perhaps by others."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / FOLDER

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Writes ``settings`` where nobody has, else compares; ``made_with`` (versions) is not compared here.

        Raises ``DataError`` for a folder that holds other data, ``EncoderError`` for one encoded otherwise.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        foreign = (self.out / INDEX_NAME).exists() or any(self.out.glob("*.tar"))
        if foreign and not (self.folder / "settings.json").exists():
            raise UnfitDataError(
                f"{self.out} already holds data that were not encoded here", cure="encode into a new folder"
            )
        with self._lock():
            path = self.folder / "settings.json"
            if not path.exists():
                write_atomically(path, _json_bytes({"version": VERSION, **settings}))
        # The list of shards follows from the source's fingerprint and would fill the message.
        apart = ("shards", "made_with")
        self._compare({name: value for name, value in settings.items() if name not in apart} | {"version": VERSION})

    def agree_on_versions(self, made_with: Mapping[str, Any]) -> None:
        """Raises ``EncoderError`` where other versions began: the rest would not be the same to the bit."""
        self._compare({"made_with": dict(made_with)})

    def _compare(self, wanted: dict[str, Any]) -> None:
        there = self.settings()
        new = dict(leaves(json.loads(json.dumps(wanted))))
        old = dict(leaves({name: there.get(name) for name in wanted}))
        differing = [
            f"{key}: {old.get(key)!r} there, {new.get(key)!r} now"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
        if differing:
            raise EncoderError(
                f"{self.out} was encoded with other settings ({'; '.join(differing)})",
                cure="set them back, or encode into another folder",
            )

    def settings(self) -> dict[str, Any]:
        """What the first process wrote. Raises ``DataError`` where nothing is encoded."""
        path = self.folder / "settings.json"
        try:
            settings = json.loads(path.read_text("utf-8"))
            for name in ("source", "shards", "encoders", "made_with"):
                settings[name]
            return dict(settings)
        except FileNotFoundError:
            raise UnfitDataError(
                f"{self.out} holds no encoding", cure="longskip data encode SHARDS --out DIR"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} cannot be read: {error}", cure="encode into a new folder") from error

    def record(self, file: str) -> Record | None:
        """The record of a shard; None where it is not finished."""
        try:
            data = json.loads(self._record_path(file).read_text("utf-8"))
            entry = ShardEntry(**data["entry"]) if data["entry"] else None
            return Record(file, entry, tuple(data["bad"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None  # made again

    def verified(self, file: str) -> Record | None:
        """The record of a finished shard whose file has the recorded SHA-256; None where it is to be made (again)."""
        record = self.record(file)
        if record is None or record.entry is None:
            return record
        try:
            check_shard(self.out, record.entry)
            return record if file_sha256(self.out / file) == record.entry.sha256 else None
        except (ShardError, OSError):
            return None

    def write(self, file: str, samples: Iterable[tuple[str, Mapping[str, bytes]]], bad: Sequence[Any]) -> Record:
        """Writes a shard of (key, members), and its record; ``bad`` is what was left out when ``samples`` has ended.

        Raises ``RunLockedError`` while another process writes the same shard.
        """
        from webdataset import TarWriter  # imports torch

        path = self.out / file
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        stream = _claim(part)
        count = 0
        try:
            with TarWriter(stream, user="", group="", mode=0o644, encoder=False, mtime=0) as writer:
                for key, members in samples:
                    writer.write({"__key__": key, **members})
                    count += 1
            stream.flush()
            os.fsync(stream.fileno())
            entry = None
            if count:
                entry, table = index_shard(part, file)
                write_table(self.out / entry.table, table)
                os.replace(part, path)
            else:
                path.unlink(missing_ok=True)
                part.unlink()
        except BaseException:
            with suppress(OSError):
                part.unlink()
            raise
        finally:
            stream.close()
        record = Record(file, entry, tuple(bad))
        told = {"entry": None if entry is None else {**entry.__dict__, "members": dict(entry.members)}, "bad": bad}
        place = self._record_path(file)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, _json_bytes(told))
        return record

    def _record_path(self, file: str) -> Path:
        return self.folder / "shards" / f"{file}.json"

    def unfinished(self) -> list[str]:
        """The shards without a record."""
        return [file for file, _ in self.settings()["shards"] if self.record(file) is None]

    def finish(self, max_bad_share: float) -> Index:
        """Merges the records into ``bad_samples.jsonl`` and ``index.json``.

        Raises ``DataError`` where shards are still to be made, or too many samples are bad; ``ShardError`` for shards
        that were damaged since.
        """
        settings = self.settings()
        with self._lock():
            found = {file: self.record(file) for file, _ in settings["shards"]}
            records = [record for record in found.values() if record is not None]
            missing = [file for file, record in found.items() if record is None]
            if missing:
                raise DataError(
                    f"{self.out}: {len(missing)} of {len(found)} shards are not encoded, the first is {missing[0]}",
                    cure="run longskip data encode again, with as many ranks as you like",
                )
            bad = [item for record in records for item in record.bad]
            check_share(bad, sum(count for _, count in settings["shards"]), max_bad_share)
            entries = tuple(record.entry for record in records if record.entry is not None)
            if not entries:
                raise DataError(f"not one sample could be encoded: {reasons(bad)}")
            for entry in entries:
                check_shard(self.out, entry)
            lines = "".join(json.dumps(item, ensure_ascii=False, sort_keys=True) + "\n" for item in bad)
            write_atomically(self.out / BAD_NAME, lines.encode())
            encoders = json.loads(json.dumps(settings["encoders"]))
            if "text" in encoders:
                encoders["text"]["empty_sha256"] = file_sha256(self.out / EMPTY_NAME)
            encoders |= {"made_with": settings["made_with"], "source": settings["source"]}
            index = Index(self.out, entries, encoders)
            save_index(index)
        return index

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "ab") as stream:
            _flock(stream, wait=True)
            yield


def reasons(bad: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Bad samples per reason."""
    return dict(sorted(Counter(item["reason"] for item in bad).items()))


def check_share(bad: Sequence[Mapping[str, Any]], total: int, max_bad_share: float) -> None:
    """Raises ``DataError`` where more than ``max_bad_share`` of ``total`` samples are bad."""
    if len(bad) > max_bad_share * total:
        first = bad[0]
        raise DataError(
            f"{len(bad)} of {total} samples cannot be encoded, more than the share {max_bad_share:g}: {reasons(bad)}; "
            f"the first is {first['key']} of {first['shard']} ({first['detail']})",
            cure="longskip data lint says more; correct them, or allow more with --max-bad-share",
        )


def npy_bytes(array: np.ndarray) -> bytes:
    """An array as ``.npy`` without pickle."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode()


def _flock(stream: BinaryIO, wait: bool = False) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        raise ConfigError(
            f"{stream.name} cannot be locked: {error}", cure="encode into a file system with locks (flock)"
        ) from None


def _claim(part: Path) -> BinaryIO:
    """The empty file at ``part``, locked until it is closed; the kernel lets go of it when its owner dies."""
    while True:
        stream = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b")
        try:
            _flock(stream)
            if os.path.samestat(os.fstat(stream.fileno()), part.stat()):
                stream.truncate(0)
                return stream
        except BlockingIOError:
            stream.close()
            raise RunLockedError(
                f"{part} is being written by another process",
                cure="give every process its own RANK and the same WORLD_SIZE, or wait for the other one",
            ) from None
        except FileNotFoundError:
            pass  # finished and renamed between opening and locking
        stream.close()
