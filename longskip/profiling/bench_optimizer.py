"""``bench kernels``: the optimizer step over flat shards, with clipping, weight average and the bfloat16 copy.

Every provider does the same step: the gradient norm is known, the gradients are scaled by the clip factor, AdamW moves
the weights, the average follows, and the bfloat16 weights of the next forward are written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from longskip import kernels
from longskip.profiling import bench_timing

SIZES = (1 << 24, 1 << 27)
_SETTINGS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.03}


def rows(
    device: torch.device, limits: Mapping[str, float], repeats: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Rows of the optimizer; on a CPU only the smallest size, by torch."""
    found = []
    for values in SIZES if device.type == "cuda" else (1 << 20,):
        generator = torch.Generator(device).manual_seed(0)
        p, g, m, v, ema = (torch.randn(values, device=device, generator=generator) for _ in range(5))
        v.square_()
        low = torch.empty(values, device=device, dtype=torch.bfloat16)
        clip = torch.tensor(0.7, device=device)

        def ours(p=p, g=g, m=m, v=v, ema=ema, low=low, clip=clip) -> None:  # type: ignore[no-untyped-def]
            with kernels.use("require:triton", "adamw"):
                kernels.adamw(
                    [p], [g], [m], [v], **_SETTINGS, step=7, grad_scale=clip, emas=[ema], ema_decay=0.999, copies=[low]
                )

        weight = p.clone().requires_grad_()
        weight.grad = g.clone()
        optimizer = torch.optim.AdamW([weight], **_SETTINGS, fused=True)

        average = ema.clone()

        def torch_fused(weight=weight, optimizer=optimizer, ema=average, low=low, clip=clip) -> None:  # type: ignore[no-untyped-def]
            torch._foreach_mul_([weight.grad], clip)
            optimizer.step()
            torch._foreach_lerp_([ema], [weight.detach()], 0.001)
            low.copy_(weight.detach())

        works: dict[str, Callable[[], None]] = {"torch-fused": torch_fused}
        if device.type == "cuda":
            works = {"triton": ours, **works}
        moved = values * (7 * 4 + 2 * 4 + 2)
        for name, took in bench_timing.interleaved(works, device, repeats).items():
            gbps = moved / took["median"] / 1e6
            row: dict[str, Any] = {
                "op": "adamw", "case": f"values{values}", "x_name": "values", "x": values, "dtype": "float32",
                "provider": name, "version": torch.__version__, "ours": name == "triton", "mode": "forward", "ms": took,
                "flops": 0, "bytes": moved, "gbps": gbps, "copy_share": gbps / limits["copy_gbps"],
            }  # fmt: skip
            found.append(row)
            say(
                f"adamw {values:,} values {name}: {took['median']:.4f} ms, {row['gbps']:.0f} GB/s, {row['copy_share']:.0%}"
            )
    return found
