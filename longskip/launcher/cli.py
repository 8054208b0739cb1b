"""``longskip``: the command line. Everything heavy is imported inside the commands, so that help answers at once."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from longskip import __version__
from longskip.errors import ConfigError, LongskipError
from longskip.launcher.cli_bench import app as bench_app
from longskip.launcher.cli_budget import app as budget_app
from longskip.launcher.cli_checkpoint import app as checkpoint_app
from longskip.launcher.cli_config import app as config_app
from longskip.launcher.cli_data import app as data_app
from longskip.launcher.cli_launch import TAKES_THE_REST, launch, status, supervise
from longskip.launcher.cli_plan import PRICES, plan
from longskip.launcher.cli_profile import profile
from longskip.launcher.streams import outlive_readers

# The commands in the order in which a newcomer meets them, under the titles that --help gives them.
START, DATA, CLUSTER, DECIDE = "Start here", "Data", "Several GPUs and nodes", "Sizes, costs and speed"
_ORDER = (
    "demo", "doctor", "config", "train", "status", "sample", "evaluate", "report", "checkpoint",
    "data",
    "launch", "supervise",
    "presets", "plan", "profile", "budget", "bench",
)  # fmt: skip


class _InOrder(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=_ORDER.index)


app = typer.Typer(
    name="longskip",
    cls=_InOrder,
    help="Train text-to-image U-ViT diffusion transformers, from a laptop to a cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(
    data_app, name="data", rich_help_panel=DATA, short_help="Make, pack, encode, check and show captioned pictures."
)
app.add_typer(config_app, name="config", rich_help_panel=START)
app.add_typer(bench_app, name="bench", rich_help_panel=DECIDE)
app.add_typer(
    budget_app, name="budget", rich_help_panel=DECIDE, short_help="What was spent, what a budget buys, scaling laws."
)
app.add_typer(checkpoint_app, name="checkpoint", rich_help_panel=START)

_LAUNCHED = "[OPTIONS] -- train CONFIG [a.b=c]..."
app.command(
    rich_help_panel=DECIDE, short_help="Does a run fit a cluster, how best, how long, what does it cost?",
    context_settings=PRICES,
)(plan)  # fmt: skip
app.command(rich_help_panel=DECIDE, short_help="What a step costs, op by op: exact FLOPs, bytes, roofline.")(profile)
app.command(
    rich_help_panel=CLUSTER, short_help="Start a run on several GPUs or nodes, and again when ranks die.",
    options_metavar=_LAUNCHED, context_settings=TAKES_THE_REST,
)(launch)  # fmt: skip
app.command(
    rich_help_panel=CLUSTER, short_help="One node's part of a launch, as `launch` starts it.",
    options_metavar=_LAUNCHED, context_settings=TAKES_THE_REST,
)(supervise)  # fmt: skip
app.command(rich_help_panel=START, short_help="What runs are at: step, time left, last commit, restarts.")(status)

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="a run's folder, or its name under runs/")]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object, for machines")]
JsonListOption = Annotated[bool, typer.Option("--json", help="print one JSON list, for machines")]
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


@app.command(rich_help_panel=START, short_help="Train from a YAML; the same command goes on after any end.")
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="the run's YAML")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...", help="dotted overrides")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would run, and stop")] = False,
    ranks: Annotated[int | None, typer.Option(min=1, metavar="N", help="with --dry-run: as N ranks would")] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="with --dry-run: resolved YAML, DeepSpeed's JSON, N ranks' shards too")
    ] = False,
) -> None:
    """Train, or go on training: the same command resumes from the newest complete checkpoint.

    Joins the world that RANK and WORLD_SIZE name (deepspeed, torchrun, srun) and is one rank otherwise.
    Exit codes: 0 done, 1 failed, 2 configuration, 75 saved on a signal (start again).
    """
    from longskip.engine import pulse, signals
    from longskip.engine.configio import load_config
    from longskip.engine.runs import RUNS

    if not dry_run and (ranks is not None or verbose):
        cure = f"longskip launch --local {ranks} -- {shlex.join(['train', str(config), *(overrides or ())])}"
        raise ConfigError(
            f"--ranks {ranks} is of --dry-run; train by itself is one rank" if ranks else "--verbose is of --dry-run",
            cure=cure if ranks else "add --dry-run, or leave it out",
        )
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

        show(resolved, run, ranks, verbose=verbose)
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


@app.command(rich_help_panel=START, short_help="Draw pictures from prompts.")
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


@app.command(rich_help_panel=START, short_help="Score a checkpoint: judge, FID, KID, CLIP score, likelihood.")
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
    """Score a checkpoint into a file of RUN/eval: loss per time bin, judge, FID, KID, CLIP score, likelihood."""
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


@app.command(rich_help_panel=START, short_help="One HTML page of one run or several.")
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


@app.command(rich_help_panel=START, short_help="See it learn, in a few minutes on a laptop.")
def demo(
    ranks: Annotated[int, typer.Option(min=1, help="ranks to train with")] = 2,
    steps: Annotated[int | None, typer.Option(min=1, help="training steps; fewer is sooner and draws worse")] = None,
    name: Annotated[str, typer.Option(help="the run's name under runs/")] = "demo",
) -> None:
    """See it learn: drawn shapes, a small U-ViT, ZeRO-3 on 2 ranks, samples, judge and report in a few minutes."""
    from longskip.launcher.demo import run_demo

    raise typer.Exit(run_demo(ranks=ranks, steps=steps, name=name))


@app.command(rich_help_panel=DECIDE, short_help="The model sizes.")
def presets(as_json: JsonListOption = False) -> None:
    """The model sizes: shape, exact parameters, exact forward GMACs (attention counted)."""
    from longskip.launcher.tables import preset_rows, print_presets

    if as_json:
        print(json.dumps(preset_rows()))
    else:
        print_presets()


@app.command(rich_help_panel=START, short_help="What this machine has, and what of it is usable.")
def doctor(as_json: JsonListOption = False) -> None:
    """What this machine has: packages, versions, devices, backends; usable, or why not."""
    from longskip.launcher.doctor import examine, print_examination

    findings = examine()
    if as_json:
        print(json.dumps(findings))
    else:
        print_examination(findings)
    raise typer.Exit(0 if all(f["usable"] or not f["required"] for f in findings) else 1)


def _flow(commands: typer.Typer) -> None:
    """Let every paragraph of the commands' help flow to the terminal's width; only those that begin with \b keep their
    lines."""
    for command in commands.registered_commands:
        paragraphs = (command.help or inspect.getdoc(command.callback) or "").split("\n\n")
        command.help = "\n\n".join(each if each.startswith("\b") else " ".join(each.split("\n")) for each in paragraphs)
    for group in commands.registered_groups:
        if group.typer_instance is not None:
            _flow(group.typer_instance)


_flow(app)


def main(arguments: list[str] | None = None) -> Any:
    """Entry point: user errors are one message and the exit code of the error's class, never a traceback."""
    outlive_readers()
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
    except SystemExit as ended:
        if ended.code == 130:  # a Ctrl-C; another one while Python ends would be told of as an exception of a module
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise


if __name__ == "__main__":
    main()
