from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longskip.errors import ConfigError, LongskipError
from longskip.models.presets import PRESETS
from longskip.models.specs import UViTSpec
from longskip.profiling.budget import run_budget, total
from longskip.profiling.budget_plan import NO_MFU, Hardware, latents, make_plan, nearest_presets, shape_for
from longskip.profiling.fitdata import params_of, read_csv, read_runs, smoothed, units_warning
from longskip.profiling.fits import Point
from longskip.profiling.hardware import find
from longskip.profiling.laws import CHINCHILLA, DIT_IN_CONTEXT
from longskip.profiling.ledger import append, read
from longskip.profiling.runlog import RunLog
from tests.budget_runs import small_spec, write_run

SPEC = small_spec()
BASE = PRESETS["uvit-2.3b"]


def budget_of(folder: Path, spec: UViTSpec | None = SPEC, **options: float):
    return run_budget(RunLog.open(folder), spec, **options)


# -- where it went -----------------------------------------------------------------------------------------------------


def test_a_killed_and_resumed_run_commits_what_the_unbroken_one_does(tmp_path: Path) -> None:
    """Killed after 60 and resumed from 40, killed after 90 and resumed from 50: 20 + 40 steps were done again."""
    whole = budget_of(write_run(tmp_path / "whole", SPEC, attempts=((0, 100),)))
    broken = budget_of(write_run(tmp_path / "broken", SPEC, attempts=((0, 60), (40, 90), (50, 100))))
    for name, amount in broken.amounts.items():
        assert amount.committed == pytest.approx(whole.amounts[name].committed, rel=1e-12), name
        assert amount.redone == pytest.approx(whole.amounts[name].committed * 0.6, rel=1e-9), name
        assert whole.amounts[name].redone == 0
    images = 100 * 8
    assert broken.amounts["model_flops"].committed == images * SPEC.flops(1).model_flops
    assert broken.amounts["model_flops"].spent == images * 8 // 5 * SPEC.flops(1).model_flops
    assert broken.accounts == whole.accounts and (broken.attempts, whole.attempts) == (3, 1)
    assert broken.committed_share == pytest.approx(100 / 160) and whole.committed_share == 1


def test_device_time_money_and_energy(tmp_path: Path) -> None:
    """2 devices, 36 s a step of which 9 s wait: 50 kept steps are 1 device-hour, 25 redone another half."""
    folder = write_run(
        tmp_path / "run", SPEC, attempts=((0, 50), (25, 50)), every=5, seconds=36.0, wait=9.0,
        config={"budget": {"price_per_device_hour": 3.0, "currency": "EUR"}},
    )  # fmt: skip
    budget = budget_of(folder)
    assert budget.amounts["device_hours"].committed == pytest.approx(1.0)
    assert budget.amounts["device_hours"].spent == pytest.approx(1.5)
    assert {use.name: (use.device_hours, use.share) for use in budget.uses} == {
        "training, evaluation, checkpoints": (pytest.approx(0.75), pytest.approx(0.5)),
        "waiting for data": (pytest.approx(0.25), pytest.approx(0.25 / 1.5)),
        "redone after a resume": (pytest.approx(0.5), pytest.approx(1 / 3)),
    }
    assert (budget.currency, budget.money.committed, budget.money.spent) == (
        "EUR",
        pytest.approx(3),
        pytest.approx(4.5),
    )
    assert budget.energy_kwh.spent == pytest.approx(1.5 * find("h200").watts / 1000)
    assert f"{find('h200').watts} W" in budget.energy_note and "ceiling" in budget.energy_note
    other = budget_of(folder, price=2.0, watts=100.0)
    assert other.money.spent == pytest.approx(3) and other.energy_kwh.spent == pytest.approx(0.15)
    assert "as given" in other.energy_note


def test_communication_is_a_part_of_the_time_where_the_ledger_has_it(tmp_path: Path) -> None:
    """20 steps of half a second on 2 devices: a line without the figure, and one with 2 s of communication."""
    folder = write_run(tmp_path / "run", SPEC, attempts=((0, 10),))
    last = read(folder / "ledger.jsonl").lines[-1]
    assert "communication" not in {use.name for use in budget_of(folder).uses}
    append(folder / "ledger.jsonl", replace(last, from_step=10, step=20, communication_seconds=2.0))
    uses = {use.name: use.device_hours * 3600 for use in budget_of(folder).uses}
    assert uses["communication"] == pytest.approx(4.0) and uses["waiting for data"] == pytest.approx(5.0)
    assert sum(uses.values()) == pytest.approx(20.0)


def test_an_unknown_device_has_no_energy_unless_its_power_is_given(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", SPEC, device="AMD EPYC 7B13")
    budget = budget_of(folder)
    assert budget.energy_kwh is None and "AMD EPYC 7B13" in budget.energy_note and budget.money is None
    assert budget_of(folder, watts=200).energy_kwh.spent > 0
    sums = total([budget, budget_of(folder, watts=200, price=1)])
    assert sums["energy_kwh"] is None and sums["money"] is None
    assert sums["device_hours"]["spent"] == pytest.approx(2 * budget.amounts["device_hours"].spent)
    for bad in (-1.0, float("nan"), float("inf"), 1e300):
        with pytest.raises(ConfigError, match="price"):
            budget_of(folder, price=bad)
        with pytest.raises(ConfigError, match="watts"):
            budget_of(folder, watts=bad)


def test_accounts_of_a_run_are_those_of_its_images(tmp_path: Path) -> None:
    """N counts the trained text encoder too; without the spec the accountings that need a shape are left out, and said."""
    folder = write_run(tmp_path / "run", SPEC, text_params=1000)
    budget = budget_of(folder)
    found = {one.name: one for one in budget.accounts}
    cost, images = SPEC.flops(1), 40 * 8
    assert budget.params == SPEC.param_counts().total + 1000
    assert found["exact"].flops == images * cost.model_flops
    assert found["six_nd"].flops == 6 * budget.params * images * cost.tokens == budget.amounts["six_nd"].committed
    assert found["image_tokens"].flops == 6 * budget.params * images * cost.image_tokens
    assert found["chinchilla"].flops > found["exact"].flops and not budget.notes
    bare = budget_of(folder, None)
    assert [one.name for one in bare.accounts] == ["exact", "six_nd", "image_tokens"]
    assert any("left out" in note for note in bare.notes)
    json.dumps(budget.as_json(), allow_nan=False)


def test_lines_cut_by_a_crash_are_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", SPEC)
    before = budget_of(folder)
    raw = (folder / "ledger.jsonl").read_bytes()
    (folder / "ledger.jsonl").write_bytes(raw + b'{"attempt": 1, "from_step": 40, "st')
    after = budget_of(folder)
    assert (before.skipped_lines, after.skipped_lines) == (0, 1) and after.amounts == before.amounts
    assert any("1 line(s)" in note and "unreadable or cut" in note for note in after.notes)
    lines = raw.splitlines(keepends=True)
    (folder / "ledger.jsonl").write_bytes(b"".join([*lines[:2], lines[2][:40] + b"\n", *lines[3:]]))
    hole = budget_of(folder)
    assert hole.missing_steps == 10 and any("10 of the 40" in note for note in hole.notes)


def test_ledgers_of_two_models_in_one_run_are_refused_with_the_difference(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", SPEC)
    other = write_run(tmp_path / "other", small_spec(128))
    with open(one / "ledger.jsonl", "ab") as file:
        file.write((other / "ledger.jsonl").read_bytes())
    n, m = SPEC.param_counts().total, small_spec(128).param_counts().total
    with pytest.raises(ConfigError) as raised:
        budget_of(one)
    assert (
        f"N = {n:,}" in str(raised.value) and f"N = {m:,}" in str(raised.value) and "2 different" in str(raised.value)
    )

    (other / "run.json").write_text(json.dumps({"name": "other", "params": m + 5}))
    with pytest.raises(ConfigError, match=r"a difference of -5"):
        params_of(RunLog.open(other))


def test_two_models_of_one_size_are_told_apart_by_their_cost(tmp_path: Path) -> None:
    """The same N and tokens, another number of FLOPs an image."""
    folder = write_run(tmp_path / "run", SPEC)
    last = read(folder / "ledger.jsonl").lines[-1]
    append(folder / "ledger.jsonl", replace(last, from_step=40, step=50, model_flops=last.model_flops + last.images))
    with pytest.raises(ConfigError, match="different models of one size"):
        budget_of(folder)


def test_images_of_several_sizes_are_one_model(tmp_path: Path) -> None:
    """Aspect buckets: other tokens and FLOPs an image, the same N."""
    folder = write_run(tmp_path / "run", SPEC)
    wide = SPEC.flops(1, (16, 32))
    last = read(folder / "ledger.jsonl").lines[-1]
    images, params = last.images, SPEC.param_counts().total
    append(folder / "ledger.jsonl", replace(
        last, from_step=40, step=50, tokens=images * wide.tokens, image_tokens=images * wide.image_tokens,
        model_flops=images * wide.model_flops, six_nd=6 * params * images * wide.tokens,
    ))  # fmt: skip
    budget = budget_of(folder)
    assert budget.params == params and any("several sizes" in note for note in budget.notes)
    found = {one.name: one for one in budget.accounts}
    pairs = 320 * SPEC.n_tokens**2 + images * wide.tokens**2
    assert found["chinchilla"].flops - found["exact"].flops == 9 * SPEC.n_blocks * SPEC.n_heads * pairs


def test_a_ledger_that_holds_no_6nd_or_nothing_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", SPEC, attempts=((0, 0),))
    with pytest.raises(ConfigError, match="no interval yet"):
        budget_of(folder)
    whole = write_run(tmp_path / "whole", SPEC)
    text = (whole / "ledger.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    odd = [row | {"six_nd": row["six_nd"] + row["tokens"]} if "six_nd" in row else row for row in rows]
    (whole / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in odd))
    with pytest.raises(ConfigError, match="does not hold 6·N·D"):
        budget_of(whole)


def test_doubled_lines_count_once_and_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", SPEC)
    before = budget_of(folder)
    lines = (folder / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "ledger.jsonl").write_bytes(b"".join([*lines, lines[2]]))
    after = budget_of(folder)
    assert after.amounts == before.amounts and after.committed_share == 1 and after.missing_steps == 0
    assert after.overlapping_lines == 1
    assert any("1 line(s)" in note and "overlap" in note and "steps 10 to 20" in note for note in after.notes)


def test_no_number_of_a_damaged_run_is_more_than_a_float_holds(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", SPEC, info={"params_token": 10**400})
    rows = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    damaged = [{"model_flops": 10**400}, {"seconds": -5}, {"devices": 0}]
    extra = [rows[-1] | {"from_step": 40, "step": 50} | damage for damage in damaged]
    (folder / "config.yaml").write_text(f"budget: {{price_per_device_hour: {10**400}}}")
    (folder / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + extra))
    budget = budget_of(folder)
    assert budget.skipped_lines == 3 and budget.amounts["steps"].spent == 40 and budget.money is None
    assert budget.params_token is None and budget.committed_share == 1
    (folder / "config.yaml").write_text("budget: {price_per_device_hour: -3}")
    with pytest.raises(ConfigError, match="price_per_device_hour -3"):
        budget_of(folder)


# -- points for fits ---------------------------------------------------------------------------------------------------


def test_points_of_runs(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / f"w{width}", small_spec(width), attempts=((0, 60), (40, 100)), loss=lambda step: 5 / step)
        for width in (64, 128)
    ]
    logs, specs = [RunLog.open(folder) for folder in folders], [small_spec(64), small_spec(128)]
    for point, spec, log in zip(read_runs(logs, specs), specs, logs, strict=True):
        cost = spec.flops(1)
        assert (point.flops, point.tokens) == (800 * cost.model_flops, 800 * cost.tokens)
        assert point.params == spec.param_counts().total and point.origin == log.name
        assert point.loss == pytest.approx(smoothed([5 / step for step in range(10, 101, 10)])[-1])
    image = read_runs(logs, specs, compute="6nd", tokens="image")[0]
    assert image.tokens == 800 * 16 and image.flops == 6 * image.params * image.tokens


def test_the_newest_validation_loss_counts_where_it_is_asked_for(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", SPEC)
    rows = [
        {"step": 20, "validation/loss": 0.5},
        {"step": 40, "validation/loss": 0.4},
        {"step": 60, "validation/loss": 9},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = RunLog.open(folder)
    assert read_runs([log], [SPEC], loss="validation")[0].loss == 0.4  # step 60 was never committed
    bare = write_run(tmp_path / "bare", SPEC)
    with pytest.raises(ConfigError, match="no validation loss"):
        read_runs([RunLog.open(bare)], [SPEC], loss="validation")


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=30))
def test_smoothing_is_a_weighted_mean(losses: list[float]) -> None:
    weights = [Fraction(9, 10) ** (len(losses) - 1 - i) for i in range(len(losses))]
    wanted = sum(float(w) * x for w, x in zip(weights, losses, strict=True)) / float(sum(weights))
    assert smoothed(losses)[-1] == pytest.approx(wanted)
    assert smoothed([None, *losses, None])[-1] == pytest.approx(wanted) and smoothed([None]) == [None]


@pytest.mark.parametrize(
    "change, key",
    [
        ({"config": {"diffusion": {"prediction": "x"}}}, "diffusion.prediction"),
        ({"info": {"data": {"samples": 3, "fingerprint": "bb"}}}, "data"),
        ({"spec": replace(small_spec(128), patch=4)}, "model.patch"),
    ],
)
def test_runs_that_are_no_family_are_not_fitted_together(tmp_path: Path, change: dict, key: str) -> None:
    spec = change.get("spec", small_spec(128))
    change = {name: value for name, value in change.items() if name != "spec"}
    common = {"info": {"data": {"samples": 3, "fingerprint": "aa"}}}
    one, other = write_run(tmp_path / "one", SPEC, **common), write_run(tmp_path / "other", spec, **common | change)
    with pytest.raises(ConfigError) as raised:
        read_runs([RunLog.open(one), RunLog.open(other)], [SPEC, spec])
    assert (
        f"{key} is " in str(raised.value)
        and "one" in str(raised.value)
        and "not models of one family" in str(raised.value)
    )


def test_a_csv_and_what_is_wrong_with_it(tmp_path: Path) -> None:
    file = tmp_path / "points.csv"
    file.write_text("﻿Params, tokens,loss,flops,note\n1e6,2e9,1.5,1.2e16,a\n\n2_000_000,3e9,1.4,3.6e16,b\n")
    points = read_csv(file)
    assert [(p.flops, p.params, p.tokens, p.loss, p.origin) for p in points] == [
        (1.2e16, 1e6, 2e9, 1.5, "points.csv:2"), (3.6e16, 2e6, 3e9, 1.4, "points.csv:4"),
    ]  # fmt: skip
    assert [p.flops for p in read_csv(file, "6nd")] == [1.2e16, 3.6e16]
    file.write_text("params,tokens,loss\n1e6,2e9,1.5\n")
    assert read_csv(file, "6nd")[0].flops == 1.2e16
    with pytest.raises(ConfigError, match="no column 'flops'"):
        read_csv(file)
    for text, said in (
        ("param,tokens,loss,flops\n1,1,1,1\n", "'params'; is it 'param'"),
        ("params,tokens,loss,flops\n1,1,1,1\n1,1,nan,1\n", "line 3: loss = 'nan'"),
        ("params,tokens,loss,flops\n1,-1,1,1\n", "line 2: tokens = '-1'"),
        ("params,tokens,loss,flops\n1,1,1\n", "line 2: flops = None"),
        ("params,tokens,loss,flops\n1,1,1,6\n1,000,1,1,6\n", "line 3: 5 values under 4 columns"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_csv(file)
    file.write_text("params,tokens,loss,flops\n1,1,1,6,, \n")  # empty cells at the end, as tables leave them
    assert read_csv(file)[0].flops == 6
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_csv(file)
    with pytest.raises(ConfigError, match="does not exist"):
        read_csv(tmp_path / "none.csv")


def test_columns_in_other_units_are_told_with_the_factor() -> None:
    def points(*factors: float) -> list[Point]:
        return [Point(6e15 * f, 1e6, 1e9, 1.0, f"rows.csv:{i}") for i, f in enumerate(factors, 2)]

    assert units_warning(points(0.5, 1.0, 3.0)) is None
    assert "is 1e-09 in 3 of 3 rows (the first is rows.csv:2)" in units_warning(points(1e-9, 1e-9, 1.1e-9))
    assert "is 3.1 in 1 of 3 rows (the first is rows.csv:4)" in units_warning(points(1.0, 1.0, 3.1))


# -- plans -------------------------------------------------------------------------------------------------------------


def test_the_published_sizes_are_found_again() -> None:
    for name in ("uvit-0.3b", "uvit-2.3b", "uvit-8b"):
        shape = shape_for(PRESETS[name].param_counts().total, BASE)
        assert (shape.width, shape.depth) == (PRESETS[name].width, PRESETS[name].depth), name
        assert nearest_presets(PRESETS[name].param_counts().total, BASE, 1)[0][0] == name


@settings(max_examples=30, deadline=None)
@given(params=st.floats(3e7, 3e11))
def test_a_custom_shape_meets_n(params: float) -> None:
    shape = shape_for(params, BASE)
    assert shape.param_counts().total == pytest.approx(params, rel=0.03)
    assert shape.head_dim == 64 and 16 <= shape.width / shape.n_blocks <= 80
    assert shape.width % (128 if shape.width >= 1024 else 64) == 0


@settings(max_examples=20, deadline=None)
@given(
    flops=st.integers(10**18, 10**24), batch=st.integers(1, 4096), side=st.sampled_from([256, 512, 1024]),
    law=st.sampled_from([DIT_IN_CONTEXT, CHINCHILLA]),
)  # fmt: skip
def test_steps_spend_the_budget_exactly(flops: int, batch: int, side: int, law) -> None:
    plan = make_plan(flops, law, resolution=(side, side), batch=batch)
    for one in plan.candidates:
        step = batch * 3 * 2 * one.spec.flops(1).macs
        assert one.spec.latent_size == (side // 8, side // 8)
        assert one.exact_flops <= flops < one.exact_flops + step and one.exact_flops == one.steps * step
        tokens = (side // 16) ** 2 + (0 if law.tokens == "image" else 78)
        assert one.steps_6nd == flops // (6 * one.params * tokens * batch)
        assert one.exact_flops_6nd == one.steps_6nd * step
        assert one.data_off == pytest.approx(one.steps * batch * tokens / plan.optimum.tokens)
        if law is CHINCHILLA:
            assert one.loss == pytest.approx(CHINCHILLA.loss(one.params, one.tokens))
            assert one.loss > plan.optimum.loss * 0.999
    json.dumps(plan.as_json(), allow_nan=False)


def test_hours_days_money_and_energy_of_a_plan() -> None:
    h200 = find("h200")
    on = Hardware(h200, "bf16", 0.5, 16)
    flops = round(1000 * on.flops_per_hour)
    assert flops == pytest.approx(1000 * 3600 * h200.peak("bf16") / 2, rel=1e-12)
    plan = make_plan(flops, DIT_IN_CONTEXT, hardware=on, price=2.5)
    assert plan.device_hours == pytest.approx(1000) and plan.days == pytest.approx(1000 / 16 / 24)
    assert plan.money == pytest.approx(2500) and plan.energy_kwh == pytest.approx(h200.watts)
    assert make_plan(flops, DIT_IN_CONTEXT, hardware=on, watts=500).energy_kwh == pytest.approx(500)
    unknown = Hardware(replace(h200, watts=None), "bf16", 0.5, 16)
    plan = make_plan(flops, DIT_IN_CONTEXT, hardware=unknown)
    assert plan.energy_kwh is None and any("energy unknown" in note for note in plan.notes)
    assert make_plan(flops, DIT_IN_CONTEXT).device_hours is None
    plan = make_plan(flops, DIT_IN_CONTEXT, hardware=replace(on, mfu=None), price=2.5, currency="EUR")
    assert (plan.device_hours, plan.days, plan.money, plan.energy_kwh) == (None, None, None, None)
    assert NO_MFU in plan.notes and plan.currency == "EUR" and plan.optimum.params > 0
    for option in ("price", "watts"):
        for bad in (-1.0, float("inf"), float("nan"), 1e300):
            with pytest.raises(ConfigError, match=option):
                make_plan(flops, DIT_IN_CONTEXT, hardware=on, **{option: bad})


def test_notes_of_a_plan_say_where_the_law_was_fitted() -> None:
    assert any("256 image tokens" in note for note in make_plan(10**21, DIT_IN_CONTEXT, resolution=(512, 512)).notes)
    assert not any("256 image tokens" in note for note in make_plan(10**21, DIT_IN_CONTEXT).notes)
    assert any("language models" in note for note in make_plan(10**21, CHINCHILLA).notes)
    assert any("0.011" in note and "1.81" in note for note in make_plan(10**21, DIT_IN_CONTEXT).notes)


def test_plans_that_cannot_be_are_refused() -> None:
    for call, said in (
        (lambda: make_plan(10**12, DIT_IN_CONTEXT), "too small for a U-ViT"),
        (lambda: make_plan(10**30, DIT_IN_CONTEXT), "too large for a U-ViT"),
        (lambda: make_plan(10**21, DIT_IN_CONTEXT, batch=0), "batch 0"),
        (lambda: make_plan(10**16, DIT_IN_CONTEXT, batch=10**7), "do not pay one step"),
        (lambda: make_plan(-(10**21), DIT_IN_CONTEXT), "not positive"),
        (lambda: latents((250, 256)), "250 is not a multiple of 16"),
        (lambda: latents((256, 0)), "side 0"),
        (lambda: latents((32_768, 256)), "32768"),
    ):
        with pytest.raises(LongskipError, match=said) as raised:
            call()
        assert raised.value.cure
