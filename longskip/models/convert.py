"""Names of the original U-ViT code ↔ ours. The values are the same bits; the patch projection alone changes layout."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from longskip.errors import CheckpointError
from longskip.models.specs import UViTSpec

__all__ = ["from_original", "original_names", "to_original"]

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
    for ours in _shapes(spec):
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


def _shapes(spec: UViTSpec) -> dict[str, tuple[int, ...]]:
    return {entry.name: entry.shape for table in spec.parameters().values() for entry in table}


def _original_shapes(spec: UViTSpec) -> dict[str, tuple[int, ...]]:
    """Original name → shape in the original, which differs for the patch convolution and the positions."""
    shapes = _shapes(spec)
    shapes["embed.patch.weight"] = (spec.width, spec.channels, spec.patch, spec.patch)
    shapes["embed.pos"] = (1, *shapes["embed.pos"])
    return {original: shapes[ours] for ours, original in original_names(spec).items()}


def _refuse_others(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    def listed(names: Iterable[str]) -> str:
        names = list(names)
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

    missing = [name for name in shapes if name not in state]
    unexpected = [name for name in state if name not in shapes]
    misshaped = [
        f"{name} {tuple(state[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    faults = (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped))
    if any(names for _, names in faults):
        found = "; ".join(f"{kind}: {listed(names)}" for kind, names in faults if names)
        raise CheckpointError(
            f"{what} does not fit the spec: {found}", cure="give the spec of the model that was saved"
        )


def from_original(state: Mapping[str, Tensor], spec: UViTSpec) -> dict[str, Tensor]:
    """A state dict of the original code → ours, for ``UViT.load_state_dict``.

    Raises ``CheckpointError`` naming the parameters that are missing, unexpected or misshaped.
    """
    _refuse_others(state, _original_shapes(spec), "the original checkpoint")
    ours = {name: state[original] for name, original in original_names(spec).items()}
    weight = ours["embed.patch.weight"]  # (h, c, p1, p2)
    ours["embed.patch.weight"] = weight.permute(0, 2, 3, 1).reshape(spec.width, -1)  # (h, p1 p2 c)
    ours["embed.pos"] = ours["embed.pos"][0]
    return ours


def to_original(state: Mapping[str, Tensor], spec: UViTSpec) -> dict[str, Tensor]:
    """Our state dict → the original code's; the inverse of ``from_original``, with the same errors."""
    _refuse_others(state, _shapes(spec), "the checkpoint")
    out = {original: state[ours] for ours, original in original_names(spec).items()}
    rows = state["embed.patch.weight"].reshape(spec.width, spec.patch, spec.patch, spec.channels)
    out["patch_embed.proj.weight"] = rows.permute(0, 3, 1, 2).contiguous()  # (h, c, p1, p2)
    out["pos_embed"] = state["embed.pos"][None]
    return out
