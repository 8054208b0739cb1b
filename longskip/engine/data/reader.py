"""The reader: a rank's micro-batches, one global step at a time, assembled ahead in threads or processes.

Which samples come when is the plan's, and what they look like the assembler's; ranks, workers and the step of a resume
change neither.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

import numpy as np

from longskip.engine.data.assembler import Assembler, MicroBatch
from longskip.engine.data.decode import MAX_PIXELS
from longskip.engine.data.plan import Cursor, Plan
from longskip.engine.data.sources import Source
from longskip.engine.data.tokens import Vocabulary
from longskip.engine.data.workers import Coordinates, Workers, slots_of
from longskip.errors import ConfigError, DataError, LongskipError

THREADS = 2
"""Threads that decode pictures where there are no worker processes. Stored latents are read by one: two would hand the
GIL to and fro between system calls of 10 µs, and read less."""


LOOKED_UP = 2048
"""Positions that are looked up in the plan at a time; a few cost as much as many."""
PREFETCH = 2
"""Micro-batches that are assembled ahead, times the accumulation or the workers, whichever are more."""
GROUPED, GROUPED_BYTES = 256, 40 << 20
"""Samples with stored latents that are read at a time, as several micro-batches, and the bytes that they may have: what
is done once for a micro-batch costs as much as reading half of its samples."""


class Reader:
    """An endless iterator over global steps; each item is the list of this rank's ``accumulation`` micro-batches.

    ``cursor`` is where to begin, and at any time where the step after the last one handed out begins: what a checkpoint
    saves. ``workers`` = 0 assembles in threads of this process, otherwise in that many processes (``start_method``:
    ``spawn``, or ``forkserver``, which starts faster but ends when a whole process group is told to terminate);
    the order never depends on them. ``data_wait_seconds`` adds up the time that the consumer waited.

    Raises ``ConfigError`` for contradicting settings, ``DataError`` where plan and source do not fit, a worker died or
    failed, and what the source raises when it stops at damage: a ``LongskipError`` whatever went wrong while samples
    were read, so that ranks can tell each other. Use as a context manager, or call ``close``.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        vocabulary: Vocabulary | None,
        *,
        resolution: tuple[int, int],
        n_txt: int,
        micro: int,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        seed: int = 0,
        caption_dropout: float = 0.0,
        flip: bool = False,
        crop: Literal["centre", "random"] = "centre",
        workers: int = 0,
        cursor: Cursor | None = None,
        too_long: Literal["error", "truncate"] = "error",
        latent_shape: tuple[int, int, int] | None = None,
        max_pixels: int = MAX_PIXELS,
        quarantine: np.ndarray | None = None,
        prefetch: int = PREFETCH,
        start_method: Literal["spawn", "forkserver"] = "spawn",
    ) -> None:
        if len(source) != plan.n_samples:
            raise DataError(f"the plan is for {plan.n_samples} samples, the source holds {len(source)}")
        if workers < 0 or prefetch < 1:
            raise ConfigError(f"workers {workers} must be 0 or more, prefetch {prefetch} 1 or more")
        cursor = cursor or plan.cursor()
        if cursor.n_samples not in (0, plan.n_samples):
            raise DataError(
                f"the cursor is of data with {cursor.n_samples} samples, the source holds {plan.n_samples}",
                cure="resume with the data of the run, or start a new run",
            )
        self.plan = plan
        self.rank, self.world, self.micro, self.accumulation = rank, world, micro, accumulation
        self.workers = workers
        self.prefetch = prefetch
        self.start_method = start_method
        self.cursor = replace(cursor, n_samples=plan.n_samples)
        self.data_wait_seconds = 0.0
        self.assembler = Assembler(
            source=source,
            vocabulary=vocabulary,
            resolution=(resolution[0], resolution[1]),
            n_txt=n_txt,
            seed=seed,
            caption_dropout=caption_dropout,
            flip=flip,
            crop=crop,
            too_long=too_long,
            latent_shape=latent_shape,
            max_pixels=max_pixels,
            buckets=plan.buckets,
            quarantine=quarantine,
        )
        plan.slots(self.cursor, rank, world, micro, accumulation)  # refuses sizes that do not fit, before any work
        self._stream: _Threaded | Workers | None = None
        self._parts: deque[MicroBatch] = deque()  # read already, of the group that is handed out

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        started = time.perf_counter()
        try:
            stream = self._opened()
            batches = []
            for _ in range(self.accumulation):
                if not self._parts:
                    self._parts.extend(stream.take().split(self.micro))
                batches.append(self._parts.popleft())
        except BaseException:
            self.close()
            raise
        finally:
            self.data_wait_seconds += time.perf_counter() - started
        self.cursor = self.cursor.advance(self.plan.batch)
        return batches

    def _opened(self) -> _Threaded | Workers:
        if self._stream is not None:
            return self._stream
        walk = _Walk(self.plan, self.cursor, self.rank, self.world, self.micro, self.accumulation)
        several = several_of(self.assembler, self.micro)
        if not self.workers:
            ahead = self.prefetch * self.accumulation  # micro-batches
            self._stream = _Threaded(self.assembler, _grouped(iter(walk), several), -(-ahead // several))
            return self._stream
        sizes = _sizes_of(self.assembler, self.micro, self.accumulation, self.workers, self.prefetch)
        try:
            self._stream = Workers(
                self.assembler, _grouped(iter(walk), several), start_method=self.start_method, **sizes
            )
        except OSError as error:
            raise DataError(
                f"the {self.workers} data worker(s) cannot be started: {error}",
                cure="fewer workers or a smaller train.micro_batch (memory that is shared, processes), or workers: 0",
            ) from error
        return self._stream

    def seek(self, cursor: Cursor) -> None:
        """Goes on at ``cursor``; what was prepared ahead is thrown away."""
        self.close()
        self.cursor = replace(cursor, n_samples=self.plan.n_samples)

    def close(self) -> None:
        """Ends the thread or the workers; iterating again starts them anew at ``cursor``."""
        self._parts.clear()
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def several_of(assembler: Assembler, micro: int) -> int:
    """Micro-batches of ``micro`` samples that are read at a time."""
    features = assembler.features
    if features is None or features.latent is None:  # pictures are decoded one by one
        return 1
    return max(1, min(GROUPED // micro, GROUPED_BYTES // assembler.batch_bytes(micro)))


def _sizes_of(assembler: Assembler, micro: int, accumulation: int, workers: int, prefetch: int) -> dict[str, int]:
    """How many batches, and how large, ``Workers`` keeps for a reader."""
    several = several_of(assembler, micro)
    ahead = prefetch * max(accumulation, workers)  # micro-batches
    return {
        "count": workers,
        "ahead": -(-ahead // (several * workers)),
        "held": -(-accumulation // several) + (several > 1),
        "micro": micro * several,
    }


def shared_bytes(assembler: Assembler, micro: int, accumulation: int, workers: int) -> int:
    """Bytes of shared memory that the worker processes of one rank's ``Reader`` take."""
    slots, size, _ = slots_of(assembler, **_sizes_of(assembler, micro, accumulation, workers, PREFETCH))
    return slots * size


class _Walk:
    """The endless coordinates of one rank's micro-batches from a cursor on."""

    def __init__(self, plan: Plan, cursor: Cursor, rank: int, world: int, micro: int, accumulation: int) -> None:
        self.plan = plan
        self.cursor = cursor
        self.split = (rank, world, micro, accumulation)

    def __iter__(self) -> Iterator[Coordinates]:
        """``Plan.slots`` of one global batch after the other, this rank's alone and several at a time."""
        plan, cursor = self.plan, self.cursor
        rank, world, micro, accumulation = self.split
        several = max(1, LOOKED_UP // plan.batch)
        while True:
            positions, after = cursor.take(several * plan.batch)
            epochs, samples = plan.lookup(positions.reshape(several, accumulation, world, micro)[:, :, rank])
            for k in range(several):
                bucket = plan.bucket_at(cursor) if plan.buckets else None
                for j in range(accumulation):
                    yield epochs[k, j], samples[k, j], bucket
                if plan.buckets:
                    cursor = cursor.advance(plan.batch)
            cursor = after


def _grouped(walk: Iterator[Coordinates], several: int) -> Iterator[Coordinates]:
    """Micro-batches of one bucket joined, ``several`` of them at most; the first comes alone, to be there soon."""
    following, room = next(walk), 1
    while True:
        group, following = [following], next(walk)
        while len(group) < room and following[2] == group[0][2]:
            group.append(following)
            following = next(walk)
        epochs, samples, buckets = zip(*group, strict=True)
        yield np.concatenate(epochs), np.concatenate(samples), buckets[0]
        room = several


class _Threaded:
    """Assembles ahead in a few threads of this process; micro-batches come back in the order of the walk."""

    def __init__(self, assembler: Assembler, walk: Iterator[Coordinates], depth: int) -> None:
        self._walk = walk
        self._assemble = assembler.assemble
        features = assembler.features
        threads = THREADS if features is None or features.latent is None else 1
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="longskip-reader")
        self._ahead: deque[Future[MicroBatch]] = deque()
        for _ in range(depth):
            self._begin()

    def _begin(self) -> None:
        self._ahead.append(self._pool.submit(self._assemble, *next(self._walk)))

    def take(self) -> MicroBatch:
        self._begin()
        found = self._ahead.popleft()
        error = found.exception()
        if isinstance(error, Exception) and not isinstance(error, LongskipError):
            raise DataError(f"a data thread failed\n{''.join(traceback.format_exception(error))}") from error
        return found.result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
