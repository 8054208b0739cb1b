"""The loss's two prediction kinds are one loss, and its statistics are float32."""

from __future__ import annotations

import pytest
import torch

from longskip import kernels

BACKENDS = ["torch", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_x_prediction_is_the_velocity_that_it_implies(backend: str) -> None:
    """v = (x_t - x) / t with x_t = (1 - t) x0 + t eps: both kinds give the same loss where t >= the floor."""
    generator = torch.Generator().manual_seed(0)
    x, clean, noise = torch.randn(3, 7, 3, 5, 5, generator=generator, dtype=torch.float64)
    time = torch.linspace(0.05, 1, 7, dtype=torch.float64)
    t = time[:, None, None, None]
    velocity = ((1 - t) * clean + t * noise - x) / t
    weight = torch.rand(7, generator=generator, dtype=torch.float64)
    with kernels.use(backend):
        as_x = kernels.diffusion_loss(x, clean, noise, time, weight, prediction_kind="x")
        as_v = kernels.diffusion_loss(velocity, clean, noise, time, weight)
    torch.testing.assert_close(as_x, as_v, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_floor_bounds_the_weight_of_early_times(backend: str) -> None:
    clean, noise = torch.zeros(3, 4), torch.ones(3, 4)
    time, weight = torch.tensor([0.0, 0.05, 0.1]), torch.ones(3)
    with kernels.use(backend):
        loss = kernels.diffusion_loss(clean + 1, clean, noise, time, weight, prediction_kind="x", time_floor=0.1)
    torch.testing.assert_close(loss, torch.full((3,), 100.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_statistics_are_float32(backend: str, dtype: torch.dtype) -> None:
    """70,000² overflows float16 and a sum of 4,096 ones stalls in bfloat16; the mean here is exact in float32."""
    prediction = torch.full((2, 4096), 3.0, dtype=dtype)
    clean, noise = torch.zeros(2, 4096), torch.full((2, 4096), 2.0)
    with kernels.use(backend):
        loss = kernels.diffusion_loss(prediction, clean, noise, torch.ones(2), torch.tensor([1.0, 0.0]))
        large = kernels.diffusion_loss(prediction * 1000, clean, noise, torch.ones(2), torch.ones(2))
    assert loss.dtype == torch.float32
    assert loss.tolist() == [1.0, 0.0]
    wanted = (float(prediction[0, 0] * 1000) - 2.0) ** 2
    torch.testing.assert_close(large, torch.full((2,), wanted))


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_scales_and_samples_are_apart(backend: str) -> None:
    prediction = torch.randn(4, 3, 2, requires_grad=True)
    clean, noise = torch.randn(2, 4, 3, 2)
    weight = torch.tensor([0.0, 1.0, 2.0, 0.5])
    with kernels.use(backend):
        loss = kernels.diffusion_loss(prediction, clean, noise, torch.ones(4), weight)
        plain = kernels.diffusion_loss(prediction, clean, noise, torch.ones(4), torch.ones(4))
    torch.testing.assert_close(loss, plain * weight)
    (grad,) = torch.autograd.grad(loss[2], prediction)
    assert torch.equal(grad[[0, 1, 3]], torch.zeros(3, 3, 2))
    torch.testing.assert_close(grad[2], 2 * 2 / 6 * (prediction - noise + clean)[2].detach())
