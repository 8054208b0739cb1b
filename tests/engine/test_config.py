"""Configuration: what is accepted, what is refused, and that every refusal names value, limit and cure."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longskip.engine.config import Config
from longskip.engine.configio import dump_yaml, load_config, parse_override, validate
from longskip.engine.identity import differing_keys
from longskip.errors import ConfigError, SpecError
from longskip.profiling.yamlfiles import parse_yaml


def test_numbers_as_yaml_text(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-4 as text; users write it all the same."""
    (tmp_path / "run.yaml").write_text("optim:\n  lr: 1e-4\n  eps: 1e-8\n")
    config = load_config(tmp_path / "run.yaml", ["optim.weight_decay=3e-2"])
    assert (config.optim.lr, config.optim.eps, config.optim.weight_decay) == (1e-4, 1e-8, 0.03)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optm: {lr: 1}", ["optm", "did you mean 'optim'"]),
        ("optim: {learning_rate: 1}", ["optim.learning_rate", "lr"]),
        ("train: {stepz: 1}", ["train.stepz", "did you mean 'train.steps'"]),
        ("encoders: {text: {tokens: 3}}", ["encoders.text.tokens", "n_tokens"]),
        ("optim: {lr: fast}", ["optim.lr", "fast"]),
        ("optim: {lr: -1}", ["optim.lr", "-1"]),
        ("optim: {lr: .nan}", ["optim.lr"]),
        ("train: {steps: 0}", ["train.steps", "0"]),
        ("train: {batch_size: 10, micro_batch: 3}", ["10", "3", "[1, 2, 5, 10]"]),
        ("train: {batch_size: 12, micro_batch: 4, accumulation: 2}", ["12", "two of the three"]),
        ("optim: {lr: true}", ["optim.lr", "true or false"]),
        ("train: {steps: true}", ["train.steps"]),
        ("optim: {betas: [0.9, 1.0]}", ["optim.betas", "less than 1"]),
        ("optim: {eps: .inf}", ["optim.eps"]),
        ("kernels: {backend: nope}", ["kernels.backend", "nope", "torch"]),
        ("eval: {judge_count: 1}", ["eval.judge_count"]),
        ("{[1, 2]: 3}", ["no text"]),
        ("train: {name: 2024-99-99}", ["not valid YAML"]),
        ("deepspeed: {zero_stage: 4}", ["deepspeed.zero_stage", "4"]),
        ("engine: {ema_device: cuda:7}", ["engine.ema_device", "cuda:7", "device", "cpu"]),
        ("model: {preset: uvit-shape}", ["uvit-shape", "uvit-shapes"]),
        ("model: {preset: uvit-h2-imagenet256, resolution: 32, patch: 2}", ["uvit-h2-imagenet256", "classes"]),
        ("model: {resolution: 33}", ["33x33", "patch 8"]),
        ("model: {width: 130, n_heads: 4}", ["130", "4"]),
        ("train: {name: ../elsewhere}", ["train.name"]),
        ("train: {name: '-rf'}", ["train.name"]),
        ("data: {shuffle: sometimes}", ["data.shuffle"]),
        ("train: {steps: 1}\ntrain: {steps: 2}", ["train", "twice"]),
        ("a: &a [1]\nb: *a", ["aliases"]),
        ("train: !!python/object/apply:os.system ['true']", ["python"]),
        ("[1, 2]", ["not a mapping"]),
        ("train: {steps: 1", ["not valid YAML"]),
    ],
)
def test_refusals(text: str, words: list[str]) -> None:
    with pytest.raises((ConfigError, SpecError)) as caught:
        validate(parse_yaml(text))
    for word in words:
        assert word in str(caught.value)


def test_extends_and_overrides(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("optim: {lr: 1e-3, clip: 2}\ntrain: {steps: 5}\n")
    (tmp_path / "run.yaml").write_text("extends: base.yaml\noptim: {clip: 3}\n")
    config = load_config(tmp_path / "run.yaml", ["train.steps=7", "logging.prompts=[a cat, a dog]"])
    assert (config.optim.lr, config.optim.clip, config.train.steps) == (1e-3, 3.0, 7)
    assert config.logging.prompts == ("a cat", "a dog")
    (tmp_path / "base.yaml").write_text("extends: run.yaml\n")
    with pytest.raises(ConfigError, match="circle"):
        load_config(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match="of the form"):
        parse_override("--lr")


def test_round_trip_and_what_may_change_on_resume() -> None:
    config = validate({"train": {"steps": 5}, "optim": {"lr": "2e-4"}})
    assert validate(parse_yaml(dump_yaml(config))) == config
    longer = validate(
        {"train": {"steps": 9}, "optim": {"lr": 2e-4}, "logging": {"every": 3}, "checkpoint": {"every": 7}}
    )
    assert differing_keys(config, longer) == {}
    other = validate({"train": {"steps": 5, "seed": 1}, "optim": {"lr": 3e-4}})
    assert differing_keys(config, other) == {"optim.lr": (2e-4, 3e-4), "train.seed": (0, 1)}
    named = validate({"train": {"steps": 5, "name": "run"}, "optim": {"lr": 2e-4}})
    assert differing_keys(config, named) == differing_keys(named, config) == {}


def test_the_folders_of_a_mix_may_move_and_its_weights_may_not() -> None:
    def mix(*parts: tuple[str, float]) -> Config:
        return validate({"data": {"mix": [{"path": path, "weight": weight} for path, weight in parts]}})

    here = mix(("a", 3), ("b", 1))
    assert differing_keys(here, mix(("/elsewhere/a", 3), ("/elsewhere/b", 1))) == {}
    for other, weights in ((mix(("a", 1), ("b", 3)), [1.0, 3.0]), (mix(("a", 3)), [3.0])):
        assert differing_keys(here, other) == {"data.mix": ([3.0, 1.0], weights)}
    assert differing_keys(here, validate({"data": {"path": "a"}})) == {"data.mix": ([3.0, 1.0], [])}


IDLE = [
    ("diffusion: {objective: ddpm, time_mean: 0.6}", "diffusion.time_mean 0.6", "diffusion.objective is ddpm"),
    ("diffusion: {objective: ddpm, time_std: 2}", "diffusion.time_std 2.0", "its default 1.0"),
    ("diffusion: {objective: ddpm, time_floor: 0.1}", "diffusion.time_floor 0.1", "its default 0.05"),
    ("diffusion: {objective: ddpm, shift: 3}", "diffusion.shift 3.0", "diffusion.objective is ddpm"),
    ("diffusion: {beta_end: 0.02}", "diffusion.beta_end 0.02", "diffusion.objective is flow"),
    ("diffusion: {train_steps: 500}", "diffusion.train_steps 500", "diffusion.objective is flow"),
    ("diffusion: {prediction: v, time_floor: 0.1}", "diffusion.time_floor 0.1", "diffusion.prediction is v"),
    (
        "data: {captions: {long: 1}}\nencoders: {text: {kind: none}}",
        "data.captions {'long': 1.0}",
        "encoders.text.kind is none",
    ),
    ("data: {window_shards: 4}", "data.window_shards 4", "data.shuffle is full"),
    ("data: {path: here, remote: fsspec}", "data.remote 'fsspec'", "no data lie at a URL"),
    ("data: {mix: [{path: here}], cache: c}", "data.cache 'c'", "no data lie at a URL"),
    ("encoders: {text: {kind: none, n_tokens: 77}}", "encoders.text.n_tokens 77", "its default 16"),
    ("encoders: {text: {path: t5}}", "encoders.text.path 't5'", "encoders.text.kind is words"),
    ("encoders: {text: {kind: clip, vocabulary: 9}}", "encoders.text.vocabulary 9", "encoders.text.kind is clip"),
    ("encoders: {text: {kind: t5, depth: 2}}", "encoders.text.depth 2", "encoders.text.kind is t5"),
    ("encoders: {vae: {path: vae}}", "encoders.vae.path 'vae'", "encoders.vae.kind is none"),
    ("optim: {final_lr_share: 0.1}", "optim.final_lr_share 0.1", "optim.schedule is constant"),
    ("optim: {ema_decay: 0, ema_warmup: false}", "optim.ema_warmup False", "optim.ema_decay is 0"),
    ("train: {init_weights: raw}", "train.init_weights 'raw'", "train.init_from is not set"),
]


@pytest.mark.parametrize(("text", "setting", "because"), IDLE)
def test_settings_without_effect_are_refused(text: str, setting: str, because: str) -> None:
    tree = parse_yaml(text)
    if tree.get("encoders", {}).get("text", {}).get("kind") == "none":
        tree["diffusion"] = {"caption_dropout": 0}
    with pytest.raises(ConfigError) as caught:
        validate(tree)
    assert f"{setting} has no effect" in str(caught.value) and because in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "diffusion: {objective: ddpm, prediction: epsilon, beta_end: 0.02, time_mean: 0.0, time_floor: 0.05}",
        "diffusion: {prediction: x, time_floor: 0.1, time_mean: 0.6, shift: 3}",
        "data: {path: 'https://x.org/s', remote: fsspec, shuffle: window, window_shards: 4, cache: c, cache_gib: 2}",
        "data: {remote: fsspec, cache: c}",  # no path yet: an override may bring one
        "data: {path: here, validation: 'https://x.org/s', remote: fsspec, cache: c}",
        "encoders: {text: {kind: none}}\ndiffusion: {caption_dropout: 0}",
        "encoders: {text: {kind: t5, path: t5}, vae: {kind: vae, scale: 0.13}}\nmodel: {patch: 2}",
        "optim: {schedule: cosine, final_lr_share: 0.1}",
        "train: {init_from: run, init_weights: raw}",
        "logging: {samples_every: 0, guidance: 2}",
    ],
)
def test_the_same_settings_where_they_have_an_effect(text: str) -> None:
    config = validate(parse_yaml(text))
    assert validate(parse_yaml(dump_yaml(config))) == config


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 64), st.integers(1, 12), st.integers(0, 3))
def test_batches_divide_or_say_which_worlds_do(total: int, world: int, accumulation: int) -> None:
    """Brute force: a world divides when whole micro-batches times accumulation make up the batch."""
    config = Config.model_validate({"train": {"batch_size": total, "accumulation": accumulation or None}})
    possible = [w for w in range(1, total + 1) if total % (w * (accumulation or 1)) == 0]
    if world in possible:
        plan = config.batch(world)
        assert plan.micro * plan.accumulation * plan.world == plan.total == total
    else:
        with pytest.raises(ConfigError) as caught:
            config.batch(world)
        assert str(possible) in str(caught.value)


def test_micro_batch_is_kept_and_accumulation_follows() -> None:
    free = Config.model_validate({"train": {"batch_size": 131072}})
    assert (free.batch(8).micro, free.batch(4, kept_micro=16384).accumulation) == (16384, 2)
    both = Config.model_validate({"train": {"batch_size": 16, "micro_batch": 4, "accumulation": 2}})
    assert both.batch(2).accumulation == 2
    with pytest.raises(ConfigError, match=r"one of \[2\] ranks"):
        both.batch(1)
    assert [both.batch(w, kept_micro=4).accumulation for w in (1, 2, 4)] == [4, 2, 1]  # a resume
    with pytest.raises(ConfigError, match=r"one of \[1, 2, 4\] ranks"):
        both.batch(8, kept_micro=4)
    config = Config.model_validate({"train": {"batch_size": 24, "micro_batch": 4}})
    assert [config.batch(w).accumulation for w in (1, 2, 3, 6)] == [6, 3, 2, 1]
    with pytest.raises(ConfigError, match=r"\[1, 2, 3, 6\]"):
        config.batch(4)


@settings(max_examples=150, deadline=None)
@given(st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
                    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
                    max_leaves=6), st.sampled_from(["train", "optim", "model", "data", "logging", "x"]))  # fmt: skip
def test_anything_is_accepted_or_a_typed_error(value: object, group: str) -> None:
    with contextlib.suppress(ConfigError):
        validate({group: value})
