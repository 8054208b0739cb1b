"""A rank's pulse: what it is at, in a small memory-mapped file that its supervisor reads without asking (no torch).

The file is named by ``LONGSKIP_PULSE``; without it nothing is written. There is no lock between the two: a value read half
new and half old is read whole the next time, and no decision hangs on a single reading.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import struct
import time
from dataclasses import dataclass
from typing import Any, Literal, get_args

Phase = Literal["none", "start", "step", "save", "evaluate", "samples", "end"]
Word = Literal["", "done", "saved", "final", "failed"]

VARIABLE = "LONGSKIP_PULSE"
STACKS = "LONGSKIP_STACKS"
PHASES: tuple[Phase, ...] = get_args(Phase)
WORDS: tuple[Word, ...] = get_args(Word)
_LAYOUT = struct.Struct("<qqqqqd")  # beats, phase, step, finished step, last word, slowest step's seconds
SIZE = _LAYOUT.size


@dataclass(frozen=True)
class Beat:
    """What a rank last told: its phase, the step that it is in, the last one that it finished (−1: none is known).

    ``count`` grows with everything told, so that a standing still is seen without comparing clocks; 0: nothing told yet.
    ``slowest`` is the longest of this process's steps in seconds, 0 before the first.
    """

    count: int = 0
    phase: Phase = "none"
    step: int = 0
    finished: int = -1
    word: Word = ""
    slowest: float = 0.0


class Pulse:
    """The rank's side. Without a file every call does nothing."""

    def __init__(self, path: str | None) -> None:
        self._map: mmap.mmap | None = None
        self.beat = Beat()  # what was told last
        self._stepping_since = 0.0
        if path:
            descriptor = os.open(path, os.O_RDWR)
            try:
                self._map = mmap.mmap(descriptor, SIZE)
            finally:
                os.close(descriptor)

    def step(self, n: int) -> None:
        """Step ``n`` begins; the one before is finished."""
        now = time.monotonic()
        slowest = self.beat.slowest
        if self.beat.phase == "step" and self.beat.step == n - 1:
            slowest = max(slowest, now - self._stepping_since)
        self._stepping_since = now
        self._tell("step", step=n, finished=n - 1, slowest=slowest)

    def phase(self, name: Phase, *, finished: int | None = None) -> None:
        """Something else than a step begins; ``finished`` is the last finished step where it is known."""
        slowest = self.beat.slowest
        if self.beat.phase == "step":
            slowest = max(slowest, time.monotonic() - self._stepping_since)
        self._tell(name, finished=self.beat.finished if finished is None else finished, slowest=slowest)

    def end(self, word: Word) -> None:
        """How this rank is about to end; ``final``: an error that a new start would meet again."""
        self._tell("end", word=word)

    def _tell(self, phase: Phase, **values: Any) -> None:
        self.beat = Beat(**(vars(self.beat) | values | {"phase": phase, "count": self.beat.count + 1}))
        if self._map is not None:
            beat = self.beat
            codes = (beat.count, PHASES.index(beat.phase), beat.step, beat.finished, WORDS.index(beat.word))
            self._map[:] = _LAYOUT.pack(*codes, beat.slowest)


def read(path: str | int) -> Beat:
    """The last beat in a pulse file (its path, or an open descriptor); nothing told where it is empty or damaged."""
    descriptor = os.open(path, os.O_RDONLY) if isinstance(path, str) else path
    try:
        data = os.pread(descriptor, SIZE, 0)
    finally:
        if isinstance(path, str):
            os.close(descriptor)
    if len(data) < SIZE:
        return Beat()
    count, phase, step, finished, word, slowest = _LAYOUT.unpack(data)
    if not (count > 0 and 0 <= phase < len(PHASES) and 0 <= word < len(WORDS)):
        return Beat()
    return Beat(count, PHASES[phase], step, finished, WORDS[word], slowest)


_own: Pulse | None = None


def own() -> Pulse:
    """This process's pulse; the first call opens the file that ``LONGSKIP_PULSE`` names."""
    global _own
    if _own is None:
        _own = Pulse(os.environ.get(VARIABLE))
    return _own


def show_stacks_when_asked() -> None:
    """SIGUSR2 from now on appends the stacks of all threads to the file that ``LONGSKIP_STACKS`` names.

    The interpreter does so in the signal's handler itself, also while it waits inside a library.
    """
    path = os.environ.get(STACKS)
    if path and hasattr(signal, "SIGUSR2"):
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open until the process ends
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
