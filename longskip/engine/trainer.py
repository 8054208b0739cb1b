"""The training run: ``prepare()`` builds a Job from a configuration, ``fit()`` is its loop, one column to read."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from longskip import errors
from longskip.engine import build, checkpoint, faults
from longskip.engine.config import BatchPlan, Config
from longskip.engine.data.plan import Cursor, Plan
from longskip.engine.data.reader import MicroBatch, Reader
from longskip.engine.data.sources import Source, open_source
from longskip.engine.diffusion import Flow
from longskip.engine.distributed import World, all_reduce_sum, barrier, broadcast_object, join
from longskip.engine.metrics import Metrics
from longskip.engine.optim import AdamW, ema_decay, learning_rate
from longskip.engine.runs import RunFolder, append_json
from longskip.engine.shards import Shards
from longskip.engine.validation import Validation
from longskip.errors import EXIT_DONE, EXIT_SAVED, DataError, DiskFullError, LongskipError, NonFiniteLossError
from longskip.kernels import backends
from longskip.profiling import ledger
from longskip.profiling.meter import Meter

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

    def to_json(self) -> dict[str, Any]:
        return {"step": self.step, "cursor": self.cursor.to_json()} | {c: getattr(self, c) for c in COUNTERS}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> LoopState:
        return cls(Cursor.from_json(value["cursor"]), value["step"], **{c: value[c] for c in COUNTERS})


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
    stop_requested: bool = False
    bad_seen: int = 0
    _losses: list[float] = field(default_factory=list)
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
            self.metrics.say(f"step {self.state.step}  validation loss {values['validation/loss']:.4f} (EMA weights)")

    def draw_samples(self) -> None:
        folder = self.validation.samples(self.engine, self.shards, self.flow, self.run.path, self.state.step)
        if folder is not None:
            self.metrics.say(f"step {self.state.step}  samples in {folder}")

    def save(self) -> None:
        """Commit a checkpoint; the interval ends first, so that no ledger line reaches across a commit."""
        self.log(force=True)
        begin = time.monotonic()
        try:
            checkpoint.save(
                self.run.checkpoints,
                self.state.step,
                self.shards,
                self.state.to_json(),
                keep_last=self.config.checkpoint.keep_last,
            )
        except DiskFullError as error:
            if self.finished or self.stop_requested:
                raise
            self.incident("disk_full", str(error))
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
        self._norm = self._take_step()
        self._count(micro_batches)
        faults.point("step.done", step=step)

    def _backward(self, micro: MicroBatch) -> torch.Tensor:
        micro = micro.to(self.world.device)
        time_ = self.flow.times(micro.time_normal)
        noised = self.flow.noised(micro.pixels, micro.noise, time_)
        tokens = micro.tokens if self.config.encoders.text.kind != "none" else None
        prediction = self.engine(noised, time_, tokens)
        losses = self.flow.loss(prediction, micro.pixels, micro.noise, time_, micro.weight)
        # The mean is over all slots, bad ones included, so that ranks need not agree on how many were good.
        self.engine.backward(losses.sum() / self.batch.micro)
        return losses.detach().double().sum()

    def _agree(self, loss_sum: float, micro_batches: list[MicroBatch]) -> None:
        """One small all-reduce a step: the global loss, bad samples, and whether any rank was asked to stop."""
        bad = [entry for micro in micro_batches for entry in micro.bad]
        for entry in bad:
            append_json(self.run / "bad_samples.jsonl", entry | {"step": self.state.step + 1})
        finite = loss_sum == loss_sum and abs(loss_sum) != float("inf")
        total, n_bad, stop, broken = all_reduce_sum(
            [loss_sum if finite else 0.0, float(len(bad)), float(self.stop_requested), float(not finite)],
            self.world.device,
        )
        self.stop_requested = stop > 0
        self.bad_seen += round(n_bad)
        if broken:
            ids = [int(i) for micro in micro_batches for i in micro.samples]
            self.incident("non_finite_loss", f"step {self.state.step + 1}, samples of rank 0: {ids}")
            raise NonFiniteLossError(
                f"the loss of step {self.state.step + 1} is not finite on {round(broken)} rank(s); "
                f"the weights are those of step {self.state.step}, this rank's samples were {ids[:8]}…",
                cure="lower optim.lr, set model.qk_norm: true, or train in fp32; the last checkpoint is intact",
            )
        self._losses.append(total / self.batch.total)
        seen = (self.state.step - self.started_at + 1) * self.batch.total
        if self.bad_seen > self.config.data.max_bad_share * max(seen, 100):
            raise DataError(
                f"{self.bad_seen} of the last {seen} samples were bad, above data.max_bad_share "
                f"{self.config.data.max_bad_share}; see {self.run / 'bad_samples.jsonl'}",
                cure="longskip data lint names them; repair the data or raise the share",
            )

    def _take_step(self) -> float:
        """Clip, update, average; returns the global gradient norm before clipping."""
        if self.shards.stage == 0 and self.config.train.dtype == "fp32":
            # DeepSpeed clips at stage 0 without telling the norm.
            grads = [p.grad for p in self.shards.parameters if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(grads))
            self.engine.step()
            return norm
        self.engine.step()
        return float(self.engine.get_global_grad_norm() or 0.0)

    def _count(self, micro_batches: list[MicroBatch]) -> None:
        state = self.state
        state.step += 1
        state.cursor = state.cursor.advance(self.batch.total)
        for counter, value in self.cost.counts().items():
            setattr(state, counter, getattr(state, counter) + value)
        waited, self._waited = self.reader.data_wait_seconds - self._waited, self.reader.data_wait_seconds
        self.meter.add(**self.cost.counts(), data_wait=waited)

    def log(self, force: bool = False) -> None:
        """End the logging interval when it is due (or ``force``): one ledger line, one metrics line, one line to read."""
        if not self._losses or not (force or self.due(self.config.logging.every)):
            return
        ended = self.meter.interval()
        loss = sum(self._losses) / len(self._losses)
        values = {
            "loss": loss,
            "lr": self._lr,
            "grad_norm": self._norm,
            "images": self.state.images,
            "bad": self.bad_seen,
        }
        self._losses.clear()
        if self.world.is_main:
            ledger.append(self.run / "ledger.jsonl", ended.line(attempt=self.attempt, loss=loss), durable=force)
        self.metrics.interval(ended, values, self.meter.eta(self.config.train.steps))

    def incident(self, kind: str, detail: str) -> None:
        if self.world.is_main:
            line = {"time": time.time(), "attempt": self.attempt, "step": self.state.step, "kind": kind}
            append_json(self.run / "incidents.jsonl", line | {"detail": detail})

    def close(self, status: str) -> None:
        self.reader.close()
        self.metrics.close()
        if self.world.is_main:
            self.run.set_status(status)


def fit(job: Job) -> int:
    """Train from the job's step to ``train.steps``; returns the exit code (0 done, 75 saved on a signal)."""
    for micro_batches in job.reader:
        if job.due(job.config.eval.every):
            job.evaluate()
        if job.due(job.config.logging.samples_every):
            job.draw_samples()
        if job.due(job.config.checkpoint.every) or (job.stop_requested and job.state.step > job.started_at):
            job.save()
        if job.finished or job.stop_requested:
            break
        job.step(micro_batches)
        job.log()
    return EXIT_DONE if job.finished else EXIT_SAVED


def train(config: Config, run_path: Path) -> int:
    """Join the world, resume or begin the run in ``run_path``, train, and leave it closed; returns the exit code."""
    world = join(config.launch.timeout_minutes)
    job = prepare(config, run_path, world)
    handlers = {s: signal.signal(s, _asks_to_stop(job)) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    status = "failed"
    try:
        code = fit(job)
        status = "done" if code == EXIT_DONE else "saved"
        if code == EXIT_SAVED:
            job.incident("signal", "saved and stopped; the same command goes on")
            job.metrics.say(f"saved at step {job.state.step} on a signal; the same command goes on from here")
        return code
    except LongskipError as error:
        job.incident("error", str(error))
        raise
    finally:
        job.close(status)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _asks_to_stop(job: Job) -> Callable[[int, Any], None]:
    def handler(number: int, frame: Any) -> None:
        job.stop_requested = True  # all ranks agree on it at the end of the step

    return handler


def prepare(config: Config, run_path: Path, world: World) -> Job:
    """Everything up to the first step; user errors are raised on all ranks alike, before any work is lost."""
    batch = config.batch(world.size)
    run = RunFolder(run_path)
    resuming = bool(on_main(world, lambda: _claim(run, config)))
    source = open_source(config.data.path)
    plan = Plan(len(source), batch.total, config.train.seed)
    on_main(world, lambda: _write_vocabulary(run, config, source))
    vocabulary = build.load_vocabulary(run / "vocabulary.json")

    model = build.build_model(config, len(vocabulary))
    n_parameters = sum(_numel(shape) for _, _, _, shape in model.canonical())
    ds_config = build.deepspeed_config(config, batch, n_parameters=n_parameters, cuda=world.device.type == "cuda")
    backends.configure(config.kernels.by_op())
    engine, optimizer, shards = build.build_engine(config, model, world, ds_config)
    cost = step_cost(config, batch, n_parameters)
    summary = _summary(config, run, cost, batch, n_parameters, source)
    attempt = int(str(on_main(world, lambda: _next_attempt(run))))
    on_main(world, lambda: None if resuming else run.write_identity(config, ds_config, summary))

    state = LoopState(plan.cursor())
    folder, complaints = checkpoint.newest_for_all(run.checkpoints, world.rank)
    if folder is not None:
        state = LoopState.from_json(checkpoint.load(folder, shards))
    if world.is_main:
        ledger.append(run / "ledger.jsonl", ledger.Resumed(attempt, state.step))
        run.set_status("running")

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
        attempt, meter, metrics, Validation(config, world, vocabulary, source), started_at=state.step,
    )  # fmt: skip
    for complaint in complaints:
        job.incident("bad_checkpoint", complaint)
        metrics.say(f"passed over a checkpoint: {complaint}")
    _announce(job, resuming, n_parameters, meter)
    return job


def on_main(world: World, act: Callable[[], object]) -> object:
    """Rank 0's result of ``act`` on every rank; its LongskipError is raised on every rank (none waits for a dead one)."""
    outcome: Any = None
    failure: LongskipError | None = None
    if world.is_main:
        try:
            outcome = {"value": act()}
        except LongskipError as error:
            failure = error
            outcome = {"error": type(error).__name__, "message": str(error)}
    outcome = broadcast_object(outcome)
    if failure is not None:
        raise failure
    if isinstance(outcome, dict) and "error" in outcome:
        kind = getattr(errors, outcome["error"], LongskipError)
        raise (kind if kind is not errors.BadSampleError else DataError)(outcome["message"])
    return outcome["value"]


def step_cost(config: Config, batch: BatchPlan, n_parameters: int) -> StepCost:
    """Exact model and hardware FLOPs (2 per multiply-add) and tokens of one global batch; N counts all trainables."""
    spec = config.backbone()
    one = spec.flops(batch=1)
    hardware = one.model_flops - 2 * one.macs_by_op["patch"]  # the patches need no gradient towards the pictures
    if config.engine.checkpointing:
        ops = ("qkv", "attention", "proj", "mlp", "skip_linear", "ada")
        hardware += 2 * (sum(one.macs_by_op[op] for op in ops) - (2 * spec.width**2 if spec.adaln else 0))  # no head
    return StepCost(
        images=batch.total,
        image_tokens=batch.total * one.image_tokens,
        tokens=batch.total * one.tokens,
        model_flops=batch.total * one.model_flops,
        hardware_flops=batch.total * hardware,
        six_nd=6 * n_parameters * batch.total * one.tokens,
    )


def _claim(run: RunFolder, config: Config) -> bool:
    run.lock()
    try:
        return run.check(config)
    except LongskipError:
        run.unlock()
        raise


def _write_vocabulary(run: RunFolder, config: Config, source: Source) -> None:
    path = run / "vocabulary.json"
    if not path.is_file():
        build.save_vocabulary(path, build.build_vocabulary(config, source))


def _next_attempt(run: RunFolder) -> int:
    return 1 + max((entry.attempt for entry in ledger.read(run / "ledger.jsonl").entries), default=0)


def _summary(
    config: Config, run: RunFolder, cost: StepCost, batch: BatchPlan, n_parameters: int, source: Source
) -> dict[str, Any]:
    counts = config.backbone().param_counts()
    return {
        "name": run.path.name,
        "status": "new",
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
    say(
        f"{config.model.preset}: {n_parameters:,} parameters, {config.train.dtype}, ZeRO-{config.deepspeed.zero_stage}, "
        f"{config.engine.layout} layout, {job.batch}"
    )
    say(f"{len(job.source):,} samples in {config.data.path}; {config.train.steps:,} steps")
    if meter.reason:
        say(meter.reason)
    if resuming:
        say(f"attempt {job.attempt} goes on from step {state.step}")


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


__all__ = ["Job", "LoopState", "barrier", "fit", "prepare", "train"]
