"""What a save does to the disk: every write, fsync and rename in one place, each of them a fault point.

A file is hashed while it is written: its SHA-256 is of the bytes that were meant, so that a fault between memory and disk
shows at the next verification, and nothing is read again.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from longskip.engine import faults
from longskip.errors import CheckpointError

CHUNK = 1 << 20  # bytes of one write: still in the processor's cache when they are hashed


class Disk:
    """The operations of the save of ``step``; none begins after ``stop()``, which any thread may call."""

    def __init__(self, step: int) -> None:
        self.step = step
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    def pause(self, seconds: float) -> None:
        """Wait so long; raises CheckpointError once the save is given up."""
        if self._stopped.wait(seconds):
            raise self._given_up()

    def write(self, path: Path, fill: Callable[[BinaryIO], Any]) -> dict[str, Any]:
        """A new file of what ``fill`` writes, on the disk when this returns: ``{"bytes", "sha256"}``.

        An OSError names the file, how far it came and what is free.
        """
        with open(path, "xb", buffering=0) as file:
            hashed = _Hashed(file, self._next)
            try:
                with io.BufferedWriter(hashed, CHUNK) as buffered:
                    fill(buffered)
                self._next()
                os.fsync(file.fileno())
            except OSError as error:
                free = shutil.disk_usage(path.parent).free
                text = f"{error.strerror} after {hashed.bytes:,} bytes, {free:,} are free"
                raise OSError(error.errno, text, str(path)) from None
        return {"bytes": hashed.bytes, "sha256": hashed.digest.hexdigest()}

    def write_text(self, path: Path, text: str) -> dict[str, Any]:
        return self.write(path, lambda file: file.write(text.encode()))

    def sync(self, path: Path) -> None:
        """Wait until what a folder lists, or a file holds, is on the disk."""
        self._next()
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        """``new`` may be a file, which is replaced, but no folder."""
        self._next()
        os.replace(old, new)

    def remove(self, folder: Path) -> None:
        """Renamed first: half of a deletion leaves no folder that looks like a checkpoint."""
        if folder.exists():
            doomed = folder.with_name(f"{folder.name}.old")
            shutil.rmtree(doomed, ignore_errors=True)
            self.rename(folder, doomed)
            self._next()
            shutil.rmtree(doomed, ignore_errors=True)

    def _next(self) -> None:
        if self._stopped.is_set():
            raise self._given_up()
        faults.point("save.io", step=self.step)

    def _given_up(self) -> CheckpointError:
        return CheckpointError(f"the save of step {self.step} was given up")


class _Hashed(io.RawIOBase):
    """Writes to ``file``, a chunk at a time, what it also hashes; ``before`` is called before each chunk."""

    def __init__(self, file: io.FileIO, before: Callable[[], None]) -> None:
        self._file, self._before = file, before
        self.digest, self.bytes = hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._before()
        chunk = memoryview(data)[:CHUNK]
        written = self._file.write(chunk)
        self.digest.update(chunk[:written])
        self.bytes += written
        return written
