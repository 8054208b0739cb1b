"""The store: where it listens, what it is told, links that fall silent, and ranks that meet at it again and again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from longskip.engine import distributed
from longskip.errors import ConfigError, LongskipError, PeerLostError, RendezvousError
from longskip.launcher import store
from tests.figures import figure
from tests.ranks import PUT_DOWN, run_ranks

SERVER = """
import sys, time
from longskip.launcher import store
listening, endpoint = store.listen("127.0.0.1", 0, None)
server = store.open_server(listening, endpoint, ["plan", "node/1"])
print(endpoint.port, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A store in a process of its own, so that this one may be forked."""
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


def reduce_and_die(path: Path) -> int:
    """A rank that joins, takes part in two sums, and, were it rank 1, is killed between them."""
    world = distributed.join(1.0)
    (total,) = distributed.all_reduce_sum([world.rank + 1.0], world.device)
    with open(path, "a") as file:
        file.write(f"{os.environ['LONGSKIP_ATTEMPT']} {total}\n")
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        distributed.all_reduce_sum([1.0], world.device)
    except RuntimeError as error:
        lost = distributed.lost_neighbour(error, "in a sum")
        return 7 if isinstance(lost, PeerLostError) and "frame" not in str(lost) else 8
    return 9


@pytest.mark.slow
def test_eight_of_eight_restarts_come_up_on_one_store(port: int, tmp_path: Path) -> None:
    begin = time.monotonic()
    for attempt in range(1, 9):
        names = {"LONGSKIP_STORE": f"127.0.0.1:{port}", "LONGSKIP_ATTEMPT": str(attempt), "MASTER_PORT": "1"}
        codes = run_ranks(2, reduce_and_die, tmp_path / "said", environment=names)
        assert codes[1] == -signal.SIGKILL and codes[0] in (7, PUT_DOWN), codes
    said = sorted((tmp_path / "said").read_text().splitlines())
    assert said == sorted(f"{attempt} 3.0" for attempt in range(1, 9) for _ in range(2))
    figure(f"8 of 8 restarts of 2 ranks came up on the same store, {(time.monotonic() - begin) / 8:.1f} s each")


def exchange(port: int, key: str, others: list[str], **how: Any) -> store.Exchange:
    return store.Exchange(lambda: store.open_client("127.0.0.1", port)[0], key, others, **how)


def until(condition: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_sides_hear_each_others_newest_word(port: int) -> None:
    one, two = exchange(port, "plan", ["node/1"]), exchange(port, "node/1", ["plan"])
    try:
        one.say({"n": 1})
        two.say({"m": [1, 2]})
        until(lambda: one.hear() == {"node/1": {"m": [1, 2]}} and two.hear() == {"plan": {"n": 1}})
        one.say({"n": 2})
        assert one.flush(20)
        until(lambda: two.hear() == {"plan": {"n": 2}})
        assert one.age() < 20 and one.connected
    finally:
        one.close()
        two.close()


class Silent:
    """A server that takes connections and, once ``silent``, passes nothing on: what a link that is cut looks like."""

    def __init__(self, port: int) -> None:
        self.silent = False
        self.taken: set[socket.socket] = set()
        self.deaf: set[socket.socket] = set()
        self.target = port
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            taken, _ = self.listening.accept()
            other = socket.create_connection(("127.0.0.1", self.target))
            self.taken |= {taken, other}
            for a, b in ((taken, other), (other, taken)):
                threading.Thread(target=self._pass_on, args=(a, b), daemon=True).start()

    def _pass_on(self, a: socket.socket, b: socket.socket) -> None:
        while data := a.recv(65536):
            if not self.silent and a not in self.deaf:
                b.sendall(data)


def test_a_link_that_falls_silent_holds_nobody_up_and_is_found_again(port: int) -> None:
    way = Silent(port)
    one, two = exchange(way.port, "plan", ["node/1"], renew_after=2.0), exchange(port, "node/1", ["plan"])
    try:
        one.say({"n": 1})
        two.say({"m": 1})
        until(lambda: one.hear() and two.hear())
        way.silent = True
        until(lambda: one.age() > 1.5)
        begin = time.monotonic()
        one.say({"n": 2})
        one.hear()
        assert time.monotonic() - begin < 1  # neither waits for the network
        assert not one.flush(0.2)
        way.deaf.update(way.taken)  # what was sent is lost for good; only a new connection gets through
        way.silent = False
        until(lambda: (one.hear(), two.hear())[1] == {"plan": {"n": 2}}, 60)
        assert one.age() < 10
    finally:
        one.close()
        two.close()


def test_words_that_nobody_can_read_are_as_good_as_silence(port: int) -> None:
    client, local = store.open_client("127.0.0.1", port)
    assert local == "127.0.0.1"
    client.set("node/1", b"\xff{not json")
    client.set("plan", "[1, 2]")
    one = exchange(port, "other", ["node/1", "plan"])
    try:
        until(lambda: one.connected)
        assert one.hear() == {}
    finally:
        one.close()


def test_the_wall_waits_a_bounded_time(port: int) -> None:
    wall = store.Wall(store.open_client("127.0.0.1", port)[0])
    wall.set("a/b", "ü 1")
    assert wall.get("a/b", 5) == "ü 1"
    with pytest.raises(torch.distributed.DistError):
        wall.get("nobody sets this", 0.3)


@pytest.mark.parametrize("text", ["", "host", ":1", "host:", "host:x", "host:70000", "-oProxyCommand=x:22", "host:-1"])
def test_places_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        store.parse_endpoint(text)


def test_places() -> None:
    assert store.parse_endpoint("10.0.0.1:29400") == ("10.0.0.1", 29400)
    assert store.parse_endpoint("[::1]:5") == ("::1", 5)
    assert str(store.Endpoint("::1", 5, "")) == "[::1]:5" and str(store.Endpoint("a", 5, "")) == "a:5"


def test_where_a_store_may_listen() -> None:
    listening, endpoint = store.listen("127.0.0.1", 0, None)
    try:
        assert endpoint.local == "127.0.0.1" and endpoint.port == listening.getsockname()[1]
        with pytest.raises(RendezvousError, match="another port"):
            store.listen("127.0.0.1", endpoint.port, None)
    finally:
        listening.close()
    for host, bind, kind in [("203.0.113.9", None, ConfigError), ("127.0.0.1", "0.0.0.0", ConfigError)]:
        with pytest.raises(kind, match="--bind"):
            store.listen(host, 0, bind)
    with pytest.raises(LongskipError):
        store.listen("no-such-host.invalid", 0, None)
