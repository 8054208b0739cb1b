"""The helper that poisons memory notices what it is there for."""

from __future__ import annotations

import pytest
import torch

from longskip.kernels import jit
from tests.kernels.poison import poisoned

CPU = torch.device("cpu")


def beyond(tensor: torch.Tensor, place: int) -> torch.Tensor:
    return tensor.as_strided((1,), (1,), tensor.storage_offset() + place)


@pytest.mark.parametrize("place", [-1, 15])
def test_a_store_out_of_bounds_fails(place: int) -> None:
    with pytest.raises(AssertionError, match="a store out of bounds"), poisoned():
        result = jit.empty((3, 5), torch.float16, CPU)
        beyond(result, place)[0] = float("nan")


def test_a_nan_read_round_an_input_is_seen_where_it_is_stored_round_a_result() -> None:
    with pytest.raises(AssertionError, match="a store out of bounds"), poisoned() as memory:
        read = memory.guarded(torch.ones(4))
        beyond(jit.empty((4,), torch.float32, CPU), 4).copy_(beyond(read, 4) * 2)


def test_what_is_handed_out() -> None:
    with poisoned() as memory:
        result = jit.empty((2, 3), torch.bfloat16, CPU)
        assert result.isnan().all()
        assert result.is_contiguous() and not result._is_view()
        assert jit.empty((0, 3), torch.int32, CPU).shape == (0, 3)
        assert jit.empty((2,), torch.bool, CPU).all()
        copy = memory.guarded(torch.arange(6.0).view(2, 3).T)
        assert copy.is_contiguous() and torch.equal(copy[:, 1], torch.tensor([3.0, 4.0, 5.0]))
        assert beyond(copy, 6).isnan() and beyond(copy, -1).isnan()


def test_nothing_allocated_fails() -> None:
    with pytest.raises(AssertionError, match="nothing was allocated"), poisoned():
        pass
