"""What threads of ranks tell the first one: over torch's own stores, from ranks that run at the same time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from longskip.engine.post import Post
from longskip.errors import CheckpointError, PeerLostError
from tests.engine.bare_ranks import bare_ranks


def _all_tell(_: Path) -> None:
    """Two names at once, in another order on each rank; and each name a second time after it was heard."""
    rank = torch.distributed.get_rank()
    post = Post(rank, 3)
    for turn in range(2):
        for name in ("a", "b") if rank == 1 else ("b", "a"):
            if rank:
                post.tell(name, {"of": rank, "name": name, "turn": turn, "odd": '\u00e4\n"' * 100})
            else:
                told = post.hear(name, "own", time.sleep)
                assert told[0] == "own" and len(told) == 3
                assert [(t["of"], t["name"], t["turn"]) for t in told[1:]] == [(1, name, turn), (2, name, turn)]
        torch.distributed.barrier()


def test_the_first_rank_hears_all_in_their_order(tmp_path: Path) -> None:
    assert bare_ranks(3, tmp_path / "store", _all_tell, tmp_path) == [0, 0, 0]


def test_alone_there_is_nobody_to_be_heard() -> None:
    assert Post(0, 1).hear("a", {"own": 1}, time.sleep) == [{"own": 1}]


# A store has threads: it lives and dies in a child, so that no later fork of the tests' process inherits half of it.


def _given_up(_: Path) -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.distributed.distributed_c10d._get_default_store = lambda: store
    looks = []

    def pause(seconds: float) -> None:
        looks.append(seconds)
        store.set("other", "user")  # would wait for ever on a connection that is waited on
        if len(looks) == 5:
            raise CheckpointError("given up")

    with pytest.raises(CheckpointError, match="given up"):
        Post(0, 2).hear("a", None, pause)
    assert len(looks) == 5 and store.get("other") == b"user"


def test_waiting_can_be_given_up_and_holds_no_other_user_of_the_store(tmp_path: Path) -> None:
    assert bare_ranks(1, tmp_path / "store", _given_up, tmp_path) == [0]


def _serve(listening: socket.socket) -> None:
    kept = torch.distributed.TCPStore(
        "127.0.0.1",
        listening.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listening.fileno(),
    )
    threading.Event().wait(60)
    del kept


def _store_gone(rank: int) -> None:
    """The store's server is killed, as with the first rank's node."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = multiprocessing.get_context("fork").Process(target=_serve, args=(listening,))
    server.start()
    port, soon = listening.getsockname()[1], timedelta(seconds=20)
    listening.close()
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=soon)
    torch.distributed.distributed_c10d._get_default_store = lambda: store
    post = Post(rank, 2)
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    server.join(10)
    with pytest.raises(PeerLostError, match=r"goes on from the last commit"):
        if rank == 0:
            post.hear("a", None, time.sleep)
        else:
            post.tell("a", {"files": {}})


@pytest.mark.parametrize("rank", [0, 1])
def test_a_store_that_is_gone_is_a_lost_peer(tmp_path: Path, rank: int) -> None:
    assert bare_ranks(1, tmp_path / "store", _store_gone, rank) == [0]
