"""The collectives of a step: real ranks under a trace against the closed form, in count and to the byte.

DeepSpeed's first step at stage 3 is another one than those that follow: it takes down the order of the modules, gathers
each for itself and drops it at once, and then compares that order among the ranks (in the second micro-batch, so in the
second step where a step has only one). Both are predicted, and are steps 1 and 2 here; from step 3 on all are alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longskip.engine import fitting, partition
from longskip.engine.configio import validate
from longskip.engine.distributed import import_deepspeed
from longskip.engine.trace import Trace, predicted
from longskip.errors import ConfigError, LongskipError
from longskip.models import packed
from longskip.models.presets import preset
from longskip.models.specs import TextEncoderSpec, UViTSpec
from longskip.profiling import traffic as closed_form
from longskip.profiling.runlog import RunLog
from longskip.profiling.traffic import Zero, reduce_bucket, total, traffic
from tests.figures import figure
from tests.ranks import run_ranks
from tests.traffic import COVERING, OFFLOADED, STEPS, THREE_RANKS, TIGHT, Case, cross_product, rows_of, traced

GATHERS = "weights, "  # what the rows of gathered weights begin with


@pytest.fixture(scope="module", autouse=True)
def deepspeed() -> None:
    """Imported once here, and not in every forked rank."""
    import_deepspeed()


def _agree(cases: list[Case] | tuple[Case, ...], data: Path, folder: Path) -> list[list[dict[str, Any]]]:
    results = traced(cases, data, folder)
    different = {
        f"{case}, step {index + 1}": (step["traced"], step["predicted"])
        for case, steps in zip(cases, results, strict=True)
        for index, step in enumerate(steps[:STEPS])
        if step["traced"] != step["predicted"]
    }
    assert not different
    count = sum(pair[0] for steps in results for step in steps[:STEPS] for pair in step["traced"].values())
    size = sum(pair[1] for steps in results for step in steps[:STEPS] for pair in step["traced"].values())
    where = f"{len(cases)} runs of {STEPS} steps on {cases[0].world} ranks"
    figure(f"{where}: {count:,} collectives, {size:,} bytes, all predicted")
    return results


def test_a_covering_set_of_real_runs(shapes: Path, tmp_path: Path) -> None:
    results = _agree(COVERING, shapes, tmp_path)
    for case, steps in zip(COVERING, results, strict=True):
        assert steps[-1]["predicted"] == steps[STEPS - 1]["predicted"], case  # the steady state is reached
        if case.stage == 3:
            assert steps[0]["predicted"] != steps[2]["predicted"], case
    shared = [case for case in COVERING if case.stage == 3 and case.accumulation == 2]
    assert shared  # the second micro-batch's comparison of orders lies in the first step there


@pytest.mark.slow
def test_three_ranks_do_not_divide_the_tensors(shapes: Path, tmp_path: Path) -> None:
    results = _agree(THREE_RANKS, shapes, tmp_path)
    assert rows_of(results[1][STEPS - 1])


@pytest.mark.slow
def test_states_in_host_memory(shapes: Path, tmp_path: Path) -> None:
    _agree(OFFLOADED, shapes, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_cross_product_of_real_runs(shapes: Path, tmp_path: Path, stage: int) -> None:
    _agree(cross_product(stage), shapes, tmp_path)


def _resumed(config: Any, run: Path, stop: int, out: Path) -> None:
    import json

    from longskip.engine import vocabulary
    from longskip.engine.distributed import join
    from longskip.engine.prepare import prepare

    world = join()
    job = prepare(config, run, world)
    words = len(vocabulary.words_of(run, config) or ())
    resolved = json.loads((run / "ds_config.json").read_text("utf-8"))
    same = []
    for step in range(1, stop + 1):
        with Trace() as trace:
            job.step(job.read())
        rows = predicted(config, resolved, words, world.size, step=step, gathered=job.started_at > 0 or None)
        same.append(trace.by_kind() == total(rows))
        if step == 2 and job.started_at:
            job.evaluate()  # between the steps; what follows is the same
    job.save()
    job.close("done")
    if world.is_main:
        out.write_text(json.dumps(same), "utf-8")


@pytest.mark.slow
def test_a_resumed_run_and_an_evaluation_between_the_steps(shapes: Path, tmp_path: Path) -> None:
    for attempt in (1, 2):
        out = tmp_path / f"{attempt}.json"
        config = Case(3, "flat", "fp32", zero=TIGHT).config(shapes, tmp_path / "settings")
        assert run_ranks(2, _resumed, config, tmp_path / "run", 4, out) == [0, 0]
        assert out.read_text("utf-8") == "[true, true, true, true]", attempt


# -- the recorder ------------------------------------------------------------------------------------------------------


def _known_calls(folder: Path) -> None:
    import torch.distributed as dist

    from longskip.engine.distributed import join

    world = join()
    ten, four = torch.zeros(10), torch.zeros(4, dtype=torch.bfloat16)
    with Trace() as trace:
        dist.all_reduce(ten)
        dist.all_gather([torch.zeros(4, dtype=torch.bfloat16) for _ in range(2)], four)
        dist.all_gather_into_tensor(torch.zeros(20), ten, async_op=True).wait()
        dist.reduce_scatter_tensor(torch.zeros(5), ten)
        dist.reduce(ten, 0)
        dist.broadcast(four, 1)
        dist.barrier()
        (torch.ones(3, requires_grad=True) * 2).sum().backward()  # no collective
    assert [(call.kind, call.dtype, call.bytes) for call in trace.calls] == [
        ("all_reduce", "float32", 40), ("all_gather", "bfloat16", 16), ("all_gather", "float32", 80),
        ("reduce_scatter", "float32", 40), ("reduce", "float32", 40), ("broadcast", "bfloat16", 8), ("barrier", "", 0),
    ]  # fmt: skip
    assert trace.by_op()["allgather_base"] == 1 and trace.by_kind()["all_gather"] == (2, 96)
    with pytest.raises(LongskipError, match="alltoall_base is traced"), Trace():
        dist.all_to_all_single(torch.zeros(10), ten)
    (folder / f"{world.rank}").touch()


def test_every_collective_is_seen_with_its_payload(tmp_path: Path) -> None:
    assert run_ranks(2, _known_calls, tmp_path) == [0, 0]
    assert len(list(tmp_path.iterdir())) == 2


# -- time --------------------------------------------------------------------------------------------------------------


def _one_comes_late(folder: Path) -> None:
    import time

    import torch.distributed as dist

    from longskip.engine.distributed import join
    from longskip.engine.trace import waits_on

    world = join()
    waits = waits_on(world.device)
    assert waits is not None and waits is waits_on(world.device)  # installed once
    dist.barrier()
    before, begin = waits.seconds, time.perf_counter()
    if world.rank == 1:
        time.sleep(0.4)
    dist.all_reduce(torch.zeros(10))
    work = dist.all_gather_into_tensor(torch.zeros(20), torch.zeros(10), async_op=True)
    inside, spent = waits.seconds - before, time.perf_counter() - begin
    if world.rank == 0:
        assert 0.3 < inside <= spent
    else:
        assert inside <= spent - 0.4
    before = waits.seconds
    work.wait()
    assert waits.seconds > before
    assert waits_on(torch.device("cuda")) is None
    (folder / f"{world.rank}").touch()


def test_the_time_in_collectives_is_that_of_the_waiting_rank(tmp_path: Path) -> None:
    assert run_ranks(2, _one_comes_late, tmp_path) == [0, 0]
    assert len(list(tmp_path.iterdir())) == 2


def _slow_neighbour(config: Any, run: Path) -> None:
    import time

    from longskip.engine.distributed import join
    from longskip.engine.prepare import prepare

    world = join()
    job = prepare(config, run, world)
    for step in range(6):
        micro_batches = job.read()
        if world.rank == 1 and step >= 3:
            time.sleep(0.3)
        job.step(micro_batches)
        job.log()
    job.close("done")


def test_a_run_tells_its_share_of_communication(shapes: Path, tmp_path: Path) -> None:
    """Where the other rank is 0.3 s late in each of three steps, the first one's ledger and metrics say so."""
    config = Case(1, groups={"logging": {"every": 3}}).config(shapes, tmp_path)
    assert run_ranks(2, _slow_neighbour, config, tmp_path / "run") == [0, 0]
    log = RunLog.open(tmp_path / "run")
    quick, slow = log.ledger.lines
    assert quick.communication_seconds is not None and slow.communication_seconds is not None
    assert 0 < quick.communication_seconds < quick.seconds and 0.8 < slow.communication_seconds < slow.seconds
    steps, shares = log.series("time/communication(%)")
    assert steps == [3, 6] and shares[1] == pytest.approx(100 * slow.communication_seconds / slow.seconds)
    assert f"comm {shares[1]:.0f}%" in (tmp_path / "run" / "logs" / "rank-0.log").read_text("utf-8")


# -- the closed form ---------------------------------------------------------------------------------------------------

SPECS = st.builds(
    lambda width, depth, text, adaln: UViTSpec(
        width=8 * width, depth=2 * depth, n_heads=2, patch=4, channels=3, latent_size=(16, 16), n_txt=4 if text else 0,
        text_width=8 if text else 0, adaln=adaln, time_mlp=adaln,
    ),
    st.integers(1, 4), st.integers(1, 3), st.booleans(), st.booleans(),
)  # fmt: skip


def _padded(spec: UViTSpec, layout: str, world: int) -> tuple[int, int]:
    """Stored tensors and their elements, each padded to equal shares: a second writing of what is stored."""
    sizes_stored: list[int] = []
    for unit in spec.parameters().values():
        if layout == "named":
            sizes_stored += [parameter.numel for parameter in unit]
            continue
        for decay in (True, False):
            sizes = [parameter.numel for parameter in unit if parameter.decay == decay]
            sizes_stored += [sum(-(-size // 64) * 64 for size in sizes)] if sizes else []
    return len(sizes_stored), sum(-(-size // world) * world for size in sizes_stored)


@settings(max_examples=25, deadline=None)
@given(spec=SPECS, world=st.integers(2, 5), layout=st.sampled_from(["flat", "named"]), accumulation=st.integers(1, 3),
       checkpointing=st.integers(0, 2))  # fmt: skip
def test_what_zero3_gathers_at_its_two_extremes(
    spec: UViTSpec, world: int, layout: Any, accumulation: int, checkpointing: int
) -> None:
    tensors, elements = _padded(spec, layout, world)
    units = len(spec.parameters())
    common: dict[str, Any] = {
        "world": world, "stage": 3, "dtype_bytes": 4, "layout": layout, "accumulation": accumulation,
        "checkpointing": checkpointing,
    }  # fmt: skip
    twice = Zero(persistence=0, prefetch=0, max_reuse=0)  # nothing kept: once for each pass, a unit at a time
    rows = {row.why: row for row in traffic(spec.parameters(), zero=twice, **common)}
    for which in ("forward", "backward"):
        row = rows[f"weights, {which} pass, on demand"]
        # The embedding is entered twice where both its outputs have a gradient; it is kept in between.
        assert (row.count, row.bytes) == (units * accumulation, 4 * elements * accumulation)
    assert rows["gradients"].bytes == 4 * elements * accumulation and rows["gradients"].count == accumulation
    once = Zero(persistence=0, prefetch=10**12)  # all of it fits: one gather ahead brings everything
    rows = {row.why: row for row in traffic(spec.parameters(), zero=once, **common)}
    assert rows["weights, forward pass, ahead"].bytes == 4 * elements * accumulation
    assert rows["weights, forward pass, ahead"].count == accumulation
    assert {why for why in rows if why.startswith(GATHERS)} == {"weights, forward pass, ahead"}
    small = {row.why: row for row in traffic(spec.parameters(), zero=Zero(persistence=10**12), **common)}
    row = small["updated small weights"]
    assert (row.count, row.bytes) == (tensors, 4 * elements)
    assert not [why for why in small if why.startswith(GATHERS)]


@settings(max_examples=25, deadline=None)
@given(spec=SPECS, world=st.integers(2, 5), layout=st.sampled_from(["flat", "named"]), bucket=st.integers(3000, 50_000))
def test_gradients_are_reduced_once_whatever_the_bucket(spec: UViTSpec, world: int, layout: Any, bucket: int) -> None:
    _, elements = _padded(spec, layout, 1)
    bucket = max(bucket, max(p.numel for unit in spec.parameters().values() for p in unit) * 8)
    for stage, overlap in ((1, False), (1, True), (2, True), (3, True)):
        zero = Zero(reduce_bucket=bucket, overlap=overlap)
        common: dict[str, Any] = {"world": world, "stage": stage, "dtype_bytes": 2, "layout": layout}
        (row,) = [row for row in traffic(spec.parameters(), zero=zero, **common) if row.why == "gradients"]
        (one,) = [row for row in traffic(spec.parameters(), **common) if row.why == "gradients"]
        assert one.count == 1 and row.bytes == one.bytes
        assert one.bytes == 2 * (_padded(spec, layout, world)[1] if stage == 3 else elements)
        assert -(-elements // bucket) <= row.count <= 2 * elements // bucket + 1
        assert (row.count == 1) == (elements <= bucket)


def test_the_volume_of_the_stages_on_a_ring_in_weights() -> None:
    """1910.02054 §7: 2Ψ for plain data parallelism, 3Ψ for ZeRO-3. At stages 1 and 2 DeepSpeed reduces gradients to all
    ranks (2Ψ, where the paper scatters them for Ψ) before it gathers the weights (Ψ)."""
    spec, world = preset("uvit-8b"), 64
    psi = 2 * spec.param_counts().total * (world - 1) / world
    sent = {}
    for stage in (0, 1, 2, 3):
        rows = traffic(
            spec.parameters(), world=world, stage=stage, dtype_bytes=2, checkpointing=1,
            zero=Zero(max_reuse=0, prefetch=0) if stage == 3 else None,
        )  # fmt: skip
        sent[stage] = sum(row.wire_bytes(world) for row in rows) / psi
    figures = ", ".join(f"stage {stage} {value:.4f}" for stage, value in sent.items())
    figure(f"uvit-8b, {world} ranks, what a rank sends, in weights: {figures}")
    assert sent == pytest.approx({0: 2, 1: 3, 2: 3, 3: 3}, rel=1e-3)


def test_sizes_are_those_of_the_engine() -> None:
    assert closed_form.ALIGN == partition.ALIGN == packed.ALIGN
    for name, layout in (("uvit-tiny", "flat"), ("uvit-0.6b", "named"), ("uvit-8b", "flat")):
        text: dict[str, Any] = {"kind": "words", "depth": 2} if name == "uvit-tiny" else {"kind": "clip"}
        vae = {} if name == "uvit-tiny" else {"vae": {"kind": "vae"}}
        config = validate({"model": {"preset": name}, "encoders": {"text": text} | vae, "engine": {"layout": layout}})
        words = 300 if name == "uvit-tiny" else 0
        encoder = config.text_encoder(words) if words else None
        table = encoder.parameters()["embedding"] if encoder else ()
        units = config.backbone().parameters()
        n = config.backbone().param_counts().total + sum(spec.numel for spec in table)
        assert reduce_bucket(units, text=table, layout=config.engine.layout) == fitting.reduce_bucket(config, n)


def test_a_rank_alone_sends_nothing_and_a_long_run_logs_rarely() -> None:
    spec = preset("uvit-tiny")
    common: dict[str, Any] = {"stage": 3, "dtype_bytes": 4}
    assert traffic(spec.parameters(), world=1, **common) == ()
    quiet, loud = (traffic(spec.parameters(), world=4, logs=logs, **common) for logs in (False, True))
    assert set(loud) - set(quiet) == {closed_form.Collective("all_reduce", 1, 32, "peak memory of every rank")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": 4}, "no stage 4"),
        ({"world": 0}, "world is 0"),
        ({"accumulation": -1}, "accumulation is -1"),
        ({"dtype_bytes": 0}, "dtype_bytes is 0"),
        ({"checkpointing": -2}, "checkpointing -2"),
        ({"step": 0}, "step 0"),
        ({"stage": 2, "zero": Zero(reduce_bucket=100)}, "does not hold a tensor"),
    ],
)
def test_impossible_questions_are_refused(change: dict[str, Any], message: str) -> None:
    common: dict[str, Any] = {"world": 2, "stage": 3, "dtype_bytes": 4}
    with pytest.raises(ConfigError, match=message):
        traffic(preset("uvit-tiny").parameters(), **common | change)


@pytest.mark.parametrize(
    ("top", "zero"),
    [
        ({"communication_data_type": "fp32"}, {}),
        ({}, {"reduce_scatter": False}),
        ({}, {"contiguous_gradients": False}),
        ({}, {"stage3_model_persistence_threshold": 10}),
    ],
)
def test_a_deepspeed_file_that_is_not_predicted_is_refused(top: dict[str, Any], zero: dict[str, Any]) -> None:
    config = validate({"model": {"preset": "uvit-tiny"}})
    resolved = {"gradient_accumulation_steps": 1, "zero_optimization": {"stage": 3} | zero} | top
    with pytest.raises(ConfigError, match=f"{next(iter(top | zero))} is not predicted"):
        predicted(config, resolved, 300, 2)


def test_a_text_encoder_is_part_of_it() -> None:
    spec, text = preset("uvit-tiny"), TextEncoderSpec(300, width=64, n_tokens=16).parameters()["embedding"]
    common: dict[str, Any] = {"world": 2, "stage": 0, "dtype_bytes": 4}
    with_text, without = (total(traffic(spec.parameters(), text=t, **common)) for t in (text, ()))
    assert with_text["all_reduce"][1] - without["all_reduce"][1] == 4 * 300 * 64
