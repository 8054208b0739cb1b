"""What processes that hang are at: whether a signal has stopped them, and their stacks into files (no torch)."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

DUMP_SECONDS = 3.0
SETTLE_SECONDS = 0.2


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal (SIGSTOP, a debugger); False where the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # the name in brackets may hold anything, the state is the first letter behind it
            return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except (OSError, IndexError):
        return False


def dump(processes: Mapping[int, Path]) -> None:
    """Ask processes that listen for it (``pulse.show_stacks_when_asked``) for their stacks, stopped ones included.

    ``processes`` maps their numbers to the files that they write to, which are waited for a little. A stopped process gets
    the signal first and is then let go on, so that the handler is the first thing that it does.
    """
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR2)
            os.kill(pid, signal.SIGCONT)
    deadline = time.monotonic() + DUMP_SECONDS
    while time.monotonic() < deadline and not all(
        path.is_file() and path.stat().st_size for path in processes.values()
    ):
        time.sleep(0.02)
    time.sleep(SETTLE_SECONDS)
