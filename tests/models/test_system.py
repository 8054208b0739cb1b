"""Text encoder and system: names, units, seeds, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longskip.errors import ConditioningError, SpecError
from longskip.models.init import initial_value
from longskip.models.packed import Packed
from longskip.models.presets import preset
from longskip.models.specs import TextEncoderSpec
from longskip.models.system import TextToImage
from longskip.models.text import WordEncoder
from longskip.models.uvit import UViT

SPEC = preset("uvit-tiny", qk_norm=True)
TEXT = TextEncoderSpec(vocab_size=20, width=64, n_tokens=16)


def system(layout: Any = "flat", device: str | None = "meta") -> TextToImage:
    return TextToImage(UViT(SPEC, layout, device), WordEncoder(TEXT, layout, device))


def test_names_and_units() -> None:
    whole = system()
    units = list(whole.units())
    assert [u.prefix for u in units] == [*(f"backbone.{unit}" for unit in SPEC.parameters()), "text"]
    names = [name for name, *_ in whole.canonical()]
    declared = [f"backbone.{entry.name}" for table in SPEC.parameters().values() for entry in table]
    assert names == [*declared, "text.embedding.weight"] == list(whole.state_dict())
    assert sum(torch.Size(shape).numel() for *_, shape in whole.canonical()) == (
        SPEC.param_counts().total + TEXT.param_counts().total
    )
    assert {id(p) for _, p, _, _ in whole.canonical()} == {id(p) for p in whole.parameters()}


def test_materialize_is_keyed_by_the_systems_names() -> None:
    flat, named = system("flat").materialize(3).state_dict(), system("named").materialize(3).state_dict()
    assert all(torch.equal(flat[name], value) for name, value in named.items())
    again = system("flat", None).materialize(3).state_dict()
    assert all(torch.equal(again[name], value) for name, value in named.items())
    name = "backbone.blocks.1.attn.qkv.weight"
    assert torch.equal(flat[name], initial_value(3, name, (192, 64), "trunc_normal"))
    other = system("flat").materialize(4).state_dict()
    assert not torch.equal(other[name], flat[name])


def test_forward_with_tokens_equals_embedded_text() -> None:
    whole = system(device=None)
    latents, time = torch.randn(2, 3, 32, 32), torch.rand(2)
    tokens = torch.randint(0, 20, (2, 16), generator=torch.Generator().manual_seed(0))
    assert whole.text is not None
    text = whole.text(tokens)
    table = whole.state_dict()["text.embedding.weight"]
    assert torch.equal(text, torch.stack([torch.stack([table[i] for i in row]) for row in tokens]))
    out = whole(latents, time, tokens=tokens)
    assert torch.equal(out, whole(latents, time, text=text))
    assert (out - whole(latents, time, tokens=tokens.flip(1))).abs().max() > 0
    out.square().sum().backward()
    for unit in whole.units():
        for parameter in unit.parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0


def test_padding_has_a_learned_vector() -> None:
    encoder = WordEncoder(TEXT, "flat")
    encoder(torch.zeros(1, 16, dtype=torch.long)).sum().backward()
    grad = encoder.get_parameter("flat_plain").grad
    assert grad is not None and grad.view(20, 64)[0].eq(16).all() and not grad.view(20, 64)[1:].any()


def test_text_mask_reaches_the_backbone() -> None:
    whole = system(device=None).materialize(1)
    latents, time, mask = torch.randn(1, 3, 32, 32), torch.rand(1), torch.arange(16)[None] < 4
    tokens = torch.randint(1, 20, (1, 16), generator=torch.Generator().manual_seed(0))
    other = torch.where(mask, tokens, 0)
    first = whole(latents, time, tokens=tokens, text_mask=mask)
    torch.testing.assert_close(first, whole(latents, time, tokens=other, text_mask=mask), rtol=0, atol=1e-6)
    assert (first - whole(latents, time, tokens=tokens)).abs().max() > 1e-5


def test_refusals() -> None:
    with pytest.raises(SpecError, match="16 tokens of width 32"):
        TextToImage(UViT(SPEC, device="meta"), WordEncoder(TextEncoderSpec(20, 32, 16), device="meta"))
    whole = system(device=None)
    latents, time, tokens = torch.randn(1, 3, 32, 32), torch.rand(1), torch.zeros(1, 16, dtype=torch.long)
    with pytest.raises(ConditioningError, match="embedded text as well"):
        whole(latents, time, tokens=tokens, text=torch.zeros(1, 16, 64))
    with pytest.raises(ConditioningError, match="no text encoder"):
        TextToImage(UViT(SPEC))(latents, time, tokens=tokens)
    with pytest.raises(ConditioningError, match="needs text"):
        whole(latents, time)
    with pytest.raises(ConditioningError, match=r"0\.\.20, the vocabulary 0\.\.19"):
        whole(latents, time, tokens=torch.arange(5, 21)[None] * 0 + torch.tensor([0] * 15 + [20]))
    with pytest.raises(ConditioningError, match="17"):
        whole(latents, time, tokens=torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ConditioningError, match="float32"):
        whole(latents, time, tokens=torch.zeros(1, 16))


def test_a_backbone_without_encoder() -> None:
    alone = TextToImage(UViT(SPEC, device="meta")).materialize(3)
    assert [unit.prefix for unit in alone.units()][-1] == "backbone.head"
    with_text = system().materialize(3).state_dict()
    assert all(torch.equal(with_text[name], value) for name, value in alone.state_dict().items())
    assert all(isinstance(unit, Packed) for unit in alone.units())


def by_words(weights: dict[str, torch.Tensor], ids: list[int], depth: int) -> torch.Tensor:
    """(n, width) float64: the word encoder word by word, in loops."""
    p = {name: value.double() for name, value in weights.items()}
    x = [p["embedding.weight"][i] for i in ids]
    for index in range(depth):
        normed = []
        for word in x:
            scaled = (word - word.mean()) / (word.var(unbiased=False) + 1e-5).sqrt()
            normed.append(scaled * p[f"layers.{index}.norm.weight"] + p[f"layers.{index}.norm.bias"])
        linear, bias = p[f"layers.{index}.linear.weight"], p[f"layers.{index}.linear.bias"]
        width = len(bias)
        for place in range(len(ids)):
            total = bias
            for step in range(7):
                if 0 <= place + step - 3 < len(ids):
                    total = total + linear[:, step * width : (step + 1) * width] @ normed[place + step - 3]
            x[place] = x[place] + total * 0.5 * (1 + torch.erf(total / 2**0.5))
    return torch.stack(x)


@pytest.mark.parametrize("layout", ["flat", "named"])
@pytest.mark.parametrize("n_tokens", [2, 9])
def test_layers_of_the_word_encoder(layout: Any, n_tokens: int) -> None:
    """Against loops over words in float64, at every parameter other than its initial value; texts shorter than a window
    as well, and gradients of all parameters against the loops' own."""
    encoder = WordEncoder(TextEncoderSpec(20, 12, 9, depth=2), layout)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=torch.Generator().manual_seed(7))
    tokens = torch.randint(0, 20, (3, n_tokens), generator=torch.Generator().manual_seed(1))
    weights = {name: value.clone().requires_grad_() for name, value in encoder.state_dict().items()}
    wanted = torch.stack([by_words(weights, row.tolist(), 2) for row in tokens])
    got = encoder(tokens)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    probe = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
    wanted.backward(probe.double())
    got.backward(probe)
    for name, parameter, offset, shape in encoder.canonical():
        assert parameter.grad is not None
        gradient = parameter.grad.view(-1)[offset : offset + torch.Size(shape).numel()].view(shape)
        theirs = weights[name].grad
        assert theirs is not None
        assert (gradient - theirs).norm() <= 1e-5 * theirs.norm(), name


def test_a_word_sees_three_words_to_each_side_and_layer() -> None:
    for depth in (1, 2):
        encoder = WordEncoder(TextEncoderSpec(20, 12, 16, depth=depth))
        tokens = torch.arange(1, 17)[None]
        changed = tokens.clone()
        changed[0, 8] = 19
        moved = (encoder(tokens) != encoder(changed)).any(-1)[0].nonzero().flatten().tolist()
        assert moved == list(range(max(0, 8 - 3 * depth), min(16, 9 + 3 * depth)))
