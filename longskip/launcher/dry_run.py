"""``longskip train --dry-run``: what would run, in short or in full, and nothing that runs."""

from __future__ import annotations

import json
import shutil
import textwrap
from contextlib import suppress
from itertools import groupby
from pathlib import Path

from longskip.engine import fitting, partition
from longskip.engine.config import BatchPlan, Config
from longskip.engine.configio import dump_yaml
from longskip.engine.costs import few_image_tokens
from longskip.engine.runs import RunFolder
from longskip.errors import ConfigError

WORLDS = (1, 2, 4, 8, 16, 32, 64)
_INDENT = " " * 18


def show(config: Config, run_path: Path, ranks: int | None = None, *, verbose: bool = False) -> None:
    """Print a summary: run folder, model, costs, data, and for the usual numbers of ranks (or ``ranks``) the batch and a
    rank's memory; with ``ranks`` also what the ranks own of the weights.

    ``verbose``: before it the resolved configuration, DeepSpeed's JSON, and with ``ranks`` every shard of every rank. A run
    that is there already counts with the micro-batch and the words that it began with.

    Raises what a start would raise: RunMismatchError for another run in the folder, what opening the data raises where
    they are here, ConfigError for ``ranks`` that do not divide the batch.
    """
    from longskip.engine.build import deepspeed_config
    from longskip.engine.vocabulary import words_of

    run = RunFolder(run_path)
    resuming = run.check(config)
    kept_micro = run.summary().get("micro_batch") if resuming else None
    words = words_of(run.path, config) if resuming else None
    vocabulary = len(words) if words else config.encoders.text.vocabulary
    data, bad = _data(config, run if resuming else None)
    batches = [config.batch(ranks, kept_micro)] if ranks else _batches(config, kept_micro)
    text = config.text_encoder(vocabulary)
    trained = config.backbone().param_counts().total + (text.param_counts().total if text else 0)

    if verbose:
        print(dump_yaml(config))
        for batch in batches[:1]:
            print(json.dumps(deepspeed_config(config, batch, n_parameters=trained, cuda=False), indent=1), "\n")
        if ranks:
            _print_shards(config, vocabulary, ranks)
    kept = f" (there already: it would resume, with its micro-batch of {kept_micro})" if resuming else ""
    print(f"run folder        {run.path}{kept}")
    _print_model(config, trained, "" if words else ", with a vocabulary of its full size")
    print(f"data              {data}")
    if bad:
        _wrapped(bad, "bad samples")
    for batch in batches:
        print(f"{batch.world:>3} rank(s)        {batch}")
        _print_memory(config, batch, trained, parts=verbose or len(batches) == 1)
    if ranks:
        _wrapped(_shards_in_short(config, vocabulary, ranks), "shards")
    if not verbose:
        _wrapped(f"--verbose: resolved YAML, DeepSpeed's JSON{', every shard' if ranks else ''}", "in full")


def _batches(config: Config, kept_micro: int | None) -> list[BatchPlan]:
    """The batches of the usual numbers of ranks, or of any up to 64 where none of those divides it."""
    for worlds in (WORLDS, range(1, WORLDS[-1] + 1)):
        found = []
        for world in worlds:
            with suppress(ConfigError):
                found.append(config.batch(world, kept_micro))
        if found:
            return found
    return []


def _data(config: Config, run: RunFolder | None) -> tuple[str, str]:
    """The data in a line, and what is known of bad samples, once they are found to be what the model takes and, on a resume,
    what ``run`` was trained on.

    What is not on this machine is not looked at.
    """
    paths = [each.path for each in config.data.mix] or [config.data.path]
    if not all(paths):
        return "data.path is not set", ""
    for path in (*paths, config.data.validation):
        if path and "://" in path:
            return f"{path} is streamed: not looked at", ""
        if path and not Path(path).exists():
            return f"{path} is not here: not looked at", ""
    import torch

    from longskip.engine import opening
    from longskip.engine.data.tokens import Vocabulary
    from longskip.engine.inputs import Inputs

    source = opening.open_training(config)
    if run is not None:
        run.check_data(opening.data_name(config), opening.described(source))
    total = config.train.batch_size
    opening.plan_for(config, source, total, opening.sort_into_buckets(config, source, total))
    words = Vocabulary(()) if config.encoders.text.kind == "words" else None
    inputs = Inputs(config, words, torch.device("cpu"), source)
    layout = inputs.assembler(source, **opening.draws_of(config)).features
    if config.data.validation:
        inputs.assembler(opening.open_data(config, config.data.validation))
    read = []
    if layout is not None and layout.latent is not None:
        read.append(f"latents {'x'.join(map(str, layout.latent))} {layout.latent_dtype}")
    if layout is not None and layout.text is not None:
        read.append(f"text features {'x'.join(map(str, layout.text))} {layout.text_dtype}")
    told = f"{len(source):,} samples in {opening.data_name(config)}: {' and '.join(read) or 'pictures and captions'}"
    return told, opening.bad_so_far(config, run.path if run else None, len(source))


def _print_model(config: Config, trained: int, vocabulary: str) -> None:
    spec = config.backbone()
    counts, cost, text = spec.param_counts(), spec.flops(batch=1), config.text_encoder(1)
    model_flops = cost.model_flops + (text.flops().model_flops if text else 0)
    print(
        f"backbone          {config.model.preset}: {counts.total:,} parameters, {spec.n_blocks} blocks, "
        f"{spec.n_skips} long skips"
    )
    if trained > counts.total:
        print(f"text encoder      {trained - counts.total:,} parameters{vocabulary}")
    print(
        f"tokens per image  {cost.tokens} = {cost.image_tokens} image + {cost.tokens - cost.image_tokens} time and text"
    )
    if warning := few_image_tokens(config):
        print(warning)
    print(f"model FLOPs       {model_flops:,} per image (forward and backward)")
    total = model_flops * config.train.batch_size * config.train.steps
    print(f"                  {total:.4g} for {config.train.steps:,} steps of {config.train.batch_size}")


def _print_memory(config: Config, batch: BatchPlan, n_parameters: int, *, parts: bool) -> None:
    stage = config.deepspeed.zero_stage
    for each in fitting.STAGES if stage == "auto" else (stage,):
        needed = fitting.memory(config, each, world=batch.world, micro=batch.micro, n_parameters=n_parameters)
        shares = ", ".join(
            f"{name} {fitting.readable(getattr(needed, name))}"
            for name in ("weights", "gradients", "states", "gathered", "activations", "buffers")
        )
        host = f"; host memory {fitting.readable(needed.host)}" if needed.host else ""
        host += f"; on the host {fitting.readable(needed.snapshot)} for saves" if needed.snapshot else ""
        _wrapped(f"ZeRO-{each}: about {fitting.readable(needed.device)} a rank{f' ({shares})' if parts else ''}{host}")


def _wrapped(text: str, title: str = "") -> None:
    """``title``, and ``text`` under the summary's second column, in lines that the terminal holds."""
    width = max(60, shutil.get_terminal_size().columns)
    print(
        textwrap.fill(
            text, width, initial_indent=title.ljust(len(_INDENT)), subsequent_indent=_INDENT, break_long_words=False
        )
    )


def _shards_in_short(config: Config, vocabulary: int, ranks: int) -> str:
    """How many slices of how many elements the ranks own at stage 3, from the rank with the fewest to that with the most."""
    if config.deepspeed.zero_stage != 3:
        return f"every rank has all weights (deepspeed.zero_stage {config.deepspeed.zero_stage})"
    slices, elements = [0] * ranks, [0] * ranks
    for shard in partition.shards(config, vocabulary, ranks):
        slices[shard.rank] += 1
        elements[shard.rank] += shard.numel
    weight, states = _bytes_of_an_element(config)
    each = [f"{n:,}" if n == m else f"{n:,} to {m:,}" for n, m in ((min(of), max(of)) for of in (slices, elements))]
    return f"{each[0]} slices, {each[1]} elements a rank, {weight} + {states} bytes each"


def _bytes_of_an_element(config: Config) -> tuple[int, int]:
    """Of an element of the weights, and of its fp32 states."""
    weight = 2 if config.train.dtype == "bf16" else 4
    return weight, (4 if weight == 2 else 0) + 8 + 4


def _print_shards(config: Config, vocabulary: int, ranks: int) -> None:
    if config.deepspeed.zero_stage != 3:
        print("shards are listed for deepspeed.zero_stage 3; below it every rank has all weights\n")
        return
    weight, states = _bytes_of_an_element(config)
    print(f"shards of {ranks} ranks; bytes: {weight} of weight + {states} of fp32 states per element")
    everything = partition.shards(config, vocabulary, ranks)
    for rank, shards in groupby(everything, key=lambda shard: shard.rank):
        mine = list(shards)
        elements = sum(shard.numel for shard in mine)
        print(f"rank {rank}: {elements:,} elements, {elements * (weight + states):,} bytes in {len(mine)} slices")
        for shard in mine:
            shape = "×".join(map(str, shard.shape))
            span = f"[{shard.offset:,} : {shard.offset + shard.numel:,}]"
            print(f"  {shard.name}  {shape}  {span}  {shard.numel * (weight + states):,} bytes")
    print()
