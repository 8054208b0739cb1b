from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longskip.errors import ConfigError, RunFolderError
from longskip.profiling import units
from longskip.profiling.report import MAX_GRIDS, render_report
from longskip.profiling.reportdata import MAX_POINTS, chart_data, figure_rows
from longskip.profiling.runlog import RunLog


class Page(HTMLParser):
    """What a browser would see: the elements with their attributes, the visible text, the scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside: str | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else self._inside
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = None if tag == self._inside else self._inside

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside is None:
            self.text += " ".join(data.split()) + " " if data.strip() else ""

    def ids(self) -> set[str]:
        return {value for _, attributes in self.elements if (value := attributes.get("id"))}


def render(*runs: Path) -> tuple[str, Page]:
    html = render_report(runs, runs[0].parent / "out.html").read_text(encoding="utf-8")
    return html, Page(html)


def test_the_figures_stand_in_the_page(tmp_path: Path, run_maker) -> None:
    _, page = render(run_maker(tmp_path / "shapes"))
    for expected in (
        "shapes", "finished", "80.0%", "64 prompts, step 40", "59.4%", "32 prompts, step 40",  # the judge
        "320", "in 40 steps", "8,000", "5,120 image tokens", "1.14 M", "1.10 M act on every token",
        "4.00×10¹³", "3.20×10¹³", "C ÷ C₆ND = 1.2500", "40,000,000,000,028",  # C, C_6ND, ratio, exact C
        "400", "10,000 tokens/s", "1.2 s", "5.0%", "66.7%",  # 40 committed steps of 60
        "no datasheet peak for “AMD EPYC 7B13” in the hardware table, therefore no MFU",
        "a blue square", "sampler euler", "guidance 3.0", "98.4%", "killed by signal 9", "image_decode 2",
        "2.13.0", "betas: [0.9, 0.99]", "attempt",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert {"figures", "samples", "scores", "curves", "speed", "ledger", "config", "environment"} <= page.ids()


def test_time_in_collectives_stands_beside_the_wait_for_data(tmp_path: Path, run_maker) -> None:
    unknown = run_maker(tmp_path / "unknown")
    _, page = render(unknown)
    assert f"Communication {units.NONE} not measured" in page.text and "In collectives" not in page.text
    known = run_maker(tmp_path / "known")
    for name, field, value in (
        ("ledger.jsonl", "communication_seconds", 0.05),
        ("metrics.jsonl", "time/communication(%)", 25.0),
    ):
        rows = [json.loads(line) for line in (known / name).read_text().splitlines()]
        rows = [row | {field: value} if "seconds" in row or "lr" in row else row for row in rows]
        (known / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, page = render(known)
    assert "Communication 25.0% of the wall time in collectives" in page.text
    assert "In collectives 0.2 s" in page.text  # committed: 4 intervals of 50 ms
    charts = chart_data([RunLog.open(known)], ["known"])["charts"]
    assert charts["communication"][0]["y"] == [25.0] * 4 and any(
        attributes.get("data-chart") == "communication" for _, attributes in page.elements
    )


def test_resumes_are_named_where_there_were_any(tmp_path: Path, run_maker) -> None:
    resumed, unbroken = run_maker(tmp_path / "a"), run_maker(tmp_path / "b")
    lines = (unbroken / "ledger.jsonl").read_text().splitlines(keepends=True)
    (unbroken / "ledger.jsonl").write_text("".join(lines[:5]))
    assert "mean over the batch; dotted where a run was resumed Validation" in render(resumed)[1].text
    assert "mean over the batch Validation" in render(unbroken)[1].text


def test_what_the_ledger_does_not_hold_and_what_was_left_out_is_said(tmp_path: Path, run_maker) -> None:
    run = run_maker(tmp_path / "run")
    _, whole = render(run)
    assert "everything executed, first step to last logged one" in whole.text
    assert "from the first step of each attempt to the last logged one" in whole.text
    assert "overlapping" not in whole.text and "unreadable" not in whole.text
    with open(run / "ledger.jsonl", "a") as file:
        line = (run / "ledger.jsonl").read_text().splitlines()[-1]
        file.write(line + "\n")
        file.write(json.dumps(json.loads(line) | {"from_step": 40, "step": 50, "model_flops": 10**400}) + "\n")
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 50, "loss/global_avg": 10**400}) + "\n")
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"params": 10**400}))
    _, page = render(run)
    assert "ledger.jsonl: 1 line overlapping another of the same attempt left out" in page.text
    assert "ledger.jsonl: 1 unreadable or cut line skipped" in page.text
    assert "metrics.jsonl: 1 unreadable or cut line skipped" in page.text
    assert f"Goodput {units.share(RunLog.open(run).sums.committed_share)} of the wall time" in page.text
    assert "40,000,000,000,028" in page.text  # C as before


def test_mfu_of_a_known_device(tmp_path: Path, run_maker) -> None:
    _, page = render(run_maker(tmp_path / "run", device="NVIDIA H200"))
    assert "41.2%" in page.text and "HFU 41.2% · NVIDIA H200" in page.text and "no datasheet peak" not in page.text


def test_nothing_is_loaded_from_anywhere(tmp_path: Path, run_maker) -> None:
    html, page = render(run_maker(tmp_path / "a"), run_maker(tmp_path / "b"))
    assert not re.search(r"https?:|//[a-z0-9]+\.|@import|\bfetch\(|XMLHttpRequest|\bimport\(", html)
    pictures = 0
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "audio", "video", "form", "use", "image")
        assert not {"srcset", "poster", "action", "background", "data", "xlink:href"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes), "no inline event handlers"
        if source := attributes.get("src"):
            assert tag == "img" and source.startswith("data:image/png;base64,")
            assert base64.b64decode(source.split(",")[1], validate=True).startswith(b"\x89PNG")
            pictures += 1
        if target := attributes.get("href"):
            assert tag == "a" and target[0] == "#" and target[1:] in page.ids()
    assert pictures == 2 * (2 + 1)
    assert re.findall(r"url\([^)]*\)", html) == ["url(#${clip})"]


def test_the_policy_allows_the_pages_own_script_and_no_other(tmp_path: Path, run_maker) -> None:
    _, page = render(run_maker(tmp_path / "run"))
    (policy,) = (a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    data, script = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy is not None and "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    json.loads(data)


def test_a_hostile_caption_is_text_wherever_it_stands(tmp_path: Path, run_maker, hostile: str) -> None:
    run = run_maker(tmp_path / "run", caption=hostile, device=hostile)
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"name": hostile, "status": hostile}))
    (run / "incidents.jsonl").write_text(json.dumps({"kind": hostile, "detail": {"x": hostile}, "step": hostile}))
    (run / "environment.json").write_text(json.dumps({hostile: hostile}))
    (run / "config.yaml").write_text(json.dumps({hostile: {hostile: hostile}, "x": [hostile]}))
    html, page = render(run, run_maker(tmp_path / "other", caption=hostile + "2"))
    assert len(page.scripts) == 2 and not re.search(r"<script>\s*alert", html)
    assert all(attributes.get("src") != "x" for _, attributes in page.elements)
    assert not any("onerror" in attributes for _, attributes in page.elements)
    assert page.text.count('<script>alert("caption")</script><img src=x onerror=alert(1)> &') >= 10
    assert json.loads(page.scripts[0])["runs"][0]["name"] == hostile


def test_sections_without_data_are_left_out(tmp_path: Path) -> None:
    run = tmp_path / "bare"
    run.mkdir()
    (run / "config.yaml").write_text("model: {width: 128}\n")
    _, page = render(run)
    assert page.ids() & {"figures", "samples", "scores", "curves", "speed", "ledger", "environment", "events"} == {
        "figures"
    }
    assert "config" in page.ids() and "no committed step" in page.text and "Full match" not in page.text
    assert not [a for _, a in page.elements if "data-chart" in a]


def test_several_runs_side_by_side(tmp_path: Path, run_maker) -> None:
    _, page = render(run_maker(tmp_path / "a" / "run"), run_maker(tmp_path / "b" / "run", lr=2e-3))
    data = json.loads(page.scripts[0])
    assert [run["name"] for run in data["runs"]] == ["run", "run (2)"]
    assert [series["run"] for series in data["charts"]["loss"]] == [0, 1]
    table = page.text.split("differs")[1].split("the whole of it")[0]
    assert "optim.lr" in table and "0.001" in table and "0.002" in table and "model.width" not in table
    assert sum("differs" in (a.get("class") or "").split() for tag, a in page.elements if tag == "div") == 2


def test_chart_points_are_the_runs_own(tmp_path: Path, run_maker) -> None:
    log = RunLog.open(run_maker(tmp_path / "run"))
    data = chart_data([log], ["run"])
    (loss,) = data["charts"]["loss"]
    assert loss["x"] == [10, 20, 30, 40] and loss["y"] == pytest.approx([1.1, 1.05, 2 + 1 / 30, 2.025], rel=1e-5)
    (run,) = data["runs"]
    assert run["steps"] == [0, 10, 20, 30, 40] and run["images"] == [0, 80, 160, 240, 320]
    assert run["flops"][-1] == 4 * (10**13 + 7) and run["resumed"] == [20]
    assert data["charts"]["bins"][-1]["x"] == [0.125, 0.375, 0.75]
    seen, held_out = data["charts"]["scores"]
    assert (seen["y"], held_out["y"], held_out["dashed"]) == ([40.0, 80.0], [59.375, 59.375], True)
    assert "mfu" not in data["charts"]


def test_a_long_run_is_thinned_by_means_and_nan_is_a_gap(tmp_path: Path) -> None:
    count = 4 * MAX_POINTS - 3
    rows = [{"step": i + 1, "loss/global_avg": float("nan") if i < 4 else float(i)} for i in range(count)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (series,) = chart_data([RunLog.open(tmp_path)], ["x"])["charts"]["loss"]
    assert series["group"] == 4 and len(series["x"]) == len(series["y"]) == MAX_POINTS
    assert series["y"][:2] == [None, (4 + 5 + 6 + 7) / 4] and series["x"][-1] == count
    assert series["y"][-1] == count - 1  # the last group is not full


def test_grids_are_thinned_evenly_and_broken_ones_passed_over(tmp_path: Path, run_maker) -> None:
    run = run_maker(tmp_path / "run")
    for step in range(100, 140):
        folder = run / f"samples/step-{step:08d}"
        folder.mkdir()
        shutil.copy(run / "samples/step-00000020/grid.png", folder)
    (run / "samples/step-00000020/grid.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    _, page = render(run)
    steps = [int(value) for tag, a in page.elements if tag == "figure" and (value := a.get("data-step"))]
    assert len(steps) == MAX_GRIDS - 1 and steps[-1] == 139 and 20 not in steps
    assert f"{42 - MAX_GRIDS} more sample steps" in page.text


def test_where_the_file_goes(tmp_path: Path, run_maker, monkeypatch) -> None:
    one, two = run_maker(tmp_path / "one"), run_maker(tmp_path / "two")
    monkeypatch.chdir(tmp_path)
    assert render_report([one]) == one / "report.html"
    assert render_report([one, two]) == Path("report.html")
    target = render_report([one], tmp_path / "new" / "r.html")
    assert target.is_file() and [file.name for file in target.parent.iterdir()] == ["r.html"]
    (tmp_path / "runs").mkdir(exist_ok=True)
    for out in (tmp_path / "runs", "/", ""):
        with pytest.raises(ConfigError, match="cannot write"):
            render_report([one], out)
    with pytest.raises(RunFolderError, match="at least 1 run"):
        render_report([])
    with pytest.raises(RunFolderError, match="does not exist"):
        render_report([tmp_path / "three"])


def test_figures_of_a_judged_and_an_unjudged_run_stand_in_one_table(tmp_path: Path, run_maker) -> None:
    judged, plain = run_maker(tmp_path / "a"), run_maker(tmp_path / "b")
    shutil.rmtree(plain / "eval")
    rows = figure_rows([RunLog.open(judged), RunLog.open(plain)])
    assert len(rows) == 13 and all(row[0].label == row[1].label for row in rows)
    assert (rows[0][0].value, rows[0][1].value) == ("80.0%", units.NONE)
    assert len(figure_rows([RunLog.open(plain)])) == 11


def test_the_report_needs_no_torch(tmp_path: Path, run_maker) -> None:
    run = run_maker(tmp_path / "run")
    code = (
        "import sys\n"
        "from longskip.profiling import Meter, RunLog, hardware, ledger, lookup, render_report\n"
        f"render_report([{str(run)!r}])\n"
        "print([name for name in ('torch', 'matplotlib', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium to run the page's script")
def test_a_browser_draws_the_charts_under_the_policy(tmp_path: Path, run_maker) -> None:
    render(run_maker(tmp_path / "a"), run_maker(tmp_path / "b"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom"]
    done = subprocess.run([*command, f"file://{tmp_path / 'out.html'}"], capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in done.stderr
    page = Page(done.stdout)
    charts = [a for _, a in page.elements if "data-chart" in a]
    drawn = [a for tag, a in page.elements if tag == "path" and "line run-" in (a.get("class") or "")]
    assert len(charts) == 8 and len(drawn) == 7 * 2 + 4  # two curves each, four of the scores
    assert all(re.fullmatch(r"(M[\d. -]+)(L[\d. -]+)+", a["d"] or "") for a in drawn)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (units.count(None), "—"), (units.count(999_999), "999,999"), (units.count(1_000_000), "1.00 M"),
        (units.count(2_344_200_356), "2.34 B"), (units.count(99_960_000), "100 M"), (units.count(10**16), "10,000 T"),
        (units.scientific(10**18), "1.00×10¹⁸"), (units.scientific(999_999), "1.00×10⁶"), (units.scientific(0), "0"),
        (units.share(0.975), "97.5%"), (units.share(0.00042), "0.042%"), (units.share(0), "0.0%"),
        (units.duration(0), "0 s"), (units.duration(59.94), "59.9 s"), (units.duration(59.99), "1 min"),
        (units.duration(3599.6), "1 h"), (units.duration(7980), "2 h 13 min"), (units.duration(90000), "1 d 1 h"),
        (units.rate(0.4213), "0.421"), (units.rate(9120.4), "9,120"), (units.exact(1141380), "1,141,380"),
    ],
)  # fmt: skip
def test_numbers_as_people_read_them(shown: str, expected: str) -> None:
    assert shown == expected


@given(st.floats(60, 10**9))
def test_durations_lose_less_than_their_smaller_unit(seconds: float) -> None:
    size = {"d": 86400, "h": 3600, "min": 60, "s": 1}
    words = units.duration(seconds).replace(",", "").split()
    total = sum(int(number) * size[unit] for number, unit in zip(words[::2], words[1::2], strict=True))
    smaller = {"d": 3600, "h": 60, "min": 1}[words[1]]
    assert -0.5 <= seconds - total < smaller + 0.5


def test_the_page_says_which_implementation_served_each_op(tmp_path: Path, run_maker) -> None:
    run = run_maker(tmp_path / "run")
    said = json.loads((run / "run.json").read_text())
    said["kernels"] = {
        "adaln": {"triton": "auto: measured"},
        "attention": {"torch": "a", "triton": "b"},
        "mlp": ["torch", "c"],
    }
    (run / "run.json").write_text(json.dumps(said))
    text = render(run)[1].text.replace("'", "")
    for shown in (
        "kernels.adaln triton (auto: measured)",
        "kernels.attention torch (a), triton (b)",
        "kernels.mlp torch (c)",
    ):
        assert shown in text
