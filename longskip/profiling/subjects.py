"""What ``longskip profile`` profiles: a preset, or what a configuration builds, at a size that can be trained (no torch)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from longskip.errors import ConfigError, did_you_mean
from longskip.kernels.formulas import OpCost
from longskip.models.calls import Call, TokenClass
from longskip.models.presets import PRESETS, preset
from longskip.models.specs import TextEncoderSpec, UViTSpec
from longskip.profiling.encoder_costs import encoder_cost
from longskip.profiling.flop_ledger import (
    BACKENDS,
    Beyond,
    FlopLedger,
    Row,
    flop_ledger,
    loss_rows,
    optimizer_row,
    rows_of,
)

__all__ = ["PRECISIONS", "Subject", "of_preset", "resized", "subjects"]

PRECISIONS = {"bf16": 2, "fp16": 2, "fp32": 4}
VAE_FACTOR = 8  # pixels per latent of the autoencoders that the presets of four channels are made for
MOST = {"batch": 1 << 20, "resolution": 1 << 16, "text tokens": 1 << 16}


@dataclass(frozen=True)
class Subject:
    """What a step is made of. ``factor``: pixels per latent. ``text``: the word encoder that is trained along;
    ``masked``: text comes with a mask of its padding. ``encoders``: the config.json of the frozen encoders that run in
    every step, by ``vae`` and ``text``. ``clip``, ``ema``, ``x_kind``: what the optimizer and the loss do. ``preset``
    is what the spec was made from, ``notes`` what a reader has to know.
    """

    name: str
    spec: UViTSpec
    factor: int
    batch: int = 1
    precision: str = "bf16"
    checkpointing: int = 0
    kernels: Mapping[str, str] = field(default_factory=lambda: {"all": "torch"})
    text: TextEncoderSpec | None = None
    masked: bool = False
    encoders: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    x_kind: bool = False
    clip: bool = True
    ema: bool = True
    preset: str = ""
    notes: tuple[str, ...] = ()

    @property
    def pixels(self) -> tuple[int, int]:
        height, width = self.spec.latent_size
        return height * self.factor, width * self.factor

    @property
    def itemsize(self) -> int:
        return PRECISIONS[self.precision]

    @property
    def parameters(self) -> int:
        """N: everything that is trained."""
        return self.spec.param_counts().total + (self.text.param_counts().total if self.text else 0)

    def ledger(
        self,
        *,
        latent_size: tuple[int, int] | None = None,
        padding: Callable[[Call], Beyond] | None = None,
        updated: int | None = None,
    ) -> FlopLedger:
        """The whole step of one micro-batch: model, word encoder, frozen encoders, loss, optimizer.

        ``latent_size``: of a bucket (H, W), the model staying as it is. ``padding``: see ``flop_ledger``. ``updated``:
        how many parameters this rank's optimizer has, all by default.
        """
        size, batch, (height, width) = self.itemsize, self.batch, latent_size or self.spec.latent_size
        ledger = flop_ledger(
            self.spec,
            batch=batch,
            latent_size=(height, width),
            checkpointing=self.checkpointing,
            backend=self.kernels,
            trained_text=self.text is not None,
            masked=self.masked,
            itemsize=size,
            padding=padding,
        )
        if self.text is not None:
            ledger = ledger.with_rows(rows_of(self.text.calls(batch), itemsize=size, part="text"))
        copies = 0 if size == 4 else size
        return ledger.with_rows(
            (
                *_encoder_rows(self, (height * self.factor, width * self.factor)),
                *loss_rows(self.spec.channels * height * width, batch, x_kind=self.x_kind, itemsize=size),
                optimizer_row(updated or self.parameters, ema=self.ema, clip=self.clip, copies=copies),
            )
        )


def _encoder_rows(subject: Subject, pixels: tuple[int, int]) -> list[Row]:
    """The contractions of the frozen encoders that run in the step."""
    rows = []
    for part, config in subject.encoders.items():
        size: dict[str, Any] = {"tokens": subject.spec.n_txt} if part == "text" else {"pixels": pixels}
        cost = encoder_cost(config, batch=subject.batch, **size)
        tokens: dict[TokenClass, int] = {"text": subject.spec.n_txt} if part == "text" else {}
        for op, macs in cost.macs_by_op.items():
            rows.append(Row((f"encoders.{part}",), f"{part}.{op}", op, OpCost(macs), tokens=tokens, part="encoders"))
    return rows


def of_preset(name: str) -> Subject:
    """A preset at its own resolution, one image a step; SpecError with the nearest name for one that is not known."""
    spec = preset(name)
    latent = spec.channels == 4
    return Subject(name, spec, VAE_FACTOR if latent else 1, preset=name)


def resized(
    subject: Subject,
    *,
    resolution: tuple[int, int] | None = None,
    batch: int | None = None,
    text_tokens: int | None = None,
    precision: str | None = None,
    checkpointing: int | None = None,
    kernels: str | None = None,
) -> Subject:
    """The subject with other sizes; the model is built for them, so that its positions, and N, are theirs.

    ``resolution`` (H, W) in pixels. ConfigError for a size that is none, too large or not divisible, for an unknown
    precision or backend, with the nearest.
    """
    spec, text = subject.spec, subject.text
    if resolution is not None:
        spec = replace(spec, latent_size=_latents(subject, resolution))
    if text_tokens is not None:
        if not spec.n_txt:
            raise ConfigError(
                f"{text_tokens} text tokens: {subject.name} takes no text", cure="leave --text-tokens out"
            )
        count = _size("text tokens", text_tokens)
        spec, text = replace(spec, n_txt=count), replace(text, n_tokens=count) if text else None
    found = replace(subject, spec=spec, text=text)
    if batch is not None:
        found = replace(found, batch=_size("batch", batch))
    if precision is not None:
        found = replace(found, precision=_known("precision", precision, PRECISIONS))
    if checkpointing is not None:
        if not 0 <= checkpointing <= spec.n_blocks:
            raise ConfigError(
                f"checkpointing {checkpointing} is outside 0..{spec.n_blocks}, the blocks of {subject.name}",
                cure="0 none, 1 every block, k every k-th",
            )
        found = replace(found, checkpointing=checkpointing)
    if kernels is not None:
        notes = tuple(note for note in found.notes if not note.startswith("kernels.backend"))  # no longer so
        found = replace(found, kernels={"all": _known("backend", kernels, BACKENDS)}, notes=notes)
    return found


def subjects() -> list[Subject]:
    """Every preset."""
    return [of_preset(name) for name in PRESETS]


def _latents(subject: Subject, pixels: tuple[int, int]) -> tuple[int, int]:
    step = subject.factor * subject.spec.patch
    for side in pixels:
        _size("resolution", side)
        if side % step:
            below = side - side % step
            near = " or ".join(str(n) for n in (below, below + step) if n)
            what = f"patches of {subject.spec.patch}" + (
                f" latents of {subject.factor} pixels" if subject.factor > 1 else ""
            )
            raise ConfigError(f"a side of {side} pixels does not divide into {what}", cure=f"take {near}")
    height, width = pixels
    return height // subject.factor, width // subject.factor


def _size(name: str, value: int) -> int:
    if not 1 <= value <= MOST[name]:
        unit = " pixels" if name == "resolution" else ""
        raise ConfigError(f"{name} {value} is outside 1..{MOST[name]:,}{unit}", cure="give a size that can be trained")
    return value


def _known(what: str, name: str, known: Iterable[str]) -> str:
    if name not in known:
        raise ConfigError(f"unknown {what} {name!r}", cure=did_you_mean(name, known))
    return name
