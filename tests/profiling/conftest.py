"""A small run folder with every file of the format, its numbers simple enough to check by head."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from longskip.profiling.ledger import LedgerLine, Resumed, append

HOSTILE = '</script><script>alert("caption")</script><img src=x onerror=alert(1)> & \u2028 \'"'


def write_lines(path: Path, rows: list[dict]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def make_run(folder: Path, *, device: str = "AMD EPYC 7B13", lr: float = 1e-3, caption: str = "a red circle") -> Path:
    """Two attempts of 10-step intervals to step 40, killed at 40 and resumed from 20; 8 images and 20 ms a step."""
    folder.mkdir(parents=True)
    mfu = None if device.startswith("AMD EPYC") else 0.4125
    for attempt, start, stop in ((1, 0, 40), (2, 20, 40)):
        append(folder / "ledger.jsonl", Resumed(attempt, start))
        for step in range(start + 10, stop + 1, 10):
            append(
                folder / "ledger.jsonl",
                LedgerLine(
                    attempt=attempt, from_step=step - 10, step=step, images=80, image_tokens=1280, tokens=2000,
                    seconds=0.2, data_wait_seconds=0.01, model_flops=10**13 + 7, hardware_flops=10**13 + 7,
                    six_nd=8 * 10**12, mfu=mfu, hfu=mfu, loss=1 / step, devices=1, device_name=device,
                ),
            )  # fmt: skip
            row = {"step": step, "attempt": attempt, "images": 8 * step, "time": 1.0 * step, "lr": lr}
            row |= {"loss/global_avg": attempt + 1 / step, "grad_norm": 0.5, "images_per_second": 400.0}
            write_lines(folder / "metrics.jsonl", [row | {"tokens_per_second": 1e4, "time/data_loading(%)": 5.0}])
    bins = {"validation/loss_bins": [0.3, 0.1, 0.2], "validation/bin_edges": [0.0, 0.25, 0.5, 1.0]}
    write_lines(folder / "metrics.jsonl", [{"step": s, "validation/loss": 2 / s, **bins} for s in (20, 40)])
    for step in (20, 40):
        samples = folder / f"samples/step-{step:08d}"
        samples.mkdir(parents=True)
        Image.new("RGB", (40, 30), (step * 5, 0, 0)).save(samples / "grid.png")
        Image.new("RGB", (8, 8)).save(samples / "000.png")
        body = {"prompts": [caption, "a blue square"], "files": ["000.png"], "sampler": "euler", "steps": 25}
        (samples / "prompts.json").write_text(json.dumps(body | {"guidance": 3.0, "weights": "ema", "seed": 0}))
        judge = {
            "seen": {"count": 64, "full": step / 50, "colour": 0.984375, "size": 1.0, "shape": 0.9, "position": 0.8},
            "held_out": {"count": 32, "full": 0.59375, "colour": 0.75, "size": 1.0, "shape": 0.5, "position": 0.625},
            "examples": f"step-{step:08d}.png",
        }
        (folder / "eval").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16)).save(folder / f"eval/step-{step:08d}.png")
        body = {"step": step, "checkpoint": "c", "weights": "ema", "sampler": "euler", "steps": 25, "guidance": 3.0}
        body |= {"seed": 0, "count": 96, "judge": judge, "loss": {"mean": 0.5, "bins": [0.5], "edges": [0.0, 1.0]}}
        (folder / f"eval/step-{step:08d}.json").write_text(json.dumps(body))
    config = {"model": {"width": 128, "name": "uvit"}, "optim": {"lr": lr, "betas": [0.9, 0.99]}, "data": caption}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0", "devices": [device], "gpu": {"n": 0}}))
    write_lines(
        folder / "incidents.jsonl",
        [{"time": 1.0, "attempt": 2, "step": 20, "kind": "resumed", "detail": "killed by signal 9"}],
    )
    write_lines(
        folder / "bad_samples.jsonl",
        [{"key": "000042", "sample": 42, "reason": "image_decode", "detail": caption, "step": 3}] * 2,
    )
    info = {"name": folder.name, "status": "finished", "params": 1141380, "params_token": 1101380}
    (folder / "run.json").write_text(json.dumps(info | {"flops_per_image": 1, "image_tokens": 16, "tokens": 25}))
    return folder


@pytest.fixture
def run_maker() -> Callable[..., Path]:
    return make_run


@pytest.fixture
def hostile() -> str:
    return HOSTILE
