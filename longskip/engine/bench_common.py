"""What benchmarks say alike: the machine, the commit, medians and their spread."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longskip.engine.runs import environment

VERDICTS = {True: "met", False: "missed", None: ""}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentiles."""
    low, middle, high = np.percentile(values, (20, 50, 80)).tolist()
    return {"median": middle, "p20": low, "p80": high}


def shown(values: Mapping[str, float], form: str) -> str:
    """A spread as text, its numbers in ``form``."""
    return f"{values['median']:{form}} ({values['p20']:{form}}–{values['p80']:{form}})"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(*packages: str) -> dict[str, Any]:
    """The device, its cores, and the versions of longskip, Python and these packages."""
    made_of = environment()
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "cores": cores(),
        "versions": {"longskip": made_of["longskip"], "python": made_of["python"]}
        | {name: made_of["packages"][name] for name in packages},
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def commit() -> str:
    """The commit of the code that runs, with a mark where files were changed since; "unknown" outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip() + (" and changes since" if changed.stdout.strip() else "")
