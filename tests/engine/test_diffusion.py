"""Objectives: schedules, losses and conversions against the diffusers library, closed forms and float64 definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from longskip.engine.config import DiffusionGroup
from longskip.engine.diffusion import Ddpm, Flow, objective_of
from longskip.kernels.loss import diffusion_loss

CASES = [("flow", "v"), ("flow", "x"), ("ddpm", "epsilon"), ("ddpm", "v"), ("ddpm", "x")]


def objective(kind: str, prediction: str, **fields):
    return objective_of(DiffusionGroup(objective=kind, prediction=prediction, **fields))


def draws(count: int = 6, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean sample, noise and a guess of the clean sample."""
    g = torch.Generator().manual_seed(1)
    clean, noise, guess = (torch.randn(count, 3, 4, 4, generator=g, dtype=torch.float64).to(dtype) for _ in range(3))
    return clean, noise, guess


def stable_diffusion() -> np.ndarray:
    """ᾱ in numpy's float64."""
    betas = np.linspace(np.sqrt(0.00085), np.sqrt(0.012), 1000) ** 2
    return np.cumprod(1 - betas)


def predicted(kind: str, prediction: str, clean, noisy, alpha, sigma):
    """What a model whose guess of x0 is ``clean`` predicts at x_t = ``noisy``."""
    noise = (noisy - alpha * clean) / sigma
    v = noise - clean if kind == "flow" else alpha * noise - sigma * clean
    return {"x": clean, "epsilon": noise, "v": v}[prediction]


def levels(kind: str, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    t = time.double()
    if kind == "flow":
        alpha, sigma = 1 - t, t
    else:
        kept = torch.from_numpy(stable_diffusion())[(t * 1000).round().long()]
        alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
    return alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)


def test_the_flow_of_shift_one_is_as_it_was_to_the_bit() -> None:
    """Recorded losses hang on these numbers."""
    clean, noise, guess = draws()
    normal, weight = torch.randn(6), torch.rand(6)
    for prediction in ("v", "x"):
        flow = objective("flow", prediction, time_mean=0.3, time_std=1.2)
        time = flow.times(normal)
        assert torch.equal(time, torch.sigmoid(0.3 + 1.2 * normal))
        t = time.view(-1, 1, 1, 1)
        assert torch.equal(flow.noised(clean, noise, time), (1 - t) * clean + t * noise)
        loss = diffusion_loss(guess, clean, noise, time, weight, prediction_kind=prediction, time_floor=0.05)
        assert torch.equal(flow.loss(guess, clean, noise, time, weight), loss)
        assert torch.equal(flow.spread(time), time)


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_the_shift_multiplies_the_ratio_of_noise_to_signal(shift: float) -> None:
    normal = torch.randn(100, dtype=torch.float64)
    plain, shifted = objective("flow", "v").times(normal), objective("flow", "v", shift=shift).times(normal)
    assert torch.allclose(shifted / (1 - shifted), shift * plain / (1 - plain), rtol=1e-12)
    flow = objective("flow", "v", shift=shift)
    assert flow.shifted(0.0) == 0.0
    assert flow.shifted(1.0) == 1.0


def test_the_schedule_is_stable_diffusions() -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    ours = objective("ddpm", "epsilon").alphas_cumprod
    assert torch.allclose(ours, torch.from_numpy(stable_diffusion()), rtol=1e-12)
    assert torch.allclose(ours.float(), theirs.alphas_cumprod, rtol=2e-5)  # theirs is a product of 1000 in float32
    assert float(ours[-1]) == pytest.approx(0.0047, abs=5e-5)

    clean, noise, _ = draws()
    steps = torch.tensor([0, 1, 17, 500, 998, 999])
    v = objective("ddpm", "v")
    assert torch.allclose(v.noised(clean, noise, steps / 1000), theirs.add_noise(clean, noise, steps), atol=2e-5)
    target = theirs.get_velocity(clean, noise, steps)
    loss = v.loss(target, clean, noise, steps / 1000, torch.ones(6))
    assert float(loss.max()) < 1e-9  # the squared difference of two float32 velocities


def test_every_step_is_drawn_alike_and_validation_covers_them() -> None:
    ddpm = objective("ddpm", "epsilon")
    places = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    times = ddpm.times(torch.special.ndtri(places))
    assert torch.equal(torch.bincount((times * 1000).round().long(), minlength=1000), torch.full((1000,), 4))
    assert torch.equal(times, (times * 1000).round() / 1000)
    assert ddpm.times(torch.tensor([-40.0, 0.0, 40.0])).tolist() == pytest.approx([0.0, 0.5, 0.999])
    assert torch.equal(ddpm.spread(places.float()), times.float())
    assert ddpm.spread(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.0, 0.999])


def test_between_the_steps_log_snr_is_linear() -> None:
    ddpm = objective("ddpm", "v")
    kept = stable_diffusion()
    time = torch.linspace(0, 0.999, 5001, dtype=torch.float64)
    expected = np.interp(time.numpy() * 1000, np.arange(1000), np.log(kept / (1 - kept)))
    found = ddpm.log_snr(time)
    assert np.abs(found.numpy() - expected).max() < 1e-10
    assert float((ddpm.time_of(found) - time).abs().max()) < 1e-12
    alpha, sigma = ddpm.alpha_sigma(time)
    assert torch.allclose(alpha.square() + sigma.square(), torch.ones(5001, dtype=torch.float64), rtol=1e-14)
    assert torch.equal(ddpm.log_snr(torch.tensor([-0.5, 2.0])), ddpm.log_snr(torch.tensor([0.0, 0.999])))


@pytest.mark.parametrize(("kind", "prediction"), CASES)
@pytest.mark.parametrize("gamma", [5.0, 0.3])
def test_min_snr_weighs_the_clean_samples_error_whatever_is_predicted(kind: str, prediction: str, gamma: float) -> None:
    """For every parametrisation the loss of one and the same guess of x0 is min(SNR, γ)·‖x̂ − x0‖²/values."""
    clean, noise, guess = draws(dtype=torch.float64)
    time = torch.tensor([0.0, 0.003, 0.2, 0.5, 0.9, 0.999], dtype=torch.float64)
    if kind == "flow" and prediction == "v":
        time[0] = 0.001  # v at t = 0 does not know x0
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0, 1.0], dtype=torch.float64)
    weighed = objective(kind, prediction, min_snr=gamma)
    alpha, sigma = levels(kind, time)
    noisy = weighed.noised(clean, noise, time)
    assert torch.allclose(noisy, alpha * clean + sigma * noise, rtol=1e-12)
    # At t = 0 of a flow x_t is x0: only the prediction x itself can be wrong there.
    model = guess if prediction == "x" else predicted(kind, prediction, guess, noisy, alpha, sigma)
    snr = (alpha / sigma).square().flatten()
    expected = weight * snr.clamp(max=gamma) * (guess - clean).square().flatten(1).mean(1)
    assert torch.allclose(weighed.loss(model, clean, noise, time, weight), expected, rtol=1e-9)


@pytest.mark.parametrize(("prediction", "share"), [("epsilon", "snr"), ("v", "snr+1"), ("x", "one")])
def test_the_plain_ddpm_loss_is_the_squared_error_of_what_is_predicted(prediction: str, share: str) -> None:
    clean, noise, guess = draws(dtype=torch.float64)
    time = torch.tensor([0.0, 0.003, 0.2, 0.5, 0.9, 0.999], dtype=torch.float64)
    alpha, sigma = levels("ddpm", time)
    snr = (alpha / sigma).square().flatten()
    in_clean = {"snr": snr, "snr+1": snr + 1, "one": torch.ones(6)}[share]  # of the error of x0
    plain = objective("ddpm", prediction)
    model = predicted("ddpm", prediction, guess, plain.noised(clean, noise, time), alpha, sigma)
    expected = in_clean * (guess - clean).square().flatten(1).mean(1)
    assert torch.allclose(plain.loss(model, clean, noise, time, torch.ones(6).double()), expected, rtol=1e-9)
    low = plain.loss(model.bfloat16(), clean.float(), noise.float(), time.float(), torch.ones(6))
    assert low.dtype == torch.float32


def test_x_and_v_losses_of_the_flow_are_the_same_velocity_error() -> None:
    """Above the floor, the x-loss is the velocity's squared error: (x_t − x̂)/t against ε − x0."""
    clean, noise, guess = draws(5)
    time = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.95])
    x, v = objective("flow", "x"), objective("flow", "v")
    as_velocity = x.velocity(guess, x.noised(clean, noise, time), time)
    ones = torch.ones(5)
    assert torch.allclose(
        x.loss(guess, clean, noise, time, ones), v.loss(as_velocity, clean, noise, time, ones), rtol=1e-4
    )


@pytest.mark.parametrize("kind", ["flow", "ddpm"])
def test_conversions_tell_the_truth_and_undo_each_other(kind: str) -> None:
    clean, noise, other = draws(5, torch.float64)
    time = torch.tensor([0.01, 0.2, 0.5, 0.8, 0.99], dtype=torch.float64)
    model = objective(kind, "v")
    alpha, sigma = levels(kind, time)
    noisy = model.noised(clean, noise, time)
    for source, to in itertools.product(("x", "v", "epsilon"), repeat=2):
        said = predicted(kind, source, clean, noisy, alpha, sigma)
        expected = predicted(kind, to, clean, noisy, alpha, sigma)
        assert torch.allclose(model.convert(said, noisy, time, source, to), expected, rtol=1e-7, atol=1e-8)
        there = model.convert(other, noisy, time, source, to)
        assert torch.allclose(model.convert(there, noisy, time, to, source), other, rtol=1e-9, atol=1e-9)
        if source == to:
            assert there is other


def test_what_does_not_fit_is_refused() -> None:
    assert isinstance(objective("ddpm", "v"), Ddpm)
    assert isinstance(objective("flow", "v"), Flow)
    with pytest.raises(ValidationError, match="above beta_end"):
        DiffusionGroup(objective="ddpm", beta_start=0.02, beta_end=0.01)
