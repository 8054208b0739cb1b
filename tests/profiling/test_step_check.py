"""``longskip bench predict`` and ``bench machine``: what they hand out. How long things take is not asked here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longskip.errors import ConfigError
from longskip.kernels.formulas import OpCost
from longskip.launcher.cli import main
from longskip.models.formulas import FORMULAS
from longskip.models.presets import preset
from longskip.profiling import efficiency, step_check
from longskip.profiling.calibration import Ceilings, Seconds, calls_of
from longskip.profiling.counting import count_flops
from longskip.profiling.efficiency import DIRECTIONS, Efficiencies, Measured
from longskip.profiling.hardware import find, processor, user_file
from longskip.profiling.machine import Machine, measure_machine
from longskip.profiling.op_works import cost_of
from longskip.profiling.step_check import BareLoop, StepCase, predict_steps, to_markdown

SMALL = StepCase("small", preset("uvit-tiny", width=16, depth=2), 2)
OTHER = StepCase("other", preset("uvit-tiny", width=32, depth=2), 1)


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_bare_loop_executes_what_its_ledger_says_and_trains() -> None:
    loop = BareLoop(SMALL)
    before = [p.detach().clone() for p in loop.parameters]
    counted = count_flops(loop.step)
    assert counted.flops == SMALL.ledger().hardware_flops
    moved = [bool((p != old).any()) for p, old in zip(loop.parameters, before, strict=True)]
    assert all(moved) and all(p.grad is None for p in loop.parameters)


def test_what_is_timed_costs_what_is_predicted() -> None:
    """So that every row of the prediction finds its own measurement."""
    calls = calls_of(SMALL.spec, SMALL.batch)
    timed = {(call.op, cost_of(call, direction, 4)) for call in calls for direction in DIRECTIONS}
    timed.add(("adamw", FORMULAS["adamw"].forward(values=sum(p.numel() for p in BareLoop(SMALL).parameters))))
    for row in SMALL.ledger().rows:
        units = len(row.units)
        for cost in (row.forward, row.backward + OpCost(row.repeated_macs)):
            each = OpCost(cost.macs // units, cost.elementwise // units, cost.bytes // units)
            assert cost == OpCost() or (row.op, each) in timed


def test_a_prediction_rests_on_measurements_alone_and_its_errors_are_the_ratios() -> None:
    device = measure_machine(size=64, copied=1 << 16, repeats=1).device()
    rows = predict_steps([SMALL, OTHER], rounds=1, device=device)
    for found in rows:
        for clock in ("cpu", "wall"):
            part = found[clock]
            assert part["error"] == pytest.approx(part["predicted"] / part["measured"] - 1)
        assert found["measured_share"] > 0.95 and found["met"] == (abs(found["cpu"]["error"]) <= 0.15)
        assert sum(found["by_term"].values()) == pytest.approx(found["cpu"]["predicted"])
        assert found["from_other_sizes"]["measured"] == found["cpu"]["measured"]
    lines = to_markdown(rows, device)
    assert len([line for line in lines if line.startswith("| ")]) == 3
    with pytest.raises(ConfigError, match="--rounds 0"):
        predict_steps([SMALL], rounds=0, device=device)


def test_a_machine_that_is_twice_as_slow_in_all_is_predicted_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock counts dispatched ops instead of seconds: calibration and step see the same, and the prediction is exact
    up to what the overhead per call shares out."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        count = 0.0

        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return op(*args, **(kwargs or {}))

    device = measure_machine(size=64, copied=1 << 16, repeats=1).device()
    errors = []
    for speed in (1.0, 2.0):
        with Counting() as mode:
            read = lambda: Seconds(1e-3 * speed * mode.count, 1e-3 * speed * mode.count)  # noqa: B023, E731
            (found,) = predict_steps([SMALL], rounds=2, device=device, read=read)
        errors.append(found["cpu"]["error"])
        assert found["cpu"]["measured"] > 0.1
    # A backward without an op of its own is left out, and its assumed time is not the clock's.
    assert errors[0] == pytest.approx(errors[1], abs=1e-3) and abs(errors[0]) < 0.15


def test_bench_machine_prints_its_ceilings_and_keeps_the_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "machine", "--model", "uvit-tiny", "--batch", "1", "--repeats", "1", "--dtype", "fp32"]
    with pytest.raises(SystemExit) as left:
        main([*command, "--json", "--no-keep"])
    assert left.value.code == 0 and not user_file().exists()
    tree = json.loads(capsys.readouterr().out)
    assert tree["row"]["name"] == processor() and tree["kept"] == [] and tree["command"].startswith("longskip bench")
    assert set(tree["ceilings"]["by_processor_time"]) == {"fp32", "copy"}
    with pytest.raises(SystemExit) as left:
        main([*command, "--out", str(tmp_path / "here.json")])
    assert left.value.code == 0
    kept = find("this")
    written = json.loads((tmp_path / "here.json").read_text())
    assert kept.measured and kept.peak("fp32") == round(written["row"]["teraflops"]["fp32"] * 1e6) * 10**6
    table = efficiency.of_device(processor(), "fp32")
    assert table is not None and {"mlp", "attention", "adamw"} <= {entry.op for entry in table.entries}
    assert (tmp_path / "here.md").read_text().count("GFLOP/s") == 2
    assert table.about["cores"] >= 1 and table.about["load_average"] >= 0 and table.about["date"][:2] == "20"
    predicted = step_check.step_time(SMALL.ledger(), kept, dtype="fp32", measured=table)
    assert predicted.mfu is None and predicted.seconds > 0
    assert torch.get_num_threads() == written["threads"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["profile", "uvit-tiny", "--gpu", "this", "--precision", "fp32"])
    assert "processor time, not" in " ".join(capsys.readouterr().out.split())


def test_a_busy_machine_and_shares_beyond_the_ceiling_are_warned_of() -> None:
    rates = {"fp32": 1e12, "copy": 1e9}  # 1 TFLOP/s, 1 GB/s
    entries = tuple(
        Measured("linear", "forward", {"rows": rows}, 10**9, 0, 1, seconds, seconds)
        for rows, seconds in ((1, 2e-3), (2, 1e-3), (3, 2e-3 / 1.05))
    )
    table = Efficiencies(processor(), "fp32", entries, {}, {"notes": ["one was left out"]})
    quiet = Machine(Ceilings(1, 64, 1 << 20, rates, rates), 10**9, table, cores=4, load=(1.0, 3.9))
    assert quiet.warnings() == [
        "above 110% of the ceiling: linear forward 200%; caches gave it, or the ceilings were measured too low",
        "one was left out",
    ]
    busy = replace(quiet, load=(1.0, 4.1))
    assert busy.warnings()[0].startswith("the load average was 4.1 on 4 cores")
    assert busy.to_json()["warnings"] == busy.warnings()
    assert [line for line in busy.to_markdown() if line.startswith("- warning")] == [
        f"- warning: {line}" for line in busy.warnings()
    ]
    assert not replace(quiet, efficiencies=None).warnings()


def test_the_documentation_quotes_every_error_of_the_results() -> None:
    docs = Path(__file__).resolve().parents[2] / "docs"
    lines = (docs / "results" / "step-time.md").read_text("utf-8").splitlines()
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "%, " in line and line.startswith("|")
    ]
    told = (docs / "hardware.md").read_text("utf-8").partition("## How far off it is")[2]
    assert len(rows) >= 3
    for column in (4, 5, 6):  # by processor time, by wall clock, from other models' sizes
        assert ", ".join(row[column].partition(",")[0] for row in rows) in told


def test_bench_machine_refuses_an_unknown_model_before_it_measures() -> None:
    with pytest.raises(SystemExit) as left:
        main(["bench", "machine", "--model", "uvit-tini"])
    assert left.value.code == 2
