"""Checkpoints of the original U-ViT: an independent writing of its function, its names, and the way back."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from longskip.errors import CheckpointError
from longskip.models.conditioning import Conditioning
from longskip.models.convert import from_original, to_original
from longskip.models.specs import UViTSpec
from longskip.models.uvit import UViT


class OriginalBlock(nn.Module):
    def __init__(self, h: int, heads: int, ratio: int, skip: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(h), nn.LayerNorm(h)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(h, 3 * h, bias=False), "proj": nn.Linear(h, h)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(h, ratio * h), "fc2": nn.Linear(ratio * h, h)})
        if skip:
            self.skip_linear = nn.Linear(2 * h, h)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        b, t, h = x.shape
        q, k, v = self.attn["qkv"](self.norm1(x)).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(h // self.heads), dim=-1)
        y = torch.einsum("bhij,bhjd->bihd", weights, v).reshape(b, t, h)
        x = x + self.attn["proj"](y)
        hidden = self.mlp["fc1"](self.norm2(x))
        return x + self.mlp["fc2"](hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))


class OriginalUViT(nn.Module):
    """The published function with the published names: [label | time | text | patches], convolutional patches."""

    def __init__(self, spec: UViTSpec) -> None:
        super().__init__()
        h, p, c = spec.width, spec.patch, spec.channels
        self.spec = spec
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(c, h, p, stride=p)})
        self.time_embed = (
            nn.Sequential(nn.Linear(h, 4 * h), nn.SiLU(), nn.Linear(4 * h, h)) if spec.time_mlp else nn.Identity()
        )
        if spec.n_txt:
            self.context_embed = nn.Linear(spec.text_width, h)
        if spec.n_classes:
            self.label_emb = nn.Embedding(spec.n_classes, h)
        self.pos_embed = nn.Parameter(torch.zeros(1, spec.n_tokens, h))
        half = spec.depth // 2
        self.in_blocks = nn.ModuleList(OriginalBlock(h, spec.n_heads, spec.mlp_ratio, False) for _ in range(half))
        self.mid_block = OriginalBlock(h, spec.n_heads, spec.mlp_ratio, False)
        self.out_blocks = nn.ModuleList(OriginalBlock(h, spec.n_heads, spec.mlp_ratio, spec.skips) for _ in range(half))
        self.norm = nn.LayerNorm(h)
        self.decoder_pred = nn.Linear(h, p * p * c)
        self.final_layer = nn.Conv2d(c, c, 3, padding=1) if spec.conv else nn.Identity()

    def forward(self, x: Tensor, steps: Tensor, text: Tensor | None = None, label: Tensor | None = None) -> Tensor:
        spec, p = self.spec, self.spec.patch
        height, width = x.shape[2:]
        tokens = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        half = spec.width // 2
        angles = steps[:, None] * torch.tensor([math.exp(-math.log(10000) * i / half) for i in range(half)])
        time = self.time_embed(torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)).unsqueeze(1)
        if text is not None:
            tokens = torch.cat([self.context_embed(text), tokens], dim=1)
        tokens = torch.cat([time, tokens], dim=1)
        if label is not None:
            tokens = torch.cat([self.label_emb(label).unsqueeze(1), tokens], dim=1)
        tokens = tokens + self.pos_embed
        skips = []
        for block in self.in_blocks:
            tokens = block(tokens)
            skips.append(tokens)
        tokens = self.mid_block(tokens)
        for block in self.out_blocks:
            tokens = block(tokens, skips.pop() if spec.skips else None)
        out = self.decoder_pred(self.norm(tokens))[:, -(height // p) * (width // p) :]
        picture = torch.zeros(x.shape[0], spec.channels, height, width)
        for n in range(out.shape[1]):
            row, col = divmod(n, width // p)
            patch = out[:, n].reshape(-1, p, p, spec.channels)
            picture[:, :, row * p : row * p + p, col * p : col * p + p] = patch.permute(0, 3, 1, 2)
        return self.final_layer(picture)


CASES = {
    "text": UViTSpec(48, 4, 4, channels=4, latent_size=(8, 6), n_txt=5, text_width=10),
    "text, no conv": UViTSpec(48, 5, 3, channels=4, latent_size=(8, 8), n_txt=5, text_width=10, conv=False),
    "class": UViTSpec(32, 4, 2, channels=3, latent_size=(12, 9), patch=3, n_classes=6),
    "class, no conv, time MLP": UViTSpec(
        32, 3, 2, channels=3, latent_size=(8, 8), n_classes=6, conv=False, time_mlp=True
    ),
    "nothing, no skips": UViTSpec(32, 4, 2, channels=3, latent_size=(8, 8), skips=False),
}


def original(spec: UViTSpec) -> OriginalUViT:
    torch.manual_seed(7)
    model = OriginalUViT(spec)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model


@pytest.mark.parametrize("layout", ["named", "flat"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_function(case: str, layout: str) -> None:
    spec = CASES[case]
    theirs = original(spec)
    ours = UViT(spec, layout)  # type: ignore[arg-type]
    ours.load_state_dict(from_original(theirs.state_dict(), spec))
    latents, time = torch.randn(3, spec.channels, *spec.latent_size), torch.tensor([0.0, 0.25, 0.999])
    text = torch.randn(3, spec.n_txt, spec.text_width) if spec.n_txt else None
    label = torch.tensor([0, 5, 2]) if spec.n_classes else None
    with torch.no_grad():
        wanted = theirs(latents, time * 1000, text, label)
        got = ours(latents, time, Conditioning(text=text, label=label))
    assert wanted.abs().max() > 0.1
    assert (got - wanted).abs().max() <= 1e-5 * max(1.0, wanted.abs().max().item())


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bitwise(case: str) -> None:
    spec = CASES[case]
    theirs = original(spec).state_dict()
    ours = from_original(theirs, spec)
    back = to_original(ours, spec)
    assert set(back) == set(theirs)
    assert all(torch.equal(back[name], value) for name, value in theirs.items())
    again = from_original(back, spec)
    assert list(again) == [entry.name for table in spec.parameters().values() for entry in table]
    assert all(torch.equal(again[name], value) for name, value in ours.items())


def test_misfits_are_named() -> None:
    spec = CASES["text"]
    state = dict(original(spec).state_dict())
    del state["mid_block.attn.qkv.weight"]
    state["label_emb.weight"] = torch.zeros(3, 48)
    state["pos_embed"] = torch.zeros(1, 5, 48)
    with pytest.raises(CheckpointError) as caught:
        from_original(state, spec)
    for words in ("missing: mid_block.attn.qkv.weight", "unexpected: label_emb.weight", "pos_embed (1, 5, 48)"):
        assert words in str(caught.value)
    with pytest.raises(CheckpointError, match=r"missing: embed\.patch\.weight"):
        to_original({}, UViTSpec(32, 1, 2, conv=False))
    with pytest.raises(CheckpointError, match="qk_norm"):
        from_original({}, UViTSpec(32, 2, 2, qk_norm=True))
