"""What a run says of itself: metrics.jsonl, TensorBoard, the line to read, and on a terminal a bar that fits into it."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from longskip.engine.metrics import Line, Metrics
from longskip.profiling.meter import Meter

VALUES = {
    "loss": 0.5,
    "lr": 1e-3,
    "grad_norm": 1.0,
    "images": 8,
    "bad": 0,
    "peaks": [2.0**30],
    "model_flops": 3 * 10**12,
    "six_nd": 4 * 10**12,
}


@pytest.mark.parametrize(
    ("devices", "communication", "metric", "said"),
    [(2, 0.5, 25.0, "data 0%  comm 25%  1.0 GiB"), (2, None, None, "data 0%  1.0 GiB"),
     (1, 0.5, 25.0, "data 0%  1.0 GiB")],
)  # fmt: skip
def test_communication_is_told_where_it_is_known(
    tmp_path: Path, devices: int, communication: float | None, metric: float | None, said: str
) -> None:
    now = [0.0]
    meter = Meter(device_name="cpu", devices=devices, clock=lambda: now[0])
    counts: dict[str, Any] = dict.fromkeys(
        ("images", "image_tokens", "tokens", "model_flops", "hardware_flops", "six_nd"), 1
    )
    meter.add(**counts, communication=communication)
    now[0] = 2.0
    metrics = Metrics(tmp_path, main=True, attempt=1, steps=10, start=0, tensorboard=True)
    metrics.interval(meter.interval(), VALUES, 1.0)
    metrics.close()
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert row.get("time/communication(%)") == metric and row["time/data_loading(%)"] == 0.0
    assert said in (tmp_path / "logs" / "rank-0.log").read_text()
    board = b"".join(path.read_bytes() for path in (tmp_path / "events").iterdir())
    assert (b"time/communication(%)" in board) == (metric is not None)


def test_what_was_spent_stands_beside_6nd(tmp_path: Path) -> None:
    """The committed sums, not the interval's: exact C, 6ND and their ratio, in the line, in JSON and in TensorBoard."""
    now = [0.0]
    meter = Meter(device_name="cpu", clock=lambda: now[0])
    meter.add(images=1, image_tokens=1, tokens=1, model_flops=5, hardware_flops=6, six_nd=7)
    now[0] = 1.0
    metrics = Metrics(tmp_path, main=True, attempt=1, steps=10, start=0, tensorboard=True)
    metrics.interval(meter.interval(), VALUES, 1.0)
    metrics.close()
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (row["flops/model"], row["flops/6nd"], row["flops/model_over_6nd"]) == (3 * 10**12, 4 * 10**12, 0.75)
    assert "tokens/s  C 3.00e+12 (0.750 of 6ND)\n" in (tmp_path / "logs" / "rank-0.log").read_text()
    board = b"".join(path.read_bytes() for path in (tmp_path / "events").iterdir())
    assert b"flops/model_over_6nd" in board


def test_an_interval_without_a_finite_loss_has_none(tmp_path: Path) -> None:
    meter = Meter(device_name="cpu")
    meter.add(images=1, image_tokens=1, tokens=1, model_flops=5, hardware_flops=6, six_nd=7)
    metrics = Metrics(tmp_path, main=True, attempt=1, steps=10, start=0, tensorboard=False)
    metrics.interval(meter.interval(), VALUES | {"loss": None, "grad_norm": None, "skipped": 2}, 1.0)
    metrics.rewind(2, 0)
    metrics.record(1, {})
    metrics.close()
    row, again = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert "loss/global_avg" not in row and "grad_norm" not in row and row["skipped_steps"] == 2
    said = (tmp_path / "logs" / "rank-0.log").read_text()
    assert "loss –  " in said and "lr 1.00e-03  norm –" in said and metrics.loss is None
    assert (row["attempt"], again["attempt"]) == (1, 2)


def test_what_tensorboard_has_past_a_rollback_is_dropped(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(tmp_path, main=True, attempt=1, steps=10, start=0, tensorboard=True)
    for step in (1, 2, 3):
        metrics.record(step, {"value": float(step)})
    metrics.rewind(2, 1)
    metrics.record(2, {"value": 20.0})
    metrics.close()
    board = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("value")] == [(1, 1.0), (2, 20.0)]


FIRST = ["loss 0.1234", "eta 1:02:03", "1234 images/s"]
REST = ["lr 1.50e-03", "norm 10.300", "data 100%", "1.0 GiB", "123456 tokens/s"]


@pytest.mark.parametrize("width", [*range(61, 140), 200])
def test_the_bar_keeps_what_matters_whatever_the_width(width: int) -> None:
    """Run, step, loss, time left and speed are whole at every width that has place for them; the rest from the left."""
    text = Line("a-run-of-mine", 123_456, 500_000, FIRST, REST).text(width)
    assert len(text) <= width
    parts = text.split("  ")
    assert parts[0] == "a-run-of-mine" or (width < 69 and parts[0].startswith("a-r") and parts[0].endswith("…"))
    assert all(part in parts for part in ["123456/500000", *FIRST])
    shown = [part for part in parts if part in REST]
    assert shown == REST[: len(shown)]
    if len(shown) < len(REST):  # the next one has no place
        assert len(text) + 2 + len(REST[len(shown)]) > width
    else:
        assert width > 130


def test_the_bar_is_as_long_as_what_is_done() -> None:
    for step, share in ((0, 0), (250, 0.25), (999, 0.95), (1000, 1)):
        text = Line("run", step, 1000).text(160)
        assert text.count("━") == int(20 * share) and text.count("━") + text.count("╌") == 20
    assert Line("a-long-name", 10, 20, ["loss 1"], []).text(12) == "10/20  loss "


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _trained_on_a_terminal(run: Path, monkeypatch: pytest.MonkeyPatch, *, piped: bool) -> tuple[str, str]:
    """Standard error and output of 40 steps, in intervals of one."""
    error, output = Terminal(), io.StringIO() if piped else Terminal()
    with monkeypatch.context() as patched:
        for name, value in (("COLUMNS", "80"), ("LINES", "30"), ("TERM", "xterm")):
            patched.setenv(name, value)
        patched.setattr(sys, "stderr", error)
        patched.setattr(sys, "stdout", output)
        now = [0.0]
        meter = Meter(device_name="cpu", clock=lambda: now[0])
        metrics = Metrics(run, main=True, attempt=1, steps=40, start=0, tensorboard=False)
        for step in range(40):
            meter.add(images=8, image_tokens=8, tokens=8, model_flops=5, hardware_flops=6, six_nd=7)
            now[0] += 1.0
            metrics.reached(step + 1)
            metrics.interval(meter.interval(), VALUES | {"loss": float(step + 1)}, 1.0)
        metrics.end_line("done: all of it")
        metrics.close()
    return error.getvalue(), output.getvalue()


def test_a_terminal_keeps_ten_lines_above_the_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error, output = _trained_on_a_terminal(tmp_path / "run", monkeypatch, piped=False)
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).strip("\r") for line in re.split(r"\n|\r", error)]
    kept = [line for line in lines if line.startswith("step ")]
    assert [line.split("  ")[:2] for line in kept] == [[f"step {n}/40", f"loss {n}.0000"] for n in range(4, 41, 4)]
    assert all(len(line) <= 80 for line in lines)
    assert [line for line in lines if line][-1].startswith(
        "run  ━━━━━━━━━━  40/40  loss 40.0000  eta 0:01  8.00 images/s"
    )
    assert output == "done: all of it\n"  # below the bar, which has stopped
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text().splitlines()
    assert sum(" step " in line and "C 3.00e+12" in line for line in log) == 40


def test_a_pipe_has_every_line_and_no_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error, output = _trained_on_a_terminal(tmp_path / "run", monkeypatch, piped=True)
    assert error == ""
    lines = output.splitlines()
    assert len(lines) == 41 and lines[0].startswith("step 1/40  loss 1.0000  eta 0:01  8.00 images/s  lr 1.00e-03")


def test_quarantined_samples_are_not_told_of_at_every_line(tmp_path: Path) -> None:
    meter = Meter(device_name="cpu")
    metrics = Metrics(tmp_path, main=True, attempt=1, steps=10, start=0, tensorboard=False)
    for reasons in ({"quarantined": 504}, {"quarantined": 504, "image_decode": 3}):
        meter.add(images=1, image_tokens=1, tokens=1, model_flops=5, hardware_flops=6, six_nd=7)
        metrics.interval(meter.interval(), VALUES | {"bad_reasons": reasons}, 1.0)
    metrics.close()
    first, second = (tmp_path / "logs" / "rank-0.log").read_text().splitlines()
    assert "bad" not in first and "bad: image_decode 3  " in second and "quarantined" not in second
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert row["bad/quarantined"] == 504
