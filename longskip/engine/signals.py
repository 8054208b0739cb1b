"""Signals that ask a run to save and stop (no torch).

The handler only remembers; the loop's ranks agree on it once a step, so that all of them save at the same step. It is
installed before anything heavy is imported, so that a signal during start-up is not lost.
"""

from __future__ import annotations

import signal
from typing import Any

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

_received: list[int] = []


def listen() -> None:
    """From now on the asking signals are remembered instead of ending the process; a second one changes nothing."""
    for number in ASKING:
        signal.signal(number, _remember)


def _remember(number: int, frame: Any) -> None:
    _received.append(number)


def asked() -> bool:
    """Whether this process was asked to stop."""
    return bool(_received)


def forget() -> None:
    _received.clear()
