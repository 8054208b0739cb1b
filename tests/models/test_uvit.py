"""Behaviour of the U-ViT: an independent writing with every switch, masks, resolutions, conditions, dtypes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from longskip.errors import ConditioningError, SpecError
from longskip.kernels.mlp import mlp
from longskip.models.conditioning import Conditioning
from longskip.models.presets import PRESETS, preset
from longskip.models.specs import UViTSpec
from longskip.models.uvit import UViT, patchify, time_sinusoid, unpatchify

BASE = UViTSpec(24, 4, 2, channels=3, latent_size=(8, 6), n_txt=3, text_width=5, n_classes=4)


def model_of(spec: UViTSpec, layout: str = "named") -> UViT:
    """Random values everywhere, also where a fresh model has zeros and ones."""
    model = UViT(spec, layout)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(11)
    model.load_state_dict({k: 0.15 * torch.randn(v.shape, generator=g) for k, v in model.state_dict().items()})
    return model


def inputs(spec: UViTSpec, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor, Conditioning]:
    g = torch.Generator().manual_seed(12)
    cond = Conditioning(
        text=torch.randn(2, spec.n_txt, spec.text_width, generator=g) if spec.n_txt else None,
        label=torch.tensor([3, 0]) if spec.n_classes else None,
    )
    return torch.randn(2, spec.channels, *(size or spec.latent_size), generator=g), torch.tensor([0.1, 0.8]), cond


def oracle(spec: UViTSpec, state: dict[str, Tensor], x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
    """The model in float64, written from the definition, one matrix product at a time."""
    w = {name: value.double() for name, value in state.items()}
    b, (rows, cols), h, p = x.shape[0], spec.grid(spec.latent_size), spec.width, spec.patch

    def lin(name: str, y: Tensor) -> Tensor:
        return y @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(1, dtype=torch.float64))

    def norm(y: Tensor, name: str | None) -> Tensor:
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return y if name is None else y * w[f"{name}.weight"] + w[f"{name}.bias"]

    def silu(y: Tensor) -> Tensor:
        return y / (1 + torch.exp(-y))

    steps = [1000 * time.double() / 10000 ** (2 * i / h) for i in range(h // 2)]
    now = torch.stack([torch.cos(s) for s in steps] + [torch.sin(s) for s in steps], dim=1)
    if spec.time_mlp:
        now = lin("embed.time.fc2", silu(lin("embed.time.fc1", now)))
    sequence = [w["embed.label.weight"][cond.label][:, None]] if cond.label is not None else []
    sequence.append(now[:, None])
    if cond.text is not None:
        sequence.append(lin("embed.text", cond.text.double()))
    for i in range(rows):
        for j in range(cols):
            patch = x[:, :, i * p : i * p + p, j * p : j * p + p].double()
            sequence.append(lin("embed.patch", patch.permute(0, 2, 3, 1).reshape(b, 1, -1)))
    y = torch.cat(sequence, dim=1) + w["embed.pos"]
    stack: list[Tensor] = []
    half = spec.depth // 2
    for index in range(2 * half + 1):
        name = f"blocks.{index}"
        if index > half and spec.skips:
            y = lin(f"{name}.skip", torch.cat((y, stack.pop()), -1))
        ada = [a[:, None] for a in lin(f"{name}.ada", silu(now)).chunk(6, -1)] if spec.adaln else []
        z = norm(y, None) * (1 + ada[1]) + ada[0] if spec.adaln else norm(y, f"{name}.norm1")
        q, k, v = lin(f"{name}.attn.qkv", z).view(b, -1, 3, spec.n_heads, spec.head_dim).unbind(2)
        if spec.qk_norm:
            q = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.attn.q_norm.weight"]
            k = k / (k.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.attn.k_norm.weight"]
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(spec.head_dim)
        z = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)
        z = lin(f"{name}.attn.proj", z)
        y = y + (ada[2] * z if spec.adaln else z)
        z = norm(y, None) * (1 + ada[4]) + ada[3] if spec.adaln else norm(y, f"{name}.norm2")
        z = lin(f"{name}.mlp.fc1", z)
        z = lin(f"{name}.mlp.fc2", z * 0.5 * (1 + torch.erf(z / math.sqrt(2))))
        y = y + (ada[5] * z if spec.adaln else z)
        if index < half:
            stack.append(y)
    if spec.adaln:
        shift, scale = lin("head.ada", silu(now)).chunk(2, -1)
        y = norm(y, None) * (1 + scale[:, None]) + shift[:, None]
    else:
        y = norm(y, "head.norm")
    y = lin("head.linear", y)[:, -rows * cols :]
    out = y.view(b, rows, cols, p, p, -1).permute(0, 5, 1, 3, 2, 4).reshape(b, -1, rows * p, cols * p)
    return F.conv2d(out, w["head.conv.weight"], w["head.conv.bias"], padding=1) if spec.conv else out


def grad_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"skips": False, "conv": False},
        {"qk_norm": True, "time_mlp": True},
        {"adaln": True, "n_classes": 0},
        {"adaln": True, "qk_norm": True, "time_mlp": True, "out_channels": 6, "depth": 5},
        {"n_txt": 0, "text_width": 0, "n_classes": 0, "depth": 1, "mlp_ratio": 3},
    ],
)
@pytest.mark.parametrize("layout", ["named", "flat"])
def test_against_float64_definition(change: dict[str, int], layout: str) -> None:
    spec = replace(BASE, **change)  # type: ignore[arg-type]
    model = model_of(spec, layout)
    latents, time, cond = inputs(spec)
    wanted = oracle(spec, model.state_dict(), latents, time, cond)
    got = model(latents, time, cond)
    assert got.dtype == torch.float32 and got.shape == (2, spec.c_out, 8, 6)
    assert (got - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def test_patchify_layout_and_inverse() -> None:
    pictures = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6).float()
    tokens = patchify(pictures, 2)
    assert tokens.shape == (2, 6, 12)
    for n in range(6):
        i, j = divmod(n, 3)
        for a in range(2):
            for b in range(2):
                assert torch.equal(
                    tokens[:, n, (a * 2 + b) * 3 : (a * 2 + b) * 3 + 3], pictures[:, :, 2 * i + a, 2 * j + b]
                )
    assert torch.equal(unpatchify(tokens, 2, (2, 3)), pictures)


def test_time_sinusoid_is_cos_then_sin() -> None:
    table = time_sinusoid(torch.tensor([0.0, 250.0]), 6)
    wanted = [math.cos(250 / 10000 ** (i / 3)) for i in range(3)] + [math.sin(250 / 10000 ** (i / 3)) for i in range(3)]
    assert table[0].tolist() == [1, 1, 1, 0, 0, 0]
    assert table[1].tolist() == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("change", [{}, {"adaln": True}, {"qk_norm": True}])
def test_masked_text_has_no_influence(change: dict[str, bool]) -> None:
    spec = replace(BASE, **change)  # type: ignore[arg-type]
    model = model_of(spec)
    latents, time, cond = inputs(spec)
    mask = torch.tensor([[True, False, False], [True, True, False]])
    assert cond.text is not None
    other = torch.where(mask[..., None], cond.text, 100.0)
    first = model(latents, time, Conditioning(text=cond.text, text_mask=mask, label=cond.label))
    second = model(latents, time, Conditioning(text=other, text_mask=mask, label=cond.label))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    unmasked = model(latents, time, Conditioning(text=other, label=cond.label))
    assert (unmasked - first).abs().max() > 1e-3
    full = model(latents, time, Conditioning(text=cond.text, text_mask=torch.ones_like(mask), label=cond.label))
    torch.testing.assert_close(full, model(latents, time, cond), rtol=1e-5, atol=1e-6)


def test_shorter_text_is_masked_text() -> None:
    """Two text tokens equal three of which the last is masked: the first text positions are theirs."""
    model = model_of(BASE)
    latents, time, cond = inputs(BASE)
    assert cond.text is not None
    mask = torch.tensor([[True, True, False]] * 2)
    masked = model(latents, time, Conditioning(text=cond.text, text_mask=mask, label=cond.label))
    short = model(latents, time, Conditioning(text=cond.text[:, :2], label=cond.label))
    torch.testing.assert_close(short, masked, rtol=1e-5, atol=1e-6)


def test_every_input_matters() -> None:
    model = model_of(BASE)
    latents, time, cond = inputs(BASE)
    base = model(latents, time, cond)
    assert cond.text is not None and cond.label is not None
    for other in (
        model(latents + 1, time, cond),
        model(latents, time + 0.1, cond),
        model(latents, time, replace(cond, text=cond.text + 1)),
        model(latents, time, replace(cond, label=cond.label.flip(0))),
    ):
        assert (other - base).abs().max() > 1e-4
    alone = model(latents[:1], time[:1], Conditioning(text=cond.text[:1], label=cond.label[:1]))
    torch.testing.assert_close(alone, base[:1], rtol=1e-5, atol=1e-6)


def test_skips_are_last_in_first_out() -> None:
    """Each block of the second half is handed the very output of its mirror image in the first half."""
    spec = replace(BASE, n_txt=0, text_width=0, n_classes=0)
    model = model_of(spec)
    seen: dict[int, tuple[Tensor, Tensor | None]] = {}
    outputs: dict[int, Tensor] = {}
    for index, block in enumerate(model.blocks):

        def watch(module: object, args: tuple[Tensor, Tensor | None], out: Tensor, index: int = index) -> None:
            seen[index], outputs[index] = (args[0], args[1]), out

        block.register_forward_hook(watch)
    model(*inputs(spec)[:2])
    assert [seen[i][1] is None for i in range(5)] == [True, True, True, False, False]
    assert seen[3][1] is outputs[1] and seen[4][1] is outputs[0]
    assert all(seen[i + 1][0] is outputs[i] for i in range(4))


def test_positions_at_another_resolution() -> None:
    model = model_of(BASE)
    embed = model.embed
    pos = embed.views()["pos"]
    assert embed.positions(pos, (4, 3), 3) is pos
    grown = embed.positions(pos, (6, 5), 3)
    assert grown.shape == (5 + 30, 24) and torch.equal(grown[:5], pos[:5])
    image = pos[5:].T.reshape(1, 24, 4, 3)
    bicubic = F.interpolate(image, size=(6, 5), mode="bicubic", align_corners=False)
    torch.testing.assert_close(grown[5:], bicubic[0].flatten(1).T)
    flat = torch.ones_like(pos) * torch.arange(24.0)
    torch.testing.assert_close(embed.positions(flat, (8, 8), 3), flat[:1].expand(5 + 64, 24))
    assert torch.equal(embed.positions(pos, (4, 3), 1), torch.cat((pos[:3], pos[5:])))
    out = model(*inputs(BASE, (12, 10)))
    assert out.shape == (2, 3, 12, 10) and out.isfinite().all()
    out.sum().backward()
    assert (grad_of(embed.get_parameter("pos")).abs().sum(-1) > 0).all()


def test_checkpointing_gives_the_same_bits() -> None:
    for change in ({}, {"adaln": True, "time_mlp": True}):
        spec = replace(BASE, **change)  # type: ignore[arg-type]
        results = []
        for checkpointing in (0, 1, 2):
            model = model_of(spec)
            model.checkpointing = checkpointing
            out = model(*inputs(spec))
            out.square().sum().backward()
            results.append((out.detach(), [grad_of(p) for p in model.parameters()]))
        for other in results[1:]:
            assert torch.equal(results[0][0], other[0])
            assert all(torch.equal(a, b) for a, b in zip(results[0][1], other[1], strict=True))


@pytest.mark.parametrize("layout", ["named", "flat"])
def test_checkpointing_lets_go_of_activations(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the forward pass no checkpointed block's MLP input is alive; without checkpointing all are."""
    seen: list[StorageWeakRef] = []

    def watched(x: Tensor, *args: Tensor, activation: str) -> Tensor:
        seen.append(StorageWeakRef(x.untyped_storage()))
        return mlp(x, *args, activation=activation)

    monkeypatch.setattr("longskip.models.uvit.mlp", watched)
    for checkpointing in (0, 1, 2):
        model = model_of(BASE, layout)
        model.checkpointing = checkpointing
        seen.clear()
        out = model(*inputs(BASE))
        assert [reference.expired() for reference in seen] == [
            bool(checkpointing) and i % checkpointing == 0 for i in range(BASE.n_blocks)
        ]
        assert out.requires_grad


def test_computation_follows_the_parameters_dtype() -> None:
    latents, time, cond = inputs(BASE)
    wanted = model_of(BASE)(latents, time, cond)
    for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float64, 1e-5)):
        model = model_of(BASE, "flat").to(dtype)
        kinds = set[torch.dtype]()
        model.blocks[0].register_forward_hook(lambda m, args, out, kinds=kinds: kinds.add(out.dtype))
        got = model(latents, time, cond)
        assert kinds == {dtype} and got.dtype == torch.float32
        assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_fresh_adaln_blocks_are_gated_shut() -> None:
    """adaLN-zero: a fresh block without a skip is the identity."""
    block = UViT(replace(BASE, adaln=True)).blocks[0]
    x = torch.randn(2, 7, 24)
    assert torch.equal(block(x, None, torch.randn(2, 24)), x)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"label": None}, "needs label"),
        ({"text": None}, "needs text"),
        ({"pooled": torch.zeros(2, 4)}, "does not take pooled"),
        ({"image": torch.zeros(2, 3, 8, 6)}, "does not take image"),
        ({"text": torch.zeros(2, 4, 5)}, r"\(2, 4, 5\)"),
        ({"text": torch.zeros(2, 3, 6)}, r"\(2, 3, 6\)"),
        ({"text": torch.zeros(1, 3, 5)}, r"\(1, 3, 5\)"),
        ({"text_mask": torch.zeros(2, 3)}, "float32"),
        ({"text_mask": torch.ones(2, 2, dtype=torch.bool)}, r"\(2, 2\)"),
        ({"label": torch.zeros(2)}, "label is torch.float32"),
    ],
)
def test_wrong_conditions_are_refused(given: dict[str, Tensor | None], words: str) -> None:
    latents, time, cond = inputs(BASE)
    with pytest.raises(ConditioningError, match=words):
        UViT(BASE)(latents, time, replace(cond, **given))  # type: ignore[arg-type]


def test_undeclared_conditions_and_wrong_latents_are_refused() -> None:
    spec = replace(BASE, n_txt=0, text_width=0, n_classes=0)
    model = UViT(spec)
    latents, time, _ = inputs(spec)
    assert model(latents, time).shape == latents.shape
    with pytest.raises(ConditioningError, match="no condition"):
        model(latents, time, Conditioning(label=torch.zeros(2, dtype=torch.long)))
    with pytest.raises(SpecError, match="9x6"):
        model(torch.zeros(2, 3, 9, 6), time)
    with pytest.raises(SpecError, match=r"\(2, 4, 8, 6\)"):
        model(torch.zeros(2, 4, 8, 6), time)
    with pytest.raises(SpecError, match="time"):
        model(latents, time[:1])


def test_print_is_a_spec_sheet() -> None:
    text = repr(UViT(PRESETS["uvit-2.3b"], device="meta"))
    for words in ("width 2048, 43 blocks (21 with a skip), 16 heads of 128", "2,344,200,356 parameters", "334 tokens"):
        assert words in text


def test_small_presets_run() -> None:
    for name in ("uvit-tiny", "uvit-shapes", "uvit-emoji"):
        spec = preset(name)
        out = UViT(spec, "flat")(*inputs(spec))
        assert out.shape == (2, 3, 32, 32) and out.isfinite().all()
