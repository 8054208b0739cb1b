"""What fvcore's counter takes for free in our models, our custom ops and torch's attention, and what it adds.

    FlopCountAnalysis(model, inputs).set_op_handle(**handles())

fvcore counts multiply-adds and calls them flops; it sees the forward only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from longskip.errors import LongskipError
from longskip.kernels import backends, library


def handles() -> dict[str, Callable[[list[Any], list[Any]], int]]:
    """``{op: handle}``: multiply-adds of one traced call of each ``longskip::`` op, by the formula it declares, and of
    torch's attention, which serves where none of ours does; LayerNorm, of which fvcore counts five operations per element
    among the multiply-adds, holds none."""
    for ops in backends.FAMILIES.values():
        backends.available(ops[0], torch.device("cpu"))  # loads the op's file
    return {name: _handle(name) for name in library.FLOPS} | {_ATTENTION: _attention, "aten::layer_norm": _none}


_ATTENTION = "aten::scaled_dot_product_attention"


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    query, key, value = (_value(_ATTENTION, given) for given in inputs[:3])
    scores = query.shape[:-1].numel() * key.shape[-2]
    return int(scores * (query.shape[-1] + value.shape[-1]))


def _handle(name: str) -> Callable[[list[Any], list[Any]], int]:
    def handle(inputs: list[Any], outputs: list[Any]) -> int:
        return library.FLOPS[name](*(_value(name, value) for value in inputs)) // 2

    return handle


def _none(inputs: list[Any], outputs: list[Any]) -> int:
    return 0


def _value(name: str, value: Any) -> Any:
    """A traced value as the formula takes it: a meta tensor of its shape, or the constant it is."""
    kind = value.type()
    if isinstance(kind, torch._C.TensorType):
        sizes = kind.sizes()
        if sizes is None:
            raise LongskipError(f"{name}: the trace holds no shape for an argument, so it cannot be counted")
        return torch.empty(sizes, dtype=kind.dtype() or torch.float32, device="meta")
    return value.toIValue()
