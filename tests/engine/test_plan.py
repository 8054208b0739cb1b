from __future__ import annotations

import hashlib
import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longskip.engine.data.interleave import Interleave
from longskip.engine.data.plan import Cursor, Lane, Plan, Shuffled, Stream, permute
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


def test_the_plan_of_one_data_set_is_frozen():
    # Of the version before there were buckets and mixes: runs that began then go on bitwise.
    plan = Plan(1000, 8, 42)
    zeros, ones = [0] * 8, [1] * 8
    assert [part.tolist() for part in plan.batch_at(124)] == [zeros, [617, 901, 197, 304, 261, 322, 306, 970]]
    assert [part.tolist() for part in plan.batch_at(125)] == [ones, [362, 344, 928, 776, 638, 271, 977, 96]]
    over = plan.batch_at(plan.cursor(13).skip((15, 990)))
    assert [part.tolist() for part in over] == [zeros, [538, 749, 832, 115, 617, 901, 197, 304]]
    large = Plan(10**9 + 7, 4, 3).batch_at(10**10)
    assert [part.tolist() for part in large] == [[39] * 4, [92892422, 690337042, 414616091, 555879337]]
    assert plan.buckets == ()
    assert plan.bucket_at(3) is None
    assert plan.passes(125) == {"data": 1.0}


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


def laned(seed: int, sizes: list[list[int]], weights: list[int], batch: int) -> Plan:
    """A plan of a lane per list and a stream per number of samples; samples are numbered stream by stream."""
    lanes, first = [], 0
    for number, counts in enumerate(sizes):
        streams = []
        for at, count in enumerate(counts):
            streams.append(
                Stream(Shuffled(count, seed + 10 * number + at), f"set {at}", lambda s, first=first: s + first)
            )
            first += count
        lanes.append(Lane(tuple(streams), tuple(weights[: len(counts)]), sum(counts), (8 * (number + 1), 8)))
    return Plan(first, batch, seed, tuple(lanes))


def walked(plan: Plan, sizes: list[list[int]], steps: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """(lane, [(epoch, sample)]) of each batch, found by walking: counters instead of closed forms."""
    lanes = Interleave([sum(counts) for counts in sizes]).at(np.arange(steps))[0].tolist()
    walks = [iter(lane.interleave.at(np.arange(steps * plan.batch))[0].tolist()) for lane in plan.lanes]
    served = [[0] * len(counts) for counts in sizes]
    orders: dict[tuple[int, int, int], list[int]] = {}
    out = []
    for lane in lanes:
        rows = []
        for _ in range(plan.batch):
            at = next(walks[lane])
            epoch, within = divmod(served[lane][at], sizes[lane][at])
            served[lane][at] += 1
            if (lane, at, epoch) not in orders:
                count, first = sizes[lane][at], sum(map(sum, sizes[:lane])) + sum(sizes[lane][:at])
                order = permute(range(count), count, plan.seed + 10 * lane + at, epoch)
                orders[lane, at, epoch] = [first + int(sample) for sample in order]
            rows.append((epoch, orders[lane, at, epoch][within]))
        out.append((lane, rows))
    return out


some_sizes = st.lists(st.lists(st.integers(1, 25), min_size=1, max_size=3), min_size=2, max_size=4)


@settings(max_examples=30, deadline=None)
@given(
    sizes=some_sizes,
    weights=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_lanes_equal_a_walk_with_counters(sizes, weights, seed, data):
    batch = data.draw(st.sampled_from([b for b in (1, 2, 4, 6, 12) if b <= min(map(sum, sizes))]))
    plan, steps = laned(seed, sizes, weights, batch), 40
    expected = walked(plan, sizes, steps)
    for k in data.draw(st.permutations(range(steps))):  # any batch by itself, in any order
        lane, rows = expected[k]
        epochs, samples = plan.batch_at(k)
        assert list(zip(epochs.tolist(), samples.tolist(), strict=True)) == rows
        assert plan.bucket_at(k) == plan.bucket_at(plan.batch_cursor(k)) == (8 * (lane + 1), 8)
    for world, micro in ((1, batch), (2, batch // 2), (batch, 1)):
        if micro * world == batch:
            shares = [plan.slots(7, rank, world, micro, 1)[0][1].tolist() for rank in range(world)]
            assert [sample for share in shares for sample in share] == [sample for _, sample in expected[7][1]]
    whole = np.concatenate([plan.batch_at(k) for k in range(steps)], axis=1)
    assert [part.tolist() for part in plan.lookup(np.arange(steps * batch))] == whole.tolist()
    served = Counter(zip(*whole.tolist(), strict=True))
    assert set(served.values()) == {1}  # every sample once per epoch of its stream
    places = Counter(int(sample) for sample in whole[1])
    ends = np.cumsum([count for counts in sizes for count in counts])
    for first, last in zip([0, *ends[:-1]], ends, strict=True):
        counts = [places[sample] for sample in range(first, last)]
        assert max(counts) - min(counts) <= 1  # none comes again before all of its stream have come
    passes = plan.passes(steps)
    for at in range(max(map(len, sizes))):
        members = [sample for lane, counts in enumerate(sizes) for j in range(len(counts)) if j == at
                   for sample in range(sum(map(sum, sizes[:lane])) + sum(counts[:j]),
                                       sum(map(sum, sizes[:lane])) + sum(counts[: j + 1]))]  # fmt: skip
        assert passes[f"set {at}"] == sum(places[sample] for sample in members) / len(members)


def test_with_lanes_only_whole_batches_are_skipped():
    plan = laned(0, [[9], [20]], [1, 1, 1], 4)
    cursor = plan.cursor().skip((4, 12))
    assert [plan.batch_at(cursor)[1].tolist(), plan.batch_at(cursor.advance(4))[1].tolist()] == [
        plan.batch_at(0)[1].tolist(), plan.batch_at(3)[1].tolist()]  # fmt: skip
    assert plan.bucket_at(cursor.advance(4)) == plan.bucket_at(3)
    assert plan.bucket_at(plan.cursor(4).skip((4, 12))) == plan.bucket_at(3)
    for bad in (cursor.skip((14, 16)), cursor.skip((16, 18)), plan.cursor(2)):
        for ask in (plan.batch_at, plan.bucket_at, plan.check, lambda at: plan.slots(at, 0, 2, 2, 1)):
            with pytest.raises(DataError, match="inside a global batch of 4"):
                ask(bad)
    one = laned(0, [[9, 20]], [1, 1, 1], 4)  # of one bucket any position will do
    assert one.batch_at(one.cursor(2).skip((3, 5)))[1].tolist() == one.lookup(np.array([2, 5, 6, 7]))[1].tolist()
    assert one.bucket_at(one.cursor(2)) == (8, 8)


def test_a_bucket_smaller_than_a_batch_is_refused():
    with pytest.raises(DataError, match=r"the bucket 16x8 holds 5 samples, fewer than the global batch of 6") as caught:
        laned(0, [[9], [2, 3]], [1, 1, 1], 6)
    assert "train.batch_size to 5" in (caught.value.cure or "")
