"""The small trainable text encoder: one vector per word."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longskip.errors import ConditioningError
from longskip.models.packed import Layout, Packed
from longskip.models.specs import TextEncoderSpec

__all__ = ["WordEncoder"]


class WordEncoder(Packed):
    """Token ids (B, n_tokens) → (B, n_tokens, width). Id 0 is padding and has a learned vector of its own.

    Word order reaches the model through the U-ViT's position embedding of the text tokens.
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
        return F.embedding(tokens, self.views()["embedding.weight"])  # (B, n_tokens, width)

    def extra_repr(self) -> str:
        return f"vocab_size={self.spec.vocab_size}, width={self.spec.width}, n_tokens={self.spec.n_tokens}"
