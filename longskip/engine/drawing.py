"""Pictures from prompts: noise by (seed, prompt), guidance, sampler; the same whatever the batch or the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np
import torch

from longskip.engine.config import EvalGroup
from longskip.engine.data.draws import generator
from longskip.engine.data.tokens import Vocabulary
from longskip.engine.diffusion import Flow, guided
from longskip.engine.samplers import SamplerName, integrate
from longskip.errors import ConfigError, LongskipError


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn; every result names it."""

    sampler: SamplerName = "euler"
    steps: int = 25
    guidance: float = 3.0
    seed: int = 0

    @classmethod
    def of(
        cls, group: EvalGroup, *, sampler: str | None, steps: int | None, guidance: float | None, seed: int
    ) -> Drawing:
        """What is given, and the configuration's ``eval`` group for the rest; ConfigError for an unknown sampler."""
        name = sampler or group.sampler
        if name not in get_args(SamplerName):
            raise ConfigError(f"sampler {name!r}", cure=f"one of {', '.join(get_args(SamplerName))}")
        chosen = group.guidance if guidance is None else guidance
        return cls(cast("SamplerName", name), steps or group.sample_steps, chosen, seed)

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
    flow: Flow,
    vocabulary: Vocabulary,
    prompts: Sequence[str],
    repeats: Sequence[int],
    how: Drawing,
    *,
    n_txt: int,
    shape: tuple[int, int, int],
    device: torch.device,
    truncate: bool = False,
) -> np.ndarray:
    """One picture per prompt as uint8 (B, H, W, 3).

    ``model(latents (B,C,H,W), time (B,), tokens (B,n_txt) or None)`` predicts. Raises TextTooLongError for a prompt that
    the encoder does not take, LongskipError when the result is not finite.
    """
    noise = np.stack([prompt_noise(how.seed, p, r, shape) for p, r in zip(prompts, repeats, strict=True)])
    tokens = empty = None
    if n_txt:
        encoded = np.stack([vocabulary.encode(prompt, n_txt, truncate=truncate) for prompt in prompts])
        tokens = torch.from_numpy(encoded).to(device)
        empty = torch.from_numpy(vocabulary.encode("", n_txt)).to(device).expand(len(prompts), n_txt)

    def conditional(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return model(latents, time, tokens)

    def unconditional(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return model(latents, time, empty)

    velocity = guided(flow, conditional, unconditional if n_txt else None, how.guidance)
    latents = integrate(velocity, torch.from_numpy(noise).to(device), sampler=how.sampler, steps=how.steps)
    if not bool(torch.isfinite(latents).all()):
        raise LongskipError("the drawn pictures are not finite", cure="train longer, or draw with --weights raw")
    return to_pictures(latents)


def to_pictures(latents: torch.Tensor) -> np.ndarray:
    """Pixel-space latents (B, 3, H, W) in [−1, 1] → uint8 (B, H, W, 3)."""
    scaled = ((latents.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).cpu().numpy()
