"""Real nodes for tests of the preflight: a forked process each, on one real TCPStore; and facts of nodes that are not there."""

from __future__ import annotations

import copy
import ctypes
import datetime
import json
import multiprocessing
import os
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from longskip.engine.config import Config
from longskip.engine.ports import free_port
from longskip.errors import LongskipError
from longskip.launcher import preflight
from longskip.launcher.facts import Facts

CLONE_NEWNS, CLONE_NEWNET = 0x20000, 0x40000000


class MemoryStore:
    """The store of one node, or of several that are threads."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def has(self, key: str) -> bool:
        return key in self.values

    def get(self, key: str, timeout: float) -> str:
        if key not in self.values:
            raise TimeoutError(key)
        return self.values[key]


class TorchStore:
    """torch's TCPStore as the preflight speaks to it."""

    def __init__(self, address: str, port: int, node: int, nodes: int) -> None:
        self._store = torch.distributed.TCPStore(
            address, port, nodes, is_master=node == 0, timeout=datetime.timedelta(seconds=30), wait_for_workers=True
        )

    def set(self, key: str, value: str) -> None:
        self._store.set(key, value)

    def has(self, key: str) -> bool:
        return bool(self._store.check([key]))

    def get(self, key: str, timeout: float) -> str:
        self._store.wait([key], datetime.timedelta(seconds=timeout))
        return self._store.get(key).decode()


def run_nodes(
    nodes: int,
    config: Config | Mapping[int, Config],
    run: Path,
    out: Path,
    *,
    before: Mapping[int, Callable[[], None]] | None = None,
    seconds: float = 60.0,
    **options: Any,
) -> list[dict[str, Any]]:
    """A preflight on ``nodes`` forked nodes; each one's outcome as JSON, or ``{"error"}``. ``before``: what a node does first.

    ``config`` may be another one on some nodes. Raises TimeoutError where a node hangs.
    """
    context = multiprocessing.get_context("fork")
    port = free_port()
    processes = []
    for node in range(nodes):
        own = config if isinstance(config, Config) else config[node]
        arguments = (node, nodes, port, own, run, out / f"{node}.json", (before or {}).get(node), options)
        process = context.Process(target=_node, args=arguments)
        process.start()
        processes.append(process)
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.1, until - time.monotonic()))
    hung = [node for node, process in enumerate(processes) if process.exitcode is None]
    for process in processes:
        process.kill()
        process.join()
    if hung:
        raise TimeoutError(f"nodes {hung} hang")
    return [json.loads((out / f"{node}.json").read_text("utf-8")) for node in range(nodes)]


def _node(
    node: int,
    nodes: int,
    port: int,
    config: Config,
    run: Path,
    out: Path,
    before: Callable[[], None] | None,
    options: dict[str, Any],
) -> None:
    try:
        torch.set_num_threads(1)
        if before is not None:
            before()
        given: dict[str, Any] = {"ranks": 1, "bind": "127.0.0.1"} | options
        store = TorchStore(given["bind"], port, node, nodes)
        outcome = preflight.check(store, node=node, members=range(nodes), config=config, run=run, **given)
        told = outcome.to_json()
        try:
            outcome.refuse()
        except LongskipError as error:
            told |= {"raised": type(error).__name__, "exit_code": error.exit_code, "message": str(error)}
    except BaseException as error:
        traceback.print_exc()
        told = {"error": f"{type(error).__name__}: {error}"}
    out.write_text(json.dumps(told), "utf-8")
    os._exit(0)


def own_mounts() -> None:
    """From here on what this process mounts is its own (root only)."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


@contextmanager
def two_networks(rate: str, mtu: tuple[int, int] = (1500, 1500)) -> Iterator[dict[int, Callable[[], None]]]:
    """Two network namespaces joined by a veth that passes ``rate`` (``400mbit``) each way; 10.77.0.1 and 10.77.0.2 (root only).

    Yields what a node does to enter its own.
    """
    names = [f"longskip-{os.getpid()}-{node}" for node in (0, 1)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    def enter(name: str) -> Callable[[], None]:
        def act() -> None:
            with open(f"/run/netns/{name}", "rb") as file:
                if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")

        return act

    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth1", "netns", names[1])
        for node, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{node + 1}/24", "dev", f"veth{node}")
            ip("-n", name, "link", "set", f"veth{node}", "mtu", str(mtu[node]), "up")
            limit = ["root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
            subprocess.run(["tc", "-n", name, "qdisc", "add", "dev", f"veth{node}", *limit], check=True)
        yield {node: enter(name) for node, name in enumerate(names)}
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def status_of(told: Mapping[str, Any], what: str) -> set[str]:
    """The statuses of a check's findings."""
    return {each["status"] for each in told["findings"] if each["what"] == what}


# --- facts of nodes that are not there -----------------------------------------------------------------------------------

_GIB = 1 << 30

HEALTHY: dict[str, dict[str, Any]] = {
    "software": {
        "python": "3.11.7",
        "packages": {
            "longskip": "0.1.0", "torch": "2.13.0+cpu", "deepspeed": "0.19.8", "triton": "3.7.1", "numpy": "2.4.6",
            "safetensors": "0.8.0", "webdataset": "1.0.2", "rich": "15.0.0",
        },
        "code": "ab" * 32,
        "config": {"train.seed": "111111111111", "data.path": "222222222222", "optim.lr": "333333333333"},
        "deepspeed": None,
    },
    "devices": {
        "kind": "cuda", "cores": 64, "threads": "8", "open_files": 65536, "open_files_most": 65536,
        "available": 900 * _GIB, "total": 1000 * _GIB, "shared": 64 * _GIB, "health": None,
        "gpus": [
            {"name": "NVIDIA H100 80GB HBM3", "free": 79 * _GIB, "total": 80 * _GIB, "uncorrected": 0, "slowed": []}
            for _ in range(8)
        ],
    },
    "data": {
        "sets": [
            {
                "name": "data.path", "path": "/data/train", "kind": "shards", "shards": 4000, "samples": 40_000_000,
                "fingerprint": "cd" * 32, "checked": 900,
            },
            {
                "name": "data.validation", "path": "/data/validation", "kind": "shards", "shards": 1, "samples": 5000,
                "fingerprint": "ef" * 32, "checked": 1,
            },
        ],
        "files": {},
    },
    "run": {
        "path": "/work/runs/a", "seen": True, "writable": True, "locked": True, "free": 4000 * _GIB, "steps": 0,
        "owner": None,
    },
    "reach": {
        "address": "10.0.0.1", "interface": "eth0", "mtu": 9000, "unreached": {}, "reached": 2, "offset": 0.001,
        "uncertainty": 0.0001, "listening": [],
    },
    "interconnect": {
        "backend": "nccl", "cuda": 8, "latency": 3e-5, "busbw": 40e9, "inward": 45e9, "right": True, "bytes": 1 << 28,
    },
}  # fmt: skip


def facts_of(node: int, altered: Mapping[str, Any] | None = None) -> Facts:
    """A healthy node's facts with some of them altered: path → value (``devices/gpus/3/free``; ``failed/data``)."""
    found = copy.deepcopy(HEALTHY)
    found["reach"]["address"] = f"10.0.0.{node + 1}"
    tree: dict[str, Any] = {"found": found, "failed": {}}
    for path, value in (altered or {}).items():
        *way, last = path.split("/")
        place: Any = tree["failed"] if way == ["failed"] else found
        for step in way if way != ["failed"] else []:
            place = place[int(step)] if isinstance(place, list) else place[step]
        place[last] = value
    return Facts(node, f"host-{node}", found, tree["failed"], {"data": 0.5})
