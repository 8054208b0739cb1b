"""A child process in which hostile input is read: with a time limit, a memory limit, and eyes on what it does.

Python's audit events tell, whatever the code under test thinks of itself: a command that is started, a pickle that looks
for a class, a connection, a file that is opened outside the case's folder. The child serves many cases; one that hangs or
dies is a failure and gets a successor.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from longskip.errors import LongskipError

SECONDS = 20.0  # of one case; a sound one takes milliseconds, also on a busy machine
MEMORY = 512 << 20  # bytes that a case may take beyond what the child begins with
NEVER = (
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.spawn", "subprocess.Popen", "pickle.find_class",
    "socket.connect", "socket.bind", "ctypes.dlopen", "os.symlink", "os.link",
)  # fmt: skip

Target = Callable[[Path, Any], Any]
"""A case's folder and the case → what it gives. LongskipError is a fair answer, every other error a failure."""


class Outcome(NamedTuple):
    """``kind``: ``fine``, ``refused`` (a LongskipError) or ``failed``; ``text``: what was said, or the traceback."""

    kind: str
    text: str


class Sandbox:
    """``run(name, case)`` calls ``targets[name](folder, case)`` in the child. ``warm`` cases run before eyes are opened,
    so that what is imported on the way is not taken for an escape."""

    def __init__(self, folder: Path, targets: dict[str, Target], warm: dict[str, Any] | None = None) -> None:
        self.folder, self.targets, self.warm = folder, targets, warm or {}
        self._process: Any = None
        self._pipe: Any = None

    def run(self, name: str, case: Any) -> Outcome:
        """Raises AssertionError for anything but success or a LongskipError."""
        if self._process is None:
            self._start()
        self._pipe.send((name, case))
        outcome = None
        try:
            if self._pipe.poll(SECONDS):
                outcome = Outcome(*self._pipe.recv())
        except (EOFError, OSError):
            self._process.join()
            self.close()
            raise AssertionError(f"{name}: the process died") from None
        if outcome is None:
            self.close()
            raise AssertionError(f"{name}: no answer within {SECONDS:g} s")
        assert outcome.kind in ("fine", "refused"), outcome.text
        return outcome

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.folder, self.targets, self.warm), daemon=True)
        self._process.start()
        theirs.close()

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            self._pipe.close()
            process.kill()
            process.join()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(pipe: Connection, folder: Path, targets: dict[str, Target], warm: dict[str, Any]) -> None:
    os.chdir(folder)
    for name, case in warm.items():
        with contextlib.suppress(LongskipError):
            targets[name](folder, case)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    seen: list[str] = []
    roots = tuple(str(Path(root).resolve()) for root in (sys.prefix, sys.base_prefix, Path(__file__).parents[2]))

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in NEVER:
            seen.append(f"{event} {arguments!r}"[:400])
        elif event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.path.abspath(os.fsdecode(arguments[0]))  # noqa: PTH100 - a link inside stays visible
            writes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR)) if isinstance(arguments[2], int) else False
            inside = path.startswith(f"{folder}/")
            if not inside and (writes or not path.startswith((*roots, "/usr/", "/lib", "/proc/", "/sys/"))):
                seen.append(f"opened {path} {'to write' if writes else ''}")

    sys.addaudithook(watch)
    while True:
        try:
            name, case = pipe.recv()
        except EOFError:
            return
        seen.clear()
        try:
            targets[name](folder, case)
            answer = ("fine", "")
        except LongskipError as error:
            answer = ("refused", str(error))
        except BaseException:
            answer = ("failed", traceback.format_exc(limit=-6))
        if seen:
            answer = ("failed", "it did what it must not: " + "; ".join(seen))
        pipe.send(answer)
