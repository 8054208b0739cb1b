"""What a run is: the settings that must be the same when it is started again (no torch)."""

from __future__ import annotations

from typing import Any

from longskip.engine.config import Config, leaves

# What may differ when a run is started again; all else belongs to what the run is.
MAY_CHANGE_ON_RESUME = (
    "train.steps", "logging.", "eval.", "checkpoint.", "launch.", "budget.",
    # how the same numbers are computed, and where the same data and encoders lie (their fingerprints are compared)
    "engine.", "deepspeed.zero_stage", "deepspeed.offload_", "data.path", "data.validation", "data.workers", "data.cache",
    "data.max_bad_share", "data.quarantine", "data.on_damage", "data.remote", "encoders.text.too_long", "encoders.vae.path",
    "encoders.text.path",
    "train.name",  # it has led to this folder: none and the folder's own name are one
    # what is done about steps that go wrong; those that go well are the same whatever these say
    "train.not_finite", "train.spike", "train.digest_every",
)  # fmt: skip


def differing_keys(saved: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """Keys that differ and may not differ on resume → (saved value, value now).

    Of a mix the weights are compared, in their order: its folders may move, as ``data.path`` may.
    """
    old, new = _settings(saved), _settings(now)
    return {
        key: (old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(MAY_CHANGE_ON_RESUME)
    }


def _settings(config: Config) -> dict[str, Any]:
    return dict(leaves(config.model_dump(mode="json"))) | {"data.mix": [each.weight for each in config.data.mix]}
