"""Writing shards: pictures and captions → numbered tars with an index, the same bytes for the same samples."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longskip.engine.data.decode import MAX_PIXELS, decode_image
from longskip.engine.data.index import (
    IMAGE_EXTENSIONS,
    INDEX_NAME,
    REFUSED,
    Index,
    ShardEntry,
    checked_key,
    index_shard,
    refuse_url,
    save_index,
    table_name,
    write_table,
)
from longskip.engine.data.sources import METADATA_NAME, RawSample, read_entry, scan_folder
from longskip.errors import BadSampleError, DataError, ShardError, UnfitDataError

PER_SHARD = 10_000
MAX_BYTES = 1e9

_EXTENSION = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


def write_shards(
    samples: Iterable[RawSample | Mapping[str, Any]],
    out: str | os.PathLike[str],
    *,
    per_shard: int = PER_SHARD,
    max_bytes: float = MAX_BYTES,
    encoders: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Index:
    """Writes ``00000.tar``, … with nine-digit keys counting from 0, their tables and at last ``index.json``.

    A sample is a ``RawSample`` (its key is replaced), or a mapping of extensions to values as webdataset's writer takes
    it: ``{"png": bytes, "txt": str, "json": dict}``, where a ``"__key__"`` of its own is kept. A shard ends after
    ``per_shard`` samples or before it grows past ``max_bytes``. Times, owners and the order of members are fixed, so
    the same samples give the same SHA-256. ``progress`` is called with the number of samples written, once per sample.

    What fails or is interrupted leaves nothing of its own behind. Raises ``DataError`` for an empty input,
    ``UnfitDataError`` for a folder that already holds shards or pictures, ``ShardError`` for hostile keys and for members
    that could run code.
    """
    folder = refuse_url(out)
    if per_shard < 1 or max_bytes < 1:
        raise DataError(f"per_shard {per_shard} and max_bytes {max_bytes} must be 1 or more")
    taken = INDEX_NAME if (folder / INDEX_NAME).exists() else next((path.name for path in folder.glob("*.tar")), None)
    if taken:
        raise UnfitDataError(f"{folder} already holds {taken}", cure="pack into a new folder, or remove it first")
    refuse_pictures(folder)
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[ShardEntry] = []
    written = 0
    shard: _OpenShard | None = None
    whole = False
    try:
        shard = _OpenShard(folder, 0)
        for sample in samples:
            key, members = _members(sample, written)
            size = sum(len(value) + 1024 for value in members.values())  # a header and at most a block of padding
            if shard.count and (shard.count >= per_shard or shard.bytes + size > max_bytes):
                entries.append(shard.finish())
                shard = _OpenShard(folder, len(entries))
            shard.write(key, members, size)
            written += 1
            if progress is not None:
                progress(written)
        if not written:
            raise DataError(f"no samples to write into {folder}")
        entries.append(shard.finish())
        index = Index(folder, tuple(entries), dict(encoders or {}))
        save_index(index)
        whole = True
    finally:
        if not whole:
            if shard is not None:
                shard.abandon()
            for number in range(len(entries) + 2):  # the next one may have been begun as well
                file = _shard_name(number)
                for name in (file, _part_name(file), table_name(file)):
                    (folder / name).unlink(missing_ok=True)
    return index


def refuse_pictures(folder: Path) -> None:
    """Raises ``UnfitDataError`` for a folder with pictures of its own: shards among them would stand for all of them.

    A folder that holds an index is read by it alone, so that its pictures would be passed over from then on.
    """
    found = next(_pictures(folder), None)
    if found is not None:
        raise UnfitDataError(
            f"{folder} holds pictures ({found}); with shards beside them they would never be read again",
            cure="name a new folder for the shards",
        )


def _pictures(folder: Path) -> Iterator[str]:
    """What makes of a folder one that trains as it is: its list of pictures, or pictures in it and below."""
    if (folder / METADATA_NAME).exists():
        yield METADATA_NAME
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in sorted(files):
            if not name.startswith(".") and name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS:
                yield (Path(parent) / name).relative_to(folder).as_posix()


def _shard_name(number: int) -> str:
    return f"{number:05d}.tar"


def _part_name(file: str) -> str:
    return f"{file}.part"


class _OpenShard:
    """One tar being written under a temporary name; it gets its own name when it is whole."""

    def __init__(self, folder: Path, number: int) -> None:
        from webdataset import TarWriter  # imports torch

        self.folder = folder
        self.file = _shard_name(number)
        self.part = folder / _part_name(self.file)
        self.count = 0
        self.bytes = 0
        self.keys: set[str] = set()
        # A stream of our own: given a name, webdataset would look for a URL or a pipe in it.
        self.stream = self.part.open("wb")
        self.writer: Any = TarWriter(self.stream, user="", group="", mode=0o644, encoder=False, mtime=0)

    def write(self, key: str, members: Mapping[str, bytes], size: int) -> None:
        if key in self.keys:
            raise ShardError(f"the key {key!r} comes twice", cure="give every sample a key of its own, or none")
        self.keys.add(key)
        self.writer.write({"__key__": key, **members})
        self.count += 1
        self.bytes += size

    def finish(self) -> ShardEntry:
        self.writer.close()
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()
        entry, table = index_shard(self.part, self.file)
        write_table(self.folder / table_name(self.file), table)
        os.replace(self.part, self.folder / self.file)
        return entry

    def abandon(self) -> None:
        """Closes what is unfinished; nothing after ``finish``."""
        # A full disk, a tar that is half closed: the cause is already on its way.
        with contextlib.suppress(OSError, ValueError):
            self.writer.close()
        with contextlib.suppress(OSError):
            self.stream.close()


def _members(sample: RawSample | Mapping[str, Any], number: int) -> tuple[str, dict[str, bytes]]:
    key = f"{number:09d}"
    if isinstance(sample, RawSample):
        members = {image_extension(sample.image): sample.image, **caption_members(sample.captions)}
        return key, members
    key = checked_key(str(sample.get("__key__", key)))
    if "." in key:
        raise ShardError(f"the key {key!r} has a dot, where webdataset would cut it", cure="replace the dots")
    members = {}
    for extension, value in sample.items():
        if extension.startswith("__"):
            continue
        if not _EXTENSION.fullmatch(extension) or REFUSED.intersection(extension.lower().split(".")):
            raise ShardError(f"sample {key}: a member {extension!r} is refused (pickles and modules can run code)")
        if isinstance(value, str):
            value = value.encode("utf-8")
        elif isinstance(value, (dict, list)):
            value = json.dumps(value, ensure_ascii=False, sort_keys=True).encode("utf-8")
        if not isinstance(value, (bytes, bytearray, memoryview)):
            raise DataError(f"sample {key}: {extension!r} is a {type(value).__name__}; bytes, text or JSON are written")
        members[extension] = bytes(value)
    if not members.keys() & {*IMAGE_EXTENSIONS, "latent.npy"}:
        raise DataError(
            f"sample {key} has no picture and no latent, only {sorted(members)}", cure="give jpg, png or webp bytes"
        )
    return key, members


def image_extension(data: bytes) -> str:
    """``jpg``, ``png`` or ``webp`` by the first bytes. Raises ``BadSampleError`` for anything else."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise BadSampleError("image_format", f"neither JPEG, PNG nor WebP (starts with {data[:8]!r})")


def caption_members(captions: tuple[tuple[str, float], ...]) -> dict[str, bytes]:
    """``txt`` with the first caption and, where there are several, ``json`` with all and their weights."""
    members = {"txt": captions[0][0].encode("utf-8")}
    if len(captions) > 1:
        record = {"captions": [{"text": text, "weight": weight} for text, weight in captions]}
        members["json"] = json.dumps(record, ensure_ascii=False, sort_keys=True).encode("utf-8")
    return members


@dataclass
class PackReport:
    """What ``pack_folder`` did: samples packed, shards written, and [(name, reason, detail)] of what was left out."""

    packed: int
    shards: int
    bad: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Bad entries per reason."""
        return dict(sorted(Counter(reason for _, reason, _ in self.bad).items()))


def pack_folder(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    per_shard: int = PER_SHARD,
    max_bytes: float = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int], None] | None = None,
) -> PackReport:
    """Packs a folder of pictures and texts (or with ``metadata.jsonl``) into shards; the bytes are kept as they are.

    Every picture is decoded once, so that a broken one is left out and listed here rather than met in training. Raises
    ``DataError`` where nothing can be packed.
    """
    source = refuse_url(folder)
    if not source.is_dir():
        raise UnfitDataError(f"{source} is not a folder")
    if Path(out).absolute() == source.absolute():
        raise UnfitDataError(f"{out} is the folder that is packed", cure="pack into another folder")
    entries, bad = scan_folder(source)
    report = PackReport(0, 0, bad)
    if not entries:
        raise UnfitDataError(f"{source} holds no pictures that can be packed; {len(bad)} entries were refused")

    def usable() -> Iterator[RawSample]:
        for entry in entries:
            try:
                sample = read_entry(source, entry)
                decode_image(sample.image, resolution=(8, 8), max_pixels=max_pixels)
                image_extension(sample.image)
            except BadSampleError as error:
                report.bad.append((entry.file, error.reason, error.message))
                continue
            yield sample

    try:
        index = write_shards(usable(), out, per_shard=per_shard, max_bytes=max_bytes, progress=progress)
    except DataError as error:
        if len(report.bad) >= len(entries):
            raise DataError(f"none of {len(entries)} pictures of {source} can be used: {report.counts}") from error
        raise
    report.packed, report.shards = index.total, len(index.shards)
    return report
