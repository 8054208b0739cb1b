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


def leave_out(engine: Any, optimizer: AdamW) -> None:
    """End a global step without an update: neither weights nor moments nor EMA change, and no gradient is left behind.

    Every rank calls it.
    """
    optimizer.set_step(0, 0.0, 0.0)
    engine.step()


def update(engine: Any, optimizer: AdamW, shards: Shards) -> float:
    """Clip, update, average; returns the global gradient norm before clipping, the same on all ranks.

    Infinity where that norm is not finite: then nothing has moved, and no gradient is left behind.
    """
    if engine.optimizer is optimizer:
        # Stage 0 in fp32: DeepSpeed (0.19) clips without telling the norm, and would take a step of NaN. Everywhere else it
        # leaves such a step out by itself.
        grads = [p.grad for p in shards.parameters if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        if not math.isfinite(norm):
            leave_out(engine, optimizer)
            return math.inf
        engine.step()
        return norm
    engine.step()
    norm = float(engine.get_global_grad_norm())
    return math.inf if getattr(engine.optimizer, "overflow", False) or not math.isfinite(norm) else norm


def disturbed(losses: torch.Tensor, actions: frozenset[Action]) -> tuple[torch.Tensor, torch.Tensor]:
    """(what is differentiated, what is reported) of per-sample ``losses`` under the fault actions ``nan``, ``inf_grad``."""
    if "nan" in actions:
        losses = losses * math.nan
    if "inf_grad" in actions:  # in two factors, which fp32 holds
        return losses * 1e38 * 1e38, losses
    return losses, losses
