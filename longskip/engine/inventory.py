"""What checkpoints a run has, and whether they are whole: read from their manifests, without a process group."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from longskip.engine import checkpoint
from longskip.engine.config import CheckpointGroup
from longskip.engine.configio import validate
from longskip.errors import CheckpointError, ConfigError, NoCheckpointError
from longskip.profiling.yamlfiles import parse_yaml


def inventory(run: Path) -> dict[str, Any]:
    """The checkpoints of ``run``, oldest first, by manifest and file sizes (``verify_checkpoints`` reads the contents).

    ``{"run", "newest": name or None, "checkpoints": [{"name", "step", "bytes", "world", "zero_stage", "saved", "complete",
    "problem", "kept"}], "leftovers": [{"name", "bytes"}], "keep_last", "keep_every"}``; world and zero_stage are those that
    saved it, None where the manifest cannot be read; ``kept`` is "every" for good (``checkpoint.keep_every``), "last" until
    newer ones are there; ``newest`` is the newest complete one; leftovers are what interrupted saves and bad ones left.
    """
    folder = run / "checkpoints"
    steps = checkpoint.steps_in(folder)
    listed = [_entry(path) for path in steps]
    complete = [entry["name"] for entry in listed if entry["complete"]]
    others = sorted(path for path in folder.glob("step-*") if path not in steps)
    keep = _keeping(run)
    for entry in listed:
        entry["kept"] = "every" if keep.keep_every and entry["step"] % keep.keep_every == 0 else "last"
    return {
        "run": str(run),
        "newest": complete[-1] if complete else None,
        "checkpoints": listed,
        "leftovers": [{"name": path.name, "bytes": _bytes(path)} for path in others],
        "keep_last": keep.keep_last,
        "keep_every": keep.keep_every,
    }


def _keeping(run: Path) -> CheckpointGroup:
    """The run's rule of what to keep, or the default where its configuration cannot be read."""
    try:
        return validate(parse_yaml((run / "config.yaml").read_text("utf-8"), str(run / "config.yaml"))).checkpoint
    except (ConfigError, OSError):
        return CheckpointGroup()


def _entry(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = {}
    problem = None
    try:
        manifest = checkpoint.verify(folder, names=())
        for name, expected in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                raise CheckpointError(f"{name} is missing")
            if path.stat().st_size != expected["bytes"]:
                raise CheckpointError(f"{name} has {path.stat().st_size:,} bytes of {expected['bytes']:,}")
    except (CheckpointError, OSError) as error:
        problem = str(error)
    return {
        "name": folder.name,
        "step": checkpoint.step_of(folder),
        "bytes": _bytes(folder),
        "world": manifest.get("world"),
        "zero_stage": manifest.get("zero_stage"),
        "saved": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(folder.stat().st_mtime)),
        "complete": problem is None,
        "problem": problem,
    }


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def verify_checkpoints(path: Path, which: str | None) -> list[dict[str, Any]]:
    """Read and hash every file of a checkpoint folder, or of a run's checkpoint ``which`` (None: all of them).

    ``[{"name", "files", "bytes", "problem": None or what is wrong}]``. Raises CheckpointError where there is none to verify.
    """
    if (path / "manifest.json").is_file():
        folders = [path]
    else:
        folders = checkpoint.steps_in(path / "checkpoints")
        if which is not None:
            name = f"step-{int(which):08d}" if which.isdigit() else which
            there = ", ".join(folder.name for folder in folders) or "none"
            folders = [folder for folder in folders if folder.name == name]
            if not folders:
                raise NoCheckpointError(f"no checkpoint {which!r} in {path / 'checkpoints'}", cure=f"there: {there}")
        if not folders:
            raise NoCheckpointError(f"{path / 'checkpoints'} holds no checkpoint", cure="train first")
    return [_verdict(folder) for folder in folders]


def _verdict(folder: Path) -> dict[str, Any]:
    try:
        manifest = checkpoint.verify(folder)
    except CheckpointError as error:
        return {"name": folder.name, "files": 0, "bytes": _bytes(folder), "problem": str(error)}
    files = manifest["files"]
    size = sum(entry["bytes"] for entry in files.values())
    return {"name": folder.name, "files": len(files), "bytes": size, "problem": None}
