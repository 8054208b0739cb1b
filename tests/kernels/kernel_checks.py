"""What the kernel tests share: every op with inputs at odd sizes, and the rule by which numbers are judged."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from longskip import kernels
from longskip.kernels import backends

FLOAT64 = torch.float64


@dataclass(frozen=True)
class Case:
    """One call of an op: named float64 inputs (those to differentiate by), fixed inputs, keywords."""

    op: str
    label: str
    inputs: dict[str, tuple[int, ...]]
    fixed: dict[str, Tensor] = field(default_factory=dict)
    keywords: dict[str, Any] = field(default_factory=dict)
    wide: tuple[str, ...] = ()  # inputs that stay float32 whatever the dtype under test

    @property
    def id(self) -> str:
        return f"{self.op}-{self.label}"

    def values(self, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(shape, generator=generator, dtype=FLOAT64) for name, shape in self.inputs.items()}

    def cast(self, values: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        narrow = {name: torch.float32 if name in self.wide and dtype != FLOAT64 else dtype for name in values}
        return {name: value.to(narrow[name]) for name, value in values.items()}

    def call(self, values: dict[str, Tensor]) -> tuple[Tensor, ...]:
        result = PUBLIC[self.op](**values, **self.fixed, **self.keywords)
        return result if isinstance(result, tuple) else (result,)


PUBLIC: dict[str, Callable[..., Any]] = {
    name: getattr(kernels, name)
    for name in (
        "attention",
        "attention_varlen",
        "layer_norm",
        "rms_norm",
        "adaln",
        "gated_adaln",
        "gated_residual",
        "mlp",
        "swiglu",
        "skip_linear",
        "qk_norm_rotary",
        "diffusion_loss",
    )
}


def _angles(tokens: int, half: int) -> dict[str, Tensor]:
    angle = torch.outer(torch.arange(tokens, dtype=FLOAT64), 0.7 ** torch.arange(half, dtype=FLOAT64))
    return {"cos": angle.cos(), "sin": angle.sin()}


def _some(*shape: int, p: float = 0.6) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(5)) < p


def _mask(batch: int, keys: int) -> Tensor:
    mask = _some(batch, keys)
    mask[0] = False  # a sample with no key at all
    return mask


def _offsets(*places: int) -> Tensor:
    return torch.tensor(places, dtype=torch.int32)


def _mlp(rows: tuple[int, ...], h: int, m: int, out: int) -> dict[str, tuple[int, ...]]:
    return {"x": (*rows, h), "w1": (m, h), "b1": (m,), "w2": (out, m), "b2": (out,)}


def _flow(batch: int, *shape: int) -> tuple[dict[str, tuple[int, ...]], dict[str, Tensor]]:
    inputs = dict.fromkeys(("prediction", "clean", "noise"), (batch, *shape))
    generator = torch.Generator().manual_seed(3)
    fixed = {"time": torch.rand(batch, generator=generator), "weight": torch.rand(batch, generator=generator)}
    return inputs, fixed


CASES: list[Case] = [
    Case("attention", "packed", {"q": (2, 13, 3, 3, 7)}),
    Case("attention", "packed-masked", {"q": (3, 17, 3, 2, 5)}, {"key_mask": _mask(3, 17)}),
    Case("attention", "cross", {"q": (2, 5, 3, 8), "k": (2, 11, 3, 8), "v": (2, 11, 3, 8)}, {}, {"scale": 0.2}),
    Case(
        "attention",
        "cross-masked",
        {"q": (3, 1, 1, 1), "k": (3, 7, 1, 1), "v": (3, 7, 1, 1)},
        {"key_mask": _mask(3, 7)},
    ),
    Case("attention", "one", {"q": (1, 1, 3, 1, 1)}),
    Case("attention", "334-tokens", {"q": (1, 334, 3, 1, 64)}),
    Case("attention", "two-blocks", {"q": (2, 67, 3, 2, 32)}),
    Case(
        "attention",
        "wide-cross-masked",
        {"q": (3, 19, 1, 72), "k": (3, 65, 1, 72), "v": (3, 65, 1, 72)},
        {"key_mask": _mask(3, 65)},
    ),
    Case("attention_varlen", "packed", {"q": (13, 3, 2, 5)}, {"cu_seqlens": _offsets(0, 3, 3, 13)}),
    Case("attention_varlen", "packed-two-blocks", {"q": (73, 3, 1, 64)}, {"cu_seqlens": _offsets(0, 2, 2, 69, 73)}),
    Case(
        "attention_varlen",
        "cross",
        {"q": (9, 1, 80), "k": (7, 1, 80), "v": (7, 1, 80)},
        {"cu_seqlens": _offsets(0, 3, 5, 9), "cu_seqlens_k": _offsets(0, 3, 3, 7)},
        {"scale": -0.2},
    ),
    Case("layer_norm", "affine", {"x": (3, 5, 37), "weight": (37,), "bias": (37,)}),
    Case("layer_norm", "weight-only", {"x": (7, 129), "weight": (129,)}),
    Case("layer_norm", "bias-only", {"x": (7, 31), "bias": (31,)}, {}, {"eps": 1e-3}),
    Case("layer_norm", "residual", {"x": (3, 5, 63), "weight": (63,), "bias": (63,), "residual": (3, 5, 63)}),
    Case("layer_norm", "wide-affine", {"x": (3, 41), "weight": (41,), "bias": (41,)}, wide=("weight", "bias")),
    Case("layer_norm", "plain", {"x": (11, 2)}),
    Case("layer_norm", "two-pieces", {"x": (5, 517), "weight": (517,), "bias": (517,)}),
    Case("rms_norm", "weight", {"x": (3, 5, 37), "weight": (37,)}),
    Case("rms_norm", "wide-weight", {"x": (3, 41), "weight": (41,)}, wide=("weight",)),
    Case("rms_norm", "residual", {"x": (2, 3, 129), "weight": (129,), "residual": (2, 3, 129)}),
    Case("rms_norm", "one", {"x": (5, 1)}),
    Case("adaln", "odd", {"x": (3, 7, 37), "shift": (3, 37), "scale": (3, 37)}),
    Case("adaln", "one-token", {"x": (2, 1, 65), "shift": (2, 65), "scale": (2, 65)}, {}, {"eps": 1e-5}),
    Case(
        "gated_adaln",
        "odd",
        {"x": (3, 7, 31), "y": (3, 7, 31), "gate": (3, 31), "shift": (3, 31), "scale": (3, 31)},
    ),
    Case(
        "gated_adaln",
        "two-pieces",
        {"x": (2, 3, 517), "y": (2, 3, 517), "gate": (2, 517), "shift": (2, 517), "scale": (2, 517)},
    ),
    Case("gated_residual", "odd", {"x": (3, 7, 31), "y": (3, 7, 31), "gate": (3, 31)}),
    Case("mlp", "erf", _mlp((3, 5), 13, 53, 11)),
    Case("mlp", "tanh", _mlp((3, 5), 13, 53, 13), {}, {"activation": "gelu_tanh"}),
    Case("mlp", "one", _mlp((1,), 1, 1, 1)),
    Case("mlp", "no-bias", {"x": (7, 13), "w1": (17, 13), "w2": (3, 17)}, {}, {"b1": None, "b2": None}),
    Case("mlp", "wide", _mlp((3, 11), 67, 263, 65)),
    Case("swiglu", "odd", {"x": (3, 5, 13), "w_gate": (29, 13), "w_up": (29, 13), "w_down": (7, 29)}),
    Case("swiglu", "wide", {"x": (33, 67), "w_gate": (131, 67), "w_up": (131, 67), "w_down": (65, 131)}),
    Case("skip_linear", "odd", {"x": (3, 7, 13), "skip": (3, 7, 13), "weight": (13, 26), "bias": (13,)}),
    Case("skip_linear", "wide", {"x": (3, 43, 40), "skip": (3, 43, 40), "weight": (70, 80), "bias": (70,)}),
    Case("skip_linear", "no-bias", {"x": (5, 1), "skip": (5, 1), "weight": (3, 2)}),
    Case("qk_norm_rotary", "rms", {"q": (2, 7, 3, 10), "k": (2, 7, 3, 10)}, _angles(7, 5)),
    Case(
        "qk_norm_rotary",
        "layer-weights",
        {"q": (2, 5, 2, 6), "k": (2, 5, 1, 6), "q_weight": (6,), "k_weight": (6,)},
        _angles(5, 3),
        {"norm": "layer"},
    ),
    Case("qk_norm_rotary", "rotation-only", {"q": (3, 5, 1, 2), "k": (3, 5, 1, 2)}, _angles(5, 1), {"norm": None}),
    Case(
        "qk_norm_rotary",
        "norm-only",
        {"q": (1, 3, 2, 7), "k": (1, 5, 2, 7), "q_weight": (7,), "k_weight": (7,)},
        wide=("q_weight", "k_weight"),
    ),
    Case(
        "qk_norm_rotary",
        "many-tiles",
        {"q": (2, 9, 5, 72), "k": (2, 9, 3, 72), "q_weight": (72,), "k_weight": (72,)},
        _angles(9, 36),
    ),
    Case("diffusion_loss", "v", *_flow(5, 3, 7, 7)),
    Case("diffusion_loss", "x", *_flow(7, 3, 17, 47), {"prediction_kind": "x"}),
    Case("diffusion_loss", "one", *_flow(1, 1), {"prediction_kind": "x", "time_floor": 0.3}),
]

MANY_ROWS = [
    Case("layer_norm", "many-rows", {"x": (4099, 8), "weight": (8,), "bias": (8,)}),
    Case("rms_norm", "many-rows", {"x": (4099, 8), "weight": (8,)}),
    Case("adaln", "many-rows", {"x": (1, 4099, 8), "shift": (1, 8), "scale": (1, 8)}),
    Case("mlp", "many-rows", _mlp((4099,), 8, 8, 8)),
]

SMALL = [case for case in CASES if case.label not in ("334-tokens",)]


BACKENDS = ("torch", "reference", "triton")


def fits(case: Case, backend: str, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the backend serves the case in the dtype (Triton's kernels here in its interpreter)."""
    values = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in case.inputs.items()}
    sizes = backends._SHAPES[case.op](**values, **case.fixed, **case.keywords)
    return backends._state(case.op, torch.device("cpu"), dtype, sizes).get(backend, "not registered") is None


def served(cases: Iterable[Case], *dtypes: torch.dtype) -> list[Any]:
    """Parameters ``case, backend`` (and ``dtype`` where dtypes are given) for every backend that serves them."""
    chosen = []
    for case in cases:
        for backend in BACKENDS:
            for dtype in dtypes or (torch.float32,):
                if fits(case, backend, dtype):
                    values = (case, backend, dtype) if dtypes else (case, backend)
                    name = f"{case.id}-{backend}" + (f"-{str(dtype).removeprefix('torch.')}" if dtypes else "")
                    chosen.append(pytest.param(*values, id=name))
    return chosen


def run(
    case: Case, values: dict[str, Tensor], backend: str, cotangents: list[Tensor] | None = None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Outputs and gradients by name, and the cotangents they were made with."""
    leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
    with kernels.use(backend):
        outputs = case.call(leaves)
        if cotangents is None:
            generator = torch.Generator().manual_seed(11)
            cotangents = [torch.randn(o.shape, generator=generator, dtype=FLOAT64) for o in outputs]
        total = [cotangent.to(o.device, o.dtype) for cotangent, o in zip(cotangents, outputs, strict=True)]
        grads = torch.autograd.grad(outputs, list(leaves.values()), total, allow_unused=True)
    named = {f"out{at}": o.detach() for at, o in enumerate(outputs)}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        named[f"d{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return named, cotangents


@contextlib.contextmanager
def unwidened() -> Iterator[None]:
    """The definitions as eager torch would run them in the inputs' dtype: every step rounded, statistics too."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("attention", "norm", "adaln", "mlp", "rotary", "loss"):
            patch.setattr(sys.modules[f"longskip.kernels.{module}"], "wide", lambda tensor: tensor)
        yield


def eager_runs(
    case: Case, values: dict[str, Tensor], backend: str, cotangents: list[Tensor]
) -> list[dict[str, Tensor]]:
    """What ``backend`` is judged against: the other backend, and plain eager torch that rounds every step."""
    other = run(case, values, "torch" if backend == "reference" else "reference", cotangents)[0]
    if all(value.dtype == torch.float32 for value in values.values()):
        return [other]
    same = {name: value.to(values[next(iter(values))].dtype) for name, value in values.items()}
    with unwidened():
        return [other, run(case, same, "reference", cotangents)[0]]


def noise(reference: Tensor, dtype: torch.dtype) -> float:
    """Rounding noise of a result in the output's dtype: 2 max |ref + 0.3 - 0.3 - ref|."""
    rounded = reference.to(dtype)
    return 2 * _largest((rounded + 0.3 - 0.3) - rounded)


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def judge(name: str, ours: Tensor, eagers: list[Tensor], reference: Tensor) -> None:
    """err_k <= 2 err_e + noise, for the largest and for the root mean square error; ``reference`` in float64.

    err_e is the largest among the eager runs.
    """
    assert torch.isfinite(ours).all(), name
    assert ours.shape == reference.shape, name
    allowance = noise(reference, ours.dtype)
    error, others = ours.to(FLOAT64) - reference, [eager.to(FLOAT64) - reference for eager in eagers]
    limit = 2 * max(map(_largest, others)) + allowance
    assert _largest(error) <= limit, f"{name}: error {_largest(error):.3e} > {limit:.3e}"
    limit = 2 * max(map(_rms, others)) + allowance
    assert _rms(error) <= limit, f"{name}: rms {_rms(error):.3e} > {limit:.3e}"


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item() if tensor.numel() else 0.0


def check_against_float64(
    case: Case, dtype: torch.dtype = torch.float32, backend: str = "triton", seeds: int = 1
) -> None:
    """Every output and gradient by the rule of ``judge``, over several seeds together where few values would be chance."""
    found: dict[str, list[list[Tensor]]] = {}
    for seed in range(seeds):
        values = case.cast(case.values(seed), dtype)
        ours, cotangents = run(case, values, backend)
        rounded = [c.to(ours[f"out{at}"].dtype).to(FLOAT64) for at, c in enumerate(cotangents)]
        exact, _ = run(case, {name: value.to(FLOAT64) for name, value in values.items()}, "reference", rounded)
        runs = (ours, exact, *eager_runs(case, values, backend, cotangents))
        for name in exact:
            found.setdefault(name, []).append([one[name].flatten() for one in runs])
    for name, parts in found.items():
        kernel, reference, *eagers = (torch.cat(same) for same in zip(*parts, strict=True))
        judge(f"{case.id} {name}", kernel, eagers, reference)
