"""Models: torch-free specs and presets, the U-ViT built from them, and converters. Imports nothing until asked."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Conditioning": "conditioning",
    "Flops": "specs",
    "PRESETS": "presets",
    "Packed": "packed",
    "ParamCounts": "specs",
    "ParamSpec": "specs",
    "SavedBytes": "specs",
    "TextEncoderSpec": "specs",
    "TextToImage": "system",
    "UViT": "uvit",
    "UViTSpec": "specs",
    "WordEncoder": "text",
    "from_original": "convert",
    "initial_value": "init",
    "preset": "presets",
    "to_original": "convert",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
