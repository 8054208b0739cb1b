"""A run in memory: ``Job`` with its place (``LoopState``) and the verbs that the loop is made of."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from longskip.engine import checkpoint, faults, initial, signals
from longskip.engine.config import BatchPlan, Config
from longskip.engine.costs import COUNTERS, StepCost
from longskip.engine.data.plan import Cursor
from longskip.engine.data.reader import MicroBatch, Reader
from longskip.engine.data.sources import Source
from longskip.engine.diffusion import Objective
from longskip.engine.distributed import World, agree, all_reduce_sum, device_name_of, peak_memory
from longskip.engine.inputs import Inputs
from longskip.engine.metrics import Metrics
from longskip.engine.optim import AdamW, ema_decay, learning_rate
from longskip.engine.runs import RunFolder, append_json, tolerant
from longskip.engine.shards import Shards
from longskip.engine.trace import Waits, waits_on
from longskip.engine.validation import Validation
from longskip.errors import CheckpointError, DataError, LongskipError, NonFiniteLossError
from longskip.kernels import backends
from longskip.profiling import ledger
from longskip.profiling.meter import Interval, Meter


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
    objective: Objective
    inputs: Inputs
    cost_of: Callable[[Cursor], StepCost]  # of the global batch that starts at a cursor
    state: LoopState
    attempt: int
    meter: Meter
    metrics: Metrics
    validation: Validation
    started_at: int = 0
    stopping: bool = False  # agreed by all ranks; what this rank alone was asked is signals.asked()
    _saved_at: int = -1
    _ledger_losses: list[float] = field(default_factory=list)
    _norm: float = 0.0
    _lr: float = 0.0
    _waited: float = 0.0
    _waits: Waits | None = None
    _communicated: float = 0.0

    def __post_init__(self) -> None:
        self._waits = waits_on(self.world.device)
        self._communicated = self._waits.seconds if self._waits else 0.0

    # --- once in a while ----------------------------------------------------------------------------------------------

    def due(self, every: int) -> bool:
        """Whether something done every ``every`` steps is due now; never right after a resume, and at the end."""
        step = self.state.step
        return every > 0 and step > self.started_at and (step % every == 0 or step == self.config.train.steps)

    @property
    def finished(self) -> bool:
        return self.state.step >= self.config.train.steps

    def evaluate(self) -> None:
        """The validation loss; raises DataError on all ranks, the step saved, where a rank cannot read its pictures."""
        with self._last_step_kept():
            values = self.validation.loss(self.engine, self.shards, self.objective)
        if values is not None:
            self.metrics.record(self.state.step, values)
            self.metrics.say(
                f"step {self.state.step}  validation loss {values['validation/loss']:.4f} (EMA weights, times evenly spread)"
            )

    def draw_samples(self) -> None:
        """Draw the run's prompts. A LongskipError, which the ranks agree on, is an incident and the training goes on.

        Any other error ends the run, loudly: it may be of one rank alone (memory that ran out, a library's fault), whose
        neighbours are somewhere else in the same collectives; what is due to be saved at this step has been.
        """
        try:
            folder = self.validation.samples(self.engine, self.shards, self.objective, self.run.path, self.state.step)
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
        self._saved_at = self.state.step
        self.metrics.say(f"step {self.state.step}  saved in {1000 * (time.monotonic() - begin):.0f} ms")

    @contextmanager
    def _last_step_kept(self) -> Iterator[None]:
        """An error that all ranks raise together leaves the last finished step saved, when that is not done yet."""
        try:
            yield
        except LongskipError as error:
            if error.alike and self.state.step > max(self.started_at, self._saved_at):
                self.save()
            raise

    # --- the step -----------------------------------------------------------------------------------------------------

    def read(self) -> list[MicroBatch]:
        """This rank's micro-batches of the next step.

        Where a rank cannot read its own, all raise the same DataError here, before any of them is in the collectives of
        the step, and the last finished step is saved.
        """
        batches: list[MicroBatch] = []
        failure = None
        try:
            batches = next(self.reader)
        except LongskipError as error:
            failure = error
        with self._last_step_kept():
            agree(failure, f"read its samples of step {self.state.step + 1}", self.world.device)
        return batches

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
        micro = self.inputs.ready(micro)
        time_ = self.objective.times(micro.time_normal)
        clean = micro.clean.float()
        noised = self.objective.noised(clean, micro.noise, time_)
        prediction = self.engine(noised, time_, **micro.conditions)
        losses = self.objective.loss(prediction, clean, micro.noise, time_, micro.weight)
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
        told = self._tell(
            {
                "loss": loss_sum if finite else 0.0,
                "bad": len(bad),
                "stop": signals.asked(),
                "broken": not finite,
            }
        )
        self.stopping = told["stop"] > 0
        if told["broken"]:
            raise self._not_finite(f"loss is not finite on {round(told['broken'])} rank(s)", micro_batches)
        total, n_bad = told["loss"], told["bad"]
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

    def _tell(self, figures: dict[str, float]) -> dict[str, float]:
        """The step's control figures summed over all ranks, in one small all-reduce; each rank names the same ones."""
        return dict(zip(figures, all_reduce_sum([float(v) for v in figures.values()], self.world.device), strict=True))

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
            cure=initial.lower_rate(self.run.path, self.config),
        )
        error.alike = True
        return error

    def _count(self) -> None:
        state = self.state
        counts = self.cost_of(state.cursor).counts()
        state.step += 1
        state.cursor = state.cursor.advance(self.batch.total)
        for counter, value in counts.items():
            setattr(state, counter, getattr(state, counter) + value)
        waited, self._waited = self.reader.data_wait_seconds - self._waited, self.reader.data_wait_seconds
        communication = None
        if self._waits is not None:  # of evaluations and checkpoints since the last step too, as the meter's wall time
            communication, self._communicated = self._waits.seconds - self._communicated, self._waits.seconds
        self.meter.add(**counts, data_wait=waited, communication=communication)

    def log(self) -> None:
        """When it is due: one ledger line, one metrics line, one line to read."""
        if self.world.is_main and self.state.step == self.started_at + 1:
            self._tell_kernels()
        if not self.due(self.config.logging.every):
            return
        eta = self.meter.eta(self.config.train.steps)
        ended = self._end_ledger_interval()
        peaks = [0.0] * self.world.size
        peaks[self.world.rank] = peak_memory(self.world.device)
        values: dict[str, Any] = {
            "loss": sum(self.state.losses) / len(self.state.losses),
            "lr": self._lr,
            "grad_norm": self._norm,
            "images": self.state.images,
            "bad": self.state.bad_samples,
            "model_flops": self.state.model_flops,
            "six_nd": self.state.six_nd,
            "peaks": all_reduce_sum(peaks, self.world.device),
        }
        self.state.losses.clear()
        self.metrics.interval(ended, values, eta)

    def _tell_kernels(self) -> None:
        """After an attempt's first step: which implementation served each op, and why, in the log and in run.json."""
        served = backends.served()
        reasons: dict[tuple[str, str], list[str]] = {}
        for op, names in served.items():
            for name, reason in names.items():
                reasons.setdefault((name, reason), []).append(op)
        for (name, reason), ops in reasons.items():
            self.metrics.say(f"kernels: {', '.join(ops)} by {name} ({reason})")
        device = device_name_of(self.world.device)
        with tolerant("run.json"):
            self.run.note(kernels=served, kernels_chosen={"device": device, "choices": backends.chosen()})

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
        if (close := getattr(self.source, "close", None)) is not None:  # folders have nothing to close
            close()
        self.metrics.close()
        if self.world.is_main:
            with tolerant("run.json"):
                self.run.note(status=status)
