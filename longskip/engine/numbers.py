"""Steps that move nothing: where a loss or a gradient is NaN or infinite on one rank, no weight changes on any.

DeepSpeed's own step is run to its end all the same, with the optimizer held still, so that every gradient which it keeps
(accumulated, partitioned, in host memory) is cleared by the code that knows where they are, at every ZeRO stage alike.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from longskip.engine.faults import Action
from longskip.engine.optim import AdamW
from longskip.engine.shards import Shards


def guard(engine: Any, optimizer: AdamW, stage: int) -> None:
    """Hold ``optimizer`` still at ZeRO stages 1 and 2 whenever the gradient norm that DeepSpeed found is not finite.

    DeepSpeed (0.19) leaves such a step out by itself at stage 3, at stage 0 in bf16, and at stages 1 and 2 in fp32 alone. In
    bf16 it clips by that norm there: finite gradients become 0, infinite ones NaN, and so do their weights.
    """
    if stage not in (1, 2):
        return
    zero = engine.optimizer
    clip = zero.unscale_and_clip_grads

    def unscale_and_clip(gradients: Any, total_norm: Any) -> None:
        if not _is_norm(float(total_norm)):
            hold(optimizer)
        clip(gradients, total_norm)

    zero.unscale_and_clip_grads = unscale_and_clip


def hold(optimizer: AdamW) -> None:
    """The next step of ``optimizer`` changes nothing: neither weights nor moments nor EMA."""
    optimizer.set_step(0, 0.0, 0.0)


def leave_out(engine: Any, optimizer: AdamW) -> None:
    """End a global step without an update; no gradient of it is left behind. Every rank calls it."""
    hold(optimizer)
    engine.step()


def update(engine: Any, optimizer: AdamW, shards: Shards) -> float:
    """Clip, update, average; returns the global gradient norm before clipping, the same on all ranks.

    Infinity where that norm is not finite: then nothing has moved, and no gradient is left behind.
    """
    if engine.optimizer is optimizer:
        # Stage 0 in fp32: DeepSpeed clips without telling the norm, and would take a step of NaN.
        grads = [p.grad for p in shards.parameters if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        if not _is_norm(norm):
            leave_out(engine, optimizer)
            return math.inf
        engine.step()
        return norm
    engine.step()
    norm = float(engine.get_global_grad_norm())
    return math.inf if getattr(engine.optimizer, "overflow", False) or not _is_norm(norm) else norm


def _is_norm(norm: float) -> bool:
    """DeepSpeed's sentinel for a norm that is not finite is −1."""
    return math.isfinite(norm) and norm >= 0


def disturbed(losses: torch.Tensor, actions: frozenset[Action]) -> tuple[torch.Tensor, torch.Tensor]:
    """(what is differentiated, what is reported) of per-sample ``losses`` under the fault actions ``nan``, ``inf_grad``."""
    if "nan" in actions:
        losses = losses * math.nan
    if "inf_grad" in actions:  # in two factors, which fp32 holds
        return losses * 1e38 * 1e38, losses
    return losses, losses
