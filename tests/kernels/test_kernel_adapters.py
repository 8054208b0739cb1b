"""The adapters to flash-attn and xformers: what they hand over and what they make of it.

The packages cannot be installed without CUDA, so modules with their functions' signatures (flash-attn 2.8, xformers 0.0.35)
stand in for them, computing by the definition; the packages themselves are untested, as ``longskip doctor`` says.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from longskip import kernels
from longskip.errors import BackendError
from longskip.kernels import attention_adapters, backends
from longskip.kernels.attention import attention_reference

CPU = torch.device("cpu")


def _grads(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, ...]:
    """By hand: autograd is switched off inside a custom op."""
    p = (torch.einsum("bqhd,bkhd->bhqk", q, k) * scale).softmax(-1)
    dp = torch.einsum("bqhd,bkhd->bhqk", grad, v)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    return (
        torch.einsum("bhqk,bkhd->bqhd", ds, k),
        torch.einsum("bhqk,bqhd->bkhd", ds, q),
        torch.einsum("bhqk,bqhd->bkhd", p, grad),
    )


def _sums(q: Tensor, k: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * scale
    return scores.logsumexp(-1)


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
    assert alibi_slopes is None and not return_softmax
    empty = torch.empty(0)
    return attention_reference(q, k, v, scale=softmax_scale), _sums(q, k, softmax_scale), empty, empty


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int, softcap: float,
    alibi_slopes: Tensor | None, deterministic: bool, rng_state: Tensor | None = None,
) -> Tensor:  # fmt: skip
    assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
    assert deterministic and dout.is_contiguous()
    torch.testing.assert_close(softmax_lse, _sums(q, k, softmax_scale))
    for target, grad in zip((dq, dk, dv), _grads(dout, q, k, v, softmax_scale), strict=True):
        target.copy_(grad)
    return torch.empty(0)


def _xformers_forward(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    assert attn_bias is None and p == 0.0 and scale is not None
    return attention_reference(query, key, value, scale=scale), _sums(query, key, scale)


def _xformers_backward(
    grad: Tensor, output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None,
    p: float = 0.0, scale: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert attn_bias is None and p == 0.0 and scale is not None
    return _grads(grad, query, key, value, scale)


@pytest.fixture(scope="module")
def adapters() -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        flash, inner = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.flash_attn_interface")
        inner._flash_attn_forward, inner._flash_attn_backward = _flash_forward, _flash_backward  # type: ignore[attr-defined]
        patch.setitem(sys.modules, "flash_attn", flash)
        patch.setitem(sys.modules, "flash_attn.flash_attn_interface", inner)
        ops, fmha = types.ModuleType("xformers.ops"), types.ModuleType("xformers.ops.fmha")
        fmha.memory_efficient_attention_forward_requires_grad = _xformers_forward  # type: ignore[attr-defined]
        fmha.memory_efficient_attention_backward = _xformers_backward  # type: ignore[attr-defined]
        ops.fmha = fmha  # type: ignore[attr-defined]
        for name, module in (
            ("xformers", types.ModuleType("xformers")),
            ("xformers.ops", ops),
            ("xformers.ops.fmha", fmha),
        ):
            patch.setitem(sys.modules, name, module)
        a = attention_adapters
        yield {
            "flash_attn": a._op("test_flash_attn", a.flash_forward, a.flash_backward),
            "xformers": a._op("test_xformers", a.xformers_forward, a.xformers_backward),
        }


@pytest.mark.parametrize("name", ["flash_attn", "xformers"])
@pytest.mark.parametrize("packed", [True, False])
def test_outputs_and_gradients_are_the_definitions(adapters: dict[str, Any], name: str, packed: bool) -> None:
    inputs = [torch.randn(2, 7, 3, 2, 8)] if packed else [torch.randn(2, n, 2, 8) for n in (5, 7, 7)]
    leaves = [t.requires_grad_() for t in inputs]
    ours, wanted = adapters[name](*leaves, scale=0.3), attention_reference(*leaves, scale=0.3)
    torch.testing.assert_close(ours, wanted)
    grad = torch.randn_like(wanted)
    for a, b in zip(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(wanted, leaves, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["flash_attn", "xformers"])
def test_counters_see_the_declared_products(adapters: dict[str, Any], name: str) -> None:
    q = torch.empty(2, 7, 3, 2, 8, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = adapters[name](q)
        forward = counter.get_total_flops()
        torch.autograd.grad(out, q, torch.empty_like(out))
    once = 2 * 2 * 2 * 7 * 7 * 8  # one product: batch, heads, queries, keys, head dim; 2 FLOPs each
    assert forward == 2 * once
    assert counter.get_total_flops() - forward == 5 * once


@pytest.mark.parametrize("name", ["flash_attn", "xformers"])
def test_no_second_derivative_and_no_forward_mode(adapters: dict[str, Any], name: str) -> None:
    q = torch.randn(1, 3, 3, 1, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(adapters[name](q).square().sum(), q, create_graph=True)
    with pytest.raises(BackendError, match="second derivative"):
        grad.sum().backward()
    with pytest.raises(BackendError, match="transform"):
        torch.func.jvp(adapters[name], (q.detach(),), (torch.ones_like(q),))


@pytest.mark.parametrize(
    ("dtype", "change", "why"),
    [
        (torch.float32, {}, "takes float16 and bfloat16"),
        (torch.bfloat16, {"masked": True}, "key masks"),
        (torch.bfloat16, {"head_dim": 36}, "multiples of 8 up to 256, not 36"),
        (torch.bfloat16, {"head_dim": 264}, "not 264"),
        (torch.bfloat16, {"batch": 0}, "empty"),
        (torch.bfloat16, {}, None),
    ],
)
def test_calls_that_they_do_not_serve(dtype: torch.dtype, change: dict[str, int], why: str | None) -> None:
    sizes = {"batch": 2, "queries": 5, "keys": 5, "heads": 2, "head_dim": 64, "masked": False} | change
    found = attention_adapters._unfit(dtype, sizes)
    assert (found is None) if why is None else why in str(found)


@pytest.mark.parametrize("name", ["flash_attn", "xformers"])
def test_what_is_not_installed_says_so(name: str) -> None:
    reason = backends.available("attention", CPU)[name]
    assert reason == f"{name} is not installed"
    with (
        kernels.use(f"require:{name}", "attention"),
        pytest.raises(BackendError, match=reason),
    ):
        kernels.attention(torch.randn(1, 3, 3, 1, 8))
