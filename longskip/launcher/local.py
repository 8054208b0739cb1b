"""N ranks on this machine through the deepspeed launcher, with signals passed to every rank and no orphan left."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from longskip.engine.ports import free_port
from longskip.engine.signals import ASKING
from longskip.errors import EXIT_DONE, EXIT_FAILED, EXIT_SAVED, EXIT_USAGE, ConfigError

MODULE = "longskip.launcher"
STARTUP_SECONDS = 3.0


def command(ranks: int, arguments: Sequence[str], port: int) -> list[str]:
    """The command that starts ``longskip ARGUMENTS`` on ``ranks`` local ranks: a pure function.

    It is DeepSpeed's per-node launcher, which ``deepspeed --num_gpus N`` starts too; called directly, because the outer
    one exits 0 when the inner one is killed.
    """
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(ranks))}).encode()).decode()
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.launch",
        f"--world_info={world}",
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
        "--no_local_rank",
        "--log_level=critical",
        "--module",
        MODULE,
        *arguments,
    ]


def rank_environment(ranks: int) -> dict[str, str]:
    """The ranks' environment: an even share of the cores each, sleeping rather than spinning OpenMP threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not Path("/dev/nvidiactl").exists():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    for inherited in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(inherited, None)
    return environment


def launch(ranks: int, arguments: Sequence[str], *, dry_run: bool = False) -> int:
    """Run ``longskip ARGUMENTS`` on ``ranks`` ranks; returns 0 done, 2 configuration, 75 saved on a signal, 1 failed."""
    if ranks < 1:
        raise ConfigError(f"--local {ranks}: at least one rank is needed")
    if not arguments or arguments[0] != "train":
        raise ConfigError("launch starts ranks of train only", cure="longskip launch --local 2 -- train CONFIG")
    line = command(ranks, arguments, free_port())
    if dry_run:
        print(" ".join(line))
        return EXIT_DONE
    # A session of its own: Ctrl-C reaches this process only, which then asks every rank to save.
    process = subprocess.Popen(line, env=rank_environment(ranks), start_new_session=True, preexec_fn=_die_with_parent)
    asked: list[int] = []
    told: set[int] = set()
    handlers = {s: signal.signal(s, lambda number, frame: asked.append(number)) for s in ASKING}
    started: list[psutil.Process] = []
    try:
        while process.poll() is None:
            started = _descendants(process.pid) or started
            if asked:
                # The launcher would kill the ranks at once; they are asked themselves, save, and it sees them end.
                _ask(_ranks(process.pid), told)
            time.sleep(0.1)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _reap(started)
    known = (EXIT_DONE, EXIT_USAGE, EXIT_SAVED)
    return process.returncode if process.returncode in known else EXIT_FAILED


def _die_with_parent() -> None:
    """In the child: be asked to end (SIGTERM) when the process that launched it dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _ask(ranks: list[psutil.Process], told: set[int]) -> None:
    """SIGTERM to each rank once, and not before its interpreter can have installed its handler."""
    for rank in ranks:
        with contextlib.suppress(psutil.Error):
            if rank.pid not in told and time.time() - rank.create_time() > STARTUP_SECONDS:
                rank.send_signal(signal.SIGTERM)
                told.add(rank.pid)


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def _ranks(pid: int) -> list[psutil.Process]:
    """The rank processes: the launcher's own children (workers of a rank are asked by their rank)."""
    try:
        return psutil.Process(pid).children()
    except psutil.Error:
        return []


def _reap(started: list[psutil.Process]) -> None:
    """Whatever the launcher left running is killed: a rank without its launcher would hold the run's lock for ever."""
    _, alive = psutil.wait_procs([child for child in started if child.is_running()], timeout=3)
    for child in alive:
        child.kill()
    psutil.wait_procs(alive, timeout=3)
