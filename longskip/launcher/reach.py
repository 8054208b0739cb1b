"""Whether the nodes reach one another, how far their clocks are apart, and what listens (no torch)."""

from __future__ import annotations

import ipaddress
import secrets
import socket
import struct
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:  # the all-reduce's process, which uses this file too, has no need of what they import
    from longskip.launcher.board import Board
    from longskip.launcher.probes import Found, Probe

WILDCARDS = ("0.0.0.0", "::", "*", "")
_ASKED = 5  # times for the clock; the quickest answer tells the most
_WAIT = 6.0  # seconds for what another node is to say
_CONNECT = 3.0
_AT_ONCE = 16
_ALL_TO_ALL = 32  # nodes up to which everyone tries everyone
_ANSWER = struct.Struct("!16sd")


class Listener:
    """A port of this node that answers every byte with this node's token and time; closed at the end of a preflight."""

    def __init__(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.create_server((address, 0), family=family, backlog=128)
        self.address, self.port = address, int(self._socket.getsockname()[1])
        self.token = secrets.token_bytes(16)
        self._thread = threading.Thread(target=self._serve, name="preflight-listener", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            connection.settimeout(_WAIT)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while connection.recv(1):
                connection.sendall(_ANSWER.pack(self.token, time.time()))

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._socket.close()
        self._thread.join(1.0)


def ask(address: str, port: int) -> tuple[bytes, float, float]:
    """(token, offset, uncertainty) of the listener there: how many seconds this clock is ahead of that one, give or take.

    An answer's time lies between question and answer, so the offset is known to half of the quickest round trip.
    """
    best = (b"", 0.0, float("inf"))
    with socket.create_connection((address, port), timeout=_CONNECT) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(_ASKED):
            asked, began = time.time(), time.monotonic()
            connection.sendall(b"?")
            answer = b""
            while len(answer) < _ANSWER.size:
                piece = connection.recv(_ANSWER.size - len(answer))
                if not piece:
                    raise ConnectionError("it hung up")
                answer += piece
            half = (time.monotonic() - began) / 2
            token, theirs = _ANSWER.unpack(answer)
            if half < best[2]:
                best = (token, asked + half - theirs, half)
    return best


def reach(board: Board, node: int, members: Sequence[int], bind: str | None) -> Probe:
    """This node's address and interface, every other node's port from here, the clock against node 0's, and what listens.

    ``members`` are the nodes that take part, node 0 among them.
    """

    def probe(found: Found) -> None:
        try:
            own = own_address(board, node, len(members), bind)
            listener = Listener(own)
        except OSError as error:
            found["error"] = f"{bind or socket.gethostname()}: {error}"
            board.put(f"hello/{node}", {"error": str(error)})
            return
        found["address"] = own
        found |= interface_of(own)
        try:
            board.put(f"hello/{node}", {"address": own, "port": listener.port, "token": listener.token.hex()})
            found["listening"] = listening(but=listener.port)
            _meet(board, node, members, found)
            # Nobody's port closes before those who may try it have.
            board.put(f"met/{node}", True)
            until = time.monotonic() + _CONNECT
            for other in _peers(node, members):
                with suppress(TimeoutError):
                    board.take(f"met/{other}", until - time.monotonic())
        finally:
            listener.close()

    return probe


def _peers(node: int, members: Sequence[int]) -> list[int]:
    """Whom a node tries: everyone, of many nodes node 0 and those at distances of powers of two, either way."""
    if len(members) <= _ALL_TO_ALL:
        return [other for other in members if other != node]
    at, n = list(members).index(node), len(members)
    steps = [1 << k for k in range(n.bit_length())]
    return sorted({0, *(members[(at + way * step) % n] for step in steps for way in (-1, 1))} - {node})


def _meet(board: Board, node: int, members: Sequence[int], found: Found) -> None:
    def meet(other: int) -> tuple[str, tuple[float, float] | None]:
        try:
            hello = board.take(f"hello/{other}", _WAIT)
        except TimeoutError:
            return "it did not say where it listens", None
        if "error" in hello:
            return "it cannot listen: " + hello["error"], None
        where = f"{hello['address']}:{hello['port']}"
        try:
            token, offset, uncertainty = ask(hello["address"], hello["port"])
        except OSError as error:
            return f"{where}: {error}", None
        if token.hex() != hello["token"]:
            return f"{where} is answered by somebody else: two nodes go by one address", None
        return "", (offset, uncertainty)

    peers = _peers(node, members)
    found["unreached"], found["reached"] = {}, 0
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for other, (why, clock) in zip(peers, pool.map(meet, peers), strict=True):
            if why:
                found["unreached"][str(other)] = why
            else:
                found["reached"] += 1
            if other == 0 and clock is not None:
                found["offset"], found["uncertainty"] = clock


def own_address(board: Board, node: int, nodes: int, bind: str | None) -> str:
    """Where this node is reached by the others: what was asked for if it is this node's, else the way to node 0.

    Raises OSError for a name without an address.
    """
    if nodes == 1:
        return "127.0.0.1"
    if bind is not None and bind not in WILDCARDS:
        address = str(socket.getaddrinfo(bind, None, type=socket.SOCK_STREAM)[0][4][0])
        if node == 0 or interface_of(address)["interface"]:
            return address
    if node == 0:
        return str(socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)[0][4][0])
    try:
        first = board.take("hello/0", _WAIT)
    except TimeoutError as error:
        raise OSError(f"node 0 did not say where it listens: {error}") from None
    if "error" in first:
        raise OSError("node 0 cannot listen, so the way to it is not known")
    return address_towards(first["address"], first["port"])


def address_towards(address: str, port: int) -> str:
    """This node's address on the way to that one."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as way:
        way.connect((address, port))  # no packet is sent
        return str(way.getsockname()[0])


def interface_towards(address: str, port: int) -> str | None:
    """The interface that ranks here must use to reach ``address``; None where it cannot be told.

    The way to an address of this very node goes over loopback, but others come to the interface that has it.
    """
    with suppress(OSError, KeyError):
        return interface_of(address_towards(address, port))["interface"]  # type: ignore[no-any-return]
    return None


def interface_of(address: str) -> dict[str, Any]:
    """``interface`` with this address, None where no interface of this node has it, and its ``mtu``."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return {"interface": name, "mtu": psutil.net_if_stats()[name].mtu}
    if ipaddress.ip_address(address).is_loopback:
        return {"interface": "lo", "mtu": psutil.net_if_stats()["lo"].mtu if "lo" in psutil.net_if_stats() else 0}
    return {"interface": None, "mtu": 0}


def listening(*, but: int) -> list[str]:
    """Where this process listens for others than this machine, the port ``but`` left out."""
    process: Any = psutil.Process()
    look = getattr(process, "net_connections", None) or process.connections  # its name before psutil 6
    try:
        heard = [each.laddr for each in look("tcp") if each.status == psutil.CONN_LISTEN and each.laddr.port != but]
    except psutil.Error:
        return []
    far = [at for at in heard if not ipaddress.ip_address(at.ip).is_loopback]
    return sorted(f"[{at.ip}]:{at.port}" if ":" in at.ip else f"{at.ip}:{at.port}" for at in far)
