"""``longskip bench``: measure a training step, or a reader, beside what others would use, in one run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Measure longskip beside what others would use, in one run.", no_args_is_help=True)

JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object, for machines")]
OutOption = Annotated[Path | None, typer.Option(help="also write the result here: FILE.json, and FILE.md beside it")]


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _hand_out(result: dict[str, Any], text: str, as_json: bool, out: Path | None) -> None:
    from longskip.engine.bench_common import save

    if out is not None:
        save(result, text, out)
    print(json.dumps(result) if as_json else text)


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
        progress=_tell,
    )  # fmt: skip
    _hand_out(result, to_markdown(result), as_json, out)


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
        progress=_tell,
    )
    _hand_out(result, to_markdown(result), as_json, out)


@app.command()
def kernels(
    op: Annotated[list[str] | None, typer.Option(help="only this op; may be repeated")] = None,
    shapes: Annotated[
        list[str] | None, typer.Option(help="only cases whose label contains this; may be repeated")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; bf16 on a GPU, fp32 on a CPU")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="of every measurement: 50 on a GPU, 3 on a CPU")] = None,
    tune: Annotated[bool, typer.Option("--tune", help="try every configuration first and take the fastest")] = False,
    inductor: Annotated[str, typer.Option(help="torch.compile's modes, by commas: default, max, none")] = "default",
    save: Annotated[
        bool, typer.Option("--save", help="keep what was fastest for `auto`, in your cache folder")
    ] = False,
    into_package: Annotated[
        bool, typer.Option("--into-package", help="for developers: keep it in the package")
    ] = False,
    static: Annotated[
        bool,
        typer.Option("--static", help="compile for sm_80, sm_90 and sm_100 instead: registers, spills, instructions"),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="write FILE.json and FILE.csv (--static: FILE.json and FILE.md)")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Every fused kernel beside its rivals: forward, backward and both, checked against float64 first.

    Without a GPU the plain torch form is timed on the CPU and nothing is claimed; `--static` needs none.
    """
    given: list[str] = [part for name in op or () for part in ("--op", name)]
    given += ["--json"] * as_json + (["--out", str(out)] if out else [])
    if static:
        from longskip.profiling import static as report

        raise typer.Exit(report.main(given))
    from longskip.profiling import bench

    given += [part for name in shapes or () for part in ("--shapes", name)]
    given += ["--dtype", dtype] if dtype else []
    given += ["--repeats", str(repeats)] if repeats else []
    given += ["--inductor", inductor]
    given += ["--tune"] * tune + ["--save"] * save + ["--into-package"] * into_package
    raise typer.Exit(bench.main(given))


@app.command()
def render(
    file: Annotated[Path, typer.Argument(help="what `longskip bench kernels --out` wrote: FILE.json")],
    out: Annotated[Path | None, typer.Option(help="the folder; by default FILE without its ending")] = None,
) -> None:
    """Pictures and a page of kernel measurements: a roofline with every kernel, and times beside the rivals'."""
    from longskip.profiling.bench_render import render as write

    for path in write(file, out):
        print(path)
