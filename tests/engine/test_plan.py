from __future__ import annotations

import hashlib
import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longskip.engine.data.plan import Cursor, Plan, permute
from longskip.errors import ConfigError, DataError

MASK = (1 << 64) - 1


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 700), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**9))
def test_permutation_is_a_bijection(n, seed, epoch):
    assert sorted(permute(np.arange(n), n, seed, epoch).tolist()) == list(range(n))


def test_permutation_equals_a_second_implementation():
    def by_hand(value, n, seed, epoch):
        digest = hashlib.blake2b(b"%d,%d" % (seed, epoch), digest_size=64, person=b"longskip plan").digest()
        keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(8)]
        a = math.isqrt(n - 1) + 1
        b = -(-n // a)

        def mix(x, key):
            z = (x + key) & MASK
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
            return z ^ (z >> 31)

        while True:
            right, left = divmod(value, a)
            for i in range(0, 8, 2):
                left = (left + mix(right, keys[i])) % a
                right = (right + mix(left, keys[i + 1])) % b
            value = right * a + left
            if value < n:
                return value

    for n in (1, 2, 3, 5, 97, 1000, 10**9 + 7, 1 << 40):
        values = [v % n for v in (0, 1, 2, 96, n - 1, n // 2, 123456789)]
        expected = [by_hand(v, n, 5, 3) for v in values]
        assert permute(values, n, 5, 3).tolist() == expected


def test_the_order_is_frozen():
    # A run is resumed by its position alone, so these numbers may never change.
    assert permute(range(10), 10, 0, 0).tolist() == [6, 5, 0, 8, 1, 7, 4, 2, 9, 3]
    assert permute(range(5), 1_000_000, 42, 7).tolist() == [595386, 821643, 128, 792223, 892804]


def test_every_place_is_equally_likely_over_the_epochs():
    n, epochs = 7, 3500
    at = np.array([permute(range(n), n, 1, epoch) for epoch in range(epochs)])
    expected = epochs / n
    for place in range(n):
        chi = sum((count - expected) ** 2 / expected for count in np.bincount(at[:, place], minlength=n))
        assert chi < 32  # 6 degrees of freedom: p = 1.6e-5
    followers = Counter(zip(at[:, 0].tolist(), at[:, 1].tolist(), strict=True))
    expected = epochs / (n * (n - 1))
    assert sum((followers[a, b] - expected) ** 2 / expected for a in range(n) for b in range(n) if a != b) < 90


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 60), batch=st.integers(1, 60), seed=st.integers(0, 99))
def test_every_sample_comes_once_per_epoch_and_remainders_carry_over(n, batch, seed):
    if n < batch:
        with pytest.raises(DataError, match=rf"{n} samples, fewer than the global batch of {batch}"):
            Plan(n, batch, seed)
        return
    plan = Plan(n, batch, seed)
    batches = [plan.batch_at(k) for k in range(3 * n // batch + 1)]
    epochs = np.concatenate([epoch for epoch, _ in batches])
    samples = np.concatenate([sample for _, sample in batches])
    assert epochs.tolist() == [p // n for p in range(len(epochs))]
    for epoch in range(3):
        assert sorted(samples[epochs == epoch].tolist()) == list(range(n))


def test_slots_tile_the_global_batch_for_any_split():
    plan = Plan(100, 24, 3)
    for world, micro, accumulation in ((1, 24, 1), (1, 4, 6), (2, 4, 3), (3, 4, 2), (3, 2, 4), (24, 1, 1)):
        epochs, samples = plan.batch_at(5)
        seen = np.full(24, -1)
        for rank in range(world):
            slots = plan.slots(5, rank, world, micro, accumulation)
            assert len(slots) == accumulation
            for j, (slot_epochs, slot_samples) in enumerate(slots):
                start = (j * world + rank) * micro
                assert slot_samples.tolist() == samples[start : start + micro].tolist()
                assert slot_epochs.tolist() == epochs[start : start + micro].tolist()
                seen[start : start + micro] = slot_samples
        assert seen.tolist() == samples.tolist()


@pytest.mark.parametrize("split", [(0, 2, 5, 2), (0, 1, 24, 2), (2, 2, 12, 1), (-1, 2, 12, 1), (0, 1, 0, 1)])
def test_splits_that_do_not_fit_are_refused(split):
    with pytest.raises(ConfigError):
        Plan(100, 24, 0).slots(0, *split)


@settings(max_examples=60, deadline=None)
@given(
    start=st.integers(0, 50),
    intervals=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 15)), max_size=5),
    counts=st.lists(st.integers(0, 20), max_size=5),
)
def test_skipped_positions_are_never_served_and_no_other_is_lost(start, intervals, counts):
    cursor = Cursor(start, n_samples=10)
    barred = set()
    for begin, length in intervals:
        cursor = cursor.skip((begin, begin + length))
        barred |= set(range(begin, begin + length))
    served = []
    for count in counts:
        taken, cursor = cursor.take(count)
        served += taken.tolist()
        assert Cursor.from_json(json.loads(json.dumps(cursor.to_json()))) == cursor
    free = [p for p in range(start, start + 1000) if p not in barred]
    assert served == free[: sum(counts)]
    following = free[sum(counts)]
    assert cursor.epoch == following // 10
    assert cursor.take(1)[0].tolist() == [following]


def test_resume_at_any_cursor_continues_the_same_stream():
    plan = Plan(50, 8, 9)
    cursor = plan.cursor().skip((20, 33))
    whole = []
    for _ in range(20):
        whole.append([part.tolist() for part in plan.batch_at(cursor)])
        cursor = cursor.advance(8)
    for stop in range(20):
        cursor = plan.cursor().skip((20, 33)).advance(8 * stop)
        cursor = Cursor.from_json(json.loads(json.dumps(cursor.to_json())))
        again = []
        for _ in range(20 - stop):
            again.append([part.tolist() for part in plan.batch_at(cursor)])
            cursor = cursor.advance(8)
        assert again == whole[stop:]


def test_another_global_batch_goes_on_from_the_same_position():
    small, large = Plan(30, 4, 2), Plan(30, 10, 2)
    cursor = small.cursor().advance(4).advance(4)
    samples = [*small.batch_at(0)[1], *small.batch_at(1)[1], *large.batch_at(cursor)[1]]
    assert [int(s) for s in samples] == small.lookup(np.arange(18))[1].tolist()


@pytest.mark.parametrize(
    "data",
    [None, {}, {"position": 1}, {"position": -1, "skipped": []}, {"position": 1.5, "skipped": []},
     {"position": 1, "skipped": [[3, 2]]}, {"position": 1, "skipped": [[3]]}, {"position": 1, "skipped": [["a", "b"]]},
     {"position": True, "skipped": []}, {"position": 1, "skipped": 3}],
)  # fmt: skip
def test_broken_cursors_are_refused(data):
    with pytest.raises(DataError):
        Cursor.from_json(data)


def test_a_plan_of_many_samples_takes_no_memory():
    import tracemalloc

    plan = Plan(1 << 40, 1024, 0)
    tracemalloc.start()
    plan.batch_at(1 << 33)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
