"""The size ladder: named U-ViT shapes in one table, and ``preset(name, **overrides)``."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from longskip.errors import SpecError, did_you_mean
from longskip.models.specs import UViTSpec

__all__ = ["PRESETS", "preset"]

_COLUMNS = (
    "width", "depth", "n_heads", "patch", "channels", "latent_size", "n_txt", "text_width", "n_classes", "conv",
    "pos_init",
)  # fmt: skip

# The six text-to-image sizes train at 256² pixels (32x32x4 latents) with OpenCLIP-H texts (arXiv 2412.12391); 2.3b and
# 3.7b are the paper's h2048-d42-n16 and h2560-d42-n16. The next three are those of "All are Worth Words". The last
# three draw 32² pixels directly and train on a laptop.
# fmt: off
_TABLE: dict[str, tuple[Any, ...]] = {
    #                   width depth heads patch chans latents   n_txt text  class conv   positions
    "uvit-0.3b":         (1024, 20, 16,   2,    4,    (32, 32), 77,   1024, 0,    True,  "normal"),
    "uvit-0.6b":         (1024, 42, 16,   2,    4,    (32, 32), 77,   1024, 0,    True,  "normal"),
    "uvit-1.3b":         (1536, 42, 16,   2,    4,    (32, 32), 77,   1024, 0,    True,  "normal"),
    "uvit-2.3b":         (2048, 42, 16,   2,    4,    (32, 32), 77,   1024, 0,    True,  "normal"),
    "uvit-3.7b":         (2560, 42, 16,   2,    4,    (32, 32), 77,   1024, 0,    True,  "normal"),
    "uvit-8b":           (3072, 64, 24,   2,    4,    (32, 32), 77,   1024, 0,    True,  "normal"),
    "uvit-s2-coco":      (512,  12, 8,    2,    4,    (32, 32), 77,   768,  0,    True,  "normal"),
    "uvit-h2-imagenet256": (1152, 28, 16, 2,    4,    (32, 32), 0,    0,    1001, False, "normal"),
    "uvit-s2-cifar10":   (512,  12, 8,    2,    3,    (32, 32), 0,    0,    0,    True,  "normal"),
    "uvit-tiny":         (64,   4,  2,    8,    3,    (32, 32), 16,   64,   0,    True,  "sincos"),
    "uvit-shapes":       (128,  4,  4,    8,    3,    (32, 32), 16,   64,   0,    True,  "sincos"),
    "uvit-emoji":        (256,  2,  4,    16,   3,    (32, 32), 16,   128,  0,    True,  "sincos"),
}
# fmt: on

PRESETS: dict[str, UViTSpec] = {name: UViTSpec(**dict(zip(_COLUMNS, row, strict=True))) for name, row in _TABLE.items()}


def preset(name: str, **overrides: Any) -> UViTSpec:
    """The named shape with some fields replaced; ``SpecError`` for an unknown name, field or an impossible shape."""
    if name not in PRESETS:
        raise SpecError(f"unknown preset {name!r}", cure=did_you_mean(str(name), PRESETS))
    known = {item.name for item in fields(UViTSpec)}
    for key in overrides:
        if key not in known:
            raise SpecError(f"unknown model field {key!r}", cure=did_you_mean(key, known))
    return replace(PRESETS[name], **overrides)
