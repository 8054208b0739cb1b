"""fvcore sees our custom ops with what they declare: the model's count by `triton` is that of the closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fvcore.nn import FlopCountAnalysis

from longskip import kernels
from longskip.profiling.fvcore_handles import handles
from longskip.profiling.kernel_cases import KernelCase

CASES = [
    KernelCase("attention", "packed", "tokens", 5, {"q": (2, 5, 3, 2, 32)}),
    KernelCase("mlp", "small", "width", 8, {"x": (2, 3, 8), "w1": (16, 8), "b1": (16,), "w2": (8, 16), "b2": (8,)}),
    KernelCase("swiglu", "small", "width", 8, {"x": (2, 3, 8), "w_gate": (16, 8), "w_up": (16, 8), "w_down": (8, 16)}),
    KernelCase(
        "skip_linear", "small", "width", 8, {"x": (2, 3, 8), "skip": (2, 3, 8), "weight": (8, 16), "bias": (8,)}
    ),
    KernelCase("adaln", "small", "width", 8, {"x": (2, 3, 8), "shift": (2, 8), "scale": (2, 8)}),
]


class Call(torch.nn.Module):
    def __init__(self, case: KernelCase) -> None:
        super().__init__()
        self.case = case

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.case.call(dict(zip(self.case.inputs, tensors, strict=True)), {})


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.op)
@pytest.mark.filterwarnings("ignore")
def test_fvcore_counts_what_the_op_declares(case: KernelCase) -> None:
    leaves, _ = case.tensors(torch.device("cpu"), torch.float32)
    with kernels.use("triton", case.op):
        counted = FlopCountAnalysis(Call(case), tuple(leaf.detach() for leaf in leaves.values()))
        counted.unsupported_ops_warnings(False).tracer_warnings("none")
        assert counted.set_op_handle(**handles()).total() == kernels.op_cost(case.op, **leaves).macs
        assert not [name for name in counted.unsupported_ops() if name.startswith("longskip::")]
