"""Two network namespaces joined by a pair of virtual interfaces: two nodes on one machine, whose link can be cut."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager


class Nodes:
    """``addresses`` of node 0 and node 1; ``enter(i)`` is what stands before a command that runs on node i."""

    def __init__(self, mark: str, third: int) -> None:
        self.names = [f"{mark}a", f"{mark}b"]
        self.addresses = [f"10.77.{third}.1", f"10.77.{third}.2"]

    def enter(self, node: int) -> list[str]:
        return ["ip", "netns", "exec", self.names[node]]

    def link(self, up: bool) -> None:
        """Join or part the two: a packet sent while they are parted is lost, and nobody is told."""
        _ip("-n", self.names[1], "link", "set", "eth1", "up" if up else "down")


def usable() -> bool:
    """Whether this process may make namespaces."""
    if os.geteuid() or not shutil.which("ip"):
        return False
    name = f"lsk{os.getpid()}t"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return False
    _ip("netns", "del", name)
    return True


@contextmanager
def two_nodes() -> Iterator[Nodes]:
    mark = f"lsk{os.getpid()}"
    nodes = Nodes(mark, os.getpid() % 250)
    for name in nodes.names:
        _ip("netns", "add", name)
    try:
        first, second = nodes.names
        _ip("-n", first, "link", "add", "eth1", "type", "veth", "peer", "name", "eth1", "netns", second)
        for name, address in zip(nodes.names, nodes.addresses, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth1")
            for interface in ("lo", "eth1"):
                _ip("-n", name, "link", "set", interface, "up")
        yield nodes
    finally:
        for name in nodes.names:
            _ip("netns", "del", name)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)
