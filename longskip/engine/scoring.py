"""Scores of pictures drawn for the captions of real ones: FID and KID, CLIP score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longskip.engine.clip import Clip, ClipScore
from longskip.engine.config import Config, EvalGroup
from longskip.engine.data.draws import generator
from longskip.engine.data.shuffled import shuffled
from longskip.engine.data.sources import Source
from longskip.engine.diffusion import objective_of
from longskip.engine.drawing import Drawing, draw, repeats_of
from longskip.engine.feature_network import FeatureNetwork
from longskip.engine.fidelity import Fidelity, Statistics
from longskip.engine.inputs import Inputs
from longskip.engine.opening import data_name, open_data, open_training
from longskip.engine.sample import Loaded
from longskip.engine.texts import NoTexts, Texts
from longskip.errors import BadSampleError, ConfigError, DataError

BATCH = 50


@dataclass(frozen=True)
class Prompts:
    """Prompts from data; ``about`` says which, and how many draws were left out because the caption cannot be used."""

    texts: list[str]
    about: dict[str, Any]


def prompts_of(config: Config, inputs: Inputs, count: int, seed: int) -> Prompts:
    """``count`` captions of the validation data, else of the training data (of a mix every sample alike, whatever the
    weights of its parts); empty ones for a run without captions. Raises ``DataError`` where no caption can be used.
    """
    if isinstance(inputs.texts, NoTexts):
        return Prompts([""] * count, {"of": "nothing: the run has no captions"})
    if config.data.validation:
        of, data, source = "validation", config.data.validation, open_data(config, config.data.validation)
    else:
        of, data, source = "training", data_name(config), open_training(config)
    texts, left_out = captions_drawn(source, inputs.texts, count, seed)
    return Prompts(texts, {"of": of, "data": data, "fingerprint": source.fingerprint(), "left_out": left_out})


def captions_drawn(source: Source, texts: Texts, count: int, seed: int) -> tuple[list[str], int]:
    """``count`` captions, a function of ``seed``, and how many draws were left out: missing, unreadable or too long.

    Samples are gone through as ``shuffled`` orders them (of remote shards only as many are fetched as hold ``count``),
    again and again where there are fewer than ``count``; of several captions one is drawn by their weights each time.
    """
    found: list[str] = []
    left_out = 0
    turn = 0
    while len(found) < count:
        before = len(found)
        for sample in shuffled(source, seed):
            try:
                captions, weights = zip(*source.captions(sample), strict=True)
                within = generator(seed, turn, sample, "prompt").choice(
                    len(captions), p=[weight / sum(weights) for weight in weights]
                )
                texts.check([captions[within]])
                found.append(captions[within])
            except BadSampleError:
                left_out += 1
            if len(found) == count:
                break
        if len(found) == before:
            raise DataError(f"none of {len(source)} captions can be drawn", cure="longskip data lint names the reasons")
        turn += 1
    return found, left_out


@dataclass(frozen=True)
class Judges:
    """What drawn pictures are to be scored with; made, and therefore checked, before anything is drawn."""

    fidelity: Fidelity | None
    clip: ClipScore | None

    @classmethod
    def of(
        cls, config: Config, device: torch.device, *, statistics: str | None, network: str | None, clip: str | None
    ) -> Judges:
        """From the files that are named, and for the others from ``eval.stats``, ``eval.network`` and ``eval.clip``.

        Raises ``ConfigError`` for statistics without a network or of another one, a network without statistics, and a
        CLIP for a run without captions; ``DataError`` and ``EncoderError`` for files that cannot be used.
        """
        group: EvalGroup = config.eval
        statistics, network, clip = statistics or group.stats, network or group.network, clip or group.clip
        if clip and config.encoders.text.kind == "none":
            raise ConfigError(
                "a CLIP score compares pictures with captions, and this run has none", cure="leave out --clip"
            )
        if bool(statistics) != bool(network):
            there, lacking = ("statistics", "--network") if statistics else ("a feature network", "--fid")
            raise ConfigError(
                f"FID and KID need statistics and the network that made them; there are only {there}",
                cure=f"give {lacking} as well; statistics are made by: longskip data stats DATA --network PATH --out F.npz",
            )
        fidelity = None
        if statistics and network:
            made, loaded = Statistics.load(Path(statistics)), FeatureNetwork.load(network, device)
            made.check(loaded, config.resolution)
            fidelity = Fidelity(loaded, made)
        return cls(fidelity, ClipScore(Clip(clip, device).load()) if clip else None)

    def __bool__(self) -> bool:
        return self.fidelity is not None or self.clip is not None

    def describe(self) -> dict[str, Any]:
        """By the name of each score, ``fid`` and ``clip``, the hashes of what it is found with."""
        found: dict[str, Any] = {}
        if self.fidelity is not None:
            network, statistics = self.fidelity.network.describe(), self.fidelity.statistics.describe()
            found["fid"] = [network["sha256"], statistics["sha256"]]
        if self.clip is not None:
            found["clip"] = self.clip.clip.describe()["sha256"]
        return found


def score_drawn(
    loaded: Loaded,
    how: Drawing,
    judges: Judges,
    prompts: Prompts,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """``fidelity`` and ``clip_score`` of a picture per prompt, drawn ``BATCH`` at a time and not kept."""
    objective = objective_of(loaded.config.diffusion)
    repeats = repeats_of(prompts.texts)
    for start in range(0, len(repeats), BATCH):
        part = slice(start, start + BATCH)
        texts: Sequence[str] = prompts.texts[part]
        pictures = draw(loaded.model, objective, loaded.inputs, texts, repeats[part], how)
        if judges.fidelity is not None:
            judges.fidelity.add(pictures)
        if judges.clip is not None:
            judges.clip.add(pictures, texts)
        progress(min(start + BATCH, len(repeats)))
    result: dict[str, Any] = {}
    if judges.fidelity is not None:
        result["fidelity"] = judges.fidelity.result(how.seed) | {"prompts": prompts.about}
    if judges.clip is not None:
        result["clip_score"] = judges.clip.result() | {"prompts": prompts.about}
    return result
