"""Custom ops: one per direction, seen by autograd, ``torch.compile``, the meta device and FLOP counters alike.

``custom(name, run, fake, flops)`` makes ``longskip::name``. An op that is part of a derivative has a second one,
``longskip::name_backward``, joined to it by ``differentiable``. Only first derivatives in reverse mode exist: torch gives
a silently zero tangent for a custom op in forward mode, so every use under ``jvp``, ``vmap`` or another transform of
``torch.func``, and every second derivative, raises BackendError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
import torch.autograd.forward_ad
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from longskip.errors import BackendError
from longskip.kernels import jit

NAMESPACE = "longskip"
_CURE = 'run it inside longskip.kernels.use("reference"), whose ops are plain torch'

# ``flops(*the op's arguments) -> int``: contraction FLOPs of one call, 2 per multiply-add.
FLOPS: dict[str, Callable[..., int]] = {}
# The part of them that repeats a contraction of the same derivative, for the ops that recompute instead of saving.
RECOMPUTED: dict[str, Callable[..., int]] = {}


class Op:
    """One custom op. Called inside ``jit.captured`` it runs its host function at once, through the same autograd rule."""

    def __init__(self, name: str, op: Any, run: Callable[..., Any]) -> None:
        self.name = name
        self._op = op
        self._run = run
        self._captured: Callable[..., Any] = run

    def __call__(self, *args: Any) -> Any:
        return self._captured(*args) if jit.capturing() else self._op(*args)

    def differentiate(self, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
        self._op.register_autograd(backward, setup_context=setup)
        rule = {
            "forward": staticmethod(self._run),
            "setup_context": staticmethod(setup),
            "backward": staticmethod(backward),
        }
        function: Any = type(self.name, (torch.autograd.Function,), rule)
        self._captured = function.apply

    def refuse_derivatives(self) -> None:
        self._op.register_autograd(_refused(self.name, "a second derivative"))


def custom(
    name: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    flops: Callable[..., int] | None = None,
    recomputed: Callable[..., int] | None = None,
    mutates: Iterable[str] = (),
) -> Op:
    """The custom op ``longskip::name``: ``run`` on a device, ``fake`` on the meta device and under compile.

    ``run``'s annotations give the schema. ``flops`` takes the op's arguments and returns its contraction FLOPs (None:
    it has none), ``recomputed`` in the same way the part of them that repeats a contraction.
    """
    op = torch.library.custom_op(f"{NAMESPACE}::{name}", run, mutates_args=tuple(mutates))
    op.register_fake(fake)
    op.register_vmap(_refused(name, "vmap"))
    count = flops if flops is not None else _none

    def of_call(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return count(*args, **kwargs)

    register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), name), get_raw=True)(of_call)
    FLOPS[f"{NAMESPACE}::{name}"] = count
    if recomputed is not None:
        RECOMPUTED[f"{NAMESPACE}::{name}"] = recomputed
    return Op(name, op, run)


def differentiable(op: Op, backward_op: Op, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    """Join the two directions: ``backward(ctx, *gradients)`` calls ``backward_op``; ``setup(ctx, inputs, output)``."""
    op.differentiate(backward, setup)
    backward_op.refuse_derivatives()


def plain(op: str, *tensors: Tensor | None) -> None:
    """Raise BackendError where a transform is active that a custom op would answer wrongly or not at all."""
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:
        _refuse(op, "a transform of torch.func")
    if torch.autograd.forward_ad._current_level >= 0:
        for tensor in tensors:
            if tensor is not None and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
                _refuse(op, "forward-mode differentiation (jvp)")


def _none(*args: Any, **kwargs: Any) -> int:
    return 0


def _refused(name: str, what: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        _refuse(name, what)

    return refuse


def _refuse(name: str, what: str) -> NoReturn:
    raise BackendError(f"{name} is served by a fused kernel, which has no rule for {what}", cure=_CURE)
