"""One small call of every op, forward and backward, for tools that watch memory accesses."""

from __future__ import annotations

import torch

from longskip import kernels
from longskip.profiling import bench, static
from longskip.profiling.kernel_cases import CASES


def main() -> None:
    for case in static.covering(CASES):
        small = case.smaller(1)
        leaves, extra = small.tensors(torch.device("cuda"), torch.bfloat16)
        with kernels.use("require:triton", case.op):
            bench.run(small.call, leaves, extra)
    torch.cuda.synchronize()
