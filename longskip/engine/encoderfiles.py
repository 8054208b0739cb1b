"""The folders of frozen encoders: what lies in them, whether it fits the configuration, and its hash (no torch).

A folder is what ``save_pretrained`` of diffusers or transformers writes, or a whole pipeline's folder, whose ``vae``,
``text_encoder`` and ``tokenizer`` are then taken. Nothing is downloaded, and pickled weights are never opened.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from longskip.engine.config import TextGroup, VaeGroup
from longskip.engine.data.hashes import file_sha256
from longskip.errors import EncoderError

MAX_JSON_BYTES = 1 << 24
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "spiece.model",
)  # fmt: skip
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_KINDS = {"t5": "t5", "clip": "clip", "clip_text_model": "clip"}


@dataclass(frozen=True)
class EncoderFiles:
    """An encoder's folder: its ``config.json`` as ``settings``, its ``weights``, and for texts the ``tokenizer`` folder.

    ``files`` are (name, path) of all that decides what the encoder computes.
    """

    folder: Path
    settings: Mapping[str, Any]
    weights: tuple[Path, ...]
    tokenizer: Path | None = None

    @property
    def files(self) -> tuple[tuple[str, Path], ...]:
        named = [(path.name, path) for path in (self.folder / "config.json", *self.weights)]
        if self.tokenizer is not None:
            named += [(f"tokenizer/{name}", self.tokenizer / name) for name in TOKENIZER_FILES]
        return tuple((name, path) for name, path in named if path.is_file())

    def sha256(self) -> str:
        """SHA-256 over names and contents of ``files``; every file is read once a process."""
        digest = hashlib.sha256()
        for name, path in self.files:
            state = path.stat()
            digest.update(f"{name} {_file_sha256(str(path), state.st_size, state.st_mtime_ns)}\n".encode())
        return digest.hexdigest()


@lru_cache(maxsize=256)
def _file_sha256(path: str, size: int, mtime_ns: int) -> str:
    return file_sha256(Path(path))


def vae_files(path: str | Path) -> EncoderFiles:
    """The autoencoder's files. Raises ``EncoderError`` where there is none of diffusers' ``AutoencoderKL``."""
    folder, settings = _open(path, "vae", "an AutoencoderKL of diffusers")
    found = settings.get("_class_name")
    if found != "AutoencoderKL":
        raise EncoderError(
            f"{folder} holds a {found or settings.get('model_type') or 'model without _class_name'}, not AutoencoderKL",
            cure="name the folder of an AutoencoderKL (diffusers' save_pretrained)",
        )
    return EncoderFiles(folder, settings, _weights(folder, "diffusion_pytorch_model"))


def text_files(path: str | Path) -> EncoderFiles:
    """The text encoder's files. Raises ``EncoderError`` where there is no T5 or CLIP with its tokenizer."""
    folder, settings = _open(path, "text_encoder", "a T5 or CLIP text encoder of transformers")
    kind = _kind(folder, settings)
    if (folder / "adapter_config.json").exists():
        raise EncoderError(
            f"{folder} holds an adapter (adapter_config.json)", cure="merge it into the weights and save those"
        )
    tokenizer = next((place for place in (folder, folder.parent / "tokenizer") if _has_tokenizer(place, kind)), None)
    if tokenizer is None:
        wanted = "tokenizer.json" + (" or spiece.model" if kind == "t5" else ", or vocab.json and merges.txt")
        raise EncoderError(
            f"{folder} has no tokenizer ({wanted}), nor has {folder.parent / 'tokenizer'}",
            cure="save the tokenizer beside the weights (tokenizer.save_pretrained)",
        )
    if not (tokenizer / "tokenizer.json").is_file() and kind == "t5" and not importlib.util.find_spec("sentencepiece"):
        raise EncoderError(
            f"{tokenizer} has only spiece.model, which needs the package sentencepiece",
            cure="pip install sentencepiece, or save tokenizer.json beside it (tokenizer.save_pretrained)",
        )
    return EncoderFiles(folder, settings, _weights(folder, "model"), tokenizer)


def vae_group(files: EncoderFiles) -> VaeGroup:
    """``encoders.vae`` as the folder itself says it. Raises ``EncoderError`` for what cannot be written there."""
    settings = files.settings
    try:
        blocks = settings["block_out_channels"]
        group = VaeGroup(
            kind="vae",
            path=str(files.folder),
            channels=settings["latent_channels"],
            factor=2 ** (len(blocks) - 1),
            scale=settings.get("scaling_factor", 0.18215),
            shift=settings.get("shift_factor") or 0.0,
        )
        colours = (settings.get("in_channels", 3), settings.get("out_channels", 3))
    except (KeyError, TypeError, ValueError) as error:
        raise EncoderError(f"{files.folder / 'config.json'} is malformed: {error}") from error
    if colours != (3, 3):
        raise EncoderError(f"{files.folder} takes {colours[0]} channels and gives {colours[1]}; pictures have 3")
    if settings.get("latents_mean") is not None or settings.get("latents_std") is not None:
        raise EncoderError(
            f"{files.folder} scales each latent channel by itself (latents_mean, latents_std); one scale is supported"
        )
    return group


def text_group(
    files: EncoderFiles, n_tokens: int | None = None, too_long: Literal["error", "truncate"] = "error"
) -> TextGroup:
    """``encoders.text`` as the folder itself says it; ``n_tokens`` by default CLIP's positions, or 120 for T5."""
    kind = _kind(files.folder, files.settings)
    settings = _text_settings(files.settings)
    width = settings.get("d_model" if kind == "t5" else "hidden_size")
    limit = None if kind == "t5" else settings.get("max_position_embeddings", 77)
    if not isinstance(width, int) or not isinstance(limit, (int, type(None))):
        raise EncoderError(f"{files.folder / 'config.json'} is malformed: the width is {width!r}, the length {limit!r}")
    if limit is not None and n_tokens is not None and n_tokens > limit:
        raise EncoderError(
            f"{files.folder} has {limit} positions, {n_tokens} tokens are asked for",
            cure=f"set encoders.text.n_tokens to {limit} or fewer",
        )
    n_tokens = n_tokens or limit or 120
    try:
        return TextGroup(kind=kind, path=str(files.folder), width=width, n_tokens=n_tokens, too_long=too_long)
    except ValueError as error:
        raise EncoderError(f"{files.folder / 'config.json'} is malformed: {error}") from error


def vocabulary_size(files: EncoderFiles) -> int:
    """How many token ids the text encoder knows."""
    size = _text_settings(files.settings).get("vocab_size", 0)
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise EncoderError(f"{files.folder / 'config.json'} is malformed: vocab_size is {str(size)[:80]}")
    return size


def check_vae(group: VaeGroup) -> EncoderFiles:
    """The files at ``encoders.vae.path``. Raises ``EncoderError`` where they are not what the configuration says."""
    if not group.path:
        raise EncoderError(
            "encoders.vae.path is not set, and pictures and latents are to be turned into each other",
            cure="longskip train CONFIG encoders.vae.path=FOLDER (on a finished run it trains nothing and notes the path)",
        )
    files = vae_files(group.path)
    _compare("encoders.vae", files.folder, group, vae_group(files), ("channels", "factor", "scale", "shift"))
    return files


def check_text(group: TextGroup) -> EncoderFiles:
    """The files at ``encoders.text.path``. Raises ``EncoderError`` where they are not what the configuration says."""
    if not group.path:
        raise EncoderError(
            "encoders.text.path is not set, and texts are to be encoded",
            cure="longskip train CONFIG encoders.text.path=FOLDER (on a finished run it trains nothing and notes the path)",
        )
    files = text_files(group.path)
    _compare("encoders.text", files.folder, group, text_group(files, group.n_tokens), ("kind", "width"))
    return files


def same(one: Any, other: Any) -> bool:
    """Equality, with room for the rounding of a number written out."""
    if isinstance(one, float) or isinstance(other, float):
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (one, other))
        return numbers and math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)


def _compare(group: str, folder: Path, wanted: Any, found: Any, names: tuple[str, ...]) -> None:
    for name in names:
        said, is_ = getattr(wanted, name), getattr(found, name)
        if not same(said, is_):
            raise EncoderError(
                f"{group}.{name} is {said}, the encoder in {folder} has {is_}",
                cure=f"set {group}.{name} to {is_}, or {group}.path to another encoder",
            )


def _open(path: str | Path, part: str, what: str) -> tuple[Path, dict[str, Any]]:
    """The folder with ``config.json`` at ``path`` or below it in ``part``, and that file's content."""
    folder = Path(path)
    if not folder.is_dir():
        raise EncoderError(
            f"{folder} is not a folder; {what} is meant",
            cure="copy the encoder there: nothing is downloaded, only local folders are read",
        )
    if not (folder / "config.json").is_file() and (folder / part / "config.json").is_file():
        folder = folder / part
    try:
        return folder, _json(folder / "config.json")
    except FileNotFoundError:
        raise EncoderError(f"{folder} has no config.json; {what} is meant", cure="name the encoder's folder") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise EncoderError(f"{path} is larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise EncoderError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise EncoderError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def _kind(folder: Path, settings: Mapping[str, Any]) -> Literal["t5", "clip"]:
    kind = _KINDS.get(str(settings.get("model_type")))
    if kind is None:
        found = settings.get("model_type") or settings.get("_class_name") or "model without model_type"
        raise EncoderError(
            f"{folder} holds a {found}, neither T5 nor CLIP", cure="name the folder of a T5 or CLIP text encoder"
        )
    return kind  # type: ignore[return-value]


def _text_settings(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text half's settings where a whole CLIP was saved."""
    half = settings.get("text_config")
    return half if settings.get("model_type") == "clip" and isinstance(half, dict) else settings


def _has_tokenizer(folder: Path, kind: str) -> bool:
    if (folder / "tokenizer.json").is_file():
        return True
    others = ("spiece.model",) if kind == "t5" else ("vocab.json", "merges.txt")
    return all((folder / name).is_file() for name in others)


def _weights(folder: Path, stem: str) -> tuple[Path, ...]:
    """The safetensors files, with the index that lists them where there are several."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    found = [single] if single.is_file() else []
    if index.is_file():
        names = _json(index).get("weight_map")
        parts = sorted(set(names.values())) if isinstance(names, dict) else []
        for name in parts:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise EncoderError(f"{index} lists the file {name!r}; only safetensors beside it are read")
            if not (folder / name).is_file():
                raise EncoderError(f"{index} lists {name}, which is not there", cure="copy the whole folder again")
        if not parts:
            raise EncoderError(f"{index} lists no files")
        found += [index, *(folder / name for name in parts)]
    if not found:
        pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
        if pickled:
            raise EncoderError(
                f"{folder} holds only pickled weights ({pickled[0]}), which can run code when read",
                cure="take the encoder's safetensors, or convert it once: save_pretrained writes them",
            )
        raise EncoderError(f"{folder} has no {single.name}", cure="copy the encoder's safetensors there")
    return tuple(found)
