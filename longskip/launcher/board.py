"""What nodes tell each other through the supervisors' store: short texts under keys (no torch)."""

from __future__ import annotations

import json
import time
from typing import Any, Protocol

_POLL = 0.05
_SET = 5.0  # seconds for a key that is there


class Store(Protocol):
    """What a preflight needs of the store that all nodes share. Threads may share it."""

    def set(self, key: str, value: str) -> None: ...

    def has(self, key: str) -> bool:
        """Whether somebody has set ``key``; does not wait."""
        ...

    def get(self, key: str, timeout: float) -> str:
        """The value of ``key``; TimeoutError where nobody has set it within ``timeout`` seconds."""
        ...


class Board:
    """JSON under the keys of a store, below a prefix.

    A store's client may hold a lock of its own while it waits for a key, so nothing is waited for inside it: a thread that
    expects word from another node never keeps the one that has something to say.
    """

    def __init__(self, store: Store, prefix: str) -> None:
        self._store, self._prefix = store, prefix

    def put(self, key: str, value: Any) -> None:
        self._store.set(f"{self._prefix}/{key}", json.dumps(value))

    def take(self, key: str, seconds: float) -> Any:
        """The value of ``key``, which stays; TimeoutError where it is not there within ``seconds``."""
        name, until = f"{self._prefix}/{key}", time.monotonic() + seconds
        while not self._store.has(name):
            if time.monotonic() >= until:
                raise TimeoutError(f"nobody has said {key} within {max(seconds, 0.0):.3g} s")
            time.sleep(_POLL)
        return json.loads(self._store.get(name, _SET))
