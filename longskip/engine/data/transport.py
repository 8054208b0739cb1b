"""Files from a URL into local ones: streamed, resumed where that is possible, tried again, and given up in time.

Two transports, asked for by name. ``fsspec`` reads http(s), s3 and whatever else fsspec has a filesystem for; a broken
http transfer is resumed with a Range request where the server allows it. ``webdataset`` reads through webdataset's own
opener, which for http(s) starts the program ``curl`` and reads its pipe; a broken transfer starts from the beginning,
and curl repeats a server's errors (500, …) itself before it reports them. Neither is ever handed a ``pipe:`` URL, which
would run a shell, nor a chain of URLs.

Every attempt reads in a thread of its own, so that whatever hangs (a name server, a connection, a read) is noticed.
"""

from __future__ import annotations

import os
import queue
import random
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, Protocol
from urllib.parse import quote, urlsplit, urlunsplit

from longskip.engine.data.index import INDEX_NAME
from longskip.engine.secrets import hidden, holds_secret
from longskip.errors import ConfigError, DataError, RemoteError, ShardError

TRANSPORTS = ("fsspec", "webdataset")

_CHUNK = 1 << 20
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_TRY_AGAIN = (408, 416, 425, 429)  # of HTTP's 4xx; 416: what was fetched so far is no part of what is there now


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for. Times are in seconds.

    An attempt is given up after ``silence`` without a byte. The pause before the next one starts at ``pause``, doubles
    up to ``longest_pause`` and is shortened at random by up to half, so that many readers do not return together. A
    file is given up after ``attempts``, when ``wrong`` of them brought all of it and it was not what it should be, or
    when they have taken ``total``.
    """

    attempts: int = 6
    wrong: int = 3
    silence: float = 30.0
    total: float = 3600.0
    pause: float = 0.5
    longest_pause: float = 30.0


class Stopped(Exception):
    """The download was told to stop; nobody waits for it."""


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` has the form ``scheme://…``."""
    return bool(_URL.match(os.fspath(path)))


def checked_url(url: str) -> str:
    """The URL of a folder of shards, without ``index.json`` at its end.

    Raises ``ShardError`` for ``pipe:`` URLs, for chains (``a::b``), and for what is no URL.
    """
    if re.match(r"\s*pipe:", url, re.IGNORECASE):
        raise ShardError(
            f"{hidden(url)!r} would run a command; pipes are never opened", cure="give an http(s):// or s3:// URL"
        )
    if not is_url(url) or "::" in url:
        raise ShardError(
            f"{hidden(url)!r} is not a URL of one folder of shards",
            cure="give scheme://host/folder, as in https:// or s3://",
        )
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=parts.path.removesuffix("/" + INDEX_NAME).rstrip("/")))


def shown(url: str) -> str:
    """``url`` for messages: without the password and the query, which may hold keys."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def beside(folder: str, file: str, *, transport: str) -> str:
    """The URL of ``file`` in the folder at a URL; a query (a shared access key) is kept."""
    parts = urlsplit(folder)
    # Filesystems of fsspec take names as they are; http and webdataset take them quoted.
    plain = transport == "fsspec" and parts.scheme not in ("http", "https")
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{file if plain else quote(file)}"))


class _Stream(Protocol):
    """Bytes of a file from byte ``start`` on."""

    start: int

    def read(self) -> bytes:
        """The next bytes; none at the end. Raises where the transfer broke."""
        ...

    def end(self) -> None:
        """Lets go of the connection, also while another thread reads."""
        ...


class _FileStream:
    def __init__(self, file: Any, start: int) -> None:
        self.file, self.start = file, start

    def read(self) -> bytes:
        return self.file.read(_CHUNK)

    def end(self) -> None:
        self.file.close()


class _PipeStream:
    """What webdataset's opener returned: a plain file, or a program's pipe."""

    def __init__(self, opened: Any) -> None:
        self.start = 0
        self.opened = opened  # a pipe closes itself when it is let go
        self.program = getattr(opened, "proc", None)
        self.file = opened.stream if self.program is not None else opened

    def read(self) -> bytes:
        data = self.file.read1(_CHUNK)
        if not data and self.program is not None and (code := self.program.wait()):
            raise OSError(f"{self.program.args[0]} ended with exit code {code}")
        return data

    def end(self) -> None:
        if self.program is None:
            self.file.close()
        else:
            self.program.kill()  # the read that hangs sees the end of the pipe
            self.program.wait()


class Transport:
    """Opens the files of the folder at ``url`` with one transport; may be sent to other processes.

    Raises ``ConfigError`` where the transport cannot read such URLs here, naming what is missing.
    """

    def __init__(self, kind: str, url: str, patience: Patience | None = None) -> None:
        if kind not in TRANSPORTS:
            raise ConfigError(f"data.remote {kind!r}; it is one of {', '.join(TRANSPORTS)}")
        self.kind = kind
        self.url = checked_url(url)
        self.scheme = urlsplit(self.url).scheme.lower()
        self.patience = patience or Patience()
        self._filesystem: tuple[int, Any] | None = None
        if kind == "fsspec":
            self._fsspec()
        else:
            self._check_webdataset()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_filesystem": None}

    def fetch(
        self,
        file: str,
        into: IO[bytes],
        *,
        size: int | None,
        limit: int,
        check: Callable[[], None],
        stop: threading.Event | None = None,
    ) -> None:
        """Writes ``file`` of the folder into ``into`` from its start and has it checked.

        ``size`` is what it must have, in bytes (None: not known), ``limit`` the most that is ever written. ``check``
        raises ``ShardError`` where the content is not what it should be; then all of it is fetched again.

        Raises ``RemoteError`` where it cannot be fetched, ``ShardError`` where what comes is wrong every time,
        ``DataError`` where it cannot be written, and ``Stopped``.
        """
        url = beside(self.url, file, transport=self.kind)
        _Download(self, url, into, size, limit, check, stop or threading.Event()).run()

    def open(self, url: str, start: int) -> _Stream:
        """A stream of the file from ``start``, or from 0 where the transport or the server cannot do that."""
        if self.kind == "webdataset":
            from webdataset.gopen import gopen

            return _PipeStream(gopen(url, "rb"))
        filesystem = self._fsspec()
        if self.scheme not in ("http", "https"):
            file = filesystem.open(url, "rb")
            file.seek(start)
            return _FileStream(file, start)
        headers = {**filesystem.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        # block_size 0 streams one response, and a size, whichever, spares the request that would ask for it.
        file = filesystem.open(url, "rb", block_size=0, size=1, headers=headers)
        stream = _FileStream(file, start if file.r.status == 206 else 0)
        if stream.start and not file.r.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            stream.end()
            raise OSError(f"bytes from {start} on were asked for, {file.r.headers.get('Content-Range')!r} came")
        return stream

    def _fsspec(self) -> Any:
        """The filesystem, one per process: its connections do not outlive a fork."""
        if self._filesystem is None or self._filesystem[0] != os.getpid():
            try:
                import fsspec

                # Instances that fsspec keeps are kept per thread, and every attempt has a thread of its own.
                made = fsspec.filesystem(self.scheme, skip_instance_cache=True, **self._options())
            except (ImportError, ValueError) as error:
                raise ConfigError(
                    f"fsspec cannot read {self.scheme}:// URLs here: {error}", cure='pip install "longskip[remote]"'
                ) from error
            self._filesystem = (os.getpid(), made)
        return self._filesystem[1]

    def _options(self) -> dict[str, Any]:
        silence = self.patience.silence
        if self.scheme in ("http", "https"):
            import aiohttp

            # aiohttp ends every transfer after five minutes unless it is told otherwise.
            timeout = aiohttp.ClientTimeout(total=None, connect=silence, sock_read=silence)
            return {"client_kwargs": {"timeout": timeout, "trust_env": True}}
        if self.scheme in ("s3", "s3a"):
            return {"config_kwargs": {"connect_timeout": silence, "read_timeout": silence}}
        return {}

    def _check_webdataset(self) -> None:
        from webdataset.gopen import gopen_curl, gopen_schemes, rewrite_url

        if self.scheme not in gopen_schemes and self.scheme != "file":
            raise ConfigError(f"webdataset opens no {self.scheme}:// URLs", cure="set data.remote: fsspec")
        if rewrite_url(self.url).lower().lstrip().startswith("pipe:"):
            raise ShardError(
                f"GOPEN_REWRITE turns {shown(self.url)} into a command; pipes are never opened",
                cure="unset GOPEN_REWRITE",
            )
        if holds_secret(self.url):
            raise ConfigError(
                f"{shown(self.url)}: webdataset would put the password or signature of this URL on a command line, where "
                "everybody on the machine reads it",
                cure="set data.remote: fsspec",
            )
        if gopen_schemes.get(self.scheme) is gopen_curl and not shutil.which("curl"):
            raise ConfigError(
                f"webdataset reads {self.scheme}:// through curl, which is not there",
                cure="install curl, or set data.remote: fsspec",
            )


class _Pump(threading.Thread):
    """Opens a stream and reads it ahead a little; hands over where it starts, then its chunks, or an error."""

    def __init__(self, open_: Callable[[], _Stream]) -> None:
        super().__init__(name="longskip-download", daemon=True)
        self._open = open_
        self._stream: _Stream | None = None
        self._chunks: queue.Queue[int | bytes | Exception] = queue.Queue(maxsize=4)
        self._ended = threading.Event()

    def run(self) -> None:
        try:
            self._stream = self._open()
            item: int | bytes = self._stream.start
            while self._put(item) and item != b"":
                item = self._stream.read()
        except Exception as error:  # raised where the chunks are taken
            self._put(error)
        finally:
            if self._stream is not None:
                self._stream.end()

    def _put(self, item: int | bytes | Exception) -> bool:
        while not self._ended.is_set():
            try:
                self._chunks.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def take(self, seconds: float, stop: threading.Event) -> Any:
        until = time.monotonic() + seconds
        while not stop.is_set():
            try:
                item = self._chunks.get(timeout=max(0.0, min(0.2, until - time.monotonic())))
            except queue.Empty:
                if time.monotonic() < until:
                    continue
                raise TimeoutError(f"no byte for {seconds:.3g} s") from None
            if isinstance(item, Exception):
                raise item
            return item
        raise Stopped

    def end(self) -> None:
        self._ended.set()
        if self._stream is not None:
            self._stream.end()


class _Download:
    """One file's way through as many attempts as it takes."""

    def __init__(
        self,
        transport: Transport,
        url: str,
        into: IO[bytes],
        size: int | None,
        limit: int,
        check: Callable[[], None],
        stop: threading.Event,
    ) -> None:
        self.transport, self.url, self.into, self.size, self.limit = transport, url, into, size, limit
        self.check, self.stop = check, stop
        self.at = 0  # bytes that are written
        self.deadline = time.monotonic() + transport.patience.total

    def run(self) -> None:
        patience = self.transport.patience
        begin = time.monotonic()
        wrong = 0
        for attempt in range(1, patience.attempts + 1):
            cause: Exception
            try:
                self._attempt()
                self._write(b"")
                self.check()
                return
            except Stopped:
                raise
            except _WriteError as error:
                raise error.reason from error.__cause__
            except ShardError as error:  # all of it came, and it is wrong
                self.at = 0
                wrong += 1
                cause = error
            except Exception as error:  # transports raise what their libraries raise
                cause = error
                if getattr(error, "status", None) == 416:
                    self.at = 0
            pause = min(patience.longest_pause, patience.pause * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
            late = time.monotonic() + pause >= self.deadline
            if late or attempt == patience.attempts or wrong == patience.wrong or _for_good(cause):
                raise self._failure(cause, attempt, time.monotonic() - begin) from cause
            if self.stop.wait(pause):
                raise Stopped

    def _attempt(self) -> None:
        """Goes on from what is written. Raises whatever goes wrong."""
        if self.at == self.size:
            return
        pump = _Pump(lambda: self.transport.open(self.url, self.at))
        pump.start()
        try:
            self.at = self._next(pump)
            self._write(None)
            while self.at != self.size and (chunk := self._next(pump)):
                if self.at + len(chunk) > self.limit:
                    raise ShardError(f"more than the {self.limit} bytes that it may have")
                self._write(chunk)
        finally:
            pump.end()
        if self.size is not None and self.at != self.size:
            raise EOFError(f"the transfer ended after {self.at} of {self.size} bytes")

    def _next(self, pump: _Pump) -> Any:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"not done within {self.transport.patience.total:.3g} s")
        return pump.take(min(left, self.transport.patience.silence), self.stop)

    def _write(self, chunk: bytes | None) -> None:
        """Writes a chunk where the last one ended; None goes there first, an empty one is the end."""
        try:
            if chunk is None:
                self.into.seek(self.at)
                if self.size is None:
                    self.into.truncate()
                return
            self.into.write(chunk)
            if not chunk:
                self.into.flush()
        except OSError as error:
            raise _WriteError(
                DataError(
                    f"{getattr(self.into, 'name', 'the file')} cannot be written: {error.strerror}",
                    cure="free space, lower data.cache_gib, or set data.cache to a folder with room",
                )
            ) from error
        self.at += len(chunk)

    def _failure(self, cause: Exception, attempts: int, seconds: float) -> DataError:
        times = f"{attempts} attempt{'s' if attempts > 1 else ''} in {seconds:.1f} s"
        if isinstance(cause, ShardError):
            return ShardError(
                f"{shown(self.url)}: what comes is wrong after {times}; the last time: {cause.message}",
                cure="restore it on the server, or index what is there (longskip data index) and upload index.json",
            )
        return RemoteError(
            f"{shown(self.url)} could not be fetched: {times}; the last time: {self._told(cause)}",
            cure="see that the server answers and that the URL and its keys are right; the same command goes on",
        )

    def _told(self, cause: Exception) -> str:
        status = getattr(cause, "status", None)
        if isinstance(status, int):
            return f"HTTP {status} {getattr(cause, 'message', '')}".strip()
        return hidden(f"{type(cause).__name__}: {cause}".replace(self.url, shown(self.url))).removesuffix(": ")


class _WriteError(Exception):
    """Carries an error of the local disk past the handling of the server's, which are OSErrors as well."""

    def __init__(self, reason: DataError) -> None:
        self.reason = reason
        super().__init__(str(reason))


def _for_good(cause: Exception) -> bool:
    """Whether another attempt could not end otherwise: what is missing, forbidden or no URL stays so."""
    status = getattr(cause, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _TRY_AGAIN
    return isinstance(cause, (FileNotFoundError, PermissionError, IsADirectoryError, ValueError, ImportError))
