"""``longskip budget``: where budgets went, what one buys, and scaling laws fitted to finished trainings (no torch)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longskip.errors import ConfigError

if TYPE_CHECKING:
    from longskip.models.specs import UViTSpec
    from longskip.profiling.fits import Point
    from longskip.profiling.runlog import RunLog

app = typer.Typer(help="Where a budget went, what one buys, and scaling laws of your own.", no_args_is_help=True)

JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object, for machines")]
PriceOption = Annotated[float | None, typer.Option("--price-per-hour", "--price", min=0, help="of one device and hour")]
WattsOption = Annotated[
    float | None, typer.Option(min=0, help="of one device; the hardware table's rated power by default")
]


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="runs' folders, or their names under runs/")],
    price: PriceOption = None,
    watts: WattsOption = None,
    out: Annotated[Path | None, typer.Option(help="folder for budget.png and budget.json")] = None,
    as_json: JsonOption = False,
) -> None:
    """What was spent on what: FLOPs by every accounting, tokens, images, device hours, money, energy; several runs too.

    Committed counts each step once, spent everything executed, with what was done again after a resume. The price is that
    of the run's budget.price_per_device_hour unless --price-per-hour says another.
    """
    from longskip.profiling.budget import run_budget, total
    from longskip.profiling.reportdata import labels
    from longskip.profiling.runlog import RunLog

    logs = [RunLog.open(run) for run in runs]
    budgets = [
        run_budget(log, _spec(log), price=price, watts=watts, name=name)
        for log, name in zip(logs, labels(logs), strict=True)
    ]
    result: dict[str, Any] = {"runs": [budget.as_json() for budget in budgets], "total": total(budgets)}
    if out is not None:
        from longskip.profiling.budget_plots import plot_budgets

        out.mkdir(parents=True, exist_ok=True)
        result["files"] = [str(plot_budgets(budgets, out / "budget.png")), str(out / "budget.json")]
        (out / "budget.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if as_json:
        print(json.dumps(result))
        return
    from longskip.launcher.budget_tables import print_report

    print_report(budgets, result)


@app.command()
def plan(
    flops: Annotated[str | None, typer.Option(metavar="C", help="training FLOPs, for example 1e21")] = None,
    gpu_hours: Annotated[float | None, typer.Option(help="instead of --flops: with --gpu and --mfu")] = None,
    gpu: Annotated[str | None, typer.Option(help="h200, h100, a100-80gb …: for hours, days, energy")] = None,
    mfu: Annotated[float | None, typer.Option(help="model FLOPs ÷ peak, 0 to 1: what an earlier run reached")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="how many, for the days")] = 8,
    precision: Annotated[str, typer.Option(help="bf16, fp16, tf32 or fp32: whose peak counts")] = "bf16",
    law: Annotated[
        str, typer.Option(help="2410.08184, chinchilla, or the law.json of `longskip budget fit --out`")
    ] = "2410.08184",
    resolution: Annotated[str, typer.Option(metavar="PX", help="256, or 512x768 (height x width)")] = "256",
    batch: Annotated[int, typer.Option(min=1, help="images of an optimizer step")] = 2048,
    price: PriceOption = None,
    watts: WattsOption = None,
    hardware: Annotated[Path | None, typer.Option(help="YAML with devices of your own")] = None,
    as_json: JsonOption = False,
) -> None:
    """What C training FLOPs buy: the best size and data by a scaling law, models near it, steps, days, loss and FID.

    C is spent in exact FLOPs; the steps that 6ND would have promised stand beside them.
    """
    from longskip.profiling.budget_plan import Hardware, make_plan
    from longskip.profiling.hardware import find
    from longskip.profiling.laws import find_law

    if (flops is None) == (gpu_hours is None):
        given = "neither" if flops is None else "both"
        raise ConfigError(f"--flops and --gpu-hours: {given} given", cure="give one: --flops 1e21, or --gpu-hours 5000")
    on = None
    if gpu is not None:
        device = find(gpu, hardware)
        if mfu is None:
            raise ConfigError("--gpu without --mfu: no rate", cure="--mfu 0.45, or what longskip budget report shows")
        if not 0 < mfu <= 1:
            raise ConfigError(f"--mfu {mfu:g} is not a share above 0 and up to 1", cure="45% is --mfu 0.45")
        on = Hardware(device, precision, mfu, gpus)
    elif gpu_hours is not None or mfu is not None:
        raise ConfigError(f"--{'gpu-hours' if gpu_hours is not None else 'mfu'} without --gpu", cure="--gpu h200")
    if gpu_hours is not None and on is not None:
        if not 0 < gpu_hours < 1e12:
            raise ConfigError(f"--gpu-hours {gpu_hours:g} is not above 0 and below 1e12", cure="devices × hours")
        budget = round(gpu_hours * on.flops_per_hour)
    else:
        budget = _whole("--flops", flops or "")
    found = make_plan(
        budget, find_law(law), resolution=_sides(resolution), batch=batch, hardware=on, price=price, watts=watts
    )
    if as_json:
        print(json.dumps(found.as_json()))
        return
    from longskip.launcher.budget_tables import print_plan

    print_plan(found)


@app.command()
def fit(
    sources: Annotated[list[str], typer.Argument(metavar="FILE.csv|RUN...", help="one CSV file, or finished runs")],
    form: Annotated[str, typer.Option(help="isoflop, parametric, or power (points that are optima)")] = "isoflop",
    compute: Annotated[str, typer.Option(help="C: exact (runs: model FLOPs; CSV: column flops), or 6nd")] = "exact",
    tokens: Annotated[
        str, typer.Option(help="D: all tokens, or image tokens; for a CSV what its column counts")
    ] = "all",
    loss: Annotated[str, typer.Option(help="of runs: train (smoothed) or validation")] = "train",
    seed: Annotated[int, typer.Option(min=0, help="of the bootstrap")] = 0,
    out: Annotated[Path | None, typer.Option(help="folder for law.json, fit.json, pictures and index.html")] = None,
    as_json: JsonOption = False,
) -> None:
    """A scaling law from finished trainings, with 95% intervals: isoFLOP parabolas, L(N, D), or straight power laws.

    A CSV file has the columns flops, params, tokens, loss: a row a training. `longskip budget plan --law FOLDER/law.json`
    plans with what this fits.
    """
    for option, value, known in (
        ("--form", form, ("isoflop", "parametric", "power")), ("--compute", compute, ("exact", "6nd")),
        ("--tokens", tokens, ("all", "image")), ("--loss", loss, ("train", "validation")),
    ):  # fmt: skip
        if value not in known:
            raise ConfigError(f"{option} {value!r} is unknown", cure=f"one of {', '.join(known)}")
    from longskip.profiling.fits import fit_frontier, fit_isoflop
    from longskip.profiling.parametric import fit_parametric

    points, origin = _points(sources, compute, tokens, loss)
    fitters: dict[str, Any] = {"isoflop": fit_isoflop, "parametric": fit_parametric, "power": fit_frontier}
    found = fitters[form](points, tokens=tokens, seed=seed)
    low, high = found.law.budgets
    predictions = [found.law.optimum(c) for c in (low, high, 10 * high, 100 * high)]
    result = found.as_json() | {"origin": origin, "seed": seed}
    if out is not None:
        from longskip.profiling.budget_plots import plot_fit, write_page

        out.mkdir(parents=True, exist_ok=True)
        pictures = plot_fit(found, out)
        page = write_page(found, pictures, predictions, origin, out / "index.html")
        (out / "law.json").write_text(json.dumps(found.law.as_json(), indent=2) + "\n", "utf-8")
        result["files"] = [str(path) for path in (*pictures.values(), page, out / "law.json", out / "fit.json")]
        (out / "fit.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if as_json:
        print(json.dumps(result))
        return
    from longskip.launcher.budget_tables import print_fit

    print_fit(found, predictions, origin, result.get("files", []))


def _points(sources: list[str], compute: Any, tokens: Any, loss: Any) -> tuple[list[Point], str]:
    from longskip.profiling.fitdata import read_csv, read_runs
    from longskip.profiling.runlog import RunLog

    tables = [source for source in sources if source.lower().endswith(".csv") or Path(source).is_file()]
    if tables:
        if len(sources) > 1:
            raise ConfigError(
                f"{len(sources)} sources with the file {tables[0]} among them", cure="give one CSV file alone, or runs"
            )
        return read_csv(Path(sources[0]), compute), Path(sources[0]).name
    logs = [RunLog.open(source) for source in sources]
    points = read_runs(logs, [_spec(log) for log in logs], compute=compute, tokens=tokens, loss=loss)
    skipped = sum(log.ledger.skipped for log in logs)
    cut = f" ({skipped} ledger line(s) cut by a crash were skipped)" if skipped else ""
    return points, f"{len(logs)} run{'s' if len(logs) > 1 else ''}{cut}"


def _spec(log: RunLog) -> UViTSpec | None:
    """The backbone of a run's configuration; None where the folder has none that this version reads."""
    if not log.config:
        return None
    from longskip.engine.configio import validate

    try:
        return validate(log.config).backbone()
    except (
        ConfigError
    ):  # an older configuration: its ledger is readable all the same, and the report says what is missing
        return None


def _whole(option: str, text: str) -> int:
    """A count as people write it (1e21, 1.5e21, 10**… is not one), exactly: an int has no 53 bits."""
    from decimal import Decimal, InvalidOperation

    from longskip.profiling.laws import positive_budget

    try:
        value = Decimal(text.replace("_", "").replace(",", ""))
    except InvalidOperation as error:
        raise ConfigError(f"{option} {text!r} is not a number", cure=f"for example {option} 1e21") from error
    positive_budget(float(value))
    return max(1, int(value))


def _sides(text: str) -> tuple[int, int]:
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) not in (1, 2) or not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(f"--resolution {text!r} is not pixels", cure="256, or 512x768 (height x width)")
    sides = [int(part) for part in parts]
    return sides[0], sides[-1]
