"""safetensors files written piece by piece and read in pieces, so that no model has to fit in memory.

The format (8 bytes of header length, a JSON header, the raw tensors one after another) needs no more than one piece at a
time; the safetensors package's own writer takes whole dictionaries. Reading is the package's.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch

from longskip.engine.jsonfiles import read_object
from longskip.errors import CheckpointError, DiskFullError, NoCheckpointError

PIECE = 1 << 24  # elements: 64 MiB of fp32
SHARD_BYTES = 5_000_000_000  # what Hugging Face's hub and loaders are used to
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_OF_CODE = {code: dtype for dtype, code in _CODES.items()}
_BESIDE = re.compile(r"[^/\\\x00]+\.safetensors")
_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
_PICKLED = ("*_model_states.pt", "*_optim_states.pt", "*/*_model_states.pt", ".metadata", "*/.metadata", "*.distcp")


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A tensor to write: ``pieces()`` gives its values in order as tensors of any shape, cast to ``dtype``."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterable[torch.Tensor]]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file, complete or not at all; memory stays that of a piece.

    Raises DiskFullError, or CheckpointError for a value that ``dtype`` cannot hold or that could not be written.
    """
    needed, temporary = sum(entry.bytes for entry in entries), path.with_name(f".{path.name}.tmp")
    try:
        free = shutil.disk_usage(path.parent).free
        if free < needed + (1 << 20):
            raise DiskFullError(
                f"{path} needs {needed:,} bytes, {free:,} are free", cure="free space or write elsewhere"
            )
        with open(temporary, "wb") as file:
            write_tensors(file, entries, metadata)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise (DiskFullError if full else CheckpointError)(f"{path} cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_files(
    folder: Path, stem: str, entries: Sequence[Entry], metadata: Mapping[str, str], limit: int = SHARD_BYTES
) -> list[Path]:
    """``STEM.safetensors``, or above ``limit`` bytes ``STEM-00001-of-0000N.safetensors`` … and
    ``STEM.safetensors.index.json`` (Hugging Face's form); returns what was written, the index last."""
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.bytes for e in shards[-1]) + entry.bytes > limit:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        write_file(folder / f"{stem}.safetensors", entries, metadata)
        return [folder / f"{stem}.safetensors"]
    paths = [folder / f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for path, shard in zip(paths, shards, strict=True):
        write_file(path, shard, metadata)
    index = {
        "metadata": {"total_size": sum(entry.bytes for entry in entries)},
        "weight_map": {e.name: path.name for path, shard in zip(paths, shards, strict=True) for e in shard},
    }
    listing = folder / f"{stem}.safetensors.index.json"
    listing.write_text(json.dumps(index, indent=1), "utf-8")
    return [*paths, listing]


def write_tensors(file: BinaryIO, entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
    """A safetensors file's bytes, from where ``file`` stands; raises CheckpointError as ``write_file``."""
    ordered = sorted(entries, key=lambda e: -e.dtype.itemsize)  # stable; keeps every tensor aligned to its elements
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for entry in ordered:
        span = [offset, offset + entry.bytes]
        header[entry.name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
        offset += entry.bytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)))
    file.write(text)
    for entry in ordered:
        written = 0
        for piece in entry.pieces():
            values = _cast(entry, piece)
            file.write(values.view(torch.uint8).numpy().data)
            written += values.numel()
        if written != math.prod(entry.shape):
            raise CheckpointError(f"{entry.name} gave {written:,} of {math.prod(entry.shape):,} elements")


def _cast(entry: Entry, piece: torch.Tensor) -> torch.Tensor:
    """1-D, contiguous, of the entry's dtype; CheckpointError where a finite value becomes infinite."""
    values = piece.reshape(-1).to(entry.dtype).contiguous()
    if piece.dtype != entry.dtype and entry.dtype.is_floating_point and entry.dtype.itemsize < piece.dtype.itemsize:
        lost = torch.isfinite(piece.reshape(-1)) & ~torch.isfinite(values)
        if bool(lost.any()):
            limit = torch.finfo(entry.dtype).max
            raise CheckpointError(
                f"{entry.name} holds {float(piece.reshape(-1)[lost][0]):.6g}, beyond {entry.dtype} ({limit:.6g})",
                cure="export with --dtype bf16 or fp32",
            )
    return values


# --- reading ----------------------------------------------------------------------------------------------------------


class TensorFile:
    """A ``.safetensors`` file, or a sharded one by its ``.safetensors.index.json``; values are read when asked for.

    ``shapes``, ``dtypes`` by name and ``metadata`` (of the first shard). Raises CheckpointError for anything else, a
    pickle among it. Close it, or use it as a context manager.
    """

    def __init__(self, path: Path) -> None:
        refuse_pickle(path)
        self.path = path
        self._files: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.metadata: dict[str, str] = {}
        for part in parts_of(path):
            self._open(part)

    def _open(self, part: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            file = safe_open(part, framework="pt")
        except (OSError, SafetensorError) as error:
            kind = CheckpointError if part.exists() else NoCheckpointError
            raise kind(f"{part} is no readable safetensors file: {error}") from None
        self.metadata = self.metadata or dict(file.metadata() or {})
        for name in file.keys():  # noqa: SIM118 - a safetensors handle, not a mapping
            if name in self._files:
                raise CheckpointError(f"{self.path} holds {name} twice")
            view = file.get_slice(name)
            if view.get_dtype() not in _OF_CODE:
                raise CheckpointError(f"{part}: {name} is of dtype {view.get_dtype()}, which is not read here")
            self._files[name] = file
            self.shapes[name], self.dtypes[name] = tuple(view.get_shape()), _OF_CODE[view.get_dtype()]

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._files.clear()

    def full(self, name: str) -> torch.Tensor:
        """The whole tensor, of its own dtype."""
        values: torch.Tensor = self._files[name].get_tensor(name)
        return values

    def read(self, name: str, offset: int, numel: int) -> torch.Tensor:
        """``numel`` elements of the flattened tensor from ``offset`` on, 1-D; no more rows than needed are read."""
        shape = self.shapes[name]
        if not shape or numel == 0:
            return self.full(name).reshape(-1)[offset : offset + numel]
        row = math.prod(shape[1:])
        first, last = offset // row, -(-(offset + numel) // row)
        rows: torch.Tensor = self._files[name].get_slice(name)[first:last]
        start = offset - first * row
        return rows.reshape(-1)[start : start + numel]

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The flattened tensor in runs of at most ``PIECE`` elements."""
        total = math.prod(self.shapes[name])
        for offset in range(0, total, PIECE):
            yield self.read(name, offset, min(PIECE, total - offset))


def parts_of(path: Path) -> list[Path]:
    """The safetensors files that ``path`` names: itself, or those of an index; CheckpointError for a broken index."""
    if not path.name.endswith(".index.json"):
        return [path]
    listed = read_object(path, CheckpointError).get("weight_map")
    try:
        names = sorted(set(listed.values()))  # type: ignore[union-attr]
    except (TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no index of safetensors files: {error}") from None
    strange = [name for name in names if not isinstance(name, str) or not _BESIDE.fullmatch(name)]
    if strange or not names:
        raise CheckpointError(f"{path} names {strange[:1] or 'no file'}; an index names files beside itself")
    return [path.with_name(name) for name in names]


def refuse_pickle(path: Path) -> None:
    """CheckpointError for what is, or may be, a pickle: unpickling runs code that the file brings along.

    A folder of pickles is one too: a checkpoint of DeepSpeed or of torch's distributed saving.
    """
    pickles = (
        sorted(found.name for pattern in _PICKLED for found in islice(path.glob(pattern), 1)) if path.is_dir() else []
    )
    if pickles:
        raise CheckpointError(
            f"{path} is a checkpoint of DeepSpeed or torch ({pickles[0]}): pickles, which longskip never reads, as loading "
            "one can run any code that it carries",
            cure="where you trust it, have DeepSpeed write its weights as safetensors (zero_to_fp32.py FOLDER OUT "
            "--safe_serialization), then longskip checkpoint convert or train.init_from takes them",
        )
    head = b""
    if path.is_file():
        with open(path, "rb") as file:
            head = file.read(9)
    # A zip archive or a pickle's first opcodes; a safetensors header begins with a brace after eight bytes of length.
    pickled = head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"))
    if path.suffix in _PICKLES or (pickled and head[8:] != b"{"):
        raise CheckpointError(
            f"{path} is a pickle, which longskip never reads: loading one can run any code that it carries",
            cure="where you trust it, load it with torch.load's weights_only=True and write its tensors with "
            "safetensors.torch.save_file; give that file",
        )
