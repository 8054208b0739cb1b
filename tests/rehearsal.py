"""uvit-0.3b at 256² on this machine: 2 ranks, ZeRO-3, 3 steps, with the peak memory of each. ``python -m tests.rehearsal``

``--features FOLDER [COUNT]`` only makes the data. Shapes of 256² are encoded by a small randomly initialised autoencoder
and CLIP (their weights say nothing; the shapes of what they make are those of the real ones), then ``longskip launch``
trains on the features. Writes ``docs/results/rehearsal.json``. Takes some minutes and 18 GiB.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

RESULT = Path("docs/results/rehearsal.json")
STEPS = 3


def longskip(*arguments: str) -> None:
    print("longskip", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "longskip.launcher.cli", *arguments], check=True)


def make_features(out: Path, count: int) -> None:
    """``count`` samples of the recipe's shapes: (4, 32, 32) latents and (77, 1024) text features, fp16."""
    from tests.tiny_encoders import tiny_clip_text, tiny_vae

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vae = tiny_vae(folder / "vae", 4, 8, scale=0.13025)
        text = tiny_clip_text(folder / "text", 1024, 77)
        longskip("data", "make", "shapes", "--out", f"{folder}/shapes", "--count", str(count), "--size", "256")
        longskip(
            "data", "encode", f"{folder}/shapes", "--out", str(out), "--vae", str(vae), "--text", str(text),
            "--resolution", "256", "--dtype", "fp16",
        )  # fmt: skip


def main() -> None:
    shutil.rmtree(Path("runs") / "rehearsal", ignore_errors=True)
    with tempfile.TemporaryDirectory() as name:
        features = Path(name) / "features"
        make_features(features, 64)
        longskip(
            "launch", "--local", "2", "--", "train", "configs/uvit-0.3b.yaml", f"data.path={features}",
            "train.name=rehearsal", f"train.steps={STEPS}", "train.batch_size=4", "train.dtype=fp32",
            "optim.warmup_steps=10", "logging.every=1", "checkpoint.every=0", "eval.every=0",
        )  # fmt: skip
    lines = [
        json.loads(line) for line in (Path("runs") / "rehearsal" / "metrics.jsonl").read_text("utf-8").splitlines()
    ]
    run = json.loads((Path("runs") / "rehearsal" / "run.json").read_text("utf-8"))
    result: dict[str, Any] = {
        "command": "python -m tests.rehearsal",
        "parameters": run["params"],
        "tokens_per_image": run["tokens"],
        "model_flops_per_image": run["flops_per_image"],
        "losses": [line["loss/global_avg"] for line in lines],
        "images_per_second": [round(line["images_per_second"], 4) for line in lines],
        "peak_gib_per_rank": lines[-1]["memory/per_rank(GiB)"],
    }
    losses = result["losses"]
    assert len(losses) == STEPS and all(a > b for a, b in pairwise(losses)), losses
    RESULT.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--features"]:
        make_features(Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 64)
    else:
        main()
