"""Coordinates → micro-batches: pictures or stored features, captions, and every draw that training needs.

What a sample looks like (caption, crop, flip, dropout, time, noise) is a function of (seed, epoch, sample). A bad
sample keeps its slot with weight 0, so ranks never have to agree on what to skip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, cast

import numpy as np
import torch

from longskip.engine.data.buffers import Buffers
from longskip.engine.data.captions import Captions
from longskip.engine.data.decode import MAX_PIXELS, decode_image
from longskip.engine.data.draws import Draws
from longskip.engine.data.features import FeatureBatch, FeatureLayout
from longskip.engine.data.sources import FeatureSource, Source
from longskip.engine.data.tokens import Vocabulary
from longskip.errors import BadSampleError, ConfigError, EncoderError


@dataclass
class MicroBatch:
    """m samples of one rank in one micro-step.

    ``conditions`` are handed to the model by name: ``tokens`` (m, n_txt) int64 for the word encoder, ``text``
    (m, n_txt, E) and ``text_mask`` (m, n_txt) bool for features, nothing where the text is still to be encoded or not
    wanted. ``captions`` are those chosen, empty where ``dropped`` marks that dropout took them. ``time_normal`` is a
    standard normal draw that the objective maps to a time; ``weight`` is 1, or 0 for a bad sample, whose picture is 0
    and text padding. ``bad`` lists the bad ones as ``{"key", "sample", "reason", "detail"}``.
    """

    clean: torch.Tensor  # (m, 3, H, W) float32 pixels in [-1, 1], or (m, C, h, w) scaled latents as stored
    conditions: dict[str, torch.Tensor]
    dropped: torch.Tensor  # (m,) bool
    time_normal: torch.Tensor  # (m,) float32
    noise: torch.Tensor  # (m, *latent_shape) float32, standard normal
    weight: torch.Tensor  # (m,) float32
    samples: torch.Tensor  # (m,) int64
    epochs: torch.Tensor  # (m,) int64
    keys: tuple[str, ...]
    captions: tuple[str, ...] = ()
    bad: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def split(self, size: int) -> list[MicroBatch]:
        """Micro-batches of ``size`` samples each, over the same memory."""
        bad_before = np.cumsum([0, *(self.weight.numpy() == 0)]).tolist()  # ``bad`` is in the order of the slots
        parts = []
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            values = {item.name: getattr(self, item.name) for item in fields(self)}
            values = {name: value[part] for name, value in values.items() if name not in ("conditions", "bad")}
            values["conditions"] = {name: value[part] for name, value in self.conditions.items()}
            values["bad"] = self.bad[bad_before[start] : bad_before[min(start + size, len(self))]]
            parts.append(MicroBatch(**values))
        return parts

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> MicroBatch:
        """The same micro-batch with its tensors on ``device``."""
        moved: dict[str, Any] = {
            item.name: value.to(device, non_blocking=non_blocking)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), torch.Tensor)
        }
        conditions = {name: value.to(device, non_blocking=non_blocking) for name, value in self.conditions.items()}
        return replace(self, conditions=conditions, **moved)


@dataclass(frozen=True)
class Assembler:
    """Coordinates → ``MicroBatch``, a pure function of its fields and the source's bytes; what workers run.

    ``resolution`` and ``latent_shape`` are (H, W) in pixels and the model's (C, H, W). Where the source holds latents
    they are read as stored, unless the model's input is pixels and there are pictures. Without a ``vocabulary`` stored
    text features are read where ``n_txt`` is above 0, and captions are handed on as they are. ``crop`` is ``"centre"``
    or ``"random"``; ``flip`` mirrors half of the samples; both are of pictures. A caption past ``n_txt`` tokens
    makes a bad sample (``text_too_long``) when ``too_long`` is ``"error"``, and is cut when it is ``"truncate"``.
    ``buckets`` are resolutions (H, W) that a call may name instead; the latents' shape goes along. ``quarantine``: samples
    (int64, sorted) that are bad without being read, with the reason ``quarantined``.

    Raises ``ConfigError`` for impossible settings (``EncoderError`` for stored features of other shapes) and
    ``ShardError`` for features that contradict their index.
    """

    source: Source
    vocabulary: Vocabulary | None
    resolution: tuple[int, int]
    n_txt: int
    seed: int = 0
    caption_dropout: float = 0.0
    flip: bool = False
    crop: Literal["centre", "random"] = "centre"
    too_long: Literal["error", "truncate"] = "error"
    latent_shape: tuple[int, int, int] | None = None
    max_pixels: int = MAX_PIXELS
    buckets: tuple[tuple[int, int], ...] = ()
    quarantine: np.ndarray | None = field(default=None, repr=False)
    buffers: Buffers = field(default_factory=Buffers, repr=False, compare=False)
    features: FeatureLayout | None = field(init=False, default=None)
    _empty: tuple[np.ndarray, np.ndarray] | None = field(init=False, default=None, repr=False)
    _others: dict[tuple[int, int], Assembler] = field(init=False, default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.resolution) != 2 or min(self.resolution) < 1:
            raise ConfigError(f"resolution {self.resolution}; it is (H, W) in pixels, each 1 or more")
        if self.n_txt < 1 and self.vocabulary is not None:
            raise ConfigError(f"n_txt {self.n_txt}; at least one text token is needed")
        if not 0.0 <= self.caption_dropout <= 1.0:
            raise ConfigError(f"caption_dropout {self.caption_dropout}; it is a share from 0 to 1")
        if self.crop not in ("centre", "random"):
            raise ConfigError(f"crop {self.crop!r}; it is 'centre' or 'random'")
        if self.too_long not in ("error", "truncate"):
            raise ConfigError(f"too_long {self.too_long!r}; it is 'error' or 'truncate'")
        layout = self.source.features
        if layout is not None:
            object.__setattr__(self, "features", self._checked(layout))

    def _checked(self, layout: FeatureLayout) -> FeatureLayout | None:
        """What is read of the stored features; None where nothing is."""
        if layout.pictures and self.latent_shape == (3, *self.resolution):
            layout = replace(layout, latent=None)
        if self.vocabulary is not None or self.n_txt == 0:
            layout = replace(layout, text=None)
        if layout.latent is not None and (self.flip or self.crop == "random"):
            raise ConfigError(
                f"the data hold latents, which are neither mirrored nor cut; flip is {self.flip}, crop {self.crop}",
                cure="set data.flip: false and data.crop: centre, or train on the pictures",
            )
        if layout.latent is not None and self.latent_shape is not None and self.buckets:
            layout = replace(layout, latent=(layout.latent[0], *self.latent_shape[1:]))  # the first is of any bucket
        if layout.latent is not None and self.latent_shape not in (None, layout.latent):
            raise EncoderError(
                f"the data hold latents of the shape {layout.latent}, the model takes {self.latent_shape}",
                cure="encode the pictures for this model (longskip data encode), or set model.resolution and "
                "encoders.vae as they were then",
            )
        if layout.text is not None:
            if layout.text[0] != self.n_txt:
                raise EncoderError(
                    f"the data hold text features of {layout.text[0]} tokens, the model takes {self.n_txt}",
                    cure=f"set encoders.text.n_tokens to {layout.text[0]}, or encode the captions again",
                )
            if self.caption_dropout > 0.0:
                text, mask = cast(FeatureSource, self.source).empty_text
                if text.shape != layout.text or text.dtype != layout.text_dtype:
                    raise EncoderError(
                        f"the empty caption's features are {text.dtype} {text.shape}, "
                        f"the captions' {layout.text_dtype} {layout.text}",
                        cure="encode the captions again: longskip data encode",
                    )
                object.__setattr__(self, "_empty", (text, mask))
        return layout if layout.latent or layout.text else None

    def at(self, resolution: tuple[int, int]) -> Assembler:
        """The assembler for one of the ``buckets``."""
        if resolution == self.resolution:
            return self
        if resolution not in self._others:
            latent = self.latent_shape
            if latent is not None:
                factors = [side // cells for side, cells in zip(self.resolution, latent[1:], strict=True)]
                latent = (latent[0], resolution[0] // factors[0], resolution[1] // factors[1])
            self._others[resolution] = replace(self, resolution=resolution, latent_shape=latent)
        return self._others[resolution]

    def assemble(
        self,
        epochs: Sequence[int] | np.ndarray,
        samples: Sequence[int] | np.ndarray,
        bucket: tuple[int, int] | None = None,
    ) -> MicroBatch:
        """The micro-batch of (epoch, sample) pairs, at the resolution of their ``bucket`` where one is named.

        Raises ``ShardError`` where the source stops at damage.
        """
        if bucket is not None and bucket != self.resolution:
            return self.at(bucket).assemble(epochs, samples)
        epochs, samples = np.asarray(epochs, dtype=np.int64), np.asarray(samples, dtype=np.int64)
        if epochs.shape != samples.shape or samples.ndim != 1:
            raise ValueError(f"epochs {epochs.shape} and samples {samples.shape} must be two lists of one length")
        if (
            follow := getattr(self.source, "follow", None)
        ) is not None:  # remote shards are fetched ahead of the reader
            follow(epochs, samples)
        count, layout = len(samples), self.features or FeatureLayout()
        conditions: dict[str, torch.Tensor] = {}
        into = FeatureBatch(None, None, None, [""] * count, [""] * count)
        self._pass_over(samples, into)
        if layout.latent is not None:
            clean, filled = self.buffers.tensor((count, *layout.latent), layout.latent_dtype)
            into.latents = filled
        else:
            clean, filled = self.buffers.tensor((count, 3, *self.resolution), np.float32)
            self._decode(epochs, samples, filled, into)
        if layout.text is not None:
            conditions["text"], into.text = self.buffers.tensor((count, *layout.text), layout.text_dtype)
            conditions["text_mask"], mask = self.buffers.tensor((count, layout.text[0]), bool)
            into.mask = mask.view(np.uint8)
        if self.features is not None:
            self._read_features(epochs, samples, into)
        if self.vocabulary is not None:
            conditions["tokens"] = torch.from_numpy(self._tokens(into))
        dropped = self._drop(epochs, samples, into, conditions)
        weight = np.ones(count, dtype=np.float32)
        for array in (weight, filled, into.text, into.mask):
            if array is not None:
                array[[*into.bad]] = 0
        for i in into.bad:
            into.captions[i] = ""
        time_normal, noise = self.draws(epochs, samples, self.latent_shape or tuple(clean.shape[1:]))
        return MicroBatch(
            clean=clean,
            conditions=conditions,
            dropped=torch.from_numpy(dropped),
            time_normal=time_normal,
            noise=noise,
            weight=torch.from_numpy(weight),
            samples=torch.from_numpy(samples.copy()),
            epochs=torch.from_numpy(epochs.copy()),
            keys=tuple(into.keys),
            captions=tuple(into.captions),
            bad=[
                {"key": into.keys[i], "sample": int(samples[i]), "reason": error.reason, "detail": str(error)}
                for i, error in sorted(into.bad.items())
            ],
        )

    def batch_bytes(self, count: int) -> int:
        """Bytes of the large tensors of a micro-batch of ``count`` samples, in the largest of the buckets."""
        return count * max(each._sample_bytes() for each in (self, *map(self.at, self.buckets)))

    def _sample_bytes(self) -> int:
        layout = self.features or FeatureLayout()
        clean = layout.latent or (3, *self.resolution)
        one = math.prod(clean) * (layout.latent_dtype if layout.latent else np.dtype(np.float32)).itemsize
        one += math.prod(self.latent_shape or clean) * 4
        if layout.text is not None:
            one += math.prod(layout.text) * layout.text_dtype.itemsize + layout.text[0]
        return one

    def draws(self, epochs: np.ndarray, samples: np.ndarray, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """``time_normal`` (m,) and ``noise`` (m, *shape), standard normal, float32."""
        times = np.empty(len(samples), dtype=np.float32)
        tensor, noise = self.buffers.tensor((len(samples), *shape), np.float32)
        for_noise, for_time = Draws(self.seed, "noise"), Draws(self.seed, "time")
        for i, (epoch, sample) in enumerate(zip(epochs.tolist(), samples.tolist(), strict=True)):
            for_noise.of(epoch, sample).standard_normal(out=noise[i], dtype=np.float32)
            times[i] = for_time.of(epoch, sample).standard_normal()
        return torch.from_numpy(times), tensor

    def _pass_over(self, samples: np.ndarray, into: FeatureBatch) -> None:
        """Marks the samples of the quarantine."""
        if self.quarantine is None or not len(self.quarantine):
            return
        at = np.searchsorted(self.quarantine, samples).clip(max=len(self.quarantine) - 1)
        for i in np.flatnonzero(self.quarantine[at] == samples).tolist():
            into.keys[i] = self.source.key(int(samples[i]))
            into.bad[i] = BadSampleError("quarantined", "on the list data.quarantine")

    def _decode(self, epochs: np.ndarray, samples: np.ndarray, pixels: np.ndarray, into: FeatureBatch) -> None:
        """Pictures to ``pixels`` (m, 3, H, W) in [-1, 1], their keys and captions to ``into``."""
        for_caption, for_flip, for_crop = (Draws(self.seed, purpose) for purpose in ("caption", "flip", "crop"))
        for i, (epoch, sample) in enumerate(zip(epochs.tolist(), samples.tolist(), strict=True)):
            if i in into.bad:
                continue
            try:
                raw = self.source.read(sample)
                into.keys[i] = raw.key
                into.captions[i] = raw.captions[choose_caption(raw.captions, for_caption, epoch, sample)][0]
                flip = self.flip and bool(for_flip.of(epoch, sample).random() < 0.5)
                crop = None
                if self.crop == "random":
                    y, x = for_crop.of(epoch, sample).random(2).tolist()
                    crop = (y, x)
                picture = decode_image(
                    raw.image, resolution=self.resolution, max_pixels=self.max_pixels, flip=flip, crop=crop
                )
                np.multiply(picture.transpose(2, 0, 1), np.float32(1 / 127.5), out=pixels[i])
                pixels[i] -= np.float32(1.0)
            except BadSampleError as error:
                into.keys[i] = self.source.key(sample)
                into.bad[i] = error

    def _read_features(self, epochs: np.ndarray, samples: np.ndarray, into: FeatureBatch) -> None:
        draws = Draws(self.seed, "caption")

        def choose(slot: int, captions: Captions) -> int:
            return choose_caption(captions, draws, int(epochs[slot]), int(samples[slot]))

        whole = np.array([i for i in range(len(samples)) if i not in into.bad], dtype=np.int64)
        cast(FeatureSource, self.source).read_features(whole, samples[whole], into, choose)

    def _tokens(self, into: FeatureBatch) -> np.ndarray:
        """(m, n_txt) int64: the captions' tokens, before dropout, so that a bad caption is bad in every epoch."""
        tokens = np.zeros((len(into.captions), self.n_txt), dtype=np.int64)
        for i, text in enumerate(into.captions):
            if i not in into.bad:
                try:
                    tokens[i] = self._encoded(text)
                except BadSampleError as error:
                    into.bad[i] = error
        return tokens

    def _encoded(self, text: str) -> np.ndarray | int:
        if self.vocabulary is None:
            return 0
        return self.vocabulary.encode(text, self.n_txt, truncate=self.too_long == "truncate")

    def _drop(
        self, epochs: np.ndarray, samples: np.ndarray, into: FeatureBatch, conditions: dict[str, torch.Tensor]
    ) -> np.ndarray:
        """Puts the empty caption where dropout takes one; returns where, (m,) bool."""
        dropped = np.zeros(len(samples), dtype=bool)
        if self.caption_dropout == 0.0:
            return dropped
        draws = Draws(self.seed, "dropout")
        for i, (epoch, sample) in enumerate(zip(epochs.tolist(), samples.tolist(), strict=True)):
            dropped[i] = i not in into.bad and draws.of(epoch, sample).random() < self.caption_dropout
        for i in np.flatnonzero(dropped).tolist():
            into.captions[i] = ""
            if "tokens" in conditions:
                conditions["tokens"][i] = torch.as_tensor(self._encoded(""))
            if into.text is not None and into.mask is not None and self._empty is not None:
                into.text[i], into.mask[i] = self._empty
        return dropped


def choose_caption(captions: Captions, draws: Draws, epoch: int, sample: int) -> int:
    """Which caption a sample takes in an epoch, by the weights' shares; one alone needs no draw."""
    if len(captions) == 1:
        return 0
    at = draws.of(epoch, sample).random() * math.fsum(weight for _, weight in captions)
    for i, (_, weight) in enumerate(captions):
        at -= weight
        if at < 0:
            return i
    return len(captions) - 1
