"""Initial values: a pure function of their arguments, with the distributions they promise."""

from __future__ import annotations

import math
import time

import pytest
import torch

from longskip.errors import SpecError
from longskip.models.init import initial_value
from longskip.models.presets import preset
from longskip.models.uvit import UViT


def test_pure_in_its_arguments() -> None:
    first = initial_value(3, "blocks.0.mlp.fc1.weight", (64, 32), "trunc_normal")
    initial_value(4, "other", (7,), "normal")
    torch.manual_seed(0)
    assert torch.equal(first, initial_value(3, "blocks.0.mlp.fc1.weight", (64, 32), "trunc_normal"))
    assert not torch.equal(first, initial_value(4, "blocks.0.mlp.fc1.weight", (64, 32), "trunc_normal"))
    assert not torch.equal(first, initial_value(3, "blocks.1.mlp.fc1.weight", (64, 32), "trunc_normal"))
    assert first.dtype == torch.float32


def test_draws_are_not_shared_between_parameters() -> None:
    """Correlation of equal-seed draws under other names stays within 4 standard errors of 0."""
    draws = torch.stack([initial_value(0, f"p{i}", (20000,), "normal") for i in range(6)])
    correlation = torch.corrcoef(draws) - torch.eye(6)
    assert correlation.abs().max() < 4 / math.sqrt(20000)


def test_distributions() -> None:
    count = 1_500_000  # more than one chunk
    z = initial_value(1, "w", (count,), "trunc_normal").double() / 0.02
    assert z.abs().max() <= 2.0
    # standard normal cut at 2: variance 1 - 2·2·φ(2)/(2Φ(2) - 1)
    mass = math.erf(2 / math.sqrt(2))
    variance = 1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / mass
    assert abs(z.var().item() - variance) < 5 * math.sqrt(2 / count)
    assert abs(z.mean().item()) < 5 / math.sqrt(count)
    inside = (z.abs() < 1).double().mean().item()
    assert abs(inside - math.erf(1 / math.sqrt(2)) / mass) < 5 * 0.5 / math.sqrt(count)
    normal = initial_value(1, "w", (count,), "normal").double()
    assert abs(normal.std().item() - 1) < 5 / math.sqrt(2 * count) and normal.abs().max() > 4
    fan = initial_value(1, "w", (60, 30, 3, 3), "fan_in").double()
    bound = 1 / math.sqrt(270)
    assert (
        0.99 * bound < fan.abs().max() <= bound * (1 + 1e-6) and abs(fan.mean().item()) < 5 * bound / fan.numel() ** 0.5
    )
    xavier = initial_value(1, "w", (60, 30, 3, 3), "xavier")
    assert 0.99 < xavier.abs().max().item() / math.sqrt(6 / (270 + 540)) <= 1 + 1e-6
    assert torch.equal(initial_value(1, "w", (3, 2), "ones"), torch.ones(3, 2))
    assert not initial_value(1, "w", (3, 2), "zeros").any()


def test_sincos_positions_by_scalar_formula() -> None:
    rows, cols, width, extras = 3, 4, 16, 5
    table = initial_value(0, "embed.pos", (extras + rows * cols, width), f"sincos:{rows}x{cols}")
    for i in range(rows):
        for j in range(cols):
            row = table[extras + i * cols + j]
            for axis, place in enumerate((i, j)):
                for n in range(width // 4):
                    angle = place / 10000 ** (n / (width // 4))
                    start = axis * width // 2 + n
                    assert row[start].item() == pytest.approx(math.sin(angle), abs=1e-6)
                    assert row[start + width // 4].item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert 0 < table[:extras].abs().max() <= 0.04


def test_unknown_kind_is_refused() -> None:
    for kind in ("orthogonal", "sincos", "sincos:3"):
        with pytest.raises(SpecError, match="kind"):
            initial_value(0, "w", (4, 4), kind)
    with pytest.raises(SpecError, match="3x3"):
        initial_value(0, "w", (8, 4), "sincos:3x3")


def test_fast_enough_for_large_models() -> None:
    """20 ns an element is 2 s of processor time for 100M; a bound ten times that still catches a Python loop."""
    started = time.process_time()
    initial_value(0, "w", (10_000_000,), "trunc_normal")
    assert time.process_time() - started < 2.0


def test_models_start_the_same_in_both_layouts() -> None:
    spec = preset("uvit-tiny", qk_norm=True, time_mlp=True)
    named, flat = UViT(spec, "named", seed=5).state_dict(), UViT(spec, "flat", seed=5).state_dict()
    assert list(named) == list(flat)
    for name, value in named.items():
        assert torch.equal(value, flat[name]), name
    entry = {p.name: p for table in spec.parameters().values() for p in table}["blocks.2.mlp.fc1.weight"]
    assert torch.equal(named[entry.name], initial_value(5, entry.name, entry.shape, entry.init))
