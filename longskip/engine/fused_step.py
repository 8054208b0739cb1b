"""Clipping and the low-precision write-back inside the optimizer kernel's one pass, under DeepSpeed's ZeRO.

DeepSpeed's ZeRO optimizers (0.19) multiply a shard's gradients by the clip factor in ``unscale_and_clip_grads`` and, at
stage 3, copy the new fp32 shard into the bf16 one in ``_reassign_or_swap_out_partitioned_parameters``: two more passes over
memory round an optimizer that has read and written it all already. ``take_over`` replaces these two methods on one
engine's optimizer object: the first hands our AdamW the factor, as a tensor that the host does not wait for, the second
finds the bf16 shard written. The factor is DeepSpeed's own, to the bit. At stages 1 and 2 the write-back is a line inside
DeepSpeed's ``step`` and stays there; at stage 0 and with offloaded optimizer states everything stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch

from longskip.engine.optim import AdamW
from longskip.kernels import backends


def wanted(device: torch.device) -> bool:
    """Whether the optimizer's step on ``device`` is the fused kernel's."""
    return backends.choices(device)["adamw"][0] == "triton"


def take_over(engine: Any, optimizer: AdamW, stage: int) -> None:
    """Let ``optimizer`` clip (stages 1–3) and write the low-precision shards (stage 3) in its own pass."""
    zero = engine.optimizer
    if stage == 0 or getattr(zero, "offload_optimizer", False) or getattr(zero, "cpu_offload", False):
        return
    if stage == 3:
        _write_back(zero, optimizer)

        def clip_sub_group(sub_group_id: int, total_norm: Any) -> None:
            optimizer.grad_scale = _factor(zero, total_norm)

        zero.unscale_and_clip_grads = clip_sub_group
    else:

        def clip(gradients: Any, total_norm: Any) -> None:
            optimizer.grad_scale = _factor(zero, total_norm)

        zero.unscale_and_clip_grads = clip


def _factor(zero: Any, total_norm: Any) -> float | torch.Tensor:
    """1 / (loss scale · max(1, norm / clip)), by DeepSpeed's arithmetic."""
    if zero.clip_grad <= 0.0:
        return 1.0 / float(zero.loss_scale)
    clip = ((total_norm / zero.loss_scale) + 1e-6) / zero.clip_grad
    factor: torch.Tensor = 1.0 / (torch.clamp(torch.as_tensor(clip), min=1.0) * zero.loss_scale)
    return factor.to(torch.float32)


def _write_back(zero: Any, optimizer: AdamW) -> None:
    masters, lows = zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat
    for master, low in zip(masters, lows, strict=True):
        if low is not None and low.data_ptr() != master.data_ptr() and low.dtype != master.dtype:
            optimizer.copies[id(master)] = low
    copy_over = zero._reassign_or_swap_out_partitioned_parameters

    def reassign(sub_group_id: int) -> None:
        if id(masters[sub_group_id]) in optimizer.written:
            optimizer.written.discard(id(masters[sub_group_id]))
            zero._unflatten_partitioned_parameters(sub_group_id)
        else:  # no step was taken: DeepSpeed rehearses one while it is set up
            copy_over(sub_group_id)

    zero._reassign_or_swap_out_partitioned_parameters = reassign
