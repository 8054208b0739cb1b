"""Where Triton runs, and the one way in which kernels are launched and their results allocated.

A kernel is launched by ``launch`` only, with plain tensors and numbers, so that the same host function runs it on a GPU,
runs it in Triton's interpreter (``TRITON_INTERPRET=1`` before the import) or, inside ``captured``, hands out what the
just-in-time compiler would be given, so that every kernel compiles for devices that are not there. Results and
workspaces come from ``empty`` only, so that tests can poison them and put canaries round them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Triton reads the variable when a kernel is defined: so it is read once, here.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
INSTALLED = importlib.util.find_spec("triton") is not None

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Target:
    """A CUDA device as far as kernels are chosen by it: compute capability, multiprocessors, shared memory per block."""

    name: str
    capability: int
    multiprocessors: int
    shared_bytes: int


# Compute capability -> (multiprocessors, opt-in shared memory per block) of the device that is compiled for without one
# (CUDA programming guide, technical specifications per compute capability; A100, H200, B200 data sheets).
TARGETS: dict[int, Target] = {
    80: Target("NVIDIA A100", 80, 108, 163 * 1024),
    90: Target("NVIDIA H200", 90, 132, 227 * 1024),
    100: Target("NVIDIA B200", 100, 148, 227 * 1024),
}
# What a kernel is laid out for in the interpreter: few programs, so that the loops over many are run through as well.
_INTERPRETER = Target("interpreter", 90, 3, 227 * 1024)


@dataclass(frozen=True)
class Launch:
    """One launch that was captured: the kernel, its grid, its arguments in order, its constants and compiler options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]


_captured: list[Launch] | None = None
_captured_target: Target | None = None


def unusable(device: torch.device) -> str | None:
    """Why no Triton kernel can run on the device; None where it can."""
    if not INSTALLED:
        return "triton is not installed"
    if device.type == "cuda":
        if INTERPRETED:
            return "TRITON_INTERPRET is set, which runs on the CPU"
        return None
    if device.type == "meta":
        return None if capturing() or loads() else "it needs a CUDA device, or TRITON_INTERPRET=1"
    if device.type == "cpu":
        return None if INTERPRETED else "it needs a CUDA device, or TRITON_INTERPRET=1 to be interpreted on the CPU"
    return f"it needs a CUDA device, not {device.type}"


def loads() -> bool:
    """Whether the Triton halves of the ops are imported with the ops: where a kernel can run."""
    return INSTALLED and (INTERPRETED or torch.cuda.is_available())


def unfit_dtype(dtype: torch.dtype) -> str | None:
    """Why no Triton kernel takes the dtype; None for float32, bfloat16 and float16."""
    if dtype not in KERNEL_DTYPES:
        return f"its kernels take {', '.join(str(d).removeprefix('torch.') for d in KERNEL_DTYPES)}, not {dtype}"
    if dtype == torch.bfloat16 and INTERPRETED:
        return "Triton's interpreter does not compute in bfloat16"
    return None


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous result or workspace, not yet written."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)``; nothing where the grid is empty.

    ``constants`` are the kernel's ``constexpr`` arguments and the compiler's options (``num_warps``, ``num_stages``).
    """
    grid = tuple(int(size) for size in grid)
    if 0 in grid:
        return
    if _captured is not None:
        _captured.append(Launch(kernel, grid, arguments, constants))
        return
    device = next((value.device for value in arguments if isinstance(value, Tensor)), None)
    if device is not None and device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device and its stream
            kernel[grid](*arguments, **constants)
    else:
        kernel[grid](*arguments, **constants)


def launch_errors() -> tuple[type[Exception], ...]:
    """What a kernel that a device or its compiler refuses raises."""
    from triton.errors import TritonError

    return (RuntimeError, ValueError, TritonError)


@contextlib.contextmanager
def captured(target: Target) -> Iterator[list[Launch]]:
    """Inside, nothing is launched: the list that is handed out takes every launch, laid out for ``target``."""
    global _captured, _captured_target
    before = _captured, _captured_target
    _captured, _captured_target = [], target
    try:
        yield _captured
    finally:
        _captured, _captured_target = before


def capturing() -> bool:
    return _captured is not None


def target_of(device: torch.device) -> Target:
    """The device that a kernel is laid out for."""
    if _captured_target is not None:
        return _captured_target
    return _cuda_target(device.index) if device.type == "cuda" else _INTERPRETER


@functools.cache
def _cuda_target(index: int | None) -> Target:
    properties = torch.cuda.get_device_properties(index if index is not None else torch.cuda.current_device())
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or 99 * 1024
    capability = properties.major * 10 + properties.minor
    return Target(properties.name, capability, properties.multi_processor_count, shared)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
