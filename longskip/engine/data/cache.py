"""A folder of fetched files with a bound on its bytes, shared by the processes of a node. On a local disk: it uses flock.

Files are written under ``parts`` and renamed into ``data`` when they are whole and checked, so what has its name is
good. One process at a time writes a part: it holds the part's lock, and a part without a holder was left by a process
that ended. The files last used longest ago are removed to make room; a reader that still has one open reads on, and its
bytes are free when it closes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO

from longskip.errors import DataError

_OURS = "longskip-"
_FILE = re.compile(r"\.(tar|npy)$")
_POLL = 0.01


def default_folder() -> Path:
    """Where fetched shards are kept when no folder is named: ``~/.cache/longskip/shards``, or as XDG_CACHE_HOME says."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "longskip" / "shards"


class Cache:
    """The files of one data set, ``name``, in a cache folder; ``limit`` bounds the bytes of all data sets in it.

    What is on its way counts with the size that was reserved for it, or where that is not known once it is whole.
    Only what lies in folders that caches made is ever counted or removed. May be sent to other processes.
    """

    def __init__(self, folder: str | os.PathLike[str], name: str, limit: int) -> None:
        self.root = Path(folder).expanduser().absolute()
        self.data = self.root / (_OURS + name) / "data"
        self.parts = self.root / (_OURS + name) / "parts"
        self.limit = limit
        with self._writable():
            self.data.mkdir(parents=True, exist_ok=True)
            self.parts.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT, 0o644))

    def has(self, file: str, size: int | None = None) -> bool:
        """Whether ``file`` is here, with ``size`` bytes where that is known."""
        try:
            found = (self.data / file).stat().st_size
        except OSError:
            return False
        return size is None or found == size

    def touch(self, file: str) -> None:
        """Marks ``file`` as just used."""
        with contextlib.suppress(OSError):
            os.utime(self.data / file)

    def drop(self, file: str) -> None:
        """Removes ``file``."""
        (self.data / file).unlink(missing_ok=True)

    @contextlib.contextmanager
    def part(self, file: str, busy: Callable[[], bool]) -> Iterator[IO[bytes] | None]:
        """The part of ``file`` to write into, empty and held by this process alone.

        While another process holds it, ``busy`` is asked time and again: True waits on, False gives up, and None is
        yielded. ``land`` gives the part its name; without that it is removed at the end.
        """
        path = self.parts / file
        with self._writable():
            path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with self._writable():  # never "w": that would empty a part which another process writes
                stream = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b")
            if _held(stream, path):
                break
            stream.close()
            if not busy():
                yield None
                return
            time.sleep(_POLL)
        try:
            with self._writable():
                stream.truncate(0)
            yield stream
        finally:
            with contextlib.suppress(OSError):
                if _is(stream, path):
                    path.unlink()
            stream.close()

    def land(self, file: str) -> None:
        """Syncs the part of ``file`` to the disk and gives it its name."""
        with self._writable():
            (self.data / file).parent.mkdir(parents=True, exist_ok=True)
            with (self.parts / file).open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(self.parts / file, self.data / file)

    def make_room(self, stream: IO[bytes], size: int, keep: Collection[str], *, force: bool) -> bool:
        """Grows an empty part to ``size`` bytes within the bound; False where the bound does not allow it.

        Files are removed, those used longest ago first, but none of ``keep``, the data set's files that will be needed
        sooner, unless ``force`` says that no reader waits for them as much as for this one.
        """
        with self._writable(), (self.root / ".lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            used, files = self._scan()
            missing = used - os.fstat(stream.fileno()).st_size + size - self.limit
            kept = {self.data / file for file in keep}
            free = [item for item in files if force or item[0] not in kept]
            if missing > sum(bytes_ for _, _, bytes_ in free):
                return False
            for path, _, bytes_ in sorted(free, key=lambda item: (item[0] in kept, item[1])):
                if missing <= 0:
                    break
                path.unlink(missing_ok=True)
                missing -= bytes_
            stream.truncate(size)
            return True

    def used(self) -> int:
        """The bytes of the whole cache folder: files, and what is reserved for those on their way."""
        return self._scan()[0]

    def _scan(self) -> tuple[int, list[tuple[Path, float, int]]]:
        """Bytes in use, and (path, time of last use, bytes) of the files that may be removed."""
        used, files = 0, []
        for kind in ("parts", "data"):  # what lands in between is counted twice, never missed
            for folder in self.root.glob(f"{_OURS}*/{kind}"):
                for base, _, names in os.walk(folder):
                    for path in (Path(base, name) for name in names if _FILE.search(name)):
                        try:
                            state = path.stat()
                        except FileNotFoundError:
                            continue
                        if kind == "parts" and _abandoned(path):
                            continue
                        used += state.st_size
                        if kind == "data":
                            files.append((path, state.st_mtime, state.st_size))
        return used, files

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"the cache {self.root} cannot be written: {error}",
                cure="free space there, or set data.cache to a folder of your own on a local disk",
            ) from error


def _held(stream: IO[bytes], path: Path) -> bool:
    """Whether this stream now holds the lock of the file that has the name ``path``."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return _is(stream, path)


def _is(stream: IO[bytes], path: Path) -> bool:
    """Whether the open file is still the one that has the name: the one before may have been renamed or removed."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _abandoned(path: Path) -> bool:
    """Whether a part has no holder; then it is removed."""
    try:
        with path.open("rb") as stream:
            if not _held(stream, path):
                return False
            path.unlink()
    except FileNotFoundError:
        pass
    return True
