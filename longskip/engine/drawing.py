"""Pictures from prompts: noise by (seed, prompt), guidance, sampler; the same whatever the batch or the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from longskip.engine.config import DiffusionGroup, EvalGroup
from longskip.engine.data.draws import generator
from longskip.engine.diffusion import Objective
from longskip.engine.inputs import Inputs
from longskip.engine.samplers import integrate, resolve_sampler
from longskip.errors import LongskipError


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn; every result names it."""

    sampler: str = "euler"
    steps: int = 25
    guidance: float = 3.0
    seed: int = 0

    @classmethod
    def of(
        cls,
        group: EvalGroup,
        diffusion: DiffusionGroup,
        *,
        sampler: str | None,
        steps: int | None,
        guidance: float | None,
        seed: int,
    ) -> Drawing:
        """What is given, and the configuration's ``eval`` group for the rest.

        Raises ConfigError for a sampler that is unknown or does not go with the objective.
        """
        chosen = group.guidance if guidance is None else guidance
        name = resolve_sampler(sampler or group.sampler, diffusion.objective)
        return cls(name, steps or group.sample_steps, chosen, seed)

    def to_json(self) -> dict[str, Any]:
        return {"sampler": self.sampler, "steps": self.steps, "guidance": self.guidance, "seed": self.seed}


def prompt_noise(seed: int, prompt: str, repeat: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 of ``shape`` (C, H, W), a function of seed, prompt and the picture's number for it."""
    return generator(seed, 0, repeat, f"draw/{prompt}").standard_normal(shape, dtype=np.float32)


def repeats_of(prompts: Sequence[str]) -> list[int]:
    """For each prompt how often it stood before: equal prompts in a list give different pictures."""
    seen: dict[str, int] = {}
    numbers = []
    for prompt in prompts:
        numbers.append(seen.get(prompt, 0))
        seen[prompt] = numbers[-1] + 1
    return numbers


@torch.no_grad()
def draw(
    model: Callable[..., torch.Tensor],
    objective: Objective,
    inputs: Inputs,
    prompts: Sequence[str],
    repeats: Sequence[int],
    how: Drawing,
) -> np.ndarray:
    """One picture per prompt as uint8 (B, H, W, 3).

    ``model(latents (B,C,H,W), time (B,), **conditions)`` predicts. Raises TextTooLongError or ConfigError for a prompt
    that the encoder does not take, LongskipError when the result is not finite.
    """
    pairs = zip(prompts, repeats, strict=True)
    noise = np.stack([prompt_noise(how.seed, prompt, repeat, inputs.latent_shape) for prompt, repeat in pairs])
    told = inputs.texts.conditions(prompts, inputs.device)
    empty = inputs.texts.conditions([""] * len(prompts), inputs.device)

    def conditional(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return model(latents, time, **told)

    def unconditional(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return model(latents, time, **empty)

    latents = integrate(
        objective,
        conditional,
        unconditional if told else None,
        torch.from_numpy(noise).to(inputs.device),
        sampler=how.sampler,
        steps=how.steps,
        guidance=how.guidance,
    )
    if not bool(torch.isfinite(latents).all()):
        raise LongskipError("the drawn pictures are not finite", cure="train longer, or draw with --weights raw")
    return inputs.to_pictures(latents)
