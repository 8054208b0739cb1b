"""The network that pictures are compared in (FID, KID), from a local file: pictures → one vector of features each.

Two kinds are taken:

- a TorchScript file, ``forward(pictures (B, 3, S, S) float32 in [0, 255]) -> features (B, D)``, as
  ``inception-2015-12-05.pt``, the conversion of FID's own Inception that the field passes around. Where ``forward`` has
  an argument ``return_features`` it is given True. S is the module's attribute ``input_size``; without one a network
  with ``return_features`` is taken for that Inception, S = 299.
- the folder of a CLIP of transformers, whose projected image embeddings are the features (see ``clip.py``).

**A TorchScript file is a program.** It runs when it is loaded (its ``__setstate__``) and at every call, with this
process's rights and through torch's operators, which can read and write files; torch's own documentation says that a
tampered file may run any code. Name only a file that you trust. Its SHA-256 stands in every result.

**Resizing** decides scores (2104.11222): what shrinks without a low-pass filter differs for pictures that look alike.
For a TorchScript network every channel is resized to S x S, both sides by their own factor, with PIL's bicubic filter,
which widens with the factor, in float32, and cut to [0, 255]; nothing is rounded back to 8 bits. At S x S a network
that resizes within itself, as that Inception does, has nothing left to do.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from longskip.engine.clip import Clip, check_pictures
from longskip.engine.data.hashes import file_sha256
from longskip.errors import EncoderError

INCEPTION_SIZE = 299


class FeatureNetwork(ABC):
    """``network(pictures uint8 (B, H, W, 3)) -> (B, n_features)`` float32 on the CPU."""

    path: Path
    n_features: int

    @staticmethod
    def load(path: str | Path, device: torch.device | str = "cpu") -> FeatureNetwork:
        """The network at ``path``, tried once on a grey picture.

        Raises ``EncoderError`` for a file or folder that is missing, no network, or does not give (B, D) finite numbers.
        """
        where = Path(path)
        if not where.exists():
            raise EncoderError(
                f"the feature network {where} does not exist",
                cure="name a TorchScript file or a CLIP's folder; nothing is downloaded",
            )
        network = _ClipNetwork(where, device) if where.is_dir() else _ScriptNetwork(where, device)
        network.n_features = network(np.full((1, 32, 32, 3), 128, dtype=np.uint8)).shape[1]
        return network

    def __call__(self, pictures: np.ndarray) -> torch.Tensor:
        """Features (B, D) float32. Raises ``DataError`` for other arrays, ``EncoderError`` where the network fails."""
        features = self._features(check_pictures(pictures))
        if features.ndim != 2 or len(features) != len(pictures):
            raise EncoderError(
                f"{self.path} gives {tuple(features.shape)} for {len(pictures)} picture(s); (B, D) is meant",
                cure="save a network that gives one vector a picture",
            )
        if not bool(torch.isfinite(features).all()):
            raise EncoderError(f"{self.path} gives features that are not finite")
        return features

    @abstractmethod
    def _features(self, pictures: np.ndarray) -> torch.Tensor: ...

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """All that decides what the features are: ``kind``, ``sha256``, ``features`` (D), ``input`` [H, W], ``resize``."""


class _ScriptNetwork(FeatureNetwork):
    def __init__(self, path: Path, device: torch.device | str) -> None:
        self.path, self.device = path, torch.device(device)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch writes no such files any more; they stay
                self.module = torch.jit.load(str(path), map_location=self.device).eval()
            arguments = [argument.name for argument in self.module.forward.schema.arguments]
        except (RuntimeError, torch.jit.Error, ValueError, OSError, AttributeError) as error:
            raise EncoderError(
                f"{path} is no TorchScript network: {_first_line(error)}",
                cure="name a file that torch.jit.save wrote, or a CLIP's folder",
            ) from error
        self.options = {"return_features": True} if "return_features" in arguments else {}
        size = getattr(self.module, "input_size", INCEPTION_SIZE if self.options else None)
        if not isinstance(size, int) or size < 1:
            raise EncoderError(
                f"{path} does not say what size of pictures it takes (input_size {size!r})",
                cure="give the scripted module an attribute input_size, pixels of a side",
            )
        self.size = size
        self.sha256 = file_sha256(path)

    @torch.no_grad()
    def _features(self, pictures: np.ndarray) -> torch.Tensor:
        prepared = torch.from_numpy(resized(pictures, self.size)).to(self.device)
        try:
            found = self.module(prepared, **self.options)
        except (RuntimeError, torch.jit.Error) as error:  # torch's, and what the script itself raises
            raise EncoderError(
                f"{self.path} fails on pictures {tuple(prepared.shape)} in [0, 255]: {_first_line(error)}"
            ) from error
        if not isinstance(found, torch.Tensor):
            raise EncoderError(f"{self.path} gives a {type(found).__name__}, not a tensor (B, D)")
        return found.float().cpu()

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "torchscript",
            "sha256": self.sha256,
            "features": self.n_features,
            "input": [self.size, self.size],
            "resize": "bicubic, antialiased, float32",
        }


class _ClipNetwork(FeatureNetwork):
    def __init__(self, path: Path, device: torch.device | str) -> None:
        self.path, self.clip = path, Clip(path, device)

    def _features(self, pictures: np.ndarray) -> torch.Tensor:
        return self.clip.pictures(pictures)

    def describe(self) -> dict[str, Any]:
        resize = "shorter side bicubic, antialiased, 8 bits; centre square"
        return self.clip.describe() | {"features": self.n_features, "resize": resize}


def resized(pictures: np.ndarray, size: int) -> np.ndarray:
    """uint8 (B, H, W, 3) → float32 (B, 3, size, size) in [0, 255]: PIL's bicubic filter, antialiased, channel by channel."""
    planes = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2), dtype=np.float32)
    if planes.shape[2:] == (size, size):
        return planes
    flat = [
        np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.BICUBIC))
        for plane in planes.reshape(-1, *planes.shape[2:])
    ]
    return np.stack(flat).reshape(len(planes), 3, size, size).clip(0.0, 255.0)


def _first_line(error: Exception) -> str:
    """What an error says first; those of TorchScript are pages long and end with what was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[-1 if 'Traceback' in str(error) else 0][:300]}"
