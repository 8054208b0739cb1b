"""AdamW with the weights' EMA in the same pass over flat shards, its parameter groups, and the schedules.

The optimizer is a client optimizer to DeepSpeed: at ZeRO stages 1–3 it is handed the rank's own flat fp32 slices, so its
moments and its EMA are sharded as the weights are. Step number, learning rate and EMA decay are set from the loop's
counters before every step; nothing but the three tensors per slice has to be saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from longskip.engine.config import OptimGroup
from longskip.kernels.adamw import adamw

STATES = ("exp_avg", "exp_avg_sq", "ema")


class AdamW(torch.optim.Optimizer):
    """AdamW (decoupled decay, ε outside the root; 1711.05101) and EMA over lists of fp32 tensors by ``kernels.adamw``.

    ``ema_device``: where the EMA lives; None is beside the weights. In host memory it costs no memory of the device and
    one copy of the rank's weights a step.
    """

    def __init__(self, params: Iterable[Any], optim: OptimGroup, ema_device: torch.device | None = None) -> None:
        self.optim, self.ema_device = optim, ema_device
        # Set by fused_step.take_over: the factor of the next step's gradients, the low-precision shard of each parameter
        # (by id), and the parameters whose shard the last steps have written.
        self.grad_scale: float | torch.Tensor = 1.0
        self.copies: dict[int, torch.Tensor] = {}
        self.written: set[int] = set()
        # A learning rate of zero until the loop sets it: building an engine must not move a weight.
        super().__init__(params, {"lr": 0.0, "weight_decay": 0.0, "step": 0, "ema_decay": 0.0})

    def set_step(self, step: int, lr: float, ema_decay: float) -> None:
        """What the next ``step()`` uses: the 1-based step count, learning rate and EMA decay."""
        for group in self.param_groups:
            group["step"], group["lr"], group["ema_decay"] = step, lr, ema_decay

    def state_of(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        """The moments and EMA of ``p``, made on first use (EMA starts as the weights)."""
        state = self.state[p]
        if "ema" not in state:
            data = p.detach()
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(data), torch.zeros_like(data)
            state["ema"] = data.to(self.ema_device or data.device, copy=True)
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params or group["step"] == 0:  # DeepSpeed's rehearsal step before the loop has set anything
                continue
            states = [self.state_of(p) for p in params]
            emas = [s["ema"] for s in states]
            copies = [self.copies[id(p)] for p in params if id(p) in self.copies]
            adamw(
                [p.data for p in params],
                [p.grad for p in params],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                lr=group["lr"],
                betas=self.optim.betas,
                eps=self.optim.eps,
                weight_decay=group["weight_decay"],
                step=group["step"],
                grad_scale=self.grad_scale,
                copies=copies or None,
                emas=None if self.ema_device else emas,
                ema_decay=group["ema_decay"],
            )
            self.written.update(id(p) for p in params if id(p) in self.copies)
            if self.ema_device:
                moved = [p.detach().to(self.ema_device) for p in params]
                torch._foreach_lerp_(emas, moved, 1.0 - group["ema_decay"])


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, with and without decay, of the model's parameters (flat or named; by each table's ``decay``)."""
    decays: dict[int, bool] = {}
    order: list[torch.nn.Parameter] = []
    for unit in model.units():  # type: ignore[operator]
        specs = unit.specs()
        for name, parameter, _, _ in unit.canonical():
            if id(parameter) not in decays:
                decays[id(parameter)] = specs[name].decay
                order.append(parameter)
    groups = [
        {"params": [p for p in order if decays[id(p)]], "weight_decay": weight_decay},
        {"params": [p for p in order if not decays[id(p)]], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(optim: OptimGroup, step: int, steps: int) -> float:
    """Learning rate of 1-based ``step``: linear warm-up, then constant or half a cosine down to ``final_lr_share``."""
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return optim.lr * (optim.final_lr_share + (1 - optim.final_lr_share) * cosine)


def ema_decay(optim: OptimGroup, step: int) -> float:
    """Decay at 1-based ``step``; with warm-up min(decay, (1 + step)/(10 + step)), so that early weights are forgotten."""
    return min(optim.ema_decay, (1 + step) / (10 + step)) if optim.ema_warmup else optim.ema_decay
