"""The share of communication in what a run says of itself: metrics.jsonl, TensorBoard and the line to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longskip.engine.metrics import Metrics
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
    assert "C 3.00e+12 (0.750 of 6ND)  eta 0:01" in (tmp_path / "logs" / "rank-0.log").read_text()
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
    assert "loss –  lr 1.00e-03  norm –" in (tmp_path / "logs" / "rank-0.log").read_text()
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
