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

import torch

from longskip.engine.config import Config
from longskip.engine.configio import merge, validate
from longskip.engine.ports import free_port
from longskip.errors import LongskipError

PUT_DOWN = -1000


def run_ranks(
    world: int, act: Callable[..., Any], *arguments: Any, environment: dict[str, str] | None = None
) -> list[int]:
    """Run ``act(*arguments)`` on ``world`` forked ranks; returns their exit codes (negative: killed by that signal).

    An integer returned by ``act`` is the rank's exit code. A rank that this function killed because another one had
    failed has the code ``PUT_DOWN``. Raises TimeoutError when ranks hang.
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
    ended: dict[int, int] = {}  # the codes of ranks that ended by themselves
    while len(ended) < world:
        ended |= {rank: int(p.exitcode) for rank, p in enumerate(processes) if p.exitcode is not None}
        hung = time.monotonic() > deadline
        if hung or any(code not in (0, 75) for code in ended.values()):
            time.sleep(1.0)  # ranks that fail together are given the time to say so themselves
            ended |= {rank: int(p.exitcode) for rank, p in enumerate(processes) if p.exitcode is not None}
            for process in processes:
                process.kill()
                process.join()
            if hung:
                raise TimeoutError(f"ranks {sorted(set(range(world)) - set(ended))} of {world} hung")
            return [ended.get(rank, PUT_DOWN) for rank in range(world)]
        time.sleep(0.02)
    return [ended[rank] for rank in range(world)]


def _child(variables: dict[str, str], act: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(variables)
    # torch renews its thread pool in a forked process at the first use; two threads that do so at once break it.
    torch.set_num_threads(1)
    try:
        code = act(*arguments)
    except LongskipError as error:
        print(f"rank {variables['RANK']}: {type(error).__name__}: {error}", flush=True)
        os._exit(error.exit_code)
    except BaseException:
        traceback.print_exc()
        os._exit(99)
    os._exit(code if isinstance(code, int) else 0)


def small_config(data: Path, /, **groups: Any) -> Config:
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
