"""The first weights of a run are those of its first start; a run that diverged leads on to one at a lower rate."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from longskip.engine import checkpoint
from longskip.engine.config import Config
from longskip.engine.configio import validate
from longskip.engine.data.tokens import Vocabulary
from longskip.engine.export import export
from longskip.engine.initial import describe_start, initial_values, kept_start, lower_rate
from longskip.engine.vocabulary import words_of
from longskip.errors import CheckpointError
from longskip.profiling.yamlfiles import parse_yaml
from tests.engine.test_resume import assert_same_run
from tests.ranks import run_ranks, small_config, train_ranks
from tests.saved_runs import saved_run, saved_tensors

STEPS = 4


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    return saved_run(tmp_path / "parent")


def trained_on(parent: Path, path: Path) -> None:
    """The parent goes on: a newer checkpoint of other weights."""
    other = saved_run(path, seed=1, step=9)
    shutil.copytree(other / "checkpoints" / "step-00000009", parent / "checkpoints" / "step-00000009")
    assert checkpoint.choose(parent / "checkpoints", None).name == "step-00000009"


def child_of(shapes: Path, parent: Path, **groups: Any) -> Config:
    train = {"steps": STEPS, "init_from": str(parent)} | groups.pop("train", {})
    text = {"text": {"too_long": "truncate"}}
    return small_config(shapes, train=train, checkpoint={"every": STEPS}, encoders=text, **groups)


def settings_of(run: Path) -> tuple[Config, Vocabulary | None]:
    config = validate(parse_yaml((run / "config.yaml").read_text()))
    return config, words_of(run, config)


def initial_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())["initial"]  # type: ignore[no-any-return]


def test_killed_before_its_first_checkpoint_it_starts_from_the_same_weights(
    shapes: Path, parent: Path, tmp_path: Path
) -> None:
    """The parent trains on meanwhile. What run.json tells of the start outlives resumes."""
    config = child_of(shapes, parent)
    assert train_ranks(1, config, tmp_path / "straight") == [0]
    run = tmp_path / "run"
    assert train_ranks(1, config, run, "step.begin:kill:rank=0:step=1") == [-signal.SIGKILL]
    begun = initial_of(run)
    assert begun["from"] == str(parent / "checkpoints" / "step-00000007") and len(begun["sha256"]) == 64
    trained_on(parent, tmp_path / "other")
    assert train_ranks(1, config, run) == [0]
    assert_same_run(run, tmp_path / "straight", STEPS)
    assert initial_of(run) == initial_of(tmp_path / "straight") == begun
    shutil.rmtree(parent)  # a run with a checkpoint of its own needs it no more
    assert train_ranks(1, child_of(shapes, parent, train={"steps": STEPS + 1}), run) == [0]
    assert initial_of(run) == begun
    assert checkpoint.steps_in(run / "checkpoints")[-1].name == f"step-{STEPS + 1:08d}"


def test_first_weights_that_are_gone_are_not_replaced(
    shapes: Path, parent: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, run = child_of(shapes, parent), tmp_path / "run"
    assert train_ranks(1, config, run, "step.begin:kill:rank=0:step=2") == [-signal.SIGKILL]
    trained_on(parent, tmp_path / "other")
    shutil.rmtree(parent / "checkpoints" / "step-00000007")
    before = (run / "run.json").read_bytes()
    assert train_ranks(1, config, run) == [1]
    said = capfd.readouterr().out
    assert "step-00000007 is gone" in said and "train.name" in said and "CheckpointError" in said
    assert (run / "run.json").read_bytes() == before


def test_first_weights_are_known_by_their_bytes(parent: Path, tmp_path: Path) -> None:
    """A checkpoint, a file and a file in parts: kept as they are, refused when altered, never guessed."""
    config, words = settings_of(parent)
    export(parent, tmp_path / "one")
    export(parent, tmp_path / "many", limit=60_000)
    parts = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(parts) > 1
    for source, victim in (
        (parent, parent / "checkpoints" / "step-00000007" / "manifest.json"),
        (tmp_path / "one" / "model.safetensors", tmp_path / "one" / "model.safetensors"),
        (tmp_path / "many", parts[-1]),
    ):
        start = describe_start(source, config, words)
        assert kept_start(tmp_path / "run", json.loads(json.dumps(start))) == start
        with initial_values(start["from"], "ema", config, words) as values:
            assert torch.equal(values["backbone.head.linear.weight"],
                               saved_tensors(parent, "ema")["backbone.head.linear.weight"])  # fmt: skip
        data = victim.read_bytes()
        victim.write_bytes(data + b" " if victim.suffix == ".json" else data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=r"was altered(.|\n)*train\.name"):
            kept_start(tmp_path / "run", start)
        victim.write_bytes(data)
    for told in (None, {"from": str(parent), "step": 7}):
        with pytest.raises(CheckpointError, match="does not say which weights"):
            kept_start(tmp_path / "run", told)


def test_raw_weights_are_not_taken_from_a_file_of_the_ema(parent: Path, tmp_path: Path) -> None:
    config, words = settings_of(parent)
    for weights in ("ema", "raw"):
        export(parent, tmp_path / weights, weights=weights)
    with pytest.raises(CheckpointError, match=r"holds the EMA(.|\n)*--weights raw"):
        initial_values(tmp_path / "ema", "raw", config, words)
    with initial_values(tmp_path / "raw", "raw", config, words) as values:
        saved = saved_tensors(parent, "weight")
        assert all(torch.equal(values[name], saved[name]) for name in saved)


def _diverge(config: Config, run: Path, message: Path) -> None:
    """Two good steps, saved, and a third whose loss is not finite."""
    from longskip.engine.distributed import join
    from longskip.engine.prepare import prepare
    from longskip.errors import NonFiniteLossError

    job = prepare(config, run, join())
    for _ in range(2):
        job.step(next(job.reader))
    job.save()
    loss = job.objective.loss
    object.__setattr__(job.objective, "loss", lambda *a: loss(*a) * float("inf"))
    with pytest.raises(NonFiniteLossError) as caught:
        job.step(next(job.reader))
    message.write_text(str(caught.value))
    job.close("failed")


def _longskip(words: list[str]) -> int:
    from longskip.launcher.cli import main

    try:
        main(words)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_cure_of_a_loss_that_is_not_finite_works(shapes: Path, in_tmp: Path) -> None:
    """The command in the message, as it stands, trains a new run from the last checkpoint at half the rate."""
    config = small_config(shapes, train={"steps": 3, "dtype": "bf16", "not_finite": "stop"}, optim={"lr": 1e-3})
    assert run_ranks(1, _diverge, config, Path("runs/here"), in_tmp / "message") == [0]
    message = (in_tmp / "message").read_text()
    assert "train.dtype=fp32" in message and "model.qk_norm=true" in message
    words = shlex.split(message.split("new run: ")[1].splitlines()[0])
    assert words[0] == "longskip"
    assert run_ranks(1, _longskip, words[1:]) == [0]
    new = Path("runs/here-2")
    assert initial_of(new)["from"] == "runs/here/checkpoints/step-00000002"
    assert "lr: 0.0005" in (new / "config.yaml").read_text()
    assert [path.name for path in checkpoint.steps_in(new / "checkpoints")] == ["step-00000003"]
    assert "train.name=here-3" in lower_rate(Path("runs/here"), config)
    assert "init_from=" not in lower_rate(Path("runs/other"), config)
