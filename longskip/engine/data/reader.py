"""The reader: a rank's micro-batches, one global step at a time, assembled ahead in threads or processes.

Which samples come when is the plan's, and what they look like the assembler's; ranks, workers and the step of a resume
change neither.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

from longskip.engine.data.assembler import Assembler, MicroBatch
from longskip.engine.data.decode import MAX_PIXELS
from longskip.engine.data.plan import Cursor, Plan
from longskip.engine.data.sources import Source
from longskip.engine.data.tokens import Vocabulary
from longskip.engine.data.workers import Coordinates, Workers
from longskip.errors import ConfigError, DataError

THREADS = 2
"""Threads that decode pictures where there are no worker processes. Stored latents are read by one: two would hand the
GIL to and fro between system calls of 10 µs, and read less."""


LOOKED_UP = 512
"""Positions that are looked up in the plan at a time; a few cost as much as many."""


class Reader:
    """An endless iterator over global steps; each item is the list of this rank's ``accumulation`` micro-batches.

    ``cursor`` is where to begin, and at any time where the step after the last one handed out begins: what a checkpoint
    saves. ``workers`` = 0 assembles in threads of this process, otherwise in that many processes (``start_method``:
    ``spawn``, or ``forkserver``, which starts faster but ends when a whole process group is told to terminate);
    the order never depends on them. ``data_wait_seconds`` adds up the time that the consumer waited.

    Raises ``ConfigError`` for contradicting settings, ``DataError`` where plan and source do not fit or a worker died,
    and what the source raises when it stops at damage. Use as a context manager, or call ``close``.
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
        prefetch: int = 2,
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
        )
        plan.slots(self.cursor, rank, world, micro, accumulation)  # refuses sizes that do not fit, before any work
        self._stream: _Threaded | Workers | None = None

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        started = time.perf_counter()
        if self._stream is None:
            walk = _Walk(self.plan, self.cursor, self.rank, self.world, self.micro, self.accumulation)
            if self.workers:
                self._stream = Workers(
                    self.assembler,
                    iter(walk),
                    count=self.workers,
                    ahead=max(self.prefetch, -(-self.prefetch * self.accumulation // self.workers)),
                    held=self.accumulation,
                    micro=self.micro,
                    start_method=self.start_method,
                )
            else:
                self._stream = _Threaded(self.assembler, walk, self.prefetch * self.accumulation)
        try:
            batches = [self._stream.take() for _ in range(self.accumulation)]
        except BaseException:
            self.close()
            raise
        finally:
            self.data_wait_seconds += time.perf_counter() - started
        self.cursor = self.cursor.advance(self.plan.batch)
        return batches

    def seek(self, cursor: Cursor) -> None:
        """Goes on at ``cursor``; what was prepared ahead is thrown away."""
        self.close()
        self.cursor = replace(cursor, n_samples=self.plan.n_samples)

    def close(self) -> None:
        """Ends the thread or the workers; iterating again starts them anew at ``cursor``."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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


class _Threaded:
    """Assembles ahead in a few threads of this process; micro-batches come back in the order of the walk."""

    def __init__(self, assembler: Assembler, walk: _Walk, depth: int) -> None:
        self._walk = iter(walk)
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
        return self._ahead.popleft().result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
