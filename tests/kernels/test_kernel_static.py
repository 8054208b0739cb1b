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
from longskip.kernels.attention_triton import HEAD_DIMS
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


def test_the_report_holds_every_form_of_attention() -> None:
    """Plain, masked and packed, of every head dim that the kernels take, on every target."""
    rows = static.rows_of(json.loads(REPORT.read_text()))
    short = {head_dim for head_dim in HEAD_DIMS if head_dim <= 64}
    for kernel, dims in (
        ("_attention_forward", set(HEAD_DIMS)),
        ("_attention_backward_keys", set(HEAD_DIMS)),
        ("_attention_backward_queries", set(HEAD_DIMS)),
        ("_attention_backward_short", short),
    ):
        for target in jit.TARGETS:
            found = [row for row in rows if row["kernel"] == kernel and row["target"] == target and row["default"]]
            for form in ("uint8", "int64"):
                head_dims = {
                    int(part.removeprefix("HEAD_DIM="))
                    for row in found
                    if form in row["signature"].split()
                    for part in row["constants"].split()
                    if part.startswith("HEAD_DIM=")
                }
                assert head_dims == dims, (kernel, target, form)


def test_packed_attention_is_compiled_with_its_offsets() -> None:
    """The first and the longest case of the op: the short backward with one stage of loads, and the two long kernels."""
    first, longest = (case for case in static.covering() if case.op == "attention_varlen")
    found = static.launches(first, 90, torch.float16)
    assert [launch.kernel.__name__ for launch in found] == ["_attention_forward", "_attention_backward_short"]
    assert found[1].constants["num_stages"] == 1
    for launch in found:
        offsets = [a for a in launch.arguments if isinstance(a, torch.Tensor) and a.dtype == torch.int64]
        assert [offset.numel() for offset in offsets] == [len(first.lengths) + 1] * 2
    assert [launch.grid for launch in found] == [
        (64 * 16 * jit.cdiv(334, 128),),
        (2 * jit.TARGETS[90].multiprocessors,),
    ]
    assert {launch.kernel.__name__ for launch in static.launches(longest, 90, torch.float16)} == {
        "_attention_forward", "_attention_delta", "_attention_backward_keys", "_attention_backward_queries",
    }  # fmt: skip


def test_tuned_constants_of_packed_and_masked_calls_are_kept_apart() -> None:
    """A table's entry for one form is none for another: their registers differ."""
    buckets = {}
    for case in (c for c in CASES if c.op.startswith("attention") and "Dh64" in c.label and c.x == 334):
        with static.tables.recorded() as asked:
            static.launches(case, 90, torch.float16)
        buckets[case.id] = {where for kernel, where in asked if kernel == "_attention_backward_short"}
    assert len(buckets) == 3 and len(set().union(*buckets.values())) == 3, buckets


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
        ({"spill_bytes": 8, "case": CASES[0].id}, "8 bytes of stack, allowed 0"),
        ({"spill_bytes": 40, "case": "attention-T334-Dh96-H16-B64-masked"}, None),
        ({"spill_bytes": 48, "case": "attention-T334-Dh96-H16-B64-masked"}, "48 bytes of stack, allowed 40"),
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
