"""What the ledger says a step costs, against a count of the ops that a step really dispatches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longskip.engine.build import build_model
from longskip.engine.costs import step_cost
from longskip.engine.data.sources import open_source
from longskip.engine.data.tokens import Vocabulary
from longskip.engine.diffusion import Flow
from longskip.engine.profiled import subject_of
from longskip.engine.vocabulary import build_vocabulary, save_vocabulary
from longskip.profiling import count_flops
from longskip.profiling.encoder_costs import encoder_cost
from tests.figures import figure
from tests.ranks import small_config


@pytest.mark.parametrize("model", [{}, {"conv": False}, {"skips": False}, {"adaln": True, "time_mlp": True}])
@pytest.mark.parametrize("checkpointing", [0, 1, 2, 3])
def test_hardware_flops_are_those_that_a_step_executes(shapes: Path, model: dict, checkpointing: int) -> None:
    config = small_config(shapes, model=model, engine={"checkpointing": checkpointing}, train={"batch_size": 2})
    built = build_model(config, 300, layout="named").materialize(0)
    counts = built.backbone.spec.param_counts()
    cost = step_cost(config, config.batch(1), n_parameters=sum(p.numel() for p in built.parameters()))
    flow = Flow(config.diffusion)
    clean, noise, time = torch.rand(2, 3, 32, 32), torch.randn(2, 3, 32, 32), torch.tensor([0.3, 0.6])
    tokens = torch.ones(2, 16, dtype=torch.int64)

    def step() -> None:
        prediction = built(flow.noised(clean, noise, time), time, tokens)
        flow.loss(prediction, clean, noise, time, torch.ones(2)).sum().backward()

    counted = count_flops(step)
    executed = counted.flops  # with what a fused attention repeats
    figure(
        f"{model or 'plain'}, checkpointing {checkpointing}: hardware FLOPs {cost.hardware_flops:,}, executed {executed:,}"
    )
    assert cost.hardware_flops == executed
    assert cost.model_flops == 3 * count_flops(lambda: built(clean, time, tokens)).flops
    assert cost.six_nd == 6 * (counts.total + 300 * 64) * cost.tokens
    assert cost.tokens == 2 * 33 and cost.image_tokens == 2 * 16


@pytest.mark.parametrize("checkpointing", [0, 2])
def test_frozen_text_needs_no_gradient(shapes: Path, checkpointing: int) -> None:
    """Features of a frozen encoder: the projection's gradient towards them is not computed, and not counted."""
    encoders = {"text": {"kind": "clip", "width": 48, "n_tokens": 16}}
    config = small_config(
        shapes,
        encoders=encoders,
        engine={"checkpointing": checkpointing},
        train={"batch_size": 2},
        diffusion={"caption_dropout": 0.0},
    )
    built = build_model(config, 0, layout="named").materialize(0)
    cost = step_cost(config, config.batch(1), n_parameters=1)
    text, time = torch.randn(2, 16, 48), torch.tensor([0.3, 0.6])

    def step() -> None:
        built(torch.randn(2, 3, 32, 32), time, text=text).square().sum().backward()

    counted = count_flops(step)
    assert cost.hardware_flops == counted.flops


def test_the_layers_of_the_word_encoder_cost_what_they_execute(shapes: Path) -> None:
    encoders = {"text": {"kind": "words", "depth": 2}}
    config = small_config(shapes, encoders=encoders, train={"batch_size": 2})
    built = build_model(config, 300, layout="named").materialize(0)
    cost = step_cost(config, config.batch(1), n_parameters=1)
    tokens, time = torch.ones(2, 16, dtype=torch.int64), torch.tensor([0.3, 0.6])

    def step() -> None:
        built(torch.randn(2, 3, 32, 32), time, tokens).square().sum().backward()

    counted = count_flops(step)
    assert cost.hardware_flops == counted.flops
    assert cost.model_flops == 3 * count_flops(lambda: built(torch.randn(2, 3, 32, 32), time, tokens)).flops


def test_a_bucket_costs_what_its_size_costs(shapes: Path) -> None:
    config = small_config(shapes, train={"batch_size": 2})
    built = build_model(config, 300, layout="named").materialize(0)
    cost = step_cost(config, config.batch(1), n_parameters=7, bucket=(24, 40))
    tokens, time = torch.ones(2, 16, dtype=torch.int64), torch.tensor([0.3, 0.6])
    assert cost.model_flops == 3 * count_flops(lambda: built(torch.randn(2, 3, 24, 40), time, tokens)).flops
    assert cost.tokens == 2 * (1 + 16 + 3 * 5) and cost.image_tokens == 2 * 3 * 5
    assert cost.six_nd == 6 * 7 * cost.tokens


def test_a_profile_counts_the_words_that_the_run_would(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N is the built model's: of the captions where the data are here, of the run where there is one, else the most."""
    monkeypatch.chdir(tmp_path)
    config = small_config(shapes)
    words = build_vocabulary(config, open_source(config.data.path))
    built = build_model(config, len(words), layout="named")  # nothing padded
    subject = subject_of(config, "mine")
    assert subject.parameters == sum(p.numel() for p in built.parameters())
    assert not any("captions" in note for note in subject.notes)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    save_vocabulary(tmp_path / "runs" / "mine" / "vocabulary.json", Vocabulary(("red", "blue")))
    assert subject_of(config, "mine").text.vocab_size == 257 + 2  # type: ignore[union-attr]
    away = small_config(tmp_path / "elsewhere")
    most = subject_of(away, "other")
    assert most.text.vocab_size == away.encoders.text.vocabulary  # type: ignore[union-attr]
    assert any("captions are not here" in note for note in most.notes)


def test_encoders_that_run_along_are_in_hardware_flops_only(shapes: Path) -> None:
    config = small_config(shapes, train={"batch_size": 2})
    vae = {"_class_name": "AutoencoderKL", "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
           "down_block_types": ["DownEncoderBlock2D"] * 2}  # fmt: skip
    plain = step_cost(config, config.batch(1), n_parameters=7)
    along = step_cost(config, config.batch(1), n_parameters=7, encoders={"vae": vae})
    height, width = config.resolution
    encoding = encoder_cost(vae, pixels=(height, width)).flops
    assert along.model_flops == plain.model_flops and along.six_nd == plain.six_nd
    assert along.hardware_flops - plain.hardware_flops == 2 * encoding > 0
