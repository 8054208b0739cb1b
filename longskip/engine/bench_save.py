"""``longskip bench save``: what a checkpoint costs a run, beside copying and writing the same bytes plainly.

In each process group, in turns: the rank's state copied in memory (into fresh buffers and into warm ones); the same bytes
written, fsynced and hashed, one after the other, while nothing else runs and while the training runs; and real saves of a
real training, the first time into fresh memory and then into warm.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longskip.engine.bench_common import VERDICTS, about, cores, page, shown, spread, table
from longskip.engine.bench_step import start_ranks
from longskip.engine.config import Config
from longskip.engine.configio import validate
from longskip.engine.data.shapes import write_shapes
from longskip.engine.distributed import all_reduce_sum, barrier, import_deepspeed, join
from longskip.engine.durable import CHUNK
from longskip.engine.job import Job
from longskip.engine.prepare import prepare
from longskip.engine.saving import Saved
from longskip.engine.shards import KINDS, Shards
from longskip.errors import ConfigError

HELD, WHOLE = 1.5, 2.0  # of one copy in memory; of write + fsync + hash
WARM_UP = 3
PICTURES = 256
NEVER = 10**6


def bench_save(
    preset: str = "uvit-tiny",
    *,
    depth: int = 12,
    width: int = 384,
    batch: int = 2,
    ranks: tuple[int, ...] = (1, 2),
    steps: int = 8,
    repeats: int = 5,
    seed: int = 0,
    folder: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure saves of a ZeRO-3 run at each number of ``ranks``; returns the result as JSON values.

    Of each kind of save ``repeats`` are made; ``steps`` plain ones are timed before each. ``folder`` is where checkpoints
    are written (default: the temporary folder). Raises ConfigError for a batch that some of the ranks do not divide,
    LongskipError where a rank fails.
    """
    for world in ranks:
        if world < 1 or batch % world:
            raise ConfigError(
                f"--batch {batch} does not divide over {world} ranks", cure="take a multiple of the ranks"
            )
    if torch.cuda.is_available() and max(ranks) > torch.cuda.device_count():
        raise ConfigError(f"--ranks {max(ranks)} on {torch.cuda.device_count()} GPU(s)", cure="one rank a GPU")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import_deepspeed()  # once here, and not in every forked rank
    load, rows = os.getloadavg(), []
    with tempfile.TemporaryDirectory(prefix="longskip-bench-", dir=folder) as place:
        write_shapes(Path(place) / "data", PICTURES, seed=0)
        for world in ranks:
            begin, here = time.monotonic(), Path(place) / f"ranks-{world}"
            here.mkdir()
            config = _config(Path(place) / "data", preset, depth, width, batch, seed)
            title = f"{world} rank(s)"
            start_ranks(world, measure, (config, steps, repeats, here), max(1, cores() // world), here, title)
            rows.append(_row(here, world))
            progress(f"{title}: {time.monotonic() - begin:.0f} s")
    options = {"preset": preset, "depth": depth, "width": width, "batch": batch, "steps": steps, "repeats": repeats}
    return about("save", options, load, "torch", "deepspeed") | {
        "parameters": rows[0]["parameters"],
        "repeats": repeats,
        "goals": {"held": HELD, "whole": WHOLE},
        "page_cache": "files are new, written through the page cache and fsynced, so that of these processes no page is dirty "
        "when a measurement begins; nothing is read back",
        "ranks": rows,
    }


def _config(data: Path, preset: str, depth: int, width: int, batch: int, seed: int) -> Config:
    return validate(
        {
            "model": {"preset": preset, "resolution": 32, "depth": depth, "width": width},
            "data": {"path": str(data)},
            "train": {"steps": NEVER, "batch_size": batch, "seed": seed},
            "checkpoint": {"every": NEVER, "keep_last": 1},
            "logging": {"every": NEVER, "samples_every": 0, "tensorboard": False},
            "eval": {"every": 0, "samples": 1},
            "deepspeed": {"zero_stage": 3},
        }
    )


# --- in the ranks -----------------------------------------------------------------------------------------------------


def measure(config: Config, steps: int, repeats: int, folder: Path) -> None:
    """In a rank: take turns at all that is measured, and leave the rank's figures in ``folder``; times in seconds."""
    world = join()
    job = prepare(config, folder / "run", world)
    ended: list[Saved] = []
    job.saving.ended = ended.append
    for _ in range(WARM_UP):
        job.step(job.read())
    sources = state_of(job.shards)
    warm = [torch.empty_like(source, device="cpu").copy_(source) for source in sources]
    found: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        found.setdefault(name, []).append(seconds)

    for _ in range(repeats):
        note("copy_fresh", _timed(lambda: [torch.empty_like(s, device="cpu").copy_(s) for s in sources]))
        note("copy_warm", _timed(lambda: [w.copy_(s) for w, s in zip(warm, sources, strict=True)]))
        _quiet()
        for name, seconds in _plainly(folder / f"plain-{world.rank}", warm).items():
            note(name, seconds)
        note("plain_meanwhile", _plainly_meanwhile(job, folder / f"plain-{world.rank}", warm))
        for kind in ("fresh", "warm"):
            plain = [_timed_step(job) for _ in range(steps)]
            if kind == "fresh":
                job.saving.release()
            _quiet()
            job.save()
            during = []
            while not ended:
                during.append(_timed_step(job))
            (saved,) = ended
            ended.clear()
            note(f"held_{kind}", saved.held)
            note(f"whole_{kind}", saved.seconds)
            note("step", statistics.median(plain))
            note("steps_meanwhile", len(during))
            if len(during) > 2:  # the last of them sees the end of the save
                note("step_meanwhile", statistics.median(during[:-1]))
        _quiet()
        job.save(now=True)
        note("foreground", ended.pop().seconds)
    record = {
        "bytes": sum(4 * source.numel() for source in sources),
        "parameters": sum(shape.numel() for shape in (torch.Size(s) for _, _, _, s in job.shards.model.canonical())),
        "times": found,
    }
    (folder / f"rank-{world.rank}.json").write_text(json.dumps(record), "utf-8")
    barrier()


def state_of(shards: Shards) -> list[torch.Tensor]:
    """All that the rank keeps, whole: masters, moments, EMA, each as large as DeepSpeed has made it."""
    masters = {id(item.master): item.master for item in shards.owned()}.values()
    return [
        (master if kind == "weight" else shards.optimizer.state_of(master)[kind]).detach().view(-1)
        for master in masters
        for kind in KINDS
    ]


def _quiet() -> None:
    """No garbage, and all ranks here; what was written before has been fsynced."""
    gc.collect()
    barrier()


def _timed(act: Callable[[], object]) -> float:
    _quiet()
    begin = time.perf_counter()
    kept = act()
    seconds = time.perf_counter() - begin
    del kept  # what it takes to give the memory back is not in it
    return seconds


def _timed_step(job: Job) -> float:
    batches = job.read()
    begin = time.perf_counter()
    job.step(batches)
    return time.perf_counter() - begin


def _plainly_meanwhile(job: Job, path: Path, values: list[torch.Tensor]) -> float:
    """The same by a thread, while all ranks train until the last of them is done."""
    _quiet()
    found: list[dict[str, float]] = []
    thread = threading.Thread(target=lambda: found.append(_plainly(path, values)))
    thread.start()
    while all_reduce_sum([float(thread.is_alive())], job.world.device)[0]:
        job.step(job.read())
    return found[0]["plain"]


def _plainly(path: Path, values: list[torch.Tensor]) -> dict[str, float]:
    """Seconds to write, to fsync and to hash these bytes, one after the other."""
    views = [value.view(torch.uint8).numpy().data for value in values]
    pieces = [view[low : low + CHUNK] for view in views for low in range(0, len(view), CHUNK)]
    begin = time.perf_counter()
    with open(path, "wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        written = time.perf_counter()
        os.fsync(file.fileno())
    synced = time.perf_counter()
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    hashed = time.perf_counter()
    path.unlink()
    parts = {"write": written - begin, "fsync": synced - written, "hash": hashed - synced}
    return parts | {"plain": hashed - begin}


# --- figures ----------------------------------------------------------------------------------------------------------


def _row(folder: Path, world: int) -> dict[str, Any]:
    """One number of ranks: of each turn the slowest rank counts; ratios are of the same turn."""
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text("utf-8")) for rank in range(world)]
    times = {
        name: [max(turn) for turn in zip(*(rank["times"].get(name, []) for rank in ranks), strict=False)]
        for name in ranks[0]["times"]
    }
    ratios = {
        "held_fresh": [a / b for a, b in zip(times["held_fresh"], times["copy_fresh"], strict=True)],
        "held_warm": [a / b for a, b in zip(times["held_warm"], times["copy_warm"], strict=True)],
        "whole_fresh": [a / b for a, b in zip(times["whole_fresh"], times["plain"], strict=True)],
        "whole_warm": [a / b for a, b in zip(times["whole_warm"], times["plain"], strict=True)],
        "foreground": [a / b for a, b in zip(times["foreground"], times["plain"], strict=True)],
        "whole_meanwhile": [a / b for a, b in zip(times["whole_warm"], times["plain_meanwhile"], strict=True)],
    }
    if "step_meanwhile" in times:
        base = statistics.median(times["step"])
        ratios["step_meanwhile"] = [value / base for value in times["step_meanwhile"]]
    return {
        "ranks": world,
        "parameters": ranks[0]["parameters"],
        "bytes_per_rank": max(rank["bytes"] for rank in ranks),
        "seconds": {name: spread(values) for name, values in times.items()},
        "ratios": {name: spread(values) for name, values in ratios.items()},
        "met": {
            name: statistics.median(ratios[name]) <= (HELD if name.startswith("held") else WHOLE)
            for name in ("held_fresh", "held_warm", "whole_fresh", "whole_warm")
        },
    }


TIMES = {
    "copy_fresh": "one copy of the rank's state in memory, fresh buffers",
    "copy_warm": "the same, warm buffers",
    "held_fresh": "training held by a save, the copy's memory fresh (a run's first)",
    "held_warm": "training held by a save, the copy's memory warm (all others)",
    "plain": "write + fsync + hash of the same bytes, nothing else running",
    "write": "of which the write",
    "fsync": "of which the fsync",
    "hash": "of which the hash",
    "plain_meanwhile": "write + fsync + hash by a thread while the training runs",
    "whole_fresh": "the whole save, from due to committed, memory fresh",
    "whole_warm": "the whole save, from due to committed, memory warm",
    "foreground": "a save in the foreground, which holds the training all the time",
    "step": "a step",
    "step_meanwhile": "a step while a save is written",
}
RATIOS = {
    "held_fresh": ("training held ÷ one copy, both in fresh memory", HELD),
    "held_warm": ("training held ÷ one copy, both in warm memory", HELD),
    "whole_fresh": ("whole save ÷ write + fsync + hash alone, memory fresh", WHOLE),
    "whole_warm": ("whole save ÷ write + fsync + hash alone, memory warm", WHOLE),
    "whole_meanwhile": ("whole save, memory warm ÷ write + fsync + hash while the training runs", None),
    "foreground": ("save in the foreground ÷ write + fsync + hash alone", None),
    "step_meanwhile": ("a step while a save is written ÷ a step", None),
}


def to_markdown(result: dict[str, Any]) -> str:
    """The result as a page to read."""
    lines = [
        *page("What a checkpoint costs", result, f"{result['repeats']} saves of each kind, in turns"),
        "",
        f"ZeRO-3, {result['parameters']:,} parameters, fp32 with EMA: 16 bytes a parameter over all ranks. Of each turn the "
        "slowest rank counts; ratios are of the same turn. Median (20th–80th percentile). Page cache: "
        f"{result['page_cache']}. A save ends when its rename is on the disk; ranks hear of it at the next step's end.",
    ]
    for row in result["ranks"]:
        seconds, ratios = row["seconds"], row["ratios"]
        lines += ["", f"## {row['ranks']} rank(s), {row['bytes_per_rank']:,} bytes each", ""]
        milliseconds = {name: {key: 1e3 * value for key, value in each.items()} for name, each in seconds.items()}
        shown_times = [(title, shown(milliseconds[name], ",.0f")) for name, title in TIMES.items() if name in seconds]
        lines += [*table(("what", "milliseconds"), shown_times), ""]
        rows = [
            (title, "" if goal is None else f"≤ {goal}", shown(ratios[name], ".2f"), VERDICTS[row["met"].get(name)])
            for name, (title, goal) in RATIOS.items()
            if name in ratios
        ]
        lines += table(("ratio", "asked", "measured", ""), rows)
    return "\n".join(lines) + "\n"
