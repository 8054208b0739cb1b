"""Multiply-adds that our Triton kernels execute beyond the shapes they are called with: padded tiles, padded heads.

The kernels' own host functions say which kernel and which tile serve a call on a device (defaults, or what the tables
name): the call is made on meta tensors, its launches are captured, and each launch's tiles are counted out. Products
that a library makes (cuBLAS) have a padding of their own that nobody knows: they book none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from longskip import kernels
from longskip.errors import ConfigError
from longskip.kernels import jit
from longskip.kernels.formulas import attention_backward_padded, attention_forward_padded, matmul_padded
from longskip.models.calls import Call
from longskip.models.formulas import FORMULAS

__all__ = ["Padding", "padding_on"]

_DTYPES = {2: torch.bfloat16, 4: torch.float32}
_PADDED = ("attention", "mlp", "swiglu", "skip_linear")


@dataclass(frozen=True)
class Padding:
    """Multiply-adds of one call beyond its shape, in its forward and in its backward."""

    forward: int = 0
    backward: int = 0


def padding_on(capability: int, itemsize: int = 2) -> Callable[[Call], Padding]:
    """What ``flop_ledger`` takes as ``padding`` for a device of this compute capability (80, 90, 100).

    ConfigError for one that the kernels are not laid out for, or for values of another size than 2 or 4 bytes.
    """
    if capability not in jit.TARGETS:
        known = ", ".join(map(str, jit.TARGETS))
        raise ConfigError(f"compute capability {capability} has no kernels laid out for it", cure=f"one of {known}")
    if itemsize not in _DTYPES:
        raise ConfigError(f"values of {itemsize} bytes are not known to the kernels", cure="2 (bf16, fp16) or 4 (fp32)")

    def of_call(call: Call) -> Padding:
        if call.op not in _PADDED:
            return Padding()
        return _padding(call.op, tuple(sorted(call.sizes.items())), capability, itemsize)

    return of_call


@cache
def _padding(op: str, sizes: tuple[tuple[str, int], ...], capability: int, itemsize: int) -> Padding:
    from longskip.kernels import attention_triton, mlp_triton, skip_linear_triton  # noqa: F401  registers them

    given = dict(sizes)
    leaves = _operands(op, given, _DTYPES[itemsize])
    masked: dict[str, Any] = {}
    if given.get("masked"):  # other kernels and tiles serve a mask
        masked["key_mask"] = torch.ones(given["batch"], given["keys"], dtype=torch.bool, device="meta")
    with jit.captured(jit.TARGETS[capability]) as launched, kernels.use("triton", op):
        out = getattr(kernels, op)(*leaves, **masked)
        of_forward = len(launched)
        torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], torch.empty_like(out))
        launches = list(launched)
    count: Callable[[Sequence[jit.Launch]], int] = _of_products
    if op == "attention":
        count = lambda some: _of_attention(some, given)  # noqa: E731
    return Padding(count(launches[:of_forward]), count(launches[of_forward:]))


def _operands(op: str, sizes: Mapping[str, int], dtype: torch.dtype) -> list[Tensor | None]:
    def leaf(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

    if op == "attention":
        batch, heads, dim = sizes["batch"], sizes["heads"], sizes["head_dim"]
        lengths = (sizes["queries"], sizes["keys"], sizes["keys"])
        return [leaf(batch, length, heads, dim) for length in lengths]
    rows, width, out = sizes["rows"], sizes["width"], sizes["out"]
    if op == "skip_linear":
        return [leaf(rows, width), leaf(rows, width), leaf(out, 2 * width), leaf(out) if sizes.get("bias", 1) else None]
    hidden = sizes["hidden"]
    if op == "swiglu":
        return [leaf(rows, width), leaf(hidden, width), leaf(hidden, width), leaf(out, hidden)]
    bias1 = leaf(hidden) if sizes.get("bias1", 1) else None
    return [
        leaf(rows, width),
        leaf(hidden, width),
        bias1,
        leaf(out, hidden),
        leaf(out) if sizes.get("bias2", 1) else None,
    ]


def _of_products(launches: Sequence[jit.Launch]) -> int:
    """Of the launches that contract: whole tiles less the shape, for each of their products."""
    beyond = 0
    for launch in launches:
        if "BLOCK_K" not in launch.constants:
            continue  # an elementwise pass or a column sum
        named: dict[str, Any] = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
        rows, columns, inner = named["rows"], named["columns"], named["inner"]
        # Two products in one launch: two terms or two results, or SwiGLU's gate and up.
        times = launch.constants.get("TERMS", 1) * launch.constants.get("SIDES", 1)
        times *= 2 if launch.kernel.__name__ == "_gated_product" else 1
        blocks = {f"block_{axis}": launch.constants[f"BLOCK_{axis.upper()}"] for axis in "mnk"}
        beyond += times * (matmul_padded(rows, columns, inner, **blocks) - rows * columns * inner)
    return beyond


def _of_attention(launches: Sequence[jit.Launch], sizes: Mapping[str, int]) -> int:
    tiles = {
        launch.kernel.__name__: (launch.constants["BLOCK_Q"], launch.constants["BLOCK_K"])
        for launch in launches
        if "BLOCK_K" in launch.constants
    }
    shape: dict[str, Any] = {name: sizes[name] for name in ("batch", "queries", "keys", "heads", "head_dim")}
    once = FORMULAS["attention"].forward(**shape).macs // 2
    beyond = 0
    for name, (q, k) in tiles.items():
        if name.startswith("_attention_forward"):
            beyond += attention_forward_padded(**shape, block_q=q, block_k=k) - 2 * once
        elif name == "_attention_backward_short":
            beyond += attention_backward_padded(**shape, block_q=q, block_k=k) - 5 * once
        elif name == "_attention_backward_keys":
            others = tiles["_attention_backward_queries"]
            beyond += attention_backward_padded(**shape, block_q=q, block_k=k, of_queries=others) - 7 * once
    return beyond
