"""Every kernel compiles for devices that are not here, within their limits, and is the one that the report speaks of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from longskip.errors import BackendError
from longskip.kernels import jit
from longskip.profiling import static
from longskip.profiling.kernel_cases import CASES

REPORT = Path(__file__).parents[2] / "docs" / "results" / "kernels-static.json"


def compiled(*targets: int) -> dict[str, Any]:
    """The covering set in a process of its own: in this one kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "longskip.profiling.static", "--json", "--targets", ",".join(map(str, targets))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.stdout.startswith("{"), done.stderr[-3000:]
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def judge(report: dict[str, Any], *targets: int) -> None:
    assert report["faults"] == []
    rows = static.rows_of(report)
    for target in targets:
        of_target = [row for row in rows if row["target"] == target]
        assert {row["kernel"] for row in of_target} == set(report["sources"]), "a kernel is missing on a target"
        assert all(row["registers"] > 0 and sum(row["instructions"]) for row in of_target if row["error"] is None)
    matrix = {row["kernel"] for row in rows if row["tensor_cores"]}
    assert {"_attention_forward", "_products", "_gelu_product"} <= matrix
    assert not {"_rows_forward", "_adamw", "_loss_forward"} & matrix


def test_a_covering_set_compiles_for_sm_90() -> None:
    judge(compiled(90), 90)


@pytest.mark.slow
def test_a_covering_set_compiles_for_sm_80_and_sm_100() -> None:
    judge(compiled(80, 100), 80, 100)


def test_every_kernel_is_the_one_of_the_report() -> None:
    """`make proofs` compiles all and writes the report anew; commit it with the kernel."""
    report = json.loads(REPORT.read_text())
    static._load()
    modules = [module for family in static.backends.FAMILIES for module in static.modules_of(family)]
    for kernel, source in report["sources"].items():
        here = {static.source_hash(getattr(m, kernel)) for m in modules if hasattr(getattr(m, kernel, None), "fn")}
        assert here == {source}, f"{kernel} differs from docs/results/kernels-static.json: run `make proofs`"
    targets = {(row["kernel"], row["target"]) for row in static.rows_of(report)}
    everywhere = {(kernel, target) for kernel in report["sources"] for target in jit.TARGETS}
    # K and V of a head stay in shared memory on Hopper only; elsewhere that kernel would spill, and is never taken.
    assert targets == everywhere - {("_attention_forward_resident", target) for target in (80, 100)}
    assert report["faults"] == []


def test_launches_are_captured_with_the_arguments_of_the_call() -> None:
    case = next(case for case in CASES if case.op == "diffusion_loss")
    found = static.launches(case, 90, torch.float32)
    assert [launch.kernel.__name__ for launch in found] == ["_loss_forward", "_loss_sum", "_loss_backward"]
    batch, values = case.inputs["prediction"][0], torch.Size(case.inputs["prediction"][1:]).numel()
    assert found[0].grid == (batch, jit.cdiv(values, 2048))
    assert found[0].arguments[7] == values and found[0].constants["GRADIENT"] is True
    assert not jit.capturing()


def test_hashes_see_what_a_kernel_calls_and_not_where_it_stands() -> None:
    from longskip.kernels import loss_triton

    forward, total = loss_triton._loss_forward, loss_triton._loss_sum
    sources = static._sources(forward.fn, set())
    assert any("def _factor" in source for source in sources), "a called function is part of the kernel"
    assert static.source_hash(forward) == static.source_hash(forward) != static.source_hash(total)


def made(**changes: Any) -> static.Compiled:
    base = {
        "kernel": "_adamw", "source": "x", "target": 90, "constants": {}, "signature": "", "aligned": True, "default": True,
        "case": "c", "registers": 10,
    }  # fmt: skip
    return static.Compiled(**{**base, **changes})


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"spill_bytes": 8}, "8 bytes of stack, allowed 0"),
        ({"shared_bytes": 228 * 1024}, "the device has 232448"),
        ({"error": "PTXASError: no"}, "PTXASError: no"),
        ({"kernel": "_attention_forward"}, "no wgmma.mma_async"),
        ({"spill_bytes": 8, "default": False}, None),
        ({"spill_bytes": 8, "aligned": False}, None),
    ],
)
def test_faults_are_what_breaks_the_limits_by_default(changes: dict[str, Any], fault: str | None) -> None:
    found = static.faults([made(**changes)])
    assert (not found) if fault is None else any(fault in line for line in found)


def test_a_process_that_interprets_cannot_compile() -> None:
    with pytest.raises(BackendError, match="interpreted in this process"):
        static.compile_all([])
