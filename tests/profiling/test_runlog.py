from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from longskip.errors import RunFolderError
from longskip.profiling.runlog import RunLog


def test_a_whole_run(tmp_path: Path, run_maker) -> None:
    log = RunLog.open(run_maker(tmp_path / "shapes"))
    assert (log.name, log.status, log.device_name) == ("shapes", "finished", "AMD EPYC 7B13")
    assert log.config["optim"] == {"lr": 1e-3, "betas": [0.9, 0.99]}
    assert log.environment["torch"] == "2.13.0"
    assert (log.sums.committed.steps, log.sums.spent.steps, log.sums.missing_steps) == (40, 60, 0)
    assert log.sums.committed.model_flops == 4 * (10**13 + 7)
    assert [body["step"] for body in log.evaluations] == [20, 40]
    assert log.evaluations[1]["judge"]["examples"] == log.path / "eval/step-00000040.png"
    assert [(grid.step, grid.prompts[1]) for grid in log.samples] == [(20, "a blue square"), (40, "a blue square")]
    assert log.samples[0].files == (log.path / "samples/step-00000020/000.png",)
    assert log.samples[0].settings["guidance"] == 3.0 and "files" not in log.samples[0].settings
    assert log.incidents[0]["kind"] == "resumed" and len(log.bad_samples) == 2
    assert not any(log.skipped_lines.values()) and log.ledger.skipped == 0


def test_the_last_line_per_step_and_key_counts(tmp_path: Path, run_maker) -> None:
    log = RunLog.open(run_maker(tmp_path / "run"))
    # Steps 30 and 40 were written by both attempts; a later line of validation leaves the loss of its step alone.
    assert log.series("loss/global_avg") == ([10, 20, 30, 40], [1 + 1 / 10, 1 + 1 / 20, 2 + 1 / 30, 2 + 1 / 40])
    assert log.series("validation/loss") == ([20, 40], [0.1, 0.05])
    assert log.series("nothing") == ([], [])


def test_metrics_out_of_order_and_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 3, "lr": 3.0}\n{"step": 1, "lr": NaN}\n{"step": true, "lr": 9}\n{"step": 2, "lr": 2}\n{"step": 5, "l'
    )
    log = RunLog.open(tmp_path)
    steps, values = log.series("lr")
    assert steps == [1, 2, 3] and math.isnan(values[0]) and values[1:] == [2.0, 3.0]
    assert log.skipped_lines["metrics.jsonl"] == 1


def test_by_name_under_runs(tmp_path: Path, run_maker, monkeypatch) -> None:
    run_maker(tmp_path / "runs" / "shapes-base")
    monkeypatch.chdir(tmp_path)
    assert RunLog.open("shapes-base").path == Path("runs/shapes-base")
    assert RunLog.open("shapes-base", runs=tmp_path / "runs").name == "shapes-base"
    with pytest.raises(RunFolderError, match=r"'shape-bose' does not exist[\s\S]*did you mean shapes-base\?"):
        RunLog.open("shape-bose")


def test_folders_that_are_no_run(tmp_path: Path, run_maker) -> None:
    with pytest.raises(RunFolderError, match=r"does not exist"):
        RunLog.open(tmp_path / "missing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match=r"is a file"):
        RunLog.open(tmp_path / "file")
    run_maker(tmp_path / "runs" / "inner")
    with pytest.raises(RunFolderError, match=r"no run folder.*config\.yaml[\s\S]*inner"):
        RunLog.open(tmp_path / "runs")


def test_a_run_killed_at_birth_is_readable(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    log = RunLog.open(tmp_path)
    assert log.name == tmp_path.name and log.status is None and log.device_name is None
    assert log.config == {} and log.metrics == {} and log.samples == [] and log.evaluations == []
    assert log.incidents == [] and log.sums.spent.steps == 0


def test_half_written_files_are_passed_over(tmp_path: Path, run_maker) -> None:
    run = run_maker(tmp_path / "run")
    (run / "environment.json").write_text('{"torch": "2.')
    (run / "eval/step-00000050.json").write_text('{"step": 50,')
    (run / "samples/step-00000050").mkdir()
    (run / "samples/step-00000060.tmp").mkdir()
    log = RunLog.open(run)
    assert log.environment == {}
    assert [body["step"] for body in log.evaluations] == [20, 40, 50]
    assert [grid.step for grid in log.samples] == [20, 40]


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "just text"])
def test_a_broken_configuration_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(RunFolderError, match=r"config\.yaml"):
        _ = RunLog.open(tmp_path).config


def test_files_outside_the_run_folder_are_not_read(tmp_path: Path, run_maker) -> None:
    run = run_maker(tmp_path / "run")
    (tmp_path / "secret.png").write_bytes(b"x")
    folder = run / "samples/step-00000020"
    (folder / "prompts.json").write_text(json.dumps({"prompts": ["p"], "files": ["../../../secret.png", "000.png"]}))
    assert RunLog.open(run).samples[0].files == (folder / "000.png",)
