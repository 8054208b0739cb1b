"""Attention's edges: rows without keys, packed layout, NaN at every number of keys."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longskip import kernels
from tests.kernels.kernel_checks import FLOAT64

BACKENDS = ["torch", "reference"]


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """One query at a time over the keys that it attends to, nothing masked by infinities."""
    out = torch.zeros(q.shape, dtype=FLOAT64)
    for b, t, h in ((b, t, h) for b in range(q.shape[0]) for t in range(q.shape[1]) for h in range(q.shape[2])):
        keep = [j for j in range(k.shape[1]) if mask is None or bool(mask[b, j])]
        if not keep:
            continue
        scores = [scale * float(q[b, t, h] @ k[b, j, h]) for j in keep]
        powers = [math.exp(score - max(scores)) for score in scores]
        out[b, t, h] = sum(p / sum(powers) * v[b, j, h] for p, j in zip(powers, keep, strict=True))
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, top) for top in (2, 4, 19, 2, 5))),
    masked=st.booleans(),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_equals_the_sum_by_hand(backend: str, sizes: tuple[int, ...], masked: bool, share: float, seed: int) -> None:
    batch, queries, keys, heads, width = sizes
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, queries, heads, width, generator=generator, dtype=FLOAT64)
    k, v = torch.randn(2, batch, keys, heads, width, generator=generator, dtype=FLOAT64)
    mask = torch.rand(batch, keys, generator=generator) < share if masked else None
    with kernels.use(backend):
        out = kernels.attention(q, k, v, key_mask=mask)
    torch.testing.assert_close(out, by_hand(q, k, v, mask, width**-0.5), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FLOAT64], ids=str)
def test_rows_without_keys_give_zero_and_finite_gradients(backend: str, dtype: torch.dtype) -> None:
    q = torch.randn(2, 19, 3, 2, 8, dtype=dtype, requires_grad=True)
    mask = torch.zeros(2, 19, dtype=torch.bool)
    mask[1, ::2] = True
    with kernels.use(backend):
        out = kernels.attention(q, key_mask=mask)
        (grad,) = torch.autograd.grad(out.float().square().sum(), q)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert torch.equal(grad[0], torch.zeros_like(grad[0]))
    assert torch.isfinite(grad).all() and grad[1, :, 0].abs().max() > 0
    assert torch.equal(grad[1, 1::2, 1:], torch.zeros_like(grad[1, 1::2, 1:])), "a masked key got a gradient"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_key_has_no_influence(backend: str) -> None:
    q, k, v = torch.randn(3, 2, 5, 2, 4)
    mask = torch.tensor([[True, True, False, True, False]] * 2)
    other_k, other_v = k.clone(), v.clone()
    other_k[:, ~mask[0]], other_v[:, ~mask[0]] = 1e4, -1e4
    with kernels.use(backend):
        assert torch.equal(
            kernels.attention(q, k, v, key_mask=mask), kernels.attention(q, other_k, other_v, key_mask=mask)
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_is_unpacked(backend: str) -> None:
    packed = torch.randn(2, 17, 3, 2, 8)
    with kernels.use(backend):
        assert torch.equal(kernels.attention(packed), kernels.attention(*packed.unbind(2)))


def test_torch_backend_reads_packed_and_writes_tokens_first_without_copies() -> None:
    packed = torch.randn(2, 17, 3, 2, 8, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, kernels.use("torch"):
        out = kernels.attention(packed)
    assert out.is_contiguous()
    names = {event.key for event in profile.key_averages()}
    assert any("scaled_dot_product" in name for name in names)
    assert not names & {"aten::clone", "aten::copy_", "aten::contiguous", "aten::cat", "aten::stack"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FLOAT64], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_never_lost(backend: str, masked: bool, dtype: torch.dtype) -> None:
    """A NaN query gives a NaN row, a NaN key NaN everywhere, whatever the number of keys is to a vector's width."""
    for keys in (*range(1, 36), 511, 512, 513, 520):
        q, k, v = (torch.randn(1, n, 1, 8).to(dtype) for n in (3, keys, keys))
        mask = torch.ones(1, keys, dtype=torch.bool) if masked else None
        with kernels.use(backend):
            bad = q.clone()
            bad[0, 1, 0, 2] = float("nan")
            rows = kernels.attention(bad, k, v, key_mask=mask).isnan()
            assert torch.equal(rows.all(-1).flatten(), torch.tensor([False, True, False])), keys
            assert int(rows.any(-1).sum()) == 1, keys
            bad = k.clone()
            bad[0, -1, 0, 2] = float("nan")
            assert kernels.attention(q, bad, v, key_mask=mask).isnan().all(), keys


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend: str) -> None:
    q = torch.full((1, 17, 3, 1, 4), 1e3)
    with kernels.use(backend):
        torch.testing.assert_close(kernels.attention(q), q[:, :, 0])
