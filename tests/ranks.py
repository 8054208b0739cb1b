"""Real ranks for tests: forked processes that join one process group, as a launcher's ranks would.

A fork costs 4 s where a launcher costs 10 (imports are inherited). When one rank dies, the others are killed, as every
launcher does.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longskip.engine.config import Config
from longskip.engine.configio import merge, validate
from longskip.engine.ports import free_port


def run_ranks(
    world: int, act: Callable[..., Any], *arguments: Any, environment: dict[str, str] | None = None
) -> list[int]:
    """Run ``act(*arguments)`` on ``world`` forked ranks; returns their exit codes (negative: killed by that signal).

    An integer returned by ``act`` is the rank's exit code.
    """
    context = multiprocessing.get_context("fork")
    port = free_port()
    processes = []
    for rank in range(world):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **(environment or {}),
        }
        process = context.Process(target=_child, args=(variables, act, arguments))
        process.start()
        processes.append(process)
    deadline = time.monotonic() + 240
    while any(p.is_alive() for p in processes):
        failed = [p for p in processes if p.exitcode not in (None, 0, 75)]
        if failed or time.monotonic() > deadline:
            time.sleep(0.3)
            for process in processes:
                if process.is_alive():
                    process.kill()
        time.sleep(0.02)
    for process in processes:
        process.join()
    return [int(p.exitcode if p.exitcode is not None else -1) for p in processes]


def _child(variables: dict[str, str], act: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(variables)
    try:
        code = act(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(code if isinstance(code, int) else 0)


def small_config(data: Path, **groups: Any) -> Config:
    """A tiny text-to-image run on the shapes data; ``groups`` are laid over it group by group."""
    tree: dict[str, Any] = {
        "model": {"preset": "uvit-tiny", "resolution": 32},
        "data": {"path": str(data / "train"), "validation": str(data / "validation")},
        "diffusion": {"prediction": "x"},
        "optim": {"lr": 1e-3, "warmup_steps": 5},
        "train": {"steps": 20, "batch_size": 8, "seed": 3},
        "checkpoint": {"every": 10},
        "logging": {"every": 1, "samples_every": 0, "tensorboard": False},
        "eval": {"every": 0, "samples": 16, "time_bins": 4},
        "deepspeed": {"zero_stage": 3},
    }
    return validate(merge(tree, groups))


def train_ranks(world: int, config: Config, run: Path, fault: str = "") -> list[int]:
    """``longskip train`` on forked ranks."""
    from longskip.engine.trainer import train

    return run_ranks(world, train, config, run, environment={"LONGSKIP_FAULT": fault})
