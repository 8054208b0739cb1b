"""Whether all nodes see one run folder, may write there, and respect one another's locks (no torch)."""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from longskip.launcher.board import Board
from longskip.launcher.probes import Found

_MARK = ".preflight-"
_WAIT = 6.0  # seconds for what another node is to say
_APPEARS = 4.0  # seconds in which a file server shows a new file to everybody
_FORGOTTEN = 600.0  # seconds after which a mark is nobody's any more


class CommonFolder:
    """The probe of one node. Node 0 writes a mark and holds its lock until ``release``, after everybody has looked."""

    def __init__(self, board: Board, run: Path, node: int) -> None:
        self.board, self.run, self.node = board, run, node
        self._made: list[Path] = []
        self._mark: Path | None = None
        self._held: IO[str] | None = None

    def probe(self, found: Found) -> None:
        found["path"] = str(self.run.absolute())
        if self.node == 0:
            self._begin(found)
        else:
            self._look(found)
        with suppress(OSError):
            found["free"], found["steps"] = self._free()

    def _begin(self, found: Found) -> None:
        name = _MARK + secrets.token_hex(8)
        try:
            self._make_folder()
            self._forget_old()
            found["owner"] = owner_of(self.run / "run.lock")
            self._mark = self.run / name
            self._held = self._written(self._mark)
            found["writable"] = True
            found["seen"] = True
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found["locked"] = True
        except OSError as error:
            found["error"] = f"{type(error).__name__}: {error}"
            found.setdefault("writable", False)
            found["locked"] = False
        self.board.put("mark", {"name": name, "written": found["writable"], "host": socket.gethostname()})

    def _look(self, found: Found) -> None:
        mark = self.board.take("mark", _WAIT)
        if not mark["written"]:
            return  # node 0 says why
        path = self.run / mark["name"]
        until = time.monotonic() + _APPEARS
        while True:
            try:
                os.listdir(self.run)  # makes a file server's client look again
                found["seen"] = path.read_text("ascii") == mark["name"]
                break
            except OSError as error:
                if time.monotonic() > until:
                    found["seen"] = False
                    found["error"] = f"{type(error).__name__}: {error}"
                    return
            time.sleep(0.1)
        try:
            with open(path, "rb") as file:
                found["locked"] = _is_locked(file)
        except OSError as error:
            found["locked"], found["error"] = False, f"{type(error).__name__}: {error}"
        own = self.run / f"{mark['name']}-{self.node}"
        try:
            self._written(own).close()
            found["writable"] = True
        except OSError as error:
            found["writable"] = False
            found["error"] = f"{type(error).__name__}: {error}"
        finally:
            with suppress(OSError):
                own.unlink(missing_ok=True)

    def _written(self, path: Path) -> IO[str]:
        file = open(path, "w", encoding="ascii")  # noqa: SIM115 - held until release
        try:
            file.write(path.name)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            file.close()
            with suppress(OSError):
                path.unlink(missing_ok=True)
            raise
        return file

    def _make_folder(self) -> None:
        missing = [each for each in (self.run, *self.run.parents) if not each.exists()]
        for each in reversed(missing):
            each.mkdir(exist_ok=True)
            self._made.append(each)

    def _forget_old(self) -> None:
        """Marks that a preflight left which was killed."""
        for path in self.run.glob(_MARK + "*"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _FORGOTTEN:
                    path.unlink()

    def _free(self) -> tuple[int, int]:
        """Bytes free where checkpoints go, and how many checkpoints are there."""
        folder = self.run / "checkpoints" if (self.run / "checkpoints").is_dir() else self.run
        state = os.statvfs(folder)
        return state.f_bavail * state.f_frsize, len([p for p in folder.glob("step-*") if p.suffix == ""])

    def release(self) -> None:
        """Removes the mark, and the folders that were made for it where nothing else has come into them."""
        if self._held is not None:
            self._held.close()
        if self._mark is not None:
            with suppress(OSError):
                self._mark.unlink(missing_ok=True)
        for each in reversed(self._made):
            with suppress(OSError):
                each.rmdir()


def _is_locked(file: IO[bytes]) -> bool:
    """Whether somebody else holds the file's lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def owner_of(lock: Path) -> str | None:
    """Who holds a run's lock; None where nobody does."""
    try:
        with open(lock, "rb") as file:
            if _is_locked(file):
                return file.read(300).decode("utf-8", "replace").strip() or "an unknown process"
    except OSError:
        return None
    return None
