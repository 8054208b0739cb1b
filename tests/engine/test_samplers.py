"""Samplers against flows whose solution is known and against their own formulas, and drawing whatever the batch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from longskip.engine.config import Config, DiffusionGroup, EvalGroup, OptimGroup
from longskip.engine.data.tokens import Vocabulary
from longskip.engine.diffusion import objective_of
from longskip.engine.drawing import Drawing, draw, repeats_of
from longskip.engine.inputs import Inputs
from longskip.engine.optim import ema_decay, learning_rate
from longskip.engine.samplers import SAMPLERS, evaluations, integrate, resolve_sampler, trailing
from longskip.errors import ConfigError
from longskip.models.specs import TextEncoderSpec
from longskip.models.system import TextToImage
from longskip.models.text import WordEncoder
from longskip.models.uvit import UViT
from tests.engine.toys import Mixture
from tests.figures import figure

CASES = [("flow", "v"), ("flow", "x"), ("ddpm", "epsilon"), ("ddpm", "v"), ("ddpm", "x")]
PAIRS = [(kind, name) for kind, names in SAMPLERS.items() for name in names]
MEAN, STD, DIMS = 0.3, 0.5, 8
DATA = Mixture.isotropic(MEAN, STD, DIMS)


def objective(kind: str, prediction: str, **fields):
    return objective_of(DiffusionGroup(objective=kind, prediction=prediction, **fields))


def predictions(kind: str) -> list[str]:
    return [prediction for name, prediction in CASES if name == kind]


def noise_of(count: int, dims: int = DIMS) -> torch.Tensor:
    return torch.randn(count, dims, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def transported(target, noise: torch.Tensor) -> torch.Tensor:
    """The probability-flow ODE's solution for N(μ, s²): the distance to μ shrinks with the standard deviation."""
    if target.group.objective == "flow":
        return MEAN + STD * noise
    kept = float(target.alphas_cumprod[-1])
    ratio = np.sqrt(STD**2 / (STD**2 + (1 - kept) / kept))
    return MEAN + (noise / np.sqrt(kept) - MEAN) * ratio


def draw_toy(target, noise: torch.Tensor, sampler: str, steps: int) -> torch.Tensor:
    return integrate(target, DATA.predictor(target), None, noise, sampler=sampler, steps=steps, guidance=1.0)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize(("prediction", "shift"), [("v", 1.0), ("x", 1.0), ("v", 3.0)])
def test_order_of_convergence_on_a_gaussian(sampler: str, order: int, prediction: str, shift: float) -> None:
    """The flow of N(μ, s²) maps noise z to μ + s·z exactly; the error falls with the sampler's order."""
    flow, noise = objective("flow", prediction, shift=shift), noise_of(4)
    errors = [
        float((draw_toy(flow, noise, sampler, steps) - transported(flow, noise)).abs().max()) for steps in (32, 64, 128)
    ]
    rates = [np.log2(errors[i] / errors[i + 1]) for i in range(2)]
    figure(f"{sampler}, {prediction}, shift {shift}: errors {errors}, orders {rates}")
    assert all(abs(rate - order) < 0.35 for rate in rates)


@pytest.mark.parametrize(("kind", "sampler"), PAIRS)
def test_noise_becomes_the_data(kind: str, sampler: str) -> None:
    """Every sampler and prediction ends at N(μ, s²) and near where the ODE takes each noise."""
    quantiles = torch.special.ndtri((torch.arange(500, dtype=torch.float64) + 0.5) / 500)
    noise = torch.stack([quantiles.roll(61 * i) for i in range(DIMS)], dim=1)  # mean 0, standard deviation 1
    for prediction in predictions(kind):
        target = objective(kind, prediction)
        out = draw_toy(target, noise, sampler, 250)
        apart = float((out - transported(target, noise)).abs().max())
        figure(f"{kind} {prediction} {sampler}: 250 steps, {apart:.1e} from the ODE's solution")
        assert apart < (0.03 if sampler in ("euler", "ddim") else 0.01)
        # A DDPM's last step has a little signal left, which the noise that sampling begins with has not.
        assert abs(float(out.mean()) - MEAN) < (0.015 if kind == "ddpm" else 1e-3)
        assert abs(float(out.std()) - STD) < 0.01


def ddim(target, x: torch.Tensor, steps: int) -> torch.Tensor:
    """DDIM in float64 (2010.02502, equation 12 with η = 0) on the evenly spaced steps that end with the noisiest."""
    kept = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    chosen = [round(1000 * (i + 1) / steps) - 1 for i in range(steps)][::-1]
    for k, after in zip(chosen, [*chosen[1:], None], strict=True):
        a, a_next = kept[k], 1.0 if after is None else kept[after]
        alpha, sigma = torch.tensor([[a**0.5]]).double(), torch.tensor([[(1 - a) ** 0.5]]).double()
        clean = DATA.denoised(x, alpha, sigma)
        epsilon = (x - a**0.5 * clean) / (1 - a) ** 0.5
        x = a_next**0.5 * clean + (1 - a_next) ** 0.5 * epsilon
    return x


@pytest.mark.parametrize("steps", [1, 7, 25, 30, 300])  # some do not divide 1000
def test_ddim_is_ddim(steps: int) -> None:
    noise = noise_of(16)
    expected = ddim(None, noise, steps)
    for prediction in predictions("ddpm"):
        out = draw_toy(objective("ddpm", prediction), noise, "ddim", steps)
        assert float((out - expected).abs().max()) < 2e-4  # the library's schedule is float32


def test_ddim_is_the_librarys_own_where_its_steps_divide() -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.set_timesteps(25)
    target, x = objective("ddpm", "epsilon"), noise_of(16)
    model = DATA.predictor(target)
    for k in scheduler.timesteps:
        x = scheduler.step(model(x, torch.full((16,), int(k) / 1000)), k, x).prev_sample
    assert float((draw_toy(target, noise_of(16), "ddim", 25) - x).abs().max()) < 2e-5
    assert scheduler.timesteps.tolist() == trailing(1000, 25)[::-1]


def dpm_solver(levels: list[tuple[float, float]], x: torch.Tensor) -> torch.Tensor:
    """DPM-Solver++ 2M in float64 (2211.01095, algorithm 2), with first-order steps at both ends."""
    guesses, last_h = [], 0.0
    for i, (alpha, sigma) in enumerate(levels[:-1]):
        guesses.append(DATA.denoised(x, torch.tensor([[alpha]]).double(), torch.tensor([[sigma]]).double()))
        next_alpha, next_sigma = levels[i + 1]
        if next_sigma == 0:
            return guesses[-1]
        h = np.log(next_alpha / next_sigma) - np.log(alpha / sigma)
        guess = guesses[-1]
        if i:
            half = h / (2 * last_h)
            guess = (1 + half) * guesses[-1] - half * guesses[-2]
        x, last_h = next_sigma / sigma * x - next_alpha * np.expm1(-h) * guess, h
    raise AssertionError("the levels end with no noise")


@pytest.mark.parametrize("steps", [2, 9, 30])
def test_dpm_solver_is_dpm_solver(steps: int) -> None:
    noise = noise_of(16)
    kept = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    chosen = [kept[round(1000 * (i + 1) / steps) - 1] for i in range(steps)][::-1]
    grid = np.linspace(1 - 1 / 1000, 0, steps + 1)
    of = {
        ("ddpm", 1.0): [(a**0.5, (1 - a) ** 0.5) for a in [*chosen, 1.0]],
        ("flow", 1.0): [(1 - t, t) for t in grid],
        ("flow", 3.0): [(1 - t, t) for t in 3 * grid / (1 + 2 * grid)],
    }
    for (kind, shift), levels in of.items():
        expected = dpm_solver(levels, noise)
        for prediction in predictions(kind):
            out = draw_toy(objective(kind, prediction, shift=shift), noise, "dpm++", steps)
            assert float((out - expected).abs().max()) < 1e-4  # the library computes in float32


@pytest.mark.parametrize(("kind", "sampler"), PAIRS)
def test_a_row_does_not_depend_on_the_batch(kind: str, sampler: str) -> None:
    """To the bit, for a model whose rows do not; in float32, as drawing is."""
    noise = noise_of(5).float()
    for prediction in predictions(kind):
        target = objective(kind, prediction)

        def model(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            return torch.sin(3 * x) * torch.cos(time).view(-1, 1) + x.roll(1, dims=1)

        def empty(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            return 0.5 * x

        settings = {"sampler": sampler, "steps": 6, "guidance": 2.0}
        together = integrate(target, model, empty, noise, **settings)
        alone = [integrate(target, model, empty, noise[i : i + 1], **settings) for i in range(5)]
        assert together.dtype == torch.float32
        assert torch.equal(together, torch.cat(alone))
        assert torch.equal(together, integrate(target, model, empty, noise, **settings))


@pytest.mark.parametrize(("kind", "sampler"), PAIRS)
def test_evaluations_are_counted_and_times_are_the_models(kind: str, sampler: str) -> None:
    for prediction, steps in itertools.product(predictions(kind), (1, 7)):
        calls: list[float] = []

        def model(x: torch.Tensor, time: torch.Tensor, calls: list = calls) -> torch.Tensor:
            assert time.shape == (1,)
            calls.append(float(time[0]))
            return torch.zeros_like(x)

        target = objective(kind, prediction)
        integrate(target, model, None, torch.zeros(1, 1, 2, 2), sampler=sampler, steps=steps, guidance=3.0)
        assert len(calls) == evaluations(sampler, steps)
        if kind == "ddpm":
            assert [round(1000 * t) for t in calls] == trailing(1000, steps)[::-1]
        else:
            assert calls[0] == pytest.approx(0.999 if sampler == "dpm++" else 1.0)
            assert min(calls) > 0


def test_guidance_is_the_same_whatever_is_predicted() -> None:
    """g·conditional + (1−g)·empty of two Gaussians' predictors, as x, ε or v."""
    other = Mixture.isotropic(-0.4, 0.7, DIMS)
    noise = noise_of(6)
    for kind, sampler in PAIRS:
        outs = []
        for prediction in predictions(kind):
            target = objective(kind, prediction)
            settings = {"sampler": sampler, "steps": 8, "guidance": 2.5}
            outs.append(integrate(target, DATA.predictor(target), other.predictor(target), noise, **settings))
        assert all(torch.allclose(out, outs[0], atol=1e-4) for out in outs)
        plain = integrate(target, DATA.predictor(target), None, noise, **settings)
        assert float((plain - outs[0]).abs().max()) > 0.1

    flow = objective("flow", "v")
    one = integrate(
        flow, lambda x, t: torch.full_like(x, 3.0), lambda x, t: torch.full_like(x, 1.0), torch.zeros(1, 1),
        sampler="euler", steps=1, guidance=2.5,
    )  # fmt: skip
    assert float(one) == -(1.0 + 2.5 * 2.0)


def test_one_euler_step_of_an_exact_x_prediction_is_the_picture() -> None:
    clean = torch.rand(3, 3, 8, 8)
    flow = objective("flow", "x")
    out = integrate(flow, lambda x, t: clean, None, torch.randn(3, 3, 8, 8), sampler="euler", steps=4, guidance=1.0)
    assert torch.allclose(out, clean, atol=1e-5)


def test_a_bf16_model_does_not_lower_the_samples() -> None:
    for kind, sampler in PAIRS:
        for prediction in predictions(kind):
            target = objective(kind, prediction)
            out = integrate(
                target, lambda x, t: x.bfloat16(), None, torch.randn(2, 4), sampler=sampler, steps=3, guidance=1.0
            )
            assert out.dtype == torch.float32
            assert not torch.equal(out, out.bfloat16().float()) or prediction == "x"


def test_samplers_that_do_not_fit_are_refused() -> None:
    assert resolve_sampler("auto", "flow") == "euler"
    assert resolve_sampler("auto", "ddpm") == "ddim"
    for name, kind in (("heun", "ddpm"), ("euler", "ddpm"), ("ddim", "flow")):
        with pytest.raises(ConfigError, match=f"'{name}' does not go with diffusion.objective {kind}") as caught:
            integrate(
                objective(kind, "v"), lambda x, t: x, None, torch.zeros(1, 1), sampler=name, steps=2, guidance=1.0
            )
        assert all(fitting in str(caught.value.cure) for fitting in SAMPLERS[kind])
    with pytest.raises(ConfigError, match="'magic' is not known"):
        resolve_sampler("magic", "flow")
    few = objective("ddpm", "v", train_steps=10)
    with pytest.raises(ConfigError, match="11 sampler steps of a schedule of 10"):
        integrate(few, lambda x, t: x, None, torch.zeros(1, 1), sampler="ddim", steps=11, guidance=1.0)
    out = integrate(few, lambda x, t: 0 * x, None, torch.ones(1, 1), sampler="dpm++", steps=10, guidance=1.0)
    assert bool(torch.isfinite(out).all())


def test_a_drawing_names_the_sampler_that_was_meant() -> None:
    given = {"sampler": None, "steps": None, "guidance": None, "seed": 3}
    group = EvalGroup(sample_steps=9)
    assert Drawing.of(group, DiffusionGroup(), **given).to_json()["sampler"] == "euler"
    assert Drawing.of(group, DiffusionGroup(objective="ddpm"), **given) == Drawing("ddim", 9, 3.0, 3)


@pytest.mark.parametrize(("kind", "prediction", "sampler"), [("flow", "x", "heun"), ("ddpm", "v", "dpm++")])
def test_same_prompt_same_seed_same_picture_whatever_the_batch(kind: str, prediction: str, sampler: str) -> None:
    config = Config(
        model={"preset": "uvit-tiny"},
        encoders={"text": {"kind": "words"}},
        diffusion={"objective": kind, "prediction": prediction},
    )
    vocabulary = Vocabulary.build(["a red circle", "a blue square", "a green star"], 300)
    spec = config.backbone()
    text = WordEncoder(TextEncoderSpec(len(vocabulary), spec.text_width, spec.n_txt))
    model = TextToImage(UViT(spec), text).eval()
    target = objective_of(config.diffusion)
    inputs = Inputs(config, vocabulary, torch.device("cpu"))
    prompts = ["a red circle", "a blue square", "a red circle", "a green star"]
    together = draw(model, target, inputs, prompts, repeats_of(prompts), Drawing(sampler, 4, 2.0, 7))
    alone = draw(model, target, inputs, ["a green star"], [0], Drawing(sampler, 4, 2.0, 7))
    apart = np.abs(together[3].astype(int) - alone[0].astype(int)).max()
    assert apart <= 1  # one grey level: the matmuls of another batch size may round otherwise
    assert np.abs(together[0].astype(int) - together[2].astype(int)).max() > 10  # the second one of a prompt differs
    other = draw(model, target, inputs, ["a green star"], [0], Drawing(sampler, 4, 2.0, 8))
    assert np.abs(other[0].astype(int) - alone[0].astype(int)).max() > 10


def test_schedules() -> None:
    optim = OptimGroup(lr=1.0, warmup_steps=4, schedule="cosine", final_lr_share=0.1)
    assert [learning_rate(optim, s, 12) for s in (1, 2, 4)] == [0.25, 0.5, 1.0]
    assert learning_rate(optim, 8, 12) == pytest.approx(0.55)
    assert learning_rate(optim, 12, 12) == pytest.approx(0.1)
    assert learning_rate(OptimGroup(lr=0.5), 99, 100) == 0.5
    assert ema_decay(OptimGroup(ema_decay=0.9), 1) == pytest.approx(2 / 11)
    assert ema_decay(OptimGroup(ema_decay=0.9), 1000) == 0.9
    assert ema_decay(OptimGroup(ema_decay=0.9, ema_warmup=False), 1) == 0.9
