"""``longskip bench``: measure a training step, or a reader, beside what others would use, in one run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Measure longskip beside what others would use, in one run.", no_args_is_help=True)

JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object, for machines")]
OutOption = Annotated[Path | None, typer.Option(help="also write the result here: FILE.json, and FILE.md beside it")]


@app.command()
def step(
    preset: Annotated[str, typer.Option(help="the model; its depth and width are set below")] = "uvit-tiny",
    depth: Annotated[int, typer.Option(min=2, help="blocks less one, even")] = 40,
    width: Annotated[int, typer.Option(min=1, help="of the model")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="pictures a step, over all ranks")] = 8,
    ranks: Annotated[int, typer.Option(min=1, help="processes of the ZeRO-3 contenders")] = 2,
    steps: Annotated[int, typer.Option(min=2, help="measured steps of each process")] = 10,
    repeats: Annotated[int, typer.Option(min=1, help="fresh processes of each contender, in turns")] = 5,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: JsonOption = False,
    out: OutOption = None,
) -> None:
    """The training step: flat and named layout, stock DeepSpeed ZeRO-3, and a bare torch loop, on the same batches.

    Prints collectives a step, step rates by processor time and by wall clock, and no ratio for a contender whose losses
    are not those of the others.
    """
    from longskip.engine.bench_step import bench_step, to_markdown

    result = bench_step(
        preset, depth=depth, width=width, batch=batch, ranks=ranks, steps=steps, repeats=repeats, seed=seed,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    text = to_markdown(result)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        out.with_suffix(".md").write_text(text, "utf-8")
    print(json.dumps(result) if as_json else text)


@app.command()
def data(
    kind: Annotated[str, typer.Option(help="features, jpeg or both")] = "both",
    samples: Annotated[int, typer.Option(min=1, help="in the feature shards; an eighth of them are pictures")] = 4096,
    repeats: Annotated[int, typer.Option(min=1, help="fresh processes of each contender, in turns")] = 5,
    workers: Annotated[int, typer.Option(min=0, help="processes of our reader; 0: threads")] = 2,
    as_json: JsonOption = False,
    out: OutOption = None,
) -> None:
    """The reader: samples per second beside webdataset's default and tuned pipelines, over the same shards.

    Prints rates by wall clock, processor time a sample and the time of a resume, and no ratio for a contender whose
    batches are not what was stored.
    """
    from longskip.errors import ConfigError

    if kind not in ("features", "jpeg", "both"):
        raise ConfigError(f"--kind {kind!r}", cure="one of features, jpeg, both")
    from longskip.engine.bench_data import bench_data, to_markdown

    result = bench_data(
        ("features", "jpeg") if kind == "both" else (kind,),  # type: ignore[arg-type]
        samples=samples,
        repeats=repeats,
        workers=workers,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    text = to_markdown(result)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        out.with_suffix(".md").write_text(text, "utf-8")
    print(json.dumps(result) if as_json else text)
