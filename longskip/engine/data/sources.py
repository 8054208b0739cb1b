"""Where samples come from: indexed shards, or a plain folder of pictures and texts.

A source numbers its samples from 0 and reads any of them at random. It holds paths, not handles, until it is read, so
it can be sent to worker processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from longskip.engine.data.captions import (
    MAX_TEXT_BYTES,
    TXT,
    Captions,
    captions_by_field,
    captions_of,
    fields_in,
    json_record,
    weighted_captions,
)
from longskip.engine.data.crc import crc32
from longskip.engine.data.decode import upright_size
from longskip.engine.data.features import Choose, FeatureBatch, FeatureLayout, layout_of, load_empty, read_features
from longskip.engine.data.index import (
    IMAGE_EXTENSIONS,
    INDEX_NAME,
    Index,
    ShardEntry,
    checked_key,
    load_index,
    load_table,
    refuse_url,
)
from longskip.errors import BadSampleError, DataError, ShardError, UnfitDataError

METADATA_NAME = "metadata.jsonl"
MAX_IMAGE_BYTES = 1 << 28
HEADER_BYTES = 1 << 16
"""Of a picture file that are read to know its size; where they do not tell, all is read."""
FIELDS_SCAN = 64
"""Samples that are looked at to know which caption fields there are."""
OPEN_SHARDS = 256


class RawSample(NamedTuple):
    """One sample as stored: its key, the picture's encoded bytes, and (text, weight) pairs, at least one."""

    key: str
    image: bytes
    captions: Captions


@runtime_checkable
class Source(Protocol):
    """What a reader needs of data. ``read`` raises ``BadSampleError`` for a sample that cannot be used."""

    def __len__(self) -> int: ...

    def key(self, i: int) -> str:
        """The key of sample ``i``, without reading the sample."""
        ...

    def read(self, i: int) -> RawSample:
        """Sample ``i``; 0 ≤ i < len(source)."""
        ...

    def captions(self, i: int) -> Captions:
        """The captions of sample ``i`` without its picture or features."""
        ...

    def fingerprint(self) -> str:
        """A stable hash of the data's identity: the same wherever they lie, another one when they change."""
        ...

    @property
    def features(self) -> FeatureLayout | None:
        """The layout of stored features; None where samples are pictures alone."""
        ...


class SizedSource(Source, Protocol):
    """A source that knows the sizes of its samples, and which captions they have, without reading them all."""

    def size(self, i: int) -> tuple[int, int]:
        """(height, width) of sample ``i``'s picture in pixels; (0, 0) where it is not known."""
        ...

    def sizes(self, *, latents: bool = False) -> Iterator[np.ndarray]:
        """(m, 2) int64 pieces with (height, width) of all samples in turn; of stored latents in their own units."""
        ...

    def caption_fields(self) -> set[str]:
        """The names that ``data.captions`` could have, as found in the first samples."""
        ...


class FeatureSource(Source, Protocol):
    """A source with stored features (``features`` is not None)."""

    def read_features(
        self, slots: Sequence[int] | np.ndarray, samples: np.ndarray, into: FeatureBatch, choose: Choose
    ) -> None:
        """Fills the slots of a batch: see ``features.read_features``."""
        ...

    @property
    def empty_text(self) -> tuple[np.ndarray, np.ndarray]:
        """The empty caption's features (n_txt, E) and mask (n_txt) uint8."""
        ...


class _Descriptor(int):
    """An open file that is closed when nobody holds it: a shard that is let go may still be read by a thread."""

    def __del__(self) -> None:
        os.close(self)


class _Kept(OrderedDict[int, Any]):
    """The shards last used."""

    def take(self, shard: int) -> Any:
        value = self.get(shard)
        if value is not None:
            self.move_to_end(shard)
        return value

    def keep(self, shard: int, value: tuple[int, np.ndarray, tuple[str, ...]]) -> None:
        self[shard] = value
        if len(self) > OPEN_SHARDS:
            self.popitem(last=False)


class ShardSource:
    """Samples of indexed shards, read at their offsets with ``pread``; members' crc32 are checked on every read.

    ``on_damage``: a member whose bytes differ from the index stops the run with ``ShardError`` (``"stop"``), or makes
    the sample a bad one with the reason ``shard_crc`` (``"skip"``). ``fields``: which captions are taken, and their
    shares, as ``captions_of``. Threads may share a source.
    """

    def __init__(
        self,
        index: Index | str | os.PathLike[str],
        *,
        on_damage: Literal["stop", "skip"] = "stop",
        check: bool = True,
        fields: Mapping[str, float] | None = None,
    ) -> None:
        if on_damage not in ("stop", "skip"):
            raise DataError(f"on_damage {on_damage!r}; it is 'stop' or 'skip'")
        self.index = index if isinstance(index, Index) else load_index(index, check=check)
        self.on_damage = on_damage
        self.fields = dict(fields or {})
        counts = np.array([shard.count for shard in self.index.shards], dtype=np.int64)
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        self._kept = _Kept()
        self._lock = threading.Lock()  # of the open shards; reading needs none
        if not self.index.total:
            raise UnfitDataError(
                f"{self.index.folder} holds no samples", cure="pack some: longskip data pack FOLDER OUT"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_kept", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _kept=_Kept(), _lock=threading.Lock())

    def __len__(self) -> int:
        return int(self._ends[-1])

    def close(self) -> None:
        """Closes the open shards; reading opens them again."""
        with self._lock:
            self._kept.clear()

    def fingerprint(self) -> str:
        """SHA-256 of the index's content (files, counts, sizes, hashes)."""
        return self.index.fingerprint()

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shards, rows in them) of samples, int64. Raises ``DataError`` for a sample that is not there."""
        samples = np.asarray(samples, dtype=np.int64)
        if len(samples) and not (samples.min() >= 0 and samples.max() < self._ends[-1]):
            raise DataError(f"samples {samples.min()} to {samples.max()}; the source holds {len(self)}")
        shards = np.searchsorted(self._ends, samples, side="right")
        return shards, samples - self._starts[shards]

    def opened(self, shard: int) -> tuple[int, np.ndarray, tuple[str, ...]]:
        """A shard's descriptor (closed when it is let go), its table and the names of the table's fields."""
        with self._lock:
            return self._open(shard)

    def _open(self, shard: int) -> tuple[int, np.ndarray, tuple[str, ...]]:
        kept = self._kept.take(shard)
        if kept is None:
            entry = self.index.shards[shard]
            table = np.asarray(load_table(self.index.folder, entry))  # numpy's memmap class is slow to index
            try:
                descriptor = os.open(self.index.folder / entry.file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            except OSError as error:
                raise ShardError(
                    f"{self.index.folder / entry.file} cannot be opened: {error.strerror}; "
                    f"the index expects {entry.bytes} bytes",
                    cure=f"restore it, or longskip data index {self.index.folder}",
                ) from error
            kept = (_Descriptor(descriptor), table, table.dtype.names or ())
            self._kept.keep(shard, kept)
        return kept

    def _row(self, i: int) -> tuple[int, int, dict[str, Any]]:
        if not 0 <= i < self._ends[-1]:
            raise DataError(f"sample {i}; the source holds {len(self)}")
        shard = int(np.searchsorted(self._ends, i, side="right"))
        descriptor, table, names = self.opened(shard)
        return shard, descriptor, dict(zip(names, table[i - int(self._starts[shard])].item(), strict=True))

    def key(self, i: int) -> str:
        """The key of sample ``i``, from the table."""
        return self._row(i)[2]["key"].decode("utf-8", "replace")

    def size(self, i: int) -> tuple[int, int]:
        """(height, width) of the stored picture in pixels; (0, 0) where its header could not be read."""
        row = self._row(i)[2]
        return row["height"], row["width"]

    def table(self, shard: int) -> np.ndarray:
        """The memory-mapped table of a shard, one row per sample."""
        return load_table(self.index.folder, self.index.shards[shard])

    def sizes(self, *, latents: bool = False) -> Iterator[np.ndarray]:
        """(m, 2) int64 (height, width) shard by shard, from the tables alone: of pictures as they are stored, before
        EXIF orientation, or of latents in their own units; (0, 0) where they are not known."""
        names = [f"{'latent_' if latents else ''}{side}" for side in ("height", "width")]
        for shard, entry in enumerate(self.index.shards):
            table = self.table(shard)
            out = np.zeros((entry.count, 2), dtype=np.int64)
            if names[0] in (table.dtype.names or ()):
                out[:, 0], out[:, 1] = table[names[0]], table[names[1]]
            yield out

    def read(self, i: int) -> RawSample:
        """Sample ``i``.

        Raises ``BadSampleError`` with ``image_missing``, ``image_too_large``, captions' reasons or ``shard_crc``, and
        ``ShardError`` where a shard cannot be read.
        """
        shard, descriptor, row = self._row(i)
        entry = self.index.shards[shard]
        key = row["key"].decode("utf-8", "replace")
        image = self._member(entry, descriptor, row, "image", MAX_IMAGE_BYTES)
        if image is None:
            raise BadSampleError("image_missing", f"{entry.file} has no picture for {key}")
        text = self._member(entry, descriptor, row, "txt", MAX_TEXT_BYTES)
        extra = self._member(entry, descriptor, row, "json", MAX_TEXT_BYTES)
        return RawSample(key, image, captions_of(text, extra, self.fields))

    def captions(self, i: int) -> Captions:
        """The captions of sample ``i`` alone. Raises ``BadSampleError`` with captions' reasons."""
        return captions_of(self.member(i, "txt"), self.member(i, "json"), self.fields)

    def caption_fields(self) -> set[str]:
        """The names that ``fields`` could have, as found in the first samples."""
        found: set[str] = set()
        for i in range(min(len(self), FIELDS_SCAN)):
            with suppress(BadSampleError):
                found |= fields_in(self.member(i, "txt"), self.member(i, "json"))
        return found

    def member(self, i: int, kind: str) -> bytes | None:
        """The bytes of a member (``latent.npy``, …) of sample ``i``, checked; None where the sample lacks it."""
        shard, descriptor, row = self._row(i)
        return self._member(self.index.shards[shard], descriptor, row, kind, MAX_IMAGE_BYTES)

    def checked(
        self, shard: int, descriptor: int, row: dict[str, Any], kind: str, limit: int = MAX_IMAGE_BYTES
    ) -> bytes | None:
        """``member`` of a table's row that is at hand."""
        return self._member(self.index.shards[shard], descriptor, row, kind, limit)

    def first_with(self, kind: str) -> int:
        """The first sample that has a member of this kind. Raises ``DataError`` where none has."""
        for shard in range(len(self.index.shards)):
            _, table, names = self.opened(shard)
            if f"{kind}_size" in names:
                rows = np.flatnonzero(table[f"{kind}_size"] >= 0)
                if len(rows):
                    return int(self._starts[shard] + rows[0])
        raise DataError(f"{self.index.folder} holds no {kind}")

    @cached_property
    def features(self) -> FeatureLayout | None:
        """The layout of the stored features; None where the shards hold none. Raises ``ShardError`` for contradictions."""
        return layout_of(self)

    def read_features(
        self, slots: Sequence[int] | np.ndarray, samples: np.ndarray, into: FeatureBatch, choose: Choose
    ) -> None:
        """Fills the slots of a batch: see ``features.read_features``."""
        read_features(self, slots, samples, into, choose)

    @cached_property
    def empty_text(self) -> tuple[np.ndarray, np.ndarray]:
        """The empty caption's features (n_txt, E) and mask (n_txt) uint8. Raises ``ShardError`` as ``load_empty``."""
        return load_empty(self.index.folder, self.index.encoders)

    def _member(self, entry: ShardEntry, descriptor: int, row: dict[str, Any], kind: str, limit: int) -> bytes | None:
        size = row.get(f"{kind}_size", -1)
        if size < 0:
            return None
        if size > limit:
            reason = {"image": "image_too_large", "txt": "text_too_large", "json": "text_too_large"}.get(
                kind, "feature_too_large"
            )
            raise BadSampleError(reason, f"the {kind} has {size} bytes; the limit is {limit}")
        offset = row[f"{kind}_offset"]
        try:
            data = os.pread(descriptor, size, offset)
        except OSError as error:
            found = f"cannot be read: {error.strerror}"
        else:
            if len(data) == size and crc32(data) == row[f"{kind}_crc32"]:
                return data
            found = f"has the crc32 {crc32(data):08x} over {len(data)} bytes"
        key = row["key"].decode("utf-8", "replace")
        message = (
            f"{entry.file}: the {kind} of {key} ({size} bytes at byte {offset}) {found}, "
            f"expected {row[f'{kind}_crc32']:08x}"
        )
        if self.on_damage == "skip":
            raise BadSampleError("shard_crc", message)
        raise ShardError(
            message,
            cure=f"see what is damaged: longskip data lint {self.index.folder}; then restore the shard, "
            "or let damaged samples be skipped",
        )


@dataclass(frozen=True)
class FolderEntry:
    """A picture of a folder: key, file relative to the folder, and captions where metadata.jsonl has them."""

    key: str
    file: str
    captions: Captions | None


def scan_folder(
    folder: Path, fields: Mapping[str, float] | None = None
) -> tuple[list[FolderEntry], list[tuple[str, str, str]]]:
    """The pictures of a folder, sorted by key, and [(name, reason, detail)] of what cannot be taken.

    With a ``metadata.jsonl`` its lines are the list (``file_name`` and ``text`` or ``captions``); otherwise every
    ``name.jpg|jpeg|png|webp`` below the folder is taken, its caption lying in ``name.txt`` (or ``name.json``). With
    ``fields`` a line's captions are those fields of it (``txt``: its ``text``).
    """
    metadata = folder / METADATA_NAME
    entries, problems = _scan_metadata(metadata, fields) if metadata.exists() else _scan_files(folder)
    unique: dict[str, FolderEntry] = {}
    for entry in sorted(entries, key=lambda entry: (entry.key, entry.file)):
        if entry.key in unique:
            problems.append((entry.file, "duplicate", f"{unique[entry.key].file} has the same name"))
        else:
            unique[entry.key] = entry
    return list(unique.values()), problems


def _scan_files(folder: Path) -> tuple[list[FolderEntry], list[tuple[str, str, str]]]:
    entries: list[FolderEntry] = []
    problems: list[tuple[str, str, str]] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            stem, dot, extension = name.rpartition(".")
            if not dot or not stem or extension.lower() not in IMAGE_EXTENSIONS or name.startswith("."):
                continue
            file = (Path(parent) / name).relative_to(folder).as_posix()
            try:
                entries.append(FolderEntry(checked_key(file.rpartition(".")[0]), file, None))
            except ShardError as error:
                problems.append((repr(file), "hostile_name", error.message))
    return entries, problems


def _scan_metadata(
    path: Path, fields: Mapping[str, float] | None
) -> tuple[list[FolderEntry], list[tuple[str, str, str]]]:
    entries: list[FolderEntry] = []
    problems: list[tuple[str, str, str]] = []
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{path.name}:{number}"
            try:
                if len(line) > MAX_TEXT_BYTES:
                    raise BadSampleError("text_too_large", f"the line has {len(line)} bytes")
                record = json_record(line)
                file = record.get("file_name")
                if not isinstance(file, str):
                    raise BadSampleError("caption_json", "the line has no 'file_name'")
                key = checked_key(PurePosixPath(file).as_posix()).rpartition(".")[0]
                if PurePosixPath(file).suffix.lower()[1:] not in IMAGE_EXTENSIONS:
                    raise BadSampleError("image_format", f"{file!r} is not one of {', '.join(IMAGE_EXTENSIONS)}")
                text = record.get("text")
                if fields:
                    captions = captions_by_field(record | {TXT: text}, fields)
                else:
                    captions = weighted_captions(record.get("captions", [{"text": "" if text is None else text}]))
                entries.append(FolderEntry(key, PurePosixPath(file).as_posix(), captions))
            except BadSampleError as error:
                problems.append((where, error.reason, error.message))
            except ShardError as error:
                problems.append((where, "hostile_name", error.message))
    return entries, problems


def read_entry(folder: Path, entry: FolderEntry, fields: Mapping[str, float] | None = None) -> RawSample:
    """The sample of a scanned picture. Raises ``BadSampleError`` as ``FolderSource.read`` does."""
    image = _file_bytes(folder / entry.file, MAX_IMAGE_BYTES)
    if image is None:
        raise BadSampleError("image_missing", f"{entry.file} is not there")
    if len(image) > MAX_IMAGE_BYTES:
        raise BadSampleError("image_too_large", f"{entry.file} has more than {MAX_IMAGE_BYTES} bytes")
    return RawSample(entry.key, image, read_captions(folder, entry, fields))


def read_captions(folder: Path, entry: FolderEntry, fields: Mapping[str, float] | None = None) -> Captions:
    """The captions of a scanned picture. Raises ``BadSampleError`` with captions' reasons."""
    if entry.captions is not None:
        return entry.captions
    text, extra = _texts_beside(folder, entry)
    return captions_of(text, extra, fields)


def _texts_beside(folder: Path, entry: FolderEntry) -> tuple[bytes | None, bytes | None]:
    stem = folder / entry.file.rpartition(".")[0]
    return _file_bytes(Path(f"{stem}.txt"), MAX_TEXT_BYTES), _file_bytes(Path(f"{stem}.json"), MAX_TEXT_BYTES)


def _file_bytes(path: Path, limit: int) -> bytes | None:
    """The file's bytes, at most one past the limit, so that a huge file is noticed and not read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a fifo would block for ever
            raise BadSampleError("file_unreadable", f"{path.name} is not a plain file")
        with path.open("rb") as stream:
            return stream.read(limit + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BadSampleError("file_unreadable", f"{path.name}: {error.strerror}") from error


class FolderSource:
    """A plain folder of pictures and texts, sorted by name; trains with no conversion.

    Raises ``DataError`` where the folder holds no picture, or names two pictures alike.
    """

    features = None

    def __init__(self, folder: str | os.PathLike[str], *, fields: Mapping[str, float] | None = None) -> None:
        self.folder = refuse_url(folder)
        self.fields = dict(fields or {})
        if not self.folder.is_dir():
            raise UnfitDataError(f"{self.folder} is not a folder")
        self.entries, self.problems = scan_folder(self.folder, self.fields)
        if self.problems:
            name, reason, detail = self.problems[0]
            raise DataError(
                f"{self.folder}: {len(self.problems)} entries cannot be used, the first is {name} ({reason}: {detail})",
                cure="correct or remove them, or pack the rest: longskip data pack FOLDER OUT",
            )
        if not self.entries:
            raise UnfitDataError(
                f"{self.folder} holds no pictures ({', '.join('.' + name for name in IMAGE_EXTENSIONS)})",
                cure=f"put name.jpg and name.txt side by side, or write {METADATA_NAME} with file_name and text",
            )

    def __len__(self) -> int:
        return len(self.entries)

    def _entry(self, i: int) -> FolderEntry:
        if not 0 <= i < len(self.entries):
            raise DataError(f"sample {i}; the source holds {len(self)}")
        return self.entries[i]

    def key(self, i: int) -> str:
        """The picture's name without its extension, relative to the folder."""
        return self._entry(i).key

    def size(self, i: int) -> tuple[int, int]:
        """(height, width) of the picture as seen, EXIF orientation applied; (0, 0) where its header cannot be read."""
        path = self.folder / self._entry(i).file
        for limit in (HEADER_BYTES, MAX_IMAGE_BYTES):
            with suppress(BadSampleError):
                return upright_size(_file_bytes(path, limit) or b"")
        return 0, 0

    def sizes(self, *, latents: bool = False) -> Iterator[np.ndarray]:
        """(m, 2) int64 (height, width) of pictures as ``size``; a folder holds no latents, so theirs are (0, 0)."""
        for at in range(0, len(self), 1024):
            numbers = range(at, min(at + 1024, len(self)))
            yield np.array([(0, 0) if latents else self.size(i) for i in numbers], dtype=np.int64)

    def read(self, i: int) -> RawSample:
        """Sample ``i``. Raises ``BadSampleError`` with ``image_missing``, ``image_too_large`` or captions' reasons."""
        return read_entry(self.folder, self._entry(i), self.fields)

    def captions(self, i: int) -> Captions:
        """The captions of sample ``i`` alone. Raises ``BadSampleError`` with captions' reasons."""
        return read_captions(self.folder, self._entry(i), self.fields)

    def caption_fields(self) -> set[str]:
        """The names that ``fields`` could have, as found in the first samples."""
        found: set[str] = set()
        with suppress(FileNotFoundError), (self.folder / METADATA_NAME).open("rb") as lines:
            for line in islice((line for line in lines if line.strip()), FIELDS_SCAN):
                found |= fields_in(None, line)
            return found - {"file_name", "text"} | ({TXT} if "text" in found else set())
        for entry in self.entries[:FIELDS_SCAN]:
            with suppress(BadSampleError):
                found |= fields_in(*_texts_beside(self.folder, entry))
        return found

    def fingerprint(self) -> str:
        """SHA-256 over names and sizes of pictures and texts, and the captions of ``metadata.jsonl``."""
        digest = hashlib.sha256()
        for entry in self.entries:
            stem = entry.file.rpartition(".")[0]
            beside = () if entry.captions is not None else (stem + ".txt", stem + ".json")
            sizes = [self._size(file) for file in (entry.file, *beside)]
            digest.update(json.dumps([entry.file, sizes, entry.captions]).encode() + b"\n")
        return digest.hexdigest()

    def _size(self, file: str) -> int:
        try:
            return (self.folder / file).stat().st_size
        except OSError:
            return -1


def open_source(
    path: str | os.PathLike[str],
    *,
    on_damage: Literal["stop", "skip"] = "stop",
    fields: Mapping[str, float] | None = None,
) -> ShardSource | FolderSource:
    """The source at a path: a folder with ``index.json`` (or that file), or a plain folder of pictures.

    ``fields``: caption fields and their shares (``data.captions``), as ``captions_of``.

    Raises ``ShardError`` for URLs and for a folder of tars without an index (the cure names the command), ``DataError``
    for a path that is not there and for empty data.
    """
    folder = refuse_url(path)
    if folder.name == INDEX_NAME and folder.is_file():
        folder = folder.parent
    if not folder.exists():
        raise UnfitDataError(f"{folder} does not exist", cure="give a folder of shards or of pictures with texts")
    if folder.is_file():
        raise UnfitDataError(f"{folder} is a file", cure="give the folder that holds it")
    if (folder / INDEX_NAME).exists():
        return ShardSource(folder, on_damage=on_damage, fields=fields)
    tars = sorted(folder.glob("*.tar"))
    if tars:
        raise ShardError(
            f"{folder} holds {len(tars)} tars and no {INDEX_NAME}", cure=f"index them: longskip data index {folder}"
        )
    return FolderSource(folder, fields=fields)
