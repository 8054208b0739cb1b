"""Each op with random tensors at the sizes a model declares, called as the models call it: what calibration times.

Public functions of ``longskip.kernels`` for the fused ops, torch's own for the plain ones. Standard library and torch only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longskip import kernels
from longskip.errors import BackendError
from longskip.kernels.formulas import OpCost
from longskip.models.calls import Call
from longskip.models.formulas import FORMULAS
from longskip.profiling.efficiency import Direction

__all__ = ["Work", "cost_of", "work_of"]


@dataclass(frozen=True)
class Work:
    """A call with its tensors: ``run`` gives its outputs, ``leaves`` are what it is differentiated by."""

    run: Callable[[], tuple[Tensor, ...]]
    leaves: tuple[Tensor, ...]


class _Tensors:
    """Random tensors for one call."""

    def __init__(self, device: torch.device, dtype: torch.dtype, needs_input: bool) -> None:
        self.device, self.dtype, self.needs_input = device, dtype, needs_input
        self.leaves: list[Tensor] = []

    def _leaf(self, value: Tensor) -> Tensor:
        self.leaves.append(value.requires_grad_())
        return value

    def x(self, *shape: int) -> Tensor:
        """An activation; it needs a gradient where the call's input does."""
        value = torch.randn(shape, device=self.device, dtype=self.dtype)
        return self._leaf(value) if self.needs_input else value

    def w(self, *shape: int) -> Tensor:
        """A parameter, of unit gain if it is a matrix."""
        scale = math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 1.0
        return self._leaf(torch.randn(shape, device=self.device, dtype=self.dtype) / scale)

    def some(self, wanted: int, *shape: int) -> Tensor | None:
        return self.w(*shape) if wanted else None

    def data(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.rand(shape, device=self.device, dtype=dtype or self.dtype)


Sizes = Mapping[str, int]
Outputs = Tensor | tuple[Tensor, ...]
Maker = Callable[[_Tensors, Sizes], Callable[[], Outputs]]


def _linear(t: _Tensors, s: Sizes) -> Callable[[], Outputs]:
    x, weight = t.x(s["rows"], s["width"]), t.w(s["out"], s["width"])
    bias = t.some(s.get("bias", 0), s["out"])
    return lambda: F.linear(x, weight, bias)


def _attention(t: _Tensors, s: Sizes) -> Callable[[], Outputs]:
    """Packed, as the output of one linear layer is handed over, where queries are keys."""
    batch, heads, dim = s["batch"], s["heads"], s["head_dim"]
    mask = torch.ones(batch, s["keys"], dtype=torch.bool, device=t.device) if s.get("masked") else None
    if s["queries"] == s["keys"]:
        packed = t.x(batch, s["queries"], 3, heads, dim)
        return lambda: kernels.attention(packed, key_mask=mask)
    q, k, v = (t.x(batch, s[name], heads, dim) for name in ("queries", "keys", "keys"))
    return lambda: kernels.attention(q, k, v, key_mask=mask)


def _layer_norm(t: _Tensors, s: Sizes) -> Callable[[], Outputs]:
    shape = (s["rows"], s["width"])
    x, residual = t.x(*shape), t.x(*shape) if s.get("residual") else None
    weight, bias = t.some(s.get("weight", 0), shape[1]), t.some(s.get("bias", 0), shape[1])
    return lambda: kernels.layer_norm(x, weight, bias, residual=residual)


def _rms_norm(t: _Tensors, s: Sizes) -> Callable[[], Outputs]:
    shape = (s["rows"], s["width"])
    x, residual = t.x(*shape), t.x(*shape) if s.get("residual") else None
    weight = t.some(s.get("weight", 0), shape[1])
    return lambda: kernels.rms_norm(x, weight, residual=residual)


def _adaln(t: _Tensors, s: Sizes) -> Callable[[], Outputs]:
    x, shift, scale = t.x(s["batch"], s["tokens"], s["width"]), *(t.x(s["batch"], s["width"]) for _ in range(2))
    return lambda: kernels.adaln(x, shift, scale, eps=1e-6)


def _gated_adaln(t: _Tensors, s: Sizes) -> Callable[[], Outputs]:
    x, y = (t.x(s["batch"], s["tokens"], s["width"]) for _ in range(2))
    gate, shift, scale = (t.x(s["batch"], s["width"]) for _ in range(3))
    return lambda: kernels.gated_adaln(x, y, gate, shift, scale, eps=1e-6)


def _gated_residual(t: _Tensors, s: Sizes) -> Callable[[], Outputs]:
    x, y = (t.x(s["batch"], s["tokens"], s["width"]) for _ in range(2))
    gate = t.x(s["batch"], s["width"])
    return lambda: kernels.gated_residual(x, y, gate)


def _mlp(t: _Tensors, s: Sizes) -> Callable[[], Outputs]:
    x, w1, w2 = t.x(s["rows"], s["width"]), t.w(s["hidden"], s["width"]), t.w(s["out"], s["hidden"])
    b1, b2 = t.some(s.get("bias1", 1), s["hidden"]), t.some(s.get("bias2", 1), s["out"])
    activation = "gelu_tanh" if s.get("tanh") else "gelu"
    return lambda: kernels.mlp(x, w1, b1, w2, b2, activation=activation)


def _swiglu(t: _Tensors, s: Sizes) -> Callable[[], Outputs]:
    x, gate, up = t.x(s["rows"], s["width"]), *(t.w(s["hidden"], s["width"]) for _ in range(2))
    down = t.w(s["out"], s["hidden"])
    return lambda: kernels.swiglu(x, gate, up, down)


def _skip_linear(t: _Tensors, s: Sizes) -> Callable[[], Outputs]:
    x, skip, weight = t.x(s["rows"], s["width"]), t.x(s["rows"], s["width"]), t.w(s["out"], 2 * s["width"])
    bias = t.some(s.get("bias", 1), s["out"])
    return lambda: kernels.skip_linear(x, skip, weight, bias)


def _qk_norm_rotary(t: _Tensors, s: Sizes) -> Callable[[], Outputs]:
    dim, tokens = s["head_dim"], s["tokens"]
    q, k = (t.x(1, tokens, s[name] // tokens, dim) for name in ("q_rows", "k_rows"))
    q_weight, k_weight = t.some(s.get("q_weight", 0), dim), t.some(s.get("k_weight", 0), dim)
    kind = "rms" if s.get("rms", 1) else "layer" if s.get("layer") else None
    cos, sin = (t.data(tokens, dim // 2), t.data(tokens, dim // 2)) if s.get("rotate", 1) else (None, None)
    return lambda: kernels.qk_norm_rotary(q, k, q_weight=q_weight, k_weight=k_weight, norm=kind, cos=cos, sin=sin)


def _diffusion_loss(t: _Tensors, s: Sizes) -> Callable[[], Outputs]:
    prediction = t.x(s["batch"], s["values"])
    clean, noise = t.data(s["batch"], s["values"]), t.data(s["batch"], s["values"])
    at, weight = (t.data(s["batch"], dtype=torch.float32) for _ in range(2))
    kind = "x" if s.get("x_kind") else "v"
    return lambda: kernels.diffusion_loss(prediction, clean, noise, at, weight, prediction_kind=kind)


def _conv2d(t: _Tensors, s: Sizes) -> Callable[[], Outputs]:
    kernel = s.get("kernel", 3)
    x = t.x(s["batch"], s["channels"], s["height"], s["width"])
    weight, bias = t.w(s["out"], s["channels"], kernel, kernel), t.some(s.get("bias", 1), s["out"])
    return lambda: F.conv2d(x, weight, bias, padding=kernel // 2)


def _silu(t: _Tensors, s: Sizes) -> Callable[[], Outputs]:
    x = t.x(s["values"])
    return lambda: F.silu(x)


def _gelu(t: _Tensors, s: Sizes) -> Callable[[], Outputs]:
    x, approximate = t.x(s["values"]), "tanh" if s.get("tanh") else "none"
    return lambda: F.gelu(x, approximate=approximate)


def _lookup(t: _Tensors, s: Sizes) -> Callable[[], Outputs]:
    table = t.w(max(2, s["rows"]), s["width"])
    ids = torch.randint(0, table.shape[0], (s["rows"],), device=t.device)
    return lambda: F.embedding(ids, table)


def _noising(t: _Tensors, s: Sizes) -> Callable[[], Outputs]:
    clean, noise, at = t.data(s["values"]), t.data(s["values"]), t.data(1)
    return lambda: (1 - at) * clean + at * noise


def _sinusoid(t: _Tensors, s: Sizes) -> Callable[[], Outputs]:
    at, rates = t.data(s["batch"], dtype=torch.float32), t.data(s["frequencies"], dtype=torch.float32)

    def run() -> Tensor:
        angles = at[:, None] * torch.exp(rates)
        return torch.cat((angles.cos(), angles.sin()), dim=-1).to(t.dtype)

    return run


def _add(t: _Tensors, s: Sizes) -> Callable[[], Outputs]:
    """A residual; in the backward pass the gradients of a tensor that was used twice meet in one addition."""
    x, y = t.x(s["values"]), t.data(s["values"])

    def run() -> tuple[Tensor, ...]:
        used = x.view_as(x)
        return used + y, used.view_as(used)

    return run


_MAKERS: dict[str, Maker] = {
    "linear": _linear, "attention": _attention, "layer_norm": _layer_norm, "rms_norm": _rms_norm, "adaln": _adaln,
    "gated_adaln": _gated_adaln, "gated_residual": _gated_residual, "mlp": _mlp, "swiglu": _swiglu,
    "skip_linear": _skip_linear, "qk_norm_rotary": _qk_norm_rotary, "diffusion_loss": _diffusion_loss,
    "conv2d": _conv2d, "silu": _silu, "gelu": _gelu, "lookup": _lookup, "sinusoid": _sinusoid, "noising": _noising,
    "add": _add,
}  # fmt: skip


def work_of(call: Call, device: torch.device, dtype: torch.dtype) -> Work:
    """The call with random tensors; BackendError for an op that no maker knows."""
    maker = _MAKERS.get(call.op)
    if maker is None:
        raise BackendError(f"op {call.op!r} cannot be calibrated", cure=f"known: {', '.join(sorted(_MAKERS))}")
    tensors = _Tensors(device, dtype, call.needs_input)
    run = maker(tensors, call.sizes)

    def outputs() -> tuple[Tensor, ...]:
        out = run()
        return out if isinstance(out, tuple) else (out,)

    return Work(outputs, tuple(tensors.leaves))


def cost_of(call: Call, direction: Direction, itemsize: int) -> OpCost | None:
    """The declared cost of one call, as the torch backend executes it; None for the backward of an op without one."""
    formula = FORMULAS[call.op]
    if direction == "forward":
        return formula.forward(**call.sizes, itemsize=itemsize)
    if formula.backward is None:
        return None
    needs: dict[str, Any] = {} if call.needs_input else {"needs_input": False}
    if call.op == "attention":
        needs = {"recompute": True}
    elif not call.needs_input and call.op not in ("linear", "skip_linear", "conv2d", "mlp", "swiglu"):
        needs = {}
    return formula.backward(**call.sizes, itemsize=itemsize, **needs)
