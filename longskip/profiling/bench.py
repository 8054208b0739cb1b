"""``bench kernels``, the measuring half: every op beside its rivals, forward, backward and both, through autograd.

    python -m longskip.profiling.bench --op adaln --out adaln.json

Standard library, torch and triton only; plots and pages are made of its JSON elsewhere (``longskip bench render``). An
op's figures are printed only when its outputs and gradients pass the check against float64. On a CPU the plain torch form
is timed so that the command can be tried; those rows claim nothing about speed.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import longskip
from longskip import kernels
from longskip.errors import BackendError, LongskipError
from longskip.kernels import jit, tables
from longskip.profiling import bench_optimizer, bench_timing, bench_tuning
from longskip.profiling.bench_packed import Call, Layout
from longskip.profiling.bench_providers import Provider, providers
from longskip.profiling.bench_timing import Work
from longskip.profiling.kernel_cases import CASES, SWEEP, KernelCase

MODES = ("forward", "backward", "both")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


_SAME = Layout(lambda tensor, extra: tensor, lambda tensor, extra: tensor)


def run(
    call: Call, leaves: Mapping[str, Tensor], extra: Mapping[str, Any], layout: Layout | None = None
) -> dict[str, Tensor]:
    """Outputs and gradients by name; the cotangents are ones of alternating sign, the same for every provider."""
    layout = layout or _SAME
    leaves = _laid_out(leaves, extra, layout)
    outputs = call(leaves, extra)
    cotangents = _cotangents(outputs, extra, layout)
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
    named = {f"out{at}": layout.back(out.detach(), extra) for at, out in enumerate(outputs)}
    return named | {
        f"d{name}": layout.back(grad, extra) for name, grad in zip(leaves, grads, strict=True) if grad is not None
    }


def _laid_out(leaves: Mapping[str, Tensor], extra: Mapping[str, Any], layout: Layout) -> dict[str, Tensor]:
    return {name: layout.there(leaf.detach(), extra).requires_grad_() for name, leaf in leaves.items()}


def _cotangents(outputs: Iterable[Tensor], extra: Mapping[str, Any], layout: Layout) -> list[Tensor]:
    found = []
    for out in outputs:
        plain = layout.back(out.detach(), extra)
        sign = torch.arange(plain.numel(), device=out.device) % 7 - 3
        found.append(layout.there((sign.to(out.dtype) / 4).view(plain.shape), extra))
    return found


def check(
    case: KernelCase, call: Call, device: torch.device, dtype: torch.dtype, layout: Layout | None = None
) -> tuple[float, str | None]:
    """(largest error over the allowed one, what fails): err <= 2 err of eager torch + rounding noise, per tensor."""
    small = case.smaller(1)
    leaves, extra = small.tensors(device, dtype)
    ours = run(call, leaves, extra, layout)
    with kernels.use("torch", case.op):
        eager = run(small.call, leaves, extra)
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    with kernels.use("reference", case.op):
        exact = run(small.call, wide, extra)
    worst, failed = 0.0, None
    for name, reference in exact.items():
        if name not in ours:
            continue
        rounded = reference.to(ours[name].dtype)
        noise = 2 * ((rounded + 0.3 - 0.3) - rounded).abs().max().item()
        allowed = 2 * (eager[name].double() - reference).abs().max().item() + noise
        error = (ours[name].double() - reference).abs().max().item()
        if not error <= allowed:
            failed = failed or f"{name}: error {error:.3g} against float64, allowed {allowed:.3g}"
        worst = max(worst, error / allowed if allowed else 0.0)
    return worst, failed


def works_of(
    call: Call, leaves: Mapping[str, Tensor], extra: Mapping[str, Any], layout: Layout | None = None
) -> dict[str, Work]:
    """The three modes as work without arguments."""
    layout = layout or _SAME
    leaves = _laid_out(leaves, extra, layout)
    outputs = call(leaves, extra)
    cotangents = _cotangents(outputs, extra, layout)
    inputs = list(leaves.values())

    def backward() -> Any:
        return torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, allow_unused=True)

    def both() -> Any:
        return torch.autograd.grad(call(leaves, extra), inputs, cotangents, allow_unused=True)

    return {"forward": lambda: call(leaves, extra), "backward": backward, "both": both}


def bench_case(
    case: KernelCase,
    found: Sequence[Provider],
    device: torch.device,
    dtype: torch.dtype,
    limits: Mapping[str, float],
    repeats: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Rows of one case: one per provider and mode."""
    torch._dynamo.reset()
    leaves, extra = case.tensors(device, dtype)
    works: dict[str, dict[str, Work]] = {}
    rows: list[dict[str, Any]] = []
    errors: dict[str, float] = {}
    refusals: tuple[type[Exception], ...] = (LongskipError, ImportError, *jit.launch_errors())
    for provider in found:
        try:
            call = provider.make(case)
            if isinstance(call, str):
                continue
            errors[provider.name], failed = check(case, call, device, dtype, provider.layout)
            if failed is None:
                works[provider.name] = works_of(call, leaves, extra, provider.layout)
        except refusals as error:
            failed = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if failed is not None:
            say(f"{case.id} {provider.name}: left out, {failed}")
            rows.append({**_head(case, dtype, provider), "mode": "both", "failed": failed})
    costs = _costs(case, leaves, extra)
    for mode in MODES:
        times = bench_timing.interleaved({name: work[mode] for name, work in works.items()}, device, repeats)
        for provider in found:
            if provider.name not in times:
                continue
            took = times[provider.name]
            row = {**_head(case, dtype, provider), "mode": mode, "ms": took, "error_share": errors[provider.name]}
            row |= _rates(*costs[mode], took["median"], limits)
            if device.type == "cuda" and mode == "forward" and took["median"] < bench_timing.SHORT_MS:
                row["graph_ms"] = bench_timing.replayed(works[provider.name][mode], device, repeats)
            if mode == "both":
                row["peak_bytes"] = bench_timing.peak_bytes(works[provider.name][mode], device)
            rows.append(row)
            say(_line(row))
    return rows


def _head(case: KernelCase, dtype: torch.dtype, provider: Provider) -> dict[str, Any]:
    return {
        "op": case.op,
        "case": case.label,
        "x_name": case.x_name,
        "x": case.x,
        "series": case.series,
        "sweep": case.sweep,
        "dtype": str(dtype).removeprefix("torch."),
        "provider": provider.name,
        "version": provider.version,
        "ours": provider.ours,
    }


def _costs(case: KernelCase, leaves: Mapping[str, Tensor], extra: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(contraction FLOPs, bytes) by mode, as declared."""
    arguments: dict[str, Any] = {**leaves, **extra}
    forward = kernels.op_cost(case.op, **arguments)
    backward = kernels.op_cost(case.op, direction="backward", **arguments)
    both = forward + backward
    return {name: (c.flops, c.bytes) for name, c in (("forward", forward), ("backward", backward), ("both", both))}


def _rates(flops: int, moved: int, ms: float, limits: Mapping[str, float]) -> dict[str, Any]:
    rates: dict[str, Any] = {"flops": flops, "bytes": moved, "gbps": moved / ms / 1e6}
    rates["copy_share"] = rates["gbps"] / limits["copy_gbps"]
    if flops:
        rates["tflops"] = flops / ms / 1e9
        rates["matmul_share"] = rates["tflops"] / limits["matmul_tflops"]
    return rates


def _line(row: Mapping[str, Any]) -> str:
    rate = f"{row['tflops']:.3g} TFLOP/s" if "tflops" in row else f"{row['gbps']:.0f} GB/s"
    share = row["matmul_share"] if "tflops" in row else row["copy_share"]
    took = row["ms"]
    doubt = (
        " (more than there is: caches gave it, or something disturbed the ceilings)"
        if share > bench_timing.BEYOND
        else ""
    )
    return (
        f"{row['op']} {row['case']} {row['mode']:8} {row['provider']:14} {took['median']:8.4f} ms "
        f"({took['p20']:.4f}–{took['p80']:.4f})  {rate}, {share:.0%} of this run's ceiling{doubt}"
    )


# -- the command -------------------------------------------------------------------------------------------------------


def bench(
    cases: Sequence[KernelCase],
    *,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    tuning: bool = False,
    optimizer: bool = True,
    command: str = "",
    commit: str | None = None,
    inductor: Sequence[str] = ("default",),
    say: Callable[[str], None] = lambda line: None,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Everything as one JSON object; ``keep`` is handed what there is after the tuning and after every case."""
    found, missing = providers(device, inductor)
    claim = device.type == "cuda"
    if not claim:
        cases = [case.smaller(1) for case in cases if case.x_name != "tokens" or case.x < 4000]
        say("no GPU here: the plain torch form is timed on the CPU; these rows are no claim about speed")
    limits = bench_timing.ceilings(device, dtype)
    say(f"ceilings of this run: {limits['matmul_tflops']:.3g} TFLOP/s, {limits['copy_gbps']:.0f} GB/s copied")
    tuned: dict[str, Any] = {}
    if tuning and claim:

        def both(case: KernelCase) -> Work:
            return works_of(case.call, *case.tensors(device, dtype))["both"]

        tuned = bench_tuning.tune([c for c in cases if not c.sweep], both, device, max(10, repeats // 4), say)
    rows: list[dict[str, Any]] = []
    result = {
        "command": command,
        "commit": commit or _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "device": torch.cuda.get_device_name(device) if claim else platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), "longskip": longskip.__version__}
        | {provider.name: provider.version for provider in found},
        "missing": missing,
        "claim": claim,
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": repeats,
        "ceilings": limits,
        "configurations": tuned,
        "backends": {},
        "rows": rows,
    }
    keep(result)
    with tables.chosen(tuned):
        for case in cases:
            rows += bench_case(case, found, device, dtype, limits, repeats, say)
            result["backends"] = bench_tuning.fastest(rows, cases, dtype) if claim else {}
            keep(result)
        if optimizer:
            rows += bench_optimizer.rows(device, limits, repeats, say)
            keep(result)
    return result


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


LIGER_COLUMNS = (
    "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit", "x_name", "x_label", "x_value",
    "y_value_50", "y_value_20", "y_value_80", "extra_benchmark_config_str", "gpu_name", "timestamp", "liger_version",
)  # fmt: skip


def write_csv(result: Mapping[str, Any], path: Path) -> None:
    """The rows in the column layout of Liger-Kernel's benchmark data."""
    modes = {"forward": "forward", "backward": "backward", "both": "full"}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, LIGER_COLUMNS)
        writer.writeheader()
        for row in result["rows"]:
            if "ms" not in row:
                continue
            head = {
                "kernel_name": row["op"],
                "kernel_provider": row["provider"],
                "kernel_operation_mode": modes[row["mode"]],
                "x_name": row["x_name"],
                "x_label": row["x_name"],
                "x_value": row["x"],
                "extra_benchmark_config_str": json.dumps({"case": row["case"], "dtype": row["dtype"]}),
                "gpu_name": result["device"],
                "timestamp": result["date"],
                "liger_version": result["versions"].get("liger", ""),
            }
            took = row["ms"]
            times = {"y_value_50": took["median"], "y_value_20": took["p20"], "y_value_80": took["p80"]}
            writer.writerow({**head, "metric_name": "speed", "metric_unit": "ms", **times})
            if row.get("peak_bytes") is not None:
                size = dict.fromkeys(("y_value_50", "y_value_20", "y_value_80"), row["peak_bytes"] / 2**20)
                writer.writerow({**head, "metric_name": "memory", "metric_unit": "MB", **size})


def chosen_cases(ops: Sequence[str], shapes: Sequence[str], sweep: bool = False) -> list[KernelCase]:
    """The cases of these ops whose label contains one of ``shapes``, with those of the sweep last where it is asked for.

    Raises BackendError where there is none.
    """
    known = {case.op for case in CASES}
    for op in ops:
        if op not in known | {"adamw"}:
            raise BackendError(f"--op {op!r}; known: {', '.join(sorted(known | {'adamw'}))}")
    there = [case for case in (*CASES, *(SWEEP if sweep else ())) if not ops or case.op in ops]
    cases = [case for case in there if not shapes or any(part in case.label for part in shapes)]
    if not cases and "adamw" not in ops:
        labels = ", ".join(case.label for case in there)
        raise BackendError(f"--shapes {' '.join(shapes)}: no case of that name; known: {labels}")
    return cases


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="longskip bench kernels", description="Every kernel beside its rivals, in one run."
    )
    parser.add_argument("--op", action="append", default=[], help="only this op; may be repeated")
    parser.add_argument(
        "--shapes", action="append", default=[], help="only cases whose label contains this; may be repeated"
    )
    parser.add_argument(
        "--sweep", action=argparse.BooleanOptionalAction, help="attention over many lengths; by default on a GPU only"
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--repeats", type=int, help="of every measurement: 50 on a GPU, 3 on a CPU")
    parser.add_argument("--tune", action="store_true", help="try every configuration first and take the fastest")
    parser.add_argument("--inductor", default="default", help="torch.compile's modes, by commas: default, max, none")
    parser.add_argument("--save", action="store_true", help="keep what was found fastest in the user's cache folder")
    parser.add_argument("--into-package", action="store_true", help="for developers: keep it in the package")
    parser.add_argument("--out", type=Path, help="write FILE.json and FILE.csv")
    parser.add_argument("--commit", help="what to write as the commit where there is no repository")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[options.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    cases = chosen_cases(options.op, options.shapes, device.type == "cuda" if options.sweep is None else options.sweep)
    folders = [
        folder
        for wanted, folder in ((options.save, tables.user_folder()), (options.into_package, tables.PACKAGE_FOLDER))
        if wanted
    ]
    if folders and device.type != "cuda":
        raise BackendError("nothing to keep: no GPU here", cure="run it on the GPU that the table is for")

    def keep(result: dict[str, Any]) -> None:
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
            write_csv(result, options.out.with_suffix(".csv"))
        table = {name: result[name] for name in ("device", "versions", "backends", "configurations")}
        for folder in folders:
            tables.save({**table, "measured": result["date"]}, folder)

    result = bench(
        cases,
        device=device,
        dtype=dtype,
        repeats=options.repeats or (50 if device.type == "cuda" else 3),
        tuning=options.tune,
        optimizer=not options.op or "adamw" in options.op,
        command="python -m longskip.profiling.bench " + " ".join(arguments if arguments is not None else sys.argv[1:]),
        commit=options.commit,
        inductor=options.inductor.split(","),
        keep=keep,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
