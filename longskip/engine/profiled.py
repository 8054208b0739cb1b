"""What ``longskip profile CONFIG`` profiles: the step of one rank that a configuration describes (no torch)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from longskip.engine import encoderfiles
from longskip.engine.config import Config
from longskip.engine.opening import open_training
from longskip.engine.runs import RUNS
from longskip.engine.vocabulary import build_vocabulary, words_of
from longskip.errors import ConfigError, EncoderError
from longskip.profiling.subjects import Subject

__all__ = ["ENCODERS", "settings_of", "step_of", "subject_of"]

AUTO = "kernels.backend auto counts as torch here: a device decides it; --kernels triton counts ours"
ENCODERS = ("auto", "online", "stored")
_INDEX_BYTES = 1 << 28


def subject_of(config: Config, name: str, encoders: str = "auto") -> Subject:
    """Backbone, text encoder, precision, kernels and checkpointing of ``config``; the batch is a rank's micro-batch.

    Without ``train.micro_batch`` that is what one rank alone would take. ``encoders``: whether frozen encoders run in the
    step (``online``) or their features lie in the data (``stored``); ``auto`` looks at the data. EncoderError for an
    encoder that is to run and has no folder.
    """
    running, notes = _running(config, encoders)
    words, how = known_words(config, name)
    return _subject(config, name, running, notes + how, words)


def known_words(config: Config, name: str) -> tuple[int, list[str]]:
    """How many rows the word encoder's table has, and what has to be said of it: the run's own vocabulary where there is
    a run of that name, else the captions' where the data are here, else the most that it may be."""
    text = config.encoders.text
    if text.kind != "words":
        return text.vocabulary, []
    run = RUNS / (config.train.name or name)
    if (run / "vocabulary.json").is_file():
        found = words_of(run, config)
        assert found is not None
        return len(found), []
    paths = [each.path for each in config.data.mix] or [config.data.path]
    if all(path and "://" not in path and Path(path).exists() for path in paths):
        return len(build_vocabulary(config, open_training(config, check=False))), []
    table = text.vocabulary * text.width
    return text.vocabulary, [
        f"the captions are not here: N counts {text.vocabulary:,} words ({table:,} parameters) as the most there may be; a "
        "run counts the words that it finds"
    ]


def step_of(config: Config, running: Mapping[str, Mapping[str, Any]], kernels: Mapping[str, str] | None) -> Subject:
    """The same for one image of a run that knows which frozen encoders it has (``running``: part → its config.json) and
    what serves the ops (None: what the configuration says)."""
    found = replace(_subject(config, "", running, [], config.encoders.text.vocabulary), batch=1)
    return found if kernels is None else replace(found, kernels=kernels)


def _subject(
    config: Config, name: str, running: Mapping[str, Mapping[str, Any]], notes: list[str], words: int
) -> Subject:
    train, text = config.train, config.encoders.text
    micro = train.micro_batch or config.batch(1).micro
    if not train.micro_batch:
        notes.append("train.micro_batch is not set: the batch is that of one rank alone")
    kernels = {op: backend.removeprefix("require:") for op, backend in config.kernels.by_op().items()}
    if "auto" in kernels.values():
        notes.append(AUTO)
    if config.buckets:
        height, width = config.resolution
        notes.append(f"data.buckets has other sizes as well; this is {height}x{width}")
    return Subject(
        name=name,
        spec=config.backbone(),
        factor=config.factor,
        batch=micro,
        precision=train.dtype,
        checkpointing=config.engine.checkpointing,
        kernels={op: "torch" if backend == "auto" else backend for op, backend in kernels.items()},
        text=config.text_encoder(words),
        masked=text.frozen,
        encoders=running,
        # DDPM's target is made beforehand, and its loss taken as an x-prediction's (engine/diffusion.py).
        x_kind=config.diffusion.prediction == "x" or config.diffusion.objective == "ddpm",
        clip=config.optim.clip > 0,
        preset=config.model.preset,
        notes=tuple(notes),
    )


def _running(config: Config, asked: str) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    """The config.json of the frozen encoders that run in a step, and what has to be said of the choice."""
    if asked not in ENCODERS:
        raise ConfigError(f"--encoders {asked!r}", cure=f"one of {', '.join(ENCODERS)}")
    vae, text = config.encoders.vae, config.encoders.text
    frozen = {"vae": vae.path} if vae.kind == "vae" else {}
    frozen |= {"text": text.path} if text.frozen else {}
    if asked == "stored" or not frozen:
        return {}, []
    if asked == "auto":
        stored = _stored(config)
        if stored is None:
            return {}, ["the data are not here: their features count as stored; --encoders online counts the encoders"]
        frozen = {part: path for part, path in frozen.items() if part not in stored}
    found: dict[str, Mapping[str, Any]] = {}
    for part, path in frozen.items():
        if path is None:
            raise EncoderError(
                f"encoders.{part}.path is not set, and the encoder is to run in every step",
                cure="name its folder, or --encoders stored",
            )
        found[part] = settings_of(part, path)
    return found, []


def settings_of(part: str, path: str) -> Mapping[str, Any]:
    """The config.json of the frozen encoder in a folder; ``part``: ``vae`` or ``text``."""
    return (encoderfiles.vae_files(path) if part == "vae" else encoderfiles.text_files(path)).settings


def _stored(config: Config) -> set[str] | None:
    """The encoders whose features lie in all of the data; None where the data are not on this machine."""
    parts = {"vae", "text"}
    for path in [each.path for each in config.data.mix] or [config.data.path]:
        folder = Path(path)
        if not path or "://" in path or not folder.exists():
            return None
        parts &= _indexed(folder / "index.json")
    return parts


def _indexed(index: Path) -> set[str]:
    """What an index says of encoders; a folder of pictures has none."""
    try:
        tree = json.loads(index.read_text("utf-8")) if index.stat().st_size <= _INDEX_BYTES else {}
    except (OSError, ValueError):
        return set()
    encoders = tree.get("encoders") if isinstance(tree, dict) else None
    return set(encoders) if isinstance(encoders, dict) else set()
