"""What the public functions check before a backend sees its arguments: types, shapes, dtypes, devices.

Only Python integers and dtypes are compared, never a tensor's values, so the checks cost microseconds, are traced
through by ``torch.compile`` and hold under ``vmap`` and on the meta device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from longskip.errors import KernelArgumentError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def refuse(op: str, name: str, came: Any, allowed: str, cure: str | None = None) -> NoReturn:
    """Raise the room's argument error: which argument of which op, what came, what is allowed."""
    raise KernelArgumentError(f"{op}: {name} is {came}; allowed: {allowed}", cure=cure)


def check_float(op: str, name: str, tensor: Any, shape: Sequence[int | None], axes: str) -> None:
    """Refuse anything but a floating tensor of ``shape`` (None: any size); ``axes`` is the shape in words."""
    if not isinstance(tensor, Tensor):
        refuse(op, name, f"a {type(tensor).__name__}", "a torch.Tensor")
    if tensor.dtype not in FLOATS:
        refuse(op, name, f"of dtype {tensor.dtype}", "float32, bfloat16, float16 or float64")
    check_shape(op, name, tensor, shape, axes)


def check_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int | None], axes: str) -> None:
    """Refuse a tensor whose shape differs from ``shape`` (None: any size)."""
    fits = tensor.ndim == len(shape)
    if fits:
        for size, wanted in zip(tensor.shape, shape, strict=True):
            if wanted is not None and size != wanted:
                fits = False
    if not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        refuse(op, name, f"of shape {tuple(tensor.shape)}", f"{axes} = ({sizes})")


def check_like(
    op: str, name: str, tensor: Any, other_name: str, other: Tensor, shape: Sequence[int | None], axes: str
) -> None:
    """``check_float``, and the dtype and device of ``other``."""
    check_float(op, name, tensor, shape, axes)
    if tensor.dtype != other.dtype:
        refuse(op, name, f"of dtype {tensor.dtype}", f"{other_name}'s dtype {other.dtype}", "cast one of the two")
    check_device(op, name, tensor, other_name, other)


def check_affine(op: str, name: str, tensor: Any, other_name: str, other: Tensor, width: int) -> None:
    """A norm's weight or bias ``(width,)``: in the dtype of ``other`` or in float32."""
    check_float(op, name, tensor, (width,), "(width,)")
    if tensor.dtype not in (other.dtype, torch.float32):
        refuse(op, name, f"of dtype {tensor.dtype}", f"{other_name}'s dtype {other.dtype} or float32")
    check_device(op, name, tensor, other_name, other)


def check_device(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse a tensor that is not where ``other`` is."""
    if tensor.device != other.device:
        refuse(op, name, f"on {tensor.device}", f"{other_name}'s device {other.device}", "move one of the two")


def check_rows(op: str, name: str, tensor: Any) -> int:
    """A floating tensor ``(..., width)`` with at least one axis and a width of at least 1; returns the width."""
    if not isinstance(tensor, Tensor):
        refuse(op, name, f"a {type(tensor).__name__}", "a torch.Tensor")
    if tensor.dtype not in FLOATS:
        refuse(op, name, f"of dtype {tensor.dtype}", "float32, bfloat16, float16 or float64")
    if tensor.ndim < 1 or tensor.shape[-1] < 1:
        refuse(op, name, f"of shape {tuple(tensor.shape)}", "(..., width) with width >= 1")
    return tensor.shape[-1]


def check_epsilon(op: str, eps: float) -> None:
    """Refuse an eps that is negative, NaN or infinite."""
    if not 0.0 <= eps < float("inf"):
        refuse(op, "eps", eps, "a finite number >= 0")


def check_choice(op: str, name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Refuse a value outside a closed list."""
    if value not in allowed:
        refuse(op, name, repr(value), ", ".join(map(repr, allowed)))


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that statistics are kept in: float32, or float64 when it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def cpu_half(tensor: Tensor) -> bool:
    """True where torch's own layer norm (2.13, CPU) breaks the rule that statistics are float32.

    For half-precision inputs its backward sums the gradients of weight and bias in the tensors' dtype (in bfloat16 a
    bias gradient is off by 7% of its size at 4,096 rows, 32% at 16,384; float32 first: 0.3%), and its saved mean and
    reciprocal deviation are rounded to it.
    """
    return tensor.device.type == "cpu" and tensor.dtype in (torch.bfloat16, torch.float16)
