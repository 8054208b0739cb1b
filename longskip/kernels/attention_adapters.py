"""Attention by the flash-attn and xformers packages, as custom ops of ours, one per direction.

Both are called through their functions below autograd, which take and return (B, T, H, Dh): the derivative, the FLOPs and
the refusal of second derivatives are then ours and the same as for every other fused op. An adapter is registered where
its package is installed; `auto` takes it only where it was measured faster.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longskip.errors import BackendError
from longskip.kernels import library
from longskip.kernels.backends import Sizes, register
from longskip.kernels.formulas import attention_backward, attention_forward

Forward = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]


def flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp) by flash-attn 2."""
    from flash_attn.flash_attn_interface import _flash_attn_forward

    out, sums, _, _ = _flash_attn_forward(q, k, v, 0.0, scale, False, -1, -1, 0.0, None, False)
    return out, sums


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) by flash-attn 2, deterministic."""
    from flash_attn.flash_attn_interface import _flash_attn_backward

    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    _flash_attn_backward(grad, q, k, v, out, sums, dq, dk, dv, 0.0, scale, False, -1, -1, 0.0, None, True)
    return dq, dk, dv


def xformers_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp) by xformers."""
    from xformers.ops import fmha

    out, sums = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, None, 0.0, scale)
    return out, sums


def xformers_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) by xformers."""
    from xformers.ops import fmha

    dq, dk, dv = fmha.memory_efficient_attention_backward(grad, out, sums, q, k, v, None, 0.0, scale)
    return dq, dk, dv


def adapt(name: str, package: str, forward: Forward, backward: Backward) -> None:
    """Register ``name`` as a backend of ``attention``: usable where ``package`` is installed and there is a GPU."""

    if importlib.util.find_spec(package) is None:
        register("attention", name, unusable=lambda device: f"{package} is not installed")(_absent)
        return

    def unusable(device: torch.device) -> str | None:
        return None if device.type in ("cuda", "meta") else f"{package} needs a CUDA device, not {device.type}"

    register("attention", name, unusable=unusable, unfit=_unfit)(_op(name, forward, backward))


def _op(name: str, forward: Forward, backward: Backward) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return forward(q, k, v, scale)

    def fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        sums = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
        return q.new_empty(q.shape), sums

    def run_backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return backward(grad, q, k, v, out, sums, scale)

    def fake_backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    forward_op = library.custom(
        f"{name}_attention", run, fake, flops=lambda q, k, v, scale: attention_forward(**_sizes(q, k)).flops
    )
    backward_op = library.custom(
        f"{name}_attention_backward", run_backward, fake_backward,
        flops=lambda grad, q, k, *rest: attention_backward(**_sizes(q, k), recompute=True).flops,
    )  # fmt: skip

    def save(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, ctx.scale = inputs
        ctx.save_for_backward(q, k, v, *output)
        ctx.mark_non_differentiable(output[1])

    def differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        return (*backward_op(grad.contiguous(), *ctx.saved_tensors, ctx.scale), None)

    library.differentiable(forward_op, backward_op, differentiate, save)

    def attention(
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        library.plain("attention", q, k, v)
        if k is None or v is None:
            q, k, v = q.unbind(2)
        out: Tensor = forward_op(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)[0]
        return out

    return attention


def _sizes(q: Tensor, k: Tensor) -> dict[str, int]:
    batch, queries, heads, head_dim = q.shape
    return {"batch": batch, "queries": queries, "keys": k.shape[1], "heads": heads, "head_dim": head_dim}


def _unfit(dtype: torch.dtype, sizes: Sizes) -> str | None:
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {dtype}"
    if sizes["masked"]:
        return "key masks are not handed to it"
    if sizes["head_dim"] > 256 or sizes["head_dim"] % 8:
        return f"it takes head dims that are multiples of 8 up to 256, not {sizes['head_dim']}"
    if not (sizes["batch"] and sizes["queries"] and sizes["keys"]):
        return "it takes no empty batches"
    return None


def _absent(*args: Any, **kwargs: Any) -> Tensor:
    raise BackendError("the package of this backend is not installed")


adapt("flash_attn", "flash_attn", flash_forward, flash_backward)
adapt("xformers", "xformers", xformers_forward, xformers_backward)
