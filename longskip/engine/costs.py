"""What one optimizer step costs: exact FLOPs and tokens, by the closed forms of the model's spec."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longskip.engine.config import BatchPlan, Config
from longskip.engine.profiled import step_of

COUNTERS = ("images", "image_tokens", "tokens", "model_flops", "hardware_flops", "six_nd")


FEW_IMAGE_TOKENS = 4


def few_image_tokens(config: Config) -> str | None:
    """A warning where a picture is fewer tokens than attention can learn from, as small latents and large patches make."""
    spec, factor = config.backbone(), config.factor
    sizes = [(height // factor, width // factor) for height, width in config.buckets] or [spec.latent_size]
    tokens, (height, width) = min((math.prod(spec.grid(size)), size) for size in sizes)
    if tokens >= FEW_IMAGE_TOKENS:
        return None
    return (
        f"few image tokens  {tokens} of patch {spec.patch} in {height}x{width} {'latents' if factor > 1 else 'pixels'}: "
        f"attention has hardly anything to look at; set model.patch below {spec.patch}, or a larger model.resolution"
    )


@dataclass(frozen=True)
class StepCost:
    """What one optimizer step of the global batch costs."""

    images: int
    image_tokens: int
    tokens: int
    model_flops: int
    hardware_flops: int
    six_nd: int

    def counts(self) -> dict[str, int]:
        return {counter: getattr(self, counter) for counter in COUNTERS}


def step_cost(
    config: Config,
    batch: BatchPlan,
    n_parameters: int,
    bucket: tuple[int, int] | None = None,
    kernels: Mapping[str, str] | None = None,
    encoders: Mapping[str, Mapping[str, Any]] | None = None,
) -> StepCost:
    """Exact model and hardware FLOPs (2 per multiply-add) and tokens of one global batch; N counts all trainables.

    ``bucket`` (H, W) in pixels stands for a batch of another aspect ratio than the configuration's resolution.
    ``kernels``: op → what serves it, which hardware FLOPs hang on (see ``flop_ledger``); torch's by default.
    ``encoders``: the config.json of the frozen encoders that run in the step, by ``vae`` and ``text``.
    """
    spec = config.backbone()
    latent_size = (bucket[0] // config.factor, bucket[1] // config.factor) if bucket else spec.latent_size
    one = spec.flops(1, latent_size)
    ledger = step_of(config, encoders or {}, kernels).ledger(latent_size=latent_size)
    return StepCost(
        images=batch.total,
        image_tokens=batch.total * one.image_tokens,
        tokens=batch.total * one.tokens,
        model_flops=batch.total * ledger.model_flops,
        hardware_flops=batch.total * ledger.hardware_flops,
        six_nd=6 * n_parameters * batch.total * one.tokens,
    )
