from __future__ import annotations

import itertools

import numpy as np
import pytest

from longskip.engine.data.draws import generator

MASK = (1 << 64) - 1


def philox_block(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 of the paper (Salmon et al. 2011), in plain integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * c[0], 1 << 64)
        high1, low1 = divmod(0xCA5A826395121157 * c[2], 1 << 64)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return c


def test_the_stream_is_philox_at_the_counter_of_epoch_and_sample():
    drawn = generator(7, 3, 11, "noise").integers(0, 1 << 64, 4, dtype=np.uint64)
    key = generator(7, 0, 0, "noise").bit_generator.state["state"]["key"]
    assert drawn.tolist() == philox_block([1, 0, 11, 3], [int(word) for word in key])


def test_streams_differ_by_seed_epoch_sample_and_purpose():
    grid = list(itertools.product((0, 1, 12), (0, 1, 2), (0, 1, 2, 1 << 40), ("time", "noise", "flip", "2flip")))
    first = {int(generator(*at).integers(0, 1 << 64, dtype=np.uint64)) for at in grid}
    assert len(first) == len(grid)
    assert generator(1, 2, 3, "time").random() == generator(1, 2, 3, "time").random()


def test_draws_across_samples_are_standard_normal_and_uncorrelated():
    values = np.array([generator(0, 0, sample, "time").standard_normal() for sample in range(4000)])
    assert abs(values.mean()) < 4 / np.sqrt(len(values))
    assert abs(values.var() - 1) < 4 * np.sqrt(2 / len(values))
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / np.sqrt(len(values))


@pytest.mark.parametrize(("epoch", "sample"), [(-1, 0), (0, -1), (0, 1 << 64)])
def test_numbers_outside_the_counter_are_refused(epoch, sample):
    with pytest.raises(ValueError, match="must lie in"):
        generator(0, epoch, sample, "time")
