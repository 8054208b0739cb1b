"""The kernels on a GPU: every op and gradient in bf16, fp16 and fp32 against float64, every configuration, determinism,
addresses beyond 2³¹ elements, and compute-sanitizer where it is installed. ``pytest -m gpu``; needs torch and triton only."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from longskip import kernels
from longskip.kernels import backends, tables
from longskip.kernels.gemm_triton import TILES
from longskip.profiling import bench, static
from longskip.profiling.kernel_cases import CASES as SIZES
from longskip.profiling.kernel_cases import KernelCase
from tests.kernels.kernel_checks import CASES, MANY_ROWS, Case, eager_runs, judge, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICE = torch.device("cuda")


def on_device(case: Case) -> Case:
    fixed = {name: tensor.to(DEVICE) for name, tensor in case.fixed.items()}
    return Case(case.op, case.label, case.inputs, fixed, case.keywords, case.wide)


def refused(case: Case, dtype: torch.dtype) -> str | None:
    values = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in case.inputs.items()}
    sizes = backends._SHAPES[case.op](**values, **case.fixed, **case.keywords)
    return backends._state(case.op, DEVICE, dtype, sizes)["triton"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *MANY_ROWS], ids=lambda c: c.id)
def test_outputs_and_gradients(case: Case, dtype: torch.dtype) -> None:
    reason = refused(case, dtype)
    if reason is not None:
        pytest.skip(reason)
    case = on_device(case)
    values = {name: value.to(DEVICE) for name, value in case.cast(case.values(), dtype).items()}
    ours, cotangents = run(case, values, "require:triton", None)
    eagers = eager_runs(case, values, "triton", cotangents)
    rounded = [c.to(ours[f"out{at}"].dtype).double() for at, c in enumerate(cotangents)]
    exact = run(case, {name: value.double() for name, value in values.items()}, "reference", rounded)[0]
    for name, reference in exact.items():
        judge(f"{case.id} {name}", ours[name], [eager[name] for eager in eagers], reference)


def _choices() -> Iterator[Any]:
    """What each case really asks the tables for, with every answer that they may give."""
    for case in static.covering(SIZES):
        with tables.recorded() as asked:
            static.launches(case, 90)
        choices = static.choices_of(case)
        for kernel in dict.fromkeys(name for name, _ in asked):
            for at, constants in enumerate(choices[kernel]):
                yield pytest.param(case, kernel, constants, id=f"{case.op}-{kernel}-{at}")


@pytest.mark.parametrize(("case", "kernel", "constants"), list(_choices()) if torch.cuda.is_available() else [])
def test_every_configuration(case: KernelCase, kernel: str, constants: dict[str, Any]) -> None:
    def call(leaves: Any, extra: Any) -> tuple[Tensor, ...]:
        with kernels.use("require:triton", case.op), tables.forced({kernel: constants}):
            return case.call(leaves, extra)

    _, failed = bench.check(case, call, DEVICE, torch.bfloat16)
    assert failed is None


@pytest.mark.parametrize("case", static.covering(SIZES), ids=lambda c: c.id)
def test_the_same_call_gives_the_same_bits(case: KernelCase) -> None:
    leaves, extra = case.smaller(4).tensors(DEVICE, torch.bfloat16)
    with kernels.use("require:triton", case.op):
        first = bench.run(case.call, leaves, extra)
        for _ in range(99):
            again = bench.run(case.call, leaves, extra)
            assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    "case", [c for c in SIZES if c.op in ("adaln", "gated_adaln", "layer_norm", "skip_linear")][::4], ids=lambda c: c.id
)
def test_addresses_beyond_two_to_the_31(case: KernelCase) -> None:
    """The last sample of a tensor of more than 2³¹ elements is what it is alone."""
    batch = 2**31 // (case.inputs["x"][1] * case.inputs["x"][2]) + 2
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    large = case.smaller(batch)
    ours = {"skip_linear_out": {"gemm": "triton", **TILES[0]}}  # the library's product is not what is tested
    with torch.no_grad(), kernels.use("require:triton", case.op), tables.forced(ours):
        leaves, extra = large.tensors(DEVICE, torch.bfloat16)
        leaves = {name: leaf.detach() for name, leaf in leaves.items()}
        whole = case.call(leaves, extra)
        alone = case.call({name: leaf[-1:] if leaf.shape[0] == batch else leaf for name, leaf in leaves.items()}, extra)
        for many, one in zip(whole, alone, strict=True):
            assert torch.equal(many[-1:], one)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str) -> None:
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    trivial = [
        program,
        "--error-exitcode",
        "9",
        sys.executable,
        "-c",
        "import torch; torch.ones(1, device='cuda').sum().item()",
    ]
    if subprocess.run(trivial, capture_output=True, timeout=300).returncode:
        pytest.skip("compute-sanitizer does not run here")
    script = "from tests.gpu.small_calls import main; main()"
    done = subprocess.run(
        [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", script],
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_backends_by_dtype_and_shape_resolve_without_error() -> None:
    for case, dtype in itertools.product(static.covering(SIZES), DTYPES):
        leaves, extra = case.tensors(torch.device("meta"), dtype)
        sizes = backends._SHAPES[case.op](**leaves, **extra)
        name, reason = backends._choose(case.op, DEVICE, dtype, sizes)
        assert name in ("torch", "triton") and reason.startswith("auto")
