from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longskip.engine.data.interleave import Interleave
from longskip.errors import DataError

WORST = 3.359885666243178 / 2  # half the sum of the reciprocal Fibonacci numbers

some_weights = st.lists(
    st.one_of(st.integers(1, 12), st.integers(1, 10**4), st.sampled_from([1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144])),
    min_size=1,
    max_size=11,
)


def by_hand(weights: list[int], steps: int) -> list[int]:
    """The streams of the first steps, by a second implementation: sets of streams merged, and exact fractions."""
    parts = [(Fraction(w), i, [i]) for i, w in enumerate(weights)]
    splits = []
    while len(parts) > 1:
        parts.sort(key=lambda part: part[:2])
        small, large = parts[:2]
        made = len(weights) + len(splits)
        splits.append((large[2], small[2], large[0] / (large[0] + small[0])))
        parts = [*parts[2:], (small[0] + large[0], made, small[2] + large[2])]
    out = []
    seen = [0] * len(splits)
    for _ in range(steps):
        candidates = set(range(len(weights)))
        for at in reversed(range(len(splits))):  # the last split made is the first to decide
            left, right, share = splits[at]
            if set(left) | set(right) <= candidates and len(candidates) > 1:
                before = (seen[at] * share + Fraction(1, 2)) // 1
                after = ((seen[at] + 1) * share + Fraction(1, 2)) // 1
                seen[at] += 1
                candidates = set(left if after > before else right)
        out.append(candidates.pop())
    return out


@settings(max_examples=80, deadline=None)
@given(weights=some_weights)
def test_steps_equal_a_second_implementation_and_count_up(weights):
    mixed = Interleave(weights)
    streams, indices = mixed.at(np.arange(120))
    assert streams.tolist() == by_hand(weights, 120)
    seen = [0] * len(weights)
    for k, (stream, index) in enumerate(zip(streams.tolist(), indices.tolist(), strict=True)):
        assert mixed.counts(k) == tuple(seen)
        assert index == seen[stream]
        seen[stream] += 1


@settings(max_examples=80, deadline=None)
@given(weights=some_weights)
def test_no_count_strays_from_its_share(weights):
    total, steps = sum(weights), 1500
    streams, _ = Interleave(weights).at(np.arange(steps))
    counts = np.cumsum(streams[:, None] == np.arange(len(weights)), axis=0)
    errors = np.abs(counts * total - np.arange(1, steps + 1)[:, None] * np.array(weights))
    assert errors.max() <= total * (0.5 if len(weights) == 2 else WORST)


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.integers(1, 1 << 70), min_size=1, max_size=6), step=st.integers(0, (1 << 62) - 1),
    small=st.lists(st.integers(1, (1 << 31) // 3), min_size=3, max_size=3),
)  # fmt: skip
def test_any_step_is_found_at_once_however_far_and_whatever_the_weights(weights, step, small):
    for shares in (weights, small):
        mixed = Interleave(shares)
        before, after = mixed.counts(step), mixed.counts(step + 1)
        assert sum(before) == step
        (stream,), (index,) = mixed.at([step])
        assert index == before[stream]
        assert [int(a - b) for a, b in zip(after, before, strict=True)] == [
            int(i == stream) for i in range(len(shares))
        ]
        for count, weight in zip(before, shares, strict=True):
            assert abs(count - Fraction(step * weight, sum(shares))) <= WORST


def test_both_ways_of_computing_agree():
    # 2³¹ is the largest denominator of the fast way; one more than it takes the slow one.
    fast, slow = Interleave([(1 << 30) + 1, (1 << 30) - 1]), Interleave([(1 << 30) + 1, 1 << 30])
    steps = np.random.default_rng(0).integers(0, 1 << 61, 500)
    for mixed, whole in ((fast, 1 << 31), (slow, (1 << 31) + 1)):
        streams, indices = mixed.at(steps)
        share = (1 << 30) + 1
        for step, stream, index in zip(steps.tolist(), streams.tolist(), indices.tolist(), strict=True):
            before, after = ((2 * k * share + whole) // (2 * whole) for k in (step, step + 1))
            assert (stream, index) == ((0, before) if after > before else (1, step - before))


def test_floats_mean_their_decimals_and_only_ratios_matter():
    assert Interleave([0.1, 0.3]).weights == Interleave([1, 3]).weights == Interleave([2.5, Fraction(15, 2)]).weights
    assert Interleave([0.1, 0.2, 0.7]).weights == (1, 2, 7)
    assert Interleave([1e-9, 1]).weights == (1, 10**9)
    assert Interleave([7]).at([[5, 6]])[1].tolist() == [[5, 6]]


def test_the_order_is_frozen():
    # A run is resumed by its position alone, so these may never change.
    streams, indices = Interleave([5, 3, 2]).at(range(20))
    assert "".join(map(str, streams)) == "10201020101020102010"
    assert indices.tolist() == [0, 0, 0, 1, 1, 2, 1, 3, 2, 4, 3, 5, 2, 6, 4, 7, 3, 8, 5, 9]
    far = Interleave([40, 30, 20, 10]).at([10**12, 10**15 + 7])
    assert [part.tolist() for part in far] == [[2, 2], [2 * 10**11, 2 * 10**14 + 1]]


@pytest.mark.parametrize("weights", [[], [0], [1, -1], [float("nan")], [float("inf"), 1], ["x"], [None]])
def test_weights_that_cannot_be_are_refused(weights):
    with pytest.raises(DataError, match="weight"):
        Interleave(weights)


def test_steps_before_the_first_are_refused():
    with pytest.raises(ValueError, match="step -1"):
        Interleave([1, 2]).at([3, -1])
