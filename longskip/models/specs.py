"""Model shapes without torch: what a U-ViT is made of, and what it costs in parameters, FLOPs and saved bytes.

A spec is a frozen dataclass. The module is built from ``spec.parameters()``, so the closed forms here and the built
model speak of the same tensors; the tests compare them to the integer with independent counters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from longskip.errors import SpecError
from longskip.models.calls import UnitCalls
from longskip.models.uvit_calls import uvit_calls, word_encoder_calls

__all__ = ["Contractions", "Flops", "ParamCounts", "ParamSpec", "SavedBytes", "TextEncoderSpec", "UViTSpec"]

NORM_EPS = 1e-5


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: its name within the model, shape, kind of initial value (see ``init.py``), weight decay or not."""

    name: str
    shape: tuple[int, ...]
    init: str
    decay: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class ParamCounts:
    """Numbers of trainable parameters.

    ``total`` (N) is the sum of ``by_part``. ``per_token`` (N_token): those that every token passes (the blocks without
    adaLN's projection, and the head's norm and linear). ``per_image``: those that act once per image (adaLN's
    projections, the time MLP). ``partial``: those that act on one kind of token only (patch and text projections,
    label table, position rows, the final convolution).
    """

    per_token: int
    per_image: int
    partial: int
    by_part: dict[str, int]

    @property
    def total(self) -> int:
        return self.per_token + self.per_image + self.partial


class Contractions:
    """Multiply-adds by op, and what follows from them; 2 FLOPs per multiply-add."""

    macs_by_op: dict[str, int]

    @property
    def macs(self) -> int:
        return sum(self.macs_by_op.values())

    @property
    def flops_by_op(self) -> dict[str, int]:
        return {op: 2 * macs for op, macs in self.macs_by_op.items()}

    @property
    def flops(self) -> int:
        return 2 * self.macs


@dataclass(frozen=True)
class Flops(Contractions):
    """Contractions of one forward pass of a batch: linear, convolution, QKᵀ and PV; no norms, softmax, biases.

    ``macs_by_op`` holds multiply-adds; ``flops`` = 2 × ``macs``; ``model_flops`` = 3 × ``flops`` (forward and backward,
    nothing recomputed). ``tokens`` = label + time + text + image tokens of the batch.
    """

    batch: int
    tokens: int
    image_tokens: int
    macs_by_op: dict[str, int]

    @property
    def model_flops(self) -> int:
        return 3 * self.flops


@dataclass(frozen=True)
class SavedBytes:
    """Bytes that autograd holds between forward and backward; see ``UViTSpec.saved_bytes`` for what is counted.

    ``block``: one block without a skip that is kept whole (or its input, where every block is checkpointed);
    ``skip_block``: one with; ``blocks``: all of them; ``recompute``: what one
    block adds for a moment during the backward pass when checkpointing (0 otherwise).
    """

    embed: int
    block: int
    skip_block: int
    blocks: int
    head: int
    recompute: int

    @property
    def total(self) -> int:
        """Held at the end of the forward pass."""
        return self.embed + self.blocks + self.head

    @property
    def peak(self) -> int:
        """Held at the worst moment: the total, and one recomputed block when checkpointing."""
        return self.total + self.recompute


def _whole(owner: object, name: str, least: int) -> int:
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise SpecError(f"{name} = {value!r} is not a whole number", cure=f"give an integer of at least {least}")
    if value < least:
        raise SpecError(f"{name} = {value} is below its limit {least}", cure=f"give an integer of at least {least}")
    return value


@dataclass(frozen=True)
class UViTSpec:
    """Shape of a U-ViT ("All are Worth Words", arXiv 2209.12152; text-to-image setting of arXiv 2412.12391).

    Tokens of one sequence: ``[label | time | text | patches]``. ``depth`` d makes 2·⌊d/2⌋ + 1 blocks; with ``skips``
    every block of the second half takes a skip, last in first out. ``latent_size`` (H, W) in latents, not pixels.
    ``n_classes`` counts the rows of the label table (add one for "no label"). ``adaln`` adds DiT's modulation by the
    time embedding to every block and to the head. Raises ``SpecError`` on a shape that cannot be built.
    """

    width: int
    depth: int
    n_heads: int
    patch: int = 2
    channels: int = 4
    out_channels: int | None = None
    latent_size: tuple[int, int] = (32, 32)
    n_txt: int = 0
    text_width: int = 0
    n_classes: int = 0
    mlp_ratio: int = 4
    time_mlp: bool = False
    conv: bool = True
    skips: bool = True
    qk_norm: bool = False
    adaln: bool = False
    pos_init: Literal["normal", "sincos"] = "normal"
    time_scale: float = 1000.0

    def __post_init__(self) -> None:
        size = self.latent_size
        if isinstance(size, list):  # YAML has no tuples
            object.__setattr__(self, "latent_size", tuple(size))
        for name in ("width", "depth", "n_heads", "patch", "channels", "mlp_ratio"):
            _whole(self, name, 1)
        for name in ("n_txt", "text_width", "n_classes"):
            _whole(self, name, 0)
        if self.out_channels is not None:
            _whole(self, "out_channels", 1)
        for name in ("time_mlp", "conv", "skips", "qk_norm", "adaln"):
            if not isinstance(getattr(self, name), bool):
                raise SpecError(f"{name} = {getattr(self, name)!r} is not true or false", cure="give true or false")
        if self.width % self.n_heads:
            raise SpecError(
                f"width {self.width} is not a multiple of n_heads {self.n_heads}",
                cure=f"take a width of {self.width - self.width % self.n_heads + self.n_heads} or other heads",
            )
        if self.width % 2:
            raise SpecError(f"width {self.width} is odd: the time sinusoid needs pairs", cure="take an even width")
        if self.pos_init not in ("normal", "sincos"):
            raise SpecError(f"pos_init = {self.pos_init!r} is unknown", cure="take 'normal' or 'sincos'")
        if self.pos_init == "sincos" and self.width % 4:
            raise SpecError(
                f"width {self.width} is not a multiple of 4, which sin-cos positions need",
                cure="take a width divisible by 4, or pos_init='normal'",
            )
        self.grid(self.latent_size)
        if bool(self.n_txt) != bool(self.text_width):
            raise SpecError(
                f"n_txt = {self.n_txt} with text_width = {self.text_width}: text needs both, no text neither",
                cure="set both above 0, or both to 0",
            )
        scale = self.time_scale
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
            raise SpecError(f"time_scale = {scale!r} is not a positive finite number", cure="the usual value is 1000")

    # -- shape ---------------------------------------------------------------------------------------------------------

    @property
    def n_blocks(self) -> int:
        return 2 * (self.depth // 2) + 1

    @property
    def n_skips(self) -> int:
        """Blocks that take a skip: the second half, or none."""
        return self.depth // 2 if self.skips else 0

    @property
    def head_dim(self) -> int:
        return self.width // self.n_heads

    @property
    def mlp_width(self) -> int:
        return self.mlp_ratio * self.width

    @property
    def c_out(self) -> int:
        return self.channels if self.out_channels is None else self.out_channels

    @property
    def n_extra(self) -> int:
        """Tokens before the patches: label, time, text."""
        return (1 if self.n_classes else 0) + 1 + self.n_txt

    @property
    def n_img(self) -> int:
        rows, cols = self.grid(self.latent_size)
        return rows * cols

    @property
    def n_tokens(self) -> int:
        return self.n_extra + self.n_img

    def grid(self, latent_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches for latents of (H, W); ``SpecError`` where the patch does not divide them."""
        whole = isinstance(latent_size, tuple) and len(latent_size) == 2
        if not whole or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in latent_size):
            raise SpecError(f"latent_size = {latent_size!r} is not two positive integers", cure="give (H, W)")
        height, width = latent_size
        if height % self.patch or width % self.patch:
            raise SpecError(
                f"latents of {height}x{width} are not divisible by patch {self.patch}",
                cure=f"take sides that are multiples of {self.patch}, or another patch",
            )
        return height // self.patch, width // self.patch

    # -- parameters ----------------------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, tuple[ParamSpec, ...]]:
        """Unit → its parameters, in the order in which tokens pass them; names are canonical within the model."""
        units = ["embed", *(f"blocks.{index}" for index in range(self.n_blocks)), "head"]
        return {unit: self.parameters_of(unit) for unit in units}

    def parameters_of(self, unit: str) -> tuple[ParamSpec, ...]:
        """The parameters of one unit, without listing the others."""
        if unit == "embed":
            return self._embed()
        return self._head() if unit == "head" else self._block(int(unit.removeprefix("blocks.")))

    def _embed(self) -> tuple[ParamSpec, ...]:
        h, patch_in = self.width, self.patch**2 * self.channels
        rows, cols = self.grid(self.latent_size)
        pos = f"sincos:{rows}x{cols}" if self.pos_init == "sincos" else "trunc_normal"
        table = [
            *_linear("embed.patch", h, patch_in, init="fan_in"),
            ParamSpec("embed.pos", (self.n_tokens, h), pos, False),
        ]
        if self.n_txt:
            table += _linear("embed.text", h, self.text_width)
        if self.n_classes:
            table.append(ParamSpec("embed.label.weight", (self.n_classes, h), "normal", False))
        if self.time_mlp:
            table += _linear("embed.time.fc1", 4 * h, h) + _linear("embed.time.fc2", h, 4 * h)
        return tuple(table)

    def has_skip(self, index: int) -> bool:
        """Whether block ``index`` takes a skip."""
        return index >= self.n_blocks - self.n_skips

    def _block(self, index: int) -> tuple[ParamSpec, ...]:
        h, unit = self.width, f"blocks.{index}"
        table: list[ParamSpec] = []
        if self.has_skip(index):
            table += _linear(f"{unit}.skip", h, 2 * h)
        if self.adaln:
            table += _linear(f"{unit}.ada", 6 * h, h, init="zeros")
        else:
            table += _norm(f"{unit}.norm1", h)
        table.append(ParamSpec(f"{unit}.attn.qkv.weight", (3 * h, h), "trunc_normal", True))
        if self.qk_norm:
            for name in ("q_norm", "k_norm"):
                table.append(ParamSpec(f"{unit}.attn.{name}.weight", (self.head_dim,), "ones", False))
        table += _linear(f"{unit}.attn.proj", h, h)
        if not self.adaln:
            table += _norm(f"{unit}.norm2", h)
        table += _linear(f"{unit}.mlp.fc1", self.mlp_width, h) + _linear(f"{unit}.mlp.fc2", h, self.mlp_width)
        return tuple(table)

    def _head(self) -> tuple[ParamSpec, ...]:
        h, c = self.width, self.c_out
        table = _linear("head.ada", 2 * h, h, init="zeros") if self.adaln else _norm("head.norm", h)
        table += _linear("head.linear", self.patch**2 * c, h)
        if self.conv:
            table.append(ParamSpec("head.conv.weight", (c, c, 3, 3), "fan_in", True))
            table.append(ParamSpec("head.conv.bias", (c,), "zeros", False))
        return tuple(table)

    def param_counts(self) -> ParamCounts:
        """Closed form of the numbers of parameters; the tests compare it with ``parameters()`` and the built module."""
        h, r, c_in, c_out = self.width, self.mlp_ratio, self.channels, self.c_out
        blocks, skips, pixels = self.n_blocks, self.n_skips, self.patch**2
        by_part = {
            "blocks": blocks * ((4 + 2 * r) * h**2 + (2 + r) * h),
            "block_norms": 0 if self.adaln else blocks * 4 * h,
            "qk_norms": blocks * 2 * self.head_dim if self.qk_norm else 0,
            "skips": skips * (2 * h**2 + h),
            "ada": (6 * blocks + 2) * (h**2 + h) if self.adaln else 0,
            "patch": pixels * c_in * h + h,
            "pos": self.n_tokens * h,
            "text": (self.text_width + 1) * h if self.n_txt else 0,
            "label": self.n_classes * h,
            "time_mlp": 8 * h**2 + 5 * h if self.time_mlp else 0,
            "head_norm": 0 if self.adaln else 2 * h,
            "head_linear": (h + 1) * pixels * c_out,
            "conv": 9 * c_out**2 + c_out if self.conv else 0,
        }
        groups = {"ada": "image", "time_mlp": "image"} | dict.fromkeys(
            ("patch", "pos", "text", "label", "conv"), "partial"
        )
        sums = {"token": 0, "image": 0, "partial": 0}
        for part, count in by_part.items():
            sums[groups.get(part, "token")] += count
        return ParamCounts(sums["token"], sums["image"], sums["partial"], by_part)

    # -- costs ---------------------------------------------------------------------------------------------------------

    def flops(self, batch: int = 1, latent_size: tuple[int, int] | None = None, n_txt: int | None = None) -> Flops:
        """Contractions of one forward pass of ``batch`` images, by op.

        ``latent_size`` (H, W) and ``n_txt`` stand for a run at another resolution or with shorter texts; the default is
        the spec's own.
        """
        height, width = self.latent_size if latent_size is None else latent_size
        rows, cols = self.grid((height, width))
        text = self.n_txt if n_txt is None else n_txt
        self._check_text(text)
        h, blocks, pixels, img = self.width, self.n_blocks, self.patch**2, rows * cols
        tokens = self.n_extra - self.n_txt + text + img
        one = {
            "qkv": blocks * 3 * h**2 * tokens,
            "attention": blocks * 2 * tokens**2 * h,
            "proj": blocks * h**2 * tokens,
            "mlp": blocks * 2 * self.mlp_ratio * h**2 * tokens,
            "skip_linear": self.n_skips * 2 * h**2 * tokens,
            "ada": (6 * blocks + 2) * h**2 if self.adaln else 0,
            "patch": img * pixels * self.channels * h,
            "text": text * self.text_width * h,
            "time_mlp": 8 * h**2 if self.time_mlp else 0,
            "head": tokens * h * pixels * self.c_out,
            "conv": 9 * self.c_out**2 * height * width if self.conv else 0,
        }
        return Flops(batch, batch * tokens, batch * img, {op: batch * macs for op, macs in one.items()})

    def calls(
        self,
        batch: int = 1,
        latent_size: tuple[int, int] | None = None,
        n_txt: int | None = None,
        *,
        trained_text: bool = False,
        masked: bool = False,
    ) -> tuple[UnitCalls, ...]:
        """Every op of a forward pass of ``batch`` images, unit by unit: what ``profiling.flop_ledger`` adds up.

        ``latent_size`` and ``n_txt`` as in ``flops``; ``trained_text``: the text features need gradients;
        ``masked``: attention is given a mask of the text's padding.
        """
        size, text = self.latent_size if latent_size is None else latent_size, self.n_txt if n_txt is None else n_txt
        self._check_text(text)
        return uvit_calls(self, batch, size, text, trained_text=trained_text, masked=masked)

    def _check_text(self, n_txt: int) -> None:
        if not 0 <= n_txt <= self.n_txt:
            raise SpecError(f"n_txt = {n_txt} is outside 0..{self.n_txt}", cure="give at most the spec's n_txt")

    def checkpointed(self, checkpointing: int) -> tuple[int, int]:
        """How many blocks without and with a skip are recomputed when every ``checkpointing``-th block is (0: none)."""
        chosen = range(0, self.n_blocks, checkpointing) if checkpointing else range(0)
        skips = sum(self.has_skip(index) for index in chosen)
        return len(chosen) - skips, skips

    def saved_bytes(
        self,
        batch: int,
        dtype_bytes: int,
        checkpointing: int = 0,
        latent_size: tuple[int, int] | None = None,
        n_txt: int | None = None,
        *,
        kernels: Literal["torch", "triton"] = "torch",
    ) -> SavedBytes:
        """Bytes that autograd keeps from the forward pass for the backward pass, with the ``torch`` or our own kernels.

        Counted: every storage that a graph node saves, once, parameters apart; activations at ``dtype_bytes`` per
        element (4 float32, 2 bfloat16), statistics (norms, log-sum-exp of attention) at 4, as GPUs keep them.
        Attention is a fused kernel that keeps q, k, v, output and log-sum-exp, not T² scores.
        Per token of width h a plain block keeps 16 h: norm input, qkv input, q, k, v, attention output, second norm's
        input, MLP input, 4 h before and 4 h after GELU. A skip adds 2 h (the concatenated pair), adaLN 4 h, qk-norm 4 h
        in float32 (2 h, and 4 h of float32, in bfloat16; a fused RMS norm keeps less). Not counted: gradients, weights,
        text masks, workspaces, the allocator's rounding, whatever the loss and the text encoder keep.
        Ours (``kernels="triton"``) keep less: the MLP makes its values after GELU again, a skip adds 1 h (the block's
        input, its skip being kept anyway), adaLN 2 h (both branches' outputs), qk-norm 2 h (normed q and k) in any dtype.

        With ``checkpointing`` k every k-th block keeps its input alone; ``recompute`` is what one adds for a moment.
        Flat layouts keep the same bytes as named ones. Equal to the sum of ``saved_tensors_hooks`` in float32 (tested);
        in bfloat16 it is what GPUs keep: on a CPU the norms work on float32 copies, which count more. Raises ``SpecError``
        for unknown kernels, and for sizes that do not fit.
        """
        if kernels not in ("torch", "triton"):
            raise SpecError(f"kernels = {kernels!r} are unknown", cure="take 'torch' or 'triton'")
        ours = kernels == "triton"
        height, width = self.latent_size if latent_size is None else latent_size
        costs = self.flops(batch, (height, width), n_txt)  # checks the arguments
        h, wide, tokens = self.width, max(4, dtype_bytes), costs.tokens
        row, vector = tokens * h * dtype_bytes, batch * h * dtype_bytes
        stats, head_stats = 2 * tokens * 4, tokens * self.n_heads * 4
        block = (8 + (1 if ours else 2) * self.mlp_ratio) * row + 2 * stats + head_stats
        if self.adaln and ours:
            block += 2 * row + 7 * vector  # branch outputs twice; 6 h, SiLU(time)
        elif self.adaln:
            block += 4 * row + 9 * vector  # normed twice and branch outputs twice; 1 + scale twice, 6 h, SiLU(time)
        if self.qk_norm and ours:
            block += 2 * row
        elif self.qk_norm:
            block += 2 * row + 2 * tokens * h * wide + 2 * head_stats
            block += 2 * (tokens * h + self.head_dim) * wide if dtype_bytes < wide else 0  # float32 copies
        skip_block = block + (1 if ours else 2) * row
        plain, skips = self.checkpointed(checkpointing)
        # a block's input is there already: the first norm's, or with a skip one half of our kernels' pair
        recompute = skip_block - (row if ours else 0) if skips else block - row if plain else 0
        blocks = (self.n_blocks - self.n_skips - plain) * block + (self.n_skips - skips) * skip_block
        blocks += (plain + skips) * row
        if checkpointing == 1:
            block = skip_block = row
        text = (tokens - costs.image_tokens) // batch - (self.n_extra - self.n_txt)
        embed = (costs.image_tokens * self.patch**2 * self.channels + batch * text * self.text_width) * dtype_bytes
        embed += 8 * batch if self.n_classes else 0
        embed += 9 * vector if self.time_mlp else 0
        embed += vector if self.adaln and (self.time_mlp or checkpointing) else 0  # the time embedding, once for all
        head = 2 * row + stats
        if self.adaln:
            head += 3 * vector if ours else row + 2 * vector
        head += batch * self.c_out * height * width * dtype_bytes if self.conv else 0
        return SavedBytes(embed, block, skip_block, blocks, head, recompute)


def _linear(name: str, n_out: int, n_in: int, init: str = "trunc_normal") -> list[ParamSpec]:
    return [ParamSpec(f"{name}.weight", (n_out, n_in), init, True), ParamSpec(f"{name}.bias", (n_out,), "zeros", False)]


def _norm(name: str, width: int) -> list[ParamSpec]:
    return [ParamSpec(f"{name}.weight", (width,), "ones", False), ParamSpec(f"{name}.bias", (width,), "zeros", False)]


@dataclass(frozen=True)
class TextEncoderSpec:
    """Shape of the word encoder: a table of ``vocab_size`` vectors of ``width``, texts of ``n_tokens`` ids, and ``depth``
    layers in which a word sees the ``REACH`` words before it and after it."""

    vocab_size: int
    width: int
    n_tokens: int
    depth: int = 0

    REACH: ClassVar[int] = 3  # a noun's own words, and the next word that relates it to another

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "n_tokens"):
            _whole(self, name, 1)
        _whole(self, "depth", 0)

    @property
    def window(self) -> int:
        """Words that a word sees in a layer, itself included."""
        return 2 * self.REACH + 1

    def parameters(self) -> dict[str, tuple[ParamSpec, ...]]:
        """Unit → its parameters."""
        table = [ParamSpec("embedding.weight", (self.vocab_size, self.width), "normal", False)]
        for index in range(self.depth):
            table += _norm(f"layers.{index}.norm", self.width)
            table += _linear(f"layers.{index}.linear", self.width, self.window * self.width, init="xavier")
        return {"embedding": tuple(table)}

    def param_counts(self) -> ParamCounts:
        """One row of the table is looked up per text token; every text token passes the layers."""
        h = self.width
        by_part = {"embedding": self.vocab_size * h, "layers": self.depth * (self.window * h**2 + 3 * h)}
        return ParamCounts(0, 0, sum(by_part.values()), by_part)

    def saved_bytes(self, batch: int, dtype_bytes: int) -> int:
        """Bytes that autograd keeps of ``batch`` texts with either kernels, beside the features, which the U-ViT keeps: ids,
        and of each layer its input, the statistics of its norm, the window and the values before GELU."""
        tokens = batch * self.n_tokens
        return 8 * tokens + self.depth * (tokens * (self.window + 2) * self.width * dtype_bytes + 2 * tokens * 4)

    def flops(self, batch: int = 1) -> Flops:
        """Contractions of one forward pass of ``batch`` texts: the layers' linears. A step executes exactly
        ``model_flops``: everything needs its gradient."""
        macs = batch * self.depth * self.n_tokens * self.window * self.width**2
        return Flops(batch, batch * self.n_tokens, 0, {"layers": macs})

    def calls(self, batch: int = 1) -> tuple[UnitCalls, ...]:
        """Every op of a forward pass of ``batch`` texts."""
        return word_encoder_calls(self, batch)
