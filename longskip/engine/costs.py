"""What one optimizer step costs: exact FLOPs and tokens, by the closed forms of the model's spec."""

from __future__ import annotations

from dataclasses import dataclass

from longskip.engine.config import BatchPlan, Config

COUNTERS = ("images", "image_tokens", "tokens", "model_flops", "hardware_flops", "six_nd")


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


def step_cost(config: Config, batch: BatchPlan, n_parameters: int, bucket: tuple[int, int] | None = None) -> StepCost:
    """Exact model and hardware FLOPs (2 per multiply-add) and tokens of one global batch; N counts all trainables.

    ``bucket`` (H, W) in pixels stands for a batch of another aspect ratio than the configuration's resolution.
    """
    spec = config.backbone()
    latent_size = (bucket[0] // config.factor, bucket[1] // config.factor) if bucket else spec.latent_size
    one = spec.flops(1, latent_size)
    hardware = spec.hardware_flops(
        1, config.engine.checkpointing, latent_size, trained_text=not config.encoders.text.frozen
    )
    return StepCost(
        images=batch.total,
        image_tokens=batch.total * one.image_tokens,
        tokens=batch.total * one.tokens,
        model_flops=batch.total * one.model_flops,
        hardware_flops=batch.total * hardware,
        six_nd=6 * n_parameters * batch.total * one.tokens,
    )
