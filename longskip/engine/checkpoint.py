"""Checkpoints: each rank's slices as safetensors under a manifest of hashes, committed by one rename.

A folder ``checkpoints/step-00001000`` holds ``weights-RANK.safetensors`` (fp32 weights and EMA),
``moments-RANK.safetensors`` (Adam's two moments), ``state.json`` (counters, data cursor) and ``manifest.json`` (format, the
model's specs, every tensor's full shape, every file's bytes and SHA-256). A key is ``KIND/NAME@OFFSET``: a 1-D run of the
flattened tensor NAME, so that loading re-slices for any number of ranks, any ZeRO stage and any layout. Nothing is ever
unpickled.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longskip.engine import faults
from longskip.engine.data.hashes import stream_sha256
from longskip.engine.distributed import barrier, broadcast_object, gather_objects
from longskip.errors import CheckpointError, DiskFullError

if TYPE_CHECKING:
    import torch

    from longskip.engine.shards import Kind, Shards, Slice
    from longskip.models.specs import TextEncoderSpec, UViTSpec
    from longskip.models.system import TextToImage

FORMAT, VERSION = "longskip-checkpoint", 1
FILES: dict[str, tuple[Kind, ...]] = {"weights": ("weight", "ema"), "moments": ("exp_avg", "exp_avg_sq")}
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
_NOT_THE_MODEL = ("pos_init", "out_channels")
_STEP = re.compile(r"^step-(\d{8})$")


# --- saving -----------------------------------------------------------------------------------------------------------


def save(checkpoints: Path, step: int, shards: Shards, state: dict[str, Any], *, keep_last: int) -> Path:
    """Commit a checkpoint of ``step``; every rank calls it at the same step and returns after the commit.

    Raises DiskFullError or CheckpointError on all ranks alike, with the earlier checkpoints intact.
    """
    final, temporary = checkpoints / f"step-{step:08d}", checkpoints / f"step-{step:08d}.tmp"
    faults.point("save.begin", step=step)
    rooms: list[Any] = gather_objects(_attempt(lambda: _make_room(temporary, shards)))
    failed = [room for room in rooms if "error" in room] or _without_room(checkpoints, rooms)
    if not failed:
        parts: list[Any] = gather_objects(_attempt(lambda: {"files": _write_rank(temporary, step, shards)}))
        failed = [part for part in parts if "error" in part]
    if not failed:
        files = {name: entry for part in parts for name, entry in part["files"].items()}

        def commit() -> dict[str, Any]:
            _commit(temporary, final, step, shards, state, files)
            _prune(checkpoints, keep_last, final)
            return {}

        committed: Any = broadcast_object(_attempt(commit) if shards.rank == 0 else None)
        failed = [committed] if "error" in committed else []
    if failed:
        if shards.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        barrier()
        kind = DiskFullError if any(part["disk_full"] for part in failed) else CheckpointError
        error = kind(f"checkpoint of step {step} was not written: {failed[0]['error']}", cure=f"free space for {final}")
        error.alike = True
        raise error
    faults.point("save.done", step=step)
    return final


def _attempt(act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """``act``'s result, or its failure as a value that can be sent to the other ranks."""
    try:
        return act()
    except (OSError, CheckpointError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or isinstance(error, DiskFullError)
        return {"error": str(error), "disk_full": full}


def _make_room(folder: Path, shards: Shards) -> dict[str, Any]:
    """What this rank will write, in bytes of fp32; rank 0 makes the folder anew and sees what is free there."""
    room = {"needed": 4 * sum(item.numel for item in shards.owned()) * sum(map(len, FILES.values()))}
    if shards.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        room["free"] = shutil.disk_usage(folder).free
    return room


def _without_room(checkpoints: Path, rooms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A failure where what all ranks write, to the one file system that they share, does not fit; else nothing."""
    needed, free = sum(room["needed"] for room in rooms), rooms[0]["free"]
    if free >= needed * 1.02 + (1 << 20):
        return []
    text = f"{checkpoints} needs {needed:,} bytes for {len(rooms)} rank(s), {free:,} are free"
    return [{"error": text, "disk_full": True}]


def _write_rank(folder: Path, step: int, shards: Shards) -> dict[str, dict[str, Any]]:
    import torch

    from longskip.engine.tensorfiles import Entry, write_file

    entries, owned = {}, shards.owned()
    for stem, kinds in FILES.items():
        path = folder / f"{stem}-{shards.rank:05d}.safetensors"
        tensors = [
            Entry(
                f"{kind}/{item.name}@{item.offset}", (item.numel,), torch.float32, partial(_pieces, shards, item, kind)
            )
            for item in owned
            for kind in kinds
        ]
        write_file(path, tensors, {})
        entries[path.name] = _seal(path)
        if stem == "weights":
            faults.point("save.shard_half", step=step)
    faults.point("save.shard_written", step=step)
    return entries


def _pieces(shards: Shards, item: Slice, kind: Kind) -> Iterator[torch.Tensor]:
    """The slice in host memory, a piece at a time and without a copy where it lies there already."""
    from longskip.engine.tensorfiles import PIECE

    return (piece.cpu() for piece in shards.tensor(item, kind).split(PIECE))


def _commit(
    temporary: Path, final: Path, step: int, shards: Shards, state: dict[str, Any], files: dict[str, dict[str, Any]]
) -> None:
    _write_json(temporary / "state.json", state)
    files["state.json"] = _seal(temporary / "state.json")
    faults.point("save.before_manifest", step=step)
    shapes = {name: list(shape) for name, _, _, shape in shards.model.canonical()}
    _write_json(
        temporary / "manifest.json",
        {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "world": shards.world,
            "zero_stage": shards.stage,
            "model": _specs_of(shards.model),
            "tensors": shapes,
            "files": files,
        },
    )
    _sync_folder(temporary)
    faults.point("save.before_rename", step=step)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(temporary, final)
    _sync_folder(final.parent)
    faults.point("save.before_latest", step=step)
    _write_json(final.parent / ".latest.tmp", final.name)
    os.replace(final.parent / ".latest.tmp", final.parent / "latest")


def specs_of(backbone: UViTSpec, text: TextEncoderSpec | None) -> dict[str, Any]:
    """What a model is beyond its tensors' shapes, as JSON: the fields of both specs, None for a text encoder not there."""
    specs = {"backbone": asdict(backbone), "text": text and asdict(text)}
    # pos_init says how values begin; out_channels may be written out or left to channels, and is a shape.
    kept = {part: spec and {k: v for k, v in spec.items() if k not in _NOT_THE_MODEL} for part, spec in specs.items()}
    return json.loads(json.dumps(kept))  # type: ignore[no-any-return]


def _specs_of(model: TextToImage) -> dict[str, Any]:
    return specs_of(model.backbone.spec, model.text.spec if model.text is not None else None)


def _prune(checkpoints: Path, keep_last: int, committed: Path) -> None:
    """Keep the ``keep_last`` newest up to the one just committed; whatever lies past it is none of ours to judge."""
    for path in [p for p in steps_in(checkpoints) if p.name <= committed.name][:-keep_last]:
        # Renamed first, so that a crash half-way through the deletion leaves no folder that looks like a checkpoint.
        doomed = path.with_name(f"{path.name}.old")
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    sweep(checkpoints, ("step-*.old",))


def sweep(checkpoints: Path, patterns: tuple[str, ...] = ("step-*.old", "step-*.tmp")) -> None:
    """Remove what interrupted saves and prunings left behind; for the run's owner only."""
    for pattern in patterns:
        for leftover in checkpoints.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def _seal(path: Path) -> dict[str, Any]:
    """fsync ``path`` and return its size and SHA-256."""
    with open(path, "rb") as file:
        digest = stream_sha256(file)
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": digest}


def _write_json(path: Path, value: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- finding and verifying --------------------------------------------------------------------------------------------


def steps_in(checkpoints: Path) -> list[Path]:
    """Committed checkpoint folders, oldest first."""
    return sorted(path for path in checkpoints.glob("step-*") if _STEP.match(path.name) and path.is_dir())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder, its form checked; raises CheckpointError."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: no readable manifest.json ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: manifest.json is not a {FORMAT}")
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"{folder}: version {manifest.get('version')!r}, this longskip reads {VERSION}")
    files, tensors = manifest.get("files"), manifest.get("tensors")
    if not isinstance(files, dict) or not isinstance(tensors, dict) or not files or not tensors:
        raise CheckpointError(f"{folder}: manifest.json lists no files or no tensors")
    for name, entry in files.items():
        if not _NAME.match(name):
            raise CheckpointError(f"{folder}: manifest.json names {name!r}, which is not a file of this folder")
        known = isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
        if not known:
            raise CheckpointError(f"{folder}: manifest.json gives no size and SHA-256 of {name}")
    world = manifest.get("world")
    if not isinstance(world, int) or not 1 <= world <= 1 << 20:
        raise CheckpointError(f"{folder}: manifest.json names no number of ranks")
    expected = {"state.json", *(f"{stem}-{rank:05d}.safetensors" for stem in FILES for rank in range(world))}
    if set(files) != expected:
        raise CheckpointError(f"{folder}: manifest.json lists other files than {world} rank(s) write")
    return manifest


def verify(folder: Path, names: Iterable[str] | None = None) -> dict[str, Any]:
    """Check presence, size and SHA-256 of the manifest's files (or of ``names``); raises CheckpointError naming one."""
    manifest = read_manifest(folder)
    strangers = {path.name for path in folder.iterdir()} - set(manifest["files"]) - {"manifest.json"}
    if strangers:
        raise CheckpointError(f"{folder} holds {sorted(strangers)[0]}, which its manifest does not know")
    try:
        _verify_files(folder, manifest, manifest["files"] if names is None else names)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from None
    return manifest


def _verify_files(folder: Path, manifest: dict[str, Any], names: Iterable[str]) -> None:
    for name in names:
        expected, path = manifest["files"][name], folder / name
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes, the manifest says {expected['bytes']:,}")
        if _seal(path)["sha256"] != expected["sha256"]:
            raise CheckpointError(f"{path} was altered: its SHA-256 is not the manifest's")


def newest(checkpoints: Path, *, mark_bad: bool = False) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies and what was wrong with newer ones (renamed ``.bad`` with ``mark_bad``)."""
    complaints = []
    for folder in reversed(steps_in(checkpoints)):
        try:
            verify(folder)
        except CheckpointError as error:
            complaints.append(str(error))
            if mark_bad:
                _mark_bad(folder)
            continue
        return folder, complaints
    return None, complaints


def _mark_bad(folder: Path) -> None:
    """Rename to ``.bad`` (``.bad2`` … where that is taken)."""
    for ending in ("bad", *(f"bad{n}" for n in range(2, 100))):
        target = folder.with_name(f"{folder.name}.{ending}")
        if not target.exists():
            with contextlib.suppress(OSError):
                os.rename(folder, target)
            return


def newest_for_all(checkpoints: Path, rank: int) -> tuple[Path | None, list[str]]:
    """``newest`` as rank 0 finds it, on every rank (one file system, one verdict)."""
    found: Any = None
    if rank == 0:
        path, wrong = newest(checkpoints, mark_bad=True)
        found = [path.name if path else None, wrong]
    agreed: Any = broadcast_object(found)
    name, complaints = agreed
    return (checkpoints / name if name else None), complaints


def choose(checkpoints: Path, which: str | None) -> Path:
    """A checkpoint by ``step-N``, a step's number or ``None`` for the newest; verified."""
    if which is None:
        path, complaints = newest(checkpoints)
        if path is None:
            raise CheckpointError(
                f"{checkpoints} holds no complete checkpoint" + "".join(f"; {c}" for c in complaints),
                cure="bring the damaged files back from a copy; longskip checkpoint verify names them"
                if complaints
                else "train first: a checkpoint is committed every checkpoint.every steps",
            )
        return path
    name = f"step-{int(which):08d}" if which.isdigit() else which
    path = checkpoints / name
    if not _STEP.match(name) or not path.is_dir():
        there = ", ".join(p.name for p in steps_in(checkpoints)) or "none"
        raise CheckpointError(f"no checkpoint {which!r} in {checkpoints}", cure=f"there: {there}")
    verify(path)
    return path


def read_state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / "state.json").read_text("utf-8"))
    return state


# --- loading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """A saved run of elements: where it stands and what it covers."""

    file: Path
    key: str
    offset: int
    numel: int


class Archive:
    """The tensors of a checkpoint folder, readable in any slices. Close it, or use it as a context manager."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.folder = folder
        self.manifest = read_manifest(folder)
        self._files: dict[Path, Any] = {}
        self._runs: dict[str, list[_Run]] = {}
        for name in self.manifest["files"]:
            if not name.endswith(".safetensors"):
                continue
            path = folder / name
            file = safe_open(path, framework="pt")
            self._files[path] = file
            for key in file.keys():  # noqa: SIM118 - a safetensors handle, not a mapping
                tensor, _, offset = key.rpartition("@")
                (numel,) = file.get_slice(key).get_shape()
                self._runs.setdefault(tensor, []).append(_Run(path, key, int(offset), numel))

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()

    def check_model(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError unless the saved tensors are exactly ``shapes``."""
        saved = {name: tuple(shape) for name, shape in self.manifest["tensors"].items()}
        wrong = sorted(n for n in saved.keys() | shapes.keys() if saved.get(n) != tuple(shapes.get(n, ())))
        if wrong:
            first = wrong[0]
            raise CheckpointError(
                f"{self.folder} is of another model: {len(wrong)} tensors differ, first {first} "
                f"(saved {saved.get(first)}, model {shapes.get(first)})",
                cure="use the configuration that the run was made with",
            )

    def check_specs(self, specs: dict[str, Any]) -> None:
        """Raise CheckpointError naming the fields unless the model was saved with ``specs`` (``specs_of``).

        Shapes do not tell everything: another number of heads has the same. Checkpoints and fields from before specs
        were saved are not compared.
        """
        differing = []
        for part, saved in self.manifest.get("model", {}).items():
            ours = specs[part]
            if saved is None or ours is None:
                continue  # the tensors differ
            differing += [
                f"{part} {name} {saved[name]!r} saved, {ours[name]!r} now"
                for name in ours
                if name in saved and saved[name] != ours[name]
            ]
        if differing:
            raise CheckpointError(
                f"{self.folder} is of another model: {'; '.join(differing)}",
                cure="use the configuration that the run was made with",
            )

    def read(self, kind: Kind, name: str, offset: int, numel: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Pieces ``(position within the request, values)`` that cover ``numel`` elements from ``offset`` on."""
        covered = 0
        for run in self._runs.get(f"{kind}/{name}", []):
            low, high = max(run.offset, offset), min(run.offset + run.numel, offset + numel)
            if low < high:
                yield low - offset, self._files[run.file].get_slice(run.key)[low - run.offset : high - run.offset]
                covered += high - low
        if covered != numel:
            raise CheckpointError(f"{self.folder}: {kind} of {name} lacks {numel - covered:,} of {numel:,} elements")

    def full(self, kind: Kind) -> dict[str, torch.Tensor]:
        """Every tensor of ``kind``, whole, fp32, by canonical name."""
        import math

        import torch

        tensors = {}
        for name, shape in self.manifest["tensors"].items():
            flat = torch.empty(math.prod(shape), dtype=torch.float32)
            for position, values in self.read(kind, name, 0, flat.numel()):
                flat[position : position + values.numel()] = values
            tensors[name] = flat.view(shape)
        return tensors


def load(folder: Path, shards: Shards) -> dict[str, Any]:
    """Fill this rank's slices from ``folder`` (saved by any ranks, stage, layout) and return the saved state."""
    from longskip.engine.shards import KINDS

    with Archive(folder) as archive:
        archive.check_model({name: tuple(shape) for name, _, _, shape in shards.model.canonical()})
        archive.check_specs(_specs_of(shards.model))
        for item in shards.slices:
            for kind in KINDS:
                target = shards.tensor(item, kind)
                for position, values in archive.read(kind, item.name, item.offset, item.numel):
                    target[position : position + values.numel()].copy_(values)
    shards.publish()
    return read_state(folder)
