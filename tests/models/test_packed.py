"""The two layouts are one model: outputs, gradients, state dicts; and flat parameters may be swapped under autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from longskip import kernels
from longskip.errors import LongskipError, SpecError
from longskip.models.conditioning import Conditioning
from longskip.models.packed import ALIGN, Packed
from longskip.models.presets import preset
from longskip.models.specs import ParamSpec, TextEncoderSpec, UViTSpec
from longskip.models.text import WordEncoder
from longskip.models.uvit import UViT

SPEC = UViTSpec(
    24, 4, 2, channels=3, latent_size=(8, 6), n_txt=3, text_width=5, n_classes=4, time_mlp=True, qk_norm=True
)
ADA = UViTSpec(24, 2, 2, channels=3, latent_size=(8, 6), n_txt=3, text_width=5, n_classes=4, adaln=True)
TABLE = (
    ParamSpec("a.weight", (3, 5), "trunc_normal", True),
    ParamSpec("a.bias", (3,), "normal", False),
    ParamSpec("b.weight", (8, 8), "trunc_normal", True),
    ParamSpec("c.weight", (7,), "ones", False),
)


def inputs(spec: UViTSpec, seed: int = 0) -> tuple[Tensor, Tensor, Conditioning]:
    g = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    cond = Conditioning(text=torch.randn(2, 3, 5, generator=g), text_mask=mask, label=torch.tensor([1, 3]))
    return torch.randn(2, 3, 8, 6, generator=g), torch.rand(2, generator=g), cond


def randomised(spec: UViTSpec, layout: Any, seed: int = 1) -> UViT:
    """A model whose zero-initialised parameters are not zero, so that every path carries a gradient."""
    model = UViT(spec, layout)
    g = torch.Generator().manual_seed(seed)
    state = {k: torch.randn(v.shape, generator=g) * 0.1 for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    return model


def grad_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def canonical_grads(model: torch.nn.Module) -> dict[str, Tensor]:
    grads = {}
    for unit in (m for m in model.modules() if isinstance(m, Packed)):
        for name, parameter, offset, shape in unit.canonical():
            count = torch.Size(shape).numel()
            grads[name] = grad_of(parameter).reshape(-1)[offset : offset + count].view(shape)
    return grads


@pytest.mark.parametrize("spec", [SPEC, ADA])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flat_and_named_are_the_same_model(spec: UViTSpec, checkpointing: bool) -> None:
    results = []
    for layout in ("named", "flat"):
        model = randomised(spec, layout)
        model.checkpointing = checkpointing and layout == "flat"
        out = model(*inputs(spec))
        out.square().sum().backward()
        results.append((out.detach(), canonical_grads(model), model.state_dict()))
    (out, grads, state), (out_flat, grads_flat, state_flat) = results
    assert torch.equal(out, out_flat)
    assert list(grads) == list(grads_flat) == list(state) == list(state_flat)
    for name in grads:
        assert torch.equal(grads[name], grads_flat[name]), name
        assert torch.equal(state[name], state_flat[name]), name
        assert grads[name].abs().max() > 0, name


def test_flat_is_at_most_two_aligned_tensors() -> None:
    unit = Packed(TABLE, "flat", "u")
    assert {name: tuple(p.shape) for name, p in unit.named_parameters()} == {"flat_decay": (128,), "flat_plain": (128,)}
    unit.materialize(0)
    used = torch.zeros(128, dtype=torch.bool)
    for name, parameter, offset, shape in unit.canonical():
        assert offset % ALIGN == 0 and name.startswith("u.")
        if parameter is unit.get_parameter("flat_decay"):
            used[offset : offset + torch.Size(shape).numel()] = True
    assert used.sum() == 15 + 64
    assert not unit.get_parameter("flat_decay")[~used].any()
    model = UViT(preset("uvit-tiny"), "flat", device="meta")
    assert all(len(list(block.parameters())) == 2 for block in model.blocks)
    assert len(list(Packed(TABLE[:1], "flat").parameters())) == 1


def test_padding_gets_no_gradient() -> None:
    unit = Packed(TABLE, "flat", device="cpu")
    unit.materialize(0)
    torch.cat([value.flatten() for value in unit.views().values()]).sum().backward()
    assert grad_of(unit.get_parameter("flat_decay")).sum() == 15 + 64
    assert grad_of(unit.get_parameter("flat_plain")).sum() == 10


def test_one_split_is_the_only_way_back() -> None:
    """The graph of a flat unit reaches its parameter through one split, whatever the number of views."""
    unit = Packed(TABLE, "flat", device="cpu")
    parents = {value.grad_fn.next_functions[0][0] for value in unit.views().values()}  # type: ignore[union-attr]
    assert len(parents) == 2 and all("Split" in type(parent).__name__ for parent in parents)


def test_state_dicts_load_across_layouts_and_refuse_misfits() -> None:
    named, flat = randomised(SPEC, "named", 1), randomised(SPEC, "flat", 2)
    flat.load_state_dict(named.state_dict())
    for name, value in named.state_dict().items():
        assert torch.equal(value, flat.state_dict()[name])
    for model in (named, flat):
        state = dict(named.state_dict())
        state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"][:-1]
        state["blocks.0.extra"] = torch.zeros(1)
        del state["head.linear.bias"]
        with pytest.raises(RuntimeError) as caught:
            model.load_state_dict(state)
        for words in ("blocks.0.attn.qkv.weight", "blocks.0.extra", "head.linear.bias"):
            assert words in str(caught.value)
    partial = {k: torch.zeros_like(v) for k, v in named.state_dict().items() if k.startswith("head")}
    before = flat.state_dict()["blocks.1.mlp.fc1.weight"].clone()
    _, unexpected = flat.load_state_dict(partial, strict=False)
    assert not unexpected and not flat.state_dict()["head.linear.weight"].any()
    assert torch.equal(before, flat.state_dict()["blocks.1.mlp.fc1.weight"])


def test_meta_models_materialise_in_any_order_or_load_by_assignment() -> None:
    whole = UViT(SPEC, "flat", seed=9).state_dict()
    late = UViT(SPEC, "flat", device="meta")
    with pytest.raises(RuntimeError, match="materialize"):
        late.load_state_dict(whole)
    units = [module for module in late.modules() if isinstance(module, Packed)]
    for unit in reversed(units):
        unit.materialize(9)
    assert all(torch.equal(whole[name], value) for name, value in late.state_dict().items())
    assigned = UViT(SPEC, "flat", device="meta")
    assigned.load_state_dict(whole, assign=True)
    assert all(torch.equal(whole[name], value) for name, value in assigned.state_dict().items())
    half = UViT(SPEC, "named", device="meta")
    for unit in (module for module in half.modules() if isinstance(module, Packed)):
        unit.materialize(9, dtype=torch.bfloat16)
    assert all(torch.equal(whole[n].bfloat16(), value) for n, value in half.state_dict().items())


def test_materialize_in_place_keeps_the_parameter() -> None:
    unit = Packed(TABLE, "flat", device="cpu")
    before = unit.get_parameter("flat_decay")
    with torch.no_grad():
        before.fill_(float("nan"))
    unit.materialize(2)
    assert unit.get_parameter("flat_decay") is before and before.isfinite().all()


def swap(parameter: torch.nn.Parameter) -> tuple[Tensor, StorageWeakRef]:
    """What ZeRO-3 does after a forward pass: the data is set aside (here: a copy) and the gathered storage let go."""
    reference = StorageWeakRef(parameter.untyped_storage())
    aside = parameter.data.clone()
    parameter.data = torch.empty(0)
    return aside, reference


def gather(parameter: torch.nn.Parameter, aside: Tensor) -> None:
    """Back again as a slice of a larger buffer, at another offset."""
    buffer = torch.full((aside.numel() + 192,), float("nan"))
    buffer[128 : 128 + aside.numel()] = aside
    parameter.data = buffer[128 : 128 + aside.numel()]


@pytest.mark.parametrize("spec", [SPEC, ADA])
def test_saved_tensors_keep_no_gathered_storage_alive(spec: UViTSpec) -> None:
    expected = randomised(spec, "flat")
    expected(*inputs(spec)).square().sum().backward()
    model = randomised(spec, "flat")
    loss = model(*inputs(spec)).square().sum()
    aside = {name: swap(parameter) for name, parameter in model.named_parameters()}
    for name, (_, reference) in aside.items():
        assert reference.expired(), f"autograd holds the storage of {name}"
    for name, parameter in model.named_parameters():
        gather(parameter, aside[name][0])
    loss.backward()
    for (name, one), other in zip(expected.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(grad_of(one), grad_of(other)), name


def test_the_word_encoders_layers_keep_none_either() -> None:
    text, tokens = TextEncoderSpec(20, 12, 9, depth=2), torch.arange(9)[None]
    expected, model = WordEncoder(text, "flat"), WordEncoder(text, "flat")
    expected(tokens).square().sum().backward()
    loss = model(tokens).square().sum()
    flats = list(model.parameters())
    kept = [swap(flat) for flat in flats]
    assert len(flats) == 2 and all(reference.expired() for _, reference in kept)
    for flat, (aside, _) in zip(flats, kept, strict=True):
        gather(flat, aside)
    loss.backward()
    for one, other in zip(expected.parameters(), flats, strict=True):
        assert torch.equal(grad_of(one), grad_of(other))


def test_a_compiled_block_keeps_no_storage_either() -> None:
    expected: Any = randomised(SPEC, "flat").blocks[0]
    model: Any = randomised(SPEC, "flat").blocks[0]
    model.compute = torch.compile(model.compute, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 5, 24)
    expected(x).square().sum().backward()
    loss = model(x).square().sum()
    kept = {name: swap(parameter) for name, parameter in model.named_parameters()}
    assert all(reference.expired() for _, reference in kept.values())
    for name, parameter in model.named_parameters():
        gather(parameter, kept[name][0])
    loss.backward()
    for one, other in zip(expected.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(grad_of(one), grad_of(other), rtol=1e-4, atol=1e-5)


def test_without_the_guard_the_storage_stays() -> None:
    """The control of the test before: what it looks for is there when the guard is off."""
    block = randomised(SPEC, "flat").blocks[0]
    x = torch.randn(2, 5, 24)
    out = block(x, guarded=False)
    _, reference = swap(block.get_parameter("flat_decay"))
    assert not reference.expired() and out.requires_grad


def test_backward_without_gathering_says_so() -> None:
    block = randomised(SPEC, "flat").blocks[0]
    out = block(torch.randn(2, 5, 24)).sum()
    swap(block.get_parameter("flat_decay"))
    with pytest.raises(LongskipError, match="gather"):
        out.backward()
    with pytest.raises(LongskipError, match="gather"):
        block(torch.randn(2, 5, 24))


def test_parameters_in_one_buffer_are_told_apart() -> None:
    """ZeRO-3 may gather both flat tensors into one storage; the handle must name the right one."""
    expected, model = randomised(SPEC, "flat").blocks[4], randomised(SPEC, "flat").blocks[4]
    x, skip = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    expected(x, skip).square().sum().backward()
    flats = list(model.parameters())
    buffer = torch.cat([flat.data for flat in flats])
    for flat, piece in zip(flats, buffer.split([flat.numel() for flat in flats]), strict=True):
        flat.data = piece
    del buffer, piece
    loss = model(x, skip).square().sum()
    kept = [swap(flat) for flat in flats]
    assert all(reference.expired() for _, reference in kept)
    for flat, (aside, _) in zip(flats, kept, strict=True):
        gather(flat, aside)
    loss.backward()
    for one, other in zip(expected.parameters(), flats, strict=True):
        assert torch.equal(grad_of(one), grad_of(other))


def test_higher_derivatives_and_transforms_pass_the_guard() -> None:
    g = torch.Generator().manual_seed(3)
    x, v = (torch.randn(1, 4, 24, generator=g) for _ in range(2))
    seconds, tangents = [], []
    with kernels.use("reference"):
        for layout in ("named", "flat"):
            block = randomised(SPEC, layout).blocks[0]
            parameters = list(block.parameters())
            first = torch.autograd.grad(block(x).square().sum(), parameters, create_graph=True)
            seconds.append(torch.stack([gradient.square().sum() for gradient in first]).sum())
            seconds[-1].backward()
            tangents.append(torch.func.jvp(block, (x,), (v,))[1].detach())
            grad = torch.func.grad(lambda y, block=block: block(y).square().sum())(x)
            assert grad.shape == x.shape and grad.isfinite().all()
            if layout == "named":
                expected = canonical_grads(block)
            else:
                for name, gradient in canonical_grads(block).items():
                    torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tangents[0], tangents[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(seconds[0], seconds[1])


def test_unknown_layout_is_refused() -> None:
    with pytest.raises(SpecError, match="'packed'"):
        Packed(TABLE, "packed")  # type: ignore[arg-type]
