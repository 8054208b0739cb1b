"""The order of ``data.shuffle: window``: shards permuted, samples shuffled inside windows of a few shards.

In epoch e the shards stand in the order of a keyed permutation; every ``window_shards`` of them in turn form a window,
and the samples of a window follow each other in a keyed permutation of their own. So a prefix of an epoch needs only a
prefix of the shards, which can be fetched whole, one after another, while every place is still a function of (seed,
epoch, place): any place is found at once, whatever the ranks, the workers and the step of a resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from longskip.engine.data.plan import MAX_SAMPLES, permute
from longskip.errors import DataError

_KEPT_EPOCHS = 3


@dataclass(frozen=True)
class _Epoch:
    """One epoch's shards in their order, each one's rank in it, and where shards and windows end (in samples)."""

    shards: np.ndarray
    ranks: np.ndarray
    ends: np.ndarray
    window_ends: np.ndarray


class WindowOrder:
    """Places of an epoch → samples, windows and shards, for shards of ``counts`` samples each.

    Samples are numbered shard by shard, as sources number them. The order of the shards depends on (seed, epoch) and
    their number alone, so two orders over the same shards with other counts (the pictures of one aspect bucket) have
    the same shards in the same windows. Memory: five integers per shard for each of the few epochs last asked for.

    Raises ``DataError`` for counts that are negative or hold no sample, and for a window of no shard.
    """

    def __init__(self, counts: Sequence[int] | np.ndarray, window_shards: int, seed: int = 0) -> None:
        self.counts = np.array(counts, dtype=np.int64)
        if self.counts.ndim != 1 or not len(self.counts) or self.counts.min() < 0:
            raise DataError("counts must be one number of 0 or more per shard, at least one shard")
        if window_shards < 1:
            raise DataError(f"a window of {window_shards} shards; it holds 1 or more")
        self.window_shards = window_shards
        self.seed = int(seed)
        self.n_samples = int(self.counts.sum())
        if not 0 < self.n_samples <= MAX_SAMPLES:
            raise DataError(f"{self.n_samples} samples; an order takes 1 to {MAX_SAMPLES}")
        self._first = np.cumsum(self.counts) - self.counts
        self._epochs: dict[int, _Epoch] = {}

    def __len__(self) -> int:
        return self.n_samples

    @property
    def n_windows(self) -> int:
        """Windows per epoch; the last one may hold fewer shards."""
        return -(-len(self.counts) // self.window_shards)

    def lookup(self, epoch: int, within: ArrayLike) -> np.ndarray:
        """The samples at the places ``within`` of an epoch; int64, shaped as ``within``. A bijection of [0, n_samples).

        Raises ``ValueError`` for a place outside [0, n_samples).
        """
        at, shape = self._places(within)
        laid = self._epoch(epoch)
        windows = np.searchsorted(laid.window_ends, at, side="right")
        key = _window_key(self.seed, epoch)
        shuffled = np.empty_like(at)
        by_window = np.argsort(windows, kind="stable")
        for chosen in np.split(by_window, np.flatnonzero(np.diff(windows[by_window])) + 1):
            if chosen.size:
                window = int(windows[chosen[0]])
                start = int(laid.window_ends[window - 1]) if window else 0
                size = int(laid.window_ends[window]) - start
                shuffled[chosen] = start + permute(at[chosen] - start, size, key, window)
        ranks = np.searchsorted(laid.ends, shuffled, side="right")
        shards = laid.shards[ranks]
        rows = shuffled - (laid.ends[ranks] - self.counts[shards])
        return (self._first[shards] + rows).reshape(shape)

    def window_of(self, epoch: int, within: ArrayLike) -> np.ndarray:
        """The window of each place of an epoch; int64, shaped as ``within``. Windows' sizes differ between epochs."""
        at, shape = self._places(within)
        return np.searchsorted(self._epoch(epoch).window_ends, at, side="right").astype(np.int64).reshape(shape)

    def shards_of(self, epoch: int, window: int) -> np.ndarray:
        """The shards of a window of an epoch, in that epoch's order; int64."""
        if not 0 <= window < self.n_windows:
            raise ValueError(f"window {window} of {self.n_windows}")
        return self._epoch(epoch).shards[window * self.window_shards : (window + 1) * self.window_shards]

    def windows_with(self, epoch: int, shards: ArrayLike) -> np.ndarray:
        """The window in which each of ``shards`` comes in an epoch; int64."""
        return self._epoch(epoch).ranks[np.asarray(shards, dtype=np.int64)] // self.window_shards

    def _places(self, within: ArrayLike) -> tuple[np.ndarray, tuple[int, ...]]:
        places = np.asarray(within, dtype=np.int64)
        if places.size and not (places.min() >= 0 and places.max() < self.n_samples):
            raise ValueError(f"places {places.min()} to {places.max()}; an epoch has {self.n_samples}")
        return places.reshape(-1), places.shape

    def _epoch(self, epoch: int) -> _Epoch:
        laid = self._epochs.get(epoch)
        if laid is None:
            n = len(self.counts)
            shards = permute(np.arange(n), n, self.seed, epoch)
            ranks = np.empty_like(shards)
            ranks[shards] = np.arange(n)
            ends = np.cumsum(self.counts[shards])
            last = np.minimum(np.arange(1, self.n_windows + 1) * self.window_shards, n) - 1
            laid = _Epoch(shards, ranks, ends, ends[last])
            while len(self._epochs) >= _KEPT_EPOCHS:
                self._epochs.pop(max(list(self._epochs), key=lambda kept: abs(kept - epoch)), None)
            self._epochs[epoch] = laid
        return laid


def _window_key(seed: int, epoch: int) -> int:
    """The seed of an epoch's permutations inside windows, apart from those of the plan and of the shards."""
    digest = hashlib.blake2b(b"%d,%d" % (seed, epoch), digest_size=8, person=b"longskip window")
    return int.from_bytes(digest.digest(), "little")
