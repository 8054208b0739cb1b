"""Rectified flow: x_t = (1−t)·x0 + t·ε, v = ε − x0, logit-normal times (SD3, 2403.03206; 2410.08184)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from longskip.engine.config import DiffusionGroup
from longskip.kernels.loss import diffusion_loss

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Flow:
    """The objective of a configuration: how times are drawn, what is predicted, how a prediction becomes a velocity."""

    group: DiffusionGroup

    def times(self, normal: torch.Tensor) -> torch.Tensor:
        """Standard normal draws (B,) → logit-normal times (B,) in (0, 1)."""
        return torch.sigmoid(self.group.time_mean + self.group.time_std * normal)

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """x_t of clean and noise (B, C, H, W) at times (B,)."""
        t = time.view(-1, 1, 1, 1)
        return (1 - t) * clean + t * noise

    def loss(
        self,
        prediction: torch.Tensor,
        clean: torch.Tensor,
        noise: torch.Tensor,
        time: torch.Tensor,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        """Per-sample losses (B,), fp32, mean squared error of the velocity; ``weight`` (B,) is 0 for bad samples."""
        return diffusion_loss(
            prediction,
            clean,
            noise,
            time,
            weight,
            prediction_kind=self.group.prediction,
            time_floor=self.group.time_floor,
        )

    def velocity(self, prediction: torch.Tensor, latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """The velocity that a prediction (B, C, H, W) at x_t and t > 0 stands for: itself, or (x_t − x̂)/t."""
        if self.group.prediction == "v":
            return prediction
        return (latents - prediction) / time.view(-1, 1, 1, 1)


def guided(flow: Flow, predict: Predict, predict_empty: Predict | None, guidance: float) -> Predict:
    """Velocity with classifier-free guidance v∅ + g·(v_c − v∅) (2207.12598); g = 1 or no empty caption: plain."""

    def velocity(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        conditional = flow.velocity(predict(latents, time), latents, time)
        if predict_empty is None or guidance == 1.0:
            return conditional
        empty = flow.velocity(predict_empty(latents, time), latents, time)
        return empty + guidance * (conditional - empty)

    return velocity
