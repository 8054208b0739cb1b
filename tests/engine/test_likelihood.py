"""Likelihoods of models whose density is known: Gaussians and mixtures in closed form, a U-ViT by a second way."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import norm

from longskip.engine.config import Config, DiffusionGroup
from longskip.engine.data.plan import permute
from longskip.engine.data.reader import MicroBatch
from longskip.engine.data.sources import open_source
from longskip.engine.data.tokens import Vocabulary
from longskip.engine.diffusion import Objective, objective_of
from longskip.engine.inputs import Inputs
from longskip.engine.likelihood import (
    FLOW_START,
    Estimate,
    batches_of,
    decoder_nats,
    evaluate_likelihood,
    noise_floor,
    ode_log_likelihood,
    vlb,
)
from longskip.errors import ConfigError, DataError, LongskipError
from longskip.kernels import backends
from longskip.models.presets import preset
from longskip.models.specs import TextEncoderSpec
from longskip.models.system import TextToImage
from longskip.models.text import WordEncoder
from longskip.models.uvit import UViT
from tests.engine.toys import Mixture
from tests.figures import figure

CASES = [("flow", "v"), ("flow", "x"), ("ddpm", "epsilon")]  # conversions are tested with the objectives


def objective(kind: str, prediction: str, **fields) -> Objective:
    return objective_of(DiffusionGroup(objective=kind, prediction=prediction, **fields))


def correlated(dims: int) -> Mixture:
    g = torch.Generator().manual_seed(3)
    root = torch.randn(dims, dims, generator=g, dtype=torch.float64)
    mean = 0.5 * torch.randn(dims, generator=g, dtype=torch.float64)
    return Mixture.gaussian(mean.tolist(), (root @ root.T / dims + 0.2 * torch.eye(dims)).tolist())


PAIR = Mixture([0.4, 0.6], [[-1.0, 0.5], [0.8, -0.3]], [[[0.1, 0.05], [0.05, 0.2]], [[0.2, -0.1], [-0.1, 0.15]]])
LINE = Mixture([0.3, 0.7], [[-1.0], [0.8]], [[[0.04]], [[0.09]]])


# --- the ODE ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["v", "x"])
@pytest.mark.parametrize("data", [correlated(6), PAIR], ids=["gaussian", "mixture"])
def test_a_flows_likelihood_is_the_datas_density(data: Mixture, prediction: str) -> None:
    """The optimal flow carries noise to the data blurred by the first noise level, which for v is as good as the data."""
    flow, x = objective("flow", prediction), data.sample(16, 1)
    found = ode_log_likelihood(flow, data.predictor(flow), x, divergence="exact", rtol=1e-8, atol=1e-8)
    apart = float((found.nats + data.log_density(x, noise_floor(flow))).abs().max())
    from_data = float((found.nats + data.log_density(x)).abs().max())
    default = ode_log_likelihood(flow, data.predictor(flow), x)
    loose = float((default.nats - found.nats).abs().max())
    figure(
        f"flow {prediction}: {apart:.1e} nats from the blurred density, {from_data:.1e} from the data's, "
        f"{found.evaluations} evaluations; default tolerance {loose:.1e}, {default.evaluations} evaluations"
    )
    assert apart < 1e-6
    assert loose < 1e-3
    assert prediction == "x" or from_data < 1e-3
    assert noise_floor(flow) == pytest.approx(FLOW_START / (1 - FLOW_START) if prediction == "v" else 0.05 / 0.95)
    assert bool((found.error == 0).all())
    assert torch.allclose(found.bits_per_dim, found.nats / x.shape[1] / math.log(2))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_a_ddpms_likelihood_is_the_density_that_its_ode_makes(prediction: str) -> None:
    """Of a Gaussian: noise N(0, I) at the last step, pulled together by √((Σ + ρ₀²)/(Σ + ρ_T²)) along its axes."""
    data, ddpm = correlated(6), objective("ddpm", prediction)
    x = data.sample(8, 1)
    kept = ddpm.alphas_cumprod  # type: ignore[attr-defined]
    first, last = ((1 - kept) / kept)[[0, -1]]
    mean, axes, variances = data.means[0], data.axes[0], data.variances[0]
    ratio = ((variances + first) / (variances + last)).sqrt()
    centre, std = mean @ axes * (1 - ratio), ratio / kept[-1].sqrt()
    truth = torch.distributions.Normal(centre, std).log_prob(x @ axes).sum(1)
    found = ode_log_likelihood(ddpm, data.predictor(ddpm), x, divergence="exact", rtol=1e-8, atol=1e-8)
    default = ode_log_likelihood(ddpm, data.predictor(ddpm), x)
    apart, loose = float((found.nats + truth).abs().max()), float((default.nats + truth).abs().max())
    figure(f"ddpm {prediction}: {apart:.1e} nats from its density; default tolerance {loose:.1e}")
    assert apart < 1e-6
    assert loose < 1e-3


def test_a_ddpm_that_ends_in_noise_has_the_datas_density() -> None:
    """With a schedule that begins lower and ends without signal the closed form is the data's own, blurred by 0.003."""
    ddpm, x = objective("ddpm", "v", beta_start=1e-5, beta_end=0.08), PAIR.sample(16, 1)
    found = ode_log_likelihood(ddpm, PAIR.predictor(ddpm), x, divergence="exact", rtol=1e-6, atol=1e-6)
    assert float((found.nats + PAIR.log_density(x)).abs().max()) < 1e-3
    assert float((found.nats + PAIR.log_density(x, noise_floor(ddpm))).abs().max()) < 1e-4


def test_a_mixture_on_a_line_is_carried_quantile_to_quantile() -> None:
    """In one dimension the ODE's map is F_T⁻¹(F_0): the model's density by numerical inversion, for the SD schedule."""
    ddpm, x = objective("ddpm", "epsilon"), LINE.sample(24, 2)
    kept = ddpm.alphas_cumprod[[0, -1]].tolist()  # type: ignore[attr-defined]
    weights, means, variances = [0.3, 0.7], [-1.0, 0.8], [0.04, 0.09]

    def at(level: int) -> list[tuple[float, float, float]]:
        a = kept[level]
        return [(w, a**0.5 * m, (a * v + 1 - a) ** 0.5) for w, m, v in zip(weights, means, variances, strict=True)]

    def cdf(y: float, level: int) -> float:
        return sum(w * norm.cdf(y, m, s) for w, m, s in at(level))

    def pdf(y: float, level: int) -> float:
        return sum(w * norm.pdf(y, m, s) for w, m, s in at(level))

    found = ode_log_likelihood(ddpm, LINE.predictor(ddpm), x, divergence="exact", rtol=1e-8, atol=1e-8)
    for value, nats in zip(x[:, 0].tolist(), found.nats.tolist(), strict=True):
        y = kept[0] ** 0.5 * value
        share = cdf(y, 0)
        noise = brentq(lambda z, share=share: cdf(z, 1) - share, -9, 9, xtol=1e-13)
        density = norm.pdf(noise) * pdf(y, 0) / pdf(noise, 1) * kept[0] ** 0.5
        assert -nats == pytest.approx(math.log(density), abs=1e-5)


@pytest.mark.parametrize(("kind", "prediction"), [("flow", "v"), ("ddpm", "epsilon")])
def test_hutchinson_is_within_its_error(kind: str, prediction: str) -> None:
    """Over 200 samples the deviations in units of the reported error have the spread of Student's t."""
    data, target = correlated(6), objective(kind, prediction)
    x = data.sample(200, 1)
    exact = ode_log_likelihood(target, data.predictor(target), x, divergence="exact")
    probes = 16
    found = ode_log_likelihood(target, data.predictor(target), x, divergence="hutchinson", probes=probes)
    units = (found.nats - exact.nats) / found.error
    spread = float(units.square().mean().sqrt())
    mean_error = float(found.error.square().sum().sqrt() / 200)
    figure(f"{kind} hutchinson, {probes} probes: error {float(found.error.mean()):.3f} nats, deviations {spread:.2f}")
    assert 0.85 < spread < 1.25  # √(15/13) = 1.07
    assert abs(float((found.nats - exact.nats).mean())) < 4 * mean_error
    first = [
        ode_log_likelihood(target, data.predictor(target), x[:3], divergence="hutchinson", seed=s) for s in (0, 0, 1)
    ]
    assert torch.equal(first[0].nats, first[1].nats)
    assert not torch.equal(first[0].nats, first[2].nats)


def test_a_samples_draws_are_its_own_whatever_the_batch() -> None:
    x, numbers = PAIR.sample(4, 4), [7, 3, 11, 0]
    for kind in ("flow", "ddpm"):
        target = objective(kind, "v")
        model = PAIR.predictor(target)

        def bound(part: torch.Tensor, of: list[int], target=target, model=model) -> Estimate:
            return vlb(target, model, part, n_times=8, samples=of)

        def by_ode(part: torch.Tensor, of: list[int], target=target, model=model) -> Estimate:
            return ode_log_likelihood(target, model, part, divergence="hutchinson", probes=3, samples=of)

        for estimate, limit in ((bound, 1e-11), (by_ode, 1e-3)):  # the ODE's steps are the batch's
            together = estimate(x, numbers)
            alone = [estimate(x[i : i + 1], [number]) for i, number in enumerate(numbers)]
            assert float((together.nats - torch.cat([a.nats for a in alone])).abs().max()) < limit
            assert float((together.error - torch.cat([a.error for a in alone])).abs().max()) < limit
            assert not torch.allclose(together.nats, estimate(x, [1, 2, 4, 5]).nats, atol=0.01)


# --- the bound ----------------------------------------------------------------------------------------------------


def expected_bound(target: Objective, mean: float, std: float, x: torch.Tensor, variance: str = "beta") -> np.ndarray:
    """The bound of the model N(mean, std²) at x (B, D): its mean over the noise in closed form, the integral by quad."""
    dims, far = x.shape[1], (x - mean).square().sum(1).numpy()

    def error(alpha, sigma):  # E‖x0 − x̂0‖² of the linear x̂0
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return (1 - gain * alpha) ** 2 * far + (gain * sigma) ** 2 * dims

    def decoded(alpha, sigma):
        rho = sigma / alpha
        return dims / 2 * np.log(2 * np.pi * rho**2) + error(alpha, sigma) / (2 * rho**2)

    if target.group.objective == "flow":
        start = noise_floor(target) / (1 + noise_floor(target))
        parts = []
        for which in range(len(x)):
            at = lambda u, which=which: (1 - np.exp(u)) / np.exp(2 * u) * error(1 - np.exp(u), np.exp(u))[which]  # noqa: E731
            parts.append(quad(at, np.log(start), 0, epsabs=1e-10)[0])
        return np.array(parts) + decoded(1 - start, start)
    kept = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    betas = 1 - np.concatenate([kept[:1], kept[1:] / kept[:-1]])
    snr = kept / (1 - kept)
    total = decoded(kept[0] ** 0.5, (1 - kept[0]) ** 0.5)
    total = total + 0.5 * (kept[-1] * x.square().sum(1).numpy() - dims * (kept[-1] + np.log(1 - kept[-1])))
    for k in range(1, 1000):
        posterior = (1 - kept[k - 1]) / (1 - kept[k]) * betas[k]
        chosen = betas[k] if variance == "beta" else posterior
        ratio = posterior / chosen
        of_mean = (kept[k - 1] ** 0.5 * betas[k] / (1 - kept[k])) ** 2 / (2 * chosen)  # ‖μ̃ − μ_θ‖²/(2·chosen)
        total = total + dims / 2 * (ratio - 1 - np.log(ratio)) + of_mean * error(kept[k] ** 0.5, (1 - kept[k]) ** 0.5)
    assert snr[0] > snr[-1]
    return total


@pytest.mark.parametrize(("kind", "prediction"), CASES)
def test_the_bound_is_its_closed_form_and_tight_for_the_optimal_model(kind: str, prediction: str) -> None:
    std, dims, count = 0.5, 2, 100
    data, target = Mixture.isotropic(0.3, std, dims), objective(kind, prediction)
    x = data.sample(count, 1)
    found = vlb(target, data.predictor(target), x, n_times=128)
    expected = expected_bound(target, 0.3, std, x)
    units = (found.nats.numpy() - expected) / found.error.numpy()
    of_mean = float(found.error.square().sum().sqrt() / count)
    gap = float(expected.mean() + data.log_density(x).mean())
    figure(
        f"bound of {kind} {prediction}: closed form {gap:+.1e} nats above −log p, estimate "
        f"{float(found.nats.mean()) - expected.mean():+.3f} ± {of_mean:.3f} from it"
    )
    assert abs(float(found.nats.mean()) - expected.mean()) < 4 * of_mean
    assert 0.8 < float(np.sqrt((units**2).mean())) < 1.3
    assert abs(gap) < {"v": 1e-6, "x": 2e-3}.get(prediction, 5e-3) if kind == "flow" else abs(gap) < 5e-3
    assert found.evaluations == 128 + 16
    assert torch.allclose(torch.stack(list(found.terms.values())).sum(0), found.nats)
    if kind == "ddpm":
        posterior = expected_bound(target, 0.3, std, x, "posterior")
        with_posterior = vlb(target, data.predictor(target), x, n_times=128, variance="posterior")
        assert abs(float(with_posterior.nats.mean()) - posterior.mean()) < 4 * of_mean
        assert posterior.mean() - expected.mean() > 0.2 * dims  # β̃ is too small where the data are smooth


@pytest.mark.parametrize(("kind", "prediction"), [("flow", "v"), ("ddpm", "epsilon")])
def test_the_bound_is_above_the_datas_entropy_by_the_models_divergence(kind: str, prediction: str) -> None:
    """A model that is optimal for other data, N(μ', s'²): the mean bound is the entropy plus KL(data ‖ model)."""
    data, wrong, target = Mixture.isotropic(0.3, 0.5, 2), Mixture.isotropic(-0.2, 0.7, 2), objective(kind, prediction)
    x = data.sample(200, 1)
    found = vlb(target, wrong.predictor(target), x, n_times=128)
    of_mean = float(found.error.square().sum().sqrt() / 200)
    cross = -float(wrong.log_density(x).mean())
    assert cross + float(data.log_density(x).mean()) > 0.3  # KL here: 2·(log 1.4 + (0.25 + 0.25)/0.98 − ½) = 0.69
    assert abs(float(found.nats.mean()) - cross) < 4 * of_mean + 0.01
    by_ode = ode_log_likelihood(target, wrong.predictor(target), x)
    assert float(found.nats.mean() - by_ode.nats.mean()) > -4 * of_mean


def test_a_mixtures_bound_is_above_its_likelihood_and_near() -> None:
    for kind, prediction in (("flow", "v"), ("ddpm", "v")):
        target, x = objective(kind, prediction), PAIR.sample(200, 1)
        found = vlb(target, PAIR.predictor(target), x, n_times=128)
        of_mean = float(found.error.square().sum().sqrt() / 200)
        gap = float(found.nats.mean() + PAIR.log_density(x).mean())
        figure(f"mixture, {kind}: bound {gap:+.3f} ± {of_mean:.3f} nats above −log p")
        assert -4 * of_mean < gap < 4 * of_mean + 0.03


# --- pixels -------------------------------------------------------------------------------------------------------


def test_the_discretised_gaussian_is_a_distribution_over_the_256_values() -> None:
    levels = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).view(256, 1)
    for mean, spread in ((0.1, 0.02), (-0.999, 0.03), (1.3, 0.002), (0.003, 1e-3), (0.0, 2.0)):
        nats = decoder_nats(levels, torch.full_like(levels, mean), spread, pixels=True)
        assert float(torch.exp(-nats).sum()) == pytest.approx(1.0, abs=1e-12)
    mpmath.mp.dps = 600  # so that tails near 1 can be subtracted
    for level, mean, spread in (
        (200, -0.9, 0.03),
        (10, 0.9, 0.03),
        (0, 0.9, 0.04),
        (255, -0.9, 0.04),
        (100, -0.2, 0.01),
    ):
        x, half = mpmath.mpf(2 * level) / 255 - 1, mpmath.mpf(1) / 255
        upper = 1 if level == 255 else mpmath.ncdf((x + half - mean) / spread)
        lower = 0 if level == 0 else mpmath.ncdf((x - half - mean) / spread)
        of = torch.full((1, 1), mean, dtype=torch.float64)
        found = decoder_nats(levels[level : level + 1], of, spread, pixels=True)
        assert float(found) == pytest.approx(float(-mpmath.log(upper - lower)), rel=1e-10)


@pytest.mark.parametrize(("kind", "prediction"), [("flow", "v"), ("ddpm", "epsilon")])
def test_pixels_have_the_probability_of_their_interval(kind: str, prediction: str) -> None:
    """A smooth density over 8-bit values: −log p is that of the density less log of the interval's width 2/255."""
    data, target = Mixture.isotropic(0.1, 0.25, 8), objective(kind, prediction)
    x = (data.sample(200, 1).clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1
    truth = -data.log_density(x) - 8 * math.log(2 / 255)
    by_ode = ode_log_likelihood(target, data.predictor(target), x, pixels=True)
    bound = vlb(target, data.predictor(target), x, n_times=64, pixels=True)
    of_mean = float(bound.error.square().sum().sqrt() / 200)
    figure(
        f"pixels, {kind}: {float(truth.mean()) / 8 / math.log(2):.3f} bits/dim, "
        f"ODE {float((by_ode.nats - truth).mean()):+.3f} nats, bound {float((bound.nats - truth).mean()):+.3f}"
    )
    assert abs(float((by_ode.nats - truth).mean())) < 0.05
    assert -4 * of_mean < float((bound.nats - truth).mean()) < 4 * of_mean + 0.05
    if kind == "flow":  # of noise much finer than a level this model knows nothing that the decoder could use
        finer = vlb(target, data.predictor(target), x, n_times=64, pixels=True, start=1e-3)
        assert float((finer.nats - truth).mean()) > 3
    with pytest.raises(DataError, match="of a level off the 256"):
        vlb(target, data.predictor(target), x + 0.001, pixels=True)
    with pytest.raises(DataError, match="pixels=False"):
        ode_log_likelihood(target, data.predictor(target), 1.1 * x, pixels=True)


# --- a U-ViT, a whole set, refusals -------------------------------------------------------------------------------


def small_uvit() -> UViT:
    """A U-ViT of 16 values, smooth in time, with weights that make its derivative far from zero."""
    spec = preset("uvit-tiny", latent_size=(4, 4), channels=1, out_channels=None, patch=2, n_txt=0, text_width=0)
    model = UViT(replace(spec, time_scale=1.0))
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return model.eval()


def test_a_uvits_likelihood_agrees_with_one_integrated_here() -> None:
    """Midpoint rule and the trace of autograd's Jacobian through the other kernels' backend, in float64."""
    model, flow = small_uvit().double(), objective("flow", "v")
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = ode_log_likelihood(flow, model, x, divergence="exact", rtol=1e-6, atol=1e-6)
    steps = 30
    y, h = (1 - FLOW_START) * x, (1 - FLOW_START) / steps
    density = torch.full((2,), 16 * math.log(1 - FLOW_START), dtype=torch.float64)

    def velocity(at: torch.Tensor, t: float) -> torch.Tensor:
        return model(at, torch.full((len(at),), t, dtype=torch.float64))

    with backends.use("torch"):
        for i in range(steps):
            t = FLOW_START + (i + 0.5) * h
            with torch.no_grad():
                middle = y + h / 2 * velocity(y, t - h / 2)
                y = y + h * velocity(middle, t)
            jacobian = torch.autograd.functional.jacobian(lambda at, t=t: velocity(at, t).sum(0), middle)
            density += h * torch.einsum("ibi->b", jacobian.reshape(16, 2, 16))
    density += torch.distributions.Normal(0.0, 1.0).log_prob(y).flatten(1).sum(1)
    figure(f"U-ViT of 16 values: {found.nats.tolist()} nats, by the midpoint rule {(-density).tolist()}")
    assert torch.allclose(found.nats, -density, atol=5e-3)
    hutchinson = ode_log_likelihood(flow, model, x, divergence="hutchinson", probes=64)
    assert bool((hutchinson.error > 0).all())
    assert bool(((hutchinson.nats - found.nats).abs() < 4 * hutchinson.error).all())


@pytest.mark.parametrize(("kind", "prediction"), [("flow", "v"), ("ddpm", "epsilon")])
def test_a_run_on_pictures_goes_through(kind: str, prediction: str, shapes: Path) -> None:
    """uvit-tiny with its word encoder on 32² pictures, as ``longskip evaluate`` calls it; the result is JSON."""
    config = Config(
        model={"preset": "uvit-tiny"},
        encoders={"text": {"too_long": "truncate"}},
        diffusion={"objective": kind, "prediction": prediction},
    )
    vocabulary, spec = Vocabulary.build(["a red circle"], 300), config.backbone()
    text = WordEncoder(TextEncoderSpec(len(vocabulary), spec.text_width, spec.n_txt))
    model = TextToImage(UViT(spec), text).eval()
    inputs = Inputs(config, vocabulary, torch.device("cpu"))
    source, target = open_source(shapes / "validation"), objective_of(config.diffusion)
    settings = {"n_times": 8, "probes": 2, "rtol": 1e-2, "atol": 1e-2, "pixels": True}
    batches = list(batches_of(inputs, source, 3, size=2, seed=6))
    drawn = permute(np.arange(3), len(source), 6, 0).tolist()
    assert [batch.samples.tolist() for batch in batches] == [drawn[:2], drawn[2:]] and drawn != sorted(drawn)
    result = evaluate_likelihood(target, model, batches, **settings)
    assert json.loads(json.dumps(result)) == result
    assert (result["objective"], result["prediction"], result["dims"], result["bad"]) == (kind, prediction, 3072, 0)
    assert (result["ode"]["divergence"], result["ode"]["probes"], result["vlb"]["n_times"]) == ("hutchinson", 2, 8)
    for method in ("vlb", "ode"):
        found = result[method]
        assert found["count"] == 3
        assert found["nats"] == pytest.approx(found["bits_per_dim"] * 3072 * math.log(2))
        assert 0 < found["bits_per_dim"] < 20
        errors = found["bits_per_dim_error"]
        assert 0 < errors["monte_carlo"] < 1
        assert errors["over_samples"] > 0
    assert result["vlb"]["evaluations"] == 2 * (8 + 2)


def test_a_sets_figures_are_those_of_its_good_samples() -> None:
    data, target = correlated(4), objective("flow", "v")
    predictor = data.predictor(target)

    def batch(numbers: list[int], weights: list[float]) -> MicroBatch:
        count = len(numbers)
        x = data.sample(8, 1)[numbers].view(count, 4, 1, 1).float()
        scale = torch.tensor(numbers, dtype=torch.float32).add(1)
        return MicroBatch(
            clean=x, conditions={"scale": scale}, dropped=torch.zeros(count, dtype=torch.bool),
            time_normal=torch.zeros(count), noise=torch.zeros_like(x), weight=torch.tensor(weights),
            samples=torch.tensor(numbers), epochs=torch.zeros(count, dtype=torch.int64), keys=tuple(map(str, numbers)),
        )  # fmt: skip

    def model(latents: torch.Tensor, time: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Each sample has a condition of its own, which bad rows must take with them."""
        return predictor(latents.flatten(1), time).view_as(latents) * (1 + 0.01 * scale).view(-1, 1, 1, 1)

    batches = [batch([0, 1, 2], [1.0, 0.0, 1.0]), batch([5], [1.0]), batch([6], [0.0])]
    result = evaluate_likelihood(target, model, batches, n_times=16, seed=3)
    x = data.sample(8, 1)[[0, 2, 5]].view(3, 4, 1, 1).float()
    scale = torch.tensor([1.0, 3.0, 6.0])
    bound = vlb(target, lambda at, t: model(at, t, scale=scale).float(), x, n_times=16, seed=3, samples=[0, 2, 5])
    assert (result["vlb"]["count"], result["bad"], result["dims"]) == (3, 2, 4)
    assert result["vlb"]["nats"] == pytest.approx(float(bound.nats.mean()), rel=1e-6)
    assert result["vlb"]["bits_per_dim"] == pytest.approx(float(bound.nats.mean()) / 4 / math.log(2), rel=1e-6)
    errors = result["vlb"]["nats_error"]
    assert errors["over_samples"] == pytest.approx(float(bound.nats.std()) / math.sqrt(3), rel=1e-6)
    assert errors["monte_carlo"] == pytest.approx(float(bound.error.square().sum().sqrt()) / 3, rel=1e-6)
    assert result["ode"]["divergence"] == "exact"
    assert result["ode"]["nats_error"]["monte_carlo"] == 0
    only = evaluate_likelihood(target, model, batches[1:2], methods=("ode",))
    assert "vlb" not in only
    assert only["ode"]["nats_error"]["over_samples"] is None
    with pytest.raises(DataError, match="1 were bad"):
        evaluate_likelihood(target, model, batches[2:])


def test_what_cannot_be_estimated_is_refused() -> None:
    flow, x = objective("flow", "v"), torch.zeros(2, 3)
    for n_times in (0, 1, 7):
        with pytest.raises(ConfigError, match=f"{n_times} noise levels"):
            vlb(flow, lambda at, t: at, x, n_times=n_times)
    with pytest.raises(ConfigError, match="variance 'large'"):
        vlb(objective("ddpm", "v"), lambda at, t: at, x, variance="large")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="of a DDPM's likelihood"):
        vlb(objective("ddpm", "v"), lambda at, t: at, x, start=0.01)
    with pytest.raises(ConfigError, match="of a flow's likelihood"):
        ode_log_likelihood(flow, lambda at, t: at, x, start=1.5)
    with pytest.raises(ConfigError, match="divergence 'trace'"):
        ode_log_likelihood(flow, lambda at, t: at, x, divergence="trace")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="1 probe"):
        ode_log_likelihood(flow, lambda at, t: at, x, divergence="hutchinson", probes=1)
    with pytest.raises(LongskipError, match="not finite"):
        ode_log_likelihood(flow, lambda at, t: at / 0, x)
    with pytest.raises(LongskipError, match="not finite"):
        vlb(flow, lambda at, t: at / 0, x, n_times=2)
