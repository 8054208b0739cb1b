"""A run in memory: ``Job`` with its place (``LoopState``) and the verbs that the loop is made of."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from longskip.engine import checkpoint, digests, faults, initial, numbers, quarantine, signals, spikes
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
from longskip.engine.saving import Saved, Saving
from longskip.engine.shards import Shards
from longskip.engine.trace import Waits, waits_on
from longskip.engine.validation import Validation
from longskip.errors import CheckpointError, DataError, DesyncError, LongskipError, NonFiniteLossError, SpikeError
from longskip.kernels import backends
from longskip.profiling import ledger
from longskip.profiling.meter import Interval, Meter


@dataclass
class LoopState:
    """Where a run is: everything a resume needs besides the tensors. Counts are global and exact integers.

    A step that was skipped counts as a step, with what was computed for it; Adam's bias correction counts ``step - skipped``.
    """

    cursor: Cursor
    step: int = 0
    images: int = 0
    image_tokens: int = 0
    tokens: int = 0
    model_flops: int = 0
    hardware_flops: int = 0
    six_nd: int = 0
    bad_samples: int = 0  # without those of data.quarantine, which are known
    bad: dict[str, int] = field(default_factory=dict)  # by reason, those of data.quarantine among them
    skipped: int = 0  # steps that moved nothing, since a loss or gradient was not finite
    skipped_in_a_row: int = 0
    recent: list[float] = field(default_factory=list)  # the losses that the next one is compared with
    losses: list[float] = field(default_factory=list)  # finite ones, of the steps since the last line of metrics.jsonl

    def to_json(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("step", *COUNTERS, "bad_samples", "skipped", "skipped_in_a_row")}
        lists = {"losses": list(self.losses), "recent": list(self.recent), "bad": dict(self.bad)}
        return own | lists | {"cursor": self.cursor.to_json()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> LoopState:
        """The inverse of ``to_json``; raises CheckpointError for anything else."""
        try:
            state = cls(**(value | {"cursor": Cursor.from_json(value["cursor"])}))
            counts = [n for name, n in value.items() if name not in ("cursor", "losses", "recent", "bad")]
            if not all(type(n) is int and 0 <= n <= ledger.MOST_COUNT for n in (*counts, *state.bad.values())):
                raise TypeError("a count is none")
            if not all(type(loss) in (int, float) and math.isfinite(loss) for loss in (*state.losses, *state.recent)):
                raise TypeError("a loss is none")
        except (KeyError, TypeError, AttributeError, OverflowError, DataError) as error:
            raise CheckpointError(f"a checkpoint's state.json says no run's state: {str(error)[:200]}") from None
        return state


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
    _norm: float | None = None
    _in_spike: bool = False
    _rolled_back: tuple[Path | None, int] = (None, 0)  # to which checkpoint, how often
    _compared_at: int = -1  # the step at which ranks were last found alike
    _lr: float = 0.0
    _waited: float = 0.0
    _waits: Waits | None = None
    _communicated: float = 0.0

    def __post_init__(self) -> None:
        self._waits = waits_on(self.world.device)
        self._communicated = self._waits.seconds if self._waits else 0.0
        self._noted = quarantine.Noted(self.run / "bad_samples.jsonl")
        self.saving = Saving(
            self.run.checkpoints, self.shards, self.config.checkpoint, records=(self.run / "ledger.jsonl",),
            ended=self._save_ended, say=self.metrics.say,
        )  # fmt: skip

    # --- once in a while ----------------------------------------------------------------------------------------------

    def due(self, every: int) -> bool:
        """Whether something done every ``every`` steps is due now; never right after a resume, and at the end."""
        step = self.state.step
        return every > 0 and step > self.started_at and (step % every == 0 or step == self.config.train.steps)

    @property
    def finished(self) -> bool:
        return self.state.step >= self.config.train.steps

    def evaluate(self) -> None:
        """The validation loss; raises DataError on all ranks, the step saved, where a rank cannot read its pictures.

        As before the samples, a save that runs is waited for: whatever happens here, it lies there.
        """
        self.saving.settle()
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
        self.saving.settle()
        try:
            folder = self.validation.samples(self.engine, self.shards, self.objective, self.run.path, self.state.step)
        except LongskipError as error:
            self.incident("no_samples", str(error))
            self.metrics.say(f"step {self.state.step}  no samples: {error}")
            return
        if folder is not None:
            self.metrics.say(f"step {self.state.step}  samples in {folder}")

    def save(self, *, now: bool = False) -> None:
        """Save this step while training goes on; at the run's end, on a signal, and ``now``: return after the commit.

        The ledger's interval ends first, so that none of its lines reaches across a commit; it is on the disk before one.
        """
        self.compare_ranks()
        self._end_ledger_interval()
        ending = self.finished or self.stopping
        saved = self.saving.save(self.state.step, self.state.to_json(), now=now or ending)
        if saved is not None and saved.error is not None and ending:
            raise saved.error

    def _save_ended(self, saved: Saved) -> None:
        """On every rank, at the same place: once a save is committed, or has failed."""
        if saved.error is None:
            self._saved_at = saved.step
            held = f", training held for {1000 * saved.held:.0f} ms" if saved.background else ""
            waited = f" ({1000 * saved.waited:.0f} of them for the save before)" if saved.waited > 0.1 else ""
            self.metrics.say(f"step {saved.step}  saved in {1000 * saved.seconds:.0f} ms{held}{waited}")
        elif saved.background or not (self.finished or self.stopping):
            self.incident("not_saved", str(saved.error), step=saved.step)
            self.metrics.say(f"step {saved.step}  NOT SAVED, training goes on: {saved.error}")

    @contextmanager
    def _last_step_kept(self) -> Iterator[None]:
        """An error that all ranks raise together leaves the last finished step saved, when that is not done yet."""
        try:
            yield
        except LongskipError as error:
            if error.alike:
                self.saving.settle()
                if self.state.step > max(self.started_at, self._saved_at):
                    self.reader.seek(self.state.cursor)  # ranks that have read on, and ranks that could not
                    self.save(now=True)
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

        Where the loss or the gradient is NaN or infinite on any rank, nothing moves on any: the step is skipped with its
        data, or NonFiniteLossError raised on all ranks, as ``train.not_finite`` says. After a loss that jumps the run may
        be back at its last checkpoint (``train.spikes``).
        """
        step = self.state.step + 1
        faults.point("step.begin", step=step)
        self._lr = learning_rate(self.config.optim, step, self.config.train.steps)
        self.optimizer.set_step(step - self.state.skipped, self._lr, ema_decay(self.config.optim, step))
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for micro in micro_batches[:-1]:
            total += self._backward(micro)
            self.engine.step()
        total += self._backward(micro_batches[-1])
        faults.point("step.backward", step=step)
        broken = self._agree(float(total), micro_batches)
        if broken:
            self._not_finite(f"loss is not finite on {broken} rank(s)", micro_batches)
            numbers.leave_out(self.engine, self.optimizer)
        elif self._jumped(micro_batches) and self._roll_back():
            return
        else:
            self._take_step(micro_batches)
        self._count()
        if "flip" in faults.point("step.done", step=step):
            digests.flip(self.shards)
        every = self.config.train.digest_every
        if every and step % every == 0:
            self.compare_ranks()

    def _backward(self, micro: MicroBatch) -> torch.Tensor:
        micro = self.inputs.ready(micro)
        time_ = self.objective.times(micro.time_normal)
        clean = micro.clean.float()
        noised = self.objective.noised(clean, micro.noise, time_)
        prediction = self.engine(noised, time_, **micro.conditions)
        losses = self.objective.loss(prediction, clean, micro.noise, time_, micro.weight)
        losses, told = numbers.disturbed(losses, faults.point("step.loss", step=self.state.step + 1))
        # The mean is over all slots, bad ones included, so that ranks need not agree on how many were good.
        self.engine.backward(losses.sum() / self.batch.micro)
        return told.detach().double().sum()

    def _agree(self, loss_sum: float, micro_batches: list[MicroBatch]) -> int:
        """One small all-reduce a step: the global loss, bad samples, and whether any rank was asked to stop.

        Returns on how many ranks the loss is not finite.
        """
        bad = [entry for micro in micro_batches for entry in micro.bad]
        reasons = quarantine.count_reasons(bad)
        with tolerant("bad_samples.jsonl"):
            self._noted.add(bad, self.state.step + 1)
        finite = math.isfinite(loss_sum)
        told = self._tell(
            {
                "loss": loss_sum if finite else 0.0,
                **{f"bad/{reason}": count for reason, count in reasons.items()},
                "stop": signals.asked(),
                "broken": not finite,
            }
        )
        self.stopping = told["stop"] > 0
        broken = round(told["broken"])
        if not broken:
            self.state.losses.append(told["loss"] / self.batch.total)
            self._ledger_losses.append(told["loss"] / self.batch.total)
        for reason in reasons:
            if count := round(told[f"bad/{reason}"]):
                self.state.bad[reason] = self.state.bad.get(reason, 0) + count
                self.state.bad_samples += count if reason != quarantine.QUARANTINED else 0
        seen = (self.state.step + 1) * self.batch.total
        if self.state.bad_samples > self.config.data.max_bad_share * max(seen, 100):
            error = DataError(
                f"{self.state.bad_samples} of {seen} samples were bad ({quarantine.told(self.state.bad)}), above "
                f"data.max_bad_share {self.config.data.max_bad_share}; see {self.run / 'bad_samples.jsonl'}",
                cure="longskip data lint names them; repair the data, pass them over (data.quarantine) or raise the share",
            )
            error.alike = error.final = True
            raise error
        return broken

    def _tell(self, figures: dict[str, float]) -> dict[str, float]:
        """The step's control figures summed over all ranks, in one small all-reduce; each rank names the same ones."""
        figures = figures | {"save": self.saving.figure}
        told = dict(zip(figures, all_reduce_sum([float(v) for v in figures.values()], self.world.device), strict=True))
        self.saving.hear(told.pop("save"))
        return told

    def _take_step(self, micro_batches: list[MicroBatch]) -> None:
        """Clip, update, average; nothing of it where the gradient is not finite."""
        norm = numbers.update(self.engine, self.optimizer, self.shards)
        if math.isinf(norm):
            self._not_finite("gradient is not finite", micro_batches)
            return
        self._norm = norm
        self.state.skipped_in_a_row = 0

    def _not_finite(self, what: str, micro_batches: list[MicroBatch]) -> None:
        """Count and note a step that moves nothing; raises NonFiniteLossError on all ranks where it is one too many."""
        group, state = self.config.train, self.state
        step, self._norm = state.step + 1, None
        in_a_row = state.skipped_in_a_row + 1
        enough = group.not_finite == "stop" or in_a_row >= group.not_finite_limit
        samples, keys = _samples_of(micro_batches)
        self.incident(
            "not_finite" if enough else "skipped_step", f"the {what} at step {step}; samples of this rank: {samples}",
            step=step, reason=what, samples=samples, keys=keys,
        )  # fmt: skip
        if not enough:
            state.skipped, state.skipped_in_a_row = state.skipped + 1, in_a_row
            self.metrics.say(f"step {step}  SKIPPED, nothing has moved: the {what}; incidents.jsonl lists the samples")
            return
        self.saving.settle()  # the cure names the newest checkpoint
        row = f", {in_a_row} steps in a row (train.not_finite_limit)" if group.not_finite == "skip" else ""
        error = NonFiniteLossError(
            f"the {what} at step {step}{row}; no weight has moved since step {step - in_a_row}; "
            f"{self.run / 'incidents.jsonl'} lists the samples of every rank",
            cure=initial.lower_rate(self.run.path, self.config),
        )
        error.alike = True
        raise error

    def _jumped(self, micro_batches: list[MicroBatch]) -> bool:
        """Judge the step's loss and note a spike, the first of several in a row; whether the run is to go back."""
        group, state, loss = self.config.train, self.state, self.state.losses[-1]
        found = None if group.spikes == "off" else spikes.judge(loss, state.recent, group.spike_factor)
        before, self._in_spike = self._in_spike, found is not None
        state.recent = [*state.recent, loss][-spikes.WINDOW :]
        if found is None or (before and group.spikes == "note"):
            return False
        step, (samples, keys) = state.step + 1, _samples_of(micro_batches)
        self.incident(
            "spike", f"{found}; samples of this rank: {samples}", step=step, loss=found.loss, median=found.median,
            limit=found.limit, samples=samples, keys=keys,
        )  # fmt: skip
        self.metrics.say(f"step {step}  SPIKE: {found}; incidents.jsonl lists the samples")
        return group.spikes == "rollback"

    def _roll_back(self) -> bool:
        """Go back to the last checkpoint and leave out, from then on, the batch of the step that has just been computed.

        False, and nothing done, where there is no checkpoint. Raises SpikeError on all ranks where the run has been back
        there as often as it may. The ledger's lines since then are superseded, as those of an attempt that ended.
        """
        state = self.state
        batch = (state.cursor.position, state.cursor.advance(self.batch.total).position)
        self.saving.settle()
        folder, complaints = checkpoint.newest_for_all(self.run.checkpoints, self.world.rank)
        for complaint in complaints if self.world.is_main else ():
            self.incident("bad_checkpoint", complaint)
        if folder is None:
            self.metrics.say("no checkpoint to go back to: training goes on")
            return False
        self._rolled_back = (folder, self._rolled_back[1] + 1 if self._rolled_back[0] == folder else 1)
        if self._rolled_back[1] > spikes.ROLLBACKS:
            error = SpikeError(
                f"the loss jumped at step {state.step + 1}, after {spikes.ROLLBACKS} rollbacks to {folder} that left out other "
                "data each time",
                cure=f"{initial.lower_rate(self.run.path, self.config)}, or train.spikes=note",
            )
            error.alike = True
            raise error
        numbers.leave_out(self.engine, self.optimizer)
        self._count()  # what was computed is spent
        self._end_ledger_interval()
        came_from = state.step
        self.state = LoopState.from_json(checkpoint.load(folder, self.shards))
        self.state.cursor = self.state.cursor.skip(batch)
        self.reader.seek(self.state.cursor)
        step, self.attempt = self.state.step, self.attempt + 1
        self.started_at, self._saved_at, self._compared_at, self._in_spike = step, step, -1, False
        self.meter.rewind(step)
        self.metrics.rewind(self.attempt, step)
        if self.world.is_main:
            with tolerant("ledger.jsonl"):
                ledger.append(self.run / "ledger.jsonl", ledger.Resumed(self.attempt, step))
            self.incident(
                "rolled_back", f"from step {came_from} to {folder.name}; positions {batch[0]} to {batch[1]} are left out",
                step=came_from, to_step=step, positions=list(batch),
            )  # fmt: skip
        self.metrics.say(f"step {came_from}  ROLLED BACK to step {step}; its batch is left out from now on")
        return True

    def compare_ranks(self) -> None:
        """Raises DesyncError on all ranks where they differ in what must be the same on all; once a step."""
        state = self.state
        if not self.config.train.digest_every or self.world.size == 1 or self._compared_at == state.step:
            return
        figures = {
            "step": state.step,
            "position": state.cursor.position,
            "cursor": digests.digest_text([state.cursor.to_json(), self.reader.cursor.to_json()]),
            "counters": digests.digest_text(state.to_json()),
            "learning rate": digests.digest_text(self._lr),
            "settings": digests.of_config(self.config),
        }
        try:
            digests.compare(figures, digests.replicated(self.shards), state.step, self.world.device)
        except DesyncError as error:
            if self.world.is_main:
                self.incident("desync", error.message)
            raise
        self._compared_at = state.step

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
        self.metrics.reached(self.state.step)
        if self.world.is_main and self.state.step == self.started_at + 1:
            self._tell_kernels()
        if not self.due(self.config.logging.every):
            return
        eta = self.meter.eta(self.config.train.steps)
        ended = self._end_ledger_interval()
        peaks = [0.0] * self.world.size
        peaks[self.world.rank] = peak_memory(self.world.device)
        values: dict[str, Any] = {
            "loss": _mean(self.state.losses),
            "lr": self._lr,
            "grad_norm": self._norm,
            "images": self.state.images,
            "bad": self.state.bad_samples,
            "bad_reasons": dict(self.state.bad),
            "skipped": self.state.skipped,
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

    def _end_ledger_interval(self) -> Interval:
        ended = self.meter.peek()
        if ended.step == ended.from_step:
            return ended
        ended = self.meter.interval()
        if self.world.is_main:
            line = ended.line(attempt=self.attempt, loss=_mean(self._ledger_losses))
            with tolerant("ledger.jsonl"):
                ledger.append(self.run / "ledger.jsonl", line)
        self._ledger_losses.clear()
        return ended

    def incident(self, kind: str, detail: str, **more: Any) -> None:
        """One line of incidents.jsonl; any rank may write its own. ``more``: further fields, or another ``step``."""
        line = {"time": time.time(), "attempt": self.attempt, "step": self.state.step, "rank": self.world.rank}
        with tolerant("incidents.jsonl"):
            append_json(self.run / "incidents.jsonl", line | {"kind": kind, "detail": detail} | more)

    def close(self, status: str) -> None:
        self.saving.close()
        self.reader.close()
        if (close := getattr(self.source, "close", None)) is not None:  # folders have nothing to close
            close()
        self.metrics.close()
        if self.world.is_main:
            with tolerant("run.json"):
                self.run.note(status=status, bad_samples=dict(self.state.bad))


def _samples_of(micro_batches: list[MicroBatch]) -> tuple[list[int], list[str]]:
    """Numbers and keys of what this rank has read for a step."""
    samples = [int(i) for micro in micro_batches for i in micro.samples]
    return samples, [key for micro in micro_batches for key in micro.keys]


def _mean(losses: list[float]) -> float | None:
    """None where no step had a finite loss."""
    return sum(losses) / len(losses) if losses else None
