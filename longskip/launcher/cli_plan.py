"""``longskip plan``: whether a run fits a cluster, how to share it out, how long it takes and what it costs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from longskip.engine.planning import Option, Plan

# The option was called --price-per-hour by some commands; that is understood, and not shown.
PRICES = {"token_normalize_func": lambda name: "price" if name == "price-per-hour" else name}
DEFAULT_NETWORK = "ndr"
DEFAULT_GPUS = 8
# One thing, the time until the host has started the kernels, is a term of the step and, where nothing hides it, a phase.
_WORDS = {"launch": "kernel starts", "dispatch": "kernel starts"}
_SPANS = ((2 * 86400, 86400, "d"), (2 * 3600, 3600, "h"), (120, 60, "min"), (0.1, 1, "s"), (1e-4, 1e-3, "ms"))


def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="the run's YAML")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...", help="dotted overrides")] = None,
    gpus: Annotated[int | None, typer.Option(help="how many; 8 where you do not say, 1 of `this`")] = None,
    gpu: Annotated[
        str, typer.Option(help="which: h200, h100, a100-80gb …; `this` is the machine you measured")
    ] = "h200",
    nodes: Annotated[int | None, typer.Option(help="they stand in; 8 GPUs a node by default")] = None,
    network: Annotated[
        str | None, typer.Option(help="between nodes: ndr, hdr, roce-100, 100gbe; ndr by default")
    ] = None,
    hardware: Annotated[Path | None, typer.Option(help="YAML with devices and networks of your own")] = None,
    host_memory: Annotated[
        float | None, typer.Option(metavar="GIB", help="host memory of a node, held against what is put off to it")
    ] = None,
    price: Annotated[
        float | None, typer.Option(help="of one device and hour; budget.price_per_device_hour by default")
    ] = None,
    encoders: Annotated[
        str, typer.Option(help="frozen encoders: online (in every step), stored, or auto: as the data are")
    ] = "auto",
    sweep: Annotated[
        bool, typer.Option("--sweep", help="every way to share it out, not only the ones worth taking")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object, for machines")] = False,
) -> None:
    """Before a run, without a GPU: does it fit, the best ZeRO stage, micro-batch and checkpointing, days, cost, energy.

    Memory and FLOPs are closed forms that are tested against real steps; times rest on measured efficiencies of the device
    where there are some (longskip bench machine, longskip bench kernels --out), else on stated assumptions,
    each with the ends between which it is taken to lie: figures in brackets hold all of them at one end or the other.
    """
    from longskip.engine import planning
    from longskip.engine.configio import load_config
    from longskip.profiling.hardware import find, find_network

    resolved = load_config(config, overrides or ())
    device = find(gpu, hardware)
    many = (1 if device.measured else DEFAULT_GPUS) if gpus is None else gpus
    cluster = planning.Cluster.of(
        device, many, nodes, find_network(network or DEFAULT_NETWORK, hardware), host_memory
    )  # fmt: skip
    found = planning.plan(resolved, cluster, name=config.stem, price_per_hour=price, encoders=encoders)
    if as_json:
        print(json.dumps(planning.as_json(found), allow_nan=False))
        return
    _show(found, str(config), gpus is None and not device.measured, network is None, sweep)


def _show(found: Plan, config: str, gpus_assumed: bool, network_assumed: bool, sweep: bool) -> None:
    from rich.console import Console

    from longskip.engine.planning import GIB, MARGIN, parts_of
    from longskip.profiling import units

    console, cluster, chosen = Console(highlight=False), found.cluster, found.chosen
    where = f"{cluster.devices} × {cluster.device.name}{' (assumed: --gpus)' if gpus_assumed else ''}"
    if cluster.nodes > 1 and cluster.network is not None:
        where += f" in {cluster.nodes} nodes, network {cluster.network.name}{' (assumed)' if network_assumed else ''}"
    console.print(f"[bold]{config}[/bold] on {where}")
    console.print(
        f"{units.count(found.n_parameters)} parameters · {found.steps:,} steps · {units.count(found.images)} images · "
        f"{units.count(found.tokens)} tokens · C {units.scientific(found.model_flops)} FLOPs "
        f"({found.model_flops / found.six_nd:.4f} of 6ND)",
    )
    usable = MARGIN * cluster.device.memory / GIB
    if chosen is None:
        _say_what_lacks(console, found)
        return
    fit = "as configured" if chosen is found.given else "the fastest that fits"
    console.print(
        f"[bold green]fits[/bold green] ({fit}): ZeRO-{chosen.stage}, micro-batch {chosen.micro} × accumulation "
        f"{chosen.accumulation}, checkpointing {_every(chosen.checkpointing)}: {chosen.memory.device / GIB:.1f} of "
        f"{usable:.1f} GiB a GPU, {MARGIN:.0%} of its {cluster.device.memory / GIB:.1f} ({parts_of(chosen.memory)})",
    )
    if chosen.memory.host:
        console.print(_on_host(found, chosen))
    step, ends = chosen.step, found.ends(chosen)
    speed = f"{_span(step.seconds, *ends['seconds_per_step'])} a step · "
    speed += f"{_between(step.images_per_second, ends['images_per_second'], ' images/s')}"
    for name, share in (("MFU", step.mfu), ("HFU", step.hfu)):
        if share is not None:
            low, high = ends[name.lower()]
            speed += f" · {name} {_between(100 * share, (100 * low, 100 * high), '%')}"
    clock = " · processor time, not the wall clock's" if cluster.device.measured else ""
    console.print(f"{speed} · bound by {_WORDS.get(step.binds, step.binds)}{clock}")
    shares = [
        f"{_WORDS.get(name, name)} {100 * seconds / step.seconds:.2g}%"
        for name, seconds in step.by_phase.items()
        if seconds
    ]
    _say(console, [f"of it {', '.join(shares)}"], style="")
    cost, energy = found.cost(chosen), found.kilowatt_hours(chosen)
    seconds = found.seconds(chosen)
    least, most = ends["seconds_per_step"]
    bill = _span(seconds, found.steps * least, found.steps * most)
    bill += f" · {_between(found.device_hours(chosen), ends['device_hours'], ' GPU-hours')}"
    bill += (
        " · no price given (--price)" if cost is None else f" · {_between(cost, ends['cost'], f' {found.currency}')}"
    )
    if energy is not None:
        bill += f" · {_between(energy, ends['kilowatt_hours'], ' kWh')} at {cluster.device.watts} W a GPU"
    console.print(f"[bold]{bill}[/bold]")
    if found.best is not None and found.given is not None and found.best is not found.given:
        better = found.best.step.images_per_second / chosen.step.images_per_second
        if not found.given.fits:
            console.print(
                f"[yellow]as configured it does not fit: {found.given.memory.device / GIB:.1f} GiB, "
                f"{_gib(found.given.memory.host)} of host memory[/yellow]"
            )
        elif better > 1.02:
            console.print(f"{better:.2f}× as fast: {' '.join(found.best.overrides())}", soft_wrap=True)
    elif chosen is not found.given:
        console.print(f"to run it so: {' '.join(chosen.overrides())}", soft_wrap=True)
    _table(console, found, _listed(found, sweep))
    if not step.certain:
        console.print("In brackets: with every assumption at its one end and at its other.", style="dim")
    for note in found.notes:
        console.print(f"note: {note}", style="dim")
    console.print(
        "Steps alone: no evaluation, no checkpoints, no failures. "
        + (
            "Measured efficiencies: " + units.share(step.measured_share) + " of the time. "
            if step.measured_share
            else ""
        )
        + "Assumed:",
        style="dim",
    )
    _say(console, step.assumptions)


def _say(console: Console, lines: Iterable[str], style: str = "dim") -> None:
    """Lines set in a little, those that run over as well."""
    from rich.padding import Padding

    for line in lines:
        console.print(Padding(line, (0, 0, 0, 2), expand=False), style=style)


def _say_what_lacks(console: Console, found: Plan) -> None:
    """What does not fit, what would, and the ways that come nearest."""
    from longskip.engine.planning import GIB, MARGIN, parts_of

    device = found.cluster.device
    usable = MARGIN * device.memory
    enough = [option for option in found.options if not device.measured and option.memory.device <= usable]
    least = min(enough or found.options, key=lambda o: o.memory.host if enough else o.memory.device + o.memory.host)
    what = f"even ZeRO-{least.stage}, micro-batch {least.micro}, checkpointing {_every(least.checkpointing)}"
    if enough:
        lack = f"{what}: {_on_host(found, least)}"
        ways = ["more host memory", "less put off to it"]
    else:
        least = min(found.options, key=lambda option: option.memory.device)
        need = least.memory.device + (least.memory.host if device.measured else 0)
        lack = (
            f"{what} needs {need / GIB:.1f} GiB a GPU of the {usable / GIB:.1f} GiB that may be used ({MARGIN:.0%} of "
            f"{device.memory / GIB:.1f}): {parts_of(least.memory)} GiB"
        )
        ways = [*([] if device.measured else found.more_to_host), "another GPU"]
    console.print(f"[bold red]does not fit[/bold red]: {lack}")
    cure = f"{found.enough} such GPUs would do" if found.enough else "no number of such GPUs up to the batch would do"
    console.print(f"{cure}; or {', '.join(ways)}")
    _table(
        console, found, sorted(enough or found.options, key=lambda o: (o.memory.device, o.memory.host))[:8], short=True
    )
    console.print("What the times rest on:", style="dim")
    _say(console, least.step.assumptions)


def _on_host(found: Plan, option: Option) -> str:
    """Host memory of a GPU's rank and of a node, and what it is held against."""
    from longskip.engine.planning import MARGIN

    cluster = found.cluster
    text = f"{_gib(option.memory.host)} of host memory a GPU, {_gib(cluster.host_bytes(option.memory))} a node"
    if cluster.device.measured:
        return f"{text}: the same memory"
    if cluster.host_memory is None:
        return f"{text}; whether a node has it is not checked (--host-memory GIB)"
    whole = cluster.host_memory
    return f"{text} of the {_gib(MARGIN * whole)} that may be used ({MARGIN:.0%} of {_gib(whole)})"


def _listed(found: Plan, sweep: bool) -> list[Option]:
    from longskip.engine.planning import pareto

    if sweep:
        return sorted(found.options, key=lambda o: (not o.fits, -o.step.images_per_second))
    listed, chosen = pareto(found.options), found.chosen
    if chosen is not None and not any(option is chosen for option in listed):
        listed = sorted([*listed, chosen], key=lambda o: -o.step.images_per_second)
    return listed


def _table(console: Console, found: Plan, listed: list[Option], *, short: bool = False) -> None:
    """``short``: without what only matters for ways that fit."""
    from rich import box
    from rich.table import Table

    from longskip.engine.planning import GIB
    from longskip.profiling import units

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    hosted = any(option.memory.host for option in listed)
    titles = [
        "ZeRO", "micro", "accum.", "again", "GiB", *(["host"] if hosted else []), "step", "images/s",
        *([] if short else ["MFU", "days"]), "binds",
    ]  # fmt: skip
    for title in titles:
        table.add_column(title, justify="left" if title in ("again", "binds") else "right", no_wrap=True)
    for option in listed:
        memory, step = f"{option.memory.device / GIB:.1f}", option.step
        digits = 3 if step.certain else 2
        mfu = units.NONE if step.mfu is None else f"{_round(100 * step.mfu, digits)}%"
        row = (
            f"{'* ' if option is found.given else ''}{option.stage}", str(option.micro), str(option.accumulation),
            {0: "none", 1: "all"}.get(option.checkpointing, f"1 of {option.checkpointing}"),
            memory if option.fits else f"{memory}!", *([f"{option.memory.host / GIB:,.1f}"] if hosted else []),
            _span(step.seconds, digits=digits), _round(step.images_per_second, digits),
            *([] if short else [mfu, _round(found.seconds(option) / 86400, digits)]),
            _WORDS.get(step.binds, step.binds).split()[-1],
        )  # fmt: skip
        table.add_row(*row, style="" if option.fits else "dim")
    console.print(table)
    notes = ["again: blocks that are computed again in the backward pass"]
    notes += ["starts: the host, starting kernels"] if any(option.step.binds == "launch" for option in listed) else []
    notes += ["host: GiB of host memory a GPU"] if hosted else []
    notes += ["*: as configured"] if found.given in listed else []
    notes += ["!: does not fit"] if any(not option.fits for option in listed) else []
    console.print("; ".join(notes), style="dim")


def _round(value: float, digits: int) -> str:
    """``digits`` figures and no more: ``21,000``, ``4.5``, ``0.00086``."""
    if not value:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    places = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:.1e}" if places > 9 else f"{rounded:,.{places}f}"


def _between(value: float, ends: tuple[float, float], unit: str) -> str:
    """Two figures with the range, or three where the ends do not differ in two."""
    low, high = ends
    if _round(low, 2) == _round(high, 2):
        return f"{_round(value, 3)}{unit}"
    return f"{_round(value, 2)}{unit} ({_round(low, 2)} to {_round(high, 2)})"


def _gib(n_bytes: float) -> str:
    """``1,309 GiB``, ``163.6 GiB``, ``45.6 MiB``."""
    value, unit = (n_bytes / 2**30, "GiB") if n_bytes >= 2**30 else (n_bytes / 2**20, "MiB")
    return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.1f} {unit}"


def _span(seconds: float, low: float | None = None, high: float | None = None, digits: int = 3) -> str:
    """A time in one unit, with its range in the same."""
    scale, unit = next(((scale, unit) for above, scale, unit in _SPANS if seconds >= above), (1e-6, "µs"))
    if low is None or high is None:
        return f"{_round(seconds / scale, digits)} {unit}"
    return _between(seconds / scale, (low / scale, high / scale), f" {unit}")


def _every(checkpointing: int) -> str:
    return {0: "none", 1: "of every block"}.get(checkpointing, f"of one block in {checkpointing}")
