"""Names of the original U-ViT code ↔ ours. The values are the same bits; the patch projection alone changes layout.

``from_original`` and ``to_original`` convert state dicts; a file larger than memory is converted tensor by tensor:
``refuse_others`` on its shapes, then ``value_from_original`` or ``value_to_original`` for each name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from longskip.errors import CheckpointError
from longskip.models.specs import UViTSpec

__all__ = [
    "from_original",
    "original_names",
    "original_shapes",
    "our_shapes",
    "refuse_others",
    "to_original",
    "value_from_original",
    "value_to_original",
]

# ours -> original, outside the blocks; every .weight and .bias keeps its ending
_OUTER = {
    "embed.patch": "patch_embed.proj",
    "embed.text": "context_embed",
    "embed.label": "label_emb",
    "embed.time.fc1": "time_embed.0",
    "embed.time.fc2": "time_embed.2",
    "head.norm": "norm",
    "head.linear": "decoder_pred",
    "head.conv": "final_layer",
}


def original_names(spec: UViTSpec) -> dict[str, str]:
    """Our name → the original's, for every parameter; ``CheckpointError`` on a spec that the original cannot hold."""
    if spec.qk_norm or spec.adaln:
        switch = "qk_norm" if spec.qk_norm else "adaln"
        raise CheckpointError(f"the original U-ViT has no {switch}", cure=f"convert a spec with {switch}=False")
    half, names = spec.depth // 2, {}
    for ours in our_shapes(spec):
        if ours == "embed.pos":
            names[ours] = "pos_embed"
        elif match := re.fullmatch(r"blocks\.(\d+)\.(.+)", ours):
            index, rest = int(match[1]), match[2].replace("skip.", "skip_linear.")
            place = f"in_blocks.{index}" if index < half else f"out_blocks.{index - half - 1}"
            names[ours] = f"{'mid_block' if index == half else place}.{rest}"
        else:
            stem, _, ending = ours.rpartition(".")
            names[ours] = f"{_OUTER[stem]}.{ending}"
    return names


def our_shapes(spec: UViTSpec) -> dict[str, tuple[int, ...]]:
    """Our name → shape, in the order in which tokens pass the parameters."""
    return {entry.name: entry.shape for table in spec.parameters().values() for entry in table}


def original_shapes(spec: UViTSpec) -> dict[str, tuple[int, ...]]:
    """Original name → shape in the original, which differs for the patch convolution and the positions."""
    shapes = our_shapes(spec)
    shapes["embed.patch.weight"] = (spec.width, spec.channels, spec.patch, spec.patch)
    shapes["embed.pos"] = (1, *shapes["embed.pos"])
    return {original: shapes[ours] for ours, original in original_names(spec).items()}


def refuse_others(
    found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    what: str,
    cure: str = "give the spec of the model that was saved",
) -> None:
    """Raise ``CheckpointError`` naming missing, unexpected and misshaped tensors unless ``found`` is ``wanted``."""

    def listed(names: Iterable[str]) -> str:
        names = list(names)
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    misshaped = [
        f"{name} {tuple(found[name])} instead of {shape}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name]) != shape
    ]
    faults = (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped))
    if any(names for _, names in faults):
        differing = "; ".join(f"{kind}: {listed(names)}" for kind, names in faults if names)
        raise CheckpointError(f"{what} does not fit the spec: {differing}", cure=cure)


def value_from_original(name: str, value: Tensor, spec: UViTSpec) -> Tensor:
    """The original's tensor that ``original_names(spec)[name]`` names → ours of ``name``."""
    if name == "embed.patch.weight":  # (h, c, p1, p2) → (h, p1 p2 c)
        return value.permute(0, 2, 3, 1).reshape(spec.width, -1)
    return value[0] if name == "embed.pos" else value


def value_to_original(name: str, value: Tensor, spec: UViTSpec) -> Tensor:
    """Our tensor of ``name`` → the original's; the inverse of ``value_from_original``."""
    if name == "embed.patch.weight":  # (h, p1 p2 c) → (h, c, p1, p2)
        rows = value.reshape(spec.width, spec.patch, spec.patch, spec.channels)
        return rows.permute(0, 3, 1, 2).contiguous()
    return value[None] if name == "embed.pos" else value


def from_original(state: Mapping[str, Tensor], spec: UViTSpec) -> dict[str, Tensor]:
    """A state dict of the original code → ours, for ``UViT.load_state_dict``.

    Raises ``CheckpointError`` naming the parameters that are missing, unexpected or misshaped.
    """
    refuse_others(_shapes_of(state), original_shapes(spec), "the original checkpoint")
    return {ours: value_from_original(ours, state[theirs], spec) for ours, theirs in original_names(spec).items()}


def to_original(state: Mapping[str, Tensor], spec: UViTSpec) -> dict[str, Tensor]:
    """Our state dict → the original code's; the inverse of ``from_original``, with the same errors."""
    refuse_others(_shapes_of(state), our_shapes(spec), "the checkpoint")
    return {theirs: value_to_original(ours, state[ours], spec) for ours, theirs in original_names(spec).items()}


def _shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}
