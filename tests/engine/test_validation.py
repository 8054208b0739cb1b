"""What validation, samples and saves take: no larger batches than the run's, no second copy of what a rank holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from longskip.engine import checkpoint, tensorfiles
from longskip.engine.build import build_model, deepspeed_config
from longskip.engine.config import Config
from longskip.engine.configio import validate
from longskip.engine.data.sources import open_source
from longskip.engine.diffusion import objective_of
from longskip.engine.distributed import World, barrier, join
from longskip.engine.fitting import reduce_bucket
from longskip.engine.inputs import Inputs
from longskip.engine.prepare import prepare
from longskip.engine.shards import KINDS, Shards
from longskip.engine.validation import Validation
from longskip.engine.vocabulary import build_vocabulary
from longskip.errors import DataError, DiskFullError
from tests.live_bytes import LiveBytes
from tests.ranks import run_ranks, small_config

SLOW = [(0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32")]

# --- batches ----------------------------------------------------------------------------------------------------------


class Counting:
    """A model of a few lines, which notes how many samples it is given at a time."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, latents: torch.Tensor, time: torch.Tensor, **conditions: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(latents))
        told = conditions["tokens"].float().mean(1)[:, None, None, None] / 100
        return torch.tanh(latents + told) * time[:, None, None, None]

    def eval(self) -> None: ...

    def train(self) -> None: ...


class Unsharded:
    @contextmanager
    def weights(self, kind: str) -> Iterator[None]:
        yield


def validation_of(shapes: Path, **settings: int) -> Validation:
    groups = {"logging": {"every": 1, "samples_every": 5, "sample_steps": 2, "tensorboard": False}}
    config = small_config(shapes, eval={"every": 5, "samples": 30, "time_bins": 4}, **groups)
    source = open_source(config.data.path)
    device = torch.device("cpu")
    inputs = Inputs(config, build_vocabulary(config, source), device, source)
    return Validation(config, World(0, 1, 0, device), inputs, source, **settings)


def test_validation_and_samples_keep_to_the_micro_batch(shapes: Path, tmp_path: Path) -> None:
    """No forward pass of more samples; the loss and the pictures are those of the largest batches."""
    objective = objective_of(small_config(shapes).diffusion)
    losses, pictures = [], []
    for at_once, most in ((7, 7), (64, 30), (1000, 30)):
        model, validation = Counting(), validation_of(shapes, at_once=at_once)
        losses.append(validation.loss_of(model, objective)["validation/loss"])
        assert max(model.sizes) == most and sum(model.sizes) >= 30
        model.sizes.clear()
        folder = validation.samples(model, Unsharded(), objective, tmp_path / str(at_once), 5)  # type: ignore[arg-type]
        assert folder is not None and max(model.sizes) == min(at_once, len(validation.prompts))
        pictures.append([path.read_bytes() for path in sorted(folder.glob("0*.png"))])
    assert len(pictures[0]) == 16 and pictures[0] == pictures[1] == pictures[2]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[1] == losses[2]


def _runs_cap(config: Config, run: Path) -> int:
    job = prepare(config, run, join())
    job.close("done")
    return 0 if job.validation.at_once == job.batch.micro == 2 else 3


def test_a_run_caps_them_by_its_own(shapes: Path, tmp_path: Path) -> None:
    assert run_ranks(1, _runs_cap, small_config(shapes, train={"micro_batch": 2}), tmp_path / "run") == [0]


# --- weights ----------------------------------------------------------------------------------------------------------


def _held(shards: Shards) -> list[torch.Tensor]:
    """What the rank really holds of the parameters, 1-D."""
    return [(p.ds_tensor if shards.stage == 3 else p).data.view(-1) for p in shards.parameters]  # type: ignore[attr-defined]


def _computed(shards: Shards) -> list[torch.Tensor]:
    """The rank's own pieces of what the model computes with."""
    held = {id(p): values for p, values in zip(shards.parameters, _held(shards), strict=True)}
    starts = [0 if shards.stage == 3 else piece.start for piece in shards.fragments]
    return [held[id(f.parameter)][s : s + f.numel] for f, s in zip(shards.fragments, starts, strict=True)]


def _bits(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.clone().view(torch.uint8) for tensor in tensors]


def _same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _turn_and_back(config: Config, run: Path) -> int:
    job = prepare(config, run, join())
    for _ in range(2):
        job.step(job.read())
    shards = job.shards
    for values in _held(shards):
        values[0] = -0.0  # the one number that is not itself when 0.0 is added
    for piece in shards.fragments:
        if piece.start == 0 or shards.stage == 3:
            piece.master.data.view(-1)[piece.position] = -0.0
    before = _bits(_held(shards))
    states = {kind: _bits([shards.tensor(item, kind) for item in shards.slices]) for kind in KINDS}
    averages = [shards.optimizer.state_of(f.master)["ema"].view(-1)[f.position :][: f.numel] for f in shards.fragments]
    wanted = _bits([values.to(_held(shards)[0].dtype) for values in averages])
    for failing in (False, True):
        with suppress(DataError), shards.weights("ema"):
            assert _same(_bits(_computed(shards)), wanted)
            assert not _same(_bits(_held(shards)), before)
            if failing:
                raise DataError("raised by all ranks together")
        assert _same(_bits(_held(shards)), before)
        for kind, then in states.items():
            assert _same(_bits([shards.tensor(item, kind) for item in shards.slices]), then), kind
    with LiveBytes() as alive, shards.weights("ema"):
        pass
    bound = 3 * 4 * max(p.ds_numel if shards.stage == 3 else p.numel() for p in shards.parameters)  # type: ignore[attr-defined]
    total = sum(values.nbytes for values in _held(shards))
    print(f"at most {alive.peak:,} bytes, allowed {bound:,}; the rank holds {total:,} of weights")
    assert alive.peak <= bound < 0.8 * total
    job.close("done")
    return 0


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(0, "fp32"), (2, "fp32"), (3, "bf16"), *(pytest.param(s, d, marks=pytest.mark.slow) for s, d in SLOW)],
)
def test_the_averages_are_turned_to_and_back_without_a_copy(
    shapes: Path, tmp_path: Path, stage: int, dtype: str
) -> None:
    """Inside, the model computes with the EMA; afterwards weights and states are bitwise as before, at every stage."""
    tuned = tmp_path / "ds.json"  # otherwise stage 3 gathers all of so small a model, which is not what is measured
    tuned.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}))
    config = small_config(
        shapes,
        model={"depth": 40, "width": 32, "n_heads": 2},
        train={"dtype": dtype},
        deepspeed={"zero_stage": stage, "config": str(tuned)},
    )
    assert run_ranks(2, _turn_and_back, config, tmp_path / "run") == [0, 0]


# --- saves ------------------------------------------------------------------------------------------------------------


def _save_and_measure(config: Config, run: Path) -> int:
    tensorfiles.PIECE = 1 << 10
    job = prepare(config, run, join())
    job.step(job.read())
    with LiveBytes() as alive:
        checkpoint.save(run / "checkpoints", 1, job.shards, job.state.to_json(), keep_last=1)
    print(f"at most {alive.peak:,} bytes")
    assert alive.peak <= 2 * 4 * tensorfiles.PIECE
    with checkpoint.Archive(checkpoint.choose(run / "checkpoints", None)) as archive:
        for kind in KINDS:
            for item in job.shards.owned():
                ours = torch.cat([values for _, values in archive.read(kind, item.name, item.offset, item.numel)])
                assert torch.equal(ours, job.shards.tensor(item, kind)), (kind, item.name)
    job.close("done")
    return 0


@pytest.mark.parametrize("stage", [3, pytest.param(0, marks=pytest.mark.slow)])
def test_a_save_holds_no_copy_of_what_it_writes(shapes: Path, tmp_path: Path, stage: int) -> None:
    config = small_config(shapes, deepspeed={"zero_stage": stage})
    assert run_ranks(2, _save_and_measure, config, tmp_path / "run") == [0, 0]


def _save_with_little_room(config: Config, run: Path) -> int:
    job = prepare(config, run, join())
    whole = 16 * sum(int(np.prod(shape)) for _, _, _, shape in job.shards.model.canonical())  # what both ranks write
    room = SimpleNamespace(free=int(0.9 * whole) + (1 << 20))
    checkpoint.shutil.disk_usage = lambda path: room  # type: ignore[assignment]
    with pytest.raises(DiskFullError, match=f"needs {whole:,} bytes for 2 rank.s., {room.free:,} are free") as refused:
        checkpoint.save(run / "checkpoints", 1, job.shards, job.state.to_json(), keep_last=1)
    assert refused.value.alike and not list((run / "checkpoints").iterdir())
    barrier()  # the next save makes its folder
    room.free = int(1.05 * whole) + (1 << 20)
    checkpoint.save(run / "checkpoints", 1, job.shards, job.state.to_json(), keep_last=1)
    return 0


def test_room_is_asked_for_all_ranks_together(shapes: Path, tmp_path: Path) -> None:
    """They share one file system: room for one rank's half, or for most of both, is not enough."""
    assert run_ranks(2, _save_with_little_room, small_config(shapes), tmp_path / "run") == [0, 0]


# --- the reduction bucket ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["flat", "named"])
@pytest.mark.parametrize("vocabulary", [1, 77, 300])
def test_the_reduction_bucket_holds_the_model_as_it_is_stored(layout: str, vocabulary: int) -> None:
    """Against the model's own tensors, padding and all."""
    text = {"kind": "words", "width": 20, "depth": vocabulary % 3}
    config = small_config(
        Path("data"), engine={"layout": layout}, model={"width": 36, "n_heads": 2}, encoders={"text": text}
    )
    model = build_model(config, vocabulary)
    named = sum(int(np.prod(shape)) for _, _, _, shape in model.canonical())
    bucket = reduce_bucket(config, named)
    assert bucket == sum(p.numel() for p in model.parameters())
    assert (bucket > named) == (layout == "flat")
    zero = deepspeed_config(config, config.batch(2), n_parameters=named, cuda=False)["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == bucket


def test_the_bucket_of_a_large_model() -> None:
    """Half a billion elements; above it only where one unit is larger."""
    groups: dict[str, Any] = {"encoders": {"vae": {"kind": "vae"}, "text": {"kind": "clip"}}}
    large = validate(groups | {"model": {"preset": "uvit-8b"}})
    assert reduce_bucket(large, 7_971_360_932) == 500_000_000
    wide = validate(groups | {"model": {"preset": "uvit-8b", "width": 8192, "n_heads": 64, "depth": 2}})
    unit = max(sum(p.numel() for p in unit.parameters()) for unit in build_model(wide, 0).units())
    assert reduce_bucket(wide, wide.backbone().param_counts().total) == unit > 500_000_000
