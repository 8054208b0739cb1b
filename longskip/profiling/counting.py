"""FLOPs of a function, counted from the ops that are dispatched while it runs: the oracle for closed forms.

What is counted is what is executed: contractions only (2 FLOPs per multiply-add), with the gradients that are really
computed and the recomputation that really happens. Elementwise work is not mixed in; the ops without contractions are
listed beside the count with their calls.

Three traps are closed. ``scaled_dot_product_attention`` on CPU runs an op that torch's own counter (2.13) takes for
free; it is declared here. An op that contracts and that nobody declared raises instead of counting 0: known
contractions by name, and every op of a foreign namespace (custom ops). And compiled functions run eagerly while they
are counted, since a dispatch mode does not look into compiled code. What no dispatch mode can see: kernels that are
launched without a dispatcher op.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from longskip.errors import LongskipError
from longskip.kernels import library


class UndeclaredOpError(LongskipError):
    """An op that contracts, or may contract, without a declared FLOP formula."""


@dataclass(frozen=True, slots=True)
class Contraction:
    """Multiply-adds of one call; ``recomputed`` of them repeat a forward contraction inside a fused backward."""

    macs: int
    recomputed: int = 0


@dataclass(frozen=True, slots=True)
class OpCount:
    """What one op contributed over all its calls, in multiply-adds."""

    calls: int
    macs: int
    recomputed_macs: int

    @property
    def flops(self) -> int:
        return 2 * self.macs


@dataclass(frozen=True, slots=True)
class FlopCount:
    """The count of one execution: ``ops`` with contractions, and the calls of the ``other_ops`` that have none.

    ``macs`` and ``flops`` (= 2 · macs) are everything executed. ``recomputed_macs`` is the part of it that fused
    attention's backward repeats, so that ``macs - recomputed_macs`` is the same for every attention backend.
    """

    ops: Mapping[str, OpCount]
    other_ops: Mapping[str, int]

    @property
    def macs(self) -> int:
        return sum(op.macs for op in self.ops.values())

    @property
    def flops(self) -> int:
        return 2 * self.macs

    @property
    def recomputed_macs(self) -> int:
        return sum(op.recomputed_macs for op in self.ops.values())


Formula = Callable[[Sequence[Any], Mapping[str, Any], Any], Contraction]


def _mm(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Contraction:
    return _product(args[0], args[1])


def _addmm(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Contraction:
    return _product(args[1], args[2])


def _product(a: torch.Tensor, b: torch.Tensor) -> Contraction:
    # The last axis of a meets the first axis of b behind the batch axes: (..., m, k) x (..., k, n), or a vector.
    columns = b.shape[-1] if b.dim() >= 2 else 1
    return Contraction(a.numel() * columns)


def _convolution_macs(x: torch.Tensor, weight: torch.Tensor, y_shape: Sequence[int], transposed: bool) -> int:
    # Weight (C_out, C_in/groups, k...): every output element meets C_in/groups * k of it. The transposed convolution's
    # weight is (C_in, C_out/groups, k...) and every input element meets C_out/groups * k. Padding counts as work.
    return (x.numel() if transposed else math.prod(y_shape)) * math.prod(weight.shape[1:])


def _convolution(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Contraction:
    return Contraction(_convolution_macs(args[0], args[1], out.shape, transposed=bool(args[6])))


def _convolution_backward(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Contraction:
    grad, x, weight = args[:3]
    transposed, wanted = bool(args[7]), args[10]
    once = _convolution_macs(x, weight, grad.shape, transposed)
    return Contraction(once * (int(wanted[0]) + int(wanted[1])))  # the bias's gradient is a sum


def _attention(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Contraction:
    query, key, value = args[:3]
    scores = query.shape[:-1].numel() * key.shape[-2]
    return Contraction(scores * (query.shape[-1] + value.shape[-1]))


def _attention_backward(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Contraction:
    # dV, dP over value's width; dQ, dK and the recomputed scores over query's.
    query, key, value = args[1:4]
    scores = query.shape[:-1].numel() * key.shape[-2]
    return Contraction(scores * (3 * query.shape[-1] + 2 * value.shape[-1]), recomputed=scores * query.shape[-1])


_FUSED_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)

_DECLARED: dict[str, Formula] = {
    **dict.fromkeys(("aten::mm", "aten::bmm", "aten::mv", "aten::dot", "aten::vdot"), _mm),
    **dict.fromkeys(("aten::addmm", "aten::baddbmm", "aten::addbmm", "aten::addmv", "aten::_addmm_activation"), _addmm),
    "aten::convolution": _convolution,
    "aten::_convolution": _convolution,
    "aten::convolution_overrideable": _convolution,
    "aten::convolution_backward": _convolution_backward,
    **{f"aten::{name}": _attention for name in _FUSED_ATTENTION},
    **{f"aten::{name}_backward": _attention_backward for name in _FUSED_ATTENTION},
}

# Words in the names of aten ops that contract. A name with such a word and without a formula raises.
_CONTRACTS = re.compile(
    r"\w*mm|\w*gemm|matmul|(add)?mv|v?dot|vecdot|tensordot|einsum|conv(\d+d)?|convolution|dilated\dd|linear|bilinear"
    r"|trilinear|attention|transformer|cdist|lstm|gru|rnn|fft|linalg|cholesky|matrix"
)
_DOES_NOT_CONTRACT = re.compile(
    r"_?upsample_\w+|linalg_(vector_norm|cross|diagonal|_powsum)|_cudnn_rnn_flatten_weight|_use_cudnn_rnn_flatten_weight"
    r"|fft_\w*(freq|shift)|mkldnn_reorder_conv\dd_weight|_histogramdd\w*"
)
_FREE_NAMESPACES = {"prim", "prims", "rngprims", "profiler", "c10d", "_c10d_functional", "c10d_functional", "fsdp"}


def declare(op: str, formula: Formula) -> None:
    """Declares the contractions of a dispatcher op, forward and backward ops each for themselves.

    ``op`` is ``namespace::name`` without overload; ``formula(args, kwargs, out)`` gets the call's arguments and result
    and returns its ``Contraction`` (``Contraction(0)`` for an op without any). ValueError when it is declared already.
    Formulas registered with ``torch.utils.flop_counter.register_flop_formula`` are known without this.
    """
    if op in _DECLARED:
        raise ValueError(f"op {op!r} has a FLOP formula already")
    _DECLARED[op] = formula


def count_flops(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> FlopCount:
    """Runs ``fn(*args, **kwargs)`` once and counts the contractions that it dispatches, backward passes included.

    Works on any device; on ``meta`` tensors nothing is computed. UndeclaredOpError when an op contracts and nothing
    says how much.
    """
    mode = _CountingMode()
    with torch.compiler.set_stance("force_eager"), mode:
        fn(*args, **kwargs)
    ops = {name: OpCount(*tally) for name, tally in sorted(mode.counted.items())}
    return FlopCount(ops=ops, other_ops=dict(sorted(mode.others.items())))


class _CountingMode(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counted: dict[str, list[int]] = {}
        self.others: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        formula = _formula(name, func)
        if formula is None and func._can_decompose():
            # Under inference mode composite ops (linear, attention) arrive whole; their parts are what is counted.
            with self:
                whole = func.decompose(*args, **kwargs)
            if whole is not NotImplemented:
                return whole
        out = func(*args, **kwargs)
        if formula is not None:
            contraction = formula(args, kwargs, out)
            tally = self.counted.setdefault(name, [0, 0, 0])
            tally[0] += 1
            tally[1] += contraction.macs
            tally[2] += contraction.recomputed
        elif _may_contract(name):
            raise UndeclaredOpError(
                f"op {name} contracts, or may do so, and has no FLOP formula: it would count 0",
                cure="longskip.profiling.declare(op, formula), or torch.utils.flop_counter.register_flop_formula",
            )
        else:
            self.others[name] = self.others.get(name, 0) + 1
        return out


def _formula(name: str, func: Any) -> Formula | None:
    namespace, base = name.split("::")
    declared = _DECLARED.get(name)
    if declared is None and base.endswith("_") and not base.endswith("__"):
        declared = _DECLARED.get(f"{namespace}::{base[:-1]}")  # addmm_ is addmm in place
    if declared is not None:
        return declared
    registered = flop_registry.get(func.overloadpacket)
    if registered is None:
        return None

    def of_torch(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Contraction:
        flops = int(registered(*args, **kwargs, out_val=out))
        if flops % 2:
            raise UndeclaredOpError(
                f"op {name}'s registered formula gives {flops} FLOPs, which is no whole number of multiply-adds",
                cure="register 2 FLOPs per multiply-add, contractions only",
            )
        again = library.RECOMPUTED.get(name)
        return Contraction(flops // 2, recomputed=again(*args, **kwargs) // 2 if again is not None else 0)

    return of_torch


def _may_contract(name: str) -> bool:
    namespace, base = name.split("::")
    if namespace != "aten":
        return namespace not in _FREE_NAMESPACES
    if _DOES_NOT_CONTRACT.fullmatch(base):
        return False
    return any(_CONTRACTS.fullmatch(word) for word in base.split("_"))
