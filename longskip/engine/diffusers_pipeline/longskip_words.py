"""The word encoder of an exported folder, in torch and diffusers alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

REACH = 3


class WordLayer(nn.Module):
    """x + GELU(linear(the normed vectors of the words up to ``REACH`` before and after)), (B, n, width) → the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.linear = nn.Linear((2 * REACH + 1) * width, width)

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(self.norm(x), (0, 0, REACH, REACH))
        window = torch.cat([padded[:, i : i + x.shape[1]] for i in range(2 * REACH + 1)], dim=-1)
        return x + F.gelu(self.linear(window))


class WordEncoder(ModelMixin, ConfigMixin):
    """Token ids (B, n_tokens) → (B, n_tokens, width); id 0 pads and has a vector of its own."""

    @register_to_config
    def __init__(self, vocab_size: int, width: int, n_tokens: int, depth: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(WordLayer(width) for _ in range(depth))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return x
