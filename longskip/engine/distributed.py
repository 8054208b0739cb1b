"""Joining the world that the environment names (RANK, WORLD_SIZE: deepspeed, torchrun, srun), or being one rank."""

from __future__ import annotations

import datetime
import json
import logging
import os
import resource
import socket
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from longskip.engine.ports import await_listener, free_port
from longskip.errors import ConfigError, DataError, LongskipError, PeerLostError, RendezvousError


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


STORE, ATTEMPT = "LONGSKIP_STORE", "LONGSKIP_ATTEMPT"
NAMES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def world_from_environment() -> tuple[int, int, int]:
    """(rank, size, local rank) from RANK, WORLD_SIZE, LOCAL_RANK, or from what srun sets.

    Raises ConfigError when the variables contradict each other.
    """
    given = {name: os.environ.get(name, os.environ.get(slurm)) for name, slurm in NAMES.items()}
    try:
        rank, size, local = (int(given[name] or default) for name, default in zip(NAMES, ("0", "1", "0"), strict=True))
    except ValueError:
        raise ConfigError(f"{', '.join(NAMES)} must be whole numbers, got {given}") from None
    if not 0 <= rank < size:
        raise ConfigError(f"RANK {rank} is not below WORLD_SIZE {size}", cure="start ranks with longskip launch")
    return rank, size, local


def join(timeout_minutes: float = 30) -> World:
    """Start the process group (NCCL on CUDA, gloo on CPU) through DeepSpeed and return this process's place.

    Raises ConfigError for variables that name no place, RendezvousError where the ranks do not find each other in time.
    """
    rank, size, local = world_from_environment()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if given := os.environ.get(STORE):
        host, _, os.environ["MASTER_PORT"] = given.rpartition(":")
        os.environ["MASTER_ADDR"] = host.removeprefix("[").removesuffix("]")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        if size > 1:
            raise ConfigError("WORLD_SIZE > 1 without MASTER_PORT", cure="start ranks with longskip launch")
        os.environ["MASTER_PORT"] = str(free_port())
    deepspeed = import_deepspeed()
    if not torch.distributed.is_initialized():
        try:
            if rank or given:
                await_listener(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), 60 * timeout_minutes)
            _start_process_group(rank, size, datetime.timedelta(minutes=timeout_minutes))
        except (torch.distributed.DistError, OSError) as error:
            raise _not_met(rank, size, timeout_minutes, error) from None
    deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
        device = torch.device("cuda", local)
    return World(rank=rank, size=size, local_rank=local, device=device)


def _start_process_group(rank: int, size: int, timeout: datetime.timedelta) -> None:
    """The process group on a store of our own, which listens on loopback only when all ranks are on this machine.

    Under a supervisor it is the supervisor's store, every attempt under a prefix of its own, so that nothing of an earlier
    one is met. torch's own rendezvous listens on every interface, whatever MASTER_ADDR says; under torchrun, whose agent
    has a store there already, and over several nodes it is used all the same.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if STORE in os.environ:
        client = torch.distributed.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
        store = torch.distributed.PrefixStore(f"attempt_{os.environ.get(ATTEMPT, '0')}", client)
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        return
    if address not in ("127.0.0.1", "localhost") or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        torch.distributed.init_process_group(backend, timeout=timeout)
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    listening = socket.create_server(("127.0.0.1", port)) if rank == 0 else None
    own = torch.distributed.TCPStore(
        "127.0.0.1",
        port,
        size,
        is_master=rank == 0,
        timeout=timeout,
        master_listen_fd=listening.detach() if listening is not None else None,
    )
    torch.distributed.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=timeout)


def _not_met(rank: int, size: int, minutes: float, error: Exception) -> RendezvousError:
    """What torch says of ranks that did not meet, without the C++ frames that it adds."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    said = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    if rank == 0 and isinstance(error, OSError) and STORE not in os.environ:
        return RendezvousError(f"rank 0 cannot listen at {where} ({said})", cure="give all ranks another MASTER_PORT")
    who = "rank 0 did not answer" if rank else "not all of the others came"
    return RendezvousError(
        f"rank {rank} of {size} waited up to {minutes:.3g} minutes at {where}: {who} ({said})",
        cure=("start rank 0, and give all ranks" if rank else "start all ranks, and give them")
        + " the same MASTER_ADDR and MASTER_PORT; launch.timeout_minutes is how long they wait",
    )


_GONE = ("closed by peer", "reset by peer", "Broken pipe", "Connection refused", "NCCL", "Timed out waiting")


def lost_neighbour(error: RuntimeError, doing: str) -> PeerLostError | None:
    """The error to show where a collective failed because another rank is gone; None for any other failure.

    gloo tells it in the text of a RuntimeError alone, in a hundred lines with the frames around it.
    """
    said = (str(error).strip().splitlines() or [""])[0]
    if not (isinstance(error, torch.distributed.DistError) or any(sign in said for sign in _GONE)):
        return None
    said = said.partition(". This is typically")[0].rpartition("] ")[2][:200]
    return PeerLostError(
        f"a neighbour of this rank was lost {doing} ({said})",
        cure="look at how the rank that died first ended; the same command goes on from the last commit",
    )


def import_deepspeed():  # type: ignore[no-untyped-def]
    """DeepSpeed, quiet, and without the shared-memory op that it would compile for minutes on a CPU."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed)\..*")
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.(_all_gather_base|_reduce_scatter_base).*")
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:
        handler.setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    # Muon, which longskip does not use, is compiled where DeepSpeed starts: torch's compiler, a second of every rank's start.
    if (compiler := sys.modules.get("deepspeed.runtime.compiler")) is not None:
        compiler.compile = lambda: lambda function: function  # type: ignore[attr-defined]
    return deepspeed


def leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def peak_memory(device: torch.device) -> float:
    """The most bytes that this process has held so far: reserved on a GPU, resident in host memory without one."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_reserved(device))
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def barrier() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def all_reduce_sum(values: list[float], device: torch.device) -> list[float]:
    """Element-wise sum over ranks in float64 (as lists: a handful of control figures a step)."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(tensor)
        return [float(v) for v in tensor.tolist()]
    return values


def agree(failure: LongskipError | None, doing: str, device: torch.device) -> None:
    """Return on every rank where none has a ``failure``; otherwise raise on all of them, after one small all-reduce.

    The error is the DataError ``rank R cannot DOING: …`` of the first rank that failed, the same on every rank; a rank
    alone raises its own. So no rank waits in a collective for one that has given up.
    """
    if not all_reduce_sum([float(failure is not None)], device)[0]:
        return
    own = None if failure is None else {"kind": type(failure).__name__, "what": failure.message, "cure": failure.cure}
    everyone: list[Any] = gather_objects(own)
    if failure is not None and len(everyone) == 1:
        raise failure
    failed = [rank for rank, told in enumerate(everyone) if told is not None]
    first = everyone[failed[0]]
    more = f" (nor can rank {', '.join(map(str, failed[1:]))})" if failed[1:] else ""
    error = DataError(f"rank {failed[0]} cannot {doing}{more}: {first['kind']}: {first['what']}", cure=first["cure"])
    error.alike = True
    raise error from failure


def broadcast_object(value: object) -> object:
    """Rank 0's value on every rank, as JSON text (never a pickle)."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return value
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    length = torch.tensor([data.numel()], dtype=torch.int64, device=device)
    torch.distributed.broadcast(length, 0)
    if torch.distributed.get_rank() != 0:
        data = torch.empty(int(length), dtype=torch.uint8, device=device)
    torch.distributed.broadcast(data, 0)
    return json.loads(bytes(data.tolist()).decode())


def gather_objects(value: object) -> list[object]:
    """Every rank's value on every rank, in rank order, as JSON text (never a pickle)."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [value]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    size = torch.distributed.get_world_size()
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(size)]
    torch.distributed.all_gather(lengths, torch.tensor([data.numel()], dtype=torch.int64, device=device))
    longest = max(int(n) for n in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: data.numel()] = data
    parts = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in range(size)]
    torch.distributed.all_gather(parts, padded)
    return [json.loads(bytes(part[: int(n)].tolist()).decode()) for part, n in zip(parts, lengths, strict=True)]


def device_name_of(device: torch.device) -> str:
    """The name of this rank's device, as the ledger and the hardware table write it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
