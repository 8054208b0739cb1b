"""``longskip evaluate``: a checkpoint's loss per time bin and the judge's verdict, as ``eval/step-N.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longskip.engine.config import Config
from longskip.engine.data.decode import decode_image
from longskip.engine.data.draws import generator
from longskip.engine.data.judge import judge, score
from longskip.engine.data.scenes import Scene, captions, sample_scene
from longskip.engine.data.sources import Source, open_source
from longskip.engine.diffusion import Flow
from longskip.engine.distributed import World
from longskip.engine.drawing import Drawing
from longskip.engine.grids import make_grid
from longskip.engine.runs import write_atomic
from longskip.engine.sample import Loaded, draw_prompts, load_run
from longskip.engine.validation import Validation
from longskip.errors import BadSampleError, ConfigError, DataError

SHOWN = 32


def evaluate(
    run: Path,
    *,
    which: str | None = None,
    weights: str = "ema",
    sampler: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    count: int | None = None,
    seed: int = 0,
    kind: str | None = None,
) -> dict[str, Any]:
    """Score a checkpoint of ``run`` and write ``eval/step-N.json``; what is not given comes from the configuration.

    The result names checkpoint, weights, sampler, steps, guidance, seed and count, so that no figure stands without them.
    """
    loaded = load_run(run, which=which, weights=weights)
    config = loaded.config
    kind = kind or config.eval.judge
    if kind not in ("shapes", "nearest", "none"):
        raise ConfigError(f"judge {kind!r}", cure="one of shapes, nearest, none")
    if kind == "none" and not config.data.validation:
        raise ConfigError(
            f"there is nothing to evaluate: {run} names no data.validation and no eval.judge",
            cure="longskip evaluate RUN --judge nearest asks whether the training pictures come back; "
            "data.validation gives a loss",
        )
    how = Drawing.of(config.eval, config.diffusion, sampler=sampler, steps=steps, guidance=guidance, seed=seed)
    result: dict[str, Any] = {
        "step": loaded.step,
        "checkpoint": loaded.checkpoint.name,
        "weights": weights,
        **how.to_json(),
        "count": count or config.eval.judge_count,
        "judge_kind": kind,
    }
    if config.data.validation:
        result["loss"] = _loss(loaded)
    folder = run / "eval"
    folder.mkdir(exist_ok=True)
    name = f"step-{loaded.step:08d}"
    if kind == "shapes":
        result["judge"] = _judge_shapes(loaded, how, result["count"], folder / f"{name}.png")
    elif kind == "nearest":
        result["nearest"] = _judge_nearest(loaded, how, result["count"], folder / f"{name}.png")
    write_atomic(folder / f"{name}.json", json.dumps(result, indent=1))
    return result


def _loss(loaded: Loaded) -> dict[str, Any]:
    config = loaded.config
    world = World(0, 1, 0, loaded.device)
    validation = Validation(config, world, loaded.inputs, open_source(config.data.validation or config.data.path))
    with torch.no_grad():
        values = validation.loss_of(loaded.model, Flow(config.diffusion))
    return {
        "mean": values["validation/loss"],
        "bins": values["validation/loss_bins"],
        "edges": values["validation/bin_edges"],
        "samples": values["validation/samples"],
    }


def judged_scenes(config: Config, count: int, seed: int, *, held_out: bool) -> list[tuple[Scene, str]]:
    """``count`` scenes with one phrasing each, all seen in training or all held out, a function of ``seed``."""
    chosen = []
    for i in range(count):
        rng = generator(seed, int(held_out), i, "judge")
        scene = sample_scene(rng, config.eval.judge_objects, held_out)
        phrasings = captions(scene)
        chosen.append((scene, phrasings[int(rng.integers(len(phrasings)))]))
    return chosen


def _judge_shapes(loaded: Loaded, how: Drawing, count: int, sheet: Path) -> dict[str, Any]:
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
                texts.append(text if verdict.full else f"✗ {text} (read: {verdict.seen})")
    make_grid(shown, texts, columns=8, scale=max(1, 96 // shown[0].shape[1])).save(sheet)
    return result | {"refused": refused, "examples": sheet.name}


def _judge_nearest(loaded: Loaded, how: Drawing, count: int, sheet: Path) -> dict[str, Any]:
    """For ``count`` training captions: is the captioned one the nearest to the drawn picture among the ``count`` asked?

    Chance is 1/count; ``share_among_all`` asks the same among all training pictures. Distance is Euclidean over pixels;
    captions that stand at several pictures are not asked.
    """
    config = loaded.config
    source = open_source(config.data.path)
    pictures, texts = _training_pictures(source, config.resolution)
    unique = [i for i, text in enumerate(texts) if texts.count(text) == 1]
    if not unique:
        raise DataError(f"{config.data.path} has no caption that stands at one picture only")
    order = generator(how.seed, 0, 0, "nearest").permutation(len(unique))[:count]
    asked = [unique[int(i)] for i in order]
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
    return np.stack(pictures), texts
