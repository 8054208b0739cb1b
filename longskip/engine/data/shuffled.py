"""Samples picked at random from a whole source: the same on every rank, and few shards of a remote one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from longskip.engine.data.mix import MixedSource
from longskip.engine.data.plan import permute
from longskip.engine.data.remote import RemoteSource
from longskip.engine.data.sources import Source
from longskip.engine.data.windows import WindowOrder

_PIECE = 1024


def shuffled(source: Source, seed: int) -> Iterator[int]:
    """Every sample of ``source`` once, in an order that is a function of ``seed`` and the source alone.

    Local data come in a keyed permutation of all samples. Of remote shards one is gone through after the other, shards
    and the samples in each permuted, so that the first n samples need as few of them as hold n; with the seed of a
    window plan they are the shards that its epoch 0 begins with. A mix permutes the places of its samples, and each
    data set fills its own in its own order: every sample is as likely as any other, whatever the weights.
    """
    if isinstance(source, MixedSource):
        members = [shuffled(member, seed) for member in source.members]
        for place in _permuted(len(source), seed):
            number = int(np.searchsorted(source.ends, place, side="right"))
            yield int(source.starts[number]) + next(members[number])
    elif isinstance(source, RemoteSource):
        order = WindowOrder([shard.count for shard in source.index.shards], 1, seed)
        for places in _pieces(len(source)):
            yield from order.lookup(0, places).tolist()
    else:
        yield from _permuted(len(source), seed)


def _permuted(count: int, seed: int) -> Iterator[int]:
    for places in _pieces(count):
        yield from permute(places, count, seed, 0).tolist()


def _pieces(count: int) -> Iterator[np.ndarray]:
    for at in range(0, count, _PIECE):
        yield np.arange(at, min(at + _PIECE, count))
