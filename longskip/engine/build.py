"""From a configuration to things: model, DeepSpeed configuration and engine, weights for drawing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from longskip.engine import fused_step
from longskip.engine.checkpoint import Archive, specs_of
from longskip.engine.config import BatchPlan, Config
from longskip.engine.data.tokens import Vocabulary
from longskip.engine.distributed import World, import_deepspeed
from longskip.engine.fitting import reduce_bucket
from longskip.engine.jsonfiles import read_object
from longskip.engine.optim import AdamW, parameter_groups
from longskip.engine.shards import Kind, Shards
from longskip.engine.vocabulary import words_of
from longskip.errors import ConfigError
from longskip.kernels import backends
from longskip.models.init import initial_value
from longskip.models.packed import Layout
from longskip.models.system import TextToImage
from longskip.models.text import WordEncoder
from longskip.models.uvit import UViT


def build_model(config: Config, vocabulary_size: int, *, layout: Layout | None = None) -> TextToImage:
    """The model of a configuration on the meta device; no value is set yet."""
    layout = layout or config.engine.layout
    text = config.text_encoder(vocabulary_size)
    backbone = UViT(config.backbone(), layout=layout, device="meta")
    backbone.checkpointing = config.engine.checkpointing
    return TextToImage(backbone, WordEncoder(text, layout=layout, device="meta") if text else None)


def load_model(run: Path, config: Config, checkpoint: Path, kind: Kind) -> tuple[TextToImage, Vocabulary | None]:
    """A model on the CPU with the raw (``weight``) or averaged (``ema``) weights of a checkpoint; no DeepSpeed."""
    vocabulary = words_of(run, config)
    model = build_model(config, len(vocabulary or ()), layout="named").to_empty(device="cpu")
    with Archive(checkpoint) as archive:
        archive.check_model({name: tuple(shape) for name, _, _, shape in model.canonical()})
        archive.check_specs(specs_of(config.backbone(), config.text_encoder(len(vocabulary or ()))))
        model.load_state_dict(archive.full(kind))
    return model.eval(), vocabulary


def deepspeed_config(config: Config, batch: BatchPlan, *, n_parameters: int, cuda: bool) -> dict[str, Any]:
    """The resolved DeepSpeed JSON: what longskip sets over the user's own file; contradictions are refused."""
    bucket = reduce_bucket(config, n_parameters)
    zero: dict[str, Any] = {
        "stage": config.deepspeed.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": cuda,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    offload = config.deepspeed
    if offload.offload_optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    if offload.offload_param == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    if config.deepspeed.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": bucket // 4 + 1,
            "stage3_max_live_parameters": int(1e9),
            # It would replace torch's F.linear for the whole process; Packed.guard does what it is for.
            "memory_efficient_linear": False,
        }
    ours: dict[str, Any] = {
        "train_batch_size": batch.total,
        "train_micro_batch_size_per_gpu": batch.micro,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": config.optim.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # our own optimizer steps on the host as well
        "bf16": {"enabled": config.train.dtype == "bf16"},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if config.deepspeed.config is None:
        return ours
    return _merge_user(_read_user(Path(config.deepspeed.config)), ours, config.deepspeed.config)


# What a user's file may tune. Everything else that it names is either set from the YAML or changes what the shards,
# checkpoints and counters rely on, and is refused.
_TUNABLE_ZERO = {
    "overlap_comm", "reduce_bucket_size", "allgather_bucket_size", "contiguous_gradients", "reduce_scatter",
    "round_robin_gradients", "sub_group_size", "stage3_prefetch_bucket_size", "stage3_max_live_parameters",
    "stage3_max_reuse_distance", "stage3_param_persistence_threshold", "stage3_model_persistence_threshold",
}  # fmt: skip
_TUNABLE = {
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "comms_logger", "flops_profiler",
    "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "dump_state",
}  # fmt: skip


def _read_user(path: Path) -> dict[str, Any]:
    try:
        return read_object(path, ConfigError, limit=1 << 20)
    except ConfigError as error:
        raise ConfigError(f"deepspeed.config: {error.message}") from None


def _merge_user(user: dict[str, Any], ours: dict[str, Any], name: str, path: str = "") -> dict[str, Any]:
    merged = dict(ours)
    tunable = _TUNABLE_ZERO if path == "zero_optimization." else _TUNABLE if not path else set()
    for key, value in user.items():
        where = f"{path}{key}"
        if key in tunable:
            merged[key] = value
        elif isinstance(value, dict) and isinstance(ours.get(key), dict):
            merged[key] = _merge_user(value, ours[key], name, f"{where}.")
        elif key not in ours:
            raise ConfigError(
                f"deepspeed.config: {name} sets {where}, which longskip does not take from there",
                cure=f"set it in the YAML, or leave it out; what may be tuned: {', '.join(sorted(_TUNABLE | _TUNABLE_ZERO))}",
            )
        elif value not in (ours[key], "auto"):
            raise ConfigError(
                f"deepspeed.config: {name} says {where} = {value!r}, the run's configuration {ours[key]!r}",
                cure="make them agree, or leave it out of the JSON",
            )
    return merged


def build_engine(
    config: Config, model: TextToImage, world: World, ds_config: dict[str, Any]
) -> tuple[Any, AdamW, Shards]:
    """DeepSpeed's engine over ``model`` (on meta) with initial values by (seed, canonical name), our optimizer, shards.

    At stage 3 a unit is given its values, partitioned, and its full copy dropped before the next one is made, so that no
    rank ever holds the whole model.
    """
    deepspeed = import_deepspeed()
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    stage = int(config.deepspeed.zero_stage)
    for unit in model.units():
        unit.materialize(config.train.seed, world.device, dtype)
        if stage == 3:
            deepspeed.zero.Init(module=unit, config_dict_or_path=ds_config, dtype=dtype)
    ema_device = torch.device("cpu") if config.engine.ema_device == "cpu" else None
    optimizer = AdamW(parameter_groups(model, config.optim.weight_decay), config.optim, ema_device)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    if fused_step.wanted(world.device):
        fused_step.take_over(engine, optimizer, stage)
    if config.engine.compile:
        backends.settle(world.device)
        model.backbone.compile_blocks()
    shards = Shards(engine, optimizer, stage)
    if dtype != torch.float32:
        set_initial(shards, config.train.seed)  # DeepSpeed made the fp32 masters from rounded values
    return engine, optimizer, shards


def set_initial(shards: Shards, seed: int) -> None:
    """Write the exact fp32 initial values into the rank's masters and publish them, rounded, to the model."""
    kinds = {name: spec.init for unit in shards.model.units() for name, spec in unit.specs().items()}
    for item in shards.slices:
        value = initial_value(seed, item.name, item.shape, kinds[item.name]).view(-1)
        shards.tensor(item, "weight").copy_(value[item.offset : item.offset + item.numel])
    shards.publish()
