"""``longskip bench``: measure a training step, or a reader, beside what others would use, in one run."""

from __future__ import annotations

import json
import os
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
def save(
    preset: Annotated[str, typer.Option(help="the model; its depth and width are set below")] = "uvit-tiny",
    depth: Annotated[int, typer.Option(min=2, help="blocks less one, even")] = 12,
    width: Annotated[int, typer.Option(min=1, help="of the model; 384 makes 25M parameters")] = 384,
    batch: Annotated[int, typer.Option(min=1, help="pictures a step, over all ranks")] = 2,
    ranks: Annotated[
        list[int] | None, typer.Option(min=1, help="of ZeRO-3; 1 and 2 by default; may be repeated")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="plain steps timed before each save")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="saves of each kind, in turns")] = 5,
    folder: Annotated[
        Path | None, typer.Option(help="where checkpoints are written; the temporary folder by default")
    ] = None,
    as_json: JsonOption = False,
    out: OutOption = None,
) -> None:
    """A checkpoint: how long training is held, and how long until it is committed, beside plain copies and writes.

    The time held beside one copy of the rank's state in memory, into fresh buffers and warm ones; the whole save beside
    write + fsync + hash of the same bytes, alone and while the same training runs.
    """
    from longskip.engine.bench_save import bench_save, to_markdown

    result = bench_save(
        preset, depth=depth, width=width, batch=batch, ranks=tuple(ranks or (1, 2)), steps=steps, repeats=repeats,
        folder=folder, progress=_tell,
    )  # fmt: skip
    _hand_out(result, to_markdown(result), as_json, out)


@app.command()
def counters(
    preset: Annotated[list[str] | None, typer.Option(help="the model, uvit-tiny by default; may be repeated")] = None,
    device: Annotated[list[str] | None, typer.Option(help="cpu or meta, both by default; may be repeated")] = None,
    package: Annotated[list[str] | None, typer.Option(help="only this package's counters; may be repeated")] = None,
    as_json: JsonOption = False,
    out: OutOption = None,
) -> None:
    """FLOP counters: what each says of the same U-ViT, and its distance from the closed form.

    fvcore, torch's FlopCounterMode, DeepSpeed's profiler, and calflops, thop, torchinfo, ptflops and torch_flops where they
    are installed, beside ours. What a counter cannot count is shown with its message.
    """
    from longskip.engine.bench_common import save
    from longskip.engine.bench_counters import DEVICES, bench_counters, to_markdown

    result = bench_counters(preset or ("uvit-tiny",), device or DEVICES, only=package or (), progress=_tell)
    if out is not None:
        save(result, to_markdown(result), out)
    if as_json:
        print(json.dumps(result))
    else:
        _print_counters(result)


def _print_counters(result: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from longskip.engine.bench_counters import cells, title_of

    console = Console()
    for model in result["models"]:
        titles, rows = cells(result, model)
        table = Table(
            title=title_of(model), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
        )
        for name in titles:
            table.add_column(name, justify="right" if name == "error" else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    if result["not_installed"]:
        console.print(f"not installed: {', '.join(result['not_installed'])}")


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
    sweep: Annotated[
        bool | None, typer.Option(help="attention over many lengths too, for the plot; by default on a GPU only")
    ] = None,
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
    given += [] if sweep is None else ["--sweep" if sweep else "--no-sweep"]
    given += ["--tune"] * tune + ["--save"] * save + ["--into-package"] * into_package
    raise typer.Exit(bench.main(given))


@app.command()
def machine(
    dtype: Annotated[list[str] | None, typer.Option(help="of products: fp32, bf16, fp16; may be repeated")] = None,
    model: Annotated[list[str] | None, typer.Option(help="a preset whose ops are timed; may be repeated")] = None,
    batch: Annotated[int, typer.Option(min=1, help="pictures that these presets are given at a time")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="of every measurement, in turns")] = 5,
    keep: Annotated[bool, typer.Option(help="keep the result in your folders, for `--gpu this`")] = True,
    kernels: Annotated[
        Path | None, typer.Option(help="measure nothing: keep what `longskip bench kernels --out` wrote on a GPU")
    ] = None,
    as_json: JsonOption = False,
    out: OutOption = None,
) -> None:
    """This machine's processor: its ceilings (products per dtype, copies), and what the models' ops reach of them.

    Keeps the rates as the device `this` in your hardware.yaml and the ops' times in your cache folder; `--no-keep` only
    prints them. Times of a GPU's kernels (`--kernels FILE.json`) are kept for profiles and plans of that GPU.
    """
    if kernels is not None:
        from longskip.profiling.efficiency import adopt

        kept = adopt(kernels)
        print(json.dumps({"kept": [str(kept)]}) if as_json else f"kept: {kept}")
        return
    from longskip.models.presets import preset

    specs = [preset(name) for name in model or ()]
    from longskip.engine.bench_common import about, page
    from longskip.profiling.calibration import calls_of
    from longskip.profiling.machine import measure_machine
    from longskip.profiling.step_check import CASES

    load = os.getloadavg()
    chosen = [(spec, batch) for spec in specs] or [(case.spec, case.batch) for case in CASES]
    dtypes = dtype or ["fp32", "bf16"]
    if "fp32" not in dtypes:
        dtypes = ["fp32", *dtypes]  # what everything but products is rated by
    found = measure_machine(
        [call for spec, many in chosen for call in calls_of(spec, many)], dtypes=dtypes, repeats=repeats,
        parameters=[item.numel for unit in chosen[-1][0].parameters().values() for item in unit],
        about={"command": "longskip bench machine"}, progress=_tell,
    )  # fmt: skip
    options = {"repeats": repeats, "batch": batch}
    result = about("machine", options, load, "torch") | found.to_json() | {"kept": found.keep() if keep else []}
    how = f"{found.ceilings.threads} thread(s), medians of {repeats}"
    lines = [*page("This machine", result, how), "", *found.to_markdown(), ""]
    lines += [f"kept: {path}" for path in result["kept"]]
    _hand_out(result, "\n".join(lines).rstrip() + "\n", as_json, out)


@app.command()
def predict(
    rounds: Annotated[int, typer.Option(min=1, help="of calibration and steps, in turns")] = 5,
    as_json: JsonOption = False,
    out: OutOption = None,
) -> None:
    """Predicted against measured training steps on this machine: a bare loop, float32, by processor time and wall clock.

    Each round times every op of the model and then takes steps. Exit code 1 where a prediction misses its limit.
    """
    import torch

    from longskip.engine.bench_common import about, page
    from longskip.profiling.machine import measured_device
    from longskip.profiling.step_check import LIMIT, predict_steps, to_markdown

    load = os.getloadavg()
    device = measured_device()
    rows = predict_steps(rounds=rounds, device=device, progress=_tell)
    result = about("predict", {"rounds": rounds}, load, "torch") | {
        "ceilings": {"fp32_flops": device.peak("fp32"), "copy_bytes_per_second": device.bandwidth},
        "threads": torch.get_num_threads(),
        "limit": LIMIT,
        "rows": rows,
    }
    how = (
        f"a bare loop in float32 on {result['threads']} thread(s), medians of {rounds} rounds of calibration and steps in "
        "turns"
    )
    lines = [*page("Step time, predicted and measured", result, how), "", *to_markdown(rows, device)]
    _hand_out(result, "\n".join(lines) + "\n", as_json, out)
    if not all(row["met"] for row in rows):
        raise typer.Exit(1)


@app.command()
def render(
    file: Annotated[Path, typer.Argument(help="what `longskip bench kernels --out` wrote: FILE.json")],
    out: Annotated[Path | None, typer.Option(help="the folder; by default FILE without its ending")] = None,
) -> None:
    """Pictures and a page of kernel measurements: a roofline with every kernel, times beside the rivals' and over sizes."""
    from longskip.profiling.bench_render import render as write

    for path in write(file, out):
        print(path)
