"""Prompts → what the model is told, whichever text encoder a run has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from longskip.engine.data.tokens import Vocabulary
from longskip.errors import ConfigError

if TYPE_CHECKING:
    from longskip.engine.encoders import Encoders

Conditions = dict[str, torch.Tensor]


class Texts(Protocol):
    """``conditions`` are handed to the model by name; the empty prompt's are those of guidance and dropout."""

    def check(self, prompts: Sequence[str]) -> None:
        """Raise TextTooLongError or ConfigError for a prompt that cannot be encoded, before anything is drawn."""
        ...

    def conditions(self, prompts: Sequence[str], device: torch.device) -> Conditions:
        """What the model is told for a batch of B prompts."""
        ...


@dataclass(frozen=True)
class WordTexts:
    """Token ids (B, n_tokens) for the word encoder that is trained with the model."""

    vocabulary: Vocabulary
    n_tokens: int
    truncate: bool

    def check(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            self.vocabulary.encode(prompt, self.n_tokens, truncate=self.truncate)

    def conditions(self, prompts: Sequence[str], device: torch.device) -> Conditions:
        ids = [self.vocabulary.encode(prompt, self.n_tokens, truncate=self.truncate) for prompt in prompts]
        return {"tokens": torch.from_numpy(np.stack(ids)).to(device)}


@dataclass(frozen=True)
class EncodedTexts:
    """Features (B, n_tokens, E) and mask (B, n_tokens) of a frozen encoder."""

    encoders: Encoders

    def check(self, prompts: Sequence[str]) -> None:
        self.encoders.check_text(prompts)

    def conditions(self, prompts: Sequence[str], device: torch.device) -> Conditions:
        text, mask = self.encoders.encode_text(list(prompts))
        return {"text": text.to(device), "text_mask": mask.to(device)}


@dataclass(frozen=True)
class StoredTexts:
    """Features that lie in the shards, by caption: enough for the prompts that they hold and for the empty one."""

    known: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    def check(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            if prompt not in self.known:
                raise ConfigError(
                    f"the prompt {prompt!r} is no caption of the data, and this run names no text encoder",
                    cure="set encoders.text.path to the encoder that made the features",
                )

    def conditions(self, prompts: Sequence[str], device: torch.device) -> Conditions:
        self.check(prompts)
        text, mask = zip(*(self.known[prompt] for prompt in prompts), strict=True)
        return {"text": torch.stack(text).to(device), "text_mask": torch.stack(mask).to(device)}


class NoTexts:
    """A model that is told nothing but the time."""

    def check(self, prompts: Sequence[str]) -> None:
        if any(prompts):
            raise ConfigError("this run was trained without captions", cure="draw without prompts")

    def conditions(self, prompts: Sequence[str], device: torch.device) -> Conditions:
        return {}
