"""Small feature networks, scripted offline: the interface of the Inception that the field passes around, and others."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn


class TinyInception(nn.Module):
    """Pictures in [0, 255] → ``n_features`` numbers where ``return_features``, else scores of three classes."""

    def __init__(self, n_features: int, size: int) -> None:
        super().__init__()
        self.input_size = size
        self.conv = nn.Conv2d(3, n_features, 5, stride=3)
        self.head = nn.Linear(n_features, 3)

    def forward(self, pictures: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        features = torch.relu(self.conv((pictures - 128) / 128)).mean((2, 3))
        if return_features:
            return features
        return torch.softmax(self.head(features), 1)


def tiny_inception(n_features: int = 8, size: int = 24, seed: int = 0) -> TinyInception:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyInception(n_features, size).eval().requires_grad_(False)


def scripted(module: nn.Module, path: Path) -> Path:
    """The module as a TorchScript file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(module), str(path))
    return path
