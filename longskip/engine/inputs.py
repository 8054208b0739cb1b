"""What a run's model is fed: words or features, pixels or latents, read from the data or encoded on the way."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any, cast

import numpy as np
import torch

from longskip.engine.config import Config
from longskip.engine.data.assembler import choose_caption
from longskip.engine.data.captions import Captions
from longskip.engine.data.draws import Draws
from longskip.engine.data.features import FeatureBatch
from longskip.engine.data.reader import Assembler, MicroBatch
from longskip.engine.data.shuffled import shuffled
from longskip.engine.data.sources import FeatureSource, Source
from longskip.engine.data.tokens import Vocabulary
from longskip.engine.encoders import Encoders
from longskip.engine.texts import EncodedTexts, NoTexts, StoredTexts, Texts, WordTexts
from longskip.errors import TextTooLongError

STORED_CAPTIONS = 16


class Inputs:
    """The vocabulary and the frozen encoders of a configuration, on ``device``; encoders are loaded at first use.

    ``source`` is the data whose stored features stand for a text encoder that is not there.
    """

    def __init__(
        self, config: Config, vocabulary: Vocabulary | None, device: torch.device, source: Source | None = None
    ) -> None:
        self.config, self.vocabulary, self.device, self.source = config, vocabulary, device, source
        spec = config.backbone()
        self.latent_shape: tuple[int, int, int] = (spec.channels, *spec.latent_size)

    @cached_property
    def encoders(self) -> Encoders:
        """Raises ConfigError where a path is missing or what lies there does not fit the configuration."""
        return Encoders.of(self.config, self.device)

    @cached_property
    def texts(self) -> Texts:
        """How prompts are told to the model."""
        text = self.config.encoders.text
        if text.kind == "none":
            return NoTexts()
        if self.vocabulary is not None:
            return WordTexts(self.vocabulary, text.n_tokens, text.too_long == "truncate")
        return EncodedTexts(self.encoders) if text.path or self.source is None else self._stored(self.source)

    def load(self, source: Source) -> None:
        """Load now what ``source`` will have to be encoded with, so that damaged weights are met before the first step."""
        if self.on_the_way(source):
            self.encoders.load()

    def on_the_way(self, source: Source) -> list[str]:
        """The frozen encoders that run in every step (``vae``, ``text``), since ``source`` does not store what they make."""
        stored, wanted = source.features, self.config.encoders
        parts = ["vae"] if wanted.vae.kind == "vae" and (stored is None or stored.latent is None) else []
        return parts + (["text"] if wanted.text.frozen and (stored is None or stored.text is None) else [])

    @property
    def pictures(self) -> bool:
        """Whether latents can be turned into pictures."""
        return self.config.encoders.vae.kind == "none" or bool(self.config.encoders.vae.path)

    def assembler(self, source: Source, **settings: Any) -> Assembler:
        """An assembler of this run's batches over ``source``; without settings it neither drops, flips nor crops."""
        return Assembler(source, **(self.settings() | {"buckets": self.config.buckets} | settings))

    def settings(self) -> dict[str, Any]:
        """What ``Reader`` and ``Assembler`` are to know of the model's inputs."""
        text = self.config.encoders.text
        return {
            "vocabulary": self.vocabulary,
            "resolution": self.config.resolution,
            "n_txt": 0 if text.kind == "none" else text.n_tokens,
            "seed": self.config.train.seed,
            "too_long": text.too_long,
            "latent_shape": self.latent_shape,
        }

    def ready(self, micro: MicroBatch) -> MicroBatch:
        """The micro-batch on the device, encoded where its pictures or captions still are to be."""
        micro = micro.to(self.device)
        if self.config.encoders.text.frozen and not micro.conditions:
            micro = self._without_long(micro)
            micro = replace(micro, conditions=self.texts.conditions(micro.captions, self.device))
        if micro.clean.shape != micro.noise.shape:
            latents = self.encoders.encode_images(micro.clean)
            # A bad sample's picture is zeros; its latents are made so again, whatever the encoder says of grey.
            micro = replace(micro, clean=latents * (micro.weight > 0).view(-1, 1, 1, 1))
        return micro

    def _without_long(self, micro: MicroBatch) -> MicroBatch:
        """Captions that the encoder does not take make bad samples, as they do where they are encoded beforehand."""
        captions, weight = list(micro.captions), micro.weight
        for i, caption in enumerate(captions):
            try:
                self.texts.check([caption])
            except TextTooLongError as error:
                weight = weight.clone()
                weight[i], captions[i] = 0.0, ""
                entry = {"key": micro.keys[i], "sample": int(micro.samples[i]), "reason": "text_too_long"}
                micro.bad.append(entry | {"detail": str(error)})
        return replace(micro, captions=tuple(captions), weight=weight)

    def to_pictures(self, latents: torch.Tensor) -> np.ndarray:
        """Latents (B, C, h, w) → uint8 (B, H, W, 3)."""
        pixels = latents if self.config.encoders.vae.kind == "none" else self.encoders.decode(latents)
        scaled = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return scaled.permute(0, 2, 3, 1).cpu().numpy()

    def _stored(self, source: Source) -> StoredTexts:
        """Of samples drawn by ``train.seed`` from all of ``source``, and of the empty caption, which is stored apart.

        Raises EncoderError for features that the model does not take, the empty caption's among them.
        """
        layout = self.assembler(source, caption_dropout=1.0).features  # checks the empty caption's shape too
        assert layout is not None and layout.text is not None
        stored, seed = cast(FeatureSource, source), self.config.train.seed
        order, draws = islice(shuffled(source, seed), 16 * STORED_CAPTIONS), Draws(seed, "caption")
        known: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        while len(known) < STORED_CAPTIONS and (samples := list(islice(order, STORED_CAPTIONS))):
            count = len(samples)
            text, mask = np.zeros((count, *layout.text), layout.text_dtype), np.zeros((count, layout.text[0]), np.uint8)
            into = FeatureBatch(None, text, mask, [""] * count, [""] * count)

            def choose(slot: int, captions: Captions, samples: list[int] = samples) -> int:
                return choose_caption(captions, draws, 0, samples[slot])

            stored.read_features(np.arange(count), np.array(samples), into, choose)
            known |= {into.captions[i]: _tensors(text[i], mask[i]) for i in range(count) if i not in into.bad}
        return StoredTexts(known | {"": _tensors(*stored.empty_text)})


def _tensors(text: np.ndarray, mask: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(text.copy()), torch.from_numpy(mask.astype(bool))
