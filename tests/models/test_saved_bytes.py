"""``saved_bytes`` against what autograd really saves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from longskip import kernels
from longskip.errors import SpecError
from longskip.kernels import jit
from longskip.models.conditioning import Conditioning
from longskip.models.specs import TextEncoderSpec, UViTSpec
from longskip.models.text import WordEncoder
from longskip.models.uvit import UViT

BASE = UViTSpec(32, 4, 2, channels=3, latent_size=(8, 12), n_txt=3, text_width=7)


def saved_storages(
    spec: UViTSpec, batch: int, dtype: torch.dtype, checkpointing: int, size: tuple[int, int], device: str = "cpu",
    backend: str = "torch",
) -> int:  # fmt: skip
    """Bytes of the distinct storages that the graph of one forward pass saves, parameters apart."""
    model = UViT(spec, device=device).to(dtype)
    model.checkpointing = checkpointing
    cond = Conditioning(
        text=torch.randn(batch, spec.n_txt, spec.text_width, dtype=dtype, device=device) if spec.n_txt else None,
        label=torch.zeros(batch, dtype=torch.long, device=device) if spec.n_classes else None,
    )
    latents = torch.randn(batch, spec.channels, *size, device=device)
    time = torch.rand(batch, device=device)
    return saved_of(lambda: model(latents, time, cond), model, backend)


def saved_of(call: Callable[[], torch.Tensor], model: torch.nn.Module, backend: str = "torch") -> int:
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # a freed storage's address would be given out again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with kernels.use(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
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


@pytest.mark.parametrize("checkpointing", [0, 1, 2, 3])
@pytest.mark.parametrize("change", CHANGES)
def test_equals_what_autograd_saves(change: dict[str, Any], checkpointing: int) -> None:
    spec = replace(BASE, **change)
    for batch, size in ((1, spec.latent_size), (3, (10, 6))):
        form = spec.saved_bytes(batch, 4, checkpointing, latent_size=size)
        assert form.total == saved_storages(spec, batch, torch.float32, checkpointing, size)


@pytest.mark.parametrize(("change", "checkpointing"), [
    ({}, 0), ({"adaln": True, "time_mlp": True, "qk_norm": True}, 0), ({"qk_norm": True, "skips": False}, 0),
    pytest.param({}, 1, marks=pytest.mark.slow), pytest.param({"adaln": True}, 2, marks=pytest.mark.slow),
])  # fmt: skip
def test_equals_what_our_kernels_save(change: dict[str, Any], checkpointing: int) -> None:
    """Interpreted. Their attention needs heads of 32 values."""
    spec = replace(BASE, width=64, depth=3, latent_size=(4, 6), **change)
    form = spec.saved_bytes(2, 4, checkpointing, kernels="triton")
    assert form.total == saved_storages(spec, 2, torch.float32, checkpointing, spec.latent_size, backend="triton")
    assert form.total < spec.saved_bytes(2, 4, checkpointing).total or checkpointing == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # bfloat16 is refused without a GPU
@pytest.mark.parametrize("change", CHANGES)
def test_equals_what_our_ops_save(change: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops of our kernels without what they compute: any option in both dtypes, checkpointed or not."""
    monkeypatch.setattr(jit, "launch", lambda *args, **constants: None)
    spec = replace(BASE, width=64, **change)
    for checkpointing in (0, 1, 2, 3):
        form = spec.saved_bytes(2, dtype.itemsize, checkpointing, kernels="triton")
        assert form.total == saved_storages(spec, 2, dtype, checkpointing, spec.latent_size, backend="triton")


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_equals_what_the_word_encoder_saves(depth: int) -> None:
    spec = TextEncoderSpec(50, 24, 7, depth)
    model = WordEncoder(spec)
    tokens = torch.zeros(3, 7, dtype=torch.long)
    assert spec.saved_bytes(3, 4) == saved_of(lambda: model(tokens), model)


class FusedAttention(torch.autograd.Function):
    """What a fused attention saves: q, k, v, its output, the log-sum-exp in float32."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        b, t, heads, dim = q.shape
        out = torch.empty(b, t, heads, dim, dtype=q.dtype, device=q.device)
        ctx.save_for_backward(q, k, v, out, torch.empty(b, heads, t, device=q.device))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError


def fused_attention(
    q: torch.Tensor, k: torch.Tensor | None = None, v: torch.Tensor | None = None, *, key_mask: None
) -> torch.Tensor:
    return FusedAttention.apply(*(q.unbind(2) if k is None else (q, k, v)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
def test_off_the_cpu(change: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On meta the norms save what GPUs save (on a CPU in bfloat16 they work on copies); attention, which meta takes
    apart, is replaced by one that saves what fused kernels do."""
    monkeypatch.setattr("longskip.models.uvit.attention", fused_attention)
    spec = replace(BASE, **change)
    measured = saved_storages(spec, 2, dtype, False, spec.latent_size, "meta")
    assert spec.saved_bytes(2, dtype.itemsize).total == measured


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(SpecError, match="kernels = 'cuda' are unknown"):
        BASE.saved_bytes(1, 4, kernels="cuda")  # type: ignore[arg-type]


def test_what_checkpointing_recomputes() -> None:
    plain, kept = BASE.saved_bytes(2, 4), BASE.saved_bytes(2, 4, checkpointing=True)
    assert kept.recompute == plain.skip_block and plain.recompute == 0
    assert kept.block == 2 * BASE.n_tokens * BASE.width * 4
    assert kept.peak == kept.total + plain.skip_block < plain.peak == plain.total
    row = 2 * BASE.n_tokens * BASE.width * 4
    assert plain.skip_block - plain.block == 2 * row
    assert 16 * row < plain.block < 17 * row
