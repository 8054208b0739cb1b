"""Folders of tiny encoders, and configurations that name them."""

from __future__ import annotations

from pathlib import Path

import torch

from longskip.engine.config import Config
from longskip.engine.configio import merge, validate
from longskip.engine.encoders import Encoders
from tests.tiny_encoders import tiny_clip, tiny_clip_text, tiny_t5, tiny_vae

TEXTS = ["a red star", "", "a large blue circle below the small green square", "Straße 7!"]


def make_folders(folder: Path) -> Path:
    """Two autoencoders, CLIP's text half, a whole CLIP, and a T5, all tiny."""
    tiny_vae(folder / "vae")
    tiny_vae(folder / "shifted", latent_channels=6, factor=4, scale=0.5, shift=0.25)
    tiny_clip_text(folder / "clip")
    tiny_clip(folder / "whole_clip")
    tiny_t5(folder / "t5")
    return folder


def config(folders: Path | None, *, text: str = "t5", vae: bool = True, **groups) -> Config:
    """A run on latents of 4x4 and on texts of the tiny encoders."""
    sizes = {"t5": {"width": 32, "n_tokens": 24}, "clip": {"width": 32, "n_tokens": 77}}
    tree = {
        "model": {"preset": "uvit-tiny", "resolution": 32, "patch": 2},
        "encoders": {
            "vae": {"kind": "vae", "path": str(folders / "vae") if folders else None} if vae else {},
            "text": {"kind": text, "path": str(folders / text) if folders else None, **sizes[text]},
        },
    }
    return validate(merge(tree, groups))


def encoders(*arguments, **settings) -> Encoders:
    return Encoders.of(config(*arguments, **settings), "cpu")


def pixels(count: int, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(count)) * 2 - 1
