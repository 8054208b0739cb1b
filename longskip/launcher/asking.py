"""What a supervisor is told from outside by the launch that started it, through launchers that would not pass it on.

A thread beside the supervisor looks for the launch's stop file and for the launch's death, and sends this process the
signal that the launch got (SIGTERM where it died): the supervisor then does what it does on any signal, save and end.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

from longskip.launcher.launching import ENDED, STOP
from longskip.launcher.rendering import BY_SSH, DEVICES, HERE, LAUNCHER

LOOK_SECONDS = 0.5
LAST_WORDS_SECONDS = 5.0
# What the launchers set for their one process a node, and ranks must not take for their own.
_OF_LAUNCHERS = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", DEVICES, LAUNCHER, HERE, BY_SSH,
)  # fmt: skip
_BEGIN_OF_LAUNCHERS = ("TORCHELASTIC_", "ROLE_", "OMPI_", "PMIX_", "PMI_")


def clear(environment: MutableMapping[str, str]) -> None:
    """Take out of ``environment`` what the launcher of this supervisor set in it, devices included."""
    if "CROSS_RANK" in environment:  # DeepSpeed's launcher: it shows its one process the first device only
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        if DEVICES in environment:
            environment["CUDA_VISIBLE_DEVICES"] = environment[DEVICES]
    for name in list(environment):
        if name in _OF_LAUNCHERS or name.startswith(_BEGIN_OF_LAUNCHERS):
            del environment[name]


@contextlib.contextmanager
def told_from_outside(environment: Mapping[str, str], node: int) -> Iterator[list[int]]:
    """While this is entered, the launch can ask this process to end. What the yielded list holds at the end, one exit code,
    is left in the launch's folder.

    ``environment`` is that before ``clear``. Over ssh standard input is the connection, and its end the launch's.
    """
    folder = Path(environment[HERE]) if environment.get(HERE) else None
    launcher = environment.get(LAUNCHER, "")
    ended: list[int] = []
    over = threading.Event()
    watching = [fd for fd in (_open(launcher), 0 if environment.get(BY_SSH) else None) if fd is not None]
    thread = threading.Thread(target=_watch, args=(folder, node, watching, over), daemon=True)
    if folder is not None or watching:
        thread.start()
    try:
        with outlet() if environment.get(BY_SSH) else contextlib.nullcontext():
            yield ended
    finally:
        over.set()
        if folder is not None and ended:
            with contextlib.suppress(OSError):  # the launch then says that it found no word
                (folder / f"{ENDED}-{node}").write_text(str(ended[-1]), "ascii")


@contextlib.contextmanager
def outlet() -> Iterator[None]:
    """While this is entered, what this process and those that it starts write goes through pipes which stay open when the
    connection behind standard output ends: a rank must not die of a line that nobody reads before it has saved."""
    ways: dict[int, int] = {}  # where it is read -> where it goes
    for number in (1, 2):
        real = os.dup(number)
        read, write = os.pipe()
        os.dup2(write, number)
        os.close(write)
        ways[read] = real
    thread = threading.Thread(target=_pour, args=(dict(ways),), daemon=True)
    thread.start()
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, real in zip((1, 2), ways.values(), strict=True):
            os.dup2(real, number)  # ours was the last end to write to, unless a process is left
        thread.join(LAST_WORDS_SECONDS)


def _pour(ways: dict[int, int]) -> None:
    while ways:
        for read in select.select(list(ways), [], [])[0]:
            data = os.read(read, 65536)
            if not data:
                del ways[read]
            while data and ways[read] >= 0:
                try:
                    data = data[os.write(ways[read], data) :]
                except OSError:
                    ways[read] = -1  # nobody is there; the rest is read and lost


def _open(launcher: str) -> int | None:
    """A handle of the launch's process; None where none is named, or this system has none of the kind."""
    if not launcher.isdigit() or not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(int(launcher))
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGTERM)  # it has died already
        return None
    except OSError:
        return None


def _watch(folder: Path | None, node: int, watching: list[int], over: threading.Event) -> None:
    while not over.is_set():
        asked = _asked(folder, node) if folder is not None else None
        if asked is None and watching:
            ready, _, _ = select.select(watching, [], [], 0)
            if any(fd != 0 or os.read(0, 4096) == b"" for fd in ready):
                asked = signal.SIGTERM
        if asked is not None:
            os.kill(os.getpid(), asked)
            return
        over.wait(LOOK_SECONDS)


def _asked(folder: Path, node: int) -> signal.Signals | None:
    for name in (STOP, f"{STOP}-{node}"):
        with contextlib.suppress(OSError):
            said = (folder / name).read_text("ascii", errors="replace").strip()
            return signal.SIGUSR1 if said == "SIGUSR1" else signal.SIGTERM
    return None
