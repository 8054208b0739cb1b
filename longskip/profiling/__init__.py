"""Counting, measuring and reporting: what a run costs, what it reached, and how the two compare.

Names are imported on first use, so that the torch-free parts stay so.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Device": "hardware",
    "DEVICES": "hardware",
    "lookup": "hardware",
    "mfu_reason": "hardware",
    "find": "hardware",
    "FlopLedger": "flop_ledger",
    "RankMemory": "memory",
    "rank_memory": "memory",
    "Collective": "traffic",
    "StepTime": "step_time",
    "FlopCount": "counting",
    "OpCount": "counting",
    "UndeclaredOpError": "counting",
    "count_flops": "counting",
    "declare": "counting",
    "Meter": "meter",
    "Interval": "meter",
    "LedgerLine": "ledger",
    "Resumed": "ledger",
    "Sums": "ledger",
    "Totals": "ledger",
    "append": "ledger",
    "read": "ledger",
    "sums": "ledger",
    "RunLog": "runlog",
    "SampleGrid": "runlog",
    "render_report": "report",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
