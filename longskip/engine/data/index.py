"""The index of a folder of shards: ``index.json`` and, beside each shard, a table of where every member lies.

Shards are webdataset tars after img2dataset's conventions: ``KEY.jpg|png|webp``, ``KEY.txt``, optional ``KEY.json``
and derived ``KEY.latent.npy``, ``KEY.text.npy``, ``KEY.mask.npy``; a sample has a picture, a latent or both. They are
walked with ``tarfile``, never with webdataset, whose decoders run pickles and whose URLs run shells. ``tarfile`` ends
quietly at a damaged header, so a walk counts only when it reaches the end-of-archive blocks.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from longskip.engine.data.decode import picture_size
from longskip.engine.data.hashes import file_sha256
from longskip.engine.data.npy import MAX_HEADER, header_of
from longskip.engine.secrets import hidden
from longskip.errors import BadSampleError, ShardError, UnfitDataError

VERSION = 1
INDEX_NAME = "index.json"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
DERIVED = ("latent.npy", "text.npy", "mask.npy")
KINDS = ("image", "txt", "json", *DERIVED)
SEEN = ("image", "latent.npy")
"""What a model can be shown: a shard holds at least one of these kinds."""
REFUSED = frozenset({"pyd", "pkl", "pickle", "pth", "pt", "ckpt", "joblib", "dill"})

MAX_INDEX_BYTES = 1 << 28
MAX_SHARD_BYTES = 1 << 50
MAX_TAR_HEADER = 1 << 20

SHA256 = re.compile(r"[0-9a-f]{64}")

_TABLE_HEADER = 1 << 12
_FIELD = re.compile(r"\('([a-z0-9._]+)', '(\|S[0-9]{1,5}|<u4|<i8)'\)")
_TABLE = re.compile(
    rf"\{{'descr': \[(?P<fields>(?:{_FIELD.pattern}(?:, )?)+)\], 'fortran_order': (?:True|False), "
    r"'shape': \((?P<rows>[0-9]{1,15}),\), \} *\n"
)
_BLOCK = 512
_END = 2 * _BLOCK
_URL = re.compile(r"^\s*[A-Za-z][A-Za-z0-9+.-]+:|://")
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\\\\\ud800-\udfff]")


@dataclass(frozen=True)
class ShardEntry:
    """One shard as ``index.json`` lists it; ``file`` is relative to the index, ``members`` counts them by kind.

    ``table_sha256`` is that of the table's file; None in an index made before tables were hashed.
    """

    file: str
    count: int
    bytes: int
    sha256: str
    members: Mapping[str, int] = field(default_factory=dict)
    table_sha256: str | None = None

    @property
    def table(self) -> str:
        """The table's file, relative to the index."""
        return table_name(self.file)


@dataclass(frozen=True)
class Index:
    """A checked ``index.json``: the folder, its shards in order, and the ids of the encoders behind derived members."""

    folder: Path
    shards: tuple[ShardEntry, ...]
    encoders: Mapping[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The number of samples."""
        return sum(shard.count for shard in self.shards)

    @property
    def members(self) -> dict[str, int]:
        """How many members of each kind there are in all shards."""
        counts: Counter[str] = Counter()
        for shard in self.shards:
            counts.update(shard.members)
        return dict(counts)

    def to_json(self) -> dict[str, Any]:
        """What ``index.json`` holds; nothing of it depends on where the folder lies."""
        shards = [
            {"file": s.file, "count": s.count, "bytes": s.bytes, "sha256": s.sha256, "members": dict(s.members)}
            | ({} if s.table_sha256 is None else {"table_sha256": s.table_sha256})
            for s in self.shards
        ]
        return {"version": VERSION, "total": self.total, "shards": shards, "encoders": dict(self.encoders)}

    def fingerprint(self) -> str:
        """SHA-256 over the content of the index: the identity of the data, wherever they lie.

        Without the tables' hashes: tables follow from the shards, and data indexed again stay the same data.
        """
        bare = replace(self, shards=tuple(replace(shard, table_sha256=None) for shard in self.shards))
        return hashlib.sha256(json.dumps(bare.to_json(), sort_keys=True).encode()).hexdigest()


def table_name(file: str) -> str:
    """``00000.tar`` → ``00000.idx.npy``."""
    return (file[:-4] if file.endswith(".tar") else file) + ".idx.npy"


def refuse_url(path: str | os.PathLike[str]) -> Path:
    """``path`` as a ``Path``. Raises ``ShardError`` for ``pipe:``, ``http:`` and other URLs: only files are read."""
    text = os.fspath(path)
    if _URL.search(text):
        raise ShardError(
            f"{hidden(text)!r} looks like a URL or a pipe; only local files are read and no command is ever run",
            cure="copy the data to a local or mounted folder (a local name with a colon: write ./ before it)",
        )
    return Path(text)


def checked_key(key: str) -> str:
    """``key`` itself. Raises ``ShardError`` for keys that could leave a folder or garble a terminal."""
    parts = PurePosixPath(key).parts
    if not key or key.startswith("/") or ".." in parts or _UNSAFE.search(key):
        raise ShardError(f"the key {key!r} is empty, absolute, contains '..', a backslash or unprintable characters")
    return key


def split_member(name: str) -> tuple[str, str]:
    """``a/b.latent.npy`` → ``("a/b", "latent.npy")``, at the first dot of the base name as webdataset does."""
    head, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return head + slash + stem, extension.lower()


def _kind(extension: str) -> str | None:
    if extension in IMAGE_EXTENSIONS:
        return "image"
    return extension if extension in KINDS else None


def _reindex(folder: Path) -> str:
    return f"restore the shard, or index what is there: longskip data index {folder}"


class _Headers(io.BufferedReader):
    """What ``tarfile`` walks on: a header says how long the name that follows is, and would have as much read."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_TAR_HEADER:
            raise tarfile.ReadError(
                f"a header asks for {size} bytes at byte {self.tell()}, the limit is {MAX_TAR_HEADER}"
            )
        return super().read(size)


def _walk(path: Path) -> tuple[list[tuple[str, dict[str, tuple[int, int]]]], int]:
    """[(key, {kind: (offset, size)})] in file order and where the last member ends (rounded up to a block)."""
    samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
    seen: set[str] = set()
    end = 0
    total = path.stat().st_size
    with _Headers(io.FileIO(path)) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            where = f"{path}: member {member.name!r} at byte {member.offset}"
            stop = member.offset_data + member.size
            end = -(-stop // _BLOCK) * _BLOCK
            if member.isdir():
                end = member.offset_data
                continue
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:
                raise ShardError(f"{where} is a link, a device or a sparse file; only plain files are read")
            if member.size < 0 or stop > total:
                raise ShardError(f"{where} needs {stop} bytes of file, found {total}: the shard is truncated")
            key, extension = split_member(member.name)
            try:
                checked_key(key)
            except ShardError as error:
                raise ShardError(f"{where}: {error.message}") from None
            if REFUSED.intersection(extension.split(".")):
                raise ShardError(
                    f"{where} is a pickle or a module, which can run code when read; such members are refused",
                    cure="write the shard without it (longskip data pack)",
                )
            if not samples or samples[-1][0] != key:
                if key in seen:
                    raise ShardError(
                        f"{where}: the key {key!r} appears a second time in the shard",
                        cure="keys must be unique and a sample's members adjacent (tar --sort=name)",
                    )
                seen.add(key)
                samples.append((key, {}))
            kind = _kind(extension)
            if kind is None:
                continue
            if kind in samples[-1][1]:
                raise ShardError(f"{where}: the sample {key!r} has a second {kind} member")
            samples[-1][1][kind] = (member.offset_data, member.size)
    return samples, end


def index_shard(path: Path, file: str | None = None) -> tuple[ShardEntry, np.ndarray]:
    """Reads one shard through once: its entry and its table, one row per sample.

    The table is a structured array: ``key`` (bytes), ``width`` and ``height`` (as stored in the file, before EXIF
    orientation; 0 where the header cannot be read), and per kind ``KIND_offset``, ``KIND_size``, ``KIND_crc32`` with a
    size of -1 where a sample lacks the member. Where there are latents, ``latent_width`` and ``latent_height`` are
    those of their arrays (0 where a header cannot be read), so that buckets are known without reading samples.

    Raises ``ShardError`` naming the byte where the shard is damaged.
    """
    cure = "make the shard again; nothing of it was indexed"
    try:
        size = path.stat().st_size
        if size == 0:
            raise ShardError(f"{path} is empty (0 bytes)", cure=cure)
        rows, end = _walk(path)
    except FileNotFoundError:
        raise ShardError(f"{path} does not exist") from None
    except (tarfile.TarError, OSError, ValueError, EOFError, RecursionError) as error:  # long names of long names
        raise ShardError(f"{path} cannot be read as a tar: {error}", cure=cure) from error
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if size - end < _END or any(data[end : end + _END]):
            raise ShardError(
                f"{path}: the walk ended at byte {end} of {size} without the end-of-archive blocks: "
                "a damaged header or a truncated shard",
                cure=cure,
            )
        if data[end:].strip(b"\0"):
            raise ShardError(f"{path}: data after the end of the archive at byte {end}", cure=cure)
        counts = Counter(kind for _, members in rows for kind in members)
        if not any(counts[kind] for kind in SEEN):
            raise ShardError(f"{path} holds no picture and no latent in {len(rows)} samples", cure=cure)
        kinds = [kind for kind in KINDS if counts[kind]]
        table = np.zeros(len(rows), dtype=_dtype(kinds, max(len(key.encode()) for key, _ in rows)))
        for kind in kinds:
            table[f"{kind}_size"] = -1
        view = memoryview(data)
        try:
            for i, (key, members) in enumerate(rows):
                table["key"][i] = key.encode()
                for kind, (offset, length) in members.items():
                    table[f"{kind}_offset"][i] = offset
                    table[f"{kind}_size"][i] = length
                    table[f"{kind}_crc32"][i] = zlib.crc32(view[offset : offset + length])
                if "latent.npy" in members:
                    offset, length = members["latent.npy"]
                    table["latent_height"][i], table["latent_width"][i] = _latent_size(data, offset, length)
                if "image" not in members:
                    continue  # the row stays: a latent may stand for it, or the reader and lint report it
                offset, length = members["image"]
                try:
                    table["width"][i], table["height"][i] = picture_size(data[offset : offset + length])
                except BadSampleError:
                    continue  # the reader meets it again and reports it with the sample
            sha256 = hashlib.sha256(view).hexdigest()
        finally:
            view.release()
    numbers = {kind: counts[kind] for kind in kinds}
    table_sha256 = hashlib.sha256(_table_bytes(table)).hexdigest()
    return ShardEntry(file or path.name, len(rows), size, sha256, numbers, table_sha256), table


def _latent_size(data: mmap.mmap, offset: int, length: int) -> tuple[int, int]:
    """(height, width) of a latent (C, h, w) from its ``.npy`` header; (0, 0) where that cannot be read."""
    try:
        shape = header_of(data[offset : offset + min(length, MAX_HEADER)]).shape
    except BadSampleError:
        return 0, 0  # the reader meets it again and reports it with the sample
    return (shape[1], shape[2]) if len(shape) == 3 and max(shape) < 1 << 16 else (0, 0)


def _dtype(kinds: Iterable[str], key_bytes: int) -> np.dtype:
    kinds = tuple(kinds)
    fields: list[tuple[str, str]] = [("key", f"S{key_bytes}"), ("width", "<u4"), ("height", "<u4")]
    if "latent.npy" in kinds:
        fields += [("latent_width", "<u4"), ("latent_height", "<u4")]
    for kind in kinds:
        fields += [(f"{kind}_offset", "<i8"), (f"{kind}_size", "<i8"), (f"{kind}_crc32", "<u4")]
    return np.dtype(fields)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes beside ``path``, syncs and renames, so that a reader sees the old file or the whole new one."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_table(path: Path, table: np.ndarray) -> None:
    """Saves a table as ``.npy`` without pickle."""
    write_atomically(path, _table_bytes(table))


def _table_bytes(table: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, table, allow_pickle=False)
    return buffer.getvalue()


def save_index(index: Index) -> Path:
    """Writes ``index.json`` last and atomically; returns its path."""
    path = index.folder / INDEX_NAME
    write_atomically(path, (json.dumps(index.to_json(), indent=1, sort_keys=True) + "\n").encode())
    return path


def build_index(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], *, encoders: Mapping[str, Any] | None = None
) -> Index:
    """Indexes shards made elsewhere: all ``*.tar`` of a folder, or the listed ones; writes tables and ``index.json``.

    Listed shards of several folders get their index in the deepest folder above them all. Without ``encoders``, what an
    earlier index of the same feature shards said of theirs is kept. Raises ``ShardError`` naming
    the file for missing, damaged or hostile shards; then no ``index.json`` is written.
    """
    if isinstance(paths, (str, os.PathLike)):
        folder = refuse_url(paths)
        if not folder.is_dir():
            raise UnfitDataError(f"{folder} is not a folder", cure="give the folder of the shards")
        files = sorted(folder.glob("*.tar"))
    else:
        files = [refuse_url(path) for path in paths]
        folder = Path(os.path.commonpath([path.absolute().parent for path in files])) if files else Path()
    if not files:
        raise ShardError(f"no *.tar in {folder}", cure="pack pictures into shards: longskip data pack FOLDER OUT")
    entries = []
    for path in files:
        file = path.name if path.parent == folder else path.absolute().relative_to(folder.absolute()).as_posix()
        entry, table = index_shard(path, file)
        write_table(folder / entry.table, table)
        entries.append(entry)
    index = Index(folder, tuple(entries), dict(encoders if encoders is not None else _kept_encoders(folder, entries)))
    save_index(index)
    return index


def _kept_encoders(folder: Path, entries: Iterable[ShardEntry]) -> Mapping[str, Any]:
    """What the index that is there says of the encoders, where every shard of features is one that it lists."""
    try:
        there = load_index(folder, check=False)
    except ShardError:
        return {}
    known = {shard.sha256 for shard in there.shards}
    derived = [entry for entry in entries if any(kind in DERIVED for kind in entry.members)]
    return there.encoders if derived and all(entry.sha256 in known for entry in derived) else {}


def load_index(path: str | os.PathLike[str], *, check: bool = True) -> Index:
    """The index of a folder (or of its ``index.json``); with ``check`` every shard is checked cheaply (no hashing).

    Raises ``ShardError`` for an index that is missing, of another version or malformed, and for shards that differ.
    """
    path = refuse_url(path)
    if path.is_dir():
        path = path / INDEX_NAME
    folder = path.parent
    cure = f"longskip data index {folder}"
    try:
        with path.open("rb") as stream:
            text = stream.read(MAX_INDEX_BYTES + 1)
        if len(text) > MAX_INDEX_BYTES:
            raise ShardError(f"{path} is larger than {MAX_INDEX_BYTES} bytes; that is no index", cure=cure)
        data = json.loads(text.decode("utf-8"))
    except FileNotFoundError:
        raise ShardError(f"{path} does not exist", cure=cure) from None
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error.strerror}", cure=cure) from error
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path} is not valid JSON: {error}", cure=cure) from error
    if not isinstance(data, dict) or data.get("version") != VERSION:
        found = str(data.get("version"))[:80] if isinstance(data, dict) else None
        raise ShardError(f"{path} has version {found}; this longskip reads version {VERSION}", cure=cure)
    try:
        shards = tuple(_entry(item) for item in data["shards"])
        encoders = data.get("encoders", {})
        if not isinstance(encoders, dict) or not _shallow(encoders):
            raise ValueError("encoders is no mapping of a few values")
        if len({shard.file for shard in shards}) < len(shards):
            raise ValueError("a shard is named twice")
        total = data["total"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ShardError(f"{path} is malformed: {type(error).__name__}: {error}", cure=cure) from error
    index = Index(folder, shards, encoders)
    if index.total != total:
        raise ShardError(f"{path} says {total} samples in all, its shards add up to {index.total}", cure=cure)
    if check:
        for shard in shards:
            check_shard(folder, shard)
    return index


def _entry(item: dict[str, Any]) -> ShardEntry:
    file = item["file"]
    if not isinstance(file, str) or not file.endswith(".tar") or _URL.search(file):
        raise ValueError(f"shard file {file!r}")
    try:
        checked_key(file)
    except ShardError as error:
        raise ValueError(f"shard file {file!r}: {error.message}") from None
    for name in ("count", "bytes"):
        if isinstance(item[name], bool) or not isinstance(item[name], int) or item[name] < 1:
            raise ValueError(f"{file}: {name} is {str(item[name])[:80]}")
    if not item["count"] * _BLOCK <= item["bytes"] <= MAX_SHARD_BYTES:
        raise ValueError(f"{file}: {item['count']} samples in {item['bytes']} bytes")
    sha256, members = item["sha256"], item.get("members", {})
    if not isinstance(sha256, str) or not SHA256.fullmatch(sha256):
        raise ValueError(f"{file}: the SHA-256 is {str(sha256)[:80]!r}")
    if not isinstance(members, dict) or any(
        type(n) is not int or not 0 <= n <= item["count"] for n in members.values()
    ):
        raise ValueError(f"{file}: members is {str(members)[:80]}")
    of_table = item.get("table_sha256")
    if of_table is not None and not SHA256.fullmatch(str(of_table)):
        raise ValueError(f"{file}: table_sha256 is {str(of_table)[:80]!r}")
    return ShardEntry(file, item["count"], item["bytes"], sha256, members, of_table)


def _shallow(value: Any, depth: int = 8) -> bool:
    """Whether a JSON value has at most so many mappings and lists within one another."""
    if not isinstance(value, (dict, list)):
        return True
    return depth > 0 and all(
        _shallow(item, depth - 1) for item in (value.values() if isinstance(value, dict) else value)
    )


def load_table(folder: Path, shard: ShardEntry) -> np.ndarray:
    """The memory-mapped table of a shard. Raises ``ShardError`` where it is missing, malformed or of another length.

    Its hash is not looked at here: ``check_table_hash`` does.
    """
    path = folder / shard.table
    cure = f"longskip data index {folder}"
    try:
        with path.open("rb") as stream:
            rows, dtype, offset = _table_header(stream)
            names = dtype.names or ()
            kinds = [name[: -len("_offset")] for name in names if name.endswith("_offset")]
            whole = "key" in names and set(kinds) <= set(KINDS)
            if not whole or dtype != _dtype(kinds, dtype["key"].itemsize) or not any(kind in kinds for kind in SEEN):
                raise ShardError(f"{path} is not a table of shard members", cure=cure)
            if rows != shard.count:
                raise ShardError(f"{path} has {rows} rows, expected {shard.count}", cure=cure)
            expected, found = offset + rows * dtype.itemsize, os.fstat(stream.fileno()).st_size
            if found != expected:
                raise ShardError(f"{path} has {found} bytes, expected {expected}", cure=cure)
            return np.memmap(stream, dtype, "r", offset, (rows,))
    except FileNotFoundError:
        raise ShardError(f"{path} does not exist", cure=cure) from None
    except (ValueError, OSError, EOFError) as error:
        raise ShardError(f"{path} is not a table of shard members: {error}", cure=cure) from error


def _table_header(stream: BinaryIO) -> tuple[int, np.dtype, int]:
    """(rows, dtype, where the numbers begin) of a table's ``.npy``; ValueError for anything else.

    Not by ``np.load``, which takes archives and pickles too, and as much memory as a header asks for.
    """
    start = stream.read(_TABLE_HEADER + 12)
    width = {b"\x93NUMPY\1\0": 2, b"\x93NUMPY\2\0": 4}.get(start[:8])
    if width is None:
        raise ValueError(f"it starts with {start[:8]!r}")
    offset = 8 + width + int.from_bytes(start[8 : 8 + width], "little")
    if offset > len(start):
        raise ValueError(f"its header is cut, or longer than {_TABLE_HEADER} bytes")
    found = _TABLE.fullmatch(start[8 + width : offset].decode("latin1"))
    if found is None:
        raise ValueError(f"its header says {start[8 + width :][:80]!r}")
    return int(found["rows"]), np.dtype(_FIELD.findall(found["fields"])), offset


def check_table_hash(folder: Path, shard: ShardEntry) -> None:
    """Raises ``ShardError`` where the table's file has not the SHA-256 of the index, if the index has one."""
    if shard.table_sha256 is None:
        return
    try:
        found = file_sha256(folder / shard.table)
    except OSError as error:
        raise ShardError(f"{folder / shard.table} cannot be read: {error.strerror}", cure=_reindex(folder)) from error
    if found != shard.table_sha256:
        raise ShardError(
            f"{folder / shard.table} has the SHA-256 {found}, the index expects {shard.table_sha256}",
            cure=_reindex(folder),
        )


def check_shard(folder: Path, shard: ShardEntry) -> None:
    """Existence, size, table, the headers before a few members and the end of the archive; about 0.2 ms, no hashing.

    Raises ``ShardError`` naming the file, what was expected, what was found, and the cure.
    """
    path = folder / shard.file
    cure = _reindex(folder)
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ShardError(f"{path} is missing; the index expects {shard.bytes} bytes", cure=cure) from None
    if size != shard.bytes:
        state = "truncated" if size < shard.bytes else "grown"
        raise ShardError(f"{path} is {state}: expected {shard.bytes} bytes, found {size}", cure=cure)
    table = load_table(folder, shard)
    kind = next(kind for kind in SEEN if f"{kind}_offset" in (table.dtype.names or ()))
    offsets, lengths = table[f"{kind}_offset"], table[f"{kind}_size"]
    there = np.flatnonzero(lengths >= 0)
    with path.open("rb") as stream:
        for row in there[np.unique(np.linspace(0, len(there) - 1, 4).astype(int))] if len(there) else ():
            offset, length = int(offsets[row]), int(lengths[row])
            if not _BLOCK <= offset <= size - _END - length:
                raise ShardError(f"{path}: the table's row {row} points to byte {offset} of {size}", cure=cure)
            header = os.pread(stream.fileno(), _BLOCK, offset - _BLOCK)
            found = _header_size(header)
            if found != length:
                raise ShardError(
                    f"{path}: expected a tar header for {length} bytes at byte {offset - _BLOCK}, found "
                    + ("none" if found is None else f"one for {found} bytes"),
                    cure=cure,
                )
        if any(os.pread(stream.fileno(), _END, size - _END)):
            raise ShardError(f"{path}: the end-of-archive blocks are not there", cure=cure)


def _header_size(header: bytes) -> int | None:
    """The size that a ustar header declares, or None where its magic or checksum is wrong."""
    try:
        info = tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape")
    except tarfile.TarError:
        return None
    return info.size if header[257:262] == b"ustar" else None
