"""The golden loss curves: fp32 and bf16 with fp32 masters, same data, same noise. ``python -m tests.golden`` makes them.

Run from the repository's root with the demo's shapes in ``data/shapes`` (``longskip demo`` or ``longskip data make``); writes
``docs/results/bf16.json`` and ``bf16.png``. ``tests/engine/test_golden.py`` holds today's code against the first steps.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

GOLDEN = Path("docs/results/bf16.json")
DTYPES = ("fp32", "bf16")


def curve(run: Path) -> dict[str, dict[int, float]]:
    """Training loss (mean since the line before) and validation loss by step; the last line per step counts."""
    found: dict[str, dict[int, float]] = {"loss": {}, "validation": {}}
    for line in (run / "metrics.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        for key, name in (("loss", "loss/global_avg"), ("validation", "validation/loss")):
            if name in record:
                found[key][record["step"]] = record[name]
    return found


def differences(fp32: dict[int, float], bf16: dict[int, float]) -> dict[str, float]:
    """Relative differences of the two curves over all logged steps: mean of the absolute, largest, mean signed."""
    relative = [(bf16[step] - fp32[step]) / fp32[step] for step in fp32]
    absolute = [abs(value) for value in relative]
    return {"mean": sum(absolute) / len(absolute), "max": max(absolute), "signed_mean": sum(relative) / len(relative)}


def main() -> None:
    curves = {}
    for dtype in DTYPES:
        command = ["longskip", "train", "configs/golden.yaml", f"train.name=golden-{dtype}", f"train.dtype={dtype}"]
        subprocess.run([sys.executable, "-m", "longskip.launcher.cli", *command[1:]], check=True)
        curves[dtype] = curve(Path("runs") / f"golden-{dtype}")
    result: dict[str, Any] = {
        "command": "python -m tests.golden",
        "config": "configs/golden.yaml",
        "curves": curves,
        "relative": differences(curves["fp32"]["loss"], curves["bf16"]["loss"]),
    }
    GOLDEN.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    _draw(curves, GOLDEN.with_suffix(".png"))
    print(json.dumps(result["relative"]))


def _draw(curves: dict[str, dict[str, dict[int, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    for dtype, style in zip(DTYPES, ("-", "--"), strict=True):
        loss, validation = curves[dtype]["loss"], curves[dtype]["validation"]
        left.plot(list(loss), list(loss.values()), style, label=f"{dtype}, training", linewidth=1)
        left.plot(
            list(validation),
            list(validation.values()),
            "o" if style == "-" else "x",
            label=f"{dtype}, validation (EMA)",
        )
    left.set(xlabel="step", ylabel="loss", yscale="log", title="loss")
    left.legend(fontsize=7)
    fp32, bf16 = (curves[dtype]["loss"] for dtype in DTYPES)
    right.plot(list(fp32), [100 * (bf16[s] - fp32[s]) / fp32[s] for s in fp32], linewidth=1)
    right.axhline(0, color="grey", linewidth=0.5)
    right.set(xlabel="step", ylabel="%", title="bf16 against fp32, same batches and noise")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
