"""Calls of the kernels at the sizes that U-ViT models have: what ``bench kernels`` measures and the static report compiles.

The sizes: 334 and 377 tokens are 256² pictures (16 x 16 patches, one time token, 77 or 120 text tokens), 4,174 tokens are
1024² ones; widths and heads are those of the presets. Torch and triton only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longskip import kernels

Shape = tuple[int, ...]


@dataclass(frozen=True)
class KernelCase:
    """One call of a public op: tensors to differentiate by, tensors that are data, keywords."""

    op: str
    label: str
    x_name: str  # what varies over the cases of one plot, and its value
    x: int
    inputs: Mapping[str, Shape]
    data: Mapping[str, Shape] = field(default_factory=dict)
    keywords: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.op}-{self.label}"

    def tensors(
        self, device: torch.device, dtype: torch.dtype, seed: int = 0
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(inputs that require gradients, data and keywords): random normal values, of the order that training has."""
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
        leaves = {}
        for name, shape in self.inputs.items():
            value = torch.randn(shape, device=device, dtype=dtype, generator=generator)
            if name.startswith("w") and len(shape) == 2:
                value = value / math.sqrt(shape[1])  # a weight of unit gain
            leaves[name] = value.requires_grad_()
        extra: dict[str, Any] = {
            name: torch.rand(shape, device=device, dtype=torch.float32, generator=generator)
            for name, shape in self.data.items()
        }
        return leaves, {**extra, **self.keywords}

    def call(self, leaves: Mapping[str, Any], extra: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The public function's outputs."""
        out = getattr(kernels, self.op)(**leaves, **extra)
        return out if isinstance(out, tuple) else (out,)


def _rows(op: str, width: int, tokens: int, batch: int) -> KernelCase:
    x, vector = (batch, tokens, width), (batch, width)
    shapes: dict[str, dict[str, Shape]] = {
        "layer_norm": {"x": x, "weight": (width,), "bias": (width,)},
        "rms_norm": {"x": x, "weight": (width,)},
        "adaln": {"x": x, "shift": vector, "scale": vector},
        "gated_adaln": {"x": x, "y": x, "gate": vector, "shift": vector, "scale": vector},
        "gated_residual": {"x": x, "y": x, "gate": vector},
    }
    return KernelCase(op, f"h{width}-T{tokens}-B{batch}", "width", width, shapes[op])


def _attention(tokens: int, heads: int, head_dim: int, batch: int) -> KernelCase:
    label = f"T{tokens}-Dh{head_dim}-H{heads}-B{batch}"
    return KernelCase("attention", label, "tokens", tokens, {"q": (batch, tokens, 3, heads, head_dim)})


def _mlp(width: int, tokens: int, batch: int, activation: str = "gelu") -> KernelCase:
    m = 4 * width
    inputs = {"x": (batch, tokens, width), "w1": (m, width), "b1": (m,), "w2": (width, m), "b2": (width,)}
    return KernelCase(
        "mlp", f"h{width}-T{tokens}-B{batch}-{activation}", "width", width, inputs, {}, {"activation": activation}
    )


def _swiglu(width: int, tokens: int, batch: int) -> KernelCase:
    m = width * 8 // 3 // 64 * 64
    inputs = {"x": (batch, tokens, width), "w_gate": (m, width), "w_up": (m, width), "w_down": (width, m)}
    return KernelCase("swiglu", f"h{width}-T{tokens}-B{batch}", "width", width, inputs)


def _skip(width: int, tokens: int, batch: int) -> KernelCase:
    x = (batch, tokens, width)
    inputs = {"x": x, "skip": x, "weight": (width, 2 * width), "bias": (width,)}
    return KernelCase("skip_linear", f"h{width}-T{tokens}-B{batch}", "width", width, inputs)


def _rotary(tokens: int, heads: int, head_dim: int, batch: int) -> KernelCase:
    row = (batch, tokens, heads, head_dim)
    inputs = {"q": row, "k": row, "q_weight": (head_dim,), "k_weight": (head_dim,)}
    tables = {"cos": (tokens, head_dim // 2), "sin": (tokens, head_dim // 2)}
    return KernelCase("qk_norm_rotary", f"T{tokens}-Dh{head_dim}-H{heads}-B{batch}", "tokens", tokens, inputs, tables)


def _loss(channels: int, side: int, batch: int) -> KernelCase:
    picture = (batch, channels, side, side)
    data = {"time": (batch,), "weight": (batch,)}
    inputs = {"prediction": picture, "clean": picture, "noise": picture}
    return KernelCase(
        "diffusion_loss", f"{channels}x{side}x{side}-B{batch}", "values", channels * side * side, inputs, data
    )


WIDTHS = (1024, 1152, 1536, 2048, 3072)

CASES: tuple[KernelCase, ...] = (
    *(_rows(op, width, 334, 64) for op in ("adaln", "gated_adaln", "layer_norm", "rms_norm") for width in WIDTHS),
    _rows("gated_residual", 1024, 334, 64),
    _rows("gated_residual", 3072, 334, 64),
    *(_attention(tokens, 16, 64, 64) for tokens in (334, 377)),
    _attention(334, 16, 72, 64),
    _attention(334, 24, 128, 32),
    *(_attention(1358, heads, head_dim, 16) for heads, head_dim in ((16, 64), (24, 128))),
    *(_attention(4174, heads, head_dim, 4) for heads, head_dim in ((16, 64), (24, 128))),
    *(_mlp(width, 334, 32) for width in (1024, 2048, 3072)),
    _mlp(1024, 334, 32, "gelu_tanh"),
    *(_swiglu(width, 334, 32) for width in (1024, 2048)),
    *(_skip(width, 334, 32) for width in (1024, 2048, 3072)),
    *(_rotary(tokens, 16, 64, batch) for tokens, batch in ((334, 64), (4174, 4))),
    _loss(4, 32, 256),
    _loss(4, 128, 16),
)


def chosen(ops: tuple[str, ...] = (), keep: Callable[[KernelCase], bool] | None = None) -> list[KernelCase]:
    """The cases of ``ops`` (none given: all) that ``keep`` keeps."""
    return [case for case in CASES if (not ops or case.op in ops) and (keep is None or keep(case))]
