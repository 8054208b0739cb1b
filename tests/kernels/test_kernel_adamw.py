"""AdamW against torch's own, float64, its cut pieces, and the published derivatives."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longskip import kernels
from longskip.errors import KernelArgumentError
from longskip.kernels.adamw import adamw_reference

FLOAT64 = torch.float64
BACKENDS = ["torch", "reference", "triton"]
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.03}


def state(sizes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[list[Tensor]]:
    """(params, grads, exp_avgs, exp_avg_sqs, emas)"""
    generator = torch.Generator().manual_seed(seed)
    lists = [[torch.randn(n, generator=generator, dtype=FLOAT64).to(dtype) for n in sizes] for _ in range(5)]
    lists[3] = [v.square() for v in lists[3]]
    return lists


def copies(lists: list[list[Tensor]], dtype: torch.dtype | None = None) -> list[list[Tensor]]:
    return [[t.to(dtype or t.dtype, copy=True) for t in tensors] for tensors in lists]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)
def test_follows_torch_optim(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == FLOAT64:
        pytest.skip("the kernel takes float32")
    sizes = (1, 17, 64, 1001)
    params, _, _, _, emas = state(sizes, dtype)
    zeros = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    theirs = [p.clone().requires_grad_() for p in params]
    averaged = [e.clone() for e in emas]
    optimizer = torch.optim.AdamW(theirs, **SETTINGS, foreach=False, fused=False)
    for step in range(1, 8):
        grads = state(sizes, dtype, seed=step)[1]
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = 0.5 * grad
        optimizer.step()
        with kernels.use(backend):
            kernels.adamw(params, grads, *zeros, **SETTINGS, step=step, grad_scale=0.5, emas=emas, ema_decay=0.9)
        averaged = [e + 0.1 * (p.detach() - e) for e, p in zip(averaged, theirs, strict=True)]
    # Seven steps of about ten roundings each; the update's quotient is of size 1 times lr.
    tolerance = 7 * 10 * torch.finfo(dtype).eps
    for ours, other in ((params, theirs), (emas, averaged)):
        for a, b in zip(ours, other, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad_scale", [1.0, 0.37])
@pytest.mark.parametrize("step", [1, 2, 1000, 10**6])
def test_against_float64(backend: str, grad_scale: float, step: int) -> None:
    lists = state((1, 15, 16, 33, 4099))
    # Integers and floats enter as they are; only the arithmetic is wider.
    wide = copies(lists, FLOAT64)
    wanted = adamw_reference(*wide[:4], **SETTINGS, step=step, grad_scale=grad_scale, emas=wide[4], ema_decay=0.999)
    grads = [g.clone() for g in lists[1]]
    with kernels.use(backend):
        result = kernels.adamw(*lists[:4], **SETTINGS, step=step, grad_scale=grad_scale, emas=lists[4], ema_decay=0.999)
    assert result is None
    eps = torch.finfo(torch.float32).eps
    for ours, other in zip((lists[0], lists[2], lists[3], lists[4]), wanted, strict=True):
        for a, b in zip(ours, other or [], strict=True):
            # Cancelling sums: absolute errors are of the summands' size, at most 5 here, over about ten roundings.
            torch.testing.assert_close(a.to(FLOAT64), b, rtol=10 * eps, atol=10 * eps)
    for before, after in zip(grads, lists[1], strict=True):
        assert torch.equal(before, after), "the gradients were written to"


@pytest.mark.parametrize("grad_scale", [1.0, 0.37, torch.tensor(0.37)], ids=["1", "0.37", "tensor"])
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(0, 1003), max_size=4), seed=st.integers(0, 99))
def test_an_element_does_not_know_where_its_tensor_was_cut(
    backend: str, grad_scale: float | Tensor, cuts: list[int], seed: int
) -> None:
    """Re-sharding must be bitwise: the same bits from any slices as from the whole."""
    whole = state((1003,), seed=seed)
    bounds = [0, *sorted(cuts), 1003]
    pieces = [[tensors[0][low:high].clone() for low, high in itertools.pairwise(bounds)] for tensors in whole]
    for lists in (whole, pieces):
        with kernels.use(backend):
            kernels.adamw(*lists[:4], **SETTINGS, step=3, grad_scale=grad_scale, emas=lists[4], ema_decay=0.999)
    for one, many in zip(whole, pieces, strict=True):
        assert torch.equal(one[0], torch.cat(many))


def test_chunks_of_a_scaled_gradient_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = state((5000, 3000))
    other = copies(lists)
    kernels.adamw(*lists[:4], **SETTINGS, step=2, grad_scale=0.3)
    monkeypatch.setattr(sys.modules["longskip.kernels.adamw"], "_CHUNK", 512)
    kernels.adamw(*other[:4], **SETTINGS, step=2, grad_scale=0.3)
    for a, b in zip(lists, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lr", [0.0, 1e-2])
def test_copies_are_the_new_parameters_rounded(backend: str, lr: float) -> None:
    params, grads, m, v, _ = state((1, 4099))
    dtype = torch.float16 if backend == "triton" else torch.bfloat16  # the interpreter does not round to bfloat16
    low = [torch.empty_like(p, dtype=dtype) for p in params]
    with kernels.use(backend):
        kernels.adamw(params, grads, m, v, **{**SETTINGS, "lr": lr}, step=3, copies=low)
    for copy, p in zip(low, params, strict=True):
        assert torch.equal(copy, p.to(dtype))
    with pytest.raises(KernelArgumentError, match=r"copies\[1\] is of shape \(7,\)"):
        kernels.adamw(params, grads, m, v, **SETTINGS, step=3, copies=[low[0], torch.empty(7)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum", [False, True])
def test_learning_rate_zero_keeps_the_bits(backend: str, momentum: bool) -> None:
    params, _, m, v, emas = state((37,))
    params[0][:4] = torch.tensor([-0.0, 0.0, 1e-42, -1e38])
    emas[0].copy_(params[0])
    if not momentum:
        m[0].zero_()
        v[0].zero_()
    before = params[0].view(torch.int32).clone()
    with kernels.use(backend):
        kernels.adamw(params, [torch.zeros(37)], m, v, **{**SETTINGS, "lr": 0.0}, step=1, emas=emas, ema_decay=0.99)
    assert torch.equal(params[0].view(torch.int32), before)
    assert torch.equal(emas[0].view(torch.int32)[1:], before[1:])  # -0 + 0 is 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_moments_move_while_the_learning_rate_is_zero(backend: str) -> None:
    lists = state((35,))
    other = copies(lists)
    with kernels.use(backend):
        kernels.adamw(*lists[:4], **{**SETTINGS, "lr": 0.0}, step=1)
        kernels.adamw(*other[:4], **SETTINGS, step=1)
    assert torch.equal(lists[2][0], other[2][0]) and torch.equal(lists[3][0], other[3][0])
    assert not torch.equal(lists[0][0], other[0][0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_element(backend: str) -> None:
    params, grads, m, v, emas = state((35, 3))
    grads[0][33] = float("nan")
    with kernels.use(backend):
        kernels.adamw(params, grads, m, v, **SETTINGS, step=1, grad_scale=0.5, emas=emas, ema_decay=0.9)
    for tensors in (params, m, v, emas):
        assert tensors[0].isnan().nonzero().flatten().tolist() == [33]
        assert not tensors[1].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_lists_tensors_and_several_axes(backend: str) -> None:
    with kernels.use(backend):
        kernels.adamw([], [], [], [], **SETTINGS, step=1)
        lists = state((0, 6))
        kernels.adamw(*lists[:4], **SETTINGS, step=1, emas=lists[4], ema_decay=0.9)
        flat, shaped = state((30,)), [[t.view(5, 6) for t in tensors] for tensors in state((30,))]
        kernels.adamw(*flat[:4], **SETTINGS, step=1)
        kernels.adamw(*shaped[:4], **SETTINGS, step=1)
        assert torch.equal(flat[0][0], shaped[0][0].flatten())
        leaf = [p.requires_grad_() for p in state((5,))[0]]
        kernels.adamw(leaf, *state((5,), seed=1)[1:4], **SETTINGS, step=1)


def test_reference_is_pure_and_has_the_known_derivatives() -> None:
    """B = -decay w - u and A Z = (1 - lr decay) Z - lr [Zm / (root + eps) - m Zv / (2 root (root + eps)²)]."""
    (p,), (g,), (m,), (v,), _ = state((11,), FLOAT64)
    lr, (beta1, beta2), eps, decay, step = 0.02, (0.9, 0.99), 1e-3, 0.05, 4

    def update(lr: Tensor, p: Tensor, m: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return adamw_reference([p], [g], [m], [v], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay, step=step)[
            0
        ][0]

    before = [t.clone() for t in (p, g, m, v)]
    rate = torch.tensor(lr, dtype=FLOAT64)
    zero = torch.zeros_like(p)
    z, zm, zv, zg = torch.randn(4, 11, generator=torch.Generator().manual_seed(5), dtype=FLOAT64)
    _, by_rate = torch.func.jvp(update, (rate, p, m, v, g), (torch.ones_like(rate), zero, zero, zero, zero))
    _, by_state = torch.func.jvp(update, (rate, p, m, v, g), (torch.zeros_like(rate), z, zm, zv, zg))
    new_m, new_v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    z_m, z_v = beta1 * zm + (1 - beta1) * zg, beta2 * zv + 2 * (1 - beta2) * g * zg
    c1, c2 = 1 - beta1**step, 1 - beta2**step
    root = (new_v / c2).sqrt()
    hat, z_m, z_v = new_m / c1, z_m / c1, z_v / c2
    torch.testing.assert_close(by_rate, -decay * p - hat / (root + eps), rtol=1e-12, atol=1e-12)
    wanted = (1 - lr * decay) * z - lr * (z_m / (root + eps) - hat * z_v / (2 * root * (root + eps) ** 2))
    torch.testing.assert_close(by_state, wanted, rtol=1e-12, atol=1e-12)
    for old, tensor in zip(before, (p, g, m, v), strict=True):
        assert torch.equal(old, tensor)


BAD: list[tuple[str, dict[str, Any]]] = [
    ("lr", {"lr": -1.0}),
    ("lr", {"lr": float("nan")}),
    ("eps", {"eps": float("inf")}),
    ("weight_decay", {"weight_decay": -0.1}),
    (r"betas\[0\]", {"betas": (1.0, 0.9)}),
    (r"betas\[1\]", {"betas": (0.9, -0.1)}),
    ("step", {"step": 0}),
    ("step", {"step": 1.0}),
    ("ema_decay", {"ema_decay": 1.5}),
    ("grad_scale", {"grad_scale": float("nan")}),
    ("grad_scale", {"grad_scale": -1.0}),
    ("grad_scale", {"grad_scale": torch.ones(2)}),
    ("emas", {"emas": []}),
    (r"emas\[0\]", {"emas": [torch.zeros(4)]}),
    ("grads", {"grads": []}),
    (r"grads\[0\]", {"grads": [torch.zeros(5, dtype=torch.bfloat16)]}),
    (r"grads\[0\]", {"grads": [torch.zeros(10)[::2]]}),
    (r"params\[0\]", {"params": [torch.zeros(5, dtype=torch.float16)]}),
    (r"exp_avgs\[0\]", {"exp_avgs": [torch.zeros(5, device="meta")]}),
    (r"exp_avg_sqs\[0\]", {"exp_avg_sqs": [torch.zeros(5, dtype=FLOAT64)]}),
]


@pytest.mark.parametrize(("name", "change"), BAD, ids=lambda v: str(v)[:30])
def test_bad_arguments_are_refused_before_anything_is_written(name: str, change: dict[str, Any]) -> None:
    params, grads, m, v, _ = state((5,))
    before = params[0].clone()
    arguments = {"params": params, "grads": grads, "exp_avgs": m, "exp_avg_sqs": v, **SETTINGS, "step": 1, **change}
    with pytest.raises(KernelArgumentError, match=f"adamw: {name} is .*; allowed: "):
        kernels.adamw(**arguments)
    assert torch.equal(params[0], before)
