"""``longskip budget``: where budgets went, what one buys, and scaling laws fitted to finished trainings (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longskip.errors import ConfigError
from longskip.launcher.cli_plan import PRICES

if TYPE_CHECKING:
    from longskip.models.specs import UViTSpec
    from longskip.profiling.fits import Point
    from longskip.profiling.runlog import RunLog

app = typer.Typer(help="Where a budget went, what one buys, and scaling laws of your own.", no_args_is_help=True)

_GPUS = 8  # where nobody says how many

JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object, for machines")]
PriceOption = Annotated[float | None, typer.Option("--price", min=0, help="of one device and hour")]
WattsOption = Annotated[
    float | None, typer.Option(min=0, help="of one device; the hardware table's rated power by default")
]


@app.command(context_settings=PRICES)
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="runs' folders, or their names under runs/")],
    price: PriceOption = None,
    watts: WattsOption = None,
    out: Annotated[Path | None, typer.Option(help="folder for budget.png and budget.json")] = None,
    as_json: JsonOption = False,
) -> None:
    """What was spent on what: FLOPs by every accounting, tokens, images, device hours, money, energy; several runs too.

    Committed counts each step once, spent everything executed, with what was done again after a resume. The price is that
    of the run's budget.price_per_device_hour unless --price says another.
    """
    from longskip.profiling.budget import COVERS, run_budget, total
    from longskip.profiling.outputs import json_text, made_folder, write_json
    from longskip.profiling.reportdata import labels

    logs = _logs(runs)
    budgets = [
        run_budget(log, _spec(log), price=price, watts=watts, name=name)
        for log, name in zip(logs, labels(logs), strict=True)
    ]
    result: dict[str, Any] = {
        "runs": [budget.as_json() for budget in budgets],
        "total": total(budgets),
        "covers": COVERS,
    }
    if out is not None:
        from longskip.profiling.budget_plots import plot_budgets

        made_folder(out)
        result["files"] = [str(plot_budgets(budgets, out / "budget.png")), str(out / "budget.json")]
        write_json(out / "budget.json", result)
    if as_json:
        print(json_text(result))
        return
    from longskip.launcher.budget_tables import print_report

    print_report(budgets, result)


@app.command(context_settings=PRICES)
def plan(
    flops: Annotated[str | None, typer.Option(metavar="C", help="training FLOPs, for example 1e21")] = None,
    gpu_hours: Annotated[float | None, typer.Option(help="instead of --flops: with --gpu and --mfu")] = None,
    gpu: Annotated[str | None, typer.Option(help="h200, h100, a100-80gb …: with --mfu for hours, days, energy")] = None,
    mfu: Annotated[float | None, typer.Option(help="model FLOPs ÷ peak, 0 to 1: what an earlier run reached")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="how many, for the days; 8 where not said")] = None,
    precision: Annotated[
        str | None, typer.Option(help="bf16, fp16, tf32 or fp32: whose peak counts; bf16 where not said")
    ] = None,
    law: Annotated[
        str, typer.Option(help="2410.08184, chinchilla, or the law.json of `longskip budget fit --out`")
    ] = "2410.08184",
    resolution: Annotated[str, typer.Option(metavar="PX", help="256, or 512x768 (height x width)")] = "256",
    batch: Annotated[int, typer.Option(min=1, help="images of an optimizer step")] = 2048,
    price: PriceOption = None,
    currency: Annotated[str, typer.Option(help="of the price")] = "USD",
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
    from longskip.profiling.outputs import json_text

    if (flops is None) == (gpu_hours is None):
        given = "neither" if flops is None else "both"
        raise ConfigError(f"--flops and --gpu-hours: {given} given", cure="give one: --flops 1e21, or --gpu-hours 5000")
    on = None
    if gpu is not None:
        device = find(gpu, hardware)
        if mfu is not None and not 0 < mfu <= 1:
            raise ConfigError(f"--mfu {mfu:g} is not a share above 0 and up to 1", cure="45% is --mfu 0.45")
        on = Hardware(device, precision or "bf16", mfu, gpus or _GPUS, assumed=gpus is None)
    else:
        needing = {"--gpu-hours": gpu_hours, "--mfu": mfu, "--gpus": gpus, "--precision": precision, "--price": price,
                   "--watts": watts, "--hardware": hardware}  # fmt: skip
        for option, value in needing.items():
            if value is not None:
                raise ConfigError(f"{option} without --gpu says nothing", cure="add --gpu h200, or leave it out")
    if gpu_hours is not None and on is not None:
        rate = on.flops_per_hour
        if rate is None:
            raise ConfigError(
                "--gpu-hours without --mfu: no rate", cure="--mfu 0.45, or what longskip budget report shows"
            )
        if not 0 < gpu_hours < 1e12:
            raise ConfigError(f"--gpu-hours {gpu_hours:g} is not above 0 and below 1e12", cure="devices × hours")
        budget = round(gpu_hours * rate)
    else:
        budget = _whole("--flops", flops or "")
    found = make_plan(
        budget, find_law(law), resolution=_sides(resolution), batch=batch, hardware=on, price=price, currency=currency,
        watts=watts,
    )  # fmt: skip
    if as_json:
        print(json_text(found.as_json()))
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
    from longskip.profiling.laws import MOST_FLOPS, interval_budgets
    from longskip.profiling.outputs import json_text, made_folder, write_json
    from longskip.profiling.parametric import fit_parametric

    points, origin, doubts = _points(sources, compute, tokens, loss)
    fitters: dict[str, Any] = {"isoflop": fit_isoflop, "parametric": fit_parametric, "power": fit_frontier}
    found = fitters[form](points, tokens=tokens, seed=seed)
    low, high = found.law.budgets
    predictions = [found.predict(c) for c in (low, high, 10 * high, 100 * high) if c <= MOST_FLOPS]
    found = replace(
        found,
        law=replace(
            found.law,
            fitted_on=f"{len(points)} trainings from {origin}",
            intervals=found.law.intervals | {"at": [found.predict(c).as_json() for c in interval_budgets(low, high)]},
        ),
        warnings=(*doubts, *found.warnings),
    )
    result = found.as_json() | {"origin": origin, "seed": seed}
    if out is not None:
        from longskip.profiling.budget_plots import plot_fit, write_page

        made_folder(out)
        pictures = plot_fit(found, out)
        page = write_page(found, pictures, predictions, origin, out / "index.html")
        write_json(out / "law.json", found.law.as_json(), indent=2)
        result["files"] = [str(path) for path in (*pictures.values(), page, out / "law.json", out / "fit.json")]
        write_json(out / "fit.json", result)
    if as_json:
        print(json_text(result))
        return
    from longskip.launcher.budget_tables import print_fit

    print_fit(found, predictions, origin, result.get("files", []))


def _logs(runs: Sequence[str]) -> list[RunLog]:
    """The runs' logs; ConfigError where two names are of one folder, which every sum would hold twice."""
    from longskip.profiling.runlog import RunLog

    logs: dict[Path, RunLog] = {}
    names: dict[Path, str] = {}
    for run in runs:
        log = RunLog.open(run)
        folder = log.path.resolve()
        if folder in logs:
            raise ConfigError(f"{names[folder]} and {run} are one run, {folder}", cure="name it once")
        logs[folder], names[folder] = log, run
    return list(logs.values())


def _points(sources: list[str], compute: Any, tokens: Any, loss: Any) -> tuple[list[Point], str, list[str]]:
    """The points of a fit, where they are from, and what is doubtful about them."""
    from longskip.profiling.fitdata import read_csv, read_runs, units_warning

    tables = [source for source in sources if source.lower().endswith(".csv") or Path(source).is_file()]
    if tables:
        if len(sources) > 1:
            raise ConfigError(
                f"{len(sources)} sources with the file {tables[0]} among them", cure="give one CSV file alone, or runs"
            )
        points = read_csv(Path(sources[0]), compute)
        doubt = units_warning(points)
        return points, Path(sources[0]).name, [doubt] if doubt else []
    logs = _logs(sources)
    points = read_runs(logs, [_spec(log) for log in logs], compute=compute, tokens=tokens, loss=loss)
    skipped = sum(log.ledger.skipped for log in logs)
    repeated = sum(len(log.ledger.overlapping) for log in logs)
    left_out = [f"{skipped} ledger line(s) unreadable or cut"] if skipped else []
    left_out += [f"{repeated} overlapping"] if repeated else []
    said = f" ({', '.join(left_out)}, left out)" if left_out else ""
    return points, f"{len(logs)} run{'s' if len(logs) > 1 else ''}, {loss} loss{said}", []


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
