"""First weights of a new run from another model (``train.init_from``): fine-tuning, and training on at another resolution.

The source is a run, a checkpoint folder, or a safetensors file by ``longskip checkpoint export`` or ``convert``. Every tensor
must be the new model's but the table of positions, whose image rows are interpolated (bicubic) to the new grid. Tensors are
read piece by piece: a rank reads its own slices. A run's name means its newest checkpoint, which moves: what it meant at a
run's first start is written down (``describe_start``) and is what later starts take (``kept_start``).
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import torch

from longskip.engine import checkpoint
from longskip.engine.config import Config
from longskip.engine.configio import validate
from longskip.engine.data.hashes import file_sha256
from longskip.engine.data.tokens import Vocabulary
from longskip.engine.runs import find_run
from longskip.engine.shards import Kind, Shards
from longskip.engine.tensorfiles import TensorFile, parts_of, refuse_pickle
from longskip.engine.vocabulary import load_vocabulary
from longskip.errors import CheckpointError, ConfigError
from longskip.models.convert import refuse_others
from longskip.models.specs import UViTSpec
from longskip.models.uvit import Embed
from longskip.profiling.yamlfiles import parse_yaml

POSITIONS = "backbone.embed.pos"
KINDS: dict[str, Kind] = {"ema": "ema", "raw": "weight"}
_MAY_DIFFER = ("latent_size", "n_txt", "pos_init", "out_channels")  # out_channels: compared as c_out


# --- where the weights lie --------------------------------------------------------------------------------------------


def find_initial(source: str | Path) -> Path:
    """The checkpoint folder (verified) or safetensors file that ``train.init_from`` means.

    ``source``: a run by path or name (its newest complete checkpoint), a checkpoint folder, a folder made by ``longskip
    checkpoint export``, a ``.safetensors`` file or ``.safetensors.index.json``. Raises CheckpointError for a damaged one
    or a pickle, ConfigError for anything else.
    """
    found = _concrete(Path(source))
    if found is None:
        return checkpoint.choose(find_run(source) / "checkpoints", None)
    if found.is_dir():
        checkpoint.verify(found)
    return found


def _concrete(path: Path) -> Path | None:
    """A path that names one set of weights: a checkpoint folder or a safetensors file; None for what may be a run."""
    refuse_pickle(path)
    if path.is_file():
        if not path.name.endswith((".safetensors", ".safetensors.index.json")):
            raise ConfigError(f"train.init_from {path} is no .safetensors file", cure="name a run or such a file")
        return path
    if (path / "manifest.json").is_file():
        return path
    exported = (path / name for name in ("model.safetensors", "model.safetensors.index.json"))
    return next((file for file in exported if file.is_file()), None)


def initial_vocabulary(source: str | Path) -> Path | None:
    """The file of words that the weights of ``source`` (as ``find_initial`` takes it) were trained with, if there is one.

    A new run takes it over: the rows of the word table are of these words.
    """
    found = _concrete(Path(source))
    home = find_run(source) if found is None else _home(found)
    return home / "vocabulary.json" if (home / "vocabulary.json").is_file() else None


def describe_start(source: str | Path, config: Config, vocabulary: Vocabulary | None) -> dict[str, Any]:
    """The first weights that ``source`` means now, tried on a run of ``config`` and told as JSON for ``run.json``.

    What ``InitialValues.describe`` tells, ``from`` being one set of weights and no run, and the ``sha256`` of its bytes.
    Raises what ``find_initial`` and ``initial_values`` raise.
    """
    found = find_initial(source)
    with initial_values(found, config.train.init_weights, config, vocabulary) as values:
        return values.describe() | {"sha256": _sha256(found)}


def kept_start(run: Path, told: Mapping[str, Any] | None) -> dict[str, Any]:
    """``told``, what ``run`` wrote down of its first weights, once they are found to lie there still, unaltered.

    Raises CheckpointError where they do not: a run that starts again before its first checkpoint starts from the same.
    """
    cure = "bring them back as they were, or begin a new run: give it its own train.name=…"
    if told is None or "sha256" not in told:
        raise CheckpointError(f"{run} does not say which weights train.init_from meant when it began", cure=cure)
    path, when = Path(told["from"]), f"the weights that {run} began from (train.init_from at its first start)"
    found = _concrete(path)
    if found is None:
        raise CheckpointError(f"{path} is gone: {when}", cure=cure)
    if found.is_dir():
        checkpoint.verify(found)
    if _sha256(found) != told["sha256"]:
        raise CheckpointError(f"{path} was altered: it held {when}, SHA-256 {told['sha256']}", cure=cure)
    return dict(told)


def lower_rate(run: Path, config: Config) -> str:
    """The cure of a loss that is not finite: how to train on from the newest checkpoint of ``run`` at half its rate.

    A resume keeps what the run is, its learning rate among it; a new run, under a free name, may take the weights over.
    """
    names = (f"{run.name}-{n}" for n in count(2))
    name = next(name for name in names if not run.with_name(name).exists())
    words = ["longskip", "train", str(run / "config.yaml"), f"train.name={name}", f"optim.lr={config.optim.lr / 2:g}"]
    if saved := checkpoint.steps_in(run / "checkpoints"):
        words.append(f"train.init_from={saved[-1]}")
    also = ["train.dtype=fp32"] if config.train.dtype != "fp32" else []
    also += [] if config.model.qk_norm else ["model.qk_norm=true without train.init_from: it adds weights"]
    return (
        f"resuming keeps the learning rate; take the weights over into a new run: {shlex.join(words)}\n"
        "  (an earlier checkpoint where the loss had risen before)" + "".join(f", or {each}" for each in also)
    )


def _sha256(found: Path) -> str:
    """Of a checkpoint its manifest, which names the hashes of its files; of an index the hashes of the files it names."""
    if found.is_dir():
        return file_sha256(found / "manifest.json")
    parts = [file_sha256(part) for part in parts_of(found)]
    return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()


def _home(found: Path) -> Path:
    """The folder beside whose configuration and words the weights lie: a checkpoint's run, a file's folder."""
    return found.absolute().parents[1] if found.is_dir() else found.parent


class _Origin(Protocol):
    """The tensors of another model, with what is known of it."""

    shapes: dict[str, tuple[int, ...]]
    spec: UViTSpec | None

    def read(self, name: str, offset: int, numel: int) -> torch.Tensor: ...
    def describe(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


class _OfCheckpoint:
    """A checkpoint folder; the spec stands in its run's configuration, where the folder still lies in a run."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self._archive = checkpoint.Archive(folder)
        self.shapes = {name: tuple(shape) for name, shape in self._archive.manifest["tensors"].items()}
        config = _home(folder) / "config.yaml"
        self.spec = (
            validate(parse_yaml(config.read_text("utf-8"), str(config))).backbone() if config.is_file() else None
        )

    def read(self, name: str, offset: int, numel: int) -> torch.Tensor:
        values = torch.empty(numel, dtype=torch.float32)
        for position, piece in self._archive.read(KINDS[self.kind], name, offset, numel):
            values[position : position + piece.numel()] = piece
        return values

    def describe(self) -> dict[str, Any]:
        step, digest = int(self._archive.manifest["step"]), _sha256(self.folder)
        return {"from": str(self.folder), "step": step, "weights": self.kind, "manifest_sha256": digest}

    def close(self) -> None:
        self._archive.__exit__()


class _OfFile:
    """A safetensors file; the spec stands in its metadata, where longskip wrote it."""

    def __init__(self, path: Path) -> None:
        self._file = TensorFile(path)
        self.shapes = self._file.shapes
        self.spec = spec_of_metadata(self._file.metadata, path)

    def read(self, name: str, offset: int, numel: int) -> torch.Tensor:
        return self._file.read(name, offset, numel).float()

    def describe(self) -> dict[str, Any]:
        about = self._file.metadata
        known: dict[str, Any] = {key: about[key] for key in ("weights", "manifest_sha256") if key in about}
        return {"from": str(self._file.path)} | ({"step": int(about["step"])} if "step" in about else {}) | known

    def close(self) -> None:
        self._file.close()


def spec_of_metadata(metadata: Mapping[str, str], path: Path) -> UViTSpec | None:
    """The backbone's spec in a safetensors file's metadata; None where there is none, CheckpointError for a broken one."""
    if "spec" not in metadata:
        return None
    try:
        return UViTSpec(**json.loads(metadata["spec"]))
    except (ValueError, TypeError, ArithmeticError, RecursionError, ConfigError) as error:
        raise CheckpointError(f"{path}: the spec in its metadata is broken: {str(error)[:200]}") from None


# --- the values -------------------------------------------------------------------------------------------------------


class InitialValues(Mapping[str, torch.Tensor]):
    """The new model's first weights by canonical name, fp32; nothing is read before it is asked for.

    ``values[name]`` is a whole tensor, ``values.read(name, offset, numel)`` a run of the flattened one. Close it, or use it
    as a context manager.
    """

    def __init__(
        self,
        origin: _Origin,
        shapes: dict[str, tuple[int, ...]],
        positions: torch.Tensor | None = None,
        change: str = "kept",
    ) -> None:
        self._origin, self.shapes, self._positions, self._change = origin, shapes, positions, change

    def read(self, name: str, offset: int, numel: int) -> torch.Tensor:
        if name == POSITIONS and self._positions is not None:
            return self._positions[offset : offset + numel]
        return self._origin.read(name, offset, numel)

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        return self.read(name, 0, math.prod(shape)).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def describe(self) -> dict[str, Any]:
        """Where the weights are from, as JSON: path, step, kind, hash of the manifest, what became of the positions."""
        return self._origin.describe() | {"positions": self._change}

    def close(self) -> None:
        self._origin.close()

    def __enter__(self) -> InitialValues:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def initial_values(source: str | Path, kind: str, config: Config, vocabulary: Vocabulary | None) -> InitialValues:
    """The weights of ``source`` as the first ones of a run of ``config``.

    ``source``: what ``find_initial`` gave, on every rank the same and not verified again here, or what it takes.
    ``kind``: ``ema`` or ``raw``, of a checkpoint; a file holds one kind, which is taken. Raises CheckpointError naming the
    tensors where the models differ in more than resolution and text length, where texts are to be longer than they were,
    where the words are not those of ``vocabulary``, and where ``raw`` is asked of a file that holds the EMA.
    """
    if kind not in KINDS:
        raise ConfigError(f"train.init_weights {kind!r}", cure=f"one of {', '.join(KINDS)}")
    found = _concrete(Path(source)) or find_initial(source)
    origin: _Origin = _OfCheckpoint(found, kind) if found.is_dir() else _OfFile(found)
    try:
        if kind == "raw" and origin.describe().get("weights") == "ema":
            raise CheckpointError(
                f"train.init_weights is raw, {found} holds the EMA",
                cure="leave train.init_weights out, or longskip checkpoint export --weights raw",
            )
        return _fitted(origin, found, config, vocabulary)
    except BaseException:
        origin.close()
        raise


def _fitted(origin: _Origin, found: Path, config: Config, vocabulary: Vocabulary | None) -> InitialValues:
    spec, theirs = config.backbone(), origin.spec
    text = config.text_encoder(len(vocabulary or ()))
    shapes = {f"backbone.{p.name}": p.shape for unit in spec.parameters().values() for p in unit}
    if text is not None:
        shapes |= {f"text.{p.name}": p.shape for unit in text.parameters().values() for p in unit}
        _same_words(found, vocabulary)
    changes = theirs is not None and (theirs.latent_size != spec.latent_size or theirs.n_txt != spec.n_txt)
    wanted = dict(shapes)
    if theirs is not None and changes:
        wanted[POSITIONS] = (theirs.n_tokens, theirs.width)
    cure = (
        "start from a model of this configuration's shape; only model.resolution and encoders.text.n_tokens may differ"
    )
    refuse_others(origin.shapes, wanted, f"train.init_from {found}", cure=cure)
    if theirs is None:
        return InitialValues(origin, shapes)
    differing = [
        f"{name} {old!r} there, {new!r} here"
        for name in (item.name for item in fields(UViTSpec) if item.name not in _MAY_DIFFER)
        if (old := getattr(theirs, name)) != (new := getattr(spec, name))
    ]
    if differing:
        raise CheckpointError(f"train.init_from {found} is of another model: {'; '.join(differing)}", cure=cure)
    if spec.n_txt > theirs.n_txt:
        raise CheckpointError(
            f"train.init_from {found} was trained with {theirs.n_txt} text tokens, this run asks for {spec.n_txt}",
            cure=f"set encoders.text.n_tokens to at most {theirs.n_txt}",
        )
    if not changes:
        return InitialValues(origin, shapes)
    old, new = theirs.grid(theirs.latent_size), spec.grid(spec.latent_size)
    table = origin.read(POSITIONS, 0, theirs.n_tokens * theirs.width).view(theirs.n_tokens, theirs.width)
    moved = Embed(theirs).positions(table, new, spec.n_txt)
    change = f"grid {old[0]}x{old[1]} to {new[0]}x{new[1]}, {spec.n_txt} of {theirs.n_txt} text tokens"
    return InitialValues(origin, shapes, moved.reshape(-1), change)


def _same_words(found: Path, vocabulary: Vocabulary | None) -> None:
    path = initial_vocabulary(found)
    if path is None:
        raise CheckpointError(
            f"train.init_from {found} has no vocabulary.json, which says what word each row of its table is",
            cure="put the vocabulary.json of the model's run beside it",
        )
    if load_vocabulary(path) != vocabulary:
        raise CheckpointError(
            f"{path} holds other words than this run's vocabulary", cure="a run takes over the words of train.init_from"
        )


def apply(values: InitialValues, shards: Shards) -> None:
    """Write the rank's slices of weights and EMA, with moments of zero, and publish them to the model.

    Every rank calls it; each reads its own slices only.
    """
    for item in shards.slices:
        weight = shards.tensor(item, "weight")
        weight.copy_(values.read(item.name, item.offset, item.numel))
        shards.tensor(item, "ema").copy_(weight)
        for moment in ("exp_avg", "exp_avg_sq"):
            shards.tensor(item, moment).zero_()
    shards.publish()
