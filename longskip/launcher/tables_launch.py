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


def print_rendered(rendered: Rendered, told: dict[str, Any]) -> None:
    """Every file, the variables, the commands and DeepSpeed's JSON; texts that can be copied as they stand."""
    from rich.console import Console

    console = Console(soft_wrap=True)
    for name, text in rendered.files.items():
        _part(console, f"{told['kept']}/{name}", text, _LANGUAGES.get(name, "text"))
    if rendered.environment:
        lines = "".join(f"{name}={shlex.quote(value)}\n" for name, value in rendered.environment.items())
        _part(console, "environment", lines, "bash")
    for node, command in enumerate(rendered.per_node):
        _part(console, f"command of node {node}", shlex.join(command) + "\n", "bash")
    if rendered.command and rendered.command not in rendered.per_node:
        _part(console, "command", shlex.join(rendered.command) + "\n", "bash")
    _part(console, "DeepSpeed's configuration", json.dumps(told["deepspeed"], indent=1) + "\n", "json")
    _part(console, "notes", "".join(f"{note}\n" for note in rendered.notes), "text")


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


def print_status(found: list[Status]) -> None:
    """A row a run, and its last incidents below."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    known = any(each.mfu is not None for each in found)  # a column of dashes tells nobody anything
    titles = ("run", "state", "step", "left", "images/s", *(["MFU"] if known else []), "committed", "starts", "goodput")
    for title in titles:
        table.add_column(title, justify="left" if title in ("run", "state") else "right", no_wrap=True)
    for each in found:
        ranks = f" ({each.world})" if each.world and each.state == "running" else ""
        commit = "–"
        if each.committed is not None and each.committed_age is not None:
            commit = f"{each.committed:,}, {_span(each.committed_age)} ago"
        table.add_row(
            Text(_printable(each.name)), Text(each.state + ranks, style=_COLOURS[each.state]),
            f"{each.step:,}" + (f"/{each.steps:,}" if each.steps else ""),
            "–" if each.eta is None else _span(each.eta), units.rate(each.images_per_second),
            *([units.share(each.mfu)] if known else []), commit,
            f"{each.attempts}" + (f" ({each.restarts} again)" if each.restarts else ""), units.share(each.goodput),
        )  # fmt: skip
    print_whole(console, table)
    for each in found:
        if each.incident_count:
            console.print(Text(_printable(f"{each.name}: {each.incident_count} incident(s)"), style="bold"))
        for row in each.incidents:
            where = f"step {row.get('step')}, attempt {row.get('attempt')}"
            console.print(Text(_printable(f"  {row.get('kind')} at {where}: {row.get('detail')}")), soft_wrap=True)


def _printable(text: str) -> str:
    """Texts of a run folder without what a terminal would take for commands."""
    return "".join(sign if sign.isprintable() else " " for sign in text)
