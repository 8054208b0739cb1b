"""``longskip evaluate``: a checkpoint's loss per time bin, verdicts and scores of drawn pictures, and likelihood.

A result's file has the name of what was asked for, ``eval/step-00003200-shapes-200-seed-0-1f0c2d3e.json``, so that none
takes another's place; the same command again writes the same file. Reports choose among them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from longskip.engine.diffusion import objective_of
from longskip.engine.distributed import World
from longskip.engine.drawing import Drawing
from longskip.engine.judging import Training, judge_nearest, judge_shapes
from longskip.engine.likelihood import batches_of, evaluate_likelihood
from longskip.engine.opening import open_data
from longskip.engine.runs import write_atomic
from longskip.engine.sample import Loaded, load_run
from longskip.engine.scoring import Judges, prompts_of, score_drawn
from longskip.engine.validation import Validation
from longskip.errors import ConfigError

JUDGES = ("shapes", "nearest", "none")
LIKELIHOODS = ("vlb", "ode")


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
    statistics: str | None = None,
    network: str | None = None,
    clip: str | None = None,
    likelihood: Sequence[str] = (),
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Score a checkpoint of ``run`` and write a file in ``eval/``; what is not given comes from the configuration, but
    where likelihood alone is asked for, no picture is drawn.

    The result names its ``file``, checkpoint, weights, sampler, steps, guidance, seed and counts, and the hashes of network,
    statistics and CLIP, so that no figure stands without them. ``count`` is how many pictures every score draws and how
    many samples likelihood (``vlb``, ``ode``) is found of; ``seed`` decides which prompts and samples these are, and
    every random number; ``progress`` hears how many were drawn for FID, KID and CLIP.
    All that can be refused is refused before anything is computed.
    """
    loaded = load_run(run, which=which, weights=weights)
    config = loaded.config
    alone = bool(likelihood) and not (kind or statistics or network or clip)
    kind = kind or ("none" if alone else config.eval.judge)
    if kind not in JUDGES:
        raise ConfigError(f"judge {kind!r}", cure=f"one of {', '.join(JUDGES)}")
    for method in likelihood:
        if method not in LIKELIHOODS:
            raise ConfigError(f"likelihood {method!r}", cure=f"one of {', '.join(LIKELIHOODS)}")
    if likelihood and not config.data.validation:
        raise ConfigError(
            f"likelihood is of validation samples, and {run} names none",
            cure="longskip train CONFIG data.validation=FOLDER: on a finished run it trains nothing and notes it",
        )
    how = Drawing.of(config.eval, config.diffusion, sampler=sampler, steps=steps, guidance=guidance, seed=seed)
    configured = Drawing.of(config.eval, config.diffusion, sampler=None, steps=None, guidance=None, seed=seed)
    _refuse_program(run, network, config.eval.network)
    judges = (
        Judges(None, None)
        if alone
        else Judges.of(config, loaded.device, statistics=statistics, network=network, clip=clip)
    )
    if kind == "none" and not judges and not config.data.validation:
        raise ConfigError(
            f"there is nothing to evaluate: {run} names no data.validation, eval.judge, eval.stats or eval.clip",
            cure="longskip evaluate RUN --judge nearest asks whether the training pictures come back; "
            "data.validation gives a loss",
        )
    if (kind != "none" or judges) and not loaded.inputs.pictures:
        raise ConfigError(
            "encoders.vae.path is not set, and pictures are to be drawn",
            cure="longskip train CONFIG encoders.vae.path=FOLDER: on a finished run it trains nothing and notes it",
        )
    judged, scored = count or config.eval.judge_count, count or config.eval.count
    samples = count or config.eval.likelihood_count
    training = Training.of(loaded, judged, seed) if kind == "nearest" else None
    if training is not None:
        judged = len(training.asked)
    prompts = prompts_of(config, loaded.inputs, scored, seed) if judges else None
    asked: dict[str, Any] = {
        "step": loaded.step,
        "checkpoint": loaded.checkpoint.name,
        "weights": weights,
        **how.to_json(),
        "as_configured": weights == "ema" and how == configured,
        "count": judged if kind != "none" else scored if judges else 0,
        "judge_kind": kind,
    }
    parts = [f"{kind}-{judged}"] if kind != "none" else []
    parts += [f"{name}-{scored}" for name in judges.describe()]
    parts += [f"{method}-{samples}" for method in LIKELIHOODS if method in likelihood]
    told = asked | {
        "parts": parts,
        "objects": config.eval.judge_objects,
        "of": judges.describe(),
        "prompts": prompts and prompts.about,
        "validation": config.data.validation,
    }
    name = _name(told, parts or ["loss"])
    result = asked | {"file": f"{name}.json"}
    if config.data.validation:
        result["loss"] = _loss(loaded)
    folder = run / "eval"
    folder.mkdir(exist_ok=True)
    sheet = folder / f"{name}.png"
    if training is not None:
        result["nearest"] = judge_nearest(loaded, how, training, sheet)
    elif kind == "shapes":
        result["judge"] = judge_shapes(loaded, how, judged, sheet)
    if prompts is not None:
        result |= score_drawn(loaded, how, judges, prompts, progress)
    if likelihood:
        result["likelihood"] = _likelihood(loaded, likelihood, samples, seed)
    write_atomic(folder / f"{name}.json", json.dumps(result, indent=1))
    return result


def _name(told: dict[str, Any], parts: Sequence[str]) -> str:
    """Step, scores with their counts, seed, and eight digits of a hash of all else that decides the figures."""
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return "-".join([f"step-{told['step']:08d}", *parts, "seed", str(told["seed"]), digest[:8]])


def _refuse_program(run: Path, named: str | None, network: str | None) -> None:
    """A run folder that came from elsewhere must not bring a program along and have it run by its own configuration."""
    if named is not None or network is None or not Path(network).is_file():
        return
    if Path(network).resolve().is_relative_to(Path(run).resolve()):
        raise ConfigError(
            f"eval.network {network} is a TorchScript file, a program, in the run's own folder",
            cure=f"where you trust it, name it: --network {network}",
        )


def _loss(loaded: Loaded) -> dict[str, Any]:
    config = loaded.config
    source = open_data(config, config.data.validation or "")
    validation = Validation(config, World(0, 1, 0, loaded.device), loaded.inputs, source)
    with torch.no_grad():
        values = validation.loss_of(loaded.model, objective_of(config.diffusion))
    return {
        "mean": values["validation/loss"],
        "bins": values["validation/loss_bins"],
        "edges": values["validation/bin_edges"],
        "samples": values["validation/samples"],
    }


def _likelihood(loaded: Loaded, methods: Sequence[str], count: int, seed: int) -> dict[str, Any]:
    config = loaded.config
    source = open_data(config, config.data.validation or "")
    found = evaluate_likelihood(
        objective_of(config.diffusion),
        loaded.model,
        batches_of(loaded.inputs, source, count, seed=seed),
        methods=[method for method in LIKELIHOODS if method in methods],  # type: ignore[misc]
        pixels=config.encoders.vae.kind == "none",
        seed=seed,
    )
    return found | {"data": config.data.validation, "fingerprint": source.fingerprint()}
