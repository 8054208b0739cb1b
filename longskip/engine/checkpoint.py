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
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from longskip.engine import faults
from longskip.engine.data.hashes import file_sha256
from longskip.engine.distributed import barrier, broadcast_object, gather_objects
from longskip.engine.durable import Disk
from longskip.engine.jsonfiles import read_object
from longskip.errors import CheckpointError, DiskFullError, NoCheckpointError

if TYPE_CHECKING:
    import torch

    from longskip.engine.shards import Kind, Shards, Slice
    from longskip.models.specs import TextEncoderSpec, UViTSpec
    from longskip.models.system import TextToImage

FORMAT, VERSION = "longskip-checkpoint", 1
FILES: dict[str, tuple[Kind, ...]] = {"weights": ("weight", "ema"), "moments": ("exp_avg", "exp_avg_sq")}
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
_NOT_THE_MODEL = ("pos_init", "out_channels")
_RUN = re.compile(r"([^@]+)@([0-9]{1,18})")
_STEP = re.compile(r"^step-(\d{8})$")


# --- saving -----------------------------------------------------------------------------------------------------------

Pieces = Callable[["Slice", "Kind"], "Iterable[torch.Tensor]"]


def save(
    checkpoints: Path, step: int, shards: Shards, state: dict[str, Any], *, keep_last: int, keep_every: int = 0
) -> Path:
    """Commit a checkpoint of ``step``; every rank calls it at the same step and returns after the commit.

    Raises DiskFullError or CheckpointError on all ranks alike, with the earlier checkpoints intact.
    """
    draft = Draft(checkpoints, step, shards, keep_last, keep_every)
    draft.open()
    draft.in_the_foreground(json.dumps(state, indent=1))
    return draft.final


@dataclass
class Draft:
    """A checkpoint in the making, by the verbs that a save is made of, in their order.

    ``open`` and ``close`` are for all ranks together; they raise DiskFullError or CheckpointError on all of them, the folder
    removed. ``write`` (each rank's own files) and ``commit`` (the first rank's, of all that ranks' ``write`` returned) speak to
    no other rank and may run in a thread; a failure of theirs is a value, to be given to the next verb.
    """

    checkpoints: Path
    step: int
    shards: Shards
    keep_last: int
    keep_every: int = 0
    records: tuple[Path, ...] = ()  # files that must be on the disk before this checkpoint is seen

    def __post_init__(self) -> None:
        self.final = self.checkpoints / f"step-{self.step:08d}"
        self.temporary = self.checkpoints / f"step-{self.step:08d}.tmp"
        self.disk = Disk(self.step)
        # Now and not in the thread: at stage 3 DeepSpeed gathers a parameter that is looked at while a forward pass runs.
        self._model = {
            "model": _specs_of(self.shards.model),
            "tensors": {name: list(shape) for name, _, _, shape in self.shards.model.canonical()},
        }

    def open(self, **told: Any) -> list[dict[str, Any]]:
        """Make room for it; returns what each rank ``told``, in their order."""
        faults.point("save.begin", step=self.step)
        rooms: list[Any] = gather_objects(attempt(lambda: self._room() | told))
        failed = [room for room in rooms if "error" in room] or _without_room(self.checkpoints, rooms)
        if failed:
            raise self._failed(_first_of(failed))
        return rooms

    def write(self, pieces: Pieces) -> dict[str, Any]:
        """This rank's files, of what ``pieces`` gives for its slices."""
        return attempt(lambda: {"files": self._write(pieces)})

    def commit(self, state: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """The one rename that makes it a checkpoint, and the removal of old ones; ``state``: the text of state.json.

        ``{"committed": when by this process's monotonic clock}``, or the failure of one of ``parts``.
        """
        if failed := [part for part in parts if "error" in part]:
            return _first_of(failed)
        files = {name: entry for part in parts for name, entry in part["files"].items()}
        return attempt(lambda: self._commit(state, files))

    def in_the_foreground(self, state: str) -> None:
        """``write``, ``commit`` and ``close`` on all ranks together, of what lies in the run's own memory."""
        parts: list[Any] = gather_objects(self.write(partial(live, self.shards)))
        self.close(self.commit(state, parts) if self.shards.rank == 0 else None)

    def close(self, committed: dict[str, Any] | None) -> dict[str, Any]:
        """What ``commit`` returned on the first rank, which gives it; all ranks learn whether it was committed."""
        agreed: Any = broadcast_object(committed)
        if "error" in agreed:
            raise self._failed(agreed)
        faults.point("save.done", step=self.step)
        return agreed  # type: ignore[no-any-return]

    def _failed(self, failure: dict[str, Any]) -> CheckpointError:
        if self.shards.rank == 0:
            shutil.rmtree(self.temporary, ignore_errors=True)
        barrier()
        kind = DiskFullError if failure["disk_full"] else CheckpointError
        what = f"checkpoint of step {self.step} was not written: {failure['error']}"
        error = kind(what, cure=f"free space for {self.final}")
        error.alike = True
        return error

    def _room(self) -> dict[str, Any]:
        """What this rank will write, in bytes of fp32; rank 0 makes the folder anew and sees what is free there."""
        shards = self.shards
        room = {"needed": 4 * sum(item.numel for item in shards.owned()) * sum(map(len, FILES.values()))}
        if shards.rank == 0:
            shutil.rmtree(self.temporary, ignore_errors=True)
            self.temporary.mkdir(parents=True)
            room["free"] = shutil.disk_usage(self.temporary).free
        return room

    def _write(self, pieces: Pieces) -> dict[str, dict[str, Any]]:
        import torch

        from longskip.engine.tensorfiles import Entry, write_tensors

        sealed, owned = {}, self.shards.owned()
        for stem, kinds in FILES.items():
            name = f"{stem}-{self.shards.rank:05d}.safetensors"
            entries = [
                Entry(f"{kind}/{item.name}@{item.offset}", (item.numel,), torch.float32, partial(pieces, item, kind))
                for item in owned
                for kind in kinds
            ]
            sealed[name] = self.disk.write(self.temporary / name, partial(write_tensors, entries=entries, metadata={}))
            if stem == "weights":
                faults.point("save.shard_half", step=self.step)
        faults.point("save.shard_written", step=self.step)
        return sealed

    def _commit(self, state: str, files: dict[str, dict[str, Any]]) -> dict[str, Any]:
        disk, temporary = self.disk, self.temporary
        with contextlib.suppress(OSError):  # a record that cannot be written has been complained of
            for record in self.records:
                disk.sync(record)
        files = files | {"state.json": disk.write_text(temporary / "state.json", state)}
        faults.point("save.before_manifest", step=self.step)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "world": self.shards.world,
            "zero_stage": self.shards.stage,
            **self._model,
            "files": files,
        }
        manifest["sha256"] = _own_sha256(manifest)
        disk.write_text(temporary / "manifest.json", json.dumps(manifest, indent=1))
        disk.sync(temporary)
        faults.point("save.before_rename", step=self.step)
        disk.remove(self.final)  # of this step, from before a rollback
        disk.rename(temporary, self.final)
        disk.sync(self.checkpoints)
        committed = time.monotonic()
        with contextlib.suppress(OSError):  # it is committed, whatever becomes of these; the next commit tries again
            faults.point("save.before_latest", step=self.step)
            (self.checkpoints / ".latest.tmp").unlink(missing_ok=True)
            disk.write_text(self.checkpoints / ".latest.tmp", json.dumps(self.final.name))
            disk.rename(self.checkpoints / ".latest.tmp", self.checkpoints / "latest")
            _prune(self.checkpoints, self.keep_last, self.final, self.keep_every, disk)
        return {"committed": committed}


def _first_of(failed: list[dict[str, Any]]) -> dict[str, Any]:
    return failed[0] | {"disk_full": any(part["disk_full"] for part in failed)}


def attempt(act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """``act``'s result, or its failure as a value that can be sent to the other ranks."""
    try:
        return act()
    except (OSError, CheckpointError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or isinstance(error, DiskFullError)
        return {"error": str(error), "disk_full": full}


def _without_room(checkpoints: Path, rooms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A failure where what all ranks write, to the one file system that they share, does not fit; else nothing."""
    needed, free = sum(room["needed"] for room in rooms), rooms[0]["free"]
    if free >= needed * 1.02 + (1 << 20):
        return []
    text = f"{checkpoints} needs {needed:,} bytes for {len(rooms)} rank(s), {free:,} are free"
    return [{"error": text, "disk_full": True}]


def live(shards: Shards, item: Slice, kind: Kind) -> Iterator[torch.Tensor]:
    """The slice in host memory, a piece at a time and without a copy where it lies there already."""
    from longskip.engine.tensorfiles import PIECE

    return (piece.cpu() for piece in shards.tensor(item, kind).split(PIECE))


def specs_of(backbone: UViTSpec, text: TextEncoderSpec | None) -> dict[str, Any]:
    """What a model is beyond its tensors' shapes, as JSON: the fields of both specs, None for a text encoder not there."""
    specs = {"backbone": asdict(backbone), "text": text and asdict(text)}
    # pos_init says how values begin; out_channels may be written out or left to channels, and is a shape.
    kept = {part: spec and {k: v for k, v in spec.items() if k not in _NOT_THE_MODEL} for part, spec in specs.items()}
    return json.loads(json.dumps(kept))  # type: ignore[no-any-return]


def _specs_of(model: TextToImage) -> dict[str, Any]:
    return specs_of(model.backbone.spec, model.text.spec if model.text is not None else None)


def _prune(checkpoints: Path, keep_last: int, committed: Path, keep_every: int = 0, disk: Disk | None = None) -> None:
    """Keep the ``keep_last`` newest up to the one just committed, and every ``keep_every``-th step's.

    Whatever lies past the committed one is none of ours to judge.
    """
    disk = disk or Disk(step_of(committed))
    for path in [p for p in steps_in(checkpoints) if p.name <= committed.name][:-keep_last]:
        if not keep_every or step_of(path) % keep_every:
            disk.remove(path)


def sweep(checkpoints: Path, patterns: tuple[str, ...] = ("step-*.old", "step-*.tmp")) -> None:
    """Remove what interrupted saves and prunings left behind; for the run's owner only."""
    for pattern in patterns:
        for leftover in checkpoints.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


# --- finding and verifying --------------------------------------------------------------------------------------------


def steps_in(checkpoints: Path) -> list[Path]:
    """Committed checkpoint folders, oldest first."""
    return sorted(path for path in checkpoints.glob("step-*") if _STEP.match(path.name) and path.is_dir())


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder, its form checked; raises CheckpointError."""
    try:
        manifest = read_object(folder / "manifest.json", CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: no readable manifest.json, it is not a {FORMAT} ({error.message})") from None
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: manifest.json is not a {FORMAT}")
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"{folder}: version {str(manifest.get('version'))[:80]}, this longskip reads {VERSION}")
    files, tensors = manifest.get("files"), manifest.get("tensors")
    if not isinstance(files, dict) or not isinstance(tensors, dict) or not files or not tensors:
        raise CheckpointError(f"{folder}: manifest.json lists no files or no tensors")
    for name, entry in files.items():
        if not _NAME.match(name):
            raise CheckpointError(f"{folder}: manifest.json names {name!r}, which is not a file of this folder")
        known = isinstance(entry, dict) and _is_count(entry.get("bytes")) and isinstance(entry.get("sha256"), str)
        if not known:
            raise CheckpointError(f"{folder}: manifest.json gives no size and SHA-256 of {name}")
    world, stage = manifest.get("world"), manifest.get("zero_stage")
    if not _is_count(world) or not 1 <= world <= 1 << 20:
        raise CheckpointError(f"{folder}: manifest.json names no number of ranks")
    if not _is_count(stage) or stage > 3 or not _is_count(manifest.get("step")):
        raise CheckpointError(f"{folder}: manifest.json names no step or no ZeRO stage")
    expected = {"state.json", *(f"{stem}-{rank:05d}.safetensors" for stem in FILES for rank in range(world))}
    if set(files) != expected:
        raise CheckpointError(f"{folder}: manifest.json lists other files than {world} rank(s) write")
    specs = manifest.get("model", {})
    if not isinstance(specs, dict) or not all(
        part in ("backbone", "text") and isinstance(spec, dict | None) for part, spec in specs.items()
    ):
        raise CheckpointError(f"{folder}: manifest.json says something else of the model than its specs")
    _check_shapes(folder, manifest)
    return manifest


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 1 << 63


def _check_shapes(folder: Path, manifest: dict[str, Any]) -> None:
    """What is read is first asked memory for: no more than the files hold."""
    elements = 0
    for name, shape in manifest["tensors"].items():
        if not isinstance(shape, list) or len(shape) > 8 or not all(map(_is_count, shape)):
            raise CheckpointError(f"{folder}: manifest.json gives {name[:80]!r} the shape {str(shape)[:80]}")
        elements += math.prod(shape)
    for stem, kinds in FILES.items():
        held = sum(entry["bytes"] for name, entry in manifest["files"].items() if name.startswith(f"{stem}-"))
        if 4 * elements * len(kinds) > held:
            raise CheckpointError(f"{folder}: manifest.json names {elements:,} elements, {stem} holds {held:,} bytes")


def verify(folder: Path, names: Iterable[str] | None = None) -> dict[str, Any]:
    """Check presence, size and SHA-256 of the manifest's files (or of ``names``); raises CheckpointError naming one."""
    manifest = read_manifest(folder)
    if manifest.get("sha256", own := _own_sha256(manifest)) != own:  # those from before it was written have none
        raise CheckpointError(f"{folder / 'manifest.json'} was altered: its SHA-256 is not the one that it names")
    try:
        strangers = {path.name for path in folder.iterdir()} - set(manifest["files"]) - {"manifest.json"}
        if strangers:
            raise CheckpointError(f"{folder} holds {sorted(strangers)[0]}, which its manifest does not know")
        _verify_files(folder, manifest, manifest["files"] if names is None else names)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from None
    return manifest


def _own_sha256(manifest: dict[str, Any]) -> str:
    """Of all that a manifest says, in whatever form, but this: it lists every file's hash except its own."""
    said = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _verify_files(folder: Path, manifest: dict[str, Any], names: Iterable[str]) -> None:
    for name in names:
        expected, path = manifest["files"][name], folder / name
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes, the manifest says {expected['bytes']:,}")
        if file_sha256(path) != expected["sha256"]:
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
            kind = CheckpointError if complaints else NoCheckpointError
            raise kind(
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
        raise NoCheckpointError(f"no checkpoint {which!r} in {checkpoints}", cure=f"there: {there}")
    verify(path)
    return path


def read_state(folder: Path) -> dict[str, Any]:
    """The counters and the place in the data that a checkpoint was saved with; raises CheckpointError."""
    return read_object(folder / "state.json", CheckpointError)


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
        from longskip.engine.tensorfiles import TensorFile

        self.folder = folder
        self.manifest = read_manifest(folder)
        self._files: dict[Path, Any] = {}
        self._runs: dict[str, list[_Run]] = {}
        for name in self.manifest["files"]:
            if not name.endswith(".safetensors"):
                continue
            path = folder / name
            file = TensorFile(path)
            self._files[path] = file
            for key, shape in file.shapes.items():
                run = _RUN.fullmatch(key)
                if run is None or len(shape) != 1:
                    raise CheckpointError(f"{path} holds {key[:80]!r}, which is no run of a tensor")
                self._runs.setdefault(run[1], []).append(_Run(path, key, int(run[2]), shape[0]))
        for tensor, runs in self._runs.items():
            runs.sort(key=lambda run: run.offset)
            if any(before.offset + before.numel > after.offset for before, after in pairwise(runs)):
                raise CheckpointError(f"{folder} holds elements of {tensor} twice")
            shape = self.manifest["tensors"].get(tensor.partition("/")[2])
            if shape is None or runs[-1].offset + runs[-1].numel > math.prod(shape):
                raise CheckpointError(f"{folder} holds elements of {tensor} that its manifest does not know")

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
                yield low - offset, self._files[run.file].read(run.key, low - run.offset, high - low)
                covered += high - low
        if covered != numel:
            raise CheckpointError(f"{self.folder}: {kind} of {name} lacks {numel - covered:,} of {numel:,} elements")

    def full(self, kind: Kind) -> dict[str, torch.Tensor]:
        """Every tensor of ``kind``, whole, fp32, by canonical name."""
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
