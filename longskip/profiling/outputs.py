"""Files that commands write: replaced as a whole, in folders that are made on the way, with one error for all of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from longskip.errors import ConfigError

__all__ = ["json_text", "made_folder", "write_bytes", "write_json", "write_text"]


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write ``text`` as UTF-8; see ``write_bytes``."""
    return write_bytes(path, text.encode("utf-8", "replace"))  # a path on the page may hold any bytes


def write_json(path: str | os.PathLike[str], value: object, *, indent: int = 1) -> Path:
    """Write ``json_text`` with a line's end; see ``write_bytes``."""
    return write_text(path, json_text(value, indent=indent) + "\n")


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file, replaced as a whole, and return its path; ConfigError with the reason where it cannot be written.

    What is no file (a pipe, ``/dev/stdout``) is written to as it is.
    """
    target = Path(path)
    try:
        if target.exists() and not target.is_file() and not target.is_dir():
            target.write_bytes(data)
        else:
            _replace(target.resolve() if target.is_symlink() else target, data)
    except OSError as error:
        raise _refused(path, error.strerror or str(error)) from None
    except ValueError as error:  # a path without a name, as "/"
        raise _refused(path, str(error)) from None
    return target


def made_folder(path: str | os.PathLike[str]) -> Path:
    """The folder, made where it is missing; ConfigError where that cannot be."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ConfigError(f"{folder} is a file, and a folder is to be written", cure="name a folder") from None
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"cannot make the folder {folder}: {said}", cure="name a folder of yours") from None
    return folder


def json_text(value: object, *, indent: int | None = None) -> str:
    """JSON as the standard has it: numbers that are not finite are null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _replace(target: Path, data: bytes) -> None:
    if target.is_dir():
        raise IsADirectoryError(0, "it is a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, target)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _refused(path: str | os.PathLike[str], why: str) -> ConfigError:
    return ConfigError(f"cannot write {os.fspath(path)!r}: {why}", cure="name a file in a folder of yours")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
