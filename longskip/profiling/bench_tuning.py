"""``bench kernels --tune``: which constants, and which backend, are fastest on this device, per kernel and bucket."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from longskip import kernels
from longskip.kernels import backends, jit, tables
from longskip.profiling import bench_timing
from longskip.profiling.bench_timing import Work
from longskip.profiling.kernel_cases import KernelCase
from longskip.profiling.static import choices_of


def tune(
    cases: Sequence[KernelCase],
    works: Callable[[KernelCase], Work],
    device: torch.device,
    repeats: int,
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """The fastest constants of every kernel and bucket that the cases ask for: ``{kernel: {bucket: constants}}``.

    ``works(case)`` is a forward and backward of the case through the public function.
    """
    best: dict[str, dict[str, tuple[float, dict[str, Any]]]] = {}
    for case in cases:
        with kernels.use("require:triton", case.op), tables.recorded() as asked:
            work = works(case)
            work()
            for kernel, where in sorted(set(asked)):
                rivals: dict[str, Work] = {}
                constants = choices_of(case).get(kernel, ())
                for at, chosen in enumerate(constants):
                    with tables.forced({kernel: chosen}):
                        try:
                            work()
                        except jit.launch_errors() as error:  # the device or its compiler refuses it
                            say(f"{kernel} {chosen}: {type(error).__name__}")
                            continue
                    rivals[str(at)] = _forced_work(work, kernel, chosen)
                if len(rivals) > 1:
                    times = bench_timing.interleaved(rivals, device, repeats)
                    first = min(times, key=lambda name: times[name]["median"])
                    took = times[first]["median"]
                    if took < best.setdefault(kernel, {}).get(where, (float("inf"), {}))[0]:
                        best[kernel][where] = took, dict(constants[int(first)])
                        say(f"{kernel} [{where}]: {constants[int(first)]} ({took:.4f} ms of {case.id})")
    return {kernel: {where: constants for where, (_, constants) in found.items()} for kernel, found in best.items()}


def _forced_work(work: Work, kernel: str, constants: Mapping[str, Any]) -> Work:
    def forced() -> Any:
        with tables.forced({kernel: constants}):
            return work()

    return forced


def fastest(
    rows: Sequence[Mapping[str, Any]], cases: Sequence[KernelCase], dtype: torch.dtype
) -> dict[str, dict[str, Any]]:
    """The backend to take per op and bucket, forward and backward together: what ``auto`` reads."""
    table: dict[str, dict[str, Any]] = {}
    for case in cases:
        times = {
            row["provider"]: row["ms"]["median"]
            for row in rows
            if row["op"] == case.op and row["case"] == case.label and row["mode"] == "both" and "ms" in row
        }
        known = {name: times[name] for name in ("triton", "torch") if name in times}
        if len(known) > 1:
            leaves, extra = case.tensors(torch.device("meta"), dtype)
            where = tables.bucket(dtype, backends.sizes_of(case.op, **leaves, **extra))
            best = min(known, key=lambda name: known[name])
            table.setdefault(case.op, {})[where] = {"backend": best, "milliseconds": known}
    return table
