"""Signals that ask a run to save and stop (no torch).

The handler only remembers; the loop's ranks agree on it once a step, so that all of them save at the same step. It is
installed before anything heavy is imported, so that a signal during start-up is not lost.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from typing import Any

from longskip.engine import pulse

SUPERVISOR = "LONGSKIP_SUPERVISOR"  # of the process that started this rank: its number, a dash, and a word of its own
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

_WAITS_FOR = {
    "start": "the start-up goes on; the run stops after its first step, saved",
    "step": "the run stops once this step has ended and is saved",
    "save": "the run stops after the next step, once it is saved",
    "evaluate": "the run stops once the validation and one more step have ended and are saved",
    "samples": "the run stops once the samples are drawn and one more step has ended and is saved",
    "end": "the run is ending already",
}

_received: list[int] = []


def listen() -> None:
    """From now on the asking signals are remembered instead of ending the process; a second one changes nothing.

    The first one is answered at once, in a line on standard error that says what is waited for.
    """
    for number in ASKING:
        signal.signal(number, _remember)


def _remember(number: int, frame: Any) -> None:
    _received.append(number)
    # One voice, once: where there is a supervisor, or a first rank, that one answers.
    if len(_received) == 1 and SUPERVISOR not in os.environ and os.environ.get("RANK", "0") == "0":
        doing = pulse.own().beat.phase
        text = f"longskip: {signal.Signals(number).name}: {_WAITS_FOR.get(doing, _WAITS_FOR['start'])}\n"
        with suppress(OSError):
            # Not print: the signal may have come in the middle of one. On a terminal a bar may stand in this line.
            os.write(2, ("\n" if os.isatty(2) else "").encode() + text.encode())


def ignore() -> None:
    """From now on the asking signals do nothing: for a process that has done all it had to.

    Python gives a handler's signal its deadly effect back while it ends, and one that comes late, from a supervisor that
    heard of the stop after the ranks had agreed on it, would make a death of a clean save.
    """
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)


def asked() -> bool:
    """Whether this process was asked to stop."""
    return bool(_received)


def forget() -> None:
    _received.clear()


def end_with_supervisor() -> None:
    """From now on this process is killed when its supervisor dies, however it dies; nothing without one.

    Linux' PR_SET_PDEATHSIG, set by the rank itself: a supervisor has threads, and must run nothing between fork and exec.
    """
    supervisor = os.environ.get(SUPERVISOR, "").partition("-")[0]
    if not supervisor.isdigit() or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(supervisor):  # it died before
        os._exit(1)
