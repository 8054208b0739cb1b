"""``longskip``: the command line. Everything heavy is imported inside the commands, so that help answers at once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from longskip import __version__
from longskip.errors import EXIT_USAGE, ConfigError, LongskipError
from longskip.launcher.cli_bench import app as bench_app
from longskip.launcher.cli_budget import app as budget_app
from longskip.launcher.cli_checkpoint import app as checkpoint_app
from longskip.launcher.cli_config import app as config_app
from longskip.launcher.cli_data import app as data_app
from longskip.launcher.cli_launch import TAKES_THE_REST, launch, status, supervise
from longskip.launcher.cli_plan import plan
from longskip.launcher.cli_profile import profile

app = typer.Typer(
    name="longskip",
    help="Train text-to-image U-ViT diffusion transformers, from a laptop to a cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")
app.add_typer(config_app, name="config")
app.add_typer(bench_app, name="bench")
app.add_typer(budget_app, name="budget")
app.add_typer(checkpoint_app, name="checkpoint")

app.command()(plan)
app.command()(profile)
app.command(options_metavar="[OPTIONS] -- train CONFIG [a.b=c]...", context_settings=TAKES_THE_REST)(launch)
app.command(options_metavar="[OPTIONS] -- train CONFIG [a.b=c]...", context_settings=TAKES_THE_REST)(supervise)
app.command()(status)

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="a run's folder, or its name under runs/")]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object, for machines")]
CheckpointOption = Annotated[str | None, typer.Option(help="step-00001000 or 1000; the newest by default")]
WeightsOption = Annotated[str, typer.Option(help="ema or raw")]


def _version(value: bool) -> None:
    if value:
        print(f"longskip {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
) -> None:
    pass


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="the run's YAML")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...", help="dotted overrides")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would run, and stop")] = False,
    ranks: Annotated[int | None, typer.Option(min=1, help="with --dry-run: list every shard of N ranks")] = None,
) -> None:
    """Train, or go on training: the same command resumes from the newest complete checkpoint.

    Joins the world that RANK and WORLD_SIZE name (deepspeed, torchrun, srun) and is one rank otherwise.
    Exit codes: 0 done, 1 failed, 2 configuration, 75 saved on a signal (start again).
    """
    from longskip.engine import pulse, signals
    from longskip.engine.configio import load_config
    from longskip.engine.runs import RUNS

    if not dry_run:
        signals.listen()  # before anything heavy: an early signal is kept for the first step's end
        signals.end_with_supervisor()
        pulse.show_stacks_when_asked()
        pulse.own().phase("start")
    resolved = load_config(config, overrides or ())
    if not (resolved.data.path or resolved.data.mix or dry_run):
        raise ConfigError("data.path is not set", cure="name a folder of shards, or of pictures with captions")
    run = RUNS / (resolved.train.name or config.stem)
    if dry_run:
        from longskip.launcher.dry_run import show

        show(resolved, run, ranks)
        return
    world = os.environ.get("WORLD_SIZE", "1")
    if world.isdigit() and not (run / "run.json").is_file():
        resolved.batch(
            int(world)
        )  # refused before torch is loaded or a rank waits; a resumed run knows its micro-batch
    from longskip.engine.trainer import train as run_training

    code = run_training(resolved, run)
    signals.ignore()
    raise typer.Exit(code)


@app.command()
def sample(
    run: RunArgument,
    prompt: Annotated[list[str] | None, typer.Option(help="a prompt; give it as often as you like")] = None,
    prompts: Annotated[Path | None, typer.Option(help="a file with one prompt a line")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="sampler steps; the run's eval group by default")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="1 is none; the run's eval group by default")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="auto, euler, heun, ddim or dpm++; the run's eval group by default")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    weights: WeightsOption = "ema",
    checkpoint: CheckpointOption = None,
    out: Annotated[Path | None, typer.Option(help="folder for the pictures; RUN/drawn/001, 002 … by default")] = None,
    as_json: JsonOption = False,
) -> None:
    """Draw pictures from prompts: one process, no DeepSpeed; the same prompt and seed give the same picture."""
    from longskip.launcher.drawing import draw_to_folder

    draw_to_folder(
        run, prompt or [], prompts, steps=steps, guidance=guidance, sampler=sampler, seed=seed, weights=weights,
        which=checkpoint, out=out, as_json=as_json,
    )  # fmt: skip


@app.command()
def evaluate(
    run: RunArgument,
    checkpoint: CheckpointOption = None,
    weights: WeightsOption = "ema",
    steps: Annotated[int | None, typer.Option(min=1, help="sampler steps; the configuration's by default")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="the configuration's by default")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="auto, euler, heun, ddim or dpm++; the configuration's by default")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=2, help="pictures each score draws, samples of likelihood; the configuration's")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    judge: Annotated[str | None, typer.Option(help="shapes, nearest or none; the configuration's by default")] = None,
    fid: Annotated[str | None, typer.Option(metavar="STATS", help="FID and KID against a file of data stats")] = None,
    network: Annotated[
        str | None,
        typer.Option(help="the statistics' network: a TorchScript file (a program: it runs) or CLIP's folder"),
    ] = None,
    clip: Annotated[str | None, typer.Option(help="CLIP score: the folder of a CLIP (transformers)")] = None,
    likelihood: Annotated[list[str] | None, typer.Option(metavar="vlb|ode", help="of validation samples")] = None,
    as_json: JsonOption = False,
) -> None:
    """Score a checkpoint into RUN/eval/step-N.json: loss per time bin, judge, FID, KID, CLIP score, likelihood."""
    from longskip.engine.evaluate import evaluate as run_evaluation
    from longskip.engine.runs import find_run
    from longskip.launcher.progress import counting
    from longskip.launcher.tables import print_evaluation

    with counting("drawing", None) as progress:
        result = run_evaluation(
            find_run(run), which=checkpoint, weights=weights, steps=steps, guidance=guidance, sampler=sampler,
            count=count, seed=seed, kind=judge, statistics=fid, network=network, clip=clip,
            likelihood=likelihood or (), progress=progress,
        )  # fmt: skip
    if as_json:
        print(json.dumps(result))
    else:
        print_evaluation(result)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="runs to show, overlaid where there are several")],
    out: Annotated[
        Path | None, typer.Option(help="the HTML file; RUN/report.html, or report.html here for several")
    ] = None,
) -> None:
    """One self-contained HTML page: curves, throughput, ledger, samples over time, judge's scores, configuration."""
    from longskip.engine.runs import find_run
    from longskip.profiling.report import render_report

    print(render_report([find_run(run) for run in runs], out))


@app.command()
def demo(
    ranks: Annotated[int, typer.Option(min=1, help="ranks to train with")] = 2,
    steps: Annotated[int | None, typer.Option(min=1, help="training steps; fewer is sooner and draws worse")] = None,
    name: Annotated[str, typer.Option(help="the run's name under runs/")] = "demo",
) -> None:
    """See it learn: drawn shapes, a small U-ViT, ZeRO-3 on 2 ranks, samples, judge and report in a few minutes."""
    from longskip.launcher.demo import run_demo

    raise typer.Exit(run_demo(ranks=ranks, steps=steps, name=name))


@app.command()
def presets(as_json: JsonOption = False) -> None:
    """The model sizes: shape, exact parameters, exact forward GMACs (attention counted)."""
    from longskip.launcher.tables import preset_rows, print_presets

    if as_json:
        print(json.dumps(preset_rows()))
    else:
        print_presets()


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """What this machine has: packages, versions, devices, backends; usable, or why not."""
    from longskip.launcher.doctor import examine, print_examination

    findings = examine()
    if as_json:
        print(json.dumps(findings))
    else:
        print_examination(findings)
    raise typer.Exit(0 if all(f["usable"] or not f["required"] for f in findings) else 1)


def main(arguments: list[str] | None = None) -> Any:
    """Entry point: user errors are one message and an exit code, never a traceback."""
    try:
        app(arguments, standalone_mode=True)
    except LongskipError as error:
        rank = os.environ.get("RANK", "0")
        joined = "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()
        if rank == "0" or (joined and not error.alike):  # what all ranks say is said once
            print(f"longskip: {f'[rank {rank}] ' if rank != '0' else ''}{error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; that is no failure of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_USAGE)


if __name__ == "__main__":
    main()
