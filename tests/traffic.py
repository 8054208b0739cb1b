"""Real ranks that take steps under ``engine.trace``, beside the closed form. ``python -m tests.traffic`` prints the table.

All cases of a world run in the same forked processes, one engine after another: a case costs a second instead of four.
"""

from __future__ import annotations

import json
import tempfile
import time
import timeit
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from longskip.engine.bench_common import shown, spread
from longskip.engine.config import Config
from longskip.models.presets import preset
from longskip.profiling.traffic import Collective, total, traffic
from tests.ranks import run_ranks, small_config

STEPS = 3
TITLE = "# Collectives of a ZeRO step: predicted and traced"


@dataclass(frozen=True)
class Case:
    """A small U-ViT's run on ``world`` ranks; ``zero``: laid over DeepSpeed's zero_optimization, ``groups``: over the YAML."""

    stage: int
    layout: str = "flat"
    dtype: str = "fp32"
    accumulation: int = 1
    checkpointing: int = 0
    world: int = 2
    zero: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"stage {self.stage}", self.layout, self.dtype, f"{self.world} ranks"]
        parts += [f"accumulation {self.accumulation}"] if self.accumulation > 1 else []
        parts += [f"checkpointing {self.checkpointing}"] if self.checkpointing else []
        parts += [f"{key.removeprefix('stage3_')} {value}" for key, value in self.zero.items()]
        for group in self.groups.values():
            for key, value in group.items():
                said = " ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
                parts.append(f"{key} {said}")
        return ", ".join(parts)

    def config(self, data: Path, folder: Path) -> Config:
        micro = 2
        groups: dict[str, dict[str, Any]] = {
            "deepspeed": {"zero_stage": self.stage},
            "engine": {"layout": self.layout, "checkpointing": self.checkpointing},
            "train": {
                "dtype": self.dtype, "micro_batch": micro, "batch_size": micro * self.world * self.accumulation,
            },
        }  # fmt: skip
        if self.zero:
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / "deepspeed.json"
            file.write_text(json.dumps({"zero_optimization": self.zero}), "utf-8")
            groups["deepspeed"]["config"] = str(file)
        for name, group in self.groups.items():
            groups[name] = groups.get(name, {}) | group
        return small_config(data, **groups)


# Few tensors are small enough here to stay gathered. AHEAD: what has been fetched ahead for its second use is kept for
# it, however far that is.
SCARCE = {"stage3_param_persistence_threshold": 3000, "stage3_prefetch_bucket_size": 30_000}
TIGHT = SCARCE | {"stage3_max_reuse_distance": 150_000, "stage3_max_live_parameters": 120_000}
AHEAD = SCARCE | {"stage3_prefetch_bucket_size": 150_000, "stage3_max_reuse_distance": 0}
_NOTHING = {
    "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0,
}  # fmt: skip
_ADALN = {"model": {"adaln": True, "time_mlp": True}}
_LAYERS = {"encoders": {"text": {"kind": "words", "depth": 1}}}
_NO_TEXT = {"encoders": {"text": {"kind": "none"}}, "diffusion": {"caption_dropout": 0}}

OFFLOAD = {"deepspeed": {"offload_optimizer": "cpu"}}

COVERING = (
    Case(0),
    Case(0, "named", "bf16", 2, 1),
    Case(1, "named", "fp32", 2, 2),
    Case(1, "flat", "bf16", zero={"reduce_bucket_size": 70_000}),
    Case(1, "named", "fp32", zero={"reduce_bucket_size": 65_000, "overlap_comm": True}, groups=_LAYERS),
    Case(2, "flat", "fp32", 2, 1),
    Case(2, "named", "bf16", zero={"reduce_bucket_size": 40_000}, groups=_ADALN),
    Case(3),
    Case(3, "named", "bf16", 2, 2),
    Case(3, "flat", "bf16", 2, 1, zero=AHEAD),
    Case(3, "flat", "fp32", 2, 2, zero=TIGHT),
    Case(3, "named", "fp32", 1, 1, zero=TIGHT, groups=_ADALN),
    Case(3, "named", "bf16", zero=_NOTHING | {"sub_group_size": 16_384}),  # which some groups reach exactly
    Case(3, "flat", "fp32", zero=TIGHT | {"reduce_bucket_size": 60_000}, groups=_NO_TEXT),
    Case(3, "flat", "bf16", zero=SCARCE, groups={"deepspeed": {"offload_optimizer": "cpu", "offload_param": "cpu"}}),
)
OFFLOADED = (
    Case(1, "named", "fp32", 2, groups=OFFLOAD),
    Case(2, "flat", "bf16", 2, 1, groups=OFFLOAD),
    Case(3, "named", "fp32", 1, 2, zero=TIGHT, groups=OFFLOAD),
)
THREE_RANKS = (
    Case(1, "named", "bf16", world=3, groups=_LAYERS),
    Case(3, "named", "fp32", 2, 1, world=3, zero=SCARCE, groups=_LAYERS),
)


def cross_product(stage: int) -> list[Case]:
    choices = product(("flat", "named"), ("fp32", "bf16"), (1, 2), (0, 1, 2))
    return [Case(stage, *choice, zero=TIGHT if stage == 3 else {}) for choice in choices]


def traced(cases: Sequence[Case], data: Path, folder: Path) -> list[list[dict[str, Any]]]:
    """A case and step → ``{"traced": {kind: [count, bytes]}, "predicted": …, "why": rows}``; all of one world."""
    jobs = [
        (case.config(data, folder / f"{index}"), folder / f"run-{index}", folder / f"{index}.json")
        for index, case in enumerate(cases)
    ]
    (world,) = {case.world for case in cases}
    codes = run_ranks(world, _steps, jobs)
    assert codes == [0] * world, codes
    return [json.loads(out.read_text("utf-8")) for _, _, out in jobs]


def _steps(jobs: Iterable[tuple[Config, Path, Path]]) -> None:
    """In a rank: ``STEPS`` steps of every job under a trace; the first rank writes what it saw."""
    from longskip.engine import vocabulary
    from longskip.engine.distributed import join
    from longskip.engine.prepare import prepare
    from longskip.engine.trace import Trace, predicted

    world = join()
    for config, run, out in jobs:
        job = prepare(config, run, world)
        words = len(vocabulary.words_of(run, config) or ())
        resolved = json.loads((run / "ds_config.json").read_text("utf-8"))
        lines = []
        for step in range(1, STEPS + 1):
            with Trace() as trace:
                job.step(job.read())
                job.log()
            rows = predicted(config, resolved, words, world.size, logs=True, step=step)
            lines.append({"traced": trace.by_kind(), "predicted": total(rows), "why": [vars(row) for row in rows]})
        rows = predicted(config, resolved, words, world.size, logs=True)
        lines.append({"predicted": total(rows), "why": [vars(row) for row in rows]})
        if world.is_main:
            out.write_text(json.dumps(lines), "utf-8")
        job.close("done")


# -- the cost of measuring the time in collectives -----------------------------------------------------------------------

ROUNDS, TURN = 20, 8  # turns of this many steps, with the measuring and without it one after the other


def cost(layout: str, data: Path, folder: Path) -> dict[str, Any]:
    """``{"waits": a step, "more": seconds a wait, "wall": ratios, "cpu": ratios}``: step time with ``Waits`` ÷ without,
    pair by pair, and what a wait for a collective that is done takes longer."""
    groups = {"train": {"steps": 10**6}, "logging": {"every": 10**6}, "checkpoint": {"every": 0}}
    config = Case(3, layout, groups=groups).config(data, folder)
    assert run_ranks(2, _turns, config, folder / "run", folder / "cost.json") == [0, 0]
    found: dict[str, Any] = json.loads((folder / "cost.json").read_text("utf-8"))
    return found


def _turns(config: Config, run: Path, out: Path) -> None:
    import torch

    from longskip.engine.distributed import barrier, join
    from longskip.engine.prepare import prepare

    plain: Any = torch.distributed.Work.wait
    world = join()
    job = prepare(config, run, world)
    measured: Any = torch.distributed.Work.wait
    assert measured is not plain
    micro_batches, calls = job.read(), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return measured(*args, **kwargs)

    def turn(wait: Any) -> tuple[float, float]:
        torch.distributed.Work.wait = wait  # type: ignore[method-assign]
        barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(TURN):
            job.step(micro_batches)
        return time.perf_counter() - wall, time.process_time() - cpu

    turn(plain)  # to warm up
    pairs = []
    for index in range(ROUNDS):
        first, second = (measured, plain) if index % 2 else (plain, measured)
        one, other = turn(first), turn(second)
        pairs.append((one, other) if first is measured else (other, one))
    turn(counted)
    if world.is_main:
        ratios = {name: [a[i] / b[i] for a, b in pairs] for i, name in enumerate(("wall", "cpu"))}
        work = torch.distributed.all_reduce(torch.zeros(1), async_op=True)
        plain(work)
        with_it, without = (min(timeit.repeat(lambda w=w: w(work), number=10_000)) / 1e4 for w in (measured, plain))
        out.write_text(json.dumps({"waits": round((calls - 1) / TURN), "more": with_it - without} | ratios), "utf-8")
    else:
        torch.distributed.all_reduce(torch.zeros(1))
    job.close("done")


# -- the page ----------------------------------------------------------------------------------------------------------


def page(cases: Sequence[Case], results: Sequence[list[dict[str, Any]]], costs: dict[str, dict[str, Any]]) -> str:
    lines = [
        TITLE,
        "",
        f"`python -m tests.traffic`: a small U-ViT (`uvit-tiny` and variations of it) on real processes over gloo, {STEPS} "
        "steps of each case under a trace of torch's process groups, beside the closed form of "
        "`longskip/profiling/traffic.py`. Cells: collectives ×, and their payload in bytes (what goes into an all-reduce, a "
        "reduce-scatter or a broadcast, what comes out of an all-gather), of a step that ends with a line of metrics. The "
        "first step is shown where it is another one: ZeRO-3 takes down the order of the modules there.",
        "",
        "| run | step | all-reduce | all-gather | reduce-scatter | broadcast | predicted = traced |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, steps in zip(cases, results, strict=True):
        shown = (0, STEPS - 1) if case.stage == 3 else (STEPS - 1,)
        for index in shown:
            counts = steps[index]["traced"]
            cells = [_cell(counts.get(kind)) for kind in ("all_reduce", "all_gather", "reduce_scatter", "broadcast")]
            same = "yes" if all(step["traced"] == step["predicted"] for step in steps[:STEPS]) else "NO"
            lines.append(f"| {case} | {index + 1} | {' | '.join(cells)} | {same} |")
    lines += ["", "## By the closed form: real sizes", "", *_sizes()]
    lines += ["", "## What measuring the time in collectives costs", "", *_costs(costs)]
    return "\n".join(lines) + "\n"


def _cell(pair: Sequence[int] | None) -> str:
    return f"{pair[0]:,} ×, {pair[1]:,}" if pair else ""


def _sizes() -> list[str]:
    world = 64
    lines = [
        f"bf16, {world} ranks, one micro-batch a step, every block checkpointed, the embedded texts read from disk; sent: "
        "what a rank sends in a ring.",
        "",
        "| model | stage | layout | collectives | payload GB | sent GB | sent, in weights |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, stage, layout in product(("uvit-0.6b", "uvit-8b"), (0, 1, 2, 3), ("flat", "named")):
        spec = preset(name)
        rows = traffic(spec.parameters(), world=world, stage=stage, dtype_bytes=2, layout=layout, checkpointing=1)
        payload, sent = sum(row.bytes for row in rows), sum(row.wire_bytes(world) for row in rows)
        count = sum(row.count for row in rows)
        weights = 2 * spec.param_counts().total
        figures = f"{count:,} | {payload / 1e9:.3f} | {sent / 1e9:.3f} | {sent / weights:.3f}"
        lines.append(f"| {name} | {stage} | {layout} | {figures} |")
    return lines


def _costs(costs: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        f"Stage 3 on 2 ranks, {ROUNDS} turns of {TURN} steps with `engine.trace.Waits` and {ROUNDS} without, by turns in the "
        "same processes: step time with ÷ without, pair by pair, median (20th–80th percentile); and what a wait for a "
        "collective that is done takes longer, best of five.",
        "",
        "| layout | waits a step | a wait | processor time | wall time |",
        "|---|---|---|---|---|",
    ]
    for layout, found in costs.items():
        cpu, wall = (shown(spread(found[name]), ".3f") for name in ("cpu", "wall"))
        lines.append(f"| {layout} | {found['waits']} | + {1e6 * found['more']:.2f} µs | {cpu} | {wall} |")
    return lines


def rows_of(step: dict[str, Any]) -> list[Collective]:
    return [Collective(**row) for row in step["why"]]


def main() -> None:
    from longskip.engine.data.shapes import write_shapes
    from longskip.engine.distributed import import_deepspeed

    import_deepspeed()  # once here, and not in every forked rank
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        write_shapes(data / "train", 60, seed=0)
        write_shapes(data / "validation", 20, seed=1)
        two = COVERING + OFFLOADED
        results = traced(two, data, Path(name) / "two") + traced(THREE_RANKS, data, Path(name) / "three")
        costs = {layout: cost(layout, data, Path(name) / layout) for layout in ("flat", "named")}
    text = page(two + THREE_RANKS, results, costs)
    Path("docs/results/traffic.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
