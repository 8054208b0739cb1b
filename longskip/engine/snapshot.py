"""A rank's slices as they were at one step, in host memory that is kept and used again for the next save.

What is copied are runs of the masters (DeepSpeed's flat tensors and their states), a few large ones, and not slice by
slice: the copy then takes as long as the memory does. From a GPU it goes through pinned memory where there is some.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import psutil
import torch

from longskip.engine.shards import KINDS, Kind, Shards, Slice
from longskip.engine.tensorfiles import PIECE

GAP = 1 << 10  # elements of padding that are copied along rather than making two runs
MARGIN = 0.9  # of the free host memory, as where a ZeRO stage is chosen


class Snapshot:
    """Copies of all that ``shards`` owns: ``reserve`` the memory, ``take`` the values, read their ``pieces``."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._runs: list[Slice] = []
        self._place: dict[tuple[str, int], tuple[int, int]] = {}  # of a slice: its run, and where in it
        # Parts of at most PIECE elements: pinned memory is handed out in powers of two.
        self._kept: dict[tuple[int, Kind], list[torch.Tensor]] = {}
        for run, items in _runs(shards.owned()):
            for item in items:
                self._place[item.name, item.offset] = len(self._runs), item.position - run.position
            self._runs.append(run)

    @property
    def bytes(self) -> int:
        """Of host memory, once taken."""
        return 4 * len(KINDS) * sum(run.numel for run in self._runs)

    def reserve(self) -> bool:
        """Ask for the memory, once; False where this rank's share of what is free does not hold it."""
        if self._kept:
            return True
        if self.bytes > MARGIN * host_share(self._shards.world):
            return False
        try:
            for number, run in enumerate(self._runs):
                for kind in KINDS:
                    parts = self._shards.tensor(run, kind).split(PIECE)
                    self._kept[number, kind] = [_empty_like(part) for part in parts]
        except (RuntimeError, MemoryError):
            self._kept.clear()
            return False
        return True

    def take(self) -> None:
        """Copy the values of now over those of the last time, into what ``reserve`` has asked for."""
        for (number, kind), kept in self._kept.items():
            parts = self._shards.tensor(self._runs[number], kind).split(PIECE)
            for copy, part in zip(kept, parts, strict=True):
                copy.copy_(part, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def pieces(self, item: Slice, kind: Kind) -> Iterator[torch.Tensor]:
        """The slice as it was when the snapshot was taken, 1-D, without a copy."""
        number, begin = self._place[item.name, item.offset]
        for copy in self._kept[number, kind]:
            low, high = max(begin, 0), min(begin + item.numel, copy.numel())
            if low < high:
                yield copy[low:high]
            begin -= copy.numel()


def host_share(world: int) -> int:
    """Bytes of free host memory for each of the ranks that share this machine."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", torch.cuda.device_count() or world))
    return psutil.virtual_memory().available // max(1, min(local, world))


def _runs(owned: Iterable[Slice]) -> Iterator[tuple[Slice, list[Slice]]]:
    """Slices of the masters, without a name, that cover ``owned`` and next to nothing else; with what each covers."""
    covered: list[Slice] = []
    for item in sorted(owned, key=lambda item: (id(item.master), item.position)):
        if covered and not (
            item.master is covered[-1].master and item.position - (covered[-1].position + covered[-1].numel) <= GAP
        ):
            yield _span(covered), covered
            covered = []
        covered.append(item)
    if covered:
        yield _span(covered), covered


def _span(items: list[Slice]) -> Slice:
    first, last = items[0], items[-1]
    return Slice("", (), 0, last.position + last.numel - first.position, first.master, first.position)


def _empty_like(values: torch.Tensor) -> torch.Tensor:
    if values.device.type == "cuda":
        try:
            return torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        except RuntimeError:  # none left that may be pinned
            pass
    return torch.empty(values.shape, dtype=values.dtype)
