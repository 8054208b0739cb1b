"""A whole U-ViT by the Triton kernels (interpreted) and by plain torch: one loss, the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from longskip import kernels
from longskip.kernels import backends
from longskip.models.conditioning import Conditioning
from longskip.models.presets import preset
from longskip.models.uvit import UViT
from tests.models.test_packed import randomised

SHAPES: dict[str, dict[str, Any]] = {
    "in-context time": {},
    "adaLN time": {"adaln": True},
    "adaLN time, qk-norm": {"adaln": True, "qk_norm": True},
}


def loss_and_gradients(model: UViT, backend: str) -> tuple[float, dict[str, torch.Tensor], dict[str, dict[str, str]]]:
    generator = torch.Generator().manual_seed(5)
    spec = model.spec
    pictures = torch.randn(3, spec.channels, *spec.latent_size, generator=generator)
    noise = torch.randn(pictures.shape, generator=generator)
    time = torch.rand(3, generator=generator)
    text = torch.randn(3, spec.n_txt, spec.text_width, generator=generator)
    mask = torch.arange(spec.n_txt) < torch.tensor([[spec.n_txt], [3], [1]])
    model.zero_grad()
    kernels.configure({"all": backend})
    try:
        noised = (1 - time.view(-1, 1, 1, 1)) * pictures + time.view(-1, 1, 1, 1) * noise
        out = model(noised, time, Conditioning(text=text, text_mask=mask))
        loss = kernels.diffusion_loss(out, pictures, noise, time, torch.ones(3)).mean()
        loss.backward()
        served = backends.served()
    finally:
        kernels.configure({})
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, served


@pytest.mark.parametrize("name", SHAPES)
def test_the_same_loss_and_gradients(name: str) -> None:
    spec = preset("uvit-tiny", **SHAPES[name])
    model = UViT(spec, layout="named")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(
                torch.randn(p.shape, generator=generator) * (0.3 / max(1, p.shape[-1]) ** 0.5 if p.ndim > 1 else 0.1)
            )
    theirs, wanted, _ = loss_and_gradients(model, "torch")
    ours, found, served = loss_and_gradients(model, "triton")
    assert {backend for choices in served.values() for backend in choices} == {"triton"}
    assert ours == pytest.approx(theirs, rel=2e-6)
    assert found.keys() == wanted.keys()
    for key, grad in wanted.items():
        error = (found[key] - grad).norm() / grad.norm().clamp_min(1e-12)
        assert error <= 2e-5, f"{key}: {error:.2e}"


@pytest.mark.parametrize("checkpointing", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_compiled_blocks_hold_the_kernels_without_a_graph_break(checkpointing: int) -> None:
    """``compile_blocks`` asks for full graphs: a break would raise. Twice checkpointed: the forward ops run again."""
    spec = preset("uvit-tiny", **SHAPES["adaLN time, qk-norm"])
    torch._dynamo.reset()
    plain, compiled = randomised(spec, "named"), randomised(spec, "named")
    compiled.checkpointing = checkpointing
    counter = CompileCounterWithBackend("aot_eager")
    compiled.compile_blocks(counter)
    ours, found, _ = loss_and_gradients(compiled, "triton")
    theirs, wanted, _ = loss_and_gradients(plain, "triton")
    ops = {str(node.target) for graph in counter.graphs for node in graph.graph.nodes if node.op == "call_function"}
    for op in ("attention", "adaln", "mlp", "skip_linear", "qk_norm_rotary"):
        assert any(f"longskip.{op}" in name for name in ops), f"{op} is not in the graphs"
    assert ours == pytest.approx(theirs, rel=1e-6)
    for key, grad in wanted.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-5, atol=1e-6, msg=key)
    torch._dynamo.reset()
