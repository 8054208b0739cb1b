"""The machines of a launch: ``Cluster``, and hostfiles in DeepSpeed's format, read strictly (no torch).

A line is ``NAME slots=N``, with ``#`` before a comment. What is not a plain host name or IPv4 address is refused: pdsh and
ssh take a name that begins with ``-o`` for an option, pdsh reads ``[…]``, ``^``, ``/`` and ``:`` in it, and all of them run
what an option says.
"""

from __future__ import annotations

import ipaddress
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longskip.errors import ConfigError

MOST_BYTES = 2**20
MOST_HOSTS = 4096
MOST_SLOTS = 1024

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_LINE = re.compile(r"(\S+)[ \t]+slots=([0-9]{1,9})")


@dataclass(frozen=True)
class Cluster:
    """``nodes`` machines with ``ranks_per_node`` ranks each; ``hosts`` are their names where they are known."""

    nodes: int
    ranks_per_node: int
    hosts: tuple[str, ...] = ()

    @property
    def world(self) -> int:
        return self.nodes * self.ranks_per_node


def cluster(nodes: int, ranks_per_node: int, hosts: Sequence[str] = ()) -> Cluster:
    """A checked Cluster; raises ConfigError for counts out of bounds, bad or repeated names."""
    if not 1 <= nodes <= MOST_HOSTS:
        raise ConfigError(f"{nodes} nodes: 1 to {MOST_HOSTS} are possible", cure="--nodes N, or a hostfile")
    if not 1 <= ranks_per_node <= MOST_SLOTS:
        raise ConfigError(
            f"{ranks_per_node} ranks a node: 1 to {MOST_SLOTS} are possible", cure="one rank a GPU: --gpus-per-node 8"
        )
    seen: set[str] = set()
    for name in hosts:
        check_host(name)
        if name.casefold() in seen:
            raise ConfigError(f"host {name} is named twice", cure="one line a host, with all its slots")
        seen.add(name.casefold())
    if hosts and len(hosts) != nodes:
        raise ConfigError(f"{len(hosts)} hosts are named for {nodes} nodes")
    return Cluster(nodes, ranks_per_node, tuple(hosts))


def check_host(name: str) -> str:
    """``name`` where it is a host name or an IPv4 address; raises ConfigError otherwise."""
    shown = repr(name if len(name) <= 80 else name[:80] + "…")
    if len(name) > 253 or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{shown} is no host name: letters, digits, '.', '_' and '-' (not first) are possible",
            cure="an IPv6 address needs a name in /etc/hosts"
            if ":" in name
            else "write the name as `hostname` says it",
        )
    if re.fullmatch(r"[0-9.]+", name):
        try:
            ipaddress.IPv4Address(name)
        except ValueError:
            raise ConfigError(f"{shown} is no IPv4 address", cure="four numbers below 256, as 10.0.0.7") from None
    return name


def read_hostfile(path: str | Path) -> Cluster:
    """The machines of a hostfile; raises ConfigError naming file and line where it is not one."""
    path = Path(path)
    try:
        what = path.stat()
        if not stat.S_ISREG(what.st_mode):
            raise ConfigError(f"hostfile {path} is not a file", cure="a text file with lines `NAME slots=N`")
        if what.st_size > MOST_BYTES:
            raise ConfigError(f"hostfile {path} has {what.st_size:,} bytes, more than {MOST_BYTES:,}")
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"hostfile {path} cannot be read: {error}", cure="lines `NAME slots=N`, one a node") from None
    try:
        text = data.decode("ascii")
    except UnicodeDecodeError as error:
        raise ConfigError(f"hostfile {path}: byte {error.start} is not ASCII", cure="host names are ASCII") from None
    return parse_hostfile(text, str(path))


def parse_hostfile(text: str, where: str = "hostfile") -> Cluster:
    """The machines that ``text`` names; ``where`` stands in the errors. Raises ConfigError.

    All must have the same number of slots: every node starts as many ranks.
    """
    found: dict[str, int] = {}
    for number, raw in enumerate(text.split("\n"), start=1):
        line = raw.partition("#")[0].strip(" \t\r")
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ConfigError(f"{where}, line {number}: {line[:80]!r} is not of the form `NAME slots=N`")
        try:
            name, slots = check_host(match[1]), int(match[2])
        except ConfigError as error:
            raise ConfigError(f"{where}, line {number}: {error.message}", cure=error.cure) from None
        if not 1 <= slots <= MOST_SLOTS:
            raise ConfigError(f"{where}, line {number}: slots={slots}; 1 to {MOST_SLOTS} are possible")
        found[name] = slots if name not in found else _twice(where, number, name)
    if not found:
        raise ConfigError(f"{where} names no host", cure="lines `NAME slots=N`, one a node")
    if len(set(found.values())) > 1:
        few, many = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
        raise ConfigError(
            f"{where}: {few} has {found[few]} slots and {many} {found[many]}; every node starts as many ranks",
            cure=f"write slots={found[few]} for all of them",
        )
    try:
        return cluster(len(found), next(iter(found.values())), tuple(found))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}", cure=error.cure) from None


def _twice(where: str, number: int, name: str) -> int:
    raise ConfigError(f"{where}, line {number}: {name} is named twice", cure="one line a host, with all its slots")


def hostfile(hosts: Sequence[str], slots: int) -> str:
    """The text of a hostfile: a line a host."""
    return "".join(f"{host} slots={slots}\n" for host in hosts)
