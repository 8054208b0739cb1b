"""The training run: ``prepare()`` builds a Job from a configuration, ``fit()`` is its loop, one column to read."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Literal

from longskip.engine import pulse, signals
from longskip.engine.config import Config
from longskip.engine.distributed import World, join, lost_neighbour
from longskip.engine.job import Job
from longskip.engine.metrics import format_eta
from longskip.engine.prepare import prepare
from longskip.engine.runs import RUNS, RunFolder
from longskip.errors import EXIT_DONE, EXIT_SAVED, LongskipError, RemoteError, RendezvousError

__all__ = ["fit", "prepare", "train"]


def fit(job: Job) -> int:
    """Train from the job's step to ``train.steps``; returns the exit code (0 done, 75 saved on a signal).

    A step is saved before it is looked at: whatever goes wrong with the validation or the samples, its checkpoint lies
    there. What a run cannot read, in training or validation, ends it on all ranks with the last finished step saved.
    """
    beat = pulse.own()
    while True:
        if job.due(job.config.checkpoint.every) or (job.stopping and job.state.step > job.started_at):
            beat.phase("save", finished=job.state.step)
            job.save()
        if job.due(job.config.eval.every) and not job.stopping:
            beat.phase("evaluate", finished=job.state.step)
            job.evaluate()
        if job.due(job.config.logging.samples_every) and not job.stopping:
            beat.phase("samples", finished=job.state.step)
            job.draw_samples()
        if job.finished or job.stopping:
            break
        beat.step(job.state.step + 1)
        job.step(job.read())
        job.log()
    beat.phase("save", finished=job.state.step)  # what is still being written
    return EXIT_DONE if job.finished else EXIT_SAVED


def train(config: Config, run_path: Path) -> int:
    """Join the world, resume or begin the run in ``run_path``, train, and leave it closed; returns the exit code.

    From here on signals are remembered, and stay so until the process ends: a second one must not tear the end.
    """
    signals.listen()
    world = join(config.launch.timeout_minutes)
    try:
        return _train(config, run_path, world)
    except RuntimeError as error:
        if (lost := lost_neighbour(error, f"at step {pulse.own().beat.step}")) is None:
            raise
        raise lost from error


def _train(config: Config, run_path: Path, world: World) -> int:
    try:
        job = prepare(config, run_path, world)
    except Exception as error:
        pulse.own().end("final" if _would_come_again(error) else "failed")
        if world.is_main:
            RunFolder(run_path).sweep_failed_start()
        raise
    status: Literal["done", "saved", "failed"] = "failed"
    word: pulse.Word = "failed"
    began, first = time.monotonic(), job.started_at
    try:
        code = fit(job)
        word = status = "done" if code == EXIT_DONE else "saved"
        if code == EXIT_SAVED:
            if world.is_main:
                job.incident("signal", "saved and stopped; the same command goes on")
            job.metrics.end_line(f"saved at step {job.state.step} on a signal; the same command goes on from here")
        else:
            job.metrics.end_line(*closing_lines(job, first, time.monotonic() - began))
        return code
    except LongskipError as error:
        word = "final" if error.final else "failed"
        if error.alike:
            job.saving.settle()  # of an earlier step; what it holds would be lost with this process
        if world.is_main or not error.alike:
            job.incident("error", str(error))
        raise
    finally:
        job.close(status)
        pulse.own().end(word)


def closing_lines(job: Job, first: int, seconds: float) -> list[str]:
    """What was done since step ``first``, where it lies, and what one can do with it: the last lines of a training."""
    config, run, step = job.config, job.run.path, job.state.step
    steps = step - first
    name = shlex.quote(run.name if run.parent == RUNS else str(run))
    if steps:
        share = f"{steps:,} of its {step:,} steps" if first else f"{steps:,} steps"
        loss = "" if job.metrics.loss is None else f", loss {job.metrics.loss:.4f}"
        told = [f"done: {share} in {format_eta(seconds)}{loss}; the run is in {run}"]
    else:
        told = [
            f"finished before: {run} is at step {step:,} of {config.train.steps:,}, and nothing was trained",
            f"more steps: the same command with train.steps={2 * step} (or any number above {step})",
        ]
    judged = config.data.validation or config.eval.judge != "none" or config.eval.stats or config.eval.clip
    return [
        *told,
        f"next: longskip evaluate {name}{'' if judged else ' --judge nearest'}",
        f"      longskip report {name}",
    ]


def _would_come_again(error: Exception) -> bool:
    """Whether a start that all ranks refused alike would be refused again: what can pass by itself is not meant."""
    passing = (RemoteError, RendezvousError)
    named = isinstance(error, LongskipError) and type(error) is not LongskipError and error.alike
    return named and not isinstance(error, passing)
