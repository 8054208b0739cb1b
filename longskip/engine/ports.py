"""TCP ports and the addresses and interfaces behind them (no torch)."""

from __future__ import annotations

import socket
import time


def free_port() -> int:
    """A port of loopback that nobody listens at just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def await_listener(host: str, port: int, seconds: float) -> str:
    """Returns this machine's address towards ``host`` once somebody listens there; raises OSError after ``seconds``.

    torch's client would wait as well, but tells of its waiting in C++ frames on standard error.
    """
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        try:
            with socket.create_connection((host, port), timeout=max(0.1, min(left, 10.0))) as connection:
                return str(connection.getsockname()[0])
        except OSError:
            if left <= 0:
                raise
            time.sleep(min(0.2, left))


def interface_of(address: str) -> str | None:
    """The name of this machine's network interface that has ``address``; None where none has."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return name
    return None


def is_loopback(address: str) -> bool:
    """Whether a numeric address is reached from this machine only."""
    return address == "::1" or address.startswith("127.")
