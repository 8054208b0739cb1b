"""Run folders with a ledger as the engine writes it, made without training: every amount follows from the spec."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from longskip.models.specs import UViTSpec
from longskip.profiling.ledger import LedgerLine, Resumed, append

SMALL: dict[str, Any] = {"model": {"preset": "uvit-tiny"}}


def small_spec(width: int = 64, depth: int = 4) -> UViTSpec:
    """The backbone of ``SMALL`` with another width and depth, as its configuration resolves it."""
    from longskip.engine.configio import validate

    shape = {"preset": "uvit-tiny", "width": width, "depth": depth, "n_heads": width // 32}
    return validate({"model": shape}).backbone()


def write_run(
    folder: Path,
    spec: UViTSpec,
    *,
    attempts: Sequence[tuple[int, int]] = ((0, 40),),
    every: int = 10,
    batch: int = 8,
    seconds: float = 0.5,
    wait: float = 0.125,
    devices: int = 2,
    device: str = "NVIDIA H200",
    config: dict[str, Any] | None = None,
    loss: Callable[[int], float] = lambda step: 1 + 1 / step,
    text_params: int = 0,
    info: dict[str, Any] | None = None,
) -> Path:
    """Attempts (resumed from, killed after), a line ``every`` steps; ``seconds`` and ``wait`` are of a step."""
    folder.mkdir(parents=True)
    cost, params = spec.flops(1), spec.param_counts().total + text_params
    for attempt, (start, stop) in enumerate(attempts, 1):
        append(folder / "ledger.jsonl", Resumed(attempt, start))
        for step in range(start + every, stop + 1, every):
            images = every * batch
            append(
                folder / "ledger.jsonl",
                LedgerLine(
                    attempt=attempt, from_step=step - every, step=step, images=images,
                    image_tokens=images * cost.image_tokens, tokens=images * cost.tokens, seconds=every * seconds,
                    data_wait_seconds=every * wait, model_flops=images * cost.model_flops,
                    hardware_flops=images * cost.model_flops, six_nd=6 * params * images * cost.tokens, mfu=0.4, hfu=0.4,
                    loss=loss(step), devices=devices, device_name=device,
                ),
            )  # fmt: skip
    shape = {"preset": "uvit-tiny", "width": spec.width, "depth": spec.depth, "n_heads": spec.n_heads}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": shape} | (config or {})))
    body = {"name": folder.name, "status": "done", "params": params, "params_token": spec.param_counts().per_token}
    (folder / "run.json").write_text(json.dumps(body | (info or {})))
    return folder
