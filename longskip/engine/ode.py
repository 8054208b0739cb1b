"""The probability-flow ODE of a model (2011.13456, section 4.3), integrated together with its divergence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import RK45
from torch import Tensor

from longskip.engine.diffusion import Ddpm, Objective, Predict
from longskip.errors import LongskipError

DIRECTIONS_AT_ONCE = 32  # derivatives of an exact divergence that are taken in one call of the model


@dataclass(frozen=True)
class Path:
    """dy/du = ``field(y, u)`` from ``start`` (a sample, y = enter·x0) to ``end`` (noise, leave·y ~ N(0, I))."""

    start: float
    end: float
    field: Callable[[Tensor, float], Tensor]
    enter: float
    leave: float


def flow_path(objective: Objective, predict: Predict, start: float) -> Path:
    """y = x_t, u = t: the velocity."""

    def velocity(y: Tensor, u: float) -> Tensor:
        time = y.new_full((len(y),), u)
        return objective.convert(predict(y, time), y, time, objective.group.prediction, "v")

    return Path(start, 1.0, velocity, 1 - start, 1.0)


def ddpm_path(objective: Ddpm, predict: Predict) -> Path:
    """y = x/α, u = log σ/α: dy/du = (σ/α)·ε̂, smooth in u and without a coefficient that stiffens."""
    kept = objective.alphas_cumprod
    last_alpha = float(kept[-1].sqrt())

    def drift(y: Tensor, u: float) -> Tensor:
        log_snr = torch.full((len(y),), -2 * u, dtype=torch.float64, device=y.device)
        x = y * torch.sigmoid(log_snr[0]).sqrt().to(y.dtype)
        time = objective.time_of(log_snr)
        predicted = predict(x, time.to(y.dtype))
        return math.exp(u) * objective.convert(predicted, x, time, objective.group.prediction, "epsilon")

    ends = (torch.log((1 - kept) / kept) / 2)[[0, -1]].tolist()
    return Path(ends[0], ends[1], drift, 1.0, last_alpha)


def solve(path: Path, begin: Tensor, directions: Tensor | None, rtol: float, atol: float) -> tuple[Tensor, Tensor, int]:
    """y at the end, ∫∇·field du (1 or probes, B), both float64 on the CPU, and the number of evaluations."""
    shape, count = begin.shape, len(begin) if directions is None else len(begin) * len(directions)

    def derivative(u: float, state: np.ndarray) -> np.ndarray:
        y = torch.from_numpy(state[: begin.numel()]).view(shape).to(begin)
        slope, divergence = with_divergence(lambda at: path.field(at, u), y, directions)
        joined = torch.cat([slope.double().flatten(), divergence.double().flatten()]).cpu().numpy()
        if not np.isfinite(joined).all():
            raise LongskipError(
                f"the model's prediction or its derivative is not finite at u = {u:.4g} of the likelihood's ODE",
                cure="train longer, or evaluate other weights",
            )
        return joined

    state = np.concatenate([begin.double().flatten().cpu().numpy(), np.zeros(count)])
    solver = RK45(derivative, path.start, state, path.end, rtol=rtol, atol=atol)
    while solver.status == "running":
        message = solver.step()
    if solver.status == "failed":
        raise LongskipError(f"the likelihood's ODE stops at u = {solver.t:.4g}: {message}", cure="raise rtol and atol")
    result = torch.from_numpy(solver.y)
    return result[: begin.numel()].view(shape), result[begin.numel() :].view(-1, len(begin)), solver.nfev


def with_divergence(
    function: Callable[[Tensor], Tensor], y: Tensor, directions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """f(y) and its divergence (1, B), or d·∂f·d for each of ``directions`` (n, B, ...): (n, B)."""

    def along(direction: Tensor) -> tuple[Tensor, Tensor]:
        slope, tangent = torch.func.jvp(function, (y,), (direction,))[:2]
        return slope, tangent

    def derivatives(part: Tensor) -> tuple[Tensor, Tensor]:
        slope, tangents = torch.func.vmap(along, out_dims=(None, 0))(part)  # type: ignore[arg-type]
        return slope, (part * tangents).double().flatten(2).sum(2)

    if directions is not None:
        return derivatives(directions)
    dims, total = y[0].numel(), torch.zeros(1, len(y), dtype=torch.float64, device=y.device)
    for begin in range(0, dims, DIRECTIONS_AT_ONCE):
        part = torch.eye(dims, dtype=y.dtype, device=y.device)[begin : begin + DIRECTIONS_AT_ONCE]
        slope, found = derivatives(part.view(-1, 1, *y.shape[1:]).expand(-1, *y.shape))
        total += found.sum(0)
    return slope, total
