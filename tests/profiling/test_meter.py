from __future__ import annotations

import pytest

from longskip.errors import ConfigError
from longskip.profiling.hardware import lookup
from longskip.profiling.meter import Meter


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def feed(meter: Meter, steps: int = 1, wait: float = 0.0) -> None:
    for _ in range(steps):
        meter.add(
            images=8, image_tokens=128, tokens=200, model_flops=10**15 + 1, hardware_flops=2 * 10**15, six_nd=7,
            data_wait=wait,
        )  # fmt: skip


def test_totals_and_rates_of_an_interval() -> None:
    clock = Clock()
    meter = Meter(device_name="NVIDIA H200", devices=4, dtype="bf16", step=100, clock=clock)
    feed(meter, 5, wait=0.25)
    clock.now += 10.0
    got = meter.interval()
    assert (got.from_step, got.step, got.images, got.image_tokens, got.tokens) == (100, 105, 40, 640, 1000)
    assert (got.model_flops, got.hardware_flops, got.six_nd) == (5 * (10**15 + 1), 10**16, 35)
    assert (got.seconds, got.data_wait_seconds, got.data_wait_share) == (10.0, 1.25, 0.125)
    assert (got.images_per_second, got.tokens_per_second, got.steps_per_second) == (4.0, 100.0, 0.5)
    assert got.flops_per_second == 5 * (10**15 + 1) / 10
    device = lookup("H200")
    assert device is not None
    assert got.mfu == pytest.approx(5 * (10**15 + 1) / (10 * 4 * device.peak("bf16")), rel=1e-15)
    assert got.hfu == pytest.approx(10**16 / (10 * 4 * 989.5e12), rel=1e-15)


def test_intervals_are_seamless_and_peek_changes_nothing() -> None:
    clock = Clock()
    meter = Meter(device_name="cpu", clock=clock)
    feed(meter, 2)
    clock.now += 1.5
    assert meter.peek() == meter.peek()
    first = meter.interval()
    clock.now += 0.5  # a checkpoint between the steps belongs to the next interval
    feed(meter, 1)
    clock.now += 1.0
    second = meter.interval()
    assert first.seconds + second.seconds == clock.now - 1000.0
    assert (first.step, second.from_step, second.step) == (2, 2, 3)
    assert second.images == 8
    empty = meter.interval()
    assert (empty.images, empty.images_per_second, empty.seconds) == (0, 0.0, 0.0)


def test_no_time_is_lost_between_intervals() -> None:
    ticks = iter(range(100))
    meter = Meter(device_name="cpu", clock=lambda: float(next(ticks)))  # every look at the clock takes a second
    seconds = []
    for _ in range(5):
        feed(meter)
        seconds.append(meter.interval().seconds)
    assert sum(seconds) == next(ticks) - 1  # up to the last look, from the first one at 0


def test_communication_is_a_part_of_the_interval_or_unknown() -> None:
    clock = Clock()
    meter = Meter(device_name="cpu", clock=clock)
    counts = dict.fromkeys(("images", "image_tokens", "tokens", "model_flops", "hardware_flops", "six_nd"), 1)
    for seconds in (0.5, 0.75):
        meter.add(**counts, communication=seconds)
    clock.now += 5.0
    got = meter.interval()
    assert (got.communication_seconds, got.communication_share) == (1.25, 0.25)
    assert got.line(attempt=1, loss=None).communication_seconds == 1.25
    meter.add(**counts, communication=0.0)
    clock.now += 1.0
    none_at_all = meter.interval()
    assert (none_at_all.communication_seconds, none_at_all.communication_share) == (0.0, 0.0)
    meter.add(**counts)
    clock.now += 1.0
    unknown = meter.interval()
    assert (unknown.communication_seconds, unknown.communication_share) == (None, None)
    assert unknown.line(attempt=1, loss=None).communication_seconds is None


def test_an_unknown_device_has_no_mfu_and_says_why() -> None:
    clock = Clock()
    meter = Meter(device_name="AMD EPYC 7B13", dtype="bf16", clock=clock)
    feed(meter)
    clock.now += 1
    got = meter.interval()
    assert got.mfu is None and got.hfu is None
    assert meter.reason is not None and "AMD EPYC 7B13" in meter.reason
    assert Meter(device_name="NVIDIA H200").reason is None


def test_eta_follows_the_last_intervals() -> None:
    clock = Clock()
    meter = Meter(device_name="cpu", step=50, clock=clock)
    assert meter.eta(100) is None
    feed(meter, 10)
    clock.now += 20.0
    meter.interval()
    assert meter.eta(100) == pytest.approx(40 * 2.0)
    for _ in range(10):  # ten intervals at another pace push the first out
        feed(meter, 1)
        clock.now += 1.0
        meter.interval()
    assert meter.eta(100) == pytest.approx(30 * 1.0)
    assert meter.eta(10) == 0.0


def test_the_ledger_line_of_an_interval() -> None:
    clock = Clock()
    meter = Meter(device_name="NVIDIA H200", devices=2, clock=clock)
    feed(meter, 3)
    clock.now += 2.0
    interval = meter.interval()
    line = interval.line(attempt=2, loss=0.5)
    assert (line.attempt, line.loss, line.devices, line.device_name) == (2, 0.5, 2, "NVIDIA H200")
    for name in ("from_step", "step", "images", "image_tokens", "tokens", "seconds", "data_wait_seconds",
                 "model_flops", "hardware_flops", "six_nd", "mfu", "hfu"):  # fmt: skip
        assert getattr(line, name) == getattr(interval, name)


def test_a_meter_needs_a_device_and_a_known_dtype() -> None:
    with pytest.raises(ConfigError, match="0"):
        Meter(device_name="cpu", devices=0)
    with pytest.raises(ConfigError, match="int4"):
        Meter(device_name="NVIDIA H200", dtype="int4")
