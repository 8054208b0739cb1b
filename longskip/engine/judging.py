"""Verdicts on drawn pictures: by the programmatic judge of the shapes, or by the nearest training picture."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longskip.engine.config import Config
from longskip.engine.data.decode import decode_image
from longskip.engine.data.draws import generator
from longskip.engine.data.judge import judge, score
from longskip.engine.data.scenes import Scene, captions, sample_scene
from longskip.engine.data.sources import Source
from longskip.engine.drawing import Drawing
from longskip.engine.grids import make_grid
from longskip.engine.opening import data_name, described, open_training
from longskip.engine.runs import RunFolder
from longskip.engine.sample import Loaded, draw_prompts
from longskip.errors import BadSampleError, DataError, RunMismatchError

SHOWN = 32
LINES = 16
"""Of a label on a sheet: a caption and what was read amiss stand whole."""


def judged_scenes(config: Config, count: int, seed: int, *, held_out: bool) -> list[tuple[Scene, str]]:
    """``count`` scenes with one phrasing each, all seen in training or all held out, a function of ``seed``."""
    chosen = []
    for i in range(count):
        rng = generator(seed, int(held_out), i, "judge")
        scene = sample_scene(rng, config.eval.judge_objects, held_out)
        phrasings = captions(scene)
        chosen.append((scene, phrasings[int(rng.integers(len(phrasings)))]))
    return chosen


def judge_shapes(loaded: Loaded, how: Drawing, count: int, sheet: Path) -> dict[str, Any]:
    """Half of ``count`` prompts are combinations that training saw, half are held-out ones."""
    result: dict[str, Any] = {}
    shown: list[np.ndarray] = []
    texts: list[str] = []
    refused: list[dict[str, str]] = []
    for name, held_out, n in (("seen", False, count - count // 2), ("held_out", True, count // 2)):
        chosen = judged_scenes(loaded.config, n, how.seed, held_out=held_out)
        pictures = draw_prompts(loaded, [text for _, text in chosen], how)
        result[name] = score(list(pictures), [scene for scene, _ in chosen])
        for i, (picture, (scene, text)) in enumerate(zip(pictures, chosen, strict=True)):
            verdict = judge(picture, scene)
            if not verdict.full:
                refused.append({"part": name, "prompt": text, "seen": verdict.seen})
            if i < SHOWN // 2:
                shown.append(picture)
                texts.append(text if verdict.full else f"✗ {text} (read {verdict.amiss})")
    make_grid(shown, texts, columns=8, scale=max(1, 128 // shown[0].shape[1]), lines=LINES).save(sheet)
    return result | {"refused": refused, "examples": sheet.name}


@dataclass(frozen=True)
class Training:
    """A run's training pictures (N, H, W, 3) with their captions, and which of them, by place, are asked for."""

    pictures: np.ndarray
    texts: list[str]
    asked: list[int]

    @classmethod
    def of(cls, loaded: Loaded, count: int, seed: int) -> Training:
        """``count`` pictures are asked for, or as many as have a caption that stands at no other one.

        Raises RunMismatchError for data that the run was not trained on, DataError where no picture can be asked for.
        """
        config = loaded.config
        source = open_training(config)
        trained = RunFolder(loaded.run).summary().get("data", {})  # nothing where training never began
        now = described(source)
        if trained and trained.get("fingerprint") != now["fingerprint"]:
            raise RunMismatchError(
                f"{data_name(config)} is not the data that {loaded.run} was trained on: {now['samples']} samples now, "
                f"{trained.get('samples')} then",
                cure="bring the data back: the judge asks whether the training pictures come back",
            )
        pictures, texts = _training_pictures(source, config.resolution)
        times = Counter(texts)
        unique = [i for i, text in enumerate(texts) if times[text] == 1]
        if not unique:
            raise DataError(f"{data_name(config)} has no caption that stands at one picture only")
        order = generator(seed, 0, 0, "nearest").permutation(len(unique))[:count]
        return cls(pictures, texts, [unique[int(i)] for i in order])


def judge_nearest(loaded: Loaded, how: Drawing, training: Training, sheet: Path) -> dict[str, Any]:
    """For every picture asked for: is it the nearest, of those asked for, to the one drawn for its caption?

    Chance is 1 in as many as were asked for; ``share_among_all`` asks the same among all training pictures. Distance is
    Euclidean over pixels.
    """
    pictures, texts, asked = training.pictures, training.texts, training.asked
    drawn = draw_prompts(loaded, [texts[i] for i in asked], how)
    nearest = _nearest(drawn, pictures)
    among_asked = _nearest(drawn, pictures[asked])
    hits = [asked[int(place)] == index for place, index in zip(among_asked, asked, strict=True)]
    hits_among_all = [int(place) == index for place, index in zip(nearest, asked, strict=True)]
    shown, labels = [], []
    for picture, index, hit in list(zip(drawn, asked, hits, strict=True))[:SHOWN]:
        shown.append(np.concatenate([picture, pictures[index]], axis=1))
        labels.append(texts[index] if hit else f"✗ {texts[index]}")
    make_grid(shown, labels, columns=8, scale=max(1, 64 // shown[0].shape[0])).save(sheet)
    return {
        "count": len(asked),
        "hits": sum(hits),
        "share": sum(hits) / len(hits),
        "chance": 1 / len(asked),
        "among_all": len(pictures),
        "share_among_all": sum(hits_among_all) / len(hits),
        "examples": sheet.name,
    }


def _nearest(drawn: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """For each of (N, H, W, 3) the place of the nearest of (M, H, W, 3), Euclidean over pixels."""
    ours = drawn.reshape(len(drawn), -1).astype(np.float64)
    theirs = pictures.reshape(len(pictures), -1).astype(np.float64)
    return np.argmin((theirs**2).sum(1) - 2 * ours @ theirs.T, axis=1)


def _training_pictures(source: Source, resolution: tuple[int, int]) -> tuple[np.ndarray, list[str]]:
    pictures, texts = [], []
    for i in range(len(source)):
        try:
            raw = source.read(i)
            pictures.append(decode_image(raw.image, resolution=resolution))
        except BadSampleError:
            continue
        texts.append(raw.captions[0][0])
    if not pictures:
        raise DataError(
            "the training data hold no pictures", cure="judge against data with pictures, not latents alone"
        )
    return np.stack(pictures), texts
