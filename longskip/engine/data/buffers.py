"""Memory of batches, used again when nobody holds the batch any more.

A batch of features is several MiB, which the allocator takes from the system and gives back each time; the page faults
then cost as much as reading the features.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import DTypeLike

SMALLEST = 1 << 18
"""Bytes from which an array's memory is kept; the allocator keeps smaller ones itself."""
SPARE = 4
"""Blocks of one size that are kept while unused."""


class Buffers:
    """Hands out arrays whose memory comes back by itself. Threads may share it; a copy in another process is empty."""

    def __init__(self) -> None:
        self._spare: dict[int, list[np.ndarray]] = {}

    def __reduce__(self) -> tuple[type[Buffers], tuple[()]]:
        return Buffers, ()

    def tensor(self, shape: Sequence[int], dtype: DTypeLike) -> tuple[torch.Tensor, np.ndarray]:
        """A tensor and an array over the same memory, not initialised.

        The memory is used again when the last tensor on it is gone: keep no array or view of it for longer.
        """
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size < SMALLEST:
            array = np.empty(shape, dtype)
            return torch.from_numpy(array), array
        # No lock: a list's pop and append are whole steps, and the garbage collector may call _take_back in between.
        try:
            block = self._spare.setdefault(size, []).pop()
        except IndexError:
            block = np.empty(size, np.uint8)
        owner = block.view(dtype).reshape(shape)  # what the tensors hold, and whose end is noticed
        weakref.finalize(owner, self._take_back, block).atexit = False
        return torch.from_numpy(owner), block.view(dtype).reshape(shape)

    def _take_back(self, block: np.ndarray) -> None:
        spare = self._spare.setdefault(block.nbytes, [])
        if len(spare) < SPARE:
            spare.append(block)
