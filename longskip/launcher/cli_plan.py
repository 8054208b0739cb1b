"""``longskip plan``: whether a run fits a cluster, how to share it out, how long it takes and what it costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from longskip.engine.planning import Option, Plan

DEFAULT_NETWORK = "ndr"


def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="the run's YAML")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...", help="dotted overrides")] = None,
    gpus: Annotated[int, typer.Option(help="how many")] = 8,
    gpu: Annotated[
        str, typer.Option(help="which: h200, h100, a100-80gb …; `this` is the machine you measured")
    ] = "h200",
    nodes: Annotated[int | None, typer.Option(help="they stand in; 8 GPUs a node by default")] = None,
    network: Annotated[
        str | None, typer.Option(help="between nodes: ndr, hdr, roce-100, 100gbe; ndr by default")
    ] = None,
    hardware: Annotated[Path | None, typer.Option(help="YAML with devices and networks of your own")] = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="of a GPU and hour; budget.price_per_device_hour by default")
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="every way to share it out, not only the ones worth taking")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object, for machines")] = False,
) -> None:
    """Before a run, without a GPU: does it fit, the best ZeRO stage, micro-batch and checkpointing, days, cost, energy.

    Memory and FLOPs are closed forms that are tested against real steps; times rest on measured efficiencies of the device
    where there are some (longskip bench machine, longskip bench kernels --out), else on stated assumptions.
    """
    from longskip.engine import planning
    from longskip.engine.configio import load_config
    from longskip.profiling.hardware import find, find_network

    resolved = load_config(config, overrides or ())
    cluster = planning.Cluster.of(find(gpu, hardware), gpus, nodes, find_network(network or DEFAULT_NETWORK, hardware))
    found = planning.plan(resolved, cluster, price_per_hour=price)
    if as_json:
        print(json.dumps(planning.as_json(found)))
        return
    _show(found, str(config), network is None, sweep)


def _show(found: Plan, config: str, network_assumed: bool, sweep: bool) -> None:
    from rich.console import Console

    from longskip.engine.planning import GIB, MARGIN, parts_of
    from longskip.profiling import units

    console, cluster, chosen = Console(highlight=False), found.cluster, found.chosen
    where = f"{cluster.devices} × {cluster.device.name}"
    if cluster.nodes > 1 and cluster.network is not None:
        where += f" in {cluster.nodes} nodes, network {cluster.network.name}{' (assumed)' if network_assumed else ''}"
    console.print(f"[bold]{config}[/bold] on {where}")
    console.print(
        f"{units.count(found.n_parameters)} parameters · {found.steps:,} steps · {units.count(found.images)} images · "
        f"{units.count(found.tokens)} tokens · C {units.scientific(found.model_flops)} FLOPs "
        f"({found.model_flops / found.six_nd:.4f} of 6ND)",
        soft_wrap=True,
    )
    usable = MARGIN * cluster.device.memory / GIB
    if chosen is None:
        least = min(found.options, key=lambda option: option.memory.device)
        console.print(
            f"[bold red]does not fit[/bold red]: even ZeRO-{least.stage}, micro-batch {least.micro}, checkpointing "
            f"{_every(least.checkpointing)} needs {least.memory.device / GIB:.1f} GiB a GPU of the {usable:.1f} GiB that may "
            f"be used ({MARGIN:.0%} of {cluster.device.memory / GIB:.1f}): {parts_of(least.memory)} GiB",
            soft_wrap=True,
        )
        cure = (
            f"{found.enough} such GPUs would do" if found.enough else "no number of such GPUs up to the batch would do"
        )
        console.print(f"{cure}; or engine.ema_device=cpu, deepspeed.offload_optimizer=cpu, another GPU", soft_wrap=True)
        _table(console, found, sorted(found.options, key=lambda option: option.memory.device)[:8])
        return
    fit = "as configured" if chosen is found.given else "the fastest that fits"
    console.print(
        f"[bold green]fits[/bold green] ({fit}): ZeRO-{chosen.stage}, micro-batch {chosen.micro} × accumulation "
        f"{chosen.accumulation}, checkpointing {_every(chosen.checkpointing)}: {chosen.memory.device / GIB:.1f} of "
        f"{usable:.1f} GiB ({parts_of(chosen.memory)})"
        + (f", {chosen.memory.host / GIB:.1f} GiB of host memory" if chosen.memory.host else ""),
        soft_wrap=True,
    )
    step = chosen.step
    speed = f"{_seconds(step.seconds)} a step · {units.rate(step.images_per_second)} images/s"
    if step.mfu is not None:
        speed += f" · MFU {units.share(step.mfu)} · HFU {units.share(step.hfu)}"
    console.print(f"{speed} · bound by {step.binds}", soft_wrap=True)
    shares = [f"{name} {units.share(seconds / step.seconds)}" for name, seconds in step.by_phase.items() if seconds]
    console.print(f"  of it {', '.join(shares)}", soft_wrap=True)
    cost, energy = found.cost(chosen), found.kilowatt_hours(chosen)
    bill = f"{units.duration(found.seconds(chosen))} · {units.count(found.device_hours(chosen))} GPU-hours"
    bill += f" · {cost:,.0f} {found.currency}" if cost is not None else " · no price given (--price)"
    bill += f" · {units.count(energy)} kWh at {cluster.device.watts} W a GPU" if energy is not None else ""
    console.print(f"[bold]{bill}[/bold]", soft_wrap=True)
    if found.best is not None and found.given is not None and found.best is not found.given:
        better = found.best.step.images_per_second / chosen.step.images_per_second
        if not found.given.fits:
            console.print(f"[yellow]as configured it does not fit: {found.given.memory.device / GIB:.1f} GiB[/yellow]")
        elif better > 1.02:
            console.print(f"{better:.2f}× as fast: {' '.join(found.best.overrides())}", soft_wrap=True)
    elif chosen is not found.given:
        console.print(f"to run it so: {' '.join(chosen.overrides())}", soft_wrap=True)
    _table(console, found, _listed(found, sweep))
    console.print(
        "Steps alone: no evaluation, no checkpoints, no failures. "
        + (
            "Measured efficiencies: " + units.share(step.measured_share) + " of the time. "
            if step.measured_share
            else ""
        )
        + "Assumed:",
        style="dim",
        soft_wrap=True,
    )
    for line in step.assumptions:
        console.print(f"  {line}", style="dim", soft_wrap=True)


def _listed(found: Plan, sweep: bool) -> list[Option]:
    from longskip.engine.planning import pareto

    if sweep:
        return sorted(found.options, key=lambda o: (not o.fits, -o.step.images_per_second))
    return pareto(found.options)


def _table(console: Console, found: Plan, listed: list[Option]) -> None:
    from rich import box
    from rich.table import Table

    from longskip.engine.planning import GIB
    from longskip.profiling import units

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    titles = ("ZeRO", "micro", "accum.", "again", "GiB", "step", "images/s", "MFU", "days", "binds")
    for title in titles:
        table.add_column(title, justify="left" if title in ("again", "binds") else "right", no_wrap=True)
    for option in listed:
        memory = f"{option.memory.device / GIB:.1f}"
        row = (
            f"{'* ' if option is found.given else ''}{option.stage}", str(option.micro), str(option.accumulation),
            {0: "none", 1: "all"}.get(option.checkpointing, f"1 of {option.checkpointing}"),
            memory if option.fits else f"{memory}!", _seconds(option.step.seconds),
            units.rate(option.step.images_per_second), units.share(option.step.mfu),
            f"{found.seconds(option) / 86400:.1f}", option.step.binds,
        )  # fmt: skip
        table.add_row(*row, style="" if option.fits else "dim")
    console.print(table)
    notes = ["again: blocks that are computed again in the backward pass"]
    notes += ["*: as configured"] if found.given in listed else []
    notes += ["!: does not fit"] if any(not option.fits for option in listed) else []
    console.print("; ".join(notes), style="dim", soft_wrap=True)


def _seconds(value: float) -> str:
    from longskip.profiling import units

    return f"{value:.3g} s" if value < 59.95 else units.duration(value)


def _every(checkpointing: int) -> str:
    return {0: "none", 1: "of every block"}.get(checkpointing, f"of one block in {checkpointing}")
