"""``longskip demo``: the whole way in minutes, through the commands that a user types: data, launch, evaluate, report."""

from __future__ import annotations

import json
import time
from importlib import resources
from pathlib import Path

from longskip.engine.configio import load_config
from longskip.engine.runs import RUNS
from longskip.errors import EXIT_DONE
from longskip.launcher.local import launch

TRAINING, VALIDATION = 20_000, 512


def demo_config() -> Path:
    """The demo's YAML as the package ships it."""
    return Path(str(resources.files("longskip.launcher") / "demo.yaml"))


def run_demo(*, ranks: int = 2, steps: int | None = None, name: str = "demo") -> int:
    """Make the shapes, train, judge 200 drawn pictures, write the report; returns the exit code.

    Started again, it goes on where it was: a finished run is only judged and reported anew.
    """
    begin = time.monotonic()
    overrides = [f"train.name={name}", *([f"train.steps={steps}"] if steps else [])]
    config = load_config(demo_config(), overrides)
    _make_data(Path(config.data.path), Path(str(config.data.validation)))
    last = RUNS / name / "checkpoints" / f"step-{config.train.steps:08d}"
    finished_before = last.is_dir()
    code = EXIT_DONE if finished_before else launch(ranks, ["train", str(demo_config()), *overrides])
    if code != EXIT_DONE:
        return code
    trained = time.monotonic()

    from longskip.engine.evaluate import evaluate
    from longskip.launcher.tables import print_evaluation
    from longskip.profiling.report import render_report

    run = RUNS / name
    print("judging drawn pictures …", flush=True)
    result = evaluate(run)
    print_evaluation(result)
    page = render_report([run])
    seconds = time.monotonic() - begin
    judged = result["judge"]
    timing = {"ranks": ranks, "seconds": round(seconds, 1), "training_seconds": round(trained - begin, 1)}
    if finished_before:
        print("\nthis run was trained before; it was judged and reported anew")
    else:
        (run / "demo.json").write_text(json.dumps(timing | {"judge": judged}, indent=1), "utf-8")
        print(f"\n{seconds / 60:.1f} minutes, of which training {(trained - begin) / 60:.1f}")
    print(f"pictures  {run / 'eval' / str(judged['examples'])}")
    print(f"report    {page}")
    print(f"match     seen {judged['seen']['full']:.3f}   held-out {judged['held_out']['full']:.3f}")
    print(f'try       longskip sample {name} --prompt "a big red star at the top left"')
    return EXIT_DONE


def _make_data(training: Path, validation: Path) -> None:
    from longskip.engine.data.shapes import write_shapes

    for folder, count, seed, held_out in ((training, TRAINING, 0, False), (validation, VALIDATION, 1, None)):
        if not (folder / "index.json").is_file():
            print(f"drawing {count:,} pictures into {folder} …", flush=True)
            write_shapes(folder, count, seed, 1, held_out, 32)
