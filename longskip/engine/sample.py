"""Drawing from a finished or running run: one process, no DeepSpeed, weights straight from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from longskip.engine import build, checkpoint
from longskip.engine.config import Config
from longskip.engine.configio import validate
from longskip.engine.diffusion import objective_of
from longskip.engine.drawing import Drawing, draw, repeats_of
from longskip.engine.inputs import Inputs
from longskip.engine.shards import Kind
from longskip.errors import ConfigError, LongskipError
from longskip.kernels import backends
from longskip.models.system import TextToImage
from longskip.profiling.yamlfiles import parse_yaml

WEIGHTS: dict[str, Kind] = {"ema": "ema", "raw": "weight"}


@dataclass(frozen=True)
class Loaded:
    """A run's model, ready to draw."""

    run: Path
    config: Config
    checkpoint: Path
    weights: str
    model: TextToImage
    inputs: Inputs
    device: torch.device

    @property
    def step(self) -> int:
        return int(self.checkpoint.name.removeprefix("step-"))


def load_run(run: Path, *, which: str | None = None, weights: str = "ema") -> Loaded:
    """The model of ``run`` at checkpoint ``which`` (``step-N``, N, or None for the newest) with EMA or raw weights."""
    if weights not in WEIGHTS:
        raise ConfigError(f"weights {weights!r}", cure=f"one of {', '.join(WEIGHTS)}")
    config = validate(parse_yaml((run / "config.yaml").read_text("utf-8"), str(run / "config.yaml")))
    folder = checkpoint.choose(run / "checkpoints", which)
    backends.configure(config.kernels.by_op())
    model, vocabulary = build.load_model(run, config, folder, WEIGHTS[weights])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = Inputs(config, vocabulary, device)
    return Loaded(run, config, folder, weights, model.to(device), inputs, device)


def check_prompts(loaded: Loaded, prompts: Sequence[str]) -> None:
    """Refuse prompts that the encoder does not take before anything is drawn (TextTooLongError, ConfigError)."""
    if not prompts:
        raise ConfigError("no prompts", cure="give --prompt TEXT or --prompts FILE with one prompt a line")
    loaded.inputs.texts.check(prompts)


def draw_prompts(
    loaded: Loaded,
    prompts: Sequence[str],
    how: Drawing,
    *,
    batch: int = 50,
    progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Pictures of all prompts, uint8 (N, H, W, 3), drawn ``batch`` at a time; ``progress`` hears how many are done."""
    check_prompts(loaded, prompts)
    objective = objective_of(loaded.config.diffusion)
    repeats = repeats_of(prompts)
    pictures = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        pictures.append(draw(loaded.model, objective, loaded.inputs, prompts[part], repeats[part], how))
        progress(min(start + batch, len(prompts)))
    return np.concatenate(pictures)


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; blank lines and lines beginning with ``#`` are left out."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LongskipError(f"cannot read prompts from {path}: {error}") from None
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]
