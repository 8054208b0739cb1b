"""Calls of the kernels at the sizes that U-ViT models have: what ``bench kernels`` measures and the static report compiles.

The sizes: 334 and 377 tokens are 256² pictures (16 x 16 patches, one time token, 77 or 120 text tokens), 4,174 tokens are
1024² ones; widths and heads are those of the presets. Torch and triton only.

``CASES`` are measured, tuned and compiled; ``SWEEP`` adds the points of the plot of time against tokens, and is measured
on a GPU or when it is asked for; ``COMPILED`` are the further forms of attention's kernels, and are compiled only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from longskip import kernels

Shape = tuple[int, ...]

# Tensors that every sample has its own of: what a smaller batch of the same case is cut from.
_PER_SAMPLE = {
    "x", "y", "q", "k", "v", "skip", "gate", "shift", "scale", "prediction", "clean", "noise", "time", "key_mask",
}  # fmt: skip


@dataclass(frozen=True)
class KernelCase:
    """One call of a public op: tensors to differentiate by, tensors that are data, keywords.

    ``series``: cases of one op and series differ in ``x`` only, and make a line of a plot; empty for those of none.
    ``lengths``: the tokens of sequences that lie one after the other; their offsets are a keyword, on the host.
    """

    op: str
    label: str
    x_name: str  # what varies over the cases of one plot, and its value
    x: int
    inputs: Mapping[str, Shape]
    data: Mapping[str, Shape] = field(default_factory=dict)
    keywords: Mapping[str, Any] = field(default_factory=dict)
    series: str = ""
    lengths: Shape = ()
    sweep: bool = False  # a point of a line only: neither tuned nor compared with compiled code

    @property
    def id(self) -> str:
        return f"{self.op}-{self.label}"

    def tensors(
        self, device: torch.device, dtype: torch.dtype, seed: int = 0
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(inputs that require gradients, data and keywords): random normal values, of the order that training has.

        A mask is True in three places of four.
        """
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
        extra |= {name: value > 0.25 for name, value in extra.items() if name.endswith("mask")}
        if self.lengths:
            extra["cu_seqlens"] = torch.tensor((0, *self.lengths)).cumsum(0)
        return leaves, {**extra, **self.keywords}

    def smaller(self, batch: int) -> KernelCase:
        """The case with ``batch`` samples; of packed sequences three times as many, so that there are ends in between."""
        label = re.sub(r"-B\d+", f"-B{batch}", self.label)
        series = re.sub(r"batch \d+|[\d,]+ tokens in all", f"batch {batch}", self.series)
        if self.lengths:
            lengths = self.lengths[: 3 * batch]
            inputs = {name: (sum(lengths), *shape[1:]) for name, shape in self.inputs.items()}
            return replace(self, label=re.sub(r"-S\d+", f"-S{len(lengths)}", label), inputs=inputs, lengths=lengths)
        loss = {"weight"} if self.op == "diffusion_loss" else set()

        def cut(shapes: Mapping[str, Shape], names: set[str]) -> dict[str, Shape]:
            return {name: (batch, *shape[1:]) if name in names else shape for name, shape in shapes.items()}

        inputs, data = cut(self.inputs, _PER_SAMPLE), cut(self.data, _PER_SAMPLE | loss)
        return replace(self, label=label, series=series, inputs=inputs, data=data)

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
    series = f"{tokens} tokens, batch {batch}"
    return KernelCase(op, f"h{width}-T{tokens}-B{batch}", "width", width, shapes[op], series=series)


def _attention(
    tokens: int, heads: int, head_dim: int, batch: int, *, masked: bool = False, series: str = "", sweep: bool = False
) -> KernelCase:
    label = f"T{tokens}-Dh{head_dim}-H{heads}-B{batch}{'-masked' if masked else ''}"
    data = {"key_mask": (batch, tokens)} if masked else {}
    inputs = {"q": (batch, tokens, 3, heads, head_dim)}
    return KernelCase("attention", label, "tokens", tokens, inputs, data, series=series, sweep=sweep)


def _packed(name: str, lengths: Shape, heads: int, head_dim: int) -> KernelCase:
    """Attention within sequences of different lengths; ``tokens`` are those of the longest."""
    label = f"{name}{max(lengths)}-Dh{head_dim}-H{heads}-S{len(lengths)}"
    inputs = {"q": (sum(lengths), 3, heads, head_dim)}
    return KernelCase("attention_varlen", label, "tokens", max(lengths), inputs, lengths=lengths)


def _captions(image: Shape, most: int, sequences: int) -> Shape:
    """Lengths of packed samples: a time token, image tokens of the sizes in turn, and captions of 8 to ``most`` tokens.

    The captions' lengths go round by steps of 37, which is prime to the ranges below: neighbours differ, each length comes
    as often as any other.
    """
    return tuple(1 + image[i % len(image)] + 8 + 37 * (i + 1) % (most - 7) for i in range(sequences))


def _mlp(width: int, tokens: int, batch: int, activation: str = "gelu") -> KernelCase:
    m = 4 * width
    inputs = {"x": (batch, tokens, width), "w1": (m, width), "b1": (m,), "w2": (width, m), "b2": (width,)}
    return KernelCase(
        "mlp", f"h{width}-T{tokens}-B{batch}-{activation}", "width", width, inputs, {}, {"activation": activation},
        series=f"{activation}, {tokens} tokens, batch {batch}",
    )  # fmt: skip


def _swiglu(width: int, tokens: int, batch: int) -> KernelCase:
    m = width * 8 // 3 // 64 * 64
    inputs = {"x": (batch, tokens, width), "w_gate": (m, width), "w_up": (m, width), "w_down": (width, m)}
    series = f"{tokens} tokens, batch {batch}"
    return KernelCase("swiglu", f"h{width}-T{tokens}-B{batch}", "width", width, inputs, series=series)


def _skip(width: int, tokens: int, batch: int) -> KernelCase:
    x = (batch, tokens, width)
    inputs = {"x": x, "skip": x, "weight": (width, 2 * width), "bias": (width,)}
    series = f"{tokens} tokens, batch {batch}"
    return KernelCase("skip_linear", f"h{width}-T{tokens}-B{batch}", "width", width, inputs, series=series)


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
TOKENS = (128, 256, 334, 377, 512, 1024, 2048, 4174)
_ALL_TOKENS = 16384  # of a batch, as near as whole samples come, at every point of the sweep
_HEADS_OF_64 = f"16 heads of 64, {_ALL_TOKENS:,} tokens in all"

CASES: tuple[KernelCase, ...] = (
    *(_rows(op, width, 334, 64) for op in ("adaln", "gated_adaln", "layer_norm", "rms_norm") for width in WIDTHS),
    _rows("gated_residual", 1024, 334, 64),
    _rows("gated_residual", 3072, 334, 64),
    *(_attention(tokens, 16, 64, 64) for tokens in (334, 377)),
    _attention(334, 16, 64, 64, masked=True),
    _attention(334, 16, 72, 64),
    _attention(334, 24, 128, 32),
    *(_attention(1358, heads, head_dim, 16) for heads, head_dim in ((16, 64), (24, 128))),
    _attention(4174, 16, 64, 4, series=_HEADS_OF_64),
    _attention(4174, 24, 128, 4),
    _packed("captions", _captions((256,), 77, 64), 16, 64),
    _packed("captions", _captions((256,), 120, 64), 24, 128),
    _packed("sizes", _captions((256, 1024, 576), 77, 32), 16, 64),
    _packed("sizes", _captions((256, 4096, 1024), 77, 12), 24, 128),
    *(_mlp(width, 334, 32) for width in (1024, 2048, 3072)),
    _mlp(1024, 334, 32, "gelu_tanh"),
    *(_swiglu(width, 334, 32) for width in (1024, 2048)),
    *(_skip(width, 334, 32) for width in (1024, 2048, 3072)),
    *(_rotary(tokens, 16, 64, batch) for tokens, batch in ((334, 64), (4174, 4))),
    _loss(4, 32, 256),
    _loss(4, 128, 16),
)

SWEEP: tuple[KernelCase, ...] = tuple(
    _attention(tokens, 16, 64, round(_ALL_TOKENS / tokens), series=_HEADS_OF_64, sweep=True)
    for tokens in TOKENS
    if tokens != 4174  # one of the cases above
)


def _forms(head_dim: int) -> list[KernelCase]:
    """Plain, masked and packed; up to 64 wide also where the short kernels' blocks have no end, and past those kernels."""
    found = []
    for tokens in (334, 1358) if head_dim <= 64 else (334,):
        found += [
            _attention(tokens, 16, head_dim, 64),
            _attention(tokens, 16, head_dim, 64, masked=True),
            _packed("packed", (tokens, tokens - 77) * 8, 16, head_dim),
        ]
    return [*found, _attention(512, 16, head_dim, 64)] if head_dim <= 64 else found


# Every head dim that attention's kernels take: what each form takes by default is compiled.
COMPILED: tuple[KernelCase, ...] = tuple(
    case for head_dim in (32, 48, 64, 72, 80, 96, 128, 160, 256) for case in _forms(head_dim)
)
