"""Verdicts in the report: which of several evaluations of a step stands there, and what the nearest picture says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from longskip.profiling.report import render_report
from longskip.profiling.reportdata import (
    chart_data,
    evaluated,
    figure_rows,
    headline,
    last_judged,
    nearest_rows,
    score_rows,
)
from longskip.profiling.runlog import RunLog

NEAR = {"count": 36, "hits": 21, "share": 21 / 36, "chance": 1 / 36, "among_all": 38, "share_among_all": 0.5}


def add(run: Path, name: str, **body: Any) -> None:
    how = {"weights": "ema", "sampler": "euler", "steps": 25, "guidance": 3.0, "seed": 0, "as_configured": True}
    file = run / "eval" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"step": 40} | how | body))


def judged(count: int, full: float) -> dict[str, Any]:
    part = {"count": count // 2, "full": full, "objects": 0.25}
    return {"seen": part, "held_out": part, "examples": "x.png"}


def unjudged(run: Path) -> Path:
    for file in (run / "eval").iterdir():
        file.unlink()
    return run


def near_run(run: Path) -> Path:
    add(unjudged(run), "step-00000040-nearest-36-seed-0-0a1b2c3d", nearest=NEAR | {"examples": "near.png"})
    Image.new("RGB", (9, 7)).save(run / "eval" / "near.png")
    return run


def text_of(page: Path) -> str:
    body = page.read_text("utf-8").partition("<body>")[2]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def test_the_evaluation_of_most_prompts_stands_in_the_report(tmp_path: Path, run_maker) -> None:
    """Of those that drew as the configuration says; the fixture's own has 96 prompts, and its file the old name."""
    run = run_maker(tmp_path / "run")
    add(run, "step-00000040-shapes-4-seed-0-00000001", judge=judged(4, 1.0))
    add(run, "step-00000040-shapes-400-seed-0-00000002", judge=judged(400, 0.99), as_configured=False, guidance=1.0)
    log = RunLog.open(run)
    assert last_judged(log)["judge"]["seen"]["count"] == 64 and last_judged(log)["others"] == 2
    assert headline(log)[0].note == "64 prompts, step 40"
    page = text_of(render_report([run], tmp_path / "page.html"))
    assert "2 more evaluations of this step in eval/" in page and "guidance 1.0" not in page
    add(run, "step-00000040-shapes-200-seed-1-00000003", judge=judged(200, 0.5), seed=1)
    log = RunLog.open(run)
    assert (last_judged(log)["seed"], headline(log)[0].value) == (1, "50.0%")
    scores = chart_data([log], ["run"])["charts"]["scores"]
    assert [(line["x"], line["y"]) for line in scores] == [([20, 40], [40.0, 50.0]), ([20, 40], [59.375, 50.0])]


def test_other_drawing_alone_is_better_than_none(tmp_path: Path, run_maker) -> None:
    run = unjudged(run_maker(tmp_path / "run"))
    add(run, "step-00000040-shapes-4-seed-0-00000001", judge=judged(4, 1.0), as_configured=False)
    (body,) = evaluated(RunLog.open(run), "judge")
    assert body["judge"]["seen"]["count"] == 2 and body["others"] == 0


def test_what_earlier_versions_put_aside_is_read(tmp_path: Path, run_maker) -> None:
    """The old file of 4 prompts had taken the name; its better one lies in eval/earlier, its sheet was written over."""
    run = unjudged(run_maker(tmp_path / "run"))
    for name, count in (("earlier/step-00000040.1", 200), ("step-00000040", 4)):
        body = {"step": 40, "weights": "ema", "guidance": 3.0, "judge": judged(count, 0.75)}
        (run / "eval" / "earlier").mkdir(exist_ok=True)
        (run / "eval" / f"{name}.json").write_text(json.dumps(body))
    Image.new("RGB", (4, 4)).save(run / "eval" / "x.png")
    best = last_judged(RunLog.open(run))
    assert best["judge"]["seen"]["count"] == 100 and best["judge"]["examples"] is None and best["others"] == 1


def test_one_evaluation_a_step_gives_the_loss(tmp_path: Path, run_maker) -> None:
    run = unjudged(run_maker(tmp_path / "run"))
    (run / "metrics.jsonl").unlink()
    for number, samples in enumerate((8, 256)):
        loss = {"mean": samples / 1000, "bins": [0.5, samples / 1000], "edges": [0.0, 0.5, 1.0], "samples": samples}
        add(run, f"step-00000040-loss-seed-0-0000000{number}", loss=loss)
    charts = chart_data([RunLog.open(run)], ["run"])["charts"]
    assert [(line["x"], line["y"]) for line in charts["validation"]] == [([40], [0.256])]
    assert [line["y"] for line in charts["bins"]] == [[0.5, 0.256]]


def test_every_attribute_that_the_terminal_shows_has_its_bars(tmp_path: Path, run_maker) -> None:
    run = unjudged(run_maker(tmp_path / "run"))
    add(run, "step-00000040-shapes-8-seed-0-00000001", judge=judged(8, 0.5))
    rows = {row["attribute"]: row["bars"] for row in score_rows([RunLog.open(run)])}
    assert rows["objects"] == [{"run": 0, "seen": 0.25, "held_out": 0.25}]


def test_the_nearest_pictures_stand_in_the_page(tmp_path: Path, run_maker) -> None:
    run = near_run(run_maker(tmp_path / "run"))
    log = RunLog.open(run)
    (row,) = nearest_rows([log])
    assert (row["hits"], row["count"], row["among_all"], row["step"]) == ("21", "36", "38", 40)
    assert figure_rows([log])[0][0].label == "Found again"
    page = render_report([run], tmp_path / "page.html")
    said = text_of(page)
    assert "58.3%" in said and "21 of 36 training pictures, chance 2.8%, step 40" in said and "50.0% of 38" in said
    assert "guidance 3.0" in said and "Full match" not in said and 'href="#nearest"' in page.read_text()
    assert 'width="9" height="7"' in page.read_text()


def test_a_joint_report_has_both_judges(tmp_path: Path, run_maker) -> None:
    runs = [run_maker(tmp_path / "a"), near_run(run_maker(tmp_path / "b")), unjudged(run_maker(tmp_path / "c"))]
    rows = {row[0].label: row for row in figure_rows([RunLog.open(run) for run in runs])}
    assert [each.value for each in rows["Found again"]] == ["—", "58.3%", "—"]
    assert [each.note for each in rows["Full match, seen"]] == [
        "64 prompts, step 40", "judged by the nearest picture alone", "not judged",
    ]  # fmt: skip
    said = text_of(render_report(runs, tmp_path / "page.html"))
    assert "21 of 36" in said and "Drawn, and beside it the captioned picture: b" in said


@pytest.mark.parametrize("spoilt", [7, [], {"share": "much", "count": True}, {"hits": None, "examples": 3}])
def test_whatever_a_file_holds_the_page_is_written(tmp_path: Path, run_maker, spoilt: Any) -> None:
    run = unjudged(run_maker(tmp_path / "run"))
    add(run, "step-00000040-nearest-2-seed-0-00000001", nearest=spoilt, judge={"seen": [], "examples": 1}, loss="low")
    add(run, "step-00000040-nearest-2-seed-1-00000002", nearest=spoilt, as_configured="perhaps", weights={"a": 1})
    render_report([run], tmp_path / "page.html")


def test_goodput_and_the_committed_share_are_two_words(tmp_path: Path, run_maker) -> None:
    """100 of 120 steps' seconds were committed; the supervisor saw twice the time."""
    run = run_maker(tmp_path / "run")
    log = RunLog.open(run)
    spent = log.sums.spent.seconds
    (run / "launch").mkdir()
    lines = [
        {"attempt": 1, "started": 0.0, "ended": spent, "why": "died"},
        {"attempt": 2, "started": 100.0, "ended": 100.0 + spent, "why": "done"},
    ]
    (run / "launch" / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = text_of(render_report([run], tmp_path / "page.html"))
    committed, kept = log.sums.committed.seconds / spent, log.sums.committed.seconds / (2 * spent)
    assert f"Goodput {100 * kept:.1f}%" in said and f"Committed share of the time {100 * committed:.1f}%" in said
    assert "Kept of it" not in said
