"""Ranks that save without training: forked, joined by gloo over a file, each with its share of a model that a step fills."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from longskip.engine import build, checkpoint
from longskip.engine.config import CheckpointGroup, Config
from longskip.engine.optim import AdamW, parameter_groups
from longskip.engine.saving import Saving
from longskip.engine.shards import KINDS, Shards
from tests.ranks import _child as child
from tests.ranks import run_ranks

CONFIG = Config.model_validate({"model": {"preset": "uvit-tiny"}, "diffusion": {"prediction": "x"}})


def bare_ranks(world: int, store: Path, act: Callable[..., Any], *arguments: Any, fault: str = "") -> list[int]:
    """Exit codes of ``act(*arguments)`` on ``world`` ranks; ``store`` is a file that is not there yet."""
    if world == 1:  # nobody else to be waited for
        variables = {"RANK": "0", "WORLD_SIZE": "1", "LONGSKIP_FAULT": fault}
        alone = multiprocessing.get_context("fork").Process(target=child, args=(variables, act, arguments))
        alone.start()
        alone.join(120)
        return [alone.exitcode if alone.exitcode is not None else -1]
    return run_ranks(world, _join, world, store, act, arguments, environment={"LONGSKIP_FAULT": fault})


def _join(world: int, store: Path, act: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rank, files = int(os.environ["RANK"]), torch.distributed.FileStore(str(store), world)
    torch.distributed.init_process_group("gloo", store=files, rank=rank, world_size=world)
    return act(*arguments)


def bare_shards() -> Shards:
    """This rank's slices of a tiny model, as ZeRO's stage 0 has them."""
    model = build.build_model(CONFIG, 0 if CONFIG.encoders.text.kind == "none" else 32).materialize(0)
    return Shards(SimpleNamespace(module=model, optimizer=None), AdamW(parameter_groups(model, 0.0), CONFIG.optim), 0)


def saving_of(checkpoints: Path, shards: Shards, **more: Any) -> Saving:
    group = CheckpointGroup(**{name: more.pop(name) for name in set(more) & set(CheckpointGroup.model_fields)})
    return Saving(checkpoints, shards, group, **more)


def fill(shards: Shards, step: int) -> None:
    """Values that tell kind, step and place apart."""
    for item in shards.slices:
        places = torch.arange(item.offset, item.offset + item.numel, dtype=torch.float32)
        for number, kind in enumerate(KINDS):
            shards.tensor(item, kind).copy_(places + 1000 * step + number / 8)


def check(folder: Path) -> int:
    """The step of a committed folder that verifies, whose values are those of that step; AssertionError otherwise."""
    manifest, step = checkpoint.verify(folder), checkpoint.step_of(folder)
    assert manifest["step"] == step == checkpoint.read_state(folder)["step"]
    with checkpoint.Archive(folder) as archive:
        for number, kind in enumerate(KINDS):
            for name, values in archive.full(kind).items():
                places = torch.arange(values.numel(), dtype=torch.float32) + 1000 * step + number / 8
                assert torch.equal(values.view(-1), places), (folder.name, kind, name)
    return step
