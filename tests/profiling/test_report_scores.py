"""FID, KID, CLIP score and likelihood in the report: with what they depend on, and whatever a file may hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longskip.profiling.report import render_report
from longskip.profiling.reportdata import quality_rows
from longskip.profiling.runlog import RunLog

SCORES: dict[str, Any] = {
    "fidelity": {
        "count": 2000,
        "fid": {"value": 12.34567, "warnings": ["the covariance is rank-deficient"]},
        "kid": {"mean": 0.0123456, "std": 0.00111},
        "network": {"sha256": "ab" * 32},
        "statistics": {"sha256": "cd" * 32, "count": 5000},
    },
    "clip_score": {"value": 31.25, "standard_error": 0.125, "count": 1500},
    "likelihood": {"vlb": {"count": 64, "bits_per_dim": 3.5, "bits_per_dim_error": {"over_samples": 0.03125}}},
}


def scored(run: Path, scores: dict[str, Any]) -> Path:
    file = run / "eval" / "step-00000040.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | scores))
    return run


def test_scores_stand_in_the_page_with_what_they_depend_on(tmp_path: Path, run_maker, hostile: str) -> None:
    run = scored(run_maker(tmp_path / "run"), SCORES)
    (row,) = quality_rows([RunLog.open(run)])  # step 20 has a judge's scores alone
    assert row["step"] == 40 and row["run"] == 0
    assert row["figures"] == ["12.346", "0.012346 ± 0.0011", "31.25 ± 0.12", "3.5 ± 0.031", ""]
    for words in ("weights ema", "sampler euler", "steps 25", "guidance 3.0", "seed 0", "FID, KID of 2,000"):
        assert words in row["how"]
    for words in ("CLIP of 1,500", "bound of 64", "network abababababab", "statistics cdcdcdcdcdcd"):
        assert words in row["how"]
    page = render_report([run], tmp_path / "one.html").read_text("utf-8")
    assert "12.346" in page and "the covariance is rank-deficient" in page and 'href="#quality"' in page
    spoilt = {"fidelity": SCORES["fidelity"] | {"fid": {"value": 1.0, "warnings": [hostile]}}}
    page = render_report([scored(run, spoilt)], tmp_path / "two.html").read_text("utf-8")
    assert "<img src=x" not in page


def test_a_run_without_scores_has_no_such_section(tmp_path: Path, run_maker) -> None:
    run = run_maker(tmp_path / "run")
    assert quality_rows([RunLog.open(run)]) == []
    assert 'id="quality"' not in render_report([run], tmp_path / "out.html").read_text("utf-8")


def test_whatever_a_file_holds_is_read_as_nothing_or_a_number(tmp_path: Path, run_maker) -> None:
    run = run_maker(tmp_path / "run")
    for scores in (
        {"fidelity": [1, 2], "clip_score": "high", "likelihood": None},
        {"fidelity": {"fid": {"value": "12"}, "kid": 3, "network": 4}},
        {"clip_score": {"value": True}},
    ):
        assert quality_rows([RunLog.open(scored(run, scores))]) == []
    odd = {"fidelity": {"fid": {"value": 1.0, "warnings": 7}, "count": "many"}, "clip_score": [], "likelihood": 1}
    (row,) = quality_rows([RunLog.open(scored(run, odd))])
    assert row["figures"] == ["1", "", "", "", ""] and row["warnings"] == []
    render_report([run], tmp_path / "out.html")
