"""Settings that would change nothing: a value other than the default whose setting another one has switched off.

What is off by its own period (``logging.samples_every: 0``) or chosen again on the command line (``eval.judge``) keeps its
details; all else that has no effect is refused, as its author believes that it has one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longskip.engine.config import Config


def idle_settings(config: Config) -> Iterator[str]:
    """One complaint for every such setting: its key, value, what makes it idle, and the cure."""
    for idle, group, names, because in _rules(config):
        if not idle:
            continue
        settings: Any = reduce(getattr, group.split("."), config)
        defaults = type(settings)(**({"kind": settings.kind} if "kind" in type(settings).model_fields else {}))
        for name in names:
            value, default = getattr(settings, name), getattr(defaults, name)
            if value != default:
                yield f"{group}.{name} {value!r} has no effect: {because}; leave it out, or at its default {default!r}"


def _rules(config: Config) -> Iterator[tuple[bool, str, tuple[str, ...], str]]:
    """(whether they are idle now, group, its settings, why)."""
    data, text, vae = config.data, config.encoders.text, config.encoders.vae
    paths = [path for path in (data.path, *(each.path for each in data.mix), data.validation) if path]
    local = bool(paths) and not any("://" in path for path in paths)
    objective, prediction = config.diffusion.objective, config.diffusion.prediction
    yield data.shuffle == "full", "data", ("window_shards",), "data.shuffle is full"
    yield local, "data", ("remote", "cache", "cache_gib"), "no data lie at a URL"
    yield text.kind == "none", "data", ("captions",), "encoders.text.kind is none"
    yield (
        text.kind == "none", "encoders.text", ("path", "width", "n_tokens", "depth", "vocabulary", "too_long"),
        "encoders.text.kind is none",
    )  # fmt: skip
    yield text.kind == "words", "encoders.text", ("path",), "encoders.text.kind is words"
    yield text.frozen, "encoders.text", ("depth", "vocabulary"), f"encoders.text.kind is {text.kind}"
    yield (
        vae.kind == "none", "encoders.vae", ("path", "channels", "factor", "scale", "shift"),
        "encoders.vae.kind is none",
    )  # fmt: skip
    yield (
        objective == "ddpm", "diffusion", ("time_mean", "time_std", "time_floor", "shift"),
        "diffusion.objective is ddpm",
    )  # fmt: skip
    yield objective == "flow", "diffusion", ("beta_start", "beta_end", "train_steps"), "diffusion.objective is flow"
    yield (
        objective == "flow" and prediction != "x", "diffusion", ("time_floor",),
        f"diffusion.prediction is {prediction}",
    )  # fmt: skip
    yield config.optim.schedule == "constant", "optim", ("final_lr_share",), "optim.schedule is constant"
    yield config.optim.ema_decay == 0, "optim", ("ema_warmup",), "optim.ema_decay is 0"
    yield config.train.init_from is None, "train", ("init_weights",), "train.init_from is not set"
    yield config.train.not_finite == "stop", "train", ("not_finite_limit",), "train.not_finite is stop"
    yield config.train.spikes == "off", "train", ("spike_factor",), "train.spikes is off"
