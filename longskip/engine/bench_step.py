"""``longskip bench step``: one training step of ours beside stock DeepSpeed's and a bare torch loop's, in one run.

The contenders take turns in fresh processes (A B C … A B C …), train the same model from the same initial values on the
same batches, and are compared only where their losses agree. Batches are read before the clock starts. On a CPU the
primary figure is processor time, summed over the ranks and all their threads, which a busy machine disturbs little.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longskip.engine import bench_rivals
from longskip.engine.bench_common import VERDICTS, about, cores, page, shown, spread, table
from longskip.engine.bench_rivals import declared
from longskip.engine.config import Config
from longskip.engine.configio import validate
from longskip.engine.data.plan import Plan
from longskip.engine.data.reader import MicroBatch, Reader
from longskip.engine.data.shapes import write_shapes
from longskip.engine.data.sources import open_source
from longskip.engine.distributed import World, barrier, import_deepspeed, join
from longskip.engine.inputs import Inputs
from longskip.engine.ports import free_port
from longskip.engine.prepare import prepare
from longskip.engine.trace import Trace
from longskip.engine.vocabulary import build_vocabulary
from longskip.errors import ConfigError, LongskipError

WARM_UP = 3  # ZeRO-3 learns the order of the modules in its first step and prefetches from the second on
COUNTED = 2  # steps whose collectives are counted, after the clock has stopped
TOLERANCE = 1e-5  # relative difference of any step's loss
PICTURES = 512
TIME_LIMIT = 600.0  # seconds that one contender's processes are waited for


@dataclass(frozen=True)
class Contender:
    """One way to train: ``kind`` is ``longskip``, ``stock`` (DeepSpeed) or ``bare`` (a torch loop)."""

    name: str
    kind: str
    title: str
    ranks: int
    stage: int
    layout: str = "flat"


def contenders(ranks: int) -> tuple[Contender, ...]:
    return (
        Contender("flat", "longskip", "longskip, ZeRO-3, flat layout", ranks, 3),
        Contender("named", "longskip", "longskip, ZeRO-3, named layout", ranks, 3, "named"),
        Contender("stock", "stock", "plain modules, stock DeepSpeed ZeRO-3, no EMA", ranks, 3),
        Contender("single", "longskip", "longskip, stage 0, flat layout, one process", 1, 0),
        Contender("bare", "bare", "plain modules, bare torch loop, one process", 1, 0),
    )


@dataclass(frozen=True)
class Comparison:
    """``ours`` against ``theirs``: collectives as ours ÷ theirs, step rates as theirs ÷ ours in seconds a step."""

    what: str
    ours: str
    theirs: str
    key: str
    asked: float | None = None  # at most of collectives, at least of step rates


COMPARISONS = (
    Comparison("flat against named layout: collectives", "flat", "named", "collectives", 0.25),
    Comparison("flat against named layout: step rate by processor time", "flat", "named", "cpu_ms", 1.5),
    Comparison("flat against named layout: step rate by wall clock", "flat", "named", "wall_ms", 1.5),
    Comparison("flat layout against stock DeepSpeed: collectives", "flat", "stock", "collectives"),
    Comparison("flat layout against stock DeepSpeed: step rate by processor time", "flat", "stock", "cpu_ms"),
    Comparison("flat layout against stock DeepSpeed: step rate by wall clock", "flat", "stock", "wall_ms"),
    Comparison("stage 0 against the bare loop: step rate by processor time", "single", "bare", "cpu_ms", 0.85),
    Comparison("stage 0 against the bare loop: step rate by wall clock", "single", "bare", "wall_ms", 0.85),
)


def bench_step(
    preset: str = "uvit-tiny",
    *,
    depth: int = 40,
    width: int = 64,
    batch: int = 8,
    ranks: int = 2,
    steps: int = 10,
    repeats: int = 5,
    seed: int = 0,
    only: Sequence[str] = (),
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run every contender (or those named in ``only``) ``repeats`` times, in turns; returns the result as JSON values.

    ``batch`` pictures a step over all ranks; ``steps`` are measured in each process, after ``WARM_UP`` others.
    ``progress`` is told a line per process group. Raises ConfigError for a batch that the ranks do not divide,
    LongskipError when a contender fails.
    """
    if batch % ranks:
        raise ConfigError(f"--batch {batch} does not divide over {ranks} ranks", cure="take a multiple of the ranks")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    elif ranks > torch.cuda.device_count():
        raise ConfigError(f"--ranks {ranks} on {torch.cuda.device_count()} GPU(s)", cure="one rank a GPU")
    import_deepspeed()  # once here, and not in every forked rank
    chosen = [contender for contender in contenders(ranks) if not only or contender.name in only]
    threads = max(1, cores() // ranks)
    model: dict[str, Any] = {"preset": preset, "depth": depth, "width": width, "batch": batch, "seed": seed}
    load, runs = os.getloadavg(), dict[str, list[dict[str, Any]]]()
    with tempfile.TemporaryDirectory(prefix="longskip-bench-") as folder:
        data = Path(folder) / "data"
        configs = {contender.name: _config(contender, data, **model) for contender in chosen}
        bench_rivals.check(configs[chosen[0].name].backbone())
        write_shapes(data, PICTURES, seed=0)
        for repeat in range(repeats):
            for contender in chosen:
                begin, place = time.monotonic(), Path(folder) / f"{contender.name}-{repeat}"
                run_ranks(contender, configs[contender.name], steps, threads, place)
                runs.setdefault(contender.name, []).append(_joined(contender, place))
                progress(f"{repeat + 1}/{repeats}  {contender.title}: {time.monotonic() - begin:.0f} s")
        config = configs[chosen[0].name]
        tensors = declared(config, len(build_vocabulary(config, open_source(str(data))))).values()
    options = model | {"ranks": ranks, "steps": steps, "repeats": repeats}
    reference = runs.get("bare", runs[chosen[0].name])[0]["losses"]
    figures = {contender.name: _figures(contender, runs[contender.name], reference) for contender in chosen}
    present = [comparison for comparison in COMPARISONS if {comparison.ours, comparison.theirs} <= figures.keys()]
    shape = config.backbone()
    return about("step", options, load, "torch", "deepspeed") | {
        "threads_per_rank": threads,
        "model": {
            "preset": preset,
            "tensors": len(tensors),
            "parameters": sum(tensor.numel for tensor in tensors),
            "blocks": shape.n_blocks,
            "width": shape.width,
            "tokens": shape.n_tokens,
        },
        "data": "pictures of drawn shapes through the reader, the same for all, read before the clock starts; fp32",
        "steps": {"warm_up": WARM_UP, "measured": steps, "counted": COUNTED, "batch": batch},
        "repeats": repeats,
        "tolerance": TOLERANCE,
        "contenders": figures,
        "comparisons": [_compare(comparison, runs, figures) for comparison in present],
    }


def _config(contender: Contender, data: Path, *, preset: str, depth: int, width: int, batch: int, seed: int) -> Config:
    never = 10**6
    return validate(
        {
            "model": {"preset": preset, "resolution": 32, "depth": depth, "width": width},
            "data": {"path": str(data)},
            "optim": {"lr": 3e-4, "ema_warmup": False},
            "train": {"steps": never, "batch_size": batch, "seed": seed},
            "engine": {"layout": contender.layout},
            "checkpoint": {"every": never},
            "logging": {"every": never, "samples_every": 0, "tensorboard": False},
            "eval": {"every": 0, "samples": 1},
            "deepspeed": {"zero_stage": contender.stage},
        }
    )


# -- in the ranks ------------------------------------------------------------------------------------------------------


def measure(contender: Contender, config: Config, steps: int, folder: Path) -> None:
    """In a rank: take ``WARM_UP + steps + COUNTED`` steps and leave the rank's figures in ``folder``."""
    world = join()
    step, batches = _trainer(contender, config, folder, world), _batches(config, world, WARM_UP + steps + COUNTED)
    losses = [step(batch) for batch in batches[:WARM_UP]]
    gc.collect()
    _synchronize(world)
    barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    losses += [step(batch) for batch in batches[WARM_UP:-COUNTED]]
    _synchronize(world)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    with Trace() as counted:
        losses += [step(batch) for batch in batches[-COUNTED:]]
    calls = {kind: count / COUNTED for kind, count in sorted(counted.by_op().items())}
    record = {"wall_ms": 1e3 * wall / steps, "cpu_ms": 1e3 * cpu / steps, "calls": calls, "losses": losses}
    (folder / f"rank-{world.rank}.json").write_text(json.dumps(record), "utf-8")


def _synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def _trainer(contender: Contender, config: Config, folder: Path, world: World) -> bench_rivals.Step:
    """The contender's step: a micro-batch → the loss, whose mean over the ranks is the global batch's."""
    if contender.kind == "longskip":
        job = prepare(config, folder / "run", world)

        def step(micro: MicroBatch) -> float:
            job.step([micro])
            return job.state.losses[-1]

        return step
    words = len(build_vocabulary(config, open_source(config.data.path)))
    if contender.kind == "stock":
        return bench_rivals.stock_deepspeed(config, words, config.batch(world.size), world.device)
    return bench_rivals.bare_loop(config, words, world.device)


def _batches(config: Config, world: World, count: int) -> list[MicroBatch]:
    """The rank's micro-batches of the first ``count`` steps, the same for every contender, read beforehand."""
    source, batch = open_source(config.data.path), config.batch(world.size)
    settings = Inputs(config, build_vocabulary(config, source), world.device, source).settings()
    plan = Plan(len(source), batch.total, config.train.seed)
    dropout = config.diffusion.caption_dropout
    with Reader(
        source, plan, rank=world.rank, world=world.size, micro=batch.micro, caption_dropout=dropout, **settings
    ) as reader:
        return [micro for _ in range(count) for micro in next(reader)]


# -- starting them -----------------------------------------------------------------------------------------------------


def run_ranks(contender: Contender, config: Config, steps: int, threads: int, folder: Path) -> None:
    """``measure`` in fresh processes, a process group of their own; what they print goes into ``folder``."""
    folder.mkdir()
    start_ranks(contender.ranks, measure, (contender, config, steps, folder), threads, folder, contender.title)


def start_ranks(
    ranks: int, act: Callable[..., None], arguments: Sequence[Any], threads: int, folder: Path, title: str
) -> None:
    """``act(*arguments)`` in ``ranks`` fresh processes that can join one process group; their logs lie in ``folder``.

    Forked on a CPU, where what is imported here need not be imported there; CUDA does not survive a fork. Raises
    LongskipError with the last lines of a rank that failed.
    """
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    port, processes = free_port(), []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        environment = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        given = (environment, threads, folder / f"rank-{rank}.log", act, *arguments)
        processes.append(context.Process(target=_rank, args=given, daemon=True))
        processes[-1].start()
    deadline = time.monotonic() + TIME_LIMIT
    while any(process.exitcode is None for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):
            break
        time.sleep(0.02)
    ended = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    for rank, code in enumerate(ended):
        if code:
            last = "\n".join((folder / f"rank-{rank}.log").read_text("utf-8").splitlines()[-12:])
            raise LongskipError(f"{title}: rank {rank} ended with {code}\n{last}")
    if None in ended:
        raise LongskipError(f"{title}: not done after {TIME_LIMIT:.0f} s", cure="take a smaller model or fewer steps")


def _rank(environment: dict[str, str], threads: int, log: Path, act: Callable[..., None], *arguments: Any) -> None:
    os.environ.update(environment)
    torch.set_num_threads(threads)
    with log.open("w") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
        try:
            act(*arguments)
        except BaseException:
            traceback.print_exc(file=stream)
            stream.flush()
            os._exit(1)
        os._exit(0)  # at once: a process that unloads torch and its process group may hang or abort


# -- figures -----------------------------------------------------------------------------------------------------------


def _joined(contender: Contender, folder: Path) -> dict[str, Any]:
    """One repeat's figures over all ranks: the slowest wall clock, all processor time, the mean loss."""
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text("utf-8")) for rank in range(contender.ranks)]
    return {
        "wall_ms": max(rank["wall_ms"] for rank in ranks),
        "cpu_ms": sum(rank["cpu_ms"] for rank in ranks),
        "calls": ranks[0]["calls"],
        "collectives": sum(ranks[0]["calls"].values()),
        "losses": np.mean([rank["losses"] for rank in ranks], axis=0).tolist(),
    }


def _figures(contender: Contender, runs: list[dict[str, Any]], reference: list[float]) -> dict[str, Any]:
    apart = max(float(np.max(np.abs(np.array(run["losses"]) / np.array(reference) - 1.0))) for run in runs)
    return {
        "title": contender.title,
        "ranks": contender.ranks,
        "collectives": runs[0]["collectives"],
        "collectives_by_kind": runs[0]["calls"],
        "cpu_ms": spread([run["cpu_ms"] for run in runs]),
        "wall_ms": spread([run["wall_ms"] for run in runs]),
        "loss_difference": apart,
        "losses_agree": apart <= TOLERANCE,
    }


def _compare(asked: Comparison, runs: dict[str, list[dict[str, Any]]], figures: dict[str, Any]) -> dict[str, Any]:
    """The ratio of two contenders, paired by repeat; None where their losses are not those of the reference."""
    line: dict[str, Any] = {"what": asked.what, "asked": asked.asked, "ratio": None, "met": None}
    if not (figures[asked.ours]["losses_agree"] and figures[asked.theirs]["losses_agree"]):
        return line
    fewer = asked.key == "collectives"
    pairs = [
        (ours[asked.key], theirs[asked.key]) for ours, theirs in zip(runs[asked.ours], runs[asked.theirs], strict=True)
    ]
    line["ratio"] = spread([ours / theirs if fewer else theirs / ours for ours, theirs in pairs])
    if asked.asked is not None:
        value = line["ratio"]["median"]
        line["met"] = value <= asked.asked if fewer else value >= asked.asked
    return line


def to_markdown(result: dict[str, Any]) -> str:
    """The result as a page to read."""
    model, steps = result["model"], result["steps"]
    how = f"{result['threads_per_rank']} thread(s) a process"
    lines = [
        *page("The training step, beside stock DeepSpeed and a bare torch loop", result, how),
        "",
        f"A U-ViT of {model['blocks']} blocks, width {model['width']}, {model['tokens']} tokens: {model['tensors']} tensors, "
        f"{model['parameters']:,} parameters; batch {steps['batch']}. Data: {result['data']}. Each process takes "
        f"{steps['warm_up']} steps to warm up, {steps['measured']} measured and {steps['counted']} whose collectives are "
        f"counted; {result['repeats']} fresh processes of each contender, in turns. Milliseconds a step, processor time summed "
        "over the ranks: median (20th–80th percentile). Loss: the worst relative difference of any step from the bare loop.",
        "",
    ]
    rows: list[tuple[Any, ...]] = []
    for figures in result["contenders"].values():
        kinds = ", ".join(f"{kind} {count:g}" for kind, count in figures["collectives_by_kind"].items())
        collectives = f"{figures['collectives']:g}{f' ({kinds})' if kinds else ''}"
        loss = f"{figures['loss_difference']:.1e}{'' if figures['losses_agree'] else ': NOT THE SAME'}"
        times = shown(figures["cpu_ms"], ".1f"), shown(figures["wall_ms"], ".1f")
        rows.append((figures["title"], figures["ranks"], collectives, *times, loss))
    lines += [*table(("contender", "ranks", "collectives a step", "processor ms", "wall ms", "loss"), rows), ""]
    rows = []
    for line in result["comparisons"]:
        sign = "≤" if "collectives" in line["what"] else "≥"
        asked = "" if line["asked"] is None else f"{sign} {line['asked']}"
        measured = "no ratio: the losses differ" if line["ratio"] is None else shown(line["ratio"], ".2f")
        rows.append((line["what"], asked, measured, VERDICTS[line["met"]]))
    return "\n".join([*lines, *table(("comparison", "asked", "measured", ""), rows)]) + "\n"
