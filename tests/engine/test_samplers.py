"""Samplers against a flow whose solution is known, and drawing that does not depend on the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from longskip.engine.config import DiffusionGroup, OptimGroup
from longskip.engine.data.tokens import Vocabulary
from longskip.engine.diffusion import Flow, guided
from longskip.engine.drawing import Drawing, draw, repeats_of
from longskip.engine.optim import ema_decay, learning_rate
from longskip.engine.samplers import evaluations, integrate
from longskip.models.presets import preset
from longskip.models.specs import TextEncoderSpec
from longskip.models.system import TextToImage
from longskip.models.text import WordEncoder
from longskip.models.uvit import UViT


def exact_velocity(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """The velocity E[ε − x0 | x_t] of data N(0, s²) under x_t = (1−t)·x0 + t·ε, in closed form."""
    s = 0.5
    t = time.view(-1, 1, 1, 1).double()
    variance = (1 - t) ** 2 * s**2 + t**2
    return ((t - (1 - t) * s**2) / variance) * x


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence_on_a_gaussian(sampler: str, order: int) -> None:
    """The flow of N(0, s²) maps noise z to s·z exactly; the error falls with the sampler's order."""
    noise = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (20, 40, 80):
        out = integrate(exact_velocity, noise, sampler=sampler, steps=steps)  # type: ignore[arg-type]
        errors.append(float((out - 0.5 * noise).abs().max()))
    rates = [np.log2(errors[i] / errors[i + 1]) for i in range(2)]
    print(sampler, "errors", errors, "orders", rates)
    assert all(abs(rate - order) < 0.35 for rate in rates)


def test_evaluations_are_counted() -> None:
    for sampler, steps in (("euler", 7), ("heun", 7), ("heun", 1)):
        calls = []

        def velocity(x: torch.Tensor, time: torch.Tensor, calls: list = calls) -> torch.Tensor:
            calls.append(float(time[0]))
            return torch.zeros_like(x)

        integrate(velocity, torch.zeros(1, 1, 2, 2), sampler=sampler, steps=steps)  # type: ignore[arg-type]
        assert len(calls) == evaluations(sampler, steps)  # type: ignore[arg-type]
        assert min(calls) > 0


def test_one_euler_step_of_an_exact_x_prediction_is_the_picture() -> None:
    clean = torch.rand(3, 3, 8, 8)
    flow = Flow(DiffusionGroup(prediction="x"))
    velocity = guided(flow, lambda x, t: clean, None, 1.0)
    out = integrate(velocity, torch.randn(3, 3, 8, 8), sampler="euler", steps=4)
    assert torch.allclose(out, clean, atol=1e-5)


def test_guidance_is_linear_in_velocity() -> None:
    flow = Flow(DiffusionGroup(prediction="v"))
    velocity = guided(flow, lambda x, t: torch.full_like(x, 3.0), lambda x, t: torch.full_like(x, 1.0), 2.5)
    assert float(velocity(torch.zeros(1, 1, 1, 1), torch.ones(1))) == 1.0 + 2.5 * 2.0


def test_x_and_v_losses_are_the_same_velocity_error() -> None:
    """Above the floor, the x-loss is the velocity's squared error: (x_t − x̂)/t against ε − x0."""
    g = torch.Generator().manual_seed(1)
    clean, noise, predicted = (torch.randn(5, 3, 4, 4, generator=g) for _ in range(3))
    time = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.95])
    x, v = Flow(DiffusionGroup(prediction="x")), Flow(DiffusionGroup(prediction="v"))
    noised = x.noised(clean, noise, time)
    as_velocity = x.velocity(predicted, noised, time)
    ones = torch.ones(5)
    assert torch.allclose(
        x.loss(predicted, clean, noise, time, ones), v.loss(as_velocity, clean, noise, time, ones), rtol=1e-4
    )


def test_same_prompt_same_seed_same_picture_whatever_the_batch() -> None:
    vocabulary = Vocabulary.build(["a red circle", "a blue square", "a green star"], 300)
    spec = preset("uvit-tiny")
    text = WordEncoder(TextEncoderSpec(len(vocabulary), spec.text_width, spec.n_txt))
    model = TextToImage(UViT(spec), text).eval()
    how = Drawing("heun", 4, 2.0, 7)
    common = {"n_txt": spec.n_txt, "shape": (3, 32, 32), "device": torch.device("cpu")}
    flow = Flow(DiffusionGroup(prediction="x"))
    prompts = ["a red circle", "a blue square", "a red circle", "a green star"]
    together = draw(model, flow, vocabulary, prompts, repeats_of(prompts), how, **common)  # type: ignore[arg-type]
    alone = draw(model, flow, vocabulary, ["a green star"], [0], how, **common)  # type: ignore[arg-type]
    apart = np.abs(together[3].astype(int) - alone[0].astype(int)).max()
    assert apart <= 1  # one grey level: the matmuls of another batch size may round otherwise
    assert np.abs(together[0].astype(int) - together[2].astype(int)).max() > 10  # the second one of a prompt differs
    other = draw(model, flow, vocabulary, ["a green star"], [0], Drawing("heun", 4, 2.0, 8), **common)  # type: ignore[arg-type]
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
