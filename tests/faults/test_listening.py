"""Who listens beyond this machine says so."""

from __future__ import annotations

import signal
import socket
from functools import partial
from pathlib import Path

import psutil
import pytest

from longskip.engine.ports import free_port
from tests.launcher.supervised import fake, free_place


def addresses() -> list[str]:
    """This machine's own IPv4 addresses beyond loopback."""
    every = [address for found in psutil.net_if_addrs().values() for address in found]
    return [a.address for a in every if a.family == socket.AF_INET and not a.address.startswith("127.")]


def listening(process: psutil.Process) -> list[str]:
    return [c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]


@pytest.mark.slow
@pytest.mark.skipif(not addresses(), reason="this machine has no address beyond loopback")
def test_a_store_beyond_loopback_is_told_of_and_one_on_loopback_is_not(in_tmp: Path) -> None:
    far, near = f"{addresses()[0]}:{free_port()}", free_place()
    for place, told in ((far, True), (near, False)):
        run = in_tmp / "runs" / ("far" if told else "near")
        with fake(run, 2, 0, 1, place) as one:
            process = psutil.Process(one.process.pid)
            one.until(partial(listening, process))
            one.send(signal.SIGTERM)
            assert one.wait() == 75
            assert (f"listens at {far}" in one.text() and "without a password" in one.text()) is told
