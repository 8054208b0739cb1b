"""The run's configuration: one frozen group per YAML section, unknown keys refused, every cross-check with its cure.

Imports without torch, so that configuration errors answer in well under a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from longskip.errors import ConfigError
from longskip.models.presets import preset
from longskip.models.specs import TextEncoderSpec, UViTSpec


def _number(value: Any) -> Any:
    """YAML 1.1 reads ``1e-4`` as text; a number is meant."""
    if isinstance(value, bool):
        raise ValueError("a number is meant, not true or false")
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _whole(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a whole number is meant, not true or false")
    return value


Count = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Positive = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_number), Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Rate = Annotated[float, BeforeValidator(_number), Field(ge=0.0, allow_inf_nan=False)]
Decay = Annotated[float, BeforeValidator(_number), Field(ge=0.0, lt=1.0, allow_inf_nan=False)]
Above = Annotated[float, BeforeValidator(_number), Field(gt=0.0, allow_inf_nan=False)]


class Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


class ModelGroup(Group):
    """The backbone: a preset, and fields of ``UViTSpec`` that differ from it. ``resolution`` is pixels (H, W)."""

    preset: str = "uvit-shapes"
    resolution: tuple[Positive, Positive] | None = None
    width: Positive | None = None
    depth: Positive | None = None
    n_heads: Positive | None = None
    patch: Positive | None = None
    mlp_ratio: Positive | None = None
    conv: bool | None = None
    skips: bool | None = None
    time_mlp: bool | None = None
    qk_norm: bool | None = None
    adaln: bool | None = None
    pos_init: Literal["normal", "sincos"] | None = None

    @field_validator("resolution", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value


class DataGroup(Group):
    """``path``: a folder of shards with its index, or a folder of pictures with captions.

    ``on_damage``: bytes that differ from the index stop the run, or count as bad samples (``skip``).
    """

    path: str = ""
    validation: str | None = None
    workers: Count = 0
    flip: bool = False
    crop: Literal["centre", "random"] = "centre"
    shuffle: Literal["full"] = "full"
    on_damage: Literal["stop", "skip"] = "stop"
    max_bad_share: Share = 0.05


class TextGroup(Group):
    """The text encoder that is trained with the backbone: words, with bytes for words it does not know."""

    kind: Literal["words", "none"] = "words"
    width: Positive = 64
    n_tokens: Positive = 16
    vocabulary: Positive = 4096
    too_long: Literal["error", "truncate"] = "error"


class EncodersGroup(Group):
    text: TextGroup = TextGroup()


class DiffusionGroup(Group):
    """Rectified flow x_t = (1−t)·x0 + t·ε with logit-normal(``time_mean``, ``time_std``) times (SD3, 2403.03206)."""

    objective: Literal["flow"] = "flow"
    prediction: Literal["v", "x"] = "v"
    time_mean: Real = 0.0
    time_std: Above = 1.0
    time_floor: Annotated[float, BeforeValidator(_number), Field(gt=0, lt=1)] = 0.05
    caption_dropout: Share = 0.1


class OptimGroup(Group):
    lr: Rate = 1e-4
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    eps: Above = 1e-8
    weight_decay: Rate = 0.03
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: Count = 0
    final_lr_share: Share = 0.0
    clip: Rate = 1.0
    ema_decay: Decay = 0.999
    ema_warmup: bool = True


class TrainGroup(Group):
    """Global ``batch_size`` = ``micro_batch`` × ``accumulation`` × ranks; two are given, the third is derived."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
    steps: Positive = 1000
    batch_size: Positive = 32
    micro_batch: Positive | None = None
    accumulation: Positive | None = None
    seed: Count = 0
    dtype: Literal["fp32", "bf16"] = "fp32"


BACKENDS = ("auto", "reference", "torch", "triton")


class KernelsGroup(Group):
    """One backend for all ops, or a mapping op → backend (``auto | reference | torch | triton | require:NAME``)."""

    backend: str | dict[str, str] = "auto"

    @field_validator("backend")
    @classmethod
    def _known(cls, value: Any) -> Any:
        for name in [value] if isinstance(value, str) else value.values():
            if name.removeprefix("require:") not in BACKENDS:
                raise ValueError(f"backend {name!r} is not known; one of {', '.join(BACKENDS)}, or require:NAME")
        return value

    def by_op(self) -> dict[str, str]:
        return {"all": self.backend} if isinstance(self.backend, str) else dict(self.backend)


class EngineGroup(Group):
    """``layout``: ``flat`` keeps two tensors per block (ZeRO's unit), ``named`` one per parameter; the same losses."""

    layout: Literal["flat", "named"] = "flat"
    checkpointing: bool = False


class CheckpointGroup(Group):
    every: Positive = 500
    keep_last: Positive = 3


class LoggingGroup(Group):
    every: Positive = 10
    samples_every: Count = 500
    prompts: tuple[str, ...] = ()
    sample_steps: Positive = 25
    guidance: Rate = 3.0
    tensorboard: bool = True


class EvalGroup(Group):
    """Validation loss on ``samples`` pictures with fixed noise and times in ``time_bins`` bins, every ``every`` steps.

    ``judge``: how ``longskip evaluate`` scores drawn pictures: ``shapes`` reads them with the programmatic judge,
    ``nearest`` asks whether the nearest training picture is the captioned one.
    """

    every: Count = 500
    samples: Positive = 256
    time_bins: Positive = 10
    judge: Literal["shapes", "nearest", "none"] = "none"
    judge_count: Annotated[int, BeforeValidator(_whole), Field(ge=2)] = 200
    judge_objects: Literal[1, 2] = 1
    sampler: Literal["euler", "heun"] = "euler"
    sample_steps: Positive = 25
    guidance: Rate = 3.0


class DeepspeedGroup(Group):
    """``config``: a DeepSpeed JSON of your own, merged under what longskip sets; contradictions are refused."""

    zero_stage: Literal[0, 1, 2, 3] = 3
    config: str | None = None


class LaunchGroup(Group):
    timeout_minutes: Positive = 30


class BudgetGroup(Group):
    price_per_device_hour: Rate | None = None
    currency: str = "USD"


class Config(Group):
    model: ModelGroup = ModelGroup()
    data: DataGroup = DataGroup()
    encoders: EncodersGroup = EncodersGroup()
    diffusion: DiffusionGroup = DiffusionGroup()
    optim: OptimGroup = OptimGroup()
    train: TrainGroup = TrainGroup()
    kernels: KernelsGroup = KernelsGroup()
    engine: EngineGroup = EngineGroup()
    checkpoint: CheckpointGroup = CheckpointGroup()
    logging: LoggingGroup = LoggingGroup()
    eval: EvalGroup = EvalGroup()
    deepspeed: DeepspeedGroup = DeepspeedGroup()
    launch: LaunchGroup = LaunchGroup()
    budget: BudgetGroup = BudgetGroup()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        spec = self.backbone()  # raises SpecError with its cure before anything is built
        if self.encoders.text.kind == "none" and self.diffusion.caption_dropout > 0 and spec.n_txt == 0:
            raise ValueError(
                "diffusion.caption_dropout needs a text encoder; set it to 0 or encoders.text.kind to words"
            )
        if self.train.micro_batch and self.train.accumulation:
            share = self.train.micro_batch * self.train.accumulation
            if self.train.batch_size % share:
                raise ValueError(
                    f"train.batch_size {self.train.batch_size} is not micro_batch {self.train.micro_batch} × "
                    f"accumulation {self.train.accumulation} × a whole number of ranks; give two of the three"
                )
        elif self.train.micro_batch and self.train.batch_size % self.train.micro_batch:
            raise ValueError(
                f"train.batch_size {self.train.batch_size} is not divisible by train.micro_batch "
                f"{self.train.micro_batch}; choose one of {divisors(self.train.batch_size)}"
            )
        return self

    @property
    def resolution(self) -> tuple[int, int]:
        """Pixels (H, W); the preset's latent size where none is given (pixel-space presets)."""
        return self.model.resolution or preset(self.model.preset).latent_size

    def backbone(self) -> UViTSpec:
        """The backbone's spec with this configuration's resolution, text encoder and overrides."""
        overrides = self.model.model_dump(exclude={"preset", "resolution"}, exclude_none=True)
        text = self.encoders.text
        if text.kind == "words":
            overrides |= {"n_txt": text.n_tokens, "text_width": text.width}
        else:
            overrides |= {"n_txt": 0, "text_width": 0}
        # Pixels are the latents until a VAE encodes them, so pixel-space training is three channels at factor 1.
        overrides |= {"latent_size": self.resolution, "channels": 3, "out_channels": None}
        return preset(self.model.preset, **overrides)

    def text_encoder(self, vocabulary_size: int) -> TextEncoderSpec | None:
        text = self.encoders.text
        if text.kind == "none":
            return None
        return TextEncoderSpec(vocab_size=vocabulary_size, width=text.width, n_tokens=text.n_tokens)

    def batch(self, world: int, kept_micro: int | None = None) -> BatchPlan:
        """Micro-batch and accumulation for ``world`` ranks.

        ``kept_micro`` is the micro-batch that the run began with; it stays when the number of ranks changes, and the
        accumulation follows. Raises ConfigError naming the world sizes that divide the batch when this one does not.
        """
        total, micro, accumulation = self.train.batch_size, self.train.micro_batch, self.train.accumulation
        if micro is not None and accumulation is not None:
            fits = [total // (micro * accumulation)]
        elif micro is not None or kept_micro is not None:
            micro = micro or kept_micro or 1
            fits = divisors(total // micro) if total % micro == 0 else []
        else:
            accumulation = accumulation or 1
            fits = divisors(total // accumulation) if total % accumulation == 0 else []
            micro = total // (world * accumulation)
        if world not in fits:
            given = f" with micro_batch {micro}" if self.train.micro_batch or kept_micro else ""
            raise ConfigError(
                f"train.batch_size {total} does not divide over {world} rank(s){given}",
                cure=f"start one of {fits} ranks, or change train.batch_size, micro_batch or accumulation",
            )
        return BatchPlan(total=total, micro=micro, accumulation=total // (world * micro), world=world)


class BatchPlan(BaseModel):
    """``total = micro × accumulation × world`` samples per optimizer step."""

    model_config = ConfigDict(frozen=True)

    total: int
    micro: int
    accumulation: int
    world: int

    def __str__(self) -> str:
        return f"batch {self.total} = {self.micro} micro × {self.accumulation} accumulation × {self.world} rank(s)"


def divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a nested mapping."""
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{path}.")
        else:
            yield path, value


# What may differ when a run is started again; all else belongs to what the run is.
MAY_CHANGE_ON_RESUME = ("train.steps", "logging.", "eval.", "checkpoint.", "launch.", "budget.")


def differing_keys(saved: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """Keys that differ and may not differ on resume → (saved value, value now)."""
    old, new = dict(leaves(saved.model_dump(mode="json"))), dict(leaves(now.model_dump(mode="json")))
    return {
        key: (old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(MAY_CHANGE_ON_RESUME)
    }
