"""What benchmarks say alike: the machine, the commit, medians and their spread, and how a result becomes a page."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from longskip.engine.runs import environment
from longskip.profiling.bench_timing import spread
from longskip.profiling.hardware import processor

__all__ = ["VERDICTS", "about", "commit", "cores", "machine", "page", "save", "shown", "spread", "table"]

VERDICTS = {True: "met", False: "missed", None: ""}


def shown(values: Mapping[str, float], form: str) -> str:
    """A spread as text, its numbers in ``form``."""
    return f"{values['median']:{form}} ({values['p20']:{form}}–{values['p80']:{form}})"


def about(name: str, options: Mapping[str, Any], load: Sequence[float], *packages: str) -> dict[str, Any]:
    """What a result says of where it comes from; ``load`` is the load average before, that of now is the one after."""
    return {
        "command": " ".join([f"longskip bench {name}", *(f"--{option} {value}" for option, value in options.items())]),
        "commit": commit(),
        "machine": machine(*packages),
        "load_average": {"before": list(load), "after": list(os.getloadavg())},
    }


def page(title: str, result: Mapping[str, Any], how: str) -> list[str]:
    """The first lines of a result's page; ``how`` stands beside machine, commit and loads."""
    made_of = result["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in made_of["versions"].items())
    before, after = (", ".join(f"{value:.1f}" for value in result["load_average"][key]) for key in ("before", "after"))
    return [
        f"# {title}",
        "",
        f"`{result['command']}`",
        "",
        f"{made_of['device']}, {made_of['cores']} cores, {packages}; commit {result['commit']}; {how}; "
        f"load average before {before}, after {after}.",
    ]


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a Markdown table."""
    ruled = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return [*ruled, *(f"| {' | '.join(map(str, row))} |" for row in rows)]


def save(result: Mapping[str, Any], text: str, out: Path) -> None:
    """The result as ``out`` with .json at its end, and its page beside it with .md."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    out.with_suffix(".md").write_text(text, "utf-8")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(*packages: str) -> dict[str, Any]:
    """The device, its cores, and the versions of longskip, Python and these packages."""
    made_of = environment()
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "cores": cores(),
        "versions": {"longskip": made_of["longskip"], "python": made_of["python"]}
        | {name: made_of["packages"][name] for name in packages},
    }


def commit() -> str:
    """The commit of the code that runs, with a mark where files were changed since; "unknown" outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip() + (" and changes since" if changed.stdout.strip() else "")
