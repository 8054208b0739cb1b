"""``longskip train --dry-run``: everything that would run, and nothing that runs."""

from __future__ import annotations

import json
from contextlib import suppress
from itertools import groupby
from pathlib import Path

from longskip.engine import fitting, partition
from longskip.engine.config import BatchPlan, Config
from longskip.engine.configio import dump_yaml
from longskip.errors import ConfigError

WORLDS = (1, 2, 4, 8, 16, 32, 64)


def show(config: Config, run: Path, ranks: int | None = None) -> None:
    """Print the resolved configuration, the batch and a rank's memory for every world size that divides it, and costs.

    With ``ranks`` the memory of that world alone, and every rank's shards: names, shapes, elements, bytes.
    """
    from longskip.engine.build import deepspeed_config

    spec = config.backbone()
    cost = spec.flops(batch=1)
    text = config.text_encoder(config.encoders.text.vocabulary)
    trained = spec.param_counts().total + (text.param_counts().total if text else 0)
    print(dump_yaml(config))
    print(f"run folder        {run}{' (there already: it would resume)' if (run / 'config.yaml').is_file() else ''}")
    print(
        f"backbone          {config.model.preset}: {spec.param_counts().total:,} parameters, {spec.n_blocks} blocks, "
        f"{spec.n_skips} long skips"
    )
    if text:
        print(
            f"text encoder      {trained - spec.param_counts().total:,} parameters, with a vocabulary of its full size"
        )
    print(
        f"tokens per image  {cost.tokens} = {cost.image_tokens} image + {cost.tokens - cost.image_tokens} time and text"
    )
    print(f"model FLOPs       {cost.model_flops:,} per image (forward and backward)")
    total = cost.model_flops * config.train.batch_size * config.train.steps
    print(f"                  {total:.4g} for {config.train.steps:,} steps of {config.train.batch_size}")
    batches = [config.batch(ranks)] if ranks else []
    for world in () if ranks else WORLDS:
        with suppress(ConfigError):
            batches.append(config.batch(world))
    for batch in batches:
        print(f"{batch.world:>3} rank(s)        {batch}")
        _print_memory(config, batch, trained)
    for batch in batches[:1]:
        print(json.dumps(deepspeed_config(config, batch, n_parameters=trained, cuda=False), indent=1))
    if ranks:
        _print_shards(config, ranks)


def _print_memory(config: Config, batch: BatchPlan, n_parameters: int) -> None:
    stage = config.deepspeed.zero_stage
    for each in fitting.STAGES if stage == "auto" else (stage,):
        needed = fitting.memory(config, each, world=batch.world, micro=batch.micro, n_parameters=n_parameters)
        parts = ", ".join(
            f"{name} {getattr(needed, name) / fitting.GIB:.2f}"
            for name in ("weights", "gradients", "states", "gathered", "activations", "buffers")
        )
        host = f"; host memory {needed.host / fitting.GIB:.2f} GiB" if needed.host else ""
        print(f"                  ZeRO-{each}: about {needed.device / fitting.GIB:.2f} GiB a rank ({parts}){host}")


def _print_shards(config: Config, ranks: int) -> None:
    if config.deepspeed.zero_stage != 3:
        print("shards are listed for deepspeed.zero_stage 3; below it every rank has all weights")
        return
    weight = 2 if config.train.dtype == "bf16" else 4
    states = (4 if weight == 2 else 0) + 8 + 4
    print(f"\nshards of {ranks} ranks; bytes: {weight} of weight + {states} of fp32 states per element")
    everything = partition.shards(config, config.encoders.text.vocabulary, ranks)
    for rank, shards in groupby(everything, key=lambda shard: shard.rank):
        mine = list(shards)
        elements = sum(shard.numel for shard in mine)
        print(f"rank {rank}: {elements:,} elements, {elements * (weight + states):,} bytes in {len(mine)} slices")
        for shard in mine:
            shape = "×".join(map(str, shard.shape))
            span = f"[{shard.offset:,} : {shard.offset + shard.numel:,}]"
            print(f"  {shard.name}  {shape}  {span}  {shard.numel * (weight + states):,} bytes")
