"""Closed forms of the frozen encoders against what diffusers' and transformers' own modules dispatch and hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longskip.engine.encoders import Encoders
from longskip.errors import EncoderError, SpecError
from longskip.profiling import count_flops
from longskip.profiling.encoder_costs import KNOWN, EncoderCost, encoder_cost
from tests.figures import figure
from tests.tiny_encoders import tiny_clip, tiny_clip_text, tiny_t5, tiny_vae

SD_WIDTHS = (128, 256, 512, 512)
# As published: the text halves of OpenAI's CLIP L/14 and of OpenCLIP H/14 (without its last layer, as Stable Diffusion 2
# takes it), and the encoders of T5 v1.1 small, whose heads together are narrower than the model, and XXL.
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
T5_SMALL = {
    "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
T5_XXL = {
    "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu",
}  # fmt: skip


def count(call: Callable[[], Any]) -> int:
    with torch.no_grad():
        return count_flops(call).macs


def held(*modules: torch.nn.Module | None) -> int:
    return sum(p.numel() for module in modules if module is not None for p in module.parameters())


def autoencoder(widths: tuple[int, ...], kinds: tuple[str, ...] = (), **options: Any) -> Any:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL(
            block_out_channels=widths,
            down_block_types=kinds or ("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            **options,
        ).eval()


def stored(model: Any) -> dict[str, Any]:
    """What ``save_pretrained`` writes."""
    return json.loads(model.to_json_string() if hasattr(model, "to_json_string") else model.config.to_json_string())


def check_autoencoder(model: Any, pixels: tuple[int, int], batch: int) -> EncoderCost:
    cost = encoder_cost(stored(model), pixels=pixels, batch=batch)
    pictures = torch.empty(batch, model.config.in_channels, *pixels, device="meta")
    assert cost.macs == count(lambda: model.encode(pictures).latent_dist.mean)
    assert cost.parameters == held(model.encoder, model.quant_conv)
    assert cost.flops == 2 * cost.macs == sum(cost.flops_by_op.values())
    return cost


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_random_autoencoders(data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, 3))
    levels = data.draw(st.integers(1, 4))
    widths = tuple(groups * data.draw(st.integers(1, 4)) for _ in range(levels))
    kinds = tuple(data.draw(st.sampled_from(("DownEncoderBlock2D", "AttnDownEncoderBlock2D"))) for _ in range(levels))
    model = autoencoder(
        widths,
        kinds,
        layers_per_block=data.draw(st.integers(1, 3)),
        norm_num_groups=groups,
        in_channels=data.draw(st.integers(1, 4)),
        latent_channels=data.draw(st.integers(1, 5)),
        use_quant_conv=data.draw(st.booleans()),
        mid_block_add_attention=data.draw(st.booleans()),
    )
    # A group norm refuses groups of a single value, hence at least two rows.
    sides = (data.draw(st.integers(2, 3)) << (levels - 1), data.draw(st.integers(1, 3)) << (levels - 1))
    check_autoencoder(model, sides, data.draw(st.integers(1, 2)))


@pytest.mark.parametrize("side", [256, 512])
def test_the_autoencoder_of_stable_diffusion(side: int) -> None:
    cost = check_autoencoder(autoencoder(SD_WIDTHS, layers_per_block=2), (side, side), 1)
    figure(f"Stable Diffusion's autoencoder at {side}²: {cost.macs:,} MACs to encode, {cost.parameters:,} parameters")
    assert cost.macs_by_op["mid_attention"] == 2 * (side // 8) ** 4 * 512


def test_the_autoencoder_without_quant_conv_and_sixteen_channels() -> None:
    """The shape of the newer autoencoders of 16 channels."""
    model = autoencoder(SD_WIDTHS, layers_per_block=2, latent_channels=16, use_quant_conv=False)
    assert "quant_conv" not in check_autoencoder(model, (64, 128), 2).macs_by_op


def t5(device: str, **shape: Any) -> Any:
    from transformers import T5Config, T5EncoderModel

    with torch.device(device):
        return T5EncoderModel(T5Config(**shape)).eval()


def clip(device: str, projection: bool = False, **shape: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device(device):
        kind = CLIPTextModelWithProjection if projection else CLIPTextModel
        return kind(CLIPTextConfig(**shape)).eval()


def check_text(model: Any, tokens: int, batch: int, **options: Any) -> EncoderCost:
    """Without a mask, which needs values: it changes no contraction (see the encoders of the engine below)."""
    cost = encoder_cost(stored(model), tokens=tokens, batch=batch, **options)
    ids = torch.zeros(batch, tokens, dtype=torch.int64, device=model.device)
    assert cost.macs == count(lambda: model(input_ids=ids))
    assert cost.parameters == held(model) and cost.tokens == batch * tokens
    return cost


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_random_t5(data: st.DataObject) -> None:
    small = st.integers(1, 9)
    model = t5(
        "meta",
        vocab_size=data.draw(st.integers(2, 9)),
        d_model=data.draw(small),
        d_kv=data.draw(small),  # the heads' width together is not d_model
        d_ff=data.draw(small),
        num_layers=data.draw(st.integers(1, 3)),
        num_heads=data.draw(small),
        relative_attention_num_buckets=2 * data.draw(st.integers(2, 9)),
        feed_forward_proj=data.draw(st.sampled_from(("relu", "gelu", "gated-gelu", "gated-silu"))),
    )
    check_text(model, data.draw(small), data.draw(st.integers(1, 3)))


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_random_clip(data: st.DataObject) -> None:
    small, heads, projection = st.integers(1, 9), data.draw(st.integers(1, 3)), data.draw(st.booleans())
    model = clip(
        "meta",
        projection,
        vocab_size=data.draw(small),
        hidden_size=heads * data.draw(small),
        intermediate_size=data.draw(small),
        num_hidden_layers=data.draw(st.integers(1, 3)),
        num_attention_heads=heads,
        max_position_embeddings=9,
        projection_dim=data.draw(small),
        eos_token_id=0,
    )
    check_text(model, data.draw(small), data.draw(st.integers(1, 3)), projection=projection)


def test_published_text_encoders() -> None:
    for name, model, tokens in (
        ("T5 v1.1 small", t5("meta", **T5_SMALL), 120),
        ("T5 v1.1 XXL", t5("meta", **T5_XXL), 120),
        ("CLIP L/14", clip("meta", **CLIP_L), 77),
        ("OpenCLIP H/14", clip("meta", **CLIP_H), 77),
    ):
        cost = check_text(model, tokens, 1)
        figure(f"{name}, {tokens} tokens: {cost.macs:,} MACs a text, {cost.parameters:,} parameters")


def test_projection_is_one_linear_on_one_token_a_text() -> None:
    config = stored(clip("meta", **CLIP_L, projection_dim=768))
    with_it, without = (encoder_cost(config, tokens=77, batch=3, projection=one) for one in (True, False))
    assert with_it.macs - without.macs == 3 * 768 * 768 and with_it.parameters - without.parameters == 768 * 768


@pytest.mark.parametrize("make", [tiny_t5, tiny_clip_text, tiny_clip])
def test_the_engine_executes_what_the_closed_form_says(make: Callable[..., Path], tmp_path: Path) -> None:
    """Pictures and captions through the engine's encoders, loaded from folders; T5 under the mask of its padding."""
    text = make(tmp_path / "text")
    vae = tiny_vae(tmp_path / "vae", factor=4)
    encoders = Encoders.at(vae, text, (32, 48), "cpu").load()
    texts = ["a red circle", "a large green square above a blue star", ""]
    config = json.loads((text / "config.json").read_text("utf-8"))
    cost = encoder_cost(config, tokens=encoders.text.n_tokens, batch=3)
    assert cost.macs == count(lambda: encoders.encode_text(texts))
    assert cost.parameters == held(encoders._text_model)
    config = json.loads((vae / "config.json").read_text("utf-8"))
    pictures = torch.zeros(2, 3, 32, 48)
    assert encoder_cost(config, pixels=(32, 48), batch=2).macs == count(lambda: encoders.encode_images(pictures))


def test_what_a_config_leaves_out_has_the_librarys_default() -> None:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, T5Config

    vae = encoder_cost({"_class_name": "AutoencoderKL"}, pixels=(8, 8))
    assert vae == encoder_cost({"_class_name": "AutoencoderKL", **AutoencoderKL().config}, pixels=(8, 8))
    for name, config in (("t5", T5Config()), ("clip_text_model", CLIPTextConfig())):
        assert encoder_cost({"model_type": name}, tokens=7) == encoder_cost(stored(config), tokens=7)
    projected = encoder_cost({"model_type": "clip_text_model"}, tokens=7, projection=True)
    assert projected == encoder_cost(stored(CLIPTextConfig()), tokens=7, projection=True)
    aliased = {"hidden_size": 24, "num_attention_heads": 3, "head_dim": 5, "num_hidden_layers": 2}
    assert encoder_cost({"model_type": "t5", **aliased}, tokens=7) == encoder_cost(
        stored(T5Config(**aliased)), tokens=7
    )


VAE, T5, CLIP = {"_class_name": "AutoencoderKL"}, {"model_type": "t5"}, {"model_type": "clip_text_model"}
FOUR = {**VAE, "block_out_channels": [8] * 4, "down_block_types": ["DownEncoderBlock2D"] * 4}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "VQModel"}, r"'VQModel'[^$]*known: AutoencoderKL, clip, clip_text_model, t5"),
        ({"_class_name": "AutoencoderKl"}, r"did you mean 'AutoencoderKL'"),
        ({"model_type": "umt5"}, r"'umt5'"),
        ({"model_type": ["t5"]}, r"\['t5'\]"),
        ({}, "neither _class_name nor model_type"),
        ([], "not list"),
        ({**VAE, "block_out_channels": []}, r"block_out_channels = \[\]"),
        ({**VAE, "block_out_channels": [8, True]}, "block_out_channels"),
        ({**VAE, "block_out_channels": [8, 16]}, "down_block_types"),
        ({**VAE, "down_block_types": ["DownBlock2D"]}, "'DownBlock2D'[^$]*AttnDownEncoderBlock2D"),
        ({**VAE, "layers_per_block": 0}, "layers_per_block = 0"),
        ({**VAE, "use_quant_conv": "no"}, "use_quant_conv = 'no'"),
        ({**T5, "d_model": -4}, "d_model = -4"),
        ({**T5, "feed_forward_proj": "dense-gelu"}, "dense-gelu"),
        ({**T5, "feed_forward_proj": None}, "feed_forward_proj = None"),
        ({**CLIP, "hidden_size": 51.2}, "hidden_size = 51.2"),
        ({"model_type": "clip"}, "text_config = None"),
    ],
)
def test_configs_that_cannot_be_costed(config: Any, message: str) -> None:
    sizes: dict[str, Any] = (
        {"pixels": (8, 8)} if isinstance(config, dict) and "_class_name" in config else {"tokens": 8}
    )
    with pytest.raises(EncoderError, match=message):
        encoder_cost(config, **sizes)


@pytest.mark.parametrize(
    ("config", "sizes", "message"),
    [
        (VAE, {}, "pixels missing"),
        (VAE, {"pixels": (8, 8), "tokens": 7}, "tokens given"),
        (VAE, {"pixels": (8, 8), "projection": True}, "projection given"),
        (VAE, {"pixels": (8, 0)}, r"\(8, 0\)"),
        (FOUR, {"pixels": (24, 20)}, "24x20 pixels[^$]*multiples of 8"),
        (T5, {}, "tokens missing"),
        (T5, {"tokens": 7, "pixels": (8, 8)}, "pixels given"),
        (T5, {"tokens": 7, "projection": True}, "projection given"),
        (T5, {"tokens": 0}, "tokens = 0"),
        (T5, {"tokens": 7, "batch": -1}, "batch = -1"),
        (CLIP, {"tokens": 78}, "77 positions"),
    ],
)
def test_sizes_that_do_not_fit(config: Any, sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        encoder_cost(config, **sizes)


def test_every_kind_is_one_that_the_engine_loads() -> None:
    from longskip.engine import encoderfiles

    assert set(KNOWN) == {"AutoencoderKL", *encoderfiles._KINDS}
