"""Processes that assemble ahead, and hand micro-batches over in memory that they share with the reader.

A slot of that memory holds one micro-batch and is used again when nobody holds its tensors any more, so a batch is
neither copied nor are its pages asked of the system anew, which would cost more than reading stored features.
"""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.util
import os
import signal
import traceback
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import DTypeLike

from longskip.engine.data.assembler import Assembler, MicroBatch
from longskip.engine.data.buffers import Buffers
from longskip.engine.signals import ASKING
from longskip.errors import DataError, LongskipError

Coordinates = tuple[np.ndarray, np.ndarray, tuple[int, int] | None]
"""Epochs, samples, and the bucket (H, W) in pixels that they are of."""

SHARED_MEMORY = "/dev/shm"  # where Python's multiprocessing keeps shared arrays
_ALIGN = 64
_PIPE = 1 << 16  # bytes that a pipe holds without being read, at the least
_SMALL = 4096  # bytes per sample for the tensors that are not large


def _room_for(n_bytes: int) -> None:
    """Raise DataError where shared memory does not hold ``n_bytes``: it is taken when it is written, by a fatal signal.

    Python asks for every piece by itself whether there is room, and does not know of the others.
    """
    try:
        state = os.statvfs(SHARED_MEMORY)
    except OSError:
        return  # none here: Python takes files in the folder for temporary ones
    free = state.f_bavail * state.f_frsize
    if n_bytes > free:
        raise DataError(
            f"the data workers hand batches over in {n_bytes / 2**20:.0f} MiB of shared memory; {SHARED_MEMORY} has "
            f"{free / 2**20:.0f} MiB free",
            cure="more of it (docker run --shm-size=1g, an emptyDir of medium Memory in Kubernetes), fewer data.workers or "
            "a smaller train.micro_batch, or data.workers: 0, which needs none",
        )


def slots_of(assembler: Assembler, *, count: int, ahead: int, held: int, micro: int) -> tuple[int, int, int]:
    """(slots, bytes of each, batches under way in a worker) of the ``Workers`` with these settings."""
    size = (assembler.batch_bytes(micro) + micro * _SMALL) // _ALIGN * _ALIGN + 64 * _ALIGN
    # Neither side may wait to be read while the other does: tasks under way must fit into the pipe, or be one.
    ahead = min(ahead, max(1, _PIPE // (16 * micro + 1024)))
    return count * ahead + held + 1, size, ahead


class Workers:
    """``count`` processes; batch k of the endless ``walk`` is worker k mod count's, ``ahead`` are under way in each.

    ``held`` is how many batches the consumer keeps at a time; when it keeps more, they are sent through a pipe, which is
    slower. ``micro`` is the number of samples in a batch.
    """

    def __init__(
        self,
        assembler: Assembler,
        walk: Iterator[Coordinates],
        *,
        count: int,
        ahead: int,
        held: int,
        micro: int,
        start_method: Literal["spawn", "forkserver"],
    ) -> None:
        context: Any = multiprocessing.get_context(start_method)
        if start_method == "forkserver":
            context.set_forkserver_preload([__name__])  # torch is imported once, not by every worker
        slots, size, ahead = slots_of(assembler, count=count, ahead=ahead, held=held, micro=micro)
        _room_for(slots * size)
        shared = [context.RawArray("B", size) for _ in range(slots)]
        self._slots = [np.frombuffer(memory, np.uint8) for memory in shared]
        self._free = deque(range(len(shared)))
        self._walk = walk
        self._taken = 0
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        for number in range(count):
            ours, theirs = context.Pipe()
            arguments = (theirs, assembler, shared)
            process = context.Process(target=_work, args=arguments, name=f"longskip-worker-{number}", daemon=True)
            process.start()
            theirs.close()  # so that its end is seen here
            self._connections.append(ours)
            self._processes.append(process)
        # Also when nobody closed it: at the program's end they would be asked by a signal, which they ignore.
        ends = (self._connections, self._processes)
        self._end = multiprocessing.util.Finalize(self, _end, args=ends, exitpriority=10)
        for _ in range(ahead):
            for connection in self._connections:
                self._begin(connection)

    def _begin(self, connection: Connection) -> None:
        slot = self._free.pop() if self._free else None
        try:
            connection.send((*next(self._walk), slot))
        except OSError as error:
            raise self._died(error) from error

    def take(self) -> MicroBatch:
        """The next micro-batch. Raises ``DataError`` for a worker that died or failed, else what the assembler raises."""
        connection = self._connections[self._taken % len(self._connections)]
        self._taken += 1
        try:
            found = connection.recv()
        except (EOFError, OSError) as error:
            raise self._died(error) from error
        if isinstance(found, LongskipError):
            raise found
        if isinstance(found, str):
            raise DataError(f"a data worker failed\n{found}")
        self._begin(connection)  # first, so that the worker does not wait while the batch is unpacked
        slot, packed = found
        return self._unpacked(packed, slot)

    def _unpacked(self, packed: dict[str, Any], slot: int | None) -> MicroBatch:
        memory: dict[str, torch.Tensor] = {}
        if slot is not None:
            owner = self._slots[slot].view()  # what the tensors hold, and whose end is noticed
            weakref.finalize(owner, self._free.append, slot).atexit = False
            memory["uint8"] = torch.from_numpy(owner)

        def tensor(value: Any) -> Any:
            if isinstance(value, _Place):
                whole = memory.get(value.dtype)
                if whole is None:
                    whole = memory[value.dtype] = memory["uint8"].view(getattr(torch, value.dtype))
                return whole.as_strided(value.shape, value.strides, value.offset)
            return torch.from_numpy(value) if isinstance(value, np.ndarray) else value

        values = {name: tensor(value) for name, value in packed.items()}
        values["conditions"] = {name: tensor(value) for name, value in packed["conditions"].items()}
        return MicroBatch(**values)

    def _died(self, error: BaseException) -> DataError:
        return DataError(
            f"a data worker died: {type(error).__name__} {error}",
            cure="look for the out-of-memory killer, lower the number of workers, or read with workers: 0",
        )

    def close(self) -> None:
        """Ends the processes; batches that were handed out stay as they are."""
        self._end()


def _end(connections: Sequence[Connection], processes: Sequence[Any]) -> None:
    for connection in connections:
        connection.close()
    for process in processes:
        process.join(timeout=2)
        if process.exitcode is None:
            process.kill()
            process.join()


class _Place(NamedTuple):
    """A tensor in a slot; ``offset`` counts its own numbers."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


class _Slots(Buffers):
    """Hands out memory of one slot after the other; of the process's own where there is no slot, or none left of it."""

    def __init__(self, memories: Sequence[Any]) -> None:
        super().__init__()
        self._memories = [np.frombuffer(memory, np.uint8) for memory in memories]
        self._slot: int | None = None
        self._used = 0
        self._places: dict[int, _Place] = {}

    def begin(self, slot: int | None) -> None:
        """From now on the memory of this slot."""
        self._slot, self._used, self._places = slot, 0, {}

    def tensor(self, shape: Sequence[int], dtype: DTypeLike) -> tuple[torch.Tensor, np.ndarray]:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if self._slot is None or not 0 < size <= len(self._memories[self._slot]) - self._used:
            return super().tensor(shape, dtype)
        array = self._memories[self._slot][self._used : self._used + size].view(dtype).reshape(shape)
        tensor = torch.from_numpy(array)
        name = str(tensor.dtype).removeprefix("torch.")
        offset = self._used // tensor.itemsize
        self._places[tensor.data_ptr()] = _Place(offset, tuple(shape), tensor.stride(), name)
        self._used += -(-size // _ALIGN) * _ALIGN
        return tensor, array

    def packed(self, batch: MicroBatch) -> dict[str, Any]:
        """The batch's fields with places in the slot for tensors, or arrays where they lie elsewhere.

        Torch would send a tensor as a shared file of its own.
        """

        def place(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            found = self._places.get(value.data_ptr())
            if found is None and self._slot is not None and value.numel():
                copy, _ = self.tensor(tuple(value.shape), value.numpy().dtype)
                copy.copy_(value)
                found = self._places.get(copy.data_ptr())
            return found or value.numpy()

        packed = {item.name: place(getattr(batch, item.name)) for item in fields(batch)}
        packed["conditions"] = {name: place(value) for name, value in batch.conditions.items()}
        return packed


def _work(connection: Connection, assembler: Assembler, memories: Sequence[Any]) -> None:
    """In a worker: assemble what is asked for until the reader closes the connection or dies."""
    # A rank that is told to stop still needs its next batches to reach the step's border; it ends its workers itself.
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    slots = _Slots(memories)
    assembler = replace(assembler, buffers=slots)
    try:
        while True:
            *coordinates, slot = connection.recv()
            slots.begin(slot)
            answer: Any
            try:
                answer = (slot, slots.packed(assembler.assemble(*coordinates)))
            except LongskipError as error:
                answer = error
            except Exception:
                answer = traceback.format_exc()
            connection.send(answer)
    except (EOFError, OSError):
        # At once: a process that unloads torch while one of its threads still runs aborts now and then.
        os._exit(0)
