"""From a configuration and a folder to a ``Job`` that is ready to step: everything that can be refused is, here."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from longskip import errors
from longskip.engine import build, checkpoint, fitting, initial
from longskip.engine import vocabulary as vocabulary_file
from longskip.engine.config import BatchPlan, Config
from longskip.engine.costs import StepCost, few_image_tokens, step_cost
from longskip.engine.data.buckets import Assignment
from longskip.engine.data.reader import Reader
from longskip.engine.data.sources import SizedSource
from longskip.engine.data.tokens import Vocabulary
from longskip.engine.diffusion import objective_of
from longskip.engine.distributed import ATTEMPT, World, broadcast_object, device_name_of
from longskip.engine.inputs import Inputs
from longskip.engine.job import Job, LoopState
from longskip.engine.metrics import Metrics
from longskip.engine.opening import data_name, described, draws_of, open_training, plan_for, sort_into_buckets
from longskip.engine.profiled import settings_of
from longskip.engine.quarantine import quarantine_of
from longskip.engine.runs import RunFolder
from longskip.engine.validation import Validation
from longskip.errors import DataError, LongskipError, RunMismatchError
from longskip.kernels import backends
from longskip.profiling import ledger
from longskip.profiling.meter import Meter


def prepare(config: Config, run_path: Path, world: World) -> Job:
    """Everything up to the first step; user errors are raised on all ranks alike, before any work is lost."""
    run = RunFolder(run_path)
    claimed: Any = on_main(world, lambda: _claim(run, config))
    resuming, kept_micro, attempt = claimed["resuming"], claimed["micro_batch"], claimed["attempt"]
    batch = config.batch(world.size, kept_micro)
    on_main(world, lambda: _check(run, config, batch, world.device, resuming))
    source = open_training(config, check=False)  # the first rank has
    assignment = Assignment.load(run.path, source.fingerprint()) if config.data.buckets != "off" else None
    plan = plan_for(config, source, batch.total, assignment)
    if not resuming and config.encoders.text.kind == "words":
        on_main(world, lambda: _begin_vocabulary(run, config, source))
    vocabulary = vocabulary_file.words_of(run.path, config)
    inputs = Inputs(config, vocabulary, world.device, source)
    on_main(world, lambda: inputs.load(source))
    listed: Any = on_main(world, lambda: _quarantined(config, source))
    draws = draws_of(config) | {"quarantine": np.array(listed["samples"], np.int64)}
    on_main(world, lambda: bool(inputs.assembler(source, **draws)))  # refuses what the data cannot be read with
    folder, complaints = checkpoint.newest_for_all(run.checkpoints, world.rank)
    start: Any = on_main(world, lambda: _find_start(config, vocabulary, run, claimed, folder))
    on_main(world, lambda: Validation(config, world, inputs, source, batch.micro).check())
    validation = Validation(config, world, inputs, source, batch.micro)

    model = build.build_model(config, len(vocabulary or ()))
    n_parameters = sum(math.prod(shape) for _, _, _, shape in model.canonical())
    config = _settle_stage(config, folder, world, batch, n_parameters)
    ds_config = build.deepspeed_config(config, batch, n_parameters=n_parameters, cuda=world.device.type == "cuda")
    backends.configure(config.kernels.by_op())
    kept: Any = on_main(world, lambda: _kept_kernels(run, world.device) if resuming else {})
    backends.keep(kept)
    engine, optimizer, shards = build.build_engine(config, model, world, ds_config)
    serving = {op: name for op, (name, _) in backends.choices(world.device).items()}
    running = {part: settings_of(part, str(getattr(config.encoders, part).path)) for part in inputs.on_the_way(source)}
    costs = {
        bucket: step_cost(config, batch, n_parameters, bucket, serving, running) for bucket in (*plan.buckets, None)
    }
    cost = costs[None]
    summary = _summary(config, run, cost, batch, n_parameters, source) | ({"initial": start} if start else {})
    if config.data.quarantine:
        summary["quarantine"] = listed["list"]
    on_main(world, lambda: _settle(run, config, ds_config, summary, resuming))

    state = LoopState(plan.cursor())
    if folder is not None:
        state = LoopState.from_json(checkpoint.load(folder, shards))
    elif start is not None:
        with initial.initial_values(start["from"], config.train.init_weights, config, vocabulary) as values:
            initial.apply(values, shards)
    on_main(world, lambda: ledger.append(run / "ledger.jsonl", ledger.Resumed(attempt, state.step)))
    reader = Reader(
        source,
        plan,
        rank=world.rank,
        world=world.size,
        micro=batch.micro,
        accumulation=batch.accumulation,
        workers=config.data.workers,
        cursor=state.cursor,
        **draws,
        **inputs.settings(),
    )
    meter = Meter(
        device_name=device_name_of(world.device), devices=world.size, dtype=config.train.dtype, step=state.step
    )
    metrics = Metrics(
        run.path,
        main=world.is_main,
        attempt=attempt,
        steps=config.train.steps,
        start=state.step,
        tensorboard=config.logging.tensorboard,
        memory="max_reserved" if world.device.type == "cuda" else "max_rss",
    )
    job = Job(
        config, world, run, batch, source, engine, optimizer, shards, reader, objective_of(config.diffusion), inputs,
        lambda cursor: costs[plan.bucket_at(cursor)], state, attempt, meter, metrics, validation, started_at=state.step,
    )  # fmt: skip
    for complaint in complaints:
        if world.is_main:  # what all ranks were told
            job.incident("bad_checkpoint", complaint)
        metrics.say(f"passed over a checkpoint: {complaint}")
    _announce(job, resuming, n_parameters, meter, assignment)
    if config.data.quarantine:
        unknown = (
            f", {listed['list']['unknown']:,} of its entries are of other data" if listed["list"]["unknown"] else ""
        )
        job.metrics.say(f"{len(listed['samples']):,} samples are passed over: {config.data.quarantine}{unknown}")
    return job


def _settle_stage(config: Config, saved: Path | None, world: World, batch: BatchPlan, n_parameters: int) -> Config:
    """The configuration with ``zero_stage: auto`` decided: the newest checkpoint's stage, else the smallest that fits."""

    def decide() -> fitting.Stage:
        asked, free = config.deepspeed.zero_stage, _free_memory(world)
        sizes = {"world": world.size, "micro": batch.micro, "n_parameters": n_parameters}
        stage: fitting.Stage
        if asked != "auto":
            stage = asked
        elif saved is not None:
            offload = config.deepspeed
            least: fitting.Stage = (
                3 if offload.offload_param == "cpu" else 1 if offload.offload_optimizer == "cpu" else 0
            )
            stage = max(least, checkpoint.read_manifest(saved)["zero_stage"])
        else:
            stage = fitting.choose_stage(config, free=free, **sizes)
        fitting.check_offload(config, stage, free=free, **sizes)
        return stage

    group = config.deepspeed.model_copy(update={"zero_stage": on_main(world, decide)})
    return config.model_copy(update={"deepspeed": group})


def _free_memory(world: World) -> fitting.Free:
    """This rank's share of what is free, on its device and in the machine that it shares with its neighbours."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", torch.cuda.device_count() or world.size))
    host = psutil.virtual_memory().available // max(1, min(local, world.size))
    if world.device.type == "cuda":
        return fitting.Free(torch.cuda.mem_get_info()[0], host)
    return fitting.Free(host)


def _find_start(
    config: Config, vocabulary: Vocabulary | None, run: RunFolder, claimed: dict[str, Any], saved: Path | None
) -> dict[str, Any] | None:
    """What run.json tells of the first weights where others begin the run: found at its first start, and kept.

    They are opened once, to be refused now if they must be; a run with a checkpoint of its own needs them no more.
    """
    told: dict[str, Any] | None = claimed["initial"]
    if config.train.init_from is None or saved is not None:
        return told
    if claimed["resuming"]:
        return initial.kept_start(run.path, told)
    return initial.describe_start(config.train.init_from, config, vocabulary)


def _quarantined(config: Config, source: SizedSource) -> dict[str, Any]:
    """The samples of ``data.quarantine``, found by the first rank for all of them, and what run.json says of the list."""
    found = quarantine_of(config.data.quarantine, source)
    return {"samples": found.samples.tolist(), "list": found.to_json()}


def _begin_vocabulary(run: RunFolder, config: Config, source: SizedSource) -> None:
    """A new run's words: those of the weights that it starts from, else those of its captions."""
    parent = initial.initial_vocabulary(config.train.init_from) if config.train.init_from else None
    words = vocabulary_file.load_vocabulary(parent) if parent else vocabulary_file.build_vocabulary(config, source)
    vocabulary_file.save_vocabulary(run / "vocabulary.json", words)


def on_main(world: World, act: Callable[[], object]) -> object:
    """Rank 0's result of ``act`` on every rank; its error is raised on every rank (none waits for a dead one).

    The others raise its kind of error, or the LongskipError that names an error which is not one of ours; rank 0 raises
    what it met, an OSError as a LongskipError.
    """
    outcome: Any = None
    failure: LongskipError | None = None
    unexpected: Exception | None = None
    if world.is_main:
        try:
            outcome = {"value": act()}
        except LongskipError as error:
            failure = error
        except OSError as error:
            failure = LongskipError(f"the first rank cannot go on: {error}")
        except Exception as error:
            unexpected = error
            failure = LongskipError(f"the first rank cannot go on: {type(error).__name__}: {error}")
        if failure is not None:
            outcome = {"error": type(failure).__name__, "message": str(failure)}
    outcome = broadcast_object(outcome)
    if unexpected is not None:
        raise unexpected
    if "error" not in outcome:
        return outcome["value"]
    if failure is None:
        kind = getattr(errors, outcome["error"], LongskipError)
        failure = (DataError if issubclass(kind, errors.BadSampleError) else kind)(outcome["message"])
    failure.alike = True
    raise failure


def _claim(run: RunFolder, config: Config) -> dict[str, Any]:
    """Own the folder; whether it holds this run already, what it began with, and the attempt's number."""
    run.lock()
    try:
        resuming = run.check(config)
        checkpoint.sweep(run.checkpoints)
    except LongskipError:
        run.unlock()
        raise
    saved = run.summary() if resuming else {}
    attempts = (entry.attempt for entry in ledger.read(run / "ledger.jsonl").entries)
    begun = {"micro_batch": saved.get("micro_batch"), "initial": saved.get("initial")}
    supervised = os.environ.get(ATTEMPT, "")  # its number, which counts attempts that did not come so far as well
    attempt = max(1 + max(attempts, default=0), int(supervised) if supervised.isdigit() else 0)
    return {"resuming": resuming, "attempt": attempt} | begun


def _check(run: RunFolder, config: Config, batch: BatchPlan, device: torch.device, resuming: bool) -> None:
    """What can be wrong with data and backends, found before any rank builds a model."""
    source = open_training(config)
    if resuming and config.data.buckets != "off":
        assignment: Assignment | None = Assignment.load(run.path, source.fingerprint())
    else:
        assignment = sort_into_buckets(config, source, batch.total)
        if assignment is not None:
            assignment.save(run.path, source.fingerprint())
    plan_for(config, source, batch.total, assignment)
    backends.configure(config.kernels.by_op())
    backends.choices(device)


def _settle(run: RunFolder, config: Config, ds_config: dict[str, Any], summary: dict[str, Any], resuming: bool) -> None:
    """Write what the run is; on a resume refuse other data or another DeepSpeed JSON first (RunMismatchError)."""
    if resuming:
        run.check_data(data_name(config), summary["data"])
        before = json.loads((run / "ds_config.json").read_text("utf-8"))
        # The stage and the ranks may change: checkpoints are read in any slices.
        derived = {
            "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "zero_optimization",
            "zero_force_ds_cpu_optimizer",
        }  # fmt: skip
        other = [k for k in before.keys() | ds_config.keys() if k not in derived and before.get(k) != ds_config.get(k)]
        if other:
            raise RunMismatchError(
                f"{run.path} was made with another DeepSpeed configuration: {', '.join(sorted(other))} differ",
                cure="set deepspeed.config back, or give the new run its own train.name=…",
            )
    run.write_identity(config, ds_config, summary | {"status": "running"})


def _summary(
    config: Config, run: RunFolder, cost: StepCost, batch: BatchPlan, n_parameters: int, source: SizedSource
) -> dict[str, Any]:
    counts = config.backbone().param_counts()
    return {
        "name": run.path.name,
        "micro_batch": batch.micro,
        "params": n_parameters,
        "params_token": counts.per_token,
        "flops_per_image": cost.model_flops // batch.total,
        "image_tokens": cost.image_tokens // batch.total,
        "tokens": cost.tokens // batch.total,
        "data": described(source),
        "kernels": {op: list(choice) for op, choice in backends.choices().items()},
    }


def _kept_kernels(run: RunFolder, device: torch.device) -> dict[str, dict[str, str]]:
    """What ``auto`` took in the run's earlier attempts, where they ran on the same kind of device."""
    said = run.summary().get("kernels_chosen", {})
    return said["choices"] if said.get("device") == device_name_of(device) else {}  # type: ignore[no-any-return]


def _announce(job: Job, resuming: bool, n_parameters: int, meter: Meter, assignment: Assignment | None) -> None:
    config, state = job.config, job.state
    say = job.metrics.say
    backbone = config.backbone().param_counts().total
    text = f" ({n_parameters - backbone:,} of them the text encoder's)" if n_parameters > backbone else ""
    say(
        f"{config.model.preset}: {n_parameters:,} parameters{text}, {config.train.dtype}, "
        f"ZeRO-{config.deepspeed.zero_stage}, {config.engine.layout} layout, {job.batch}"
    )
    say(f"{len(job.source):,} samples in {data_name(config)}; {config.train.steps:,} steps")
    if assignment is not None:
        for line in (*assignment.histogram.lines(), *assignment.histogram.warnings()):
            say(line)
    if warning := few_image_tokens(config):
        say(warning)
    if meter.reason:
        say(meter.reason)
    if resuming and not job.finished:
        say(f"attempt {job.attempt} goes on from step {state.step}")
