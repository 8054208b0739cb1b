"""The memory of a real rank: everything that lives in DeepSpeed's engine, between steps and at its worst moments."""

from __future__ import annotations

import gc
from typing import Any

import torch

from longskip.engine import build
from longskip.engine.config import Config
from longskip.engine.diffusion import objective_of
from longskip.engine.distributed import World
from longskip.engine.fitting import shape_of
from longskip.profiling.memory import RankMemory, rank_memory
from longskip.profiling.traffic import Zero
from tests.live_bytes import LiveBytes

WORDS = 100  # of the vocabulary
STEPS = 3  # from the second on DeepSpeed knows the order of the modules


def predicted(config: Config, world: World, **changes: Any) -> RankMemory:
    """What is foretold of this rank on this machine, where DeepSpeed does not overlap communication."""
    given: dict[str, Any] = {"world": world.size, "micro": config.batch(world.size).micro, "rank": world.rank}
    stage: Any = config.deepspeed.zero_stage
    found = shape_of(config, WORDS, accumulation=config.batch(world.size).accumulation)
    return rank_memory(**found | given | {"stage": stage, "zero": Zero(overlap=False)} | changes)


def traced(config: Config, world: World) -> dict[str, int]:
    """Bytes that live after the backward pass (``standing``) of the last of ``STEPS`` steps, and the most within its
    forward and backward passes (``passes``) and its step (``step``)."""
    batch, spec = config.batch(world.size), config.backbone()
    model = build.build_model(config, WORDS)
    settings = build.deepspeed_config(
        config, batch, n_parameters=sum(p.numel() for p in model.parameters()), cuda=False
    )
    objective, live = objective_of(config.diffusion), LiveBytes()
    with live:
        engine, optimizer, _ = build.build_engine(config, model, world, settings)
    found: dict[str, int] = {}
    for step in range(1, STEPS + 1):
        optimizer.set_step(step, 1e-3, 0.9)
        live.peak = 0
        for micro in range(batch.accumulation):
            with live:
                passes(engine, objective, spec, batch.micro)
            if micro == batch.accumulation - 1:
                gc.collect()
                found = {"standing": live.now(), "passes": live.peak}
                live.peak = 0
            with live:
                engine.step()
        found["step"] = live.peak
    return found


def passes(engine: Any, objective: Any, spec: Any, micro: int) -> None:
    """Forward and backward of one micro-batch, as the training loop calls them."""
    clean = torch.randn(micro, spec.channels, *spec.latent_size)
    noise, time, weight = torch.randn(clean.shape), torch.rand(micro), torch.ones(micro)
    given: dict[str, Any] = {"tokens": torch.zeros(micro, spec.n_txt, dtype=torch.long)} if spec.n_txt else {}
    noised = objective.noised(clean, noise, time)
    prediction = engine(noised, time, **given)
    losses = objective.loss(prediction, clean, noise, time, weight)
    engine.backward(losses.sum() / micro)
