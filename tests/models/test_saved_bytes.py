"""``saved_bytes`` against what autograd really saves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from longskip import kernels
from longskip.models.conditioning import Conditioning
from longskip.models.specs import UViTSpec
from longskip.models.uvit import UViT

BASE = UViTSpec(32, 4, 2, channels=3, latent_size=(8, 12), n_txt=3, text_width=7)


def saved_storages(spec: UViTSpec, batch: int, dtype: torch.dtype, checkpointing: bool, size: tuple[int, int]) -> int:
    """Bytes of the distinct storages that the graph of one forward pass saves, parameters apart."""
    model = UViT(spec).to(dtype)
    model.checkpointing = checkpointing
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # a freed storage's address would be given out again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    cond = Conditioning(
        text=torch.randn(batch, spec.n_txt, spec.text_width, dtype=dtype) if spec.n_txt else None,
        label=torch.zeros(batch, dtype=torch.long) if spec.n_classes else None,
    )
    latents, time = torch.randn(batch, spec.channels, *size), torch.rand(batch)
    with kernels.use("torch"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(latents, time, cond)
    assert out.requires_grad
    return sum(storages.values())


CHANGES: list[dict[str, Any]] = [
    {},
    {"skips": False, "conv": False},
    {"qk_norm": True, "n_classes": 5},
    {"adaln": True},
    {"adaln": True, "time_mlp": True, "qk_norm": True, "mlp_ratio": 3, "out_channels": 6},
    {"time_mlp": True, "n_txt": 0, "text_width": 0, "depth": 1},
]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_equals_what_autograd_saves(change: dict[str, Any], checkpointing: bool) -> None:
    spec = replace(BASE, **change)
    for batch, size in ((1, spec.latent_size), (3, (10, 6))):
        form = spec.saved_bytes(batch, 4, checkpointing, latent_size=size)
        assert form.total == saved_storages(spec, batch, torch.float32, checkpointing, size)


def narrow_layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Layer norm in the parameters' dtype, as GPUs run it; on the CPU the kernel goes through float32 copies."""
    total = x if residual is None else x + residual
    out = F.layer_norm(total, (x.shape[-1],), weight, bias, eps)
    return out if residual is None else (total, out)


@pytest.mark.parametrize("change", CHANGES)
def test_bfloat16_differs_by_the_norms_statistics_alone(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's CPU layer norm keeps mean and 1/std in bfloat16; the form says 4 bytes, as GPUs do."""
    monkeypatch.setattr("longskip.models.uvit.layer_norm", narrow_layer_norm)
    spec = replace(BASE, **change)
    measured = saved_storages(spec, 2, torch.bfloat16, False, spec.latent_size)
    statistics = (2 * spec.n_blocks + 1) * 2 * 2 * spec.n_tokens
    assert spec.saved_bytes(2, 2).total == measured + statistics * (4 - 2)


def test_what_checkpointing_recomputes() -> None:
    plain, kept = BASE.saved_bytes(2, 4), BASE.saved_bytes(2, 4, checkpointing=True)
    assert kept.recompute == plain.skip_block and plain.recompute == 0
    assert kept.block == 2 * BASE.n_tokens * BASE.width * 4
    assert kept.peak == kept.total + plain.skip_block < plain.peak == plain.total
    row = 2 * BASE.n_tokens * BASE.width * 4
    assert plain.skip_block - plain.block == 2 * row
    assert 16 * row < plain.block < 17 * row
