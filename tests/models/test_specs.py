"""Closed forms against the published numbers and against independent counts of the built module."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import longskip
from longskip.errors import SpecError
from longskip.kernels.formulas import FORMULAS
from longskip.models.conditioning import Conditioning
from longskip.models.packed import Packed
from longskip.models.presets import PRESETS, preset
from longskip.models.specs import TextEncoderSpec, UViTSpec
from longskip.models.text import WordEncoder
from longskip.models.uvit import UViT
from tests.figures import figure

# preset: parameters, forward MACs (thousands where the source prints GMACs), from the papers' definitions
PUBLISHED: dict[str, tuple[int, float]] = {
    "uvit-0.3b": (286_865_572, 100.149),
    "uvit-0.6b": (586_994_852, 205.340),
    "uvit-1.3b": (1_319_321_252, 454.579),
    "uvit-2.3b": (2_344_200_356, 801.530),
    "uvit-3.7b": (3_661_632_164, 1246.194),
    "uvit-8b": (7_971_360_932, 2705.127),
}
EXACT_FLOPS: dict[str, tuple[int, int]] = {
    "uvit-h2-imagenet256": (500_832_016, 266_393_438_208),
    "uvit-s2-coco": (44_692_644, 32_459_431_936),
    "uvit-s2-cifar10": (44_255_328, 24_401_616_896),
}


def meta_inputs(
    spec: UViTSpec, batch: int = 1, device: str = "meta"
) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    cond = Conditioning(
        text=torch.zeros(batch, spec.n_txt, spec.text_width, device=device) if spec.n_txt else None,
        label=torch.zeros(batch, dtype=torch.int64, device=device) if spec.n_classes else None,
    )
    latents = torch.zeros(batch, spec.channels, *spec.latent_size, device=device)
    return latents, torch.zeros(batch, device=device), cond


def counted_flops(spec: UViTSpec, batch: int = 1) -> int:
    model = UViT(spec, device="meta")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(*meta_inputs(spec, batch))
    return counter.get_total_flops()


def canonical_numel(model: torch.nn.Module) -> int:
    return sum(value.numel() for value in model.state_dict().values())


@pytest.mark.parametrize("name", [*PUBLISHED, *EXACT_FLOPS])
def test_published_numbers(name: str) -> None:
    spec = PRESETS[name]
    model = UViT(spec, device="meta")
    counted = sum(parameter.numel() for parameter in model.parameters())
    flops = counted_flops(spec)
    if name in PUBLISHED:
        params, gmacs = PUBLISHED[name]
        assert round(spec.flops().macs / 1e9, 3) == gmacs
    else:
        params, published = EXACT_FLOPS[name]
        assert spec.flops().flops == published
    assert spec.param_counts().total == counted == params
    assert spec.flops().flops == flops


def test_8b_builds_on_meta_in_two_seconds() -> None:
    spec = preset("uvit-8b")
    for layout in ("named", "flat"):
        started = time.process_time()
        model = UViT(spec, layout, device="meta")  # type: ignore[arg-type]
        seconds = time.process_time() - started
        assert seconds < 2
        figure(f"uvit-8b, {layout}: built on meta in {1000 * seconds:.0f} ms")
        assert canonical_numel(model) == spec.param_counts().total
        assert all(parameter.is_meta for parameter in model.parameters())


@st.composite
def specs(draw: Any) -> UViTSpec:
    heads = draw(st.integers(1, 3))
    patch = draw(st.integers(1, 3))
    n_txt = draw(st.integers(0, 5))
    switch = st.booleans()
    return UViTSpec(
        width=4 * heads * draw(st.integers(1, 5)),
        depth=draw(st.integers(1, 6)),
        n_heads=heads,
        patch=patch,
        channels=draw(st.integers(1, 4)),
        out_channels=draw(st.none() | st.integers(1, 8)),
        latent_size=(patch * draw(st.integers(1, 5)), patch * draw(st.integers(1, 5))),
        n_txt=n_txt,
        text_width=draw(st.integers(1, 9)) if n_txt else 0,
        n_classes=draw(st.integers(0, 4)),
        mlp_ratio=draw(st.integers(1, 5)),
        time_mlp=draw(switch),
        conv=draw(switch),
        skips=draw(switch),
        qk_norm=draw(switch),
        adaln=draw(switch),
        pos_init=draw(st.sampled_from(("normal", "sincos"))),
    )


@settings(max_examples=40, deadline=None)
@given(specs(), st.integers(1, 3))
def test_closed_forms_equal_independent_counts(spec: UViTSpec, batch: int) -> None:
    counts = spec.param_counts()
    declared = [entry for table in spec.parameters().values() for entry in table]
    for layout in ("named", "flat"):
        model = UViT(spec, layout, device="meta")  # type: ignore[arg-type]
        assert canonical_numel(model) == counts.total == sum(entry.numel for entry in declared)
        assert list(model.state_dict()) == [entry.name for entry in declared]
    assert counts.total == sum(counts.by_part.values())
    costs = spec.flops(batch)
    assert counted_flops(spec, batch) == costs.flops == 2 * sum(costs.macs_by_op.values())
    assert costs.model_flops == 6 * costs.macs
    assert (costs.tokens, costs.image_tokens) == (batch * spec.n_tokens, batch * spec.n_img)


@settings(max_examples=25, deadline=None)
@given(specs())
def test_per_token_is_what_every_token_passes(spec: UViTSpec) -> None:
    """N_token from the built model: block and head parameters, without adaLN's projections and the convolution."""
    per_token = per_image = 0
    for name, value in UViT(spec, device="meta").state_dict().items():
        if ".ada." in name or name.startswith("embed.time."):
            per_image += value.numel()
        elif not name.startswith(("embed.", "head.conv.")):
            per_token += value.numel()
    counts = spec.param_counts()
    assert (counts.per_token, counts.per_image) == (per_token, per_image)


BASE = UViTSpec(24, 4, 2, channels=3, latent_size=(8, 4), n_txt=3, text_width=5)


@pytest.mark.parametrize(
    ("change", "declared"),
    [
        ({"skips": False}, -2 * (2 * 24**2 + 24)),
        ({"qk_norm": True}, 5 * 2 * 12),
        ({"adaln": True}, (5 * 6 + 2) * (24**2 + 24) - 5 * 4 * 24 - 2 * 24),
        ({"conv": False}, -(9 * 3 * 3 + 3)),
        ({"time_mlp": True}, 8 * 24**2 + 5 * 24),
        ({"n_txt": 0, "text_width": 0}, -3 * 24 - (5 + 1) * 24),
        ({"n_classes": 7}, 7 * 24 + 24),
        ({"out_channels": 6}, (4 * 3) * 25 + 9 * 36 + 6 - (9 * 9 + 3)),
        ({"pos_init": "sincos"}, 0),
    ],
)
def test_each_switch_changes_the_count_as_declared(change: dict[str, Any], declared: int) -> None:
    spec = replace(BASE, **change)
    model = UViT(spec, device="meta")
    assert spec.param_counts().total - BASE.param_counts().total == declared
    assert canonical_numel(model) == spec.param_counts().total


def test_flops_at_another_resolution_and_text_length() -> None:
    spec = UViTSpec(16, 3, 2, latent_size=(4, 4), n_txt=6, text_width=5, n_classes=3)
    model = UViT(spec, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cond = Conditioning(
            text=torch.zeros(2, 4, 5, device="meta"), label=torch.zeros(2, dtype=torch.long, device="meta")
        )
        model(torch.zeros(2, 4, 8, 6, device="meta"), torch.zeros(2, device="meta"), cond)
    costs = spec.flops(2, latent_size=(8, 6), n_txt=4)
    assert counter.get_total_flops() == costs.flops
    assert costs.tokens == 2 * (1 + 1 + 4 + 12)


def test_the_kernels_formulas_say_the_same() -> None:
    """The parts that the ops declare, from the kernels' own formulas."""
    spec, batch = replace(BASE, mlp_ratio=3), 2
    rows, h, macs = batch * spec.n_tokens, spec.width, spec.flops(2).macs_by_op
    forward = {op: formula.forward for op, formula in FORMULAS.items()}
    attention = forward["attention"](
        batch=batch, queries=spec.n_tokens, keys=spec.n_tokens, heads=spec.n_heads, head_dim=spec.head_dim
    )
    assert macs["attention"] == spec.n_blocks * attention.macs
    assert macs["mlp"] == spec.n_blocks * forward["mlp"](rows=rows, width=h, hidden=3 * h, out=h).macs
    assert macs["skip_linear"] == spec.n_skips * forward["skip_linear"](rows=rows, width=h, out=h).macs


def test_six_nd_ratio_of_facts() -> None:
    """Exact training FLOPs over 6·N·tokens, all tokens and image tokens only, to the printed four digits."""
    for name, ratio in (("uvit-2.3b", 1.0237), ("uvit-8b", 1.0160), ("uvit-h2-imagenet256", 1.0308)):
        spec = preset(name)
        assert round(spec.flops().model_flops / (6 * spec.param_counts().total * spec.n_tokens), 4) == ratio
    wide = preset("uvit-2.3b", latent_size=(128, 128))
    assert round(wide.flops().model_flops / (6 * wide.param_counts().total * wide.n_tokens), 4) == 1.3077


def test_decay_is_for_weights_of_two_and_more_axes() -> None:
    spec = replace(BASE, n_classes=3, qk_norm=True, time_mlp=True)
    for table in spec.parameters().values():
        for entry in table:
            small = len(entry.shape) == 1 or entry.name in ("embed.pos", "embed.label.weight")
            assert entry.decay is not small, entry.name
    assert not TextEncoderSpec(9, 4, 2).parameters()["embedding"][0].decay


def test_text_encoder_counts() -> None:
    spec = TextEncoderSpec(vocab_size=11, width=6, n_tokens=4)
    assert spec.param_counts().total == 66 == canonical_numel(WordEncoder(spec, device="meta"))
    assert spec.flops().macs == 0
    deep = replace(spec, depth=3)
    assert deep.param_counts().total == sum(entry.numel for entry in deep.parameters()["embedding"])
    assert deep.param_counts().total == canonical_numel(WordEncoder(deep, device="meta"))
    encoder = WordEncoder(deep)
    with FlopCounterMode(display=False) as counter:
        encoder(torch.ones(5, 4, dtype=torch.int64))
    assert deep.flops(5).flops == counter.get_total_flops() and deep.flops(5).tokens == 20
    assert {entry.name for entry in deep.parameters()["embedding"] if entry.decay} == {
        f"layers.{index}.linear.weight" for index in range(3)
    }
    with pytest.raises(SpecError, match="depth = -1"):
        replace(spec, depth=-1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_heads": 5}, ("24", "5")),
        ({"width": 25, "n_heads": 5}, ("25", "even")),
        ({"width": 0}, ("width", "0")),
        ({"depth": 0}, ("depth", "1")),
        ({"depth": 2.5}, ("depth", "2.5")),
        ({"patch": 3}, ("8x4", "3")),
        ({"latent_size": (8,)}, ("latent_size",)),
        ({"n_txt": 4, "text_width": 0}, ("n_txt = 4", "text_width = 0")),
        ({"conv": "yes"}, ("conv", "yes")),
        ({"pos_init": "rope"}, ("rope", "sincos")),
        ({"width": 26, "pos_init": "sincos"}, ("26", "4")),
        ({"time_scale": float("nan")}, ("time_scale", "nan")),
        ({"out_channels": -1}, ("out_channels", "-1")),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(SpecError) as caught:
        replace(BASE, **change)
    assert all(word in str(caught.value) for word in words)
    assert caught.value.cure


def test_presets_say_did_you_mean() -> None:
    with pytest.raises(SpecError, match=r"did you mean 'uvit-2\.3b'"):
        preset("uvit2.3b")
    with pytest.raises(SpecError, match="did you mean 'n_heads'"):
        preset("uvit-tiny", n_head=4)
    assert preset("uvit-tiny", latent_size=[16, 16]).n_img == 4
    assert preset("uvit-2.3b") is not None and preset("uvit-tiny", depth=6).n_blocks == 7


def test_specs_and_presets_import_without_torch() -> None:
    code = (
        "import sys, longskip.models.specs, longskip.models.presets as p, longskip.models as m\n"
        "s = p.preset('uvit-8b'); s.flops(); s.param_counts(); s.saved_bytes(1, 2); s.parameters(); m.UViTSpec\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules, 'heavy import'"
    )
    root = str(Path(longskip.__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path}, timeout=60)


def test_units_are_leaf_modules_that_own_their_parameters() -> None:
    model = UViT(BASE, device="meta")
    units = [module for module in model.modules() if isinstance(module, Packed)]
    assert [unit.prefix for unit in units] == list(BASE.parameters())
    assert all(not list(unit.children()) for unit in units)
    assert sum(len(list(unit.parameters(recurse=False))) for unit in units) == len(list(model.parameters()))
