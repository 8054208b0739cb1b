"""A short real all-reduce between the nodes: one process a node, which can be ended whatever it hangs in.

The process (``python -m longskip.launcher.reduction``) reads its order as a line of JSON and answers in lines of JSON. Node
0's process makes a store at a port of its own and says which; the others join it there, so what a run needs between its
ranks, ports that nobody chose included, is tried here as well.

busbw = algbw · 2(n − 1)/n, what every link must carry in a ring of n (the definition of NCCL's tests), algbw being bytes over
the time of an all-reduce.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:  # the process has no need of what they import
    from longskip.launcher.board import Board
    from longskip.launcher.probes import Found, Probe

SECONDS = 14.0
"""For the whole of it: torch's start, the rendezvous, the measurement."""
LARGEST = {"gloo": 1 << 25, "nccl": 1 << 28}  # bytes reduced at the most
_ENOUGH = 0.1  # seconds of one all-reduce that is long enough to tell the bandwidth
_ROUNDS = 20  # small ones, for the latency


def interconnect(board: Board, node: int, members: Sequence[int], bind: str | None) -> Probe:
    """Runs this node's process, one of those of ``members``; ``bind`` is where node 0 serves. One node alone, whichever it is,
    tries its GPUs."""

    def probe(found: Found) -> None:
        deadline = time.monotonic() + SECONDS
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment, text=True, start_new_session=True,
        )  # fmt: skip
        ended = threading.Timer(SECONDS, process.kill)
        ended.start()
        try:
            found |= _talk(process, board, node, members, bind, deadline)
        finally:
            ended.cancel()
            process.kill()
            with suppress(subprocess.TimeoutExpired):
                process.wait(2.0)
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()

    return probe


def _talk(
    process: subprocess.Popen[str], board: Board, node: int, members: Sequence[int], bind: str | None, deadline: float
) -> Found:
    from longskip.launcher.probes import uses_gpus
    from longskip.launcher.reach import own_address

    nodes = len(members)
    order: dict[str, Any] = {"rank": list(members).index(node), "world": nodes, "cuda": uses_gpus()}
    try:
        if order["rank"]:
            order |= board.take("reduction", deadline - time.monotonic())
        else:
            order["address"] = own_address(board, node, nodes, bind)
        _say(process.stdin, order)
        if nodes > 1 and order["rank"] == 0:
            board.put("reduction", {"address": order["address"], "port": _hear(process, deadline)["port"]})
        return _hear(process, deadline)
    except (OSError, TimeoutError) as error:
        raise RuntimeError(f"no all-reduce between the nodes: {error}") from None


def _say(stream: IO[str] | None, value: Any) -> None:
    assert stream is not None
    stream.write(json.dumps(value) + "\n")
    stream.flush()


def _hear(process: subprocess.Popen[str], deadline: float) -> dict[str, Any]:
    """The next line of the process; what torch prints between them is passed over."""
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)  # type: ignore[no-any-return]
    if time.monotonic() >= deadline - 0.1:
        raise TimeoutError(f"it did not end within {SECONDS:g} s")
    said = process.stderr.read().strip().splitlines()
    raise OSError(said[-1][:300] if said else f"the process ended with {process.wait()}")


# --- the process ------------------------------------------------------------------------------------------------------


def main() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nobody is left to read the answer
    import torch

    order = json.loads(sys.stdin.readline())
    rank, world = order["rank"], order["world"]
    cuda = torch.cuda.device_count() if order["cuda"] and torch.cuda.is_available() else 0
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    backend = "nccl" if cuda else "gloo"
    told: Found = {"backend": backend, "cuda": cuda}
    if world > 1:
        _join(order, backend)
        told |= measured(rank, world, device, LARGEST[backend])
        torch.distributed.destroy_process_group()
    elif cuda:
        told["right"] = bool((torch.ones(1 << 20, device=device) * 2).sum().item() == 1 << 21)
    _say(sys.stdout, told)


def _join(order: dict[str, Any], backend: str) -> None:
    import datetime

    import torch

    from longskip.launcher.reach import interface_towards

    rank, world, address = order["rank"], order["world"], order["address"]
    wait = datetime.timedelta(seconds=SECONDS)
    listening = None
    if rank == 0:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listening = socket.create_server((address, 0), family=family)
        order["port"] = listening.getsockname()[1]
    name = interface_towards(address, order["port"])
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
    fd = None if listening is None else listening.detach()
    if rank == 0:
        _say(sys.stdout, {"port": order["port"]})
    store = torch.distributed.TCPStore(
        address, order["port"], world, is_master=rank == 0, timeout=wait, master_listen_fd=fd, wait_for_workers=False
    )
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)


def measured(rank: int, world: int, device: Any, largest: int) -> Found:
    """``latency`` (seconds of a small all-reduce), ``busbw`` of a large one, ``inward`` (bytes/s that this rank gets from the
    one before it), ``right`` (whether the sum is what it must be). Every rank of the process group calls it."""
    import torch
    from torch import distributed

    def timed(act: Any) -> float:
        distributed.barrier()
        began = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    small = torch.zeros(2, device=device)
    distributed.all_reduce(small)  # connects
    latency = sorted(timed(lambda: distributed.all_reduce(small)) for _ in range(_ROUNDS))[_ROUNDS // 2]
    size, right = 1 << 18, True
    while True:
        large = torch.full((size // 4,), float(rank + 1), device=device)
        seconds = timed(lambda tensor=large: distributed.all_reduce(tensor))  # type: ignore[misc]
        right = right and bool((large == world * (world + 1) / 2).all().item())
        slowest = torch.tensor([seconds], device=device)
        distributed.all_reduce(slowest, distributed.ReduceOp.MAX)  # so that all go on, or none
        if float(slowest) >= _ENOUGH or size >= largest:
            break
        size *= 4
    busbw = size / float(slowest) * 2 * (world - 1) / world
    sent, got = torch.ones(size // 16, device=device), torch.empty(size // 16, device=device)

    def pass_on() -> None:
        ways = [
            distributed.P2POp(distributed.isend, sent, (rank + 1) % world),
            distributed.P2POp(distributed.irecv, got, (rank - 1) % world),
        ]
        for work in distributed.batch_isend_irecv(ways):
            work.wait()

    timed(pass_on)  # connects
    inward = got.numel() * 4 / timed(pass_on)
    return {"latency": latency, "busbw": busbw, "inward": inward, "right": right, "bytes": size}


if __name__ == "__main__":
    main()
