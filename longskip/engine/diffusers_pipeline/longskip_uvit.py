"""U-ViT for diffusers: the model of an exported folder, in torch and diffusers alone (arXiv 2209.12152, 2412.12391).

Tokens ``[label | time | text | patches]`` in one sequence; every block of the second half takes the output of its partner
in the first half through a linear layer. Parameter names are longskip's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

NORM_EPS = 1e-5
QK_NORM_EPS = 1e-6


class UViTModel(ModelMixin, ConfigMixin):
    """``sample_size`` (H, W) in latents; ``depth`` d makes 2·⌊d/2⌋ + 1 blocks."""

    @register_to_config
    def __init__(
        self,
        width: int,
        depth: int,
        n_heads: int,
        patch: int,
        channels: int,
        out_channels: int,
        sample_size: tuple[int, int],
        n_txt: int = 0,
        text_width: int = 0,
        n_classes: int = 0,
        mlp_ratio: int = 4,
        time_mlp: bool = False,
        conv: bool = True,
        skips: bool = True,
        qk_norm: bool = False,
        adaln: bool = False,
        time_scale: float = 1000.0,
    ) -> None:
        super().__init__()
        half = depth // 2
        grid = (sample_size[0] // patch, sample_size[1] // patch)
        self.half, self.grid = half, grid
        n_extra = (1 if n_classes else 0) + 1 + n_txt
        self.embed = Embed(
            width, patch**2 * channels, n_extra + grid[0] * grid[1], n_txt and text_width, n_classes, time_mlp
        )
        self.blocks = nn.ModuleList(
            Block(width, n_heads, mlp_ratio, skip=skips and index > half, qk_norm=qk_norm, adaln=adaln)
            for index in range(2 * half + 1)
        )
        self.head = Head(width, patch**2 * out_channels, out_channels if conv else 0, adaln)

    def forward(
        self,
        latents: Tensor,
        time: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        label: Tensor | None = None,
    ) -> Tensor:
        """latents (B, C, H, W), time (B,) in [0, 1], text (B, n_txt, E), text_mask (B, n_txt) bool with True = attend,
        label (B,) → (B, C_out, H, W), float32."""
        config, dtype, patch = self.config, self.embed.patch.weight.dtype, self.config["patch"]
        b, c, height, width = latents.shape
        grid = (height // patch, width // patch)
        rows = latents.to(dtype).reshape(b, c, grid[0], patch, grid[1], patch)
        rows = rows.permute(0, 2, 4, 3, 5, 1).reshape(b, grid[0] * grid[1], -1)  # (B, N, p²c)
        now = self.embed.time_vector(time, config["time_scale"], dtype)  # (B, h)
        parts = [] if label is None else [self.embed.label(label)[:, None]]
        parts.append(now[:, None])
        if text is not None:
            parts.append(self.embed.text(text.to(dtype)))
        parts.append(self.embed.patch(rows))
        n_txt = 0 if text is None else text.shape[1]
        x = torch.cat(parts, dim=1) + self.positions(grid, n_txt)  # (B, L, h)
        mask = None
        if text_mask is not None:
            before = len(parts) - 2  # label and time
            mask = F.pad(text_mask.bool(), (before, x.shape[1] - before - n_txt), value=True)[:, None, None]
        skips = []
        for block in self.blocks[: self.half]:
            x = block(x, None, now, mask)
            skips.append(x)
        x = self.blocks[self.half](x, None, now, mask)
        for block in self.blocks[self.half + 1 :]:
            x = block(x, skips.pop() if config["skips"] else None, now, mask)
        out = self.head(x, now)[:, x.shape[1] - grid[0] * grid[1] :]  # (B, N, p²c)
        out = out.reshape(b, *grid, patch, patch, -1).permute(0, 5, 1, 3, 2, 4).reshape(b, -1, height, width)
        return self.head.conv(out).float() if config["conv"] else out.float()

    def positions(self, grid: tuple[int, int], n_txt: int) -> Tensor:
        """(L, h): the image's rows interpolated where the grid is not the model's, the first text rows for short texts."""
        pos, n_img = self.embed.pos, self.grid[0] * self.grid[1]
        extras, image = pos[: pos.shape[0] - n_img], pos[pos.shape[0] - n_img :]
        if grid != self.grid:
            plane = image.float().T.reshape(1, -1, *self.grid)
            plane = F.interpolate(plane, size=grid, mode="bicubic", align_corners=False)
            image = plane.flatten(2)[0].T.to(pos.dtype)
        return torch.cat((extras[: extras.shape[0] - self.config["n_txt"] + n_txt], image))


class Embed(nn.Module):
    def __init__(
        self, width: int, patch_in: int, n_tokens: int, text_width: int, n_classes: int, time_mlp: bool
    ) -> None:
        super().__init__()
        self.patch = nn.Linear(patch_in, width)
        self.pos = nn.Parameter(torch.zeros(n_tokens, width))
        if text_width:
            self.text = nn.Linear(text_width, width)
        if n_classes:
            self.label = nn.Embedding(n_classes, width)
        if time_mlp:
            self.time = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def time_vector(self, time: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        """Time (B,) → (B, h): cat(cos, sin), through the time MLP where there is one."""
        half = self.pos.shape[1] // 2
        steps = torch.arange(half, device=time.device, dtype=torch.float32)
        angles = (time.float() * scale)[:, None] * torch.exp(steps * (-math.log(10000.0) / half))
        now = torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)
        return self.time["fc2"](F.silu(self.time["fc1"](now))) if hasattr(self, "time") else now


class Block(nn.Module):
    def __init__(self, width: int, n_heads: int, ratio: int, *, skip: bool, qk_norm: bool, adaln: bool) -> None:
        super().__init__()
        if skip:
            self.skip = nn.Linear(2 * width, width)
        if adaln:
            self.ada = nn.Linear(width, 6 * width)
        else:
            self.norm1, self.norm2 = nn.LayerNorm(width, NORM_EPS), nn.LayerNorm(width, NORM_EPS)
        self.attn = Attention(width, n_heads, qk_norm)
        self.mlp = Mlp(width, ratio * width)

    def forward(self, x: Tensor, skip: Tensor | None, now: Tensor, mask: Tensor | None) -> Tensor:
        if skip is not None:
            x = self.skip(torch.cat((x, skip), dim=-1))
        if hasattr(self, "ada"):
            ada = self.ada(F.silu(now))[:, None].chunk(6, dim=-1)  # (B, 1, h) each
            x = x + ada[2] * self.attn(_modulated(x, ada[0], ada[1]), mask)
            return x + ada[5] * self.mlp(_modulated(x, ada[3], ada[4]))
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    def __init__(self, width: int, n_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        if qk_norm:
            self.q_norm = nn.RMSNorm(width // n_heads, QK_NORM_EPS)
            self.k_norm = nn.RMSNorm(width // n_heads, QK_NORM_EPS)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, t, h = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)  # (B, heads, T, h / heads)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(b, t, h))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Head(nn.Module):
    def __init__(self, width: int, patch_out: int, conv_channels: int, adaln: bool) -> None:
        super().__init__()
        if adaln:
            self.ada = nn.Linear(width, 2 * width)
        else:
            self.norm = nn.LayerNorm(width, NORM_EPS)
        self.linear = nn.Linear(width, patch_out)
        if conv_channels:
            self.conv = nn.Conv2d(conv_channels, conv_channels, 3, padding=1)

    def forward(self, x: Tensor, now: Tensor) -> Tensor:
        if hasattr(self, "ada"):
            shift, scale = self.ada(F.silu(now))[:, None].chunk(2, dim=-1)
            return self.linear(_modulated(x, shift, scale))
        return self.linear(self.norm(x))


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), eps=NORM_EPS) * (1 + scale) + shift
