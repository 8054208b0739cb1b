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
