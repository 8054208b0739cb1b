"""What is trained: a backbone and, where the texts are not embedded beforehand, its text encoder."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from longskip.errors import ConditioningError, SpecError
from longskip.models.conditioning import Conditioning
from longskip.models.packed import Packed
from longskip.models.text import WordEncoder
from longskip.models.uvit import UViT

__all__ = ["TextToImage"]


class TextToImage(nn.Module):
    """A U-ViT ``backbone`` and an optional ``text`` encoder; canonical names are ``backbone.…`` and ``text.…``.

    Takes over its children: their canonical names, and so their initial values under ``materialize``, are those
    within this system. Raises ``SpecError`` where encoder and backbone do not fit.
    """

    def __init__(self, backbone: UViT, text_encoder: WordEncoder | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.text = text_encoder
        if text_encoder is not None:
            made = (text_encoder.spec.n_tokens, text_encoder.spec.width)
            wanted = (backbone.spec.n_txt, backbone.spec.text_width)
            if made != wanted:
                raise SpecError(
                    f"the text encoder makes {made[0]} tokens of width {made[1]}, "
                    f"the backbone takes {wanted[0]} of {wanted[1]}",
                    cure="set the encoder's n_tokens and width to the backbone's n_txt and text_width",
                )
        for path, module in self.named_modules():
            if isinstance(module, Packed):
                module.prefix = path

    def forward(
        self,
        latents: Tensor,
        time: Tensor,
        tokens: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        label: Tensor | None = None,
    ) -> Tensor:
        """latents (B, C, H, W), time (B,) → prediction (B, C_out, H, W), float32.

        ``tokens`` (B, n_txt) ids go through the text encoder, or ``text`` (B, n_txt, E) is given embedded; both at
        once, or ids without an encoder, raise ``ConditioningError``.
        """
        if tokens is not None:
            if self.text is None or text is not None:
                why = "no text encoder" if self.text is None else "embedded text as well"
                raise ConditioningError(f"token ids were given, but there is {why}", cure="give either tokens or text")
            text = self.text(tokens)
        return self.backbone(latents, time, Conditioning(text=text, text_mask=text_mask, label=label))

    def units(self) -> Iterator[Packed]:
        """The modules that own parameters, in order; ``unit.prefix`` is the unit's canonical name."""
        return (module for module in self.modules() if isinstance(module, Packed))

    def canonical(self) -> Iterator[tuple[str, nn.Parameter, int, tuple[int, ...]]]:
        """(canonical name, the parameter that holds it, offset in it, shape) of everything that is trained."""
        for unit in self.units():
            yield from unit.canonical()

    def materialize(
        self, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> TextToImage:
        """Initial values for every unit; see ``Packed.materialize``."""
        for unit in self.units():
            unit.materialize(seed, device, dtype)
        return self
