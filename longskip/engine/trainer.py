"""The training run: ``prepare()`` builds a Job from a configuration, ``fit()`` is its loop, one column to read."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from longskip import errors
from longskip.engine import build, checkpoint, faults, signals
from longskip.engine.config import BatchPlan, Config
from longskip.engine.data.plan import Cursor, Plan
from longskip.engine.data.reader import MicroBatch, Reader
from longskip.engine.data.sources import ShardSource, Source, open_source
from longskip.engine.diffusion import Flow
from longskip.engine.distributed import World, all_reduce_sum, broadcast_object, join
from longskip.engine.metrics import Metrics
from longskip.engine.optim import AdamW, ema_decay, learning_rate
from longskip.engine.runs import RunFolder, append_json, tolerant
from longskip.engine.shards import Shards
from longskip.engine.validation import Validation
from longskip.errors import (
    EXIT_DONE,
    EXIT_SAVED,
    CheckpointError,
    DataError,
    LongskipError,
    NonFiniteLossError,
    RunMismatchError,
)
from longskip.kernels import backends
from longskip.profiling import ledger
from longskip.profiling.meter import Interval, Meter

COUNTERS = ("images", "image_tokens", "tokens", "model_flops", "hardware_flops", "six_nd")


@dataclass
class LoopState:
    """Where a run is: everything a resume needs besides the tensors. Counts are global and exact integers."""

    cursor: Cursor
    step: int = 0
    images: int = 0
    image_tokens: int = 0
    tokens: int = 0
    model_flops: int = 0
    hardware_flops: int = 0
    six_nd: int = 0
    bad_samples: int = 0
    losses: list[float] = field(default_factory=list)  # of the steps since the last line of metrics.jsonl

    def to_json(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("step", *COUNTERS, "bad_samples")}
        return own | {"cursor": self.cursor.to_json(), "losses": list(self.losses)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> LoopState:
        return cls(**(value | {"cursor": Cursor.from_json(value["cursor"])}))


@dataclass(frozen=True)
class StepCost:
    """What one optimizer step of the global batch costs."""

    images: int
    image_tokens: int
    tokens: int
    model_flops: int
    hardware_flops: int
    six_nd: int

    def counts(self) -> dict[str, int]:
        return {counter: getattr(self, counter) for counter in COUNTERS}


@dataclass
class Job:
    """A run in memory: its parts, its place, and the verbs of the loop."""

    config: Config
    world: World
    run: RunFolder
    batch: BatchPlan
    source: Source
    engine: Any
    optimizer: AdamW
    shards: Shards
    reader: Reader
    flow: Flow
    cost: StepCost
    state: LoopState
    attempt: int
    meter: Meter
    metrics: Metrics
    validation: Validation
    started_at: int = 0
    stopping: bool = False  # agreed by all ranks; what this rank alone was asked is signals.asked()
    _ledger_losses: list[float] = field(default_factory=list)
    _norm: float = 0.0
    _lr: float = 0.0
    _waited: float = 0.0

    # --- once in a while ----------------------------------------------------------------------------------------------

    def due(self, every: int) -> bool:
        """Whether something done every ``every`` steps is due now; never right after a resume, and at the end."""
        step = self.state.step
        return every > 0 and step > self.started_at and (step % every == 0 or step == self.config.train.steps)

    @property
    def finished(self) -> bool:
        return self.state.step >= self.config.train.steps

    def evaluate(self) -> None:
        values = self.validation.loss(self.engine, self.shards, self.flow)
        if values is not None:
            self.metrics.record(self.state.step, values)
            self.metrics.say(
                f"step {self.state.step}  validation loss {values['validation/loss']:.4f} (EMA weights, times evenly spread)"
            )

    def draw_samples(self) -> None:
        """Draw the run's prompts; a failure is an incident, never the end of a training."""
        try:
            folder = self.validation.samples(self.engine, self.shards, self.flow, self.run.path, self.state.step)
        except LongskipError as error:
            self.incident("no_samples", str(error))
            self.metrics.say(f"step {self.state.step}  no samples: {error}")
            return
        if folder is not None:
            self.metrics.say(f"step {self.state.step}  samples in {folder}")

    def save(self) -> None:
        """Commit a checkpoint; the ledger's interval ends first, so that none of its lines reaches across a commit."""
        self._end_ledger_interval(durable=True)
        begin = time.monotonic()
        try:
            checkpoint.save(
                self.run.checkpoints,
                self.state.step,
                self.shards,
                self.state.to_json(),
                keep_last=self.config.checkpoint.keep_last,
            )
        except CheckpointError as error:
            if self.finished or self.stopping:
                raise
            self.incident("not_saved", str(error))
            self.metrics.say(f"step {self.state.step}  NOT SAVED, training goes on: {error}")
            return
        self.metrics.say(f"step {self.state.step}  saved in {1000 * (time.monotonic() - begin):.0f} ms")

    # --- the step -----------------------------------------------------------------------------------------------------

    def step(self, micro_batches: list[MicroBatch]) -> None:
        """One optimizer step on this rank's micro-batches of a global batch.

        Raises NonFiniteLossError on all ranks, before any weight has moved, when the loss is NaN or infinite anywhere.
        """
        step = self.state.step + 1
        faults.point("step.begin", step=step)
        self._lr = learning_rate(self.config.optim, step, self.config.train.steps)
        self.optimizer.set_step(step, self._lr, ema_decay(self.config.optim, step))
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for micro in micro_batches[:-1]:
            total += self._backward(micro)
            self.engine.step()
        total += self._backward(micro_batches[-1])
        faults.point("step.backward", step=step)
        self._agree(float(total), micro_batches)
        self._norm = self._take_step(micro_batches)
        self._count()
        faults.point("step.done", step=step)

    def _backward(self, micro: MicroBatch) -> torch.Tensor:
        micro = micro.to(self.world.device)
        time_ = self.flow.times(micro.time_normal)
        clean = micro.clean.float()
        noised = self.flow.noised(clean, micro.noise, time_)
        prediction = self.engine(noised, time_, **micro.conditions)
        losses = self.flow.loss(prediction, clean, micro.noise, time_, micro.weight)
        # The mean is over all slots, bad ones included, so that ranks need not agree on how many were good.
        self.engine.backward(losses.sum() / self.batch.micro)
        return losses.detach().double().sum()

    def _agree(self, loss_sum: float, micro_batches: list[MicroBatch]) -> None:
        """One small all-reduce a step: the global loss, bad samples, and whether any rank was asked to stop."""
        bad = [entry for micro in micro_batches for entry in micro.bad]
        with tolerant("bad_samples.jsonl"):
            for entry in bad:
                append_json(self.run / "bad_samples.jsonl", entry | {"step": self.state.step + 1})
        finite = math.isfinite(loss_sum)
        total, n_bad, stop, broken = all_reduce_sum(
            [loss_sum if finite else 0.0, float(len(bad)), float(signals.asked()), float(not finite)],
            self.world.device,
        )
        self.stopping = stop > 0
        if broken:
            raise self._not_finite(f"loss is not finite on {round(broken)} rank(s)", micro_batches)
        self.state.losses.append(total / self.batch.total)
        self._ledger_losses.append(total / self.batch.total)
        self.state.bad_samples += round(n_bad)
        seen = (self.state.step + 1) * self.batch.total
        if self.state.bad_samples > self.config.data.max_bad_share * max(seen, 100):
            error = DataError(
                f"{self.state.bad_samples} of {seen} samples were bad, above data.max_bad_share "
                f"{self.config.data.max_bad_share}; see {self.run / 'bad_samples.jsonl'}",
                cure="longskip data lint names them; repair the data or raise the share",
            )
            error.alike = True
            raise error

    def _take_step(self, micro_batches: list[MicroBatch]) -> float:
        """Clip, update, average; returns the global gradient norm before clipping.

        Raises NonFiniteLossError on all ranks, the weights as they were, when the norm is NaN or infinite.
        """
        if self.shards.stage == 0 and self.config.train.dtype == "fp32":
            # DeepSpeed clips at stage 0 without telling the norm, and would take a step of NaN.
            grads = [p.grad for p in self.shards.parameters if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(grads))
            if not math.isfinite(norm):
                raise self._not_finite("gradient is not finite", micro_batches)
            self.engine.step()
            return norm
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm() or 0.0)
        if getattr(self.engine.optimizer, "overflow", False) or not math.isfinite(norm):
            raise self._not_finite("gradient is not finite", micro_batches)  # DeepSpeed has skipped the update
        return norm

    def _not_finite(self, what: str, micro_batches: list[MicroBatch]) -> NonFiniteLossError:
        ids = [int(i) for micro in micro_batches for i in micro.samples]
        self.incident("not_finite", f"the {what} at step {self.state.step + 1}; samples of this rank: {ids}")
        error = NonFiniteLossError(
            f"the {what} at step {self.state.step + 1}; no weight has moved since step {self.state.step}; "
            f"{self.run / 'incidents.jsonl'} lists the samples of every rank",
            cure="lower optim.lr, set model.qk_norm: true, or train in fp32; the last checkpoint is intact",
        )
        error.alike = True
        return error

    def _count(self) -> None:
        state = self.state
        state.step += 1
        state.cursor = state.cursor.advance(self.batch.total)
        for counter, value in self.cost.counts().items():
            setattr(state, counter, getattr(state, counter) + value)
        waited, self._waited = self.reader.data_wait_seconds - self._waited, self.reader.data_wait_seconds
        self.meter.add(**self.cost.counts(), data_wait=waited)

    def log(self) -> None:
        """When it is due: one ledger line, one metrics line, one line to read."""
        if not self.due(self.config.logging.every):
            return
        eta = self.meter.eta(self.config.train.steps)
        ended = self._end_ledger_interval()
        values = {
            "loss": sum(self.state.losses) / len(self.state.losses),
            "lr": self._lr,
            "grad_norm": self._norm,
            "images": self.state.images,
            "bad": self.state.bad_samples,
        }
        self.state.losses.clear()
        self.metrics.interval(ended, values, eta)

    def _end_ledger_interval(self, durable: bool = False) -> Interval:
        ended = self.meter.peek() if not self._ledger_losses else self.meter.interval()
        if self._ledger_losses and self.world.is_main:
            loss = sum(self._ledger_losses) / len(self._ledger_losses)
            with tolerant("ledger.jsonl"):
                ledger.append(self.run / "ledger.jsonl", ended.line(attempt=self.attempt, loss=loss), durable=durable)
        self._ledger_losses.clear()
        return ended

    def incident(self, kind: str, detail: str) -> None:
        """One line of incidents.jsonl; any rank may write its own."""
        line = {"time": time.time(), "attempt": self.attempt, "step": self.state.step, "rank": self.world.rank}
        with tolerant("incidents.jsonl"):
            append_json(self.run / "incidents.jsonl", line | {"kind": kind, "detail": detail})

    def close(self, status: str) -> None:
        self.reader.close()
        self.metrics.close()
        if self.world.is_main:
            with tolerant("run.json"):
                self.run.set_status(status)


def fit(job: Job) -> int:
    """Train from the job's step to ``train.steps``; returns the exit code (0 done, 75 saved on a signal)."""
    while True:
        if job.due(job.config.eval.every) and not job.stopping:
            job.evaluate()
        if job.due(job.config.logging.samples_every) and not job.stopping:
            job.draw_samples()
        if job.due(job.config.checkpoint.every) or (job.stopping and job.state.step > job.started_at):
            job.save()
        if job.finished or job.stopping:
            break
        job.step(next(job.reader))
        job.log()
    return EXIT_DONE if job.finished else EXIT_SAVED


def train(config: Config, run_path: Path) -> int:
    """Join the world, resume or begin the run in ``run_path``, train, and leave it closed; returns the exit code.

    From here on signals are remembered, and stay so until the process ends: a second one must not tear the end.
    """
    signals.listen()
    world = join(config.launch.timeout_minutes)
    try:
        job = prepare(config, run_path, world)
    except LongskipError:
        if world.is_main:
            RunFolder(run_path).sweep_failed_start()
        raise
    status = "failed"
    try:
        code = fit(job)
        status = "done" if code == EXIT_DONE else "saved"
        if code == EXIT_SAVED:
            if world.is_main:
                job.incident("signal", "saved and stopped; the same command goes on")
            job.metrics.say(f"saved at step {job.state.step} on a signal; the same command goes on from here")
        return code
    except LongskipError as error:
        if world.is_main or not error.alike:
            job.incident("error", str(error))
        raise
    finally:
        job.close(status)


def prepare(config: Config, run_path: Path, world: World) -> Job:
    """Everything up to the first step; user errors are raised on all ranks alike, before any work is lost."""
    run = RunFolder(run_path)
    claimed: Any = on_main(world, lambda: _claim(run, config))
    resuming, kept_micro, attempt = claimed["resuming"], claimed["micro_batch"], claimed["attempt"]
    batch = config.batch(world.size, kept_micro)
    on_main(world, lambda: _check(config, batch, world.device))
    source = _open(config)
    plan = Plan(len(source), batch.total, config.train.seed)
    if not resuming:
        on_main(world, lambda: build.save_vocabulary(run / "vocabulary.json", build.build_vocabulary(config, source)))
    vocabulary = build.load_vocabulary(run / "vocabulary.json")
    on_main(world, lambda: Validation(config, world, vocabulary, source).count)
    validation = Validation(config, world, vocabulary, source)

    model = build.build_model(config, len(vocabulary))
    n_parameters = sum(math.prod(shape) for _, _, _, shape in model.canonical())
    ds_config = build.deepspeed_config(config, batch, n_parameters=n_parameters, cuda=world.device.type == "cuda")
    backends.configure(config.kernels.by_op())
    engine, optimizer, shards = build.build_engine(config, model, world, ds_config)
    cost = step_cost(config, batch, n_parameters)
    summary = _summary(config, run, cost, batch, n_parameters, source)
    on_main(world, lambda: _settle(run, config, ds_config, summary, resuming))

    state = LoopState(plan.cursor())
    folder, complaints = checkpoint.newest_for_all(run.checkpoints, world.rank)
    if folder is not None:
        state = LoopState.from_json(checkpoint.load(folder, shards))
    on_main(world, lambda: ledger.append(run / "ledger.jsonl", ledger.Resumed(attempt, state.step)))

    text = config.encoders.text
    reader = Reader(
        source,
        plan,
        vocabulary,
        resolution=config.resolution,
        n_txt=text.n_tokens,
        rank=world.rank,
        world=world.size,
        micro=batch.micro,
        accumulation=batch.accumulation,
        seed=config.train.seed,
        caption_dropout=config.diffusion.caption_dropout,
        flip=config.data.flip,
        crop=config.data.crop,
        workers=config.data.workers,
        cursor=state.cursor,
        too_long=text.too_long,
    )
    device_name = torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu"
    meter = Meter(device_name=device_name, devices=world.size, dtype=config.train.dtype, step=state.step)
    metrics = Metrics(
        run.path,
        main=world.is_main,
        attempt=attempt,
        steps=config.train.steps,
        start=state.step,
        tensorboard=config.logging.tensorboard,
    )
    job = Job(
        config, world, run, batch, source, engine, optimizer, shards, reader, Flow(config.diffusion), cost, state,
        attempt, meter, metrics, validation, started_at=state.step,
    )  # fmt: skip
    for complaint in complaints:
        job.incident("bad_checkpoint", complaint)
        metrics.say(f"passed over a checkpoint: {complaint}")
    _announce(job, resuming, n_parameters, meter)
    return job


def on_main(world: World, act: Callable[[], object]) -> object:
    """Rank 0's result of ``act`` on every rank; its error is raised on every rank (none waits for a dead one)."""
    outcome: Any = None
    failure: LongskipError | None = None
    if world.is_main:
        try:
            outcome = {"value": act()}
        except (LongskipError, OSError) as error:
            failure = (
                error if isinstance(error, LongskipError) else LongskipError(f"the first rank cannot go on: {error}")
            )
            outcome = {"error": type(failure).__name__, "message": str(failure)}
    outcome = broadcast_object(outcome)
    if "error" not in outcome:
        return outcome["value"]
    if failure is None:
        kind = getattr(errors, outcome["error"], LongskipError)
        failure = (DataError if issubclass(kind, errors.BadSampleError) else kind)(outcome["message"])
    failure.alike = True
    raise failure


def step_cost(config: Config, batch: BatchPlan, n_parameters: int) -> StepCost:
    """Exact model and hardware FLOPs (2 per multiply-add) and tokens of one global batch; N counts all trainables."""
    spec = config.backbone()
    one = spec.flops(batch=1)
    hardware = spec.hardware_flops(1, config.engine.checkpointing)
    return StepCost(
        images=batch.total,
        image_tokens=batch.total * one.image_tokens,
        tokens=batch.total * one.tokens,
        model_flops=batch.total * one.model_flops,
        hardware_flops=batch.total * hardware,
        six_nd=6 * n_parameters * batch.total * one.tokens,
    )


def _claim(run: RunFolder, config: Config) -> dict[str, Any]:
    """Own the folder; whether it holds this run already, with what micro-batch it began, and the attempt's number."""
    run.lock()
    try:
        resuming = run.check(config)
        checkpoint.sweep(run.checkpoints)
    except LongskipError:
        run.unlock()
        raise
    saved = json.loads((run / "run.json").read_text("utf-8")) if resuming else {}
    attempts = (entry.attempt for entry in ledger.read(run / "ledger.jsonl").entries)
    return {"resuming": resuming, "micro_batch": saved.get("micro_batch"), "attempt": 1 + max(attempts, default=0)}


def _check(config: Config, batch: BatchPlan, device: torch.device) -> None:
    """What can be wrong with data and backends, found before any rank builds a model."""
    Plan(len(_open(config)), batch.total, config.train.seed)
    backends.configure(config.kernels.by_op())
    backends.choices(device)


def _open(config: Config) -> Source:
    source = open_source(config.data.path)
    if isinstance(source, ShardSource):
        source.on_damage = config.data.on_damage
    return source


def _settle(run: RunFolder, config: Config, ds_config: dict[str, Any], summary: dict[str, Any], resuming: bool) -> None:
    """Write what the run is; on a resume refuse other data or another DeepSpeed JSON first (RunMismatchError)."""
    if resuming:
        saved = json.loads((run / "run.json").read_text("utf-8"))
        if saved.get("data", {}).get("fingerprint") != summary["data"]["fingerprint"]:
            raise RunMismatchError(
                f"{config.data.path} is not the data that {run.path} was trained on "
                f"({saved.get('data')} then, {summary['data']} now)",
                cure="bring the data back, or give the new run its own train.name=…",
            )
        before = json.loads((run / "ds_config.json").read_text("utf-8"))
        derived = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
        other = [k for k in before.keys() | ds_config.keys() if k not in derived and before.get(k) != ds_config.get(k)]
        if other:
            raise RunMismatchError(
                f"{run.path} was made with another DeepSpeed configuration: {', '.join(sorted(other))} differ",
                cure="set deepspeed.config back, or give the new run its own train.name=…",
            )
    run.write_identity(config, ds_config, summary | {"status": "running"})


def _summary(
    config: Config, run: RunFolder, cost: StepCost, batch: BatchPlan, n_parameters: int, source: Source
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
        "data": {"samples": len(source), "fingerprint": source.fingerprint()},
        "kernels": {op: list(choice) for op, choice in backends.choices().items()},
    }


def _announce(job: Job, resuming: bool, n_parameters: int, meter: Meter) -> None:
    config, state = job.config, job.state
    say = job.metrics.say
    backbone = config.backbone().param_counts().total
    text = f" ({n_parameters - backbone:,} of them the text encoder's)" if n_parameters > backbone else ""
    say(
        f"{config.model.preset}: {n_parameters:,} parameters{text}, {config.train.dtype}, "
        f"ZeRO-{config.deepspeed.zero_stage}, {config.engine.layout} layout, {job.batch}"
    )
    say(f"{len(job.source):,} samples in {config.data.path}; {config.train.steps:,} steps")
    if meter.reason:
        say(meter.reason)
    if resuming:
        say(f"attempt {job.attempt} goes on from step {state.step}")


__all__ = ["Job", "LoopState", "fit", "prepare", "train"]
