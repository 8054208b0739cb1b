"""The memory of a rank: sums against brute force, what changes what, and bad input. Real ranks: tests/engine."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longskip.errors import ConfigError
from longskip.models.presets import preset
from longskip.models.specs import TextEncoderSpec, UViTSpec
from longskip.profiling.memory import RankMemory, rank_memory
from longskip.profiling.traffic import Zero

SPEC = UViTSpec(64, 6, 2, channels=3, latent_size=(16, 12), n_txt=5, text_width=16)
N = SPEC.param_counts().total


def found(stage: Any, **changes: Any) -> RankMemory:
    given: dict[str, Any] = {"world": 4, "micro": 2, "dtype_bytes": 4, "layout": "named"}
    return rank_memory(SPEC, stage=stage, **given | changes)


@settings(max_examples=25, deadline=None)
@given(world=st.integers(1, 7), stage=st.sampled_from([1, 2]), words=st.sampled_from([0, 50]))
def test_a_rank_holds_the_gradients_of_the_tensors_that_its_share_touches(world: int, stage: Any, words: int) -> None:
    """Laid end to end element by element."""
    text = TextEncoderSpec(words, 16, 5) if words else None
    tensors = [spec for unit in SPEC.parameters().values() for spec in unit]
    tensors += list(text.parameters()["embedding"]) if text else []
    touched = []
    for rank in range(world):
        elements = 0
        for decay in (True, False):
            owners = [index for index, spec in enumerate(tensors) if spec.decay == decay for _ in range(spec.numel)]
            share = -(-len(owners) // (2 * world)) * 2
            mine = set(owners[rank * share : (rank + 1) * share])
            elements += sum(tensors[index].numel for index in mine)
        touched.append(4 * elements)
        assert found(stage, world=world, rank=rank, text=text).gradients == touched[-1]
    assert found(stage, world=world, text=text).gradients == max(touched)


def test_states_are_shared_out_and_the_rest_is_not() -> None:
    alone, four = found(1, world=1), found(1, world=4)
    assert (alone.moments, alone.ema, alone.masters) == pytest.approx((8 * N, 4 * N, 4 * N), abs=100)
    assert four.states == pytest.approx(4 * N, abs=100) and four.weights == pytest.approx(4 * N, abs=100)
    assert found(0).masters == 0 and found(0, dtype_bytes=2).masters == 4 * N  # fp32 at stage 0 steps on the weights
    assert found(3).weights == pytest.approx(N, rel=1e-2)


def test_a_small_model_is_gathered_whole_at_stage_3() -> None:
    """What DeepSpeed keeps until it is used again, within 1e9 elements; 1e9 / 2 of a model that is larger."""
    half = preset("uvit-0.3b")
    whole = rank_memory(half, world=8, stage=3, micro=1, dtype_bytes=2)
    stored = half.param_counts().total
    assert 0.95 * 2 * stored < whole.backward.gathered < 1.01 * 2 * stored
    none = rank_memory(half, world=8, stage=3, micro=1, dtype_bytes=2, zero=Zero(max_reuse=0, prefetch=0))
    assert none.backward.gathered < 0.1 * whole.backward.gathered
    large = rank_memory(preset("uvit-8b"), world=8, stage=3, micro=1, dtype_bytes=2)
    assert 0.9e9 < large.backward.gathered < 2.6e9


def test_overlap_doubles_the_bucket_of_stages_1_and_2_alone() -> None:
    for stage in (1, 2):
        single, double = (found(stage, zero=Zero(overlap=overlap)) for overlap in (False, True))
        assert double.reduce.buffers - single.reduce.buffers == 4 * N
    assert found(3, zero=Zero(overlap=True)) == found(3)


def test_the_peak_is_the_worst_moment() -> None:
    wide = found(0, dtype_bytes=2, micro=1)
    assert wide.worst == wide.step and wide.step.buffers == 4 * N  # fp32 gradients
    many = found(0, dtype_bytes=2, micro=256)
    assert many.worst == many.backward and many.peak == many.backward.total > many.device
    assert found(0, micro=256, checkpointing=1).peak < found(0, micro=256, checkpointing=2).peak < many.peak * 2
    kept = found(0, micro=1, accumulation=2).backward.gradients - found(0, micro=1).backward.gradients
    assert kept > 0.5 * 4 * N  # the gradients of the micro-batch before


def test_what_is_put_off_to_the_host() -> None:
    for stage in (1, 2, 3):
        away, here = found(stage, offload_optimizer=True), found(stage)
        assert away.states == away.gradients == 0
        assert away.host > here.states
    ema = found(0, ema_on_host=True)
    assert (ema.ema, ema.host) == (0, 4 * N)
    weights = found(3, offload_weights=True)
    assert weights.weights == 0 and weights.host == found(3).weights


@pytest.mark.parametrize(("changes", "complaint"), [
    ({"stage": 4}, "ZeRO has no stage 4"), ({"stage": 0, "world": 0}, "world is 0"), ({"stage": 0, "micro": 0}, "micro is 0"),
    ({"stage": 1, "rank": 4}, "rank 4 is not one of 4"), ({"stage": 0, "offload_optimizer": True}, "stage 0 puts nothing off"),
    ({"stage": 2, "offload_weights": True}, "stage 2 puts nothing off"), ({"stage": 0, "accumulation": 0}, "accumulation is 0"),
])  # fmt: skip
def test_what_cannot_be_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        found(**changes)
