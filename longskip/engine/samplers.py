"""Samplers for the flow's ordinary differential equation dx/dt = v(x, t), from noise at t = 1 to a picture at t = 0."""

from __future__ import annotations

from typing import Literal

import torch

from longskip.engine.diffusion import Predict

SamplerName = Literal["euler", "heun"]


@torch.no_grad()
def integrate(velocity: Predict, noise: torch.Tensor, *, sampler: SamplerName, steps: int) -> torch.Tensor:
    """Latents (B, C, H, W) at t = 0 from ``noise`` at t = 1 in ``steps`` equal steps.

    ``euler``: one evaluation a step. ``heun``: the trapezoid rule, two evaluations a step but the last, whose end t = 0
    has no velocity for an x-prediction (2206.00364, algorithm 1).
    """
    times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    x = noise
    for i in range(steps):
        now, then = float(times[i]), float(times[i + 1])
        v = velocity(x, _filled(x, now))
        following = x + (then - now) * v
        if sampler == "heun" and then > 0:
            v = 0.5 * (v + velocity(following, _filled(x, then)))
            following = x + (then - now) * v
        x = following
    return x


def evaluations(sampler: SamplerName, steps: int) -> int:
    """Velocity evaluations that ``integrate`` makes."""
    return steps if sampler == "euler" else 2 * steps - 1


def _filled(x: torch.Tensor, value: float) -> torch.Tensor:
    return torch.full((x.shape[0],), value, dtype=torch.float32, device=x.device)
