"""What a user would write without longskip's engine: a plain U-ViT of torch's own modules, trained by stock DeepSpeed
ZeRO-3 or by a bare torch loop. Nothing here uses our layouts, optimizer, shards or kernels.

Names, initial values and arithmetic are those of ``models.uvit``, so that losses can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longskip.engine.config import BatchPlan, Config
from longskip.engine.data.reader import MicroBatch
from longskip.engine.distributed import import_deepspeed
from longskip.errors import ConfigError
from longskip.models.init import initial_value
from longskip.models.specs import NORM_EPS, ParamSpec, UViTSpec

Step = Callable[[MicroBatch], float]  # one optimizer step; returns the mean loss of this rank's samples


class PlainBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, spec: UViTSpec, takes_skip: bool) -> None:
        super().__init__()
        h, self.n_heads = spec.width, spec.n_heads
        self.skip = nn.Linear(2 * h, h) if takes_skip else None
        self.norm1, self.norm2 = nn.LayerNorm(h, NORM_EPS), nn.LayerNorm(h, NORM_EPS)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(h, 3 * h, bias=False), "proj": nn.Linear(h, h)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(h, spec.mlp_width), "fc2": nn.Linear(spec.mlp_width, h)})

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """x, skip (B, T, h) → (B, T, h)."""
        b, t, h = x.shape
        if self.skip is not None and skip is not None:
            x = self.skip(torch.cat((x, skip), dim=-1))  # (B, T, h)
        qkv = self.attn["qkv"](self.norm1(x)).view(b, t, 3, self.n_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, Dh) each
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, h)
        x = x + self.attn["proj"](attended)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))  # (B, T, h)


def check(spec: UViTSpec) -> None:
    """Raises ConfigError on a spec with switches that the plain model lacks."""
    if spec.adaln or spec.qk_norm or spec.time_mlp or spec.n_classes or not (spec.skips and spec.n_txt):
        raise ConfigError(
            "the plain U-ViT has words and skips, but no adaLN, qk-norm, time MLP or classes",
            cure="take a text-to-image preset without those switches",
        )


class PlainUViT(nn.Module):
    """U-ViT and a table of word vectors, for specs that pass ``check``."""

    def __init__(self, spec: UViTSpec, vocabulary_size: int) -> None:
        super().__init__()
        self.spec = spec
        h, pixels = spec.width, spec.patch**2
        self.text = nn.ModuleDict({"embedding": nn.Embedding(vocabulary_size, spec.text_width)})
        patch, text = nn.Linear(pixels * spec.channels, h), nn.Linear(spec.text_width, h)
        self.embed = nn.ModuleDict({"patch": patch, "text": text})
        self.embed.register_parameter("pos", nn.Parameter(torch.zeros(spec.n_tokens, h)))
        self.blocks = nn.ModuleList(PlainBlock(spec, spec.has_skip(index)) for index in range(spec.n_blocks))
        self.head = nn.ModuleDict({"norm": nn.LayerNorm(h, NORM_EPS), "linear": nn.Linear(h, pixels * spec.c_out)})
        if spec.conv:
            self.head["conv"] = nn.Conv2d(spec.c_out, spec.c_out, 3, padding=1)

    def forward(self, latents: Tensor, time: Tensor, tokens: Tensor) -> Tensor:
        """(B, C, H, W), (B,), (B, n_txt) ids → (B, C_out, H, W)."""
        spec, (b, c, height, width) = self.spec, latents.shape
        p, (rows, cols), half = spec.patch, spec.grid((int(height), int(width))), spec.width // 2
        rates = torch.exp(torch.arange(half, device=time.device) * (-math.log(10000.0) / half))
        angles = (time * spec.time_scale)[:, None] * rates
        now = torch.cat((angles.cos(), angles.sin()), dim=-1)[:, None]  # (B, 1, h)
        patches = latents.view(b, c, rows, p, cols, p).permute(0, 2, 4, 3, 5, 1).reshape(b, rows * cols, -1)
        words = self.embed["text"](self.text["embedding"](tokens))  # (B, n_txt, h)
        x = torch.cat((now, words, self.embed["patch"](patches)), dim=1)  # (B, L, h)
        x = x + self.embed.get_parameter("pos")
        skips, middle = list[Tensor](), spec.n_blocks // 2
        for index, block in enumerate(self.blocks):
            x = block(x, skips.pop() if index > middle else None)
            if index < middle:
                skips.append(x)
        out = self.head["linear"](self.head["norm"](x))[:, -rows * cols :]  # (B, N, p²c)
        out = out.view(b, rows, cols, p, p, -1).permute(0, 5, 1, 3, 2, 4).reshape(b, -1, height, width)
        return self.head["conv"](out) if spec.conv else out


def stock_deepspeed(config: Config, vocabulary_size: int, batch: BatchPlan, device: torch.device) -> Step:
    """Stock ZeRO-3: ``zero.Init``, torch's fused AdamW, DeepSpeed's own clipping; no average of the weights."""
    deepspeed = import_deepspeed()
    table = declared(config, vocabulary_size)
    size = sum(spec.numel for spec in table.values())
    settings = {
        "train_micro_batch_size_per_gpu": batch.micro,
        "gradient_clipping": config.optim.clip,
        # The defaults would allocate buckets of 5e8 elements; these are no smaller than the model.
        "zero_optimization": {"stage": 3, "reduce_bucket_size": size, "stage3_prefetch_bucket_size": size},
    }
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = PlainUViT(config.backbone(), vocabulary_size)
    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
        fill(config, model, table)
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch_adamw(config, model, table), config=settings)

    def step(micro: MicroBatch) -> float:
        loss = flow_loss(engine, micro.to(device))
        engine.backward(loss)
        engine.step()
        return float(loss)

    return step


def bare_loop(config: Config, vocabulary_size: int, device: torch.device) -> Step:
    """Forward, backward, clip, torch's fused AdamW and an average of the weights in one multi-tensor call."""
    table = declared(config, vocabulary_size)
    model = PlainUViT(config.backbone(), vocabulary_size).to(device)
    fill(config, model, table)
    optimizer = torch_adamw(config, model, table)
    weights: list[Tensor] = list(model.parameters())
    average = [weight.detach().clone() for weight in weights]

    def step(micro: MicroBatch) -> float:
        loss = flow_loss(model, micro.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 1.0 - config.optim.ema_decay)
        return float(loss)

    return step


def flow_loss(model: Callable[..., Tensor], micro: MicroBatch) -> Tensor:
    """Mean squared error of the velocity ε − x₀ at logit-normal times."""
    time = torch.sigmoid(micro.time_normal)  # (B,)
    t = time.view(-1, 1, 1, 1)
    predicted = model((1 - t) * micro.clean + t * micro.noise, time, micro.conditions["tokens"])
    return F.mse_loss(predicted, micro.noise - micro.clean)


def declared(config: Config, vocabulary_size: int) -> dict[str, ParamSpec]:
    """The plain model's parameter names → our declarations of the same tensors."""
    text = config.text_encoder(vocabulary_size)
    table = {spec.name: spec for unit in config.backbone().parameters().values() for spec in unit}
    return table | {f"text.{spec.name}": spec for spec in (text.parameters()["embedding"] if text else ())}


@torch.no_grad()
def fill(config: Config, model: nn.Module, table: dict[str, ParamSpec]) -> None:
    """The initial values that our model gives the same tensors."""
    for name, parameter in model.named_parameters():
        canonical = name if name.startswith("text.") else f"backbone.{name}"
        parameter.copy_(initial_value(config.train.seed, canonical, table[name].shape, table[name].init))


def torch_adamw(config: Config, model: nn.Module, table: dict[str, ParamSpec]) -> torch.optim.AdamW:
    """torch's fused AdamW with the two usual groups, with and without decay."""
    decay = [p for name, p in model.named_parameters() if table[name].decay]
    plain = [p for name, p in model.named_parameters() if not table[name].decay]
    groups: list[dict[str, Any]] = [
        {"params": decay, "weight_decay": config.optim.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.optim.lr, betas=config.optim.betas, eps=config.optim.eps, fused=True)
