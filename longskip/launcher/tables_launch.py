"""What a launch would run, and what runs are at, for people (rich)."""

from __future__ import annotations

import json
import shlex
from typing import Any

from longskip.launcher.rendering import Rendered
from longskip.launcher.status import Status
from longskip.launcher.tables import print_whole
from longskip.profiling import units

_LANGUAGES = {"run.sbatch": "bash", "job.yaml": "yaml", "supervise.py": "python"}


def print_rendered(rendered: Rendered, told: dict[str, Any], *, verbose: bool = False) -> None:
    """Every file, the variables, with ``verbose`` DeepSpeed's JSON, the notes and the commands; texts that can be copied as
    they stand."""
    from rich.console import Console

    console = Console(soft_wrap=True)
    for name, text in rendered.files.items():
        _part(console, f"{told['kept']}/{name}", text, _LANGUAGES.get(name, "text"))
    if rendered.environment:
        lines = "".join(f"{name}={shlex.quote(value)}\n" for name, value in rendered.environment.items())
        _part(console, "environment", lines, "bash")
    if verbose:
        _part(console, "DeepSpeed's configuration", json.dumps(told["deepspeed"], indent=1) + "\n", "json")
    if rendered.notes:
        _part(console, "notes", "".join(f"{note}\n" for note in rendered.notes), "text")
    for node, command in enumerate(rendered.per_node):
        _part(console, f"command of node {node}", shlex.join(command) + "\n", "bash")
    if rendered.command and rendered.command not in rendered.per_node:
        _part(console, "command", shlex.join(rendered.command) + "\n", "bash")
    if not verbose:
        console.print("in full: --verbose (DeepSpeed's JSON), or --json (everything)", style="dim", markup=False)


def _part(console: Any, title: str, text: str, language: str) -> None:
    from rich.syntax import Syntax
    from rich.text import Text

    console.print(Text(f"── {title} " + "─" * max(2, 60 - len(title)), style="bold cyan"))
    if console.is_terminal:
        console.print(Syntax(text.rstrip("\n"), language, background_color="default", word_wrap=True))
    else:
        console.print(Text(text.rstrip("\n")))
    console.print()


def _span(seconds: float) -> str:
    """Whole seconds below a minute."""
    return f"{seconds:.0f} s" if seconds < 59.5 else units.duration(seconds)


_COLOURS = {"running": "green", "done": "green", "saved": "yellow", "failed": "red", "crashed": "red", "new": "dim"}


# What goes first where the terminal is narrow.
_LEAVE_OUT = ("starts", "images/s", "MFU")


def _columns(found: list[Status]) -> dict[str, list[str]]:
    """Title → the cells of a status table, a run each."""

    def commit(each: Status) -> str:
        if each.committed is None or each.committed_age is None:
            return "–"
        return f"{each.committed:,}, {_span(each.committed_age)} ago"

    columns = {
        "run": [_printable(each.name) for each in found],
        "state": [
            each.state + (f" ({each.world})" if each.world and each.state == "running" else "") for each in found
        ],
        "step": [f"{each.step:,}" + (f"/{each.steps:,}" if each.steps else "") for each in found],
        "left": ["–" if each.eta is None else _span(each.eta) for each in found],
        "images/s": [units.rate(each.images_per_second) for each in found],
        "MFU": [units.share(each.mfu) for each in found],
        "committed": [commit(each) for each in found],
        "starts": [f"{each.attempts}" + (f" ({each.restarts} again)" if each.restarts else "") for each in found],
        "goodput": [units.share(each.goodput) for each in found],
    }
    if all(each.mfu is None for each in found):  # a column of dashes tells nobody anything
        del columns["MFU"]
    return columns


def print_status(found: list[Status]) -> None:
    """A row a run, of as many columns as the terminal holds, and its last incidents below."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    columns, left_out = _columns(found), []
    for title in _LEAVE_OUT:
        if sum(2 + max(map(len, (name, *cells))) for name, cells in columns.items()) <= console.width:
            break
        if columns.pop(title, None):
            left_out.append(title)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for title in columns:
        table.add_column(title, justify="left" if title in ("run", "state") else "right", no_wrap=True)
    for each, *cells in zip(found, *columns.values(), strict=True):
        table.add_row(
            *(Text(cell, style=_COLOURS[each.state] if place == 1 else "") for place, cell in enumerate(cells))
        )
    print_whole(console, table)
    if left_out:
        console.print(f"left out for want of width: {', '.join(left_out)}; all in --json", style="dim")
    for each in found:
        if each.incident_count:
            console.print(Text(_printable(f"{each.name}: {each.incident_count} incident(s)"), style="bold"))
        for row in each.incidents:
            where = f"step {row.get('step')}, attempt {row.get('attempt')}"
            console.print(Text(_printable(f"  {row.get('kind')} at {where}: {row.get('detail')}")), soft_wrap=True)


def _printable(text: str) -> str:
    """Texts of a run folder without what a terminal would take for commands."""
    return "".join(sign if sign.isprintable() else " " for sign in text)
