"""The run's configuration: one frozen group per YAML section, unknown keys refused, every cross-check with its cure.

Imports without torch, so that configuration errors answer in well under a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from longskip.engine.clusters import PASSED_ON, KubernetesGroup, Port, SlurmGroup, VariableName
from longskip.engine.fields import Above, Count, Decay, Few, Group, Positive, Rate, Real, Share, Side, _number, _whole
from longskip.engine.idle import idle_settings
from longskip.engine.secrets import hidden, holds_secret, holds_user, is_secret
from longskip.errors import ConfigError
from longskip.models.presets import preset
from longskip.models.specs import TextEncoderSpec, UViTSpec


class ModelGroup(Group):
    """The backbone: a preset, and fields of ``UViTSpec`` that differ from it. ``resolution`` is pixels (H, W)."""

    preset: str = "uvit-shapes"
    resolution: tuple[Side, Side] | None = None
    width: Side | None = None
    depth: Few | None = None
    n_heads: Few | None = None
    patch: Few | None = None
    mlp_ratio: Few | None = None
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


class MixedGroup(Group):
    """One data set of a mix, and its share of the samples (any positive number; shares are relative)."""

    path: str
    weight: Above = 1.0


class DataGroup(Group):
    """``path``: a folder of shards with its index, or a folder of pictures with captions; or a ``mix`` of such folders.

    ``quarantine``: a list of samples that are passed over without being read (a run's ``bad_samples.jsonl``, or what
    ``longskip data lint --quarantine`` writes); they keep their places, with loss weight 0, and may change on a resume.
    ``on_damage``: bytes that differ from the index stop the run, or count as bad samples (``skip``).
    ``buckets``: pictures are sorted by aspect ratio into these (H, W) pixels (``auto``: a usual set of the resolution's
    area), and every global batch is of one bucket. ``shuffle``: ``full`` reads anywhere in local shards, ``window``
    permutes shards and shuffles within ``window_shards`` of them, which streams. ``remote`` names what fetches shards
    from a URL into ``cache``. ``captions``: shares of the fields of ``KEY.json`` (``txt``: of ``KEY.txt``) that captions
    are drawn from, e.g. ``{caption: 0.5, long_caption: 0.5}``; empty: the data's own captions and weights.
    """

    path: str = ""
    mix: tuple[MixedGroup, ...] = ()
    validation: str | None = None
    workers: Annotated[int, BeforeValidator(_whole), Field(ge=0, le=1 << 12)] = 0
    flip: bool = False
    crop: Literal["centre", "random"] = "centre"
    captions: dict[str, Above] = Field(default_factory=dict)
    buckets: Literal["off", "auto"] | tuple[tuple[Side, Side], ...] = "off"
    shuffle: Literal["full", "window"] = "full"
    window_shards: Positive = 8
    remote: Literal["none", "fsspec", "webdataset"] = "none"
    cache: str | None = None
    cache_gib: Above = 64.0
    on_damage: Literal["stop", "skip"] = "stop"
    max_bad_share: Share = 0.05
    quarantine: str | None = None


# n_tokens and width of a text encoder where the configuration names none.
_TEXT_SHAPES = {"words": (16, 64), "clip": (77, 1024), "t5": (120, 4096), "none": (16, 64)}


class TextGroup(Group):
    """The text encoder: ``words`` is small and trained with the backbone (words, with bytes for words it does not know);
    ``t5`` and ``clip`` are frozen ones in a local folder ``path`` (transformers' format), which features made by
    ``longskip data encode`` stand for as well. ``width`` is that of its output, (n_tokens, width) per caption. ``depth``:
    layers of ``words`` in which neighbouring words see one another; 0 is a table of vectors alone.
    """

    kind: Literal["words", "t5", "clip", "none"] = "words"
    path: str | None = None
    width: Side = 64
    n_tokens: Side = 16
    depth: Annotated[int, BeforeValidator(_whole), Field(ge=0, le=1 << 12)] = 0
    vocabulary: Annotated[int, BeforeValidator(_whole), Field(ge=1, le=1 << 24)] = 4096
    too_long: Literal["error", "truncate"] = "error"

    @model_validator(mode="before")
    @classmethod
    def _shape_of_kind(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        n_tokens, width = _TEXT_SHAPES.get(str(value.get("kind", "words")), (16, 64))
        return {"n_tokens": n_tokens, "width": width} | value

    @property
    def frozen(self) -> bool:
        """Whether the text comes as features of an encoder that is not trained."""
        return self.kind in ("t5", "clip")


class VaeGroup(Group):
    """The frozen autoencoder (diffusers' AutoencoderKL in a local folder): latents = (z − shift)·scale, pixels ÷ factor.

    ``none``: the model draws pixels. Shards of latents need no ``path`` to train, only to draw pictures.
    """

    kind: Literal["none", "vae"] = "none"
    path: str | None = None
    channels: Few = 4
    factor: Few = 8
    scale: Above = 0.18215
    shift: Real = 0.0


class EncodersGroup(Group):
    vae: VaeGroup = VaeGroup()
    text: TextGroup = TextGroup()


class DiffusionGroup(Group):
    """What is learnt. ``flow``: rectified flow x_t = (1−t)·x0 + t·ε with logit-normal(``time_mean``, ``time_std``) times
    (SD3, 2403.03206), shifted t → s·t/(1 + (s−1)·t) by ``shift`` s for higher resolutions; prediction ``x`` is weighed by
    1/max(t, ``time_floor``)². ``ddpm``: the discrete schedule of Stable Diffusion, betas scaled-linear from ``beta_start``
    to ``beta_end`` over ``train_steps``. ``min_snr``: γ of min-SNR weighting (2303.09556).
    """

    objective: Literal["flow", "ddpm"] = "flow"
    prediction: Literal["v", "x", "epsilon"] = "v"
    time_mean: Real = 0.0
    time_std: Above = 1.0
    time_floor: Annotated[float, BeforeValidator(_number), Field(gt=0, lt=1)] = 0.05
    shift: Above = 1.0
    min_snr: Above | None = None
    beta_start: Above = 0.00085
    beta_end: Annotated[float, BeforeValidator(_number), Field(gt=0, lt=1)] = 0.012
    train_steps: Annotated[int, BeforeValidator(_whole), Field(ge=2, le=1 << 20)] = 1000
    caption_dropout: Share = 0.1

    @model_validator(mode="after")
    def _consistent(self) -> DiffusionGroup:
        if self.beta_start > self.beta_end:
            raise ValueError(f"diffusion.beta_start {self.beta_start} is above beta_end {self.beta_end}; swap them")
        return self


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
    """Global ``batch_size`` = ``micro_batch`` × ``accumulation`` × ranks; two are given, the third is derived.

    ``accumulation`` is of the first start: where that fixes the micro-batch, another number of ranks on a resume keeps
    ``batch_size`` and micro-batch and derives its own. ``init_from``: a run or a ``.safetensors`` file whose weights
    (EMA by default) a new run starts from; what a run's name meant at the first start is kept in ``run.json``.

    ``not_finite``: a step whose loss or gradient is NaN or infinite on any rank moves nothing and is passed over with its
    data (``skip``), ``not_finite_limit`` of them in a row stop the run; ``stop``: the first one does. ``spikes``: a loss
    above median + ``spike_factor`` × MAD of the last 128 losses (from 32 on; MAD, their median distance from the median,
    counts as 1% of the median at least) is noted in incidents.jsonl (``note``), or undone as well (``rollback``): the run
    goes back to its last checkpoint and trains on without that step's batch. ``digest_every``: every so many steps, and
    before each checkpoint, ranks compare what must be the same on all of them; 0: never.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
    steps: Positive = 1000
    batch_size: Positive = 32
    micro_batch: Positive | None = None
    accumulation: Positive | None = None
    seed: Annotated[int, BeforeValidator(_whole), Field(ge=0, lt=1 << 63)] = 0
    dtype: Literal["fp32", "bf16"] = "fp32"
    init_from: str | None = None
    init_weights: Literal["ema", "raw"] = "ema"
    not_finite: Literal["skip", "stop"] = "skip"
    not_finite_limit: Positive = 3
    spikes: Literal["off", "note", "rollback"] = "note"
    spike_factor: Above = 50.0
    digest_every: Count = 100


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
    """``layout``: ``flat`` keeps two tensors per block (ZeRO's unit), ``named`` one per parameter; the same losses.

    ``checkpointing`` k: of every k-th block only the input is kept and the block computed again in the backward pass;
    0 (or false, none): of no block, 1 (or true, all): of every block. ``compile``: ``torch.compile`` of each block.
    ``ema_device``: where the average of the weights lives, beside the weights or in host memory.
    """

    layout: Literal["flat", "named"] = "flat"
    checkpointing: Annotated[int, Field(ge=0)] = 0
    compile: bool = False
    ema_device: Literal["device", "cpu"] = "device"

    @field_validator("checkpointing", mode="before")
    @classmethod
    def _every_kth(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return int(value)
        return {"none": 0, "all": 1}.get(value, value) if isinstance(value, str) else value


class CheckpointGroup(Group):
    """Every ``every`` steps and at the end; 0: only when a signal stops the run (a benchmark of a large model).

    ``background``: a rank's state is copied in host memory and written while training goes on; where memory does not hold
    the copy (16 bytes a parameter, over all ranks) training waits until all is written. The ``keep_last`` newest are kept,
    and beside them every step that is a multiple of ``keep_every``, for good; 0: no others.
    """

    every: Count = 500
    background: bool = True
    keep_last: Positive = 3
    keep_every: Count = 0


class LoggingGroup(Group):
    every: Positive = 10
    samples_every: Count = 500
    prompts: tuple[str, ...] = ()
    sample_steps: Side = 25
    guidance: Rate = 3.0
    tensorboard: bool = True


class EvalGroup(Group):
    """Validation loss on ``samples`` pictures with fixed noise and times in ``time_bins`` bins, every ``every`` steps.

    ``judge``: how ``longskip evaluate`` scores drawn pictures: ``shapes`` reads them with the programmatic judge,
    ``nearest`` asks whether the nearest training picture is the captioned one. ``stats`` (a file of ``longskip data
    stats``) and ``network``, the feature network that made it, give FID and KID; ``clip``, a CLIP's folder, gives the
    CLIP score; ``count`` pictures are drawn for them. ``likelihood_count`` samples have their likelihood found.
    """

    every: Count = 500
    samples: Positive = 256
    time_bins: Few = 10
    judge: Literal["shapes", "nearest", "none"] = "none"
    judge_count: Annotated[int, BeforeValidator(_whole), Field(ge=2)] = 200
    judge_objects: Literal[1, 2] = 1
    stats: str | None = None
    network: str | None = None
    clip: str | None = None
    count: Annotated[int, BeforeValidator(_whole), Field(ge=2)] = 10_000
    likelihood_count: Positive = 64
    sampler: Literal["auto", "euler", "heun", "ddim", "dpm++"] = "auto"
    sample_steps: Side = 25
    guidance: Rate = 3.0


class DeepspeedGroup(Group):
    """``zero_stage``: ``auto`` is the smallest that fits, kept on resume. ``config``: a DeepSpeed JSON of your own, merged
    under what longskip sets; contradictions are refused.
    """

    zero_stage: Literal[0, 1, 2, 3, "auto"] = 3
    offload_optimizer: Literal["none", "cpu"] = "none"
    offload_param: Literal["none", "cpu"] = "none"
    config: str | None = None


class LaunchGroup(Group):
    """How ranks are started and watched. ``environment``: variables of every rank on every node (secrets are refused: they
    would stand in files and on command lines). ``port``: of the supervisors' store on the first node; the launchers take
    the one above it. ``ssh_port``: of the nodes, for pdsh.

    ``timeout_minutes``: how long ranks and nodes wait for each other. ``step_timeout``: seconds after which a rank that
    stays in one step hangs (``auto``: 10 × its slowest step so far, at least 30). ``node_timeout``: seconds (5 or more) after
    which a node that is not heard of is lost. ``restarts``: attempts in a row without a newly committed step.
    ``network``: what joins the nodes, by its name in ``longskip plan --network``; the preflight measures against it.
    """

    environment: dict[VariableName, str] = Field(default_factory=dict)
    port: Port = 29400
    ssh_port: Annotated[int, BeforeValidator(_whole), Field(ge=1, le=65535)] | None = None
    slurm: SlurmGroup = SlurmGroup()
    kubernetes: KubernetesGroup = KubernetesGroup()
    timeout_minutes: Positive = 30
    step_timeout: Literal["auto"] | Above = "auto"
    node_timeout: Annotated[float, BeforeValidator(_number), Field(ge=5, allow_inf_nan=False)] = 30.0
    restarts: Count = 3
    network: str | None = None

    @field_validator("network")
    @classmethod
    def _known_network(cls, value: str | None) -> str | None:
        if value is not None:
            from longskip.profiling.hardware import find_network  # reads the user's own file of them

            find_network(value)
        return value

    @field_validator("environment")
    @classmethod
    def _no_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if is_secret(name) or holds_user(text):
                raise ValueError(
                    f"{name} may hold a secret, which is written nowhere; set it in the nodes' own environment"
                )
            if not name.startswith(PASSED_ON) or "PLUGIN" in name or "PRELOAD" in name:
                raise ValueError(f"{name} is no setting of a library; set it in the nodes' own environment")
            if any(ord(sign) < 32 or ord(sign) == 127 for sign in text):
                raise ValueError(f"{name} holds a control character; write it without")
        return value


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
        for key, value in leaves(self.model_dump()):
            if any(holds_secret(text) for text in (key, *_texts(value))):
                raise ValueError(
                    f"{hidden(key)} holds a URL with a password or a signature in it, which the run would write down; leave it "
                    "out there, and put it where fsspec looks: ~/.netrc, the environment (AWS_*, AZURE_STORAGE_SAS_TOKEN), or "
                    "~/.config/fsspec"
                )
        if any(side % self.factor for side in self.resolution):
            raise ValueError(
                f"model.resolution {self.resolution} is not divisible by encoders.vae.factor {self.factor}; "
                f"take sides that are multiples of {self.factor * preset(self.model.preset).patch}"
            )
        if self.deepspeed.offload_param == "cpu" and self.deepspeed.zero_stage not in (3, "auto"):
            raise ValueError(
                f"deepspeed.offload_param cpu needs zero_stage 3, which shares parameters out; it is "
                f"{self.deepspeed.zero_stage}"
            )
        if self.deepspeed.offload_optimizer == "cpu" and self.deepspeed.zero_stage == 0:
            raise ValueError("deepspeed.offload_optimizer cpu needs zero_stage 1, 2 or 3; it is 0")
        urls = [path for path in (self.data.path, *(each.path for each in self.data.mix)) if "://" in path]
        if urls and self.data.shuffle != "window":
            raise ValueError(
                f"data at {urls[0]} is streamed, which data.shuffle: full would make a fetch per sample; "
                "set data.shuffle: window and data.remote: fsspec"
            )
        if self.data.path and self.data.mix:
            raise ValueError("data.path and data.mix are both set; give one of them")
        if self.data.buckets != "off":
            _ = self.buckets  # raises ConfigError for buckets that the model cannot take
        if self.diffusion.objective == "flow" and self.diffusion.prediction == "epsilon":
            raise ValueError("diffusion.prediction epsilon goes with objective ddpm; flow predicts v or x")
        spec = self.backbone()  # raises SpecError with its cure before anything is built
        if spec.n_classes:
            raise ValueError(
                f"model.preset {self.model.preset} is made for classes, this version trains with captions; "
                "longskip presets lists the others"
            )
        if self.encoders.text.kind == "none" and self.diffusion.caption_dropout > 0 and spec.n_txt == 0:
            raise ValueError(
                "diffusion.caption_dropout needs a text encoder; set it to 0 or encoders.text.kind to words"
            )
        if idle := list(idle_settings(self)):
            raise ValueError("; ".join(idle))
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
        """Pixels (H, W); the preset's latent size times the autoencoder's factor where none is given."""
        height, width = preset(self.model.preset).latent_size
        return self.model.resolution or (height * self.factor, width * self.factor)

    @property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """The aspect buckets (H, W) in pixels that ``data.buckets`` means; none where there are none."""
        from longskip.engine.data.buckets import resolve_buckets  # numpy, which a run without buckets need not wait for

        return resolve_buckets(self.data.buckets, self.resolution, self.factor * self.backbone().patch)

    @property
    def factor(self) -> int:
        """Pixels per latent, each way; 1 in pixel space."""
        return self.encoders.vae.factor if self.encoders.vae.kind == "vae" else 1

    @property
    def channels(self) -> int:
        """Channels of what the model denoises: the autoencoder's, or three."""
        return self.encoders.vae.channels if self.encoders.vae.kind == "vae" else 3

    def backbone(self) -> UViTSpec:
        """The backbone's spec with this configuration's resolution, encoders and overrides."""
        overrides = self.model.model_dump(exclude={"preset", "resolution"}, exclude_none=True)
        text = self.encoders.text
        overrides |= {"n_txt": 0, "text_width": 0}
        if text.kind != "none":
            overrides |= {"n_txt": text.n_tokens, "text_width": text.width}
        latent_size = tuple(side // self.factor for side in self.resolution)
        return preset(
            self.model.preset, **overrides, latent_size=latent_size, channels=self.channels, out_channels=None
        )

    def text_encoder(self, vocabulary_size: int) -> TextEncoderSpec | None:
        text = self.encoders.text
        if text.kind != "words":
            return None
        return TextEncoderSpec(vocabulary_size, width=text.width, n_tokens=text.n_tokens, depth=text.depth)

    def batch(self, world: int, kept_micro: int | None = None) -> BatchPlan:
        """Micro-batch and accumulation for ``world`` ranks.

        ``kept_micro`` is the micro-batch that the run began with; it stays when the number of ranks changes, and the
        accumulation follows, whatever ``train.accumulation`` asked of the first start. Raises ConfigError naming the
        world sizes that divide the batch when this one does not.
        """
        total, micro, accumulation = self.train.batch_size, self.train.micro_batch, self.train.accumulation
        if kept_micro is not None:
            micro, accumulation = kept_micro, None
        if micro is not None and accumulation is not None:
            fits = [total // (micro * accumulation)]
        elif micro is not None:
            fits = divisors(total // micro) if total % micro == 0 else []
        else:
            accumulation = accumulation or 1
            fits = divisors(total // accumulation) if total % accumulation == 0 else []
            micro = total // (world * accumulation)
        if world not in fits:
            given = f" with micro_batch {micro}" if self.train.micro_batch or kept_micro else ""
            cure = f"start one of {fits} ranks, or change train.batch_size, micro_batch or accumulation"
            if kept_micro:
                given += ", which this run began with and keeps"
                cure = f"start one of {fits} ranks, or begin a new run with a smaller train.micro_batch"
            raise ConfigError(f"train.batch_size {total} does not divide over {world} rank(s){given}", cure=cure)
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


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        yield from _texts(list(value.items()))


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a nested mapping."""
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{path}.")
        else:
            yield path, value
