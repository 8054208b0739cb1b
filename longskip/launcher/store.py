"""The store that supervisors and ranks meet at: torch's TCPStore on node 0, listening at one chosen address only.

Whoever talks to it does so from a thread of its own, whose silence is watched: a link that is cut leaves that thread
waiting, never the supervisor.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from longskip.engine.ports import await_listener
from longskip.errors import ConfigError, RendezvousError

CONNECT_SECONDS = 10.0
TURN_SECONDS = 0.2


@dataclass(frozen=True)
class Endpoint:
    """Where the store is: ``host:port`` as given, and the address that this machine has towards it."""

    host: str
    port: int
    local: str

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_endpoint(text: str) -> tuple[str, int]:
    """``host:port`` (``[::1]:29400``) → its parts; raises ConfigError."""
    host, separator, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or host.startswith("-") or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"store {text!r} is not of the form host:port", cure="for instance 10.0.0.1:29400")
    return host, int(port)


def listen(host: str, port: int, bind: str | None) -> tuple[socket.socket, Endpoint]:
    """A socket that listens at ``bind`` (else at ``host``) and nowhere else, before torch is there to serve it.

    Whoever connects meanwhile waits. Raises ConfigError where the address is not this machine's, RendezvousError where
    the port is taken.
    """
    address = bind or host
    if address in ("0.0.0.0", "::"):
        raise ConfigError(f"--bind {address} is every interface", cure="name the address that the other nodes reach")
    try:
        family, _, _, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(target[:2], family=family, backlog=1024)  # type: ignore[arg-type]
    except OSError as error:
        cure = "give the store another port" if port else "give --bind an address of this machine"
        kind = RendezvousError if error.errno == 98 else ConfigError
        raise kind(f"node 0 cannot listen at {address}:{port}: {error.strerror or error}", cure=cure) from None
    local, chosen = listening.getsockname()[:2]
    return listening, Endpoint(host, chosen, local)


def open_server(listening: socket.socket, endpoint: Endpoint, empty: Sequence[str]) -> Any:
    """The TCPStore behind ``listening``, with ``empty`` keys set, so that nobody waits for one; imports torch."""
    store = _tcp_store()(
        endpoint.local, endpoint.port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach(),
        timeout=timedelta(seconds=CONNECT_SECONDS),
    )  # fmt: skip
    for key in empty:
        store.set(key, "{}")
    return store


def open_client(host: str, port: int) -> tuple[Any, str]:
    """A client of the store and this machine's address towards it; raises OSError or a DistError. Imports torch."""
    tcp_store = _tcp_store()
    local = await_listener(host, port, CONNECT_SECONDS)
    timeout = timedelta(seconds=CONNECT_SECONDS)
    return tcp_store(host, port, is_master=False, wait_for_workers=False, timeout=timeout), local


def _tcp_store() -> Any:
    """torch's class; its C++ warnings of links that are silent, which we tell ourselves, are off in this process alone."""
    quiet = "TORCH_CPP_LOG_LEVEL"  # read once, when torch is loaded; the ranks have their own
    ours = quiet not in os.environ and "torch" not in sys.modules
    if ours:
        os.environ[quiet] = "ERROR"
    from torch.distributed import TCPStore

    if ours:
        os.environ.pop(quiet, None)
    return TCPStore


class Exchange:
    """Says this node's newest word under ``key`` and hears those under ``others``, every ``TURN_SECONDS``, in a thread.

    ``connect`` opens the store, and again after a failure. A client whose server has gone silent waits for ever (after its
    own time-out it waits for the server to take notice of that): a thread that has had no answer for ``renew_after`` seconds
    is left to itself, and another begins with a new connection. ``age()`` is the time since the last answer.
    """

    def __init__(
        self, connect: Callable[[], Any], key: str, others: Sequence[str], *, renew_after: float = CONNECT_SECONDS
    ) -> None:
        self._connect, self._key, self._others, self._renew_after = connect, key, list(others), renew_after
        self._word = "{}"
        self._said = ""
        self._heard: dict[str, Any] = {}
        self._answered = self._begun = time.monotonic()
        self._turn = threading.Condition()
        self._thread = 0
        self.connected = False
        self.failure = ""
        self._begin()

    def _begin(self) -> None:
        self._thread += 1
        self._begun = time.monotonic()
        threading.Thread(target=self._talk, args=(self._thread,), name="longskip-exchange", daemon=True).start()

    def _talk(self, me: int) -> None:
        store = None
        while me == self._thread:
            try:
                store = store or self._connect()
                word = self._word
                store.set(self._key, word)
                found = store.multi_get(self._others) if self._others else []
                heard = {key: _parsed(value) for key, value in zip(self._others, found, strict=True)}
            except (OSError, RuntimeError) as error:  # a DistError is a RuntimeError
                store, self.failure = None, (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                time.sleep(TURN_SECONDS)
                continue
            with self._turn:
                if me != self._thread:
                    return
                self._heard, self._said, self._answered, self.connected = heard, word, time.monotonic(), True
                self._turn.notify_all()
            time.sleep(max(TURN_SECONDS, len(self._others) / 200))

    def say(self, word: dict[str, Any]) -> None:
        """From the next turn on this is what the others hear of us."""
        self._word = json.dumps(word)

    def hear(self) -> dict[str, Any]:
        """The newest words of the others, by key; without those that have said nothing, or nothing readable."""
        if time.monotonic() - max(self._answered, self._begun) > self._renew_after:
            self._begin()
        return {key: word for key, word in self._heard.items() if word}

    def age(self) -> float:
        """Seconds since the last answer, or since the beginning."""
        return time.monotonic() - self._answered

    def forgive(self, seconds: float) -> None:
        """Count so many seconds of silence less."""
        self._answered += seconds

    def flush(self, seconds: float) -> bool:
        """Wait until the newest word has been said; False where it took longer than ``seconds``."""
        with self._turn:
            return self._turn.wait_for(lambda: self._said == self._word, timeout=seconds)

    def close(self) -> None:
        """Begin no further turn."""
        self._thread += 1


def _parsed(value: bytes) -> Any:
    try:
        word = json.loads(value)
    except ValueError:
        return None
    return word if isinstance(word, dict) else None


class Wall:
    """Short texts under keys that all nodes may set and wait for, on a client of the store of its own."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def set(self, key: str, value: str) -> None:
        self._client.set(f"wall/{key}", value)

    def has(self, key: str) -> bool:
        """Whether somebody has set ``key``; does not wait."""
        return bool(self._client.check([f"wall/{key}"]))

    def get(self, key: str, timeout: float) -> str:
        """The value of ``key``; torch's DistError where nobody has set it within ``timeout`` seconds."""
        self._client.wait([f"wall/{key}"], timedelta(seconds=timeout))
        return str(self._client.get(f"wall/{key}").decode())
