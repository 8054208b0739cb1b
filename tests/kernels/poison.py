"""Memory that tells on a kernel: NaN inside whatever it allocates, and guard words round it and its inputs.

    with poisoned() as memory:
        x = memory.guarded(x)              # the same values between two guards
        out = kernels.layer_norm(x)        # whatever jit.empty hands out: NaN between two guards
    assert not out.isnan().any()           # every value was written, and none was made of what lies outside

Leaving the block fails the test where a guard has changed (a store out of bounds) or where nothing was allocated.
``check_poisoned(case)`` does all of it for one case and its gradients: the results must be those of plain memory, bit for
bit. A store that lands beyond a guard corrupts the heap unseen; the guards are wider than any row or tile of the tests.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from longskip.kernels import jit
from tests.kernels.kernel_checks import Case, run

GUARD_BYTES = 32 * 1024  # a multiple of every alignment that a kernel asks for
# Bytes of guards: round inputs a NaN in every dtype, round results something else (a huge number, a NaN in float16), so
# that a NaN that was read out of bounds and stored out of bounds does not look like the guard it is stored over.
_ROUND_INPUTS, _ROUND_RESULTS = 0xFF, 0xFE


class Memory:
    """What was handed out, and whether its surroundings are still as they were."""

    def __init__(self) -> None:
        self.blocks: list[tuple[Tensor, int]] = []
        self.allocated = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """``jit.empty`` with NaN inside (the smallest integer, True) and guards round it."""
        if torch.device(device).type == "meta":
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        self.allocated += 1
        tensor = self._between_guards(shape, dtype, device, _ROUND_RESULTS)
        worst = math.nan if dtype.is_floating_point else dtype == torch.bool or torch.iinfo(dtype).min
        return tensor.fill_(worst)

    def guarded(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of the tensor between guards."""
        return self._between_guards(tensor.shape, tensor.dtype, tensor.device, _ROUND_INPUTS).copy_(tensor)

    def check(self) -> None:
        """Fail where a guard has changed."""
        for block, byte in self.blocks:
            for guard in (block[:GUARD_BYTES], block[-GUARD_BYTES:]):
                assert (guard == byte).all(), f"a store out of bounds, round {block.numel() - 2 * GUARD_BYTES} bytes"

    def _between_guards(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, byte: int) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        block = torch.full((size + 2 * GUARD_BYTES,), byte, dtype=torch.uint8, device=device)
        self.blocks.append((block, byte))
        # A tensor of its own and not a view of the block, as a result of torch.empty would be.
        strides = torch.empty(tuple(shape), device="meta").stride()
        tensor = torch.empty(0, dtype=dtype, device=device)
        return tensor.set_(block.untyped_storage(), GUARD_BYTES // dtype.itemsize, tuple(shape), strides)


@contextlib.contextmanager
def poisoned() -> Iterator[Memory]:
    """Inside, ``jit.empty`` hands out poisoned memory; the guards are checked at the end."""
    memory = Memory()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit, "empty", memory.empty)
        yield memory
    memory.check()
    assert memory.allocated, "nothing was allocated by jit.empty"


def check_poisoned(case: Case, dtype: torch.dtype = torch.float32, backend: str = "triton") -> None:
    """Outputs and gradients in poisoned memory, inputs and cotangents guarded: equal to plain memory's, bit for bit."""
    values = case.cast(case.values(), dtype)
    reference, cotangents = run(case, values, "reference")
    with poisoned() as memory:  # before plain memory, whose heap a store out of bounds would corrupt
        inputs = {name: memory.guarded(value) for name, value in values.items()}
        kept = [memory.guarded(c.to(reference[f"out{at}"].dtype)) for at, c in enumerate(cotangents)]
        guarded, _ = run(case, inputs, backend, kept)
    for name, tensor in guarded.items():
        assert not tensor.isnan().any(), name
    plain, _ = run(case, values, backend, kept)
    for name, tensor in plain.items():
        assert torch.equal(guarded[name], tensor), f"{case.id} {name} depends on memory that is not its own"
