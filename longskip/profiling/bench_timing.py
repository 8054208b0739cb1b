"""Clocks of ``bench kernels``: interleaved device times, the run's own ceilings, peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Work = Callable[[], Any]
BEYOND = 1.1  # times its ceiling: what an op can reach by noise and no more
SHORT_MS = 0.05  # below it a launch's own time counts, so a graph's replay is timed as well
_FLUSH_BYTES = 256 << 20  # more than any second-level cache
_LEAD_CYCLES = 1_000_000  # about half a millisecond in which the host gets ahead of the device


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentiles."""
    if len(values) == 1:
        return dict.fromkeys(("median", "p20", "p80"), values[0])
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "p20": fifths[0], "p80": fifths[3]}


def interleaved(works: Mapping[str, Work], device: torch.device, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each work, taken in turns A B C A B C …, after a write past the second-level cache each time."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
        work()
    if device.type != "cuda":
        for _ in range(repeats):
            for name, work in works.items():
                begin = time.perf_counter()
                work()
                times[name].append((time.perf_counter() - begin) * 1e3)
        return {name: spread(values) for name, values in times.items()}
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            torch.cuda._sleep(_LEAD_CYCLES)  # else the host's own time counts where the work is short
            pair[0].record()
            work()
            pair[1].record()
            marks[name].append(pair)
    torch.cuda.synchronize(device)
    return {name: spread([first.elapsed_time(last) for first, last in pairs]) for name, pairs in marks.items()}


def replayed(work: Work, device: torch.device, repeats: int) -> dict[str, float] | None:
    """Milliseconds of a CUDA graph's replay of forward work; None where it cannot be captured.

    A backward runs on the stream of its forward, outside the capture, and is not asked for.
    """
    before = torch.cuda.current_stream(device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        torch.cuda.current_stream(device).wait_stream(stream)
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:  # what torch raises for work that asks the host in between
        torch.cuda.set_stream(before)  # a capture that fails does not put it back
        torch.cuda.synchronize(device)
        return None
    return interleaved({"graph": graph.replay}, device, repeats)["graph"]


def peak_bytes(work: Work, device: torch.device) -> int | None:
    """Device memory that one run of the work needs beyond what lies there; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = work()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this device reaches in this process: TFLOP/s of a large product, GB/s (read + write) of a large copy."""
    size, length = (8192, 1 << 30) if device.type == "cuda" else (1024, 1 << 26)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randint(0, 127, (length,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    works: dict[str, Work] = {"matmul": lambda: torch.mm(a, b), "copy": lambda: target.copy_(source)}
    found = interleaved(works, device, 20 if device.type == "cuda" else 3)
    return {
        "matmul_tflops": 2 * size**3 / found["matmul"]["median"] / 1e9,
        "copy_gbps": 2 * length / found["copy"]["median"] / 1e6,
    }
