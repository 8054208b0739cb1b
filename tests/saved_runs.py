"""Run folders with a checkpoint, made in one process without training: raw weights and EMA differ in every element."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from longskip.engine import build, checkpoint
from longskip.engine import vocabulary as vocabulary_file
from longskip.engine.configio import dump_yaml, merge, validate
from longskip.engine.data.tokens import Vocabulary
from longskip.engine.optim import AdamW, parameter_groups
from longskip.engine.shards import Shards

CAPTIONS = ("a small red circle, center", "a big blue star at the top left", "two green squares on the bottom right")


def saved_run(run: Path, *, seed: int = 0, captions: Sequence[str] = CAPTIONS, step: int = 7, **groups: Any) -> Path:
    """A run of uvit-tiny at 32 px with ``groups`` laid over its configuration, saved at ``step``.

    The weights are initial values and N(0, 0.05²), so that norms, biases and positions all matter.
    """
    config = validate(merge({"model": {"preset": "uvit-tiny"}, "diffusion": {"prediction": "x"}}, groups))
    (run / "checkpoints").mkdir(parents=True)
    vocabulary = Vocabulary.build(captions, 400) if config.encoders.text.kind == "words" else None
    if vocabulary is not None:
        vocabulary_file.save_vocabulary(run / "vocabulary.json", vocabulary)
    (run / "config.yaml").write_text(dump_yaml(config))
    model = build.build_model(config, len(vocabulary or ())).materialize(seed)
    shards = Shards(SimpleNamespace(module=model, optimizer=None), AdamW(parameter_groups(model, 0.0), config.optim), 0)
    generator = torch.Generator().manual_seed(seed)
    for item in shards.slices:
        for kind in ("weight", "ema"):
            values = shards.tensor(item, kind)  # type: ignore[arg-type]
            values += 0.05 * torch.randn(item.numel, generator=generator)
    checkpoint.save(run / "checkpoints", step, shards, {"step": step}, keep_last=3)
    return run


def saved_tensors(run: Path, kind: str, step: int = 7) -> dict[str, torch.Tensor]:
    """The whole tensors of a saved run: ``weight`` or ``ema``."""
    with checkpoint.Archive(run / "checkpoints" / f"step-{step:08d}") as archive:
        return archive.full(kind)  # type: ignore[arg-type]
