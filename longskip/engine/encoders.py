"""Frozen encoders from local folders: pictures ↔ latents through AutoencoderKL, texts → features through T5 or CLIP.

Everything is deterministic: latents are the mean of the posterior, never a draw from it, and texts are padded to
``n_tokens`` always, so that what a sample is encoded to does not depend on what stands beside it in the batch (but for
the rounding of matrix products of other sizes).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from longskip.engine import encoderfiles
from longskip.engine.config import Config, TextGroup, VaeGroup
from longskip.engine.encoderfiles import EncoderFiles, check_text, check_vae, same, vocabulary_size
from longskip.errors import ConfigError, DataError, EncoderError, TextTooLongError

# fp16 is left out: T5 and the larger autoencoders overflow in it.
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
STORED_DTYPES = ("fp16", "fp32")


class Encoders:
    """The encoders of a configuration, on ``device``, computing in ``dtype``; what comes out is float32.

    Folders are checked when this is made; weights are loaded at first use, or by ``load``. A part without a ``path``
    (features lie in the shards) raises ``EncoderError`` only where it is used.

    Raises ``EncoderError``: a folder that is missing, of another kind, without safetensors, or whose width, channels,
    factor, scale, shift or number of positions are not the configuration's.
    """

    def __init__(
        self,
        vae: VaeGroup,
        text: TextGroup,
        resolution: tuple[int, int],
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"encoders cannot compute in {dtype}", cure=f"one of {', '.join(map(str, DTYPES))}")
        self.vae, self.text, self.resolution = vae, text, resolution
        self.device, self.dtype = torch.device(device), dtype
        self.vae_files = check_vae(vae) if vae.kind == "vae" and vae.path else None
        self.text_files = check_text(text) if text.frozen and text.path else None

    @classmethod
    def of(cls, config: Config, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Encoders:
        """The encoders that ``config.encoders`` names."""
        return cls(config.encoders.vae, config.encoders.text, config.resolution, device, dtype)

    @classmethod
    def at(
        cls,
        vae: str | Path | None,
        text: str | Path | None,
        resolution: tuple[int, int],
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        *,
        text_kind: Literal["auto", "t5", "clip"] = "auto",
        n_tokens: int | None = None,
        too_long: Literal["error", "truncate"] = "error",
    ) -> Encoders:
        """The encoders in these folders, their settings as the folders say them (``n_tokens``: CLIP's 77, T5's 120).

        Raises ``EncoderError`` as above, and for a text encoder that is not of ``text_kind``.
        """
        vae_group = VaeGroup() if vae is None else encoderfiles.vae_group(encoderfiles.vae_files(vae))
        text_group = TextGroup(kind="none")
        if text is not None:
            text_group = encoderfiles.text_group(encoderfiles.text_files(text), n_tokens, too_long)
            if text_kind not in ("auto", text_group.kind):
                raise EncoderError(
                    f"{text} holds {text_group.kind}, {text_kind} is asked for",
                    cure=f"name a folder of {text_kind}, or the kind {text_group.kind}",
                )
        return cls(vae_group, text_group, resolution, device, dtype)

    def load(self) -> Encoders:
        """Loads what has a path now, so that damaged weights are met before anything else is done."""
        if self.vae_files is not None:
            _ = self._autoencoder
        if self.text_files is not None:
            _ = self._text_model
        return self

    def describe(self) -> dict[str, dict[str, Any]]:
        """What ``index.json`` is to say of the parts that are there, so that features of other encoders are refused.

        ``dtype`` is the one computed in; ``sha256`` is over weights, configuration and tokenizer.
        """
        parts: dict[str, dict[str, Any]] = {}
        if self.vae_files is not None:
            vae = self.vae
            parts["vae"] = {
                "kind": vae.kind,
                "sha256": self.vae_files.sha256(),
                "dtype": DTYPES[self.dtype],
                "resolution": list(self.resolution),
                "channels": vae.channels,
                "factor": vae.factor,
                "scale": vae.scale,
                "shift": vae.shift,
                "posterior": "mean",
            }
        if self.text_files is not None:
            text = self.text
            parts["text"] = {
                "kind": text.kind,
                "sha256": self.text_files.sha256(),
                "dtype": DTYPES[self.dtype],
                "n_tokens": text.n_tokens,
                "width": text.width,
                "too_long": text.too_long,
            }
        return parts

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) float in [−1, 1] → latents (B, C, H/factor, W/factor) float32.

        Latents are (z − shift)·scale with z the posterior's mean (not a sample of it). Raises ``DataError`` for other
        shapes.
        """
        factor = self.vae.factor
        if pixels.dim() != 4 or pixels.shape[1] != 3 or pixels.shape[2] % factor or pixels.shape[3] % factor:
            raise DataError(
                f"pictures of the shape {tuple(pixels.shape)}; (B, 3, H, W) with sides that {factor} divides are meant"
            )
        # Contiguous: another memory format takes other convolutions, which round otherwise.
        mean = self._autoencoder.encode(pixels.to(self.device, self.dtype).contiguous()).latent_dist.mean
        return (mean.float() - self.vae.shift) * self.vae.scale

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (B, C, h, w) → pixels (B, 3, h·factor, w·factor) float32, cut to [−1, 1].

        Raises ``DataError`` for other shapes.
        """
        if latents.dim() != 4 or latents.shape[1] != self.vae.channels:
            raise DataError(f"latents of the shape {tuple(latents.shape)}; (B, {self.vae.channels}, h, w) is meant")
        z = latents.to(self.device, torch.float32) / self.vae.scale + self.vae.shift
        return self._autoencoder.decode(z.to(self.dtype)).sample.float().clamp(-1.0, 1.0)

    @torch.no_grad()
    def encode_text(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """B texts → features (B, n_tokens, E) float32 and mask (B, n_tokens) bool, True = attend.

        T5: the encoder's output under the tokenizer's mask. CLIP: the last hidden state after the final norm, without a
        mask, as Stable Diffusion 1 and 2 take it: the features of padding are attended to as well, so all of the mask
        is True. Raises ``TextTooLongError`` unless ``too_long`` is ``truncate``.
        """
        self.check_text(texts)
        given = self._tokenizer(
            texts,
            padding="max_length",
            max_length=self.text.n_tokens,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        ids = given["input_ids"].to(self.device)
        if self.text.kind == "clip":
            features = self._text_model(input_ids=ids).last_hidden_state
            mask = torch.ones_like(ids, dtype=torch.bool)
        else:
            mask = given["attention_mask"].to(self.device, torch.bool)
            features = self._text_model(input_ids=ids, attention_mask=mask).last_hidden_state
        return features.float(), mask

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text takes, its beginning and end included."""
        ids = self._tokenizer(list(texts), truncation=False, padding=False, verbose=False)["input_ids"]
        return [len(row) for row in ids]

    def check_text(self, texts: Sequence[str]) -> None:
        """Raises ``TextTooLongError`` for the first text past ``n_tokens`` unless ``too_long`` is ``truncate``."""
        if self.text.too_long == "truncate":
            return
        for text, count in zip(texts, self.token_counts(texts), strict=True):
            if count > self.text.n_tokens:
                raise TextTooLongError(
                    f"{text[:80]!r} takes {count} tokens of {self.text.kind}, encoders.text.n_tokens is "
                    f"{self.text.n_tokens}",
                    cure="shorten it, or set encoders.text.too_long: truncate",
                )

    @cached_property
    def _autoencoder(self) -> Any:
        files = self.vae_files or check_vae(self.vae)  # which says that there is no path
        AutoencoderKL = library("diffusers").AutoencoderKL
        with loading(files):
            model, report = AutoencoderKL.from_pretrained(
                str(files.folder),
                local_files_only=True,
                use_safetensors=True,
                torch_dtype=self.dtype,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
        return self._frozen(model, report, files)

    @cached_property
    def _text_model(self) -> Any:
        files = self.text_files or check_text(self.text)
        transformers = library("transformers")
        kind = transformers.T5EncoderModel if self.text.kind == "t5" else transformers.CLIPTextModel
        with loading(files):
            model, report = kind.from_pretrained(
                str(files.folder),
                local_files_only=True,
                use_safetensors=True,
                dtype=self.dtype,
                output_loading_info=True,
            )
        return self._frozen(model, report, files)

    @cached_property
    def _tokenizer(self) -> Any:
        files = self.text_files or check_text(self.text)
        transformers = library("transformers")
        kind = transformers.T5Tokenizer if self.text.kind == "t5" else transformers.CLIPTokenizer
        with loading(files):
            tokenizer = kind.from_pretrained(str(files.tokenizer), local_files_only=True)
        size = vocabulary_size(files)
        if len(tokenizer) > size:
            raise EncoderError(
                f"the tokenizer in {files.tokenizer} has {len(tokenizer)} tokens, the encoder in {files.folder} knows "
                f"{size}",
                cure="put the tokenizer there that belongs to the encoder",
            )
        return tokenizer

    def _frozen(self, model: Any, report: Any, files: EncoderFiles) -> Any:
        """The model on the device, without gradients. What the file lacks would have been made up at random."""
        missing = sorted(report["missing_keys"])
        if missing:
            raise EncoderError(
                f"{files.folder} lacks {len(missing)} weights of {type(model).__name__}, the first is {missing[0]}",
                cure="copy the whole folder again, or name another",
            )
        return model.requires_grad_(False).eval().to(self.device)


def library(name: str) -> Any:
    """The package, imported now. Raises ``ConfigError`` where it is not installed."""
    try:
        return __import__(name)
    except ImportError as error:
        raise ConfigError(f"{name} is not installed: {error}", cure="pip install 'longskip[hub]'") from error


@contextmanager
def loading(files: EncoderFiles) -> Iterator[None]:
    """Quiet loading (a whole CLIP has weights that its text half does not use).

    Raises ``EncoderError`` naming the folder for what the libraries raise.
    """
    from safetensors import SafetensorError

    logging = library("transformers").utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, SafetensorError) as error:
        raise EncoderError(
            f"the encoder in {files.folder} cannot be loaded: {type(error).__name__}: {str(error)[:500]}",
            cure="copy the whole folder again, or name another",
        ) from error
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def check_manifest(
    config: Config, encoders: Mapping[str, Any], members: Mapping[str, int], where: str = "the data"
) -> None:
    """Compares what the data say of their features with the configuration, before the first step.

    ``encoders`` is ``Index.encoders`` ({} for plain pictures), ``members`` counts what is there by kind
    (``Index.members``). Where a path is configured, the encoder there is hashed and compared as well, and where data
    hold no features the encoder for them must be there. Raises ``EncoderError`` naming both values and the cure.
    """
    vae, text = config.encoders.vae, config.encoders.text
    latents, features = members.get("latent.npy", 0), members.get("text.npy", 0)
    if vae.kind == "none":
        if latents and not members.get("image", 0):
            raise EncoderError(
                f"{where} holds latents and no pictures, encoders.vae.kind is none",
                cure="set encoders.vae.kind: vae, or train on data with pictures",
            )
    else:
        files = check_vae(vae) if vae.path or not latents else None
        if latents:
            entry = _entry(encoders, "vae", where)
            _compare_entry(where, "vae", entry, vae, ("kind", "channels", "factor", "scale", "shift"), files)
            _compare_sizes(where, entry, config)
    if text.frozen:
        files = check_text(text) if text.path or not features else None
        if features:
            entry = _entry(encoders, "text", where)
            _compare_entry(where, "text", entry, text, ("kind", "width", "n_tokens"), files)


_ENCODE = "longskip data encode the pictures with the encoder of this configuration"


def _entry(encoders: Mapping[str, Any], part: str, where: str) -> Mapping[str, Any]:
    entry = encoders.get(part)
    if not isinstance(entry, Mapping):
        raise EncoderError(
            f"{where} holds features, and index.json does not say which encoders.{part} made them", cure=_ENCODE
        )
    return entry


def _compare_entry(
    where: str, part: str, entry: Mapping[str, Any], group: Any, names: tuple[str, ...], files: EncoderFiles | None
) -> None:
    for name in names:
        made, wanted = entry.get(name), getattr(group, name)
        if not same(made, wanted):
            raise EncoderError(
                f"{where} was encoded with {part} {name} {made}, encoders.{part}.{name} is {wanted}",
                cure=f"set encoders.{part}.{name} to {made}, or {_ENCODE}",
            )
    if entry.get("dtype") not in STORED_DTYPES:
        raise EncoderError(
            f"{where} holds {part} features in {entry.get('dtype')}; {' and '.join(STORED_DTYPES)} are read",
            cure=_ENCODE,
        )
    if files is not None and entry.get("sha256") != files.sha256():
        raise EncoderError(
            f"{where} was encoded by another {part} encoder (SHA-256 {entry.get('sha256')}) than the one in "
            f"{files.folder} ({files.sha256()})",
            cure=f"set encoders.{part}.path to the encoder that made the features, or {_ENCODE}",
        )


def _compare_sizes(where: str, entry: Mapping[str, Any], config: Config) -> None:
    """Resolution, or the set of buckets where the configuration has buckets."""
    wanted = sorted(list(size) for size in config.buckets)
    made = sorted(entry.get("buckets") or [])
    if made != wanted:
        raise EncoderError(
            f"{where} was encoded " + (f"in the buckets {made}" if made else "without buckets") + ", data.buckets is "
            f"{wanted or 'off'}",
            cure=f"set data.buckets to {made or 'off'}, or {_ENCODE}",
        )
    if not made and entry.get("resolution") != list(config.resolution):
        raise EncoderError(
            f"{where} was encoded at the resolution {entry.get('resolution')}, model.resolution is "
            f"{list(config.resolution)}",
            cure=f"set model.resolution to {entry.get('resolution')}, or {_ENCODE}",
        )
