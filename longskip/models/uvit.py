"""U-ViT: all tokens in one sequence, pre-norm transformer blocks, and long skips from the first half to the second.

Bao et al., "All are Worth Words", arXiv 2209.12152; as a text-to-image model, arXiv 2412.12391.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longskip.errors import ConditioningError, SpecError
from longskip.kernels.adaln import adaln, gated_adaln, gated_residual
from longskip.kernels.attention import attention
from longskip.kernels.mlp import mlp
from longskip.kernels.norm import layer_norm
from longskip.kernels.rotary import qk_norm_rotary
from longskip.kernels.skip_linear import skip_linear
from longskip.models.conditioning import Conditioning
from longskip.models.packed import Layout, Packed, local_table
from longskip.models.specs import NORM_EPS, UViTSpec

__all__ = ["Block", "Embed", "Head", "UViT", "patchify", "time_sinusoid", "unpatchify"]

MAX_PERIOD = 10000.0


def time_sinusoid(time: Tensor, width: int) -> Tensor:
    """Time (B,) → (B, width): cat(cos, sin) of time · 10000^(−i/(width/2)); float32."""
    half = width // 2
    steps = torch.arange(half, device=time.device, dtype=torch.float32)
    angles = time.float()[:, None] * torch.exp(steps * (-math.log(MAX_PERIOD) / half))  # (B, width/2)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)  # (B, width)


def patchify(pictures: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) → (B, N, p²C), each row of the layout (p1 p2 c)."""
    b, c, height, width = pictures.shape
    grid = pictures.reshape(b, c, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)


def unpatchify(tokens: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """(B, N, p²C) of the layout (p1 p2 c) → (B, C, H, W), for a grid of (rows, columns) patches."""
    b, (rows, cols) = tokens.shape[0], grid
    split = tokens.reshape(b, rows, cols, patch, patch, -1)
    return split.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, rows * patch, cols * patch)


def _norm(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    out = layer_norm(x, p[f"{name}.weight"], p[f"{name}.bias"], eps=NORM_EPS)
    return cast(Tensor, out)  # a pair only with a residual


class Embed(Packed):
    """Latents, time and conditions → tokens ``[label | time | text | patches]`` with positions."""

    def __init__(self, spec: UViTSpec, layout: Layout = "named") -> None:
        super().__init__(local_table("embed", spec.parameters_of("embed")), layout, "embed")
        self.spec = spec

    def forward(
        self, latents: Tensor, time: Tensor, text: Tensor | None, label: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(B, C, H, W), (B,), (B, n_txt, E), (B,) → tokens (B, L, h) and the time embedding (B, h)."""
        with self.guard():
            return self.compute(latents, time, text, label, self.views())

    def compute(
        self, latents: Tensor, time: Tensor, text: Tensor | None, label: Tensor | None, p: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The same as a pure function of inputs and parameters."""
        spec, dtype = self.spec, p["patch.weight"].dtype
        grid = spec.grid((int(latents.shape[-2]), int(latents.shape[-1])))
        now = time_sinusoid(time.float() * spec.time_scale, spec.width).to(dtype)  # (B, h)
        if spec.time_mlp:
            now = F.silu(F.linear(now, p["time.fc1.weight"], p["time.fc1.bias"]))  # (B, 4h)
            now = F.linear(now, p["time.fc2.weight"], p["time.fc2.bias"])  # (B, h)
        parts = [now[:, None]]  # (B, 1, h)
        if label is not None:
            parts.insert(0, F.embedding(label, p["label.weight"])[:, None])  # (B, 1, h)
        if text is not None:
            parts.append(F.linear(text.to(dtype), p["text.weight"], p["text.bias"]))  # (B, n_txt, h)
        rows = patchify(latents.to(dtype), spec.patch)  # (B, N, p²c)
        parts.append(F.linear(rows, p["patch.weight"], p["patch.bias"]))  # (B, N, h)
        n_txt = 0 if text is None else text.shape[1]
        return torch.cat(parts, dim=1) + self.positions(p["pos"], grid, n_txt), now  # (B, L, h), (B, h)

    def positions(self, pos: Tensor, grid: tuple[int, int], n_txt: int) -> Tensor:
        """Positions (n_tokens, h) → (L, h) at a grid of patches: the image's rows interpolated (bicubic) where the grid
        is not the spec's, the extras kept, texts shorter than the spec's taking the first text rows."""
        spec = self.spec
        home = spec.grid(spec.latent_size)
        if grid == home and n_txt == spec.n_txt:
            return pos
        image = pos[spec.n_extra :]  # (N, h)
        if grid != home:
            plane = image.float().T.reshape(1, spec.width, *home)  # (1, h, rows, cols)
            plane = F.interpolate(plane, size=grid, mode="bicubic", align_corners=False)
            image = plane.reshape(spec.width, -1).T.to(pos.dtype)  # (N', h)
        return torch.cat((pos[: spec.n_extra - spec.n_txt + n_txt], image))  # (L, h)


class Block(Packed):
    """One pre-norm transformer block, with a skip linear before it in the second half, with adaLN where the spec says.

    ``forward`` gathers the parameters; ``compute`` is pure and is what compile and checkpointing see.
    """

    def __init__(self, spec: UViTSpec, index: int, layout: Layout = "named") -> None:
        unit = f"blocks.{index}"
        super().__init__(local_table(unit, spec.parameters_of(unit)), layout, unit)
        self.spec = spec
        self.takes_skip = spec.has_skip(index)

    def forward(
        self,
        x: Tensor,
        skip: Tensor | None = None,
        time: Tensor | None = None,
        key_mask: Tensor | None = None,
        guarded: bool = True,
    ) -> Tensor:
        """x, skip (B, T, h), time embedding (B, h), key_mask (B, T) bool → (B, T, h). ``guarded``: see
        ``Packed.guard``."""
        with self.guard(guarded):
            return self.compute(x, skip, self.views(), time, key_mask)

    def compute(
        self,
        x: Tensor,
        skip: Tensor | None,
        p: dict[str, Tensor],
        time: Tensor | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """The same as a pure function of inputs and parameters ``p``."""
        if self.takes_skip:
            if skip is None:
                raise ConditioningError(f"{self.prefix} takes a skip and was given none", cure="hand it the skip")
            x = skip_linear(x, skip, p["skip.weight"], p["skip.bias"])  # (B, T, h)
        if self.spec.adaln:
            if time is None:
                raise ConditioningError(f"{self.prefix} is modulated by time and was given none", cure="hand it over")
            ada = F.linear(F.silu(time), p["ada.weight"], p["ada.bias"])  # (B, 6h)
            shift1, scale1, gate1, shift2, scale2, gate2 = ada.chunk(6, dim=-1)  # (B, h) each
            y = self._attend(adaln(x, shift1, scale1, eps=NORM_EPS), p, key_mask)  # (B, T, h)
            x, y = gated_adaln(x, y, gate1, shift2, scale2, eps=NORM_EPS)
            return gated_residual(x, self._mlp(y, p), gate2)
        y = self._attend(_norm(x, p, "norm1"), p, key_mask)  # (B, T, h)
        x, y = layer_norm(y, p["norm2.weight"], p["norm2.bias"], eps=NORM_EPS, residual=x)
        return x + self._mlp(y, p)

    def _attend(self, x: Tensor, p: dict[str, Tensor], key_mask: Tensor | None) -> Tensor:
        b, t, h = x.shape
        qkv = F.linear(x, p["attn.qkv.weight"])  # (B, T, 3h)
        qkv = qkv.view(b, t, 3, self.spec.n_heads, self.spec.head_dim)  # (B, T, 3, H, Dh)
        if self.spec.qk_norm:
            q, k, v = qkv.unbind(2)  # (B, T, H, Dh) each
            q, k = qk_norm_rotary(q, k, q_weight=p["attn.q_norm.weight"], k_weight=p["attn.k_norm.weight"], norm="rms")
            out = attention(q, k, v, key_mask=key_mask)
        else:
            out = attention(qkv, key_mask=key_mask)
        return F.linear(out.reshape(b, t, h), p["attn.proj.weight"], p["attn.proj.bias"])  # (B, T, h)

    def _mlp(self, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        return mlp(x, p["mlp.fc1.weight"], p["mlp.fc1.bias"], p["mlp.fc2.weight"], p["mlp.fc2.bias"], activation="gelu")


class Head(Packed):
    """Tokens → prediction: norm (adaLN where the spec says), linear, unpatchify, 3×3 convolution."""

    def __init__(self, spec: UViTSpec, layout: Layout = "named") -> None:
        super().__init__(local_table("head", spec.parameters_of("head")), layout, "head")
        self.spec = spec

    def forward(self, x: Tensor, time: Tensor, grid: tuple[int, int]) -> Tensor:
        """x (B, L, h), time embedding (B, h), grid of (rows, columns) → (B, C_out, H, W)."""
        with self.guard():
            return self.compute(x, time, grid, self.views())

    def compute(self, x: Tensor, time: Tensor, grid: tuple[int, int], p: dict[str, Tensor]) -> Tensor:
        """The same as a pure function of inputs and parameters."""
        if self.spec.adaln:
            shift, scale = F.linear(F.silu(time), p["ada.weight"], p["ada.bias"]).chunk(2, dim=-1)  # (B, h) each
            x = adaln(x, shift, scale, eps=NORM_EPS)
        else:
            x = _norm(x, p, "norm")  # (B, L, h)
        x = F.linear(x, p["linear.weight"], p["linear.bias"])  # (B, L, p²c)
        out = unpatchify(x[:, x.shape[1] - grid[0] * grid[1] :], self.spec.patch, grid)  # (B, c, H, W)
        return F.conv2d(out, p["conv.weight"], p["conv.bias"], padding=1) if self.spec.conv else out


class UViT(nn.Module):
    """The U-ViT of a spec.

    ``layout``: how units keep their parameters (``packed.py``). ``device``: "meta" builds without values, for counting
    or for ``TextToImage.materialize``; otherwise (default: torch's default device) the values are those of ``seed``.
    The dtype of the computation is that of the parameters: inputs are cast to it, the output to float32.
    ``checkpointing`` k: of every k-th block keep only the input for the backward pass and compute it again (0: none).
    """

    def __init__(
        self, spec: UViTSpec, layout: Layout = "named", device: torch.device | str | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.spec = spec
        self.layout: Layout = layout
        self.checkpointing = 0
        self.embed = Embed(spec, layout)
        self.blocks = nn.ModuleList(Block(spec, index, layout) for index in range(spec.n_blocks))
        self.head = Head(spec, layout)
        device = torch.get_default_device() if device is None else torch.device(device)
        if device.type != "meta":
            for unit in self.modules():
                if isinstance(unit, Packed):
                    unit.materialize(seed, device)

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """From now on ``Block.compute`` goes through ``torch.compile``: one graph for all blocks without a skip and one
        for those with, each for training, for inference and anew for another number of tokens; a graph break is an
        error. Gathering, ``Packed.guard`` and checkpointing stay outside. Under a dispatch mode, as counters are, torch
        refuses to run a compiled block: count another model.
        """
        from torch._dynamo import config  # here: it takes a second to import

        # One graph more than this is an error as well, and two kinds of blocks with and without gradient and key mask, of
        # a fixed and of a varying number of tokens are more than the default of 8.
        config.recompile_limit = max(config.recompile_limit, 32)
        compute: Any = torch.compile(Block.compute, fullgraph=True, backend=backend)
        for block in self.blocks:
            # Of the class, so that the blocks share their graphs.
            object.__setattr__(block, "compute", partial(compute, block))

    def forward(self, latents: Tensor, time: Tensor, cond: Conditioning | None = None) -> Tensor:
        """Noised latents (B, C, H, W) at time (B,), in [0, 1] for the usual ``time_scale``, → (B, C_out, H, W).

        H and W may differ from the spec's (positions are interpolated). Raises ``ConditioningError`` on conditions that
        the spec does not declare, or that are missing or misshaped, ``SpecError`` on latents that do not fit.
        """
        cond = cond or Conditioning()
        self._check(latents, time, cond)
        grid = self.spec.grid((int(latents.shape[-2]), int(latents.shape[-1])))
        x, now = self.embed(latents, time, cond.text, cond.label)  # (B, L, h), (B, h)
        run = partial(self._run, time=now if self.spec.adaln else None, key_mask=self._key_mask(cond, x))
        half, skips = self.spec.depth // 2, []
        for index in range(half):
            x = run(index, x, None)  # (B, L, h)
            skips.append(x)
        x = run(half, x, None)  # (B, L, h)
        for index in range(half + 1, self.spec.n_blocks):
            x = run(index, x, skips.pop() if self.spec.skips else None)  # (B, L, h)
        return self.head(x, now, grid).float()  # (B, C_out, H, W)

    def _run(self, index: int, x: Tensor, skip: Tensor | None, time: Tensor | None, key_mask: Tensor | None) -> Tensor:
        block = self.blocks[index]
        if not self.checkpointing or index % self.checkpointing or not torch.is_grad_enabled():
            return block(x, skip, time, key_mask)
        plain = partial(block, guarded=False)  # checkpoint brings its own hooks, and only the innermost ones act
        return checkpoint(plain, x, skip, time, key_mask, use_reentrant=False, preserve_rng_state=False)

    def _key_mask(self, cond: Conditioning, x: Tensor) -> Tensor | None:
        """(B, L) bool, True = attend: the text's mask among tokens that are always attended."""
        if cond.text_mask is None or cond.text is None:
            return None
        before = self.spec.n_extra - self.spec.n_txt
        return F.pad(cond.text_mask, (before, x.shape[1] - before - cond.text_mask.shape[1]), value=True)

    def _check(self, latents: Tensor, time: Tensor, cond: Conditioning) -> None:
        spec, batch = self.spec, latents.shape[0] if latents.dim() else 0
        if latents.dim() != 4 or latents.shape[1] != spec.channels:
            raise SpecError(
                f"latents have shape {tuple(latents.shape)}, the model takes (B, {spec.channels}, H, W)",
                cure="give latents of the spec's channels",
            )
        if time.shape != (batch,):
            raise SpecError(f"time has shape {tuple(time.shape)}, not ({batch},)", cure="give one time per image")
        wanted = {"text"} if spec.n_txt else set()
        wanted |= {"label"} if spec.n_classes else set()
        allowed = wanted | ({"text_mask"} if spec.n_txt else set())
        given = set(cond.given())
        if given - allowed:
            raise ConditioningError(
                f"the model does not take {', '.join(sorted(given - allowed))}",
                cure=f"it takes {', '.join(sorted(allowed)) or 'no condition'}",
            )
        if wanted - given:
            raise ConditioningError(
                f"the model needs {', '.join(sorted(wanted - given))}", cure="give it in the Conditioning"
            )
        text, mask, label = cond.text, cond.text_mask, cond.label
        if text is not None and not (
            text.dim() == 3
            and text.shape[0] == batch
            and 1 <= text.shape[1] <= spec.n_txt
            and text.shape[2] == spec.text_width
        ):
            raise ConditioningError(
                f"text has shape {tuple(text.shape)}, the model takes ({batch}, n <= {spec.n_txt}, {spec.text_width})",
                cure="cut or pad the texts, and embed them with the encoder of the spec's text_width",
            )
        if mask is not None and (text is None or mask.dtype != torch.bool or mask.shape != text.shape[:2]):
            raise ConditioningError(
                f"text_mask is {mask.dtype} of shape {tuple(mask.shape)}, not bool (B, n_txt)",
                cure="give True for the tokens to attend to, one per text token",
            )
        if label is not None and (label.shape != (batch,) or label.dtype not in (torch.int64, torch.int32)):
            raise ConditioningError(
                f"label is {label.dtype} of shape {tuple(label.shape)}, not integers ({batch},)",
                cure=f"give one class per image, 0..{spec.n_classes - 1}",
            )

    def extra_repr(self) -> str:
        spec, counts, costs = self.spec, self.spec.param_counts(), self.spec.flops()
        height, width = spec.latent_size
        switches = [name for name in ("time_mlp", "conv", "skips", "qk_norm", "adaln") if getattr(spec, name)]
        extras = [f"label of {spec.n_classes}"] if spec.n_classes else []
        extras += ["time"] + ([f"text {spec.n_txt}x{spec.text_width}"] if spec.n_txt else [])
        return "\n".join(
            (
                f"width {spec.width}, {spec.n_blocks} blocks ({spec.n_skips} with a skip), "
                f"{spec.n_heads} heads of {spec.head_dim}",
                f"latents {spec.channels}x{height}x{width}, patch {spec.patch}, out {spec.c_out}",
                f"{spec.n_tokens} tokens: {' | '.join(extras)} | patches {spec.n_img}; positions {spec.pos_init}",
                f"with {', '.join(switches) or 'no switch on'}; layout {self.layout}",
                f"{counts.total:,} parameters ({counts.per_token:,} passed by every token)",
                f"{costs.flops:,} FLOPs forward per image (2 per multiply-add)",
            )
        )
