"""What a model may be told beside the noised latents."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

__all__ = ["Conditioning"]


@dataclass(frozen=True)
class Conditioning:
    """Conditions of one batch; a model's spec declares which it needs, and the model refuses the others.

    ``text`` (B, n_txt, E) embedded tokens; ``text_mask`` (B, n_txt) bool, True = attend; ``pooled`` (B, E');
    ``label`` (B,) int64; ``size`` (B, n); ``image`` (B, C', H, W) channels beside the latents; ``image_tokens``
    (B, n, h) appended to the sequence.
    """

    text: Tensor | None = None
    text_mask: Tensor | None = None
    pooled: Tensor | None = None
    label: Tensor | None = None
    size: Tensor | None = None
    image: Tensor | None = None
    image_tokens: Tensor | None = None

    def given(self) -> tuple[str, ...]:
        """Names of the conditions that are there."""
        return tuple(item.name for item in fields(self) if getattr(self, item.name) is not None)

    def to(self, *args: Any, **kwargs: Any) -> Conditioning:
        """All tensors moved to a device (``Tensor.to`` without a dtype, which would break masks and labels)."""
        return Conditioning(**{name: getattr(self, name).to(*args, **kwargs) for name in self.given()})
