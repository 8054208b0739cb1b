"""YAML in and out: ``extends:``, dotted overrides, duplicate and unknown keys refused with "did you mean" (no torch)."""

from __future__ import annotations

import difflib
import shlex
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from longskip.engine.config import Config
from longskip.engine.secrets import hidden, redacted
from longskip.errors import ConfigError
from longskip.profiling.yamlfiles import parse_yaml, read_yaml

MAX_DEPTH = 8

# What other trainers call a setting → what it is called here: such names resemble ours too little to be found by spelling.
_CALLED_ELSEWHERE = {
    "optim.lr": "learning_rate max_lr peak_lr base_lr",
    "optim.schedule": "lr_scheduler lr_scheduler_type scheduler lr_schedule",
    "optim.warmup_steps": "warmup lr_warmup_steps num_warmup_steps warmup_iters",
    "optim.final_lr_share": "min_lr min_lr_ratio final_lr",
    "optim.clip": "grad_clip max_grad_norm gradient_clip gradient_clipping gradient_clip_val clip_grad_norm",
    "optim.betas": "adam_betas beta1 beta2 adam_beta1 adam_beta2",
    "optim.eps": "epsilon adam_epsilon adam_eps",
    "optim.weight_decay": "wd adam_weight_decay",
    "optim.ema_decay": "ema ema_rate ema_beta use_ema",
    "train.steps": "max_steps max_train_steps num_steps total_steps n_steps iterations max_iters train_steps epochs "
    "num_epochs num_train_epochs max_epochs n_epochs",
    "train.batch_size": "batch global_batch_size train_batch_size global_batch total_batch_size",
    "train.micro_batch": "per_device_batch_size per_device_train_batch_size micro_batch_size batch_size_per_gpu "
    "train_micro_batch_size_per_gpu local_batch_size",
    "train.accumulation": "grad_accum gradient_accumulation_steps accumulate_grad_batches grad_accumulation_steps",
    "train.dtype": "precision mixed_precision bf16 fp16",
    "train.init_from": "pretrained init_weights_from pretrained_model_name_or_path finetune_from load_from",
    "train.name": "run_name experiment_name output_dir",
    "model.resolution": "resolution image_size img_size",
    "model.preset": "model_name arch architecture",
    "model.width": "hidden_size embed_dim dim d_model n_embd",
    "model.depth": "num_layers n_layers n_layer layers n_blocks",
    "model.n_heads": "num_heads num_attention_heads heads n_head",
    "model.patch": "patch_size",
    "data.path": "dataset data_dir dataset_name train_data_dir data_path train_data root",
    "data.workers": "num_workers dataloader_num_workers",
    "data.flip": "random_flip horizontal_flip hflip",
    "data.validation": "val_data eval_data validation_data val_path",
    "diffusion.prediction": "prediction_type parameterization",
    "diffusion.caption_dropout": "cfg_dropout class_dropout_prob uncond_prob proportion_empty_prompts",
    "diffusion.min_snr": "snr_gamma min_snr_gamma",
    "engine.checkpointing": "gradient_checkpointing activation_checkpointing grad_checkpointing",
    "engine.compile": "torch_compile",
    "checkpoint.every": "save_steps save_every checkpointing_steps save_interval checkpoint_every",
    "checkpoint.keep_last": "save_total_limit checkpoints_total_limit keep_checkpoints",
    "logging.every": "log_every logging_steps log_interval log_every_n_steps",
    "logging.samples_every": "sample_every sample_interval",
    "logging.prompts": "validation_prompt validation_prompts sample_prompts",
    "eval.every": "eval_steps eval_every eval_interval validation_steps val_every",
    "deepspeed.zero_stage": "zero stage zero_optimization",
    "encoders.vae.path": "vae_path pretrained_vae",
    "encoders.text.path": "text_encoder text_encoder_path",
}
_MEANT = {theirs: ours for ours, names in _CALLED_ELSEWHERE.items() for theirs in names.split()}


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid upon ``base``, group by group; lists and scalars replace."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def load_tree(path: Path, *, _chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The YAML at ``path`` with every ``extends:`` resolved (relative to the file that names it)."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; a run is told by a YAML file", cure=_yaml_for(path))
    path = path.resolve()
    if path in _chain:
        raise ConfigError(f"extends goes round in a circle: {' → '.join(p.name for p in (*_chain, path))}")
    if len(_chain) >= MAX_DEPTH:
        raise ConfigError(f"extends is nested deeper than {MAX_DEPTH} files at {path}")
    tree = read_yaml(path, "configuration", cure="longskip config new --help makes one")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends must name one file, got {parent!r}")
    return merge(load_tree(path.parent / parent, _chain=(*_chain, path)), tree)


def _yaml_for(folder: Path) -> str:
    """What to name instead of a folder: a run's own configuration, or a new one for data."""
    if (folder / "config.yaml").is_file():
        return f"it is a run: the YAML that it was started with; what that came to stands in {folder / 'config.yaml'}"
    return f"to train on the data in it: longskip config new --data {shlex.quote(str(folder))} --out run.yaml"


def parse_override(text: str) -> dict[str, Any]:
    """``a.b=value`` → ``{"a": {"b": value}}``, the value read as YAML."""
    key, separator, value = text.partition("=")
    if not separator or not key or not all(part.isidentifier() for part in key.split(".")):
        raise ConfigError(
            f"override {hidden(text)[:200]!r} is not of the form group.key=value", cure="for instance optim.lr=1e-4"
        )
    leaf: Any = parse_yaml(f"value: {value}" if value else "", f"override {hidden(text)[:200]}").get("value")
    for part in reversed(key.split(".")):
        leaf = {part: leaf}
    return typing.cast("dict[str, Any]", leaf)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The resolved configuration of a YAML file with dotted overrides on top; raises ConfigError."""
    tree = load_tree(path)
    for override in overrides:
        tree = merge(tree, parse_override(override))
    return validate(tree)


def validate(tree: dict[str, Any]) -> Config:
    """A nested mapping as Config; every complaint names the key's path, the value and what is allowed."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_complaint(item) for item in error.errors())) from None


def dump_yaml(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _complaint(item: Any) -> str:
    path = hidden(".".join(str(part) for part in item["loc"]))
    if item["type"] == "extra_forbidden":
        return f"unknown key {path!r}; {_suggestion([str(part) for part in item['loc']])}"
    message = str(item["msg"]).removeprefix("Value error, ")
    if not path:
        return message
    return f"{path}: {message} (got {_told(path.rpartition('.')[2], item['input'])})"


def _suggestion(path: list[str]) -> str:
    """What may be meant by a key that is not known: the setting of that meaning, of that name in another group, of nearly
    that spelling here; else what is known here."""
    *group, key = path
    known, name = _fields_at(group), key.lower().replace("-", "_")
    elsewhere = [f"{other}.{name}" for other in Config.model_fields if name in _fields_at([other])]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if name in _MEANT:
        meant = [_MEANT[name]]
    elif 1 <= len(elsewhere) <= 2:
        meant = elsewhere
    else:
        meant = [".".join([*group, *close])] if close else []
    return f"did you mean {' or '.join(map(repr, meant))}?" if meant else f"known here: {', '.join(known)}"


def _told(name: str, value: Any) -> str:
    """A value for people: not longer than a line or two, and without what must not be shown."""
    try:
        text = repr(redacted({name: value})[name])
    except ValueError:  # a whole number with more digits than Python writes
        return "a number without end"
    return text if len(text) <= 200 else f"{text[:200]}…"


def _fields_at(path: list[str]) -> list[str]:
    """The field names of the group at ``path``."""
    model: type[BaseModel] = Config
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
