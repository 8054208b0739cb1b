"""The word encoder of an exported folder: one learned vector per token id, in torch and diffusers alone."""

from __future__ import annotations

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class WordEncoder(ModelMixin, ConfigMixin):
    """Token ids (B, n_tokens) → (B, n_tokens, width); id 0 pads and has a vector of its own."""

    @register_to_config
    def __init__(self, vocab_size: int, width: int, n_tokens: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens)
