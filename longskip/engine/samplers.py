"""Samplers: from noise to a sample along the probability flow, deterministic, each row by itself.

Euler and Heun for the flow are written here; DDIM (2010.02502) and DPM-Solver++ 2M (2211.01095) are the diffusers
library's, needed for DDPM models and there for the flow (DPM-Solver++) by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longskip.engine.diffusion import Ddpm, Flow, Objective, Predict
from longskip.engine.encoders import library
from longskip.errors import ConfigError

# The samplers of each objective; the first is what ``auto`` means.
SAMPLERS: dict[str, tuple[str, ...]] = {"flow": ("euler", "heun", "dpm++"), "ddpm": ("ddim", "dpm++")}
_OWN = ("euler", "heun")
_LIBRARY_NAMES = {
    "flow": {"v": "flow_prediction", "x": "sample"},
    "ddpm": {"v": "v_prediction", "x": "sample", "epsilon": "epsilon"},
}


def resolve_sampler(name: str, objective: str) -> str:
    """The sampler that ``name`` (``auto`` or one of its own) means for the objective ``flow`` or ``ddpm``.

    Raises ConfigError for a sampler that is unknown or does not go with the objective, naming those that do, and for one
    of diffusers where that is not installed: whoever resolves a sampler at its start is not stopped when it draws.
    """
    fitting = SAMPLERS[objective]
    name = fitting[0] if name == "auto" else name
    if name not in fitting:
        known = any(name in names for names in SAMPLERS.values())
        problem = f"does not go with diffusion.objective {objective}" if known else "is not known"
        raise ConfigError(f"sampler {name!r} {problem}", cure=f"one of auto, {', '.join(fitting)}")
    if name not in _OWN:
        library("diffusers")
    return name


@torch.no_grad()
def integrate(
    objective: Objective,
    predict: Predict,
    predict_empty: Predict | None,
    noise: Tensor,
    *,
    sampler: str,
    steps: int,
    guidance: float,
) -> Tensor:
    """Samples like ``noise`` (B, ...), standard normal, after ``steps`` steps of ``sampler``.

    ``predict(latents (B, ...), time (B,))`` is the model with its captions, ``predict_empty`` with the empty one (None:
    no guidance). Raises ConfigError for a sampler that does not go with the objective and for more steps than a DDPM
    schedule has.
    """
    sampler = resolve_sampler(sampler, objective.group.objective)
    if isinstance(objective, Flow) and sampler != "dpm++":
        empty = velocity_of(objective, predict_empty) if predict_empty is not None else None
        velocity = guided(velocity_of(objective, predict), empty, guidance)
        return _along_flow(objective, velocity, noise, sampler, steps)
    return _by_library(objective, guided(predict, predict_empty, guidance), noise, sampler, steps)


def evaluations(sampler: str, steps: int) -> int:
    """Evaluations of the model with captions that ``integrate`` makes; guidance makes as many without."""
    return 2 * steps - 1 if sampler == "heun" else steps


def guided(predict: Predict, predict_empty: Predict | None, guidance: float) -> Predict:
    """Classifier-free guidance p∅ + g·(p_c − p∅) (2207.12598); g = 1 or no empty caption: plain.

    x, ε and v are affine in one another at a given x_t, so that guidance of any of them is guidance of all.
    """

    def prediction(latents: Tensor, time: Tensor) -> Tensor:
        conditional = predict(latents, time)
        if predict_empty is None or guidance == 1.0:
            return conditional
        empty = predict_empty(latents, time)
        return empty + guidance * (conditional - empty)

    return prediction


def velocity_of(flow: Flow, predict: Predict) -> Predict:
    """The velocity field of a model that predicts what ``flow`` says it does."""

    def velocity(latents: Tensor, time: Tensor) -> Tensor:
        return flow.velocity(predict(latents, time), latents, time)

    return velocity


def _along_flow(flow: Flow, velocity: Predict, noise: Tensor, sampler: str, steps: int) -> Tensor:
    """From t = 1 to t = 0 in steps that are equal before the resolution shift.

    ``euler``: one evaluation a step. ``heun``: the trapezoid rule, two evaluations a step but the last, whose end t = 0
    has no velocity for an x-prediction (2206.00364, algorithm 1).
    """
    times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    x = noise
    for i in range(steps):
        now, then = flow.shifted(float(times[i])), flow.shifted(float(times[i + 1]))
        v = velocity(x, _filled(x, now))
        following = x + (then - now) * v
        if sampler == "heun" and then > 0:
            v = 0.5 * (v + velocity(following, _filled(x, then)))
            following = x + (then - now) * v
        x = following
    return x


def _by_library(objective: Objective, prediction: Predict, noise: Tensor, sampler: str, steps: int) -> Tensor:
    scheduler, times = _scheduler(objective, sampler, steps)
    x = noise
    for step, time in zip(scheduler.timesteps, times, strict=True):
        # The scheduler answers in the prediction's dtype, which a bf16 model must not lower.
        x = scheduler.step(prediction(x, _filled(x, time)).to(x.dtype), step, x, return_dict=False)[0]
    return x


def _scheduler(objective: Objective, sampler: str, steps: int) -> tuple[Any, list[float]]:
    """diffusers' scheduler, set to ``steps`` steps, and the time that the model is given at each of them."""
    diffusers = library("diffusers")
    predicted = _LIBRARY_NAMES[objective.group.objective][objective.group.prediction]
    scheduler: Any
    if not isinstance(objective, Ddpm):
        # The library's grid begins at t = 0.999, where its log SNR is finite; the noise is taken for x there.
        scheduler = diffusers.DPMSolverMultistepScheduler(
            prediction_type=predicted, use_flow_sigmas=True, flow_shift=objective.group.shift
        )
        scheduler.set_timesteps(steps)
        scheduler.set_begin_index(0)  # the library's integer time steps may repeat
        return scheduler, scheduler.sigmas[:-1].tolist()
    if steps > objective.n_steps:
        raise ConfigError(
            f"{steps} sampler steps of a schedule of {objective.n_steps}",
            cure=f"at most diffusion.train_steps, {objective.n_steps}",
        )
    # The scheduler is given the chosen steps as a schedule of its own, of which it makes every step: DDIMScheduler takes
    # the next step to be ⌊T/steps⌋ away, which is another than the one it visits where steps does not divide T.
    chosen = trailing(objective.n_steps, steps)
    kept = objective.alphas_cumprod[chosen]
    betas = 1 - kept / torch.cat([torch.ones(1, dtype=kept.dtype), kept[:-1]])
    own: dict[str, Any] = {
        "num_train_timesteps": steps,
        "trained_betas": betas.tolist(),
        "prediction_type": predicted,
        "timestep_spacing": "trailing",
    }
    if sampler == "ddim":
        scheduler = diffusers.DDIMScheduler(**own, clip_sample=False, set_alpha_to_one=True)
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(**own)
    scheduler.set_timesteps(steps)
    return scheduler, [k / objective.n_steps for k in reversed(chosen)]


def trailing(n_steps: int, steps: int) -> list[int]:
    """``steps`` of the steps 0 … n_steps−1, ascending, evenly spaced and with the last, the noisiest (2305.08891)."""
    return [round(n_steps * (i + 1) / steps) - 1 for i in range(steps)]


def _filled(x: Tensor, value: float) -> Tensor:
    return torch.full((x.shape[0],), value, dtype=torch.float32, device=x.device)
