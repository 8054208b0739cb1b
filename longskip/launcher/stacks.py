"""What processes that hang are at: whether a signal has stopped them, and their stacks into files (no torch)."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence

DUMP_SECONDS = 1.0


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal (SIGSTOP, a debugger); False where the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # the name in brackets may hold anything, the state is the first letter behind it
            return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except (OSError, IndexError):
        return False


def dump(pids: Sequence[int]) -> None:
    """Ask processes that listen for it (``pulse.show_stacks_when_asked``) for their stacks, stopped ones included.

    A stopped process gets the signal first and is then let go on, so that the handler is the first thing that it does.
    """
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR2)
            os.kill(pid, signal.SIGCONT)
    time.sleep(DUMP_SECONDS)
