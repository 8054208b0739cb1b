"""Compiled blocks: the same numbers, one graph per kind of block, and no hold on gathered parameters.

The fast tests trace and differentiate ahead but run op by op (``aot_eager``); the slow ones build the C++ kernels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from longskip.models import uvit
from longskip.models.conditioning import Conditioning
from longskip.models.specs import UViTSpec
from longskip.models.uvit import Block, UViT
from tests.models.test_packed import canonical_grads, gather, inputs, randomised, swap

SHAPE: dict[str, Any] = {
    "width": 24, "depth": 4, "n_heads": 2, "channels": 3, "latent_size": (8, 6), "n_txt": 3, "text_width": 5,
    "n_classes": 4,
}  # fmt: skip
SPECS = {
    "plain": UViTSpec(**SHAPE),
    "qk_norm": UViTSpec(**SHAPE, qk_norm=True),
    "adaln": UViTSpec(**SHAPE, adaln=True),
    "no skips": UViTSpec(**SHAPE, skips=False),
}
KINDS = {"plain": 2, "qk_norm": 2, "adaln": 2, "no skips": 1}  # of blocks


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(model: UViT, given: tuple[Tensor, Tensor, Conditioning]) -> tuple[Tensor, dict[str, Tensor]]:
    out = model(*given)
    out.square().sum().backward()
    return out.detach(), canonical_grads(model)


def check(name: str, layout: str, checkpointing: int, backend: str) -> None:
    """Output and every gradient as without compilation, in training; the output in inference; graphs counted."""
    spec = SPECS[name]
    plain, compiled = randomised(spec, layout), randomised(spec, layout)
    compiled.checkpointing = checkpointing
    counter = CompileCounterWithBackend(backend)
    compiled.compile_blocks(counter)
    (out, grads), (out_compiled, grads_compiled) = run(plain, inputs(spec)), run(compiled, inputs(spec))
    assert counter.frame_count == KINDS[name]
    torch.testing.assert_close(out_compiled, out, rtol=1e-5, atol=1e-6)
    for key, grad in grads.items():
        assert (grads_compiled[key] - grad).abs().max() <= 2e-5 * grad.abs().max(), key
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs(spec)), out, rtol=1e-5, atol=1e-6)
    for seed in (1, 2):
        run(compiled, inputs(spec, seed))
    assert counter.frame_count == 2 * KINDS[name]


@pytest.mark.parametrize(
    ("name", "layout", "checkpointing"), [("plain", "flat", 0), ("qk_norm", "named", 2), ("adaln", "flat", 1)]
)
def test_compiled_blocks_are_the_same_blocks(name: str, layout: str, checkpointing: int) -> None:
    check(name, layout, checkpointing, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [0, 1])
@pytest.mark.parametrize("layout", ["flat", "named"])
@pytest.mark.parametrize("name", ["plain", "qk_norm", "adaln"])
def test_inductor(name: str, layout: str, checkpointing: int) -> None:
    check(name, layout, checkpointing, "inductor")


def held_by_autograd(model: UViT, spec: UViTSpec) -> list[str]:
    """Parameters of blocks whose storage autograd keeps after the forward pass; the backward pass is then checked."""
    expected = run(randomised(spec, model.layout), inputs(spec))[1]
    loss = model(*inputs(spec)).square().sum()
    aside = {name: swap(parameter) for name, parameter in model.named_parameters()}
    held = [name for name, (_, reference) in aside.items() if name.startswith("blocks") and not reference.expired()]
    for name, parameter in model.named_parameters():
        if model.layout == "flat":
            gather(parameter, aside[name][0])
        else:
            parameter.data = aside[name][0]
    loss.backward()
    for name, grad in canonical_grads(model).items():
        assert (grad - expected[name]).abs().max() <= 2e-5 * expected[name].abs().max(), name
    return held


@pytest.mark.parametrize(
    ("name", "backend", "layout"),
    [("plain", "aot_eager_decomp_partition", "flat"), ("adaln", "aot_eager_decomp_partition", "named")]
    + [
        pytest.param(name, "inductor", layout, marks=pytest.mark.slow)
        for name in ("plain", "adaln")
        for layout in ("flat", "named")
    ],
)
def test_parameters_may_be_gathered_anew_before_the_backward_pass(name: str, backend: str, layout: str) -> None:
    """ZeRO-3 drops the gathered storage in between: nothing of it may be kept, by either layout."""
    model = randomised(SPECS[name], layout)
    model.compile_blocks(backend)
    assert held_by_autograd(model, SPECS[name]) == []


def test_another_number_of_tokens_is_one_more_graph() -> None:
    """Of four picture sizes the second is compiled for sizes in general, which serve the others."""
    spec = SPECS["plain"]
    plain, compiled = randomised(spec, "flat"), randomised(spec, "flat")
    counter = CompileCounterWithBackend("aot_eager")
    compiled.compile_blocks(counter)
    _, time, cond = inputs(spec)
    for height, width in ((8, 6), (10, 6), (4, 8), (12, 10), (8, 6)):
        latents = torch.randn(2, 3, height, width)
        (out, grads), (out_compiled, grads_compiled) = (
            run(model, (latents, time, cond)) for model in (plain, compiled)
        )
        torch.testing.assert_close(out_compiled, out, rtol=1e-5, atol=1e-6)
        for key, grad in grads.items():
            torch.testing.assert_close(grads_compiled[key], grad, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 2 * KINDS["plain"]


@pytest.mark.parametrize("name", SPECS)
def test_no_graph_breaks(name: str) -> None:
    spec = SPECS[name]
    x, time, mask = torch.randn(2, 16, 24), torch.randn(2, 24), torch.rand(2, 16) < 0.8
    blocks = randomised(spec, "flat").blocks
    for block in (blocks[0], blocks[-1]):
        skip = x if block.takes_skip else None
        found = torch._dynamo.explain(Block.compute)(block, x, skip, block.views(), time if spec.adaln else None, mask)
        assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


def test_a_graph_break_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test before: compilation does not go on in pieces."""
    monkeypatch.setattr(uvit, "attention", torch._dynamo.disable(uvit.attention))
    model = randomised(SPECS["plain"], "flat")
    model.compile_blocks("aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(*inputs(SPECS["plain"]))


def test_a_compiled_model_keeps_its_names_and_can_be_copied() -> None:
    model = randomised(SPECS["plain"], "flat")
    names = list(model.state_dict())
    model.compile_blocks("aot_eager")
    assert list(model.state_dict()) == names
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.blocks[0].parameters():
            parameter.zero_()
    given = inputs(SPECS["plain"])
    assert not torch.equal(other(*given), model(*given))  # the copy computes with its own parameters
