"""Data whose optimal denoiser and density are known in closed form: mixtures of Gaussians, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longskip.engine.diffusion import Objective, Predict


class Mixture:
    """Σ_k w_k·N(μ_k, Σ_k) over D values; samples (B, D)."""

    def __init__(self, weights: list[float], means: list[list[float]], covariances: list[list[list[float]]]) -> None:
        self.log_weights = torch.tensor(weights, dtype=torch.float64).log()
        self.means = torch.tensor(means, dtype=torch.float64)  # (K, D)
        self.variances, self.axes = torch.linalg.eigh(
            torch.tensor(covariances, dtype=torch.float64)
        )  # (K, D), (K, D, D)

    @classmethod
    def gaussian(cls, mean: list[float], covariance: list[list[float]]) -> Mixture:
        return cls([1.0], [mean], [covariance])

    @classmethod
    def isotropic(cls, mean: float, std: float, dims: int) -> Mixture:
        return cls.gaussian([mean] * dims, (std**2 * torch.eye(dims)).tolist())

    def components(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """At x_t (B, D): log w_k + log N(x_t; α·μ_k, α²·Σ_k + σ²) (B, K), and E[x0|x_t, k] (B, K, D)."""
        a, s = alpha.view(-1, 1, 1), sigma.view(-1, 1, 1)
        along = torch.einsum("bkd,kde->bke", x[:, None] - a * self.means, self.axes)  # in the components' axes
        spread = a.square() * self.variances + s.square()
        log_density = -0.5 * (along.square() / spread + spread.log() + math.log(2 * math.pi)).sum(-1)
        posterior = self.means + torch.einsum("bke,kde->bkd", a * self.variances / spread * along, self.axes)
        return self.log_weights + log_density, posterior

    def denoised(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x0|x_t], what the optimal x-prediction is."""
        log_density, posterior = self.components(x, alpha, sigma)
        return (log_density.softmax(1)[..., None] * posterior).sum(1)

    def log_density(self, x: Tensor, blur: float = 0.0) -> Tensor:
        """log p of x (B, D) plus noise of standard deviation ``blur``."""
        one = torch.ones(len(x), dtype=torch.float64)
        return self.components(x, one, blur * one)[0].logsumexp(1)

    def sample(self, count: int, seed: int) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.log_weights.exp(), count, replacement=True, generator=rng)
        noise = torch.randn(count, self.means.shape[1], dtype=torch.float64, generator=rng)
        return self.means[which] + torch.einsum("bde,be->bd", self.axes[which], self.variances[which].sqrt() * noise)

    def predictor(self, objective: Objective) -> Predict:
        """The optimal model of what the objective predicts; x, ε and v written out by their definitions."""

        def predict(x: Tensor, time: Tensor) -> Tensor:
            alpha, sigma = objective.alpha_sigma(time)
            clean = self.denoised(x.double(), alpha, sigma)
            a, s = alpha.view(-1, 1), sigma.view(-1, 1)
            kind, flow = objective.group.prediction, objective.group.objective == "flow"
            if kind == "x":
                return clean
            # The flow's noise at t = 0 is not known from x_t: its limit is not asked for.
            noise = (x - a * clean) / s
            if kind == "epsilon":
                return noise
            return noise - clean if flow else a * noise - s * clean

        return predict
