"""What was measured on a device: the fastest backend per op and shape, the best configuration per kernel and shape.

One JSON file per device: in the package for the devices measured so far (``kernels/tuned/``), in the user's cache folder
for what ``longskip bench kernels --save`` adds; an entry of the user's goes before the package's.

    {"device": "NVIDIA H200", "versions": {...}, "measured": "2026-…",
     "backends": {op: {bucket: {"backend": name, "milliseconds": {name: ...}}}},
     "configurations": {kernel: {bucket: {...constants...}}}}

A bucket is a dtype and the sizes of a call: those that decide how a kernel is laid out (widths, head dims, flags) as they
are, the others (tokens, rows, batch) rounded up to a power of two.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from longskip.errors import BackendError
from longskip.kernels.jit import next_power_of_2, target_of

PACKAGE_FOLDER = Path(__file__).parent / "tuned"
_FORCED: dict[str, Mapping[str, Any]] = {}
_CHOSEN: dict[str, Mapping[str, Mapping[str, Any]]] = {}
_ASKED: list[tuple[str, str]] | None = None
_ROUNDED = frozenset({"batch", "tokens", "rows", "queries", "keys", "q_rows", "k_rows", "values", "tensors"})


def bucket(dtype: torch.dtype, sizes: Mapping[str, int]) -> str:
    """The name of the bucket: ``"bfloat16 queries=512 keys=512 head_dim=64"``."""
    parts = [str(dtype).removeprefix("torch.")]
    for name, size in sizes.items():
        if name != "itemsize":
            parts.append(f"{name}={next_power_of_2(int(size)) if name in _ROUNDED else int(size)}")
    return " ".join(parts)


def best_backend(device: torch.device, op: str, where: str) -> tuple[str, str] | None:
    """(backend, reason) measured fastest for the op in bucket ``where``; None where nothing was measured."""
    table = of_device(target_of(device).name)
    found = table.get("backends", {}).get(op, {}).get(where)
    if found is None:
        return None
    times = found.get("milliseconds", {})
    shown = ", ".join(f"{name} {ms:.3g} ms" for name, ms in sorted(times.items(), key=lambda item: item[1]))
    return found["backend"], f"auto: the fastest measured on {table['device']} for {where}" + (shown and f" ({shown})")


def best_configuration(device: torch.device, kernel: str, where: str) -> dict[str, Any] | None:
    """The constants measured best for a kernel in bucket ``where``; None where nothing was measured."""
    if _ASKED is not None:
        _ASKED.append((kernel, where))
    if kernel in _FORCED:
        return dict(_FORCED[kernel])
    if where in _CHOSEN.get(kernel, {}):
        return dict(_CHOSEN[kernel][where])
    return of_device(target_of(device).name).get("configurations", {}).get(kernel, {}).get(where)


@contextlib.contextmanager
def forced(configurations: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Inside, these kernels take these constants: for tuning, and for tests of every choice."""
    before = dict(_FORCED)
    _FORCED.update(configurations)
    try:
        yield
    finally:
        _FORCED.clear()
        _FORCED.update(before)


@contextlib.contextmanager
def chosen(configurations: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[None]:
    """Inside, ``{kernel: {bucket: constants}}`` goes before the tables: what a tuning run has just found."""
    before = dict(_CHOSEN)
    _CHOSEN.update(configurations)
    try:
        yield
    finally:
        _CHOSEN.clear()
        _CHOSEN.update(before)


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[str, str]]]:
    """Inside, the list that is handed out takes every (kernel, bucket) that a configuration is asked for."""
    global _ASKED
    before, _ASKED = _ASKED, []
    try:
        yield _ASKED
    finally:
        _ASKED = before


@functools.cache
def of_device(name: str) -> dict[str, Any]:
    """The package's table of the device with the user's entries over it; empty where nothing was measured."""
    merged: dict[str, Any] = {}
    for folder in (PACKAGE_FOLDER, user_folder()):
        path = folder / file_name(name)
        if path.is_file():
            _merge(merged, read(path))
    return merged


def user_folder() -> Path:
    """Where the user's own measurements lie: ``$XDG_CACHE_HOME/longskip/kernels``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longskip" / "kernels"


def file_name(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def read(path: Path) -> dict[str, Any]:
    """One table; BackendError when the file is none."""
    try:
        table = json.loads(path.read_text())
    except ValueError as error:
        raise BackendError(
            f"{path} is no table of measurements: {error}", cure="delete it and measure again"
        ) from error
    if not isinstance(table, dict) or "device" not in table:
        raise BackendError(
            f"{path} is no table of measurements: it names no device", cure="delete it and measure again"
        )
    return table


def save(table: Mapping[str, Any], folder: Path) -> Path:
    """Add a table's entries to the device's file in ``folder``; the file's path."""
    path = folder / file_name(table["device"])
    merged = read(path) if path.is_file() else {}
    _merge(merged, table)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(merged, indent=1, sort_keys=True) + "\n")
    os.replace(temporary, path)
    of_device.cache_clear()
    return path


def _merge(into: dict[str, Any], table: Mapping[str, Any]) -> None:
    for name, value in table.items():
        if name in ("backends", "configurations"):
            for key, entries in value.items():
                into.setdefault(name, {}).setdefault(key, {}).update(entries)
        else:
            into[name] = value
