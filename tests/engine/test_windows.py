from __future__ import annotations

import hashlib
import pickle
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longskip.engine.data.plan import permute
from longskip.engine.data.windows import WindowOrder
from longskip.errors import DataError
from tests.figures import figure

sizes = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


def by_hand(order: WindowOrder, epoch: int) -> list[int]:
    """The epoch written out: lists of ids laid end to end, window by window."""
    digest = hashlib.blake2b(f"{order.seed},{epoch}".encode(), digest_size=8, person=b"longskip window").digest()
    key = int.from_bytes(digest, "little")
    ids, first = [], 0
    for count in order.counts.tolist():
        ids.append(list(range(first, first + count)))
        first += count
    shards = [int(permute([i], len(ids), order.seed, epoch)[0]) for i in range(len(ids))]
    out = []
    for window, at in enumerate(range(0, len(shards), order.window_shards)):
        pool = [i for shard in shards[at : at + order.window_shards] for i in ids[shard]]
        out += [pool[int(permute([i], len(pool), key, window)[0])] for i in range(len(pool))]
    return out


@settings(max_examples=60, deadline=None)
@given(counts=sizes, width=st.integers(1, 14), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**9))
def test_every_sample_comes_once_per_epoch_and_a_prefix_of_windows_needs_its_shards_only(counts, width, seed, epoch):
    order = WindowOrder(counts, width, seed)
    n = sum(counts)
    samples = order.lookup(epoch, np.arange(n))
    assert sorted(samples.tolist()) == list(range(n))
    shards = np.repeat(np.arange(len(counts)), counts)[samples]
    windows = order.window_of(epoch, np.arange(n))
    assert (np.diff(windows) >= 0).all()
    for window in range(order.n_windows):
        expected = {int(shard) for shard in order.shards_of(epoch, window) if counts[shard]}
        assert set(shards[windows == window].tolist()) == expected
        assert (order.windows_with(epoch, order.shards_of(epoch, window)) == window).all()
    every = [int(shard) for window in range(order.n_windows) for shard in order.shards_of(epoch, window)]
    assert sorted(every) == list(range(len(counts)))


@settings(max_examples=30, deadline=None)
@given(counts=sizes, width=st.integers(1, 5), seed=st.integers(0, 99), data=st.data())
def test_a_place_is_found_alone_as_among_others(counts, width, seed, data):
    """Whatever is asked together, in whatever shape and order: what ranks, workers and resumes rest on."""
    n = sum(counts)
    whole = WindowOrder(counts, width, seed).lookup(7, np.arange(n))
    asked = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=2, max_size=20)))
    order = pickle.loads(pickle.dumps(WindowOrder(counts, width, seed)))
    for epoch in (0, 1, 2, 3, 9, 8):  # more epochs than are kept
        order.lookup(epoch, [0])
    assert order.lookup(7, asked).tolist() == whole[asked].tolist()
    assert order.lookup(7, asked[:2].reshape(1, 2, 1)).tolist() == whole[asked[:2]].reshape(1, 2, 1).tolist()
    assert order.lookup(7, []).shape == (0,)


def test_the_order_is_what_it_says_and_frozen():
    # A run is resumed by its position alone, so these numbers may never change.
    order = WindowOrder([3, 0, 4, 1, 2], 2, seed=5)
    assert order.lookup(3, range(10)).tolist() == by_hand(order, 3) == [9, 8, 5, 2, 0, 3, 4, 6, 1, 7]
    big = WindowOrder(np.full(1000, 1000), 8, seed=42)
    assert big.lookup(7, [0, 1, 8000, 999_999]).tolist() == [823575, 652078, 169892, 735557]


def test_buckets_of_the_same_shards_share_their_windows():
    wide, tall = WindowOrder([5, 0, 2, 9, 1, 4, 7], 3, seed=1), WindowOrder([1, 8, 0, 0, 6, 6, 2], 3, seed=1)
    for epoch in range(3):
        for window in range(wide.n_windows):
            assert wide.shards_of(epoch, window).tolist() == tall.shards_of(epoch, window).tolist()


def test_every_place_is_equally_likely_over_the_epochs():
    order = WindowOrder([2, 2, 2, 2], 2, seed=11)
    epochs = 4000
    counts = np.zeros((8, 8))
    for epoch in range(epochs):
        counts[np.arange(8), order.lookup(epoch, np.arange(8))] += 1
    expected = epochs / 8
    chi = ((counts - expected) ** 2 / expected).sum()
    assert chi < 110  # 49 degrees of freedom: 99.9999 % lie below


def test_seeds_and_epochs_and_windows_differ():
    seen = Counter()
    for seed in (0, 1):
        for epoch in (0, 1):
            order = WindowOrder([50] * 6, 2, seed)
            seen[tuple(order.lookup(epoch, np.arange(300)).tolist())] += 1
            # the same places of two windows are not the same rows
            inside = order.lookup(epoch, np.arange(300)).reshape(3, 100) % 50
            assert len({tuple(row) for row in inside.tolist()}) == 3
    assert set(seen.values()) == {1}


def test_a_thousand_million_samples_cost_memory_by_the_shard():
    shards, batch = 100_000, 4096
    tracemalloc.start()
    order = WindowOrder(np.full(shards, 10_000), 64, seed=3)
    order.lookup(0, [0])
    begin = time.perf_counter()
    for k in range(20):
        samples = order.lookup(0, np.arange(k * batch, (k + 1) * batch))
    milliseconds = (time.perf_counter() - begin) / 20 * 1e3
    assert len(np.unique(samples)) == batch
    begin = time.perf_counter()
    order.lookup(1, np.arange(999_999_000, 1_000_000_000))
    switch = (time.perf_counter() - begin) * 1e3
    for epoch in range(2, 8):
        order.lookup(epoch, [5])
    memory, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert memory < shards * 8 * (2 + 3 * 4)
    figure(
        f"window order, 10^9 samples in 10^5 shards: {milliseconds:.1f} ms per {batch} places, {switch:.0f} ms at a new "
        f"epoch, {memory / 2**20:.1f} MiB"
    )


@pytest.mark.parametrize(
    ("counts", "width", "message"),
    [([], 1, "at least one shard"), ([3, -1], 1, "0 or more"), ([0, 0], 1, "0 samples"), ([[1]], 1, "one number"),
     ([4], 0, "window of 0")],
)  # fmt: skip
def test_impossible_orders_are_refused(counts, width, message):
    with pytest.raises(DataError, match=message):
        WindowOrder(counts, width)


def test_places_outside_the_epoch_are_refused():
    order = WindowOrder([3, 2], 1)
    for place in (-1, 5):
        with pytest.raises(ValueError, match="an epoch has 5"):
            order.lookup(0, [0, place])
    with pytest.raises(ValueError, match="window 2 of 2"):
        order.shards_of(0, 2)
