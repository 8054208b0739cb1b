"""The small trainable text encoder: one vector per word, and layers in which neighbouring words see one another."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from longskip.errors import ConditioningError
from longskip.kernels.norm import layer_norm
from longskip.models.packed import Layout, Packed
from longskip.models.specs import NORM_EPS, TextEncoderSpec

__all__ = ["WordEncoder", "windows"]


def windows(x: Tensor, reach: int) -> Tensor:
    """(B, T, E) → (B, T, (2·reach + 1)·E): for every token those from ``reach`` before it to ``reach`` after it, in
    order, zero beyond the ends."""
    padded = F.pad(x, (0, 0, reach, reach))  # (B, T + 2·reach, E)
    return torch.cat([padded[:, shift : shift + x.shape[1]] for shift in range(2 * reach + 1)], dim=-1)


class WordEncoder(Packed):
    """Token ids (B, n_tokens) → (B, n_tokens, width). Id 0 is padding and has a learned vector of its own.

    Without layers, word order reaches the model through the U-ViT's position embedding of the text tokens alone: all
    blocks together have to find out which words stand beside which. A layer adds GELU(linear(window)) to every word, the
    window being the normed vectors of the words around it, zero beyond the ends.
    """

    def __init__(
        self,
        spec: TextEncoderSpec,
        layout: Layout = "named",
        device: torch.device | str | None = None,
        seed: int = 0,
        prefix: str = "",
    ) -> None:
        device = torch.get_default_device() if device is None else torch.device(device)
        super().__init__(spec.parameters()["embedding"], layout, prefix)
        self.spec = spec
        if device.type != "meta":
            self.materialize(seed, device)

    def forward(self, tokens: Tensor) -> Tensor:
        """Raises ``ConditioningError`` on ids of another shape or dtype, or (on the CPU, where looking is free) outside
        the vocabulary."""
        spec = self.spec
        if tokens.dim() != 2 or tokens.shape[1] > spec.n_tokens or tokens.dtype not in (torch.int64, torch.int32):
            raise ConditioningError(
                f"tokens are {tokens.dtype} of shape {tuple(tokens.shape)}, not integers (B, n <= {spec.n_tokens})",
                cure=f"pad or cut texts to {spec.n_tokens} ids",
            )
        if (
            tokens.device.type == "cpu"
            and tokens.numel()
            and not 0 <= int(tokens.min()) <= int(tokens.max()) < spec.vocab_size
        ):
            raise ConditioningError(
                f"token ids span {int(tokens.min())}..{int(tokens.max())}, the vocabulary 0..{spec.vocab_size - 1}",
                cure="tokenise with the vocabulary that this encoder was built for",
            )
        with self.guard():
            return self.compute(tokens, self.views())

    def compute(self, tokens: Tensor, p: dict[str, Tensor]) -> Tensor:
        """The same as a pure function of ids and parameters ``p``."""
        x = F.embedding(tokens, p["embedding.weight"])  # (B, n_tokens, width)
        for index in range(self.spec.depth):
            layer = f"layers.{index}"
            y = layer_norm(x, p[f"{layer}.norm.weight"], p[f"{layer}.norm.bias"], eps=NORM_EPS)
            window = windows(cast(Tensor, y), self.spec.REACH)  # (B, n_tokens, window * width); y is no pair here
            x = x + F.gelu(F.linear(window, p[f"{layer}.linear.weight"], p[f"{layer}.linear.bias"]))
        return x

    def extra_repr(self) -> str:
        spec = self.spec
        return f"vocab_size={spec.vocab_size}, width={spec.width}, n_tokens={spec.n_tokens}, depth={spec.depth}"
