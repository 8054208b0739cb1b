"""The calls of a U-ViT's and of the word encoder's forward pass, as ``uvit.py`` and ``text.py`` make them (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from longskip.models.calls import Call, TokenClass, UnitCalls

if TYPE_CHECKING:
    from longskip.models.specs import TextEncoderSpec, UViTSpec

__all__ = ["uvit_calls", "word_encoder_calls"]

Tokens = Mapping[TokenClass, int]


def uvit_calls(
    spec: UViTSpec, batch: int, latent_size: tuple[int, int], n_txt: int, *, trained_text: bool, masked: bool
) -> tuple[UnitCalls, ...]:
    """The units of ``spec`` in the order in which tokens pass them; blocks that do the same are one entry.

    ``latent_size`` (H, W) and ``n_txt`` as ``UViTSpec.calls`` checked them. ``trained_text``: gradients go on into the
    text features; ``masked``: attention is given a key mask.
    """
    rows, cols = spec.grid(latent_size)
    tokens: dict[TokenClass, int] = {"label": int(bool(spec.n_classes)), "time": 1, "text": n_txt, "image": rows * cols}
    tokens = {name: count for name, count in tokens.items() if count}
    first = spec.n_blocks - spec.n_skips
    names = [f"blocks.{index}" for index in range(spec.n_blocks)]
    units = [
        UnitCalls(("embed",), _embed(spec, batch, tokens, trained_text)),
        UnitCalls(tuple(names[:first]), _block(spec, batch, tokens, False, masked), checkpointed=True),
    ]
    if spec.n_skips:
        units.append(UnitCalls(tuple(names[first:]), _block(spec, batch, tokens, True, masked), checkpointed=True))
    units.append(UnitCalls(("head",), _head(spec, batch, tokens, latent_size)))
    return tuple(units)


def _linear(rows: int, width: int, out: int, bias: bool = True) -> dict[str, int]:
    return {"rows": rows, "width": width, "out": out, "bias": int(bias)}


def _embed(spec: UViTSpec, batch: int, tokens: Tokens, trained_text: bool) -> tuple[Call, ...]:
    h, patches = spec.width, spec.patch**2 * spec.channels
    only: dict[str, Tokens] = {name: {name: count} for name, count in tokens.items()}  # type: ignore[dict-item]
    values = batch * sum(tokens.values()) * h
    calls = [Call("time.sinusoid", "sinusoid", {"batch": batch, "frequencies": h // 2}, only["time"])]
    if spec.time_mlp:
        calls += [
            Call("time.fc1", "linear", _linear(batch, h, 4 * h), only["time"], "image", needs_input=False),
            Call("time.silu", "silu", {"values": batch * 4 * h}, only["time"]),
            Call("time.fc2", "linear", _linear(batch, 4 * h, h), only["time"], "image"),
        ]
    if "label" in only:
        calls.append(Call("label", "lookup", {"rows": batch, "width": h}, only["label"], "partial"))
    if "text" in only:
        sizes = _linear(batch * tokens["text"], spec.text_width, h)
        calls.append(Call("text", "linear", sizes, only["text"], "partial", needs_input=trained_text))
    sizes = _linear(batch * tokens["image"], patches, h)
    calls.append(Call("patch", "linear", sizes, only["image"], "partial", needs_input=False))
    calls.append(Call("pos", "add", {"values": values}, tokens, "partial"))
    return tuple(calls)


def _block(spec: UViTSpec, batch: int, tokens: Tokens, skip: bool, masked: bool) -> tuple[Call, ...]:
    h, length = spec.width, sum(tokens.values())
    rows, heads, dim = batch * length, spec.n_heads, spec.head_dim
    per_image = {"batch": batch, "tokens": length, "width": h}
    norm = {"rows": rows, "width": h, "weight": 1, "bias": 1}
    calls = []
    if skip:
        calls.append(Call("skip", "skip_linear", {"rows": rows, "width": h, "out": h, "bias": 1}, tokens, "token"))
    if spec.adaln:
        calls += _modulation(spec, batch, 6 * h)
        calls.append(Call("adaln1", "adaln", per_image, tokens))
    else:
        calls.append(Call("norm1", "layer_norm", norm, tokens, "token"))
    calls.append(Call("attn.qkv", "linear", _linear(rows, h, 3 * h, bias=False), tokens, "token"))
    if spec.qk_norm:
        sizes = {"q_rows": rows * heads, "k_rows": rows * heads, "head_dim": dim, "tokens": length}
        sizes |= {"rms": 1, "q_weight": 1, "k_weight": 1, "rotate": 0}
        calls.append(Call("attn.qk_norm", "qk_norm_rotary", sizes, tokens, "token"))
    sizes = {"batch": batch, "queries": length, "keys": length, "heads": heads, "head_dim": dim}
    calls.append(Call("attn", "attention", sizes | {"masked": int(masked)}, tokens))
    calls.append(Call("attn.proj", "linear", _linear(rows, h, h), tokens, "token"))
    if spec.adaln:
        calls.append(Call("adaln2", "gated_adaln", per_image, tokens))
    else:
        calls.append(Call("norm2", "layer_norm", norm | {"residual": 1}, tokens, "token"))
    sizes = {"rows": rows, "width": h, "hidden": spec.mlp_width, "out": h}
    # Without adaLN's gate nothing in the backward pass needs what the second layer makes.
    calls.append(Call("mlp", "mlp", sizes, tokens, "token", tail=not spec.adaln))
    if spec.adaln:
        calls.append(Call("residual", "gated_residual", per_image, tokens, tail=True))
    else:
        calls.append(Call("residual", "add", {"values": rows * h}, tokens, tail=True))
    return tuple(calls)


def _modulation(spec: UViTSpec, batch: int, out: int) -> list[Call]:
    """SiLU and the linear layer that make shifts, scales and gates of the time embedding, once per image.

    The raw sinusoid needs no gradient, what a time MLP makes of it does.
    """
    once: Tokens = {"time": 1}
    sizes = _linear(batch, spec.width, out)
    return [
        Call("ada.silu", "silu", {"values": batch * spec.width}, once, needs_input=spec.time_mlp),
        Call("ada", "linear", sizes, once, "image", needs_input=spec.time_mlp),
    ]


def _head(spec: UViTSpec, batch: int, tokens: Tokens, latent_size: tuple[int, int]) -> tuple[Call, ...]:
    h, rows, (height, width) = spec.width, batch * sum(tokens.values()), latent_size
    calls = []
    if spec.adaln:
        calls += _modulation(spec, batch, 2 * h)
        calls.append(Call("adaln", "adaln", {"batch": batch, "tokens": sum(tokens.values()), "width": h}, tokens))
    else:
        sizes = {"rows": rows, "width": h, "weight": 1, "bias": 1}
        calls.append(Call("norm", "layer_norm", sizes, tokens, "token"))
    calls.append(Call("linear", "linear", _linear(rows, h, spec.patch**2 * spec.c_out), tokens, "token"))
    if spec.conv:
        sizes = {"batch": batch, "channels": spec.c_out, "out": spec.c_out, "height": height, "width": width}
        calls.append(Call("conv", "conv2d", sizes, {"image": tokens["image"]}, "partial"))
    return tuple(calls)


def word_encoder_calls(spec: TextEncoderSpec, batch: int) -> tuple[UnitCalls, ...]:
    """The word encoder's one unit: the table's rows, then layers over windows of neighbouring words."""
    rows, h, text = batch * spec.n_tokens, spec.width, {"text": spec.n_tokens}
    tokens: Tokens = text  # type: ignore[assignment]
    calls = [Call("embedding", "lookup", {"rows": rows, "width": h}, tokens, "partial")]
    for index in range(spec.depth):
        layer = f"layers.{index}"
        sizes = {"rows": rows, "width": h, "weight": 1, "bias": 1}
        calls += [
            Call(f"{layer}.norm", "layer_norm", sizes, tokens, "partial"),
            Call(f"{layer}.linear", "linear", _linear(rows, spec.window * h, h), tokens, "partial"),
            Call(f"{layer}.gelu", "gelu", {"values": rows * h}, tokens),
            Call(f"{layer}.residual", "add", {"values": rows * h}, tokens),
        ]
    return (UnitCalls(("text",), tuple(calls)),)
