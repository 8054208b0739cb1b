"""A checkpoint is of one model: others are refused by the name of what differs, also where all shapes are the same."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longskip.engine import build, checkpoint
from longskip.engine.config import Config
from longskip.engine.configio import dump_yaml, validate
from longskip.engine.export import export
from longskip.engine.optim import AdamW, parameter_groups
from longskip.engine.sample import load_run
from longskip.engine.shards import Shards
from longskip.engine.vocabulary import words_of
from longskip.errors import CheckpointError
from longskip.profiling.yamlfiles import parse_yaml
from tests.saved_runs import saved_run, saved_tensors


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return saved_run(tmp_path / "run")


def config_of(run: Path, **groups: Any) -> Config:
    tree = parse_yaml((run / "config.yaml").read_text())
    for name, group in groups.items():
        tree[name] |= group
    return validate(tree)


def shards_of(run: Path, config: Config) -> Shards:
    """Everything of another model of ``config``, with values of its own."""
    model = build.build_model(config, len(words_of(run, config) or ())).materialize(5)
    return Shards(SimpleNamespace(module=model, optimizer=None), AdamW(parameter_groups(model, 0.0), config.optim), 0)


def saved_in(run: Path) -> Path:
    return run / "checkpoints" / "step-00000007"


HEADS = r"backbone n_heads 2 saved, 4 now"


def test_another_number_of_heads_has_the_same_shapes_and_is_refused(run: Path, tmp_path: Path) -> None:
    """By what trains on, draws and exports; nothing of the model is overwritten."""
    config = config_of(run, model={"n_heads": 4})
    shards = shards_of(run, config)
    before = {name: value.clone() for name, value in shards.model.state_dict().items()}
    assert {n: tuple(s) for n, _, _, s in shards.model.canonical()} == {
        n: tuple(v.shape) for n, v in saved_tensors(run, "weight").items()
    }
    with pytest.raises(CheckpointError, match=HEADS):
        checkpoint.load(saved_in(run), shards)
    assert all(torch.equal(value, before[name]) for name, value in shards.model.state_dict().items())
    (run / "config.yaml").write_text(dump_yaml(config))
    with pytest.raises(CheckpointError, match=HEADS):
        load_run(run)
    with pytest.raises(CheckpointError, match=HEADS):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_fields_and_other_tensors(run: Path) -> None:
    archive = checkpoint.Archive(saved_in(run))
    config = config_of(run)
    text = config.text_encoder(len(words_of(run, config) or ()))
    own = checkpoint.specs_of(config.backbone(), text)
    archive.check_specs(own)
    assert own == archive.manifest["model"] and own["text"]["depth"] == 0
    changed = own | {"backbone": own["backbone"] | {"time_scale": 1.0}, "text": own["text"] | {"depth": 2}}
    with pytest.raises(
        CheckpointError, match=r"backbone time_scale 1000\.0 saved, 1\.0 now; text depth 0 saved, 2 now"
    ):
        archive.check_specs(changed)
    for groups, tensor in (
        ({"model": {"depth": 6}}, r"backbone\.blocks\."),
        ({"encoders": {"text": {"kind": "clip", "width": 64, "n_tokens": 16}}}, r"text\.embedding\.weight"),
    ):
        with pytest.raises(CheckpointError, match=rf"tensors differ, first {tensor}"):
            checkpoint.load(saved_in(run), shards_of(run, config_of(run, **groups)))


def test_how_positions_begin_is_not_what_the_model_is(run: Path) -> None:
    config = config_of(run, model={"pos_init": "normal"})
    assert config.backbone().pos_init != config_of(run).backbone().pos_init
    shards = shards_of(run, config)
    assert checkpoint.load(saved_in(run), shards) == {"step": 7}


def test_a_checkpoint_from_before_specs_were_saved_loads(run: Path) -> None:
    path = saved_in(run) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["model"], manifest["sha256"]  # which was not written then either
    path.write_text(json.dumps(manifest))
    shards = shards_of(run, config_of(run))
    assert checkpoint.load(saved_in(run), shards) == {"step": 7}
    saved = saved_tensors(run, "weight")
    assert all(torch.equal(shards.tensor(i, "weight"), saved[i.name].flatten()) for i in shards.slices)
    assert load_run(run).model is not None
