"""The activations of one training step as they really live: what ``profiling.activations`` is held against."""

from __future__ import annotations

from typing import Any

import torch

from longskip import kernels
from longskip.engine.config import DiffusionGroup
from longskip.engine.diffusion import objective_of
from longskip.models.conditioning import Conditioning
from longskip.models.specs import UViTSpec
from longskip.models.uvit import UViT
from tests.live_bytes import LiveBytes


def trace(
    spec: UViTSpec,
    batch: int,
    *,
    checkpointing: int = 0,
    layout: Any = "named",
    backend: str = "torch",
    prediction: Any = "v",
    apart: bool = True,
    size: tuple[int, int] | None = None,
) -> int:
    """The most bytes that live at once in a forward and a backward pass, in float32 on this machine.

    ``apart``: without the gradients of weights; otherwise with them, each dropped as soon as it is there, as a reduction
    bucket takes them over. The model's weights do not count. The model predicts as many channels as it is given.
    """
    model = UViT(spec, layout=layout)
    model.checkpointing = checkpointing
    objective = objective_of(DiffusionGroup(prediction=prediction))
    height, width = size or spec.latent_size
    live = LiveBytes(look_inside=backend == "triton")
    for parameter in model.parameters():
        if apart:
            parameter.register_hook(live.set_apart)
        else:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with kernels.use(backend), live:
        clean = torch.randn(batch, spec.channels, height, width)
        noise, time, weight = torch.randn(clean.shape), torch.rand(batch), torch.ones(batch)
        cond = Conditioning(
            text=torch.randn(batch, spec.n_txt, spec.text_width) if spec.n_txt else None,
            label=torch.zeros(batch, dtype=torch.long) if spec.n_classes else None,
        )
        noised = objective.noised(clean, noise, time)
        out = model(noised, time, cond)
        losses = objective.loss(out, clean, noise, time, weight)
        (losses.sum() / batch).backward()
    return live.peak_apart
