"""From a source to its plan: a stream for every data set in every aspect bucket, in the order that ``data.shuffle`` names.

A data set of weight w with n samples, n_b of them in bucket b, gets the share w·n_b/n of all that is served in that
bucket. So its buckets are gone through at one speed, every sample of it comes equally often, and over all buckets it has
the share w that was asked for; a bucket's share is what its streams add up to (n_b / n with one data set).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from longskip.engine.data.buckets import Assignment, Size
from longskip.engine.data.mix import MixedSource
from longskip.engine.data.plan import Lane, Order, Plan, Shuffled, Stream
from longskip.engine.data.sources import ShardSource, Source
from longskip.engine.data.windows import WindowOrder
from longskip.errors import DataError


def plan_of(
    source: Source,
    batch: int,
    seed: int = 0,
    *,
    assignment: Assignment | None = None,
    window_shards: int | None = None,
) -> Plan:
    """The plan of a source in global batches of ``batch`` samples; mixed by its weights where it is a ``MixedSource``.

    With an ``assignment`` every batch is of one bucket. ``window_shards`` is that of ``data.shuffle: window``; without
    it every stream is shuffled as a whole. One data set without buckets, shuffled as a whole, is ``Plan(n, batch,
    seed)``.

    Raises ``DataError`` where assignment and source do not fit, a bucket holds fewer samples than a batch, or a data set
    has no sample in any bucket.
    """
    if assignment is not None and len(assignment) != len(source):
        raise DataError(f"the buckets are of {len(assignment)} samples, the source holds {len(source)}")
    sets = _sets(source, assignment)
    buckets = (None,) if assignment is None else assignment.buckets
    single = len(sets) == len(buckets) == 1
    lanes = []
    for number, bucket in enumerate(buckets):
        streams, shares = [], []
        for each in sets:
            edges = each.edges(assignment, number)
            count = int(edges[-1] - edges[0])
            if count:
                order: Order
                if window_shards is None:
                    order = Shuffled(count, seed if single else _stream_seed(seed, each.number, bucket))
                else:  # one seed for all, so that the buckets of a data set read the same windows
                    order = WindowOrder(np.diff(edges), window_shards, seed)
                streams.append(Stream(order, each.name, _numbers(int(edges[0]), assignment, number)))
                shares.append(each.weight * count)
        lanes.append(Lane(tuple(streams), tuple(shares), sum(shares), bucket))
    return Plan(len(source), batch, seed, tuple(lanes))


@dataclass(frozen=True)
class _Set:
    """A data set: its shards are the source's samples ``ends[k]`` to ``ends[k + 1]``; ``weight`` is each sample's."""

    number: int
    name: str
    ends: np.ndarray
    weight: Fraction

    def edges(self, assignment: Assignment | None, bucket: int) -> np.ndarray:
        """``ends``, in samples of that bucket alone."""
        return self.ends if assignment is None else assignment.rank(bucket, self.ends)


def _sets(source: Source, assignment: Assignment | None) -> list[_Set]:
    parts: list[tuple[Source, int, str]] = [(source, 1, "data")]
    if isinstance(source, MixedSource):
        parts = list(zip(source.members, source.weights, source.names, strict=True))
    out, first = [], 0
    for number, (member, weight, name) in enumerate(parts):
        counts = [shard.count for shard in member.index.shards] if isinstance(member, ShardSource) else [len(member)]
        ends = first + np.cumsum([0, *counts], dtype=np.int64)
        first = int(ends[-1])
        served = first - int(ends[0])
        if assignment is not None:
            served = sum(int(np.diff(assignment.rank(b, ends[[0, -1]]))[0]) for b in range(len(assignment.buckets)))
        if not served:
            raise DataError(f"{name} has no sample in any bucket", cure="take it out of data.mix")
        out.append(_Set(number, name, ends, Fraction(weight, served)))
    return out


def _numbers(first: int, assignment: Assignment | None, bucket: int) -> Callable[[np.ndarray], np.ndarray] | None:
    """Samples of a stream → samples of the source; ``first`` of the bucket's (or of all) come before the stream's."""
    if assignment is not None:
        return lambda samples: assignment.select(bucket, samples + first)
    return (lambda samples: samples + first) if first else None


def _stream_seed(seed: int, number: int, bucket: Size | None) -> int:
    """A seed of its own for a stream, so that streams of one length do not come in one order."""
    digest = hashlib.blake2b(
        b"%d,%d,%d,%d" % (seed, number, *(bucket or (0, 0))), digest_size=8, person=b"longskip stream"
    )
    return int.from_bytes(digest.digest(), "little")
