"""``longskip train --dry-run``: everything that would run, and nothing that runs."""

from __future__ import annotations

import json
from pathlib import Path

from longskip.engine.config import Config
from longskip.engine.configio import dump_yaml
from longskip.errors import ConfigError


def show(config: Config, run: Path) -> None:
    """Print the resolved configuration, the batch for every world size that divides it, the model's size and cost."""
    from longskip.engine.build import deepspeed_config

    spec = config.backbone()
    cost = spec.flops(batch=1)
    n = spec.param_counts().total
    print(dump_yaml(config))
    print(f"run folder        {run}{' (there already: it would resume)' if (run / 'config.yaml').is_file() else ''}")
    print(
        f"backbone          {config.model.preset}: {n:,} parameters, {spec.n_blocks} blocks, {spec.n_skips} long skips"
    )
    print(
        f"tokens per image  {cost.tokens} = {cost.image_tokens} image + {cost.tokens - cost.image_tokens} time and text"
    )
    print(f"model FLOPs       {cost.model_flops:,} per image (forward and backward)")
    total = cost.model_flops * config.train.batch_size * config.train.steps
    print(f"                  {total:.4g} for {config.train.steps:,} steps of {config.train.batch_size}")
    for world in (1, 2, 4, 8, 16, 32, 64):
        try:
            batch = config.batch(world)
        except ConfigError:
            continue
        print(f"{world:>3} rank(s)        {batch}")
    try:
        shown = config.batch(1)
    except ConfigError:
        return
    print(json.dumps(deepspeed_config(config, shown, n_parameters=n, cuda=False), indent=1))
