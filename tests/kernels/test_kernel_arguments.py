"""What does not fit is refused with the argument's name, what came and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longskip import kernels
from longskip.errors import KernelArgumentError
from tests.kernels.kernel_checks import CASES, PUBLIC, SMALL, Case


def arguments(case: Case) -> dict[str, Any]:
    return {**case.cast(case.values(), torch.float32), **case.fixed, **case.keywords}


def first(op: str, label: str | None = None) -> dict[str, Any]:
    return arguments(next(c for c in CASES if c.op == op and label in (None, c.label)))


def refused(op: str, name: str, values: dict[str, Any]) -> str:
    with pytest.raises(KernelArgumentError, match=rf"^{op}: .*{name}.* is .*; allowed: ") as caught:
        PUBLIC[op](**values)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


ANY_LEADING_AXES = ("layer_norm", "rms_norm", "mlp", "swiglu")
TENSORS = [(case, name) for case in SMALL for name in (*case.inputs, *case.fixed)]


@pytest.mark.parametrize(("case", "name"), TENSORS, ids=lambda v: getattr(v, "id", v))
def test_each_tensor_is_checked(case: Case, name: str) -> None:
    """Wrong type, dtype, device and number of axes of every tensor argument."""
    good = arguments(case)
    tensor: Tensor = good[name]
    integer = torch.float32 if name.startswith("cu_seqlens") else torch.int64
    wrong: list[Any] = [[1.0], tensor.to(integer), tensor.to(torch.complex64)]
    if not (name == "x" and case.op in ANY_LEADING_AXES):
        wrong.append(tensor[None])
    for bad in wrong:
        with pytest.raises(KernelArgumentError, match=rf"^{case.op}: .*; allowed: "):
            PUBLIC[case.op](**{**good, name: bad})
    # Offsets may lie on the CPU, wherever the others are.
    if any(other != name and not other.startswith("cu_seqlens") for other in (*case.inputs, *case.fixed)):
        with pytest.raises(KernelArgumentError, match="device"):
            PUBLIC[case.op](**{**good, name: tensor.to("meta")})


SAME_DTYPE = [
    (case, name)
    for case in SMALL
    if case.op != "diffusion_loss"
    for name in list(case.inputs)[1:]
    if not name.endswith("weight") and not (case.op == "layer_norm" and name == "bias")
]


@pytest.mark.parametrize(("case", "name"), SAME_DTYPE, ids=lambda v: getattr(v, "id", v))
def test_dtypes_are_not_mixed(case: Case, name: str) -> None:
    good = arguments(case)
    assert "dtype torch.float16" in refused(case.op, name, {**good, name: good[name].half()})


def test_norm_weights_may_be_float32_only() -> None:
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    assert kernels.layer_norm(x, torch.ones(4)).dtype == torch.bfloat16
    assert kernels.rms_norm(x, torch.ones(4)).dtype == torch.bfloat16
    refused("layer_norm", "weight", {"x": x, "weight": torch.ones(4).half()})
    refused("rms_norm", "weight", {"x": x.float(), "weight": torch.ones(4).bfloat16()})


SHAPES: list[tuple[str, str | None, str, dict[str, Any]]] = [
    ("attention", "packed", "q", {"q": torch.randn(2, 5, 4, 2, 3)}),
    ("attention", "packed", "q", {"q": torch.randn(2, 5, 3, 0, 3)}),
    ("attention", "packed", "q", {"q": torch.randn(2, 5, 3, 2, 0)}),
    ("attention", "packed", "k and v", {"k": torch.randn(2, 5, 2, 3)}),
    ("attention", "cross", "k", {"k": torch.randn(2, 11, 2, 8)}),
    ("attention", "cross", "v", {"v": torch.randn(2, 10, 3, 8)}),
    ("attention", "cross", "key_mask", {"key_mask": torch.ones(2, 5, dtype=torch.bool)}),
    ("attention", "cross", "key_mask", {"key_mask": torch.ones(2, 11)}),
    ("attention", "cross", "scale", {"scale": float("nan")}),
    ("layer_norm", "affine", "x", {"x": torch.randn(3, 0)}),
    ("layer_norm", "affine", "x", {"x": torch.tensor(1.0)}),
    ("layer_norm", "affine", "weight", {"weight": torch.randn(36)}),
    ("layer_norm", "affine", "eps", {"eps": -1e-5}),
    ("layer_norm", "residual", "residual", {"residual": torch.randn(1, 5, 63)}),
    ("rms_norm", "weight", "eps", {"eps": float("nan")}),
    ("adaln", "odd", "shift", {"shift": torch.randn(1, 37)}),
    ("adaln", "odd", "scale", {"scale": torch.randn(3, 7, 37)}),
    ("adaln", "odd", "eps", {"eps": float("inf")}),
    ("gated_adaln", "odd", "y", {"y": torch.randn(3, 1, 31)}),
    ("gated_residual", "odd", "gate", {"gate": torch.randn(31)}),
    ("mlp", "erf", "w1", {"w1": torch.randn(53, 12)}),
    ("mlp", "erf", "w2", {"w2": torch.randn(11, 52)}),
    ("mlp", "erf", "b1", {"b1": torch.randn(1)}),
    ("mlp", "erf", "b2", {"b2": torch.randn(13)}),
    ("mlp", "erf", "activation", {"activation": "relu"}),
    ("swiglu", "odd", "w_up", {"w_up": torch.randn(28, 13)}),
    ("swiglu", "odd", "w_down", {"w_down": torch.randn(7, 28)}),
    ("skip_linear", "odd", "skip", {"skip": torch.randn(3, 1, 13)}),
    ("skip_linear", "odd", "weight", {"weight": torch.randn(13, 13)}),
    ("skip_linear", "odd", "bias", {"bias": torch.randn(26)}),
    ("qk_norm_rotary", "rms", "k", {"k": torch.randn(2, 6, 3, 10)}),
    ("qk_norm_rotary", "rms", "cos", {"cos": torch.randn(7, 10)}),
    ("qk_norm_rotary", "rms", "cos and sin", {"sin": None}),
    ("qk_norm_rotary", "rms", "norm", {"norm": "batch"}),
    ("qk_norm_rotary", "layer-weights", "q_weight", {"norm": None}),
    (
        "qk_norm_rotary",
        "norm-only",
        "head dim",
        {"k": torch.randn(1, 3, 2, 7), "cos": torch.randn(3, 3), "sin": torch.randn(3, 3)},
    ),
    ("diffusion_loss", "v", "prediction", {"prediction": torch.randn(5)}),
    ("diffusion_loss", "v", "prediction", {"prediction": torch.randn(5, 0, 3)}),
    ("diffusion_loss", "v", "clean", {"clean": torch.randn(5, 3, 7, 1)}),
    ("diffusion_loss", "v", "time", {"time": torch.rand(1)}),
    ("diffusion_loss", "v", "weight", {"weight": torch.rand(5, 1)}),
    ("diffusion_loss", "v", "prediction_kind", {"prediction_kind": "eps"}),
    ("diffusion_loss", "x", "time_floor", {"time_floor": 0.0}),
]


@pytest.mark.parametrize(("op", "label", "name", "change"), SHAPES, ids=lambda v: v if isinstance(v, str) else "")
def test_shapes_and_values(op: str, label: str, name: str, change: dict[str, Any]) -> None:
    message = refused(op, name, {**first(op, label), **change})
    value = change.get(name)
    if isinstance(value, Tensor) and "of shape" in message:
        assert str(tuple(value.shape)) in message
    elif isinstance(value, str | float):
        assert str(value) in message
