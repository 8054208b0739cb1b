"""A checkpoint as files that others read: ``model.safetensors`` with metadata, the diffusers layout, original U-ViT names.

One process, no DeepSpeed, no process group; tensors pass through memory piece by piece.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from longskip import __version__
from longskip.engine import checkpoint
from longskip.engine.config import Config
from longskip.engine.configio import validate
from longskip.engine.data.tokens import Vocabulary
from longskip.engine.initial import KINDS, spec_of_metadata
from longskip.engine.tensorfiles import DTYPES, PIECE, SHARD_BYTES, Entry, TensorFile, write_file, write_files
from longskip.engine.vocabulary import words_of
from longskip.errors import ConfigError
from longskip.models import convert
from longskip.models.specs import UViTSpec
from longskip.profiling.yamlfiles import parse_yaml

FORMATS = ("safetensors", "diffusers")


@dataclass(frozen=True)
class Model:
    """A checkpoint opened for export: what its tensors are called, how they are read, what they belong to."""

    config: Config
    vocabulary: Vocabulary | None
    archive: checkpoint.Archive
    weights: str
    dtype: str
    about: dict[str, str]

    def entries(self, prefix: str, keep: bool = False) -> list[Entry]:
        """The tensors below ``prefix``, without it in their names unless ``keep``."""
        return [
            Entry(
                name if keep else name.removeprefix(prefix), tuple(shape), DTYPES[self.dtype], self._pieces(name, shape)
            )
            for name, shape in self.archive.manifest["tensors"].items()
            if name.startswith(prefix)
        ]

    def _pieces(self, name: str, shape: list[int]) -> Callable[[], Iterator[torch.Tensor]]:
        def pieces() -> Iterator[torch.Tensor]:
            total = math.prod(shape)
            for offset in range(0, total, PIECE):
                values = torch.empty(min(PIECE, total - offset))
                for position, part in self.archive.read(KINDS[self.weights], name, offset, values.numel()):
                    values[position : position + part.numel()] = part
                yield values

        return pieces


def export(
    run: Path,
    out: Path,
    *,
    which: str | None = None,
    weights: str = "ema",
    layout: str = "safetensors",
    dtype: str = "fp32",
    limit: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write checkpoint ``which`` (``step-N``, N, None for the newest) of ``run`` to the new folder ``out``.

    ``layout`` safetensors: ``model.safetensors`` (canonical names, metadata; parts of at most ``limit`` bytes with an index
    above that), ``config.yaml`` and ``vocabulary.json``; diffusers: see ``diffusers_layout``. Returns what was written.
    Raises ConfigError for an unknown choice or an ``out`` that is there already, CheckpointError for a damaged checkpoint
    or values that ``dtype`` cannot hold, DiskFullError.
    """
    from longskip.engine import diffusers_layout

    for name, value, known in (("weights", weights, KINDS), ("format", layout, FORMATS), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise ConfigError(f"{name} {value!r}", cure=f"one of {', '.join(known)}")
    config = validate(parse_yaml((run / "config.yaml").read_text("utf-8"), str(run / "config.yaml")))
    if layout == "diffusers":
        diffusers_layout.check(config)
    folder = checkpoint.choose(run / "checkpoints", which)
    with checkpoint.Archive(folder) as archive, new_folder(out) as temporary:
        model = _model(run, config, archive, weights, dtype)
        if layout == "diffusers":
            diffusers_layout.write(temporary, model, limit)
        else:
            metadata = {"format": "pt"} | model.about
            write_files(temporary, "model", model.entries("", keep=True), metadata, limit)
            if model.vocabulary is not None:
                shutil.copyfile(run / "vocabulary.json", temporary / "vocabulary.json")
        shutil.copyfile(run / "config.yaml", temporary / "config.yaml")
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {
        "out": str(out),
        "format": layout,
        "checkpoint": folder.name,
        "weights": weights,
        "dtype": dtype,
        "tensors": len(archive.manifest["tensors"]),
        "bytes": sum(path.stat().st_size for path in files),
        "files": [str(path.relative_to(out)) for path in files],
    }


def _model(run: Path, config: Config, archive: checkpoint.Archive, weights: str, dtype: str) -> Model:
    vocabulary = words_of(run, config)
    spec, text = config.backbone(), config.text_encoder(len(vocabulary or ()))
    shapes = {f"backbone.{name}": shape for name, shape in convert.our_shapes(spec).items()}
    if text is not None:
        shapes |= {f"text.{p.name}": p.shape for unit in text.parameters().values() for p in unit}
    archive.check_model(shapes)
    archive.check_specs(checkpoint.specs_of(spec, text))
    about = {
        "longskip_version": __version__,
        "run": run.resolve().name,
        "step": str(archive.manifest["step"]),
        "weights": weights,
        "dtype": dtype,
        "preset": config.model.preset,
        "spec": json.dumps(asdict(spec)),
        "diffusion": config.diffusion.model_dump_json(),
        "encoders": config.encoders.model_dump_json(exclude={"vae": {"path"}, "text": {"path"}}),
        "vocabulary": vocabulary.fingerprint() if vocabulary else "none",
        "manifest_sha256": hashlib.sha256((archive.folder / "manifest.json").read_bytes()).hexdigest(),
    }
    return Model(config, vocabulary, archive, weights, dtype, about)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill that becomes ``out`` at the end, or leaves no trace; ConfigError where ``out`` is there already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already", cure="name a new folder: nothing is overwritten")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{out} cannot be made: {error}", cure="name a folder that can be written") from None
    try:
        yield temporary
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# --- original U-ViT names ---------------------------------------------------------------------------------------------


def convert_file(source: Path, out: Path, to: str, spec: UViTSpec | None) -> dict[str, Any]:
    """Write ``source`` (safetensors) to ``out`` with the original U-ViT's names (``to`` original) or ours (longskip).

    ``spec``: the model's; None takes the one in the file's metadata. Ours are those of a whole system, ``backbone.…``, which
    ``train.init_from`` takes; a word encoder (``text.…``) has no place in the original and is left out. The values keep
    their bits and dtypes. Raises CheckpointError for a pickle or tensors that do not fit, ConfigError without a spec.
    """
    if to not in ("original", "longskip"):
        raise ConfigError(f"--to {to!r}", cure="one of original, longskip")
    if out.exists():
        raise ConfigError(f"{out} is there already", cure="name a new file: nothing is overwritten")
    with TensorFile(source) as file:
        known = spec or spec_of_metadata(file.metadata, source)
        if known is None:
            raise ConfigError(
                f"{source} does not say what model it is of",
                cure="give --preset, with the fields that differ: --preset uvit-s2-coco n_txt=77",
            )
        names = convert.original_names(known)
        left_out = [name for name in file.shapes if to == "original" and name.startswith("text.")]
        entries = _to_original(file, known, names, left_out) if to == "original" else _to_ours(file, known, names)
        metadata = {"format": "pt", "longskip_version": __version__, "spec": json.dumps(asdict(known)), "names": to}
        kept = {
            key: file.metadata[key] for key in ("run", "step", "weights", "manifest_sha256") if key in file.metadata
        }
        write_file(out, entries, metadata | kept)
    return {"out": str(out), "names": to, "tensors": len(entries), "left_out": left_out, "bytes": out.stat().st_size}


def _to_original(file: TensorFile, spec: UViTSpec, names: dict[str, str], left_out: list[str]) -> list[Entry]:
    prefix = "backbone." if any(name.startswith("backbone.") for name in file.shapes) else ""
    found = {name.removeprefix(prefix): shape for name, shape in file.shapes.items() if name not in left_out}
    convert.refuse_others(found, convert.our_shapes(spec), str(file.path))
    shapes = convert.original_shapes(spec)
    return [
        _entry(file, prefix + ours, theirs, shapes[theirs], partial(convert.value_to_original, ours, spec=spec))
        for ours, theirs in names.items()
    ]


def _to_ours(file: TensorFile, spec: UViTSpec, names: dict[str, str]) -> list[Entry]:
    convert.refuse_others(file.shapes, convert.original_shapes(spec), str(file.path))
    shapes = convert.our_shapes(spec)
    return [
        _entry(file, theirs, f"backbone.{ours}", shapes[ours], partial(convert.value_from_original, ours, spec=spec))
        for ours, theirs in names.items()
    ]


def _entry(
    file: TensorFile, source: str, name: str, shape: tuple[int, ...], act: Callable[[torch.Tensor], torch.Tensor]
) -> Entry:
    def pieces() -> Iterator[torch.Tensor]:
        yield act(file.full(source))

    return Entry(name, shape, file.dtypes[source], pieces)
