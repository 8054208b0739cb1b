"""What is learnt: rectified flow, and the discrete diffusion of DDPM on Stable Diffusion's schedule.

Both noise a clean sample as x_t = α(t)·x0 + σ(t)·ε and give the model the time t (B,) in [0, 1]. With SNR = α²/σ² a model
predicts one of three things, which are the same knowledge at 0 < t < 1:

    x         x0
    epsilon   ε
    v         flow: ε − x0 = dx_t/dt;   DDPM: α·ε − σ·x0 (2202.00512)

min-SNR weighting (2303.09556) bounds the weight of x0's squared error by γ: it is min(SNR, γ) whatever is predicted, so

    DDPM   x: min(SNR, γ)     epsilon: min(SNR, γ)/SNR     v: min(SNR, γ)/(SNR + 1) = σ²·min(SNR, γ)
    flow   v: t²·min(SNR, γ) = min((1−t)², γ·t²), as a velocity's squared error is that of x0 divided by t²
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeVar

import torch
from torch import Tensor

from longskip.engine.config import DiffusionGroup
from longskip.kernels.loss import diffusion_loss

Predict = Callable[[Tensor, Tensor], Tensor]
Kind = Literal["v", "x", "epsilon"]
Time = TypeVar("Time", float, Tensor)


def objective_of(group: DiffusionGroup) -> Objective:
    """The objective that a configuration's ``diffusion`` group names."""
    return Ddpm(group) if group.objective == "ddpm" else Flow(group)


@dataclass(frozen=True)
class Objective(ABC):
    """How times are drawn, what is predicted and how the loss weighs it. Samples are (B, ...), times (B,) in [0, 1]."""

    group: DiffusionGroup

    @abstractmethod
    def times(self, normal: Tensor) -> Tensor:
        """Standard normal draws (B,) → training times (B,)."""

    @abstractmethod
    def spread(self, uniform: Tensor) -> Tensor:
        """Uniform numbers (B,) in (0, 1) → times that cover [0, 1] evenly, as validation looks at them."""

    @abstractmethod
    def alpha_sigma(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ at times (B,), each (B,) in float64."""

    @abstractmethod
    def noised(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """x_t = α·clean + σ·noise."""

    @abstractmethod
    def loss(self, prediction: Tensor, clean: Tensor, noise: Tensor, time: Tensor, weight: Tensor) -> Tensor:
        """Losses (B,) in fp32, mean squared errors times ``weight`` (B,), which is 0 for bad samples."""

    def convert(self, prediction: Tensor, latents: Tensor, time: Tensor, source: Kind, to: Kind) -> Tensor:
        """What a prediction of kind ``source`` at x_t = ``latents`` says of ``to``.

        From x it takes σ > 0, from epsilon α > 0: at the other end that prediction says nothing.
        """
        if source == to:
            return prediction
        return self._from_v(self._to_v(prediction, latents, time, source), latents, time, to)

    @abstractmethod
    def _to_v(self, prediction: Tensor, latents: Tensor, time: Tensor, source: Kind) -> Tensor: ...

    @abstractmethod
    def _from_v(self, v: Tensor, latents: Tensor, time: Tensor, to: Kind) -> Tensor: ...


class Flow(Objective):
    """Rectified flow: α = 1−t, σ = t, logit-normal times (SD3, 2403.03206; 2410.08184), v or x predicted.

    Times are shifted for higher resolutions, t → s·t/(1 + (s−1)·t), in training and on the samplers' grids (2403.03206,
    section 5.3.2). The loss is the velocity's squared error; for an x-prediction that is x0's divided by
    max(t, ``time_floor``)².
    """

    def times(self, normal: Tensor) -> Tensor:
        """Logit-normal times (B,) in (0, 1), shifted."""
        return self.shifted(torch.sigmoid(self.group.time_mean + self.group.time_std * normal))

    def shifted(self, time: Time) -> Time:
        """The resolution shift of a time or times; unchanged, to the bit, for shift 1."""
        shift = self.group.shift
        return time if shift == 1.0 else shift * time / (1 + (shift - 1) * time)

    def spread(self, uniform: Tensor) -> Tensor:
        """The numbers themselves; unshifted, so that runs of different shifts are compared at the same times."""
        return uniform

    def alpha_sigma(self, time: Tensor) -> tuple[Tensor, Tensor]:
        t = time.double()
        return 1 - t, t

    def noised(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        t = _rows(time, clean)
        return (1 - t) * clean + t * noise

    def loss(self, prediction: Tensor, clean: Tensor, noise: Tensor, time: Tensor, weight: Tensor) -> Tensor:
        kind, floor = self.group.prediction, self.group.time_floor
        if self.group.min_snr is not None:
            # An x-prediction's error is divided by max(t, floor)² in the loss: that is taken out again.
            scale = time.clamp(min=floor) if kind == "x" else time
            weight = weight * scale.square() * ((1 - time) / time).square().clamp(max=self.group.min_snr)
        return diffusion_loss(prediction, clean, noise, time, weight, prediction_kind=kind, time_floor=floor)

    def velocity(self, prediction: Tensor, latents: Tensor, time: Tensor) -> Tensor:
        """dx/dt at x_t and t > 0 by a prediction: itself, or (x_t − x̂)/t."""
        return self.convert(prediction, latents, time, self.group.prediction, "v")

    def _to_v(self, prediction: Tensor, latents: Tensor, time: Tensor, source: Kind) -> Tensor:
        t = _rows(time, latents)
        if source == "x":
            return (latents - prediction) / t
        return (prediction - latents) / (1 - t) if source == "epsilon" else prediction

    def _from_v(self, v: Tensor, latents: Tensor, time: Tensor, to: Kind) -> Tensor:
        t = _rows(time, latents)
        if to == "x":
            return latents - t * v
        return latents + (1 - t) * v if to == "epsilon" else v


class Ddpm(Objective):
    """Denoising diffusion (2006.11239) on Stable Diffusion's schedule: √β linear from √``beta_start`` to √``beta_end``.

    α² = ᾱ_k = ∏_{i ≤ k} (1 − β_i), σ² = 1 − ᾱ_k for the steps k = 0 … T−1; step k is time k/T. Between the steps log SNR
    is linear in time, which training never asks for and likelihood does. The loss is the plain squared error of what is
    predicted, x, epsilon or v.
    """

    @property
    def n_steps(self) -> int:
        return self.group.train_steps

    @property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ (T,) in float64."""
        return alphas_cumprod(self.group.beta_start, self.group.beta_end, self.n_steps)

    def times(self, normal: Tensor) -> Tensor:
        """Steps drawn evenly, as times k/T: the normal distribution function makes the draws uniform."""
        return self.spread(torch.special.ndtr(normal.double())).to(normal.dtype)

    def spread(self, uniform: Tensor) -> Tensor:
        """The step ⌊u·T⌋ as a time."""
        return (uniform * self.n_steps).floor().clamp(0, self.n_steps - 1) / self.n_steps

    def log_snr(self, time: Tensor) -> Tensor:
        """log α²/σ² at times (B,), float64; times outside of the steps 0 … T−1 count as the nearest one."""
        table = self._log_snrs(time.device)
        place = (time.double() * self.n_steps).clamp(0, self.n_steps - 1)
        below = place.floor().long().clamp(max=self.n_steps - 2)
        return torch.lerp(table[below], table[below + 1], place - below)

    def time_of(self, log_snr: Tensor) -> Tensor:
        """The inverse of ``log_snr`` (B,) within the steps 0 … T−1."""
        table = self._log_snrs(log_snr.device)
        below = (torch.searchsorted(-table, -log_snr.double(), right=True) - 1).clamp(0, self.n_steps - 2)
        share = (log_snr - table[below]) / (table[below + 1] - table[below])
        return (below + share.clamp(0, 1)) / self.n_steps

    def alpha_sigma(self, time: Tensor) -> tuple[Tensor, Tensor]:
        log_snr = self.log_snr(time)
        return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()

    def noised(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        alpha, sigma = self._coefficients(clean, time)
        return alpha * clean + sigma * noise

    def loss(self, prediction: Tensor, clean: Tensor, noise: Tensor, time: Tensor, weight: Tensor) -> Tensor:
        kind = self.group.prediction
        alpha, sigma = self._coefficients(clean, time)
        target = {"x": clean, "epsilon": noise}.get(kind)
        if target is None:
            target = alpha * noise - sigma * clean
        if self.group.min_snr is not None:
            snr = self.log_snr(time).exp()
            share = {"x": torch.ones_like(snr), "epsilon": snr, "v": snr + 1}[kind]
            weight = weight * (snr.clamp(max=self.group.min_snr) / share).to(weight.dtype)
        # An x-prediction's loss at time 1 is the plain squared error of whatever its target is.
        return diffusion_loss(prediction, target, noise, torch.ones_like(weight), weight, prediction_kind="x")

    def _to_v(self, prediction: Tensor, latents: Tensor, time: Tensor, source: Kind) -> Tensor:
        alpha, sigma = self._coefficients(latents, time)
        if source == "x":
            return (alpha * latents - prediction) / sigma
        return (prediction - sigma * latents) / alpha if source == "epsilon" else prediction

    def _from_v(self, v: Tensor, latents: Tensor, time: Tensor, to: Kind) -> Tensor:
        alpha, sigma = self._coefficients(latents, time)
        if to == "x":
            return alpha * latents - sigma * v
        return sigma * latents + alpha * v if to == "epsilon" else v

    def _coefficients(self, like: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.alpha_sigma(time)
        return _rows(alpha, like), _rows(sigma, like)

    def _log_snrs(self, device: torch.device) -> Tensor:
        return _log_snrs(self.group.beta_start, self.group.beta_end, self.n_steps, device)


@lru_cache(maxsize=16)
def alphas_cumprod(beta_start: float, beta_end: float, n_steps: int) -> Tensor:
    """ᾱ (T,) in float64 of the scaled-linear schedule."""
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, n_steps, dtype=torch.float64).square()
    return torch.cumprod(1 - betas, 0)


@lru_cache(maxsize=16)
def _log_snrs(beta_start: float, beta_end: float, n_steps: int, device: torch.device) -> Tensor:
    return torch.logit(alphas_cumprod(beta_start, beta_end, n_steps)).to(device)


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """(B,) → (B, 1, …, 1) in the dtype of ``like`` (B, …)."""
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))
