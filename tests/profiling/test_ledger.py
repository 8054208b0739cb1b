from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longskip.profiling.ledger import (
    LedgerFile,
    LedgerLine,
    Resumed,
    append,
    committed_lines,
    read,
    sums,
)

LINE = LedgerLine(
    attempt=1, from_step=0, step=10, images=320, image_tokens=5120, tokens=8000, seconds=2.0, data_wait_seconds=0.5,
    model_flops=10**20 + 1, hardware_flops=2 * 10**20, six_nd=10**20, mfu=0.5, hfu=0.6, loss=0.25, devices=1,
    device_name="NVIDIA H200",
)  # fmt: skip


def interval(attempt: int, from_step: int, step: int) -> LedgerLine:
    """An interval whose amounts depend on its steps alone, step by step, as a deterministic run's do."""
    steps = range(from_step + 1, step + 1)
    return replace(
        LINE,
        attempt=attempt,
        from_step=from_step,
        step=step,
        images=sum(3 + s % 5 for s in steps),
        image_tokens=sum(16 * (3 + s % 5) for s in steps),
        tokens=sum(25 * (3 + s % 5) for s in steps),
        seconds=float(sum(1 + s % 3 for s in steps)),
        data_wait_seconds=float(sum(s % 2 for s in steps)),
        model_flops=sum(10**18 + s for s in steps),
        hardware_flops=sum(2 * 10**18 + s for s in steps),
        six_nd=sum(10**17 + s for s in steps),
    )


def run_attempt(path: Path, attempt: int, start: int, stop: int, total: int, log: int, commit: int) -> list[LedgerLine]:
    """Trains the steps up to ``stop``; an interval ends at every log, at every commit and at the end of the run."""
    append(path, Resumed(attempt, start))
    written, last = [], start
    for step in range(start + 1, stop + 1):
        if step % log == 0 or step % commit == 0 or step == total:
            line = interval(attempt, last, step)
            append(path, line)
            written.append(line)
            last = step
    return written


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_kills_and_resumes_give_the_unbroken_runs_committed_sums(data: st.DataObject, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    total = data.draw(st.integers(1, 40), label="total")
    log = data.draw(st.integers(1, 7), label="log")
    commit = data.draw(st.integers(1, 9), label="commit")
    run_attempt(folder / "unbroken.jsonl", 1, 0, total, total, log, commit)
    unbroken = sums(read(folder / "unbroken.jsonl").entries)
    assert unbroken.committed == unbroken.spent and unbroken.committed_share == 1.0

    path, start, spent, attempt, torn = folder / "broken.jsonl", 0, [], 1, 0
    commits = {0}
    for attempt in range(1, data.draw(st.integers(1, 5), label="kills") + 1):
        stop = data.draw(st.integers(start, total), label="killed at")
        spent += run_attempt(path, attempt, start, stop, total, log, commit)
        commits |= {step for step in range(start + 1, stop + 1) if step % commit == 0}
        if data.draw(st.booleans(), label="torn"):
            # The crash came while the next line was written; at least its brace and less than the whole.
            whole = json.dumps({"attempt": attempt, "from_step": stop, "device_name": "x"}).encode()
            with open(path, "ab") as file:
                file.write(whole[: data.draw(st.integers(1, len(whole) - 1), label="bytes")])
            torn += 1
        # Any commit that still verifies, mostly the newest; commits past it are gone from then on.
        start = data.draw(st.sampled_from(sorted(commits)[-3:]), label="resumed from")
        commits = {step for step in commits if step <= start}
    spent += run_attempt(path, attempt + 1, start, total, total, log, commit)

    file = read(path)
    broken = sums(file.entries)
    assert broken.committed == unbroken.committed
    assert (broken.last_step, broken.missing_steps, file.skipped) == (total, 0, torn)
    assert broken.attempts == attempt + 1
    assert broken.spent.steps == sum(line.step - line.from_step for line in spent)
    assert broken.spent.model_flops == sum(line.model_flops for line in spent)
    assert broken.spent.seconds == math.fsum(line.seconds for line in spent)
    assert broken.committed_share == pytest.approx(unbroken.committed.seconds / broken.spent.seconds)


def test_superseded_lines_stay_in_the_file_and_in_what_was_spent(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    entries = [Resumed(1, 0), interval(1, 0, 10), interval(1, 10, 20), Resumed(2, 10), interval(2, 10, 20)]
    for entry in entries:
        append(path, entry)
    assert read(path) == LedgerFile(tuple(entries), 0)
    assert committed_lines(entries) == [entries[1], entries[4]]
    got = sums(entries)
    assert (got.committed.steps, got.spent.steps, got.attempts) == (20, 30, 2)
    assert got.spent.images - got.committed.images == entries[2].images
    assert got.committed_share == pytest.approx(got.committed.seconds / got.spent.seconds)


def test_figures_survive_the_file_to_the_last_digit(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    line = replace(LINE, model_flops=123456789012345678901234567890, seconds=0.1 + 0.2, device_name="a\nb“ü")
    append(path, line)
    assert path.read_bytes().count(b"\n") == 1
    assert read(path).lines == (line,)
    assert sums(read(path).entries).committed.model_flops == 123456789012345678901234567890


@pytest.mark.parametrize("cut", [1, 3, 20, -1])
def test_a_line_cut_by_a_crash_costs_only_itself(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "ledger.jsonl"
    append(path, LINE)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-1][:cut])
    append(path, replace(LINE, from_step=10, step=20), durable=True)
    got = read(path)
    assert ([line.step for line in got.lines], got.skipped) == ([10, 20], 1)


def test_a_writer_that_went_on_behind_a_cut_line_loses_nothing_more(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    append(path, LINE)
    whole = path.read_bytes()
    append(path, replace(LINE, from_step=10, step=20))
    path.write_bytes(whole + whole[:50] + path.read_bytes()[len(whole) :])
    got = read(path)
    assert (len(got.lines), got.skipped) == (2, 1)


@pytest.mark.parametrize(
    "broken",
    [
        b"\xff\xfe",
        b"[1, 2]",
        b'{"attempt": 1}',
        json.dumps({**LINE.__class__.__dict__, "x": 1}, default=str).encode(),
        json.dumps({"attempt": 1, "resumed_from": None}).encode(),
        json.dumps({"attempt": True, "resumed_from": 3}).encode(),
    ],
)
def test_lines_that_are_no_entries_are_skipped_and_counted(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "ledger.jsonl"
    append(path, LINE)
    with open(path, "ab") as file:
        file.write(broken + b"\n")
    got = read(path)
    assert (got.entries, got.skipped) == ((LINE,), 1)


@pytest.mark.parametrize(("name", "value"), [("step", 1.5), ("images", None), ("seconds", "2"), ("mfu", "high")])
def test_a_line_with_a_value_of_the_wrong_kind_is_skipped(tmp_path: Path, name: str, value: object) -> None:
    path = tmp_path / "ledger.jsonl"
    append(path, LINE)
    body = json.loads(path.read_text())
    path.write_text(json.dumps({**body, name: value}) + "\n")
    assert read(path) == LedgerFile((), 1)


def test_a_loss_that_is_not_finite_is_written_as_null(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    append(path, replace(LINE, loss=math.nan, mfu=None))
    assert "NaN" not in path.read_text()
    (line,) = read(path).lines
    assert line.loss is None and line.mfu is None


def test_mfu_of_the_sums_is_the_mean_over_time() -> None:
    lines = [
        replace(LINE, seconds=1.0, mfu=0.2, hfu=None),
        replace(LINE, from_step=10, step=20, seconds=3.0, mfu=0.6, hfu=None),
        replace(LINE, from_step=20, step=30, seconds=50.0, mfu=None, hfu=None),
    ]
    got = sums(lines).committed
    assert got.mfu == pytest.approx((0.2 + 3 * 0.6) / 4) and got.hfu is None
    assert got.data_wait_share == pytest.approx(1.5 / 54)
    assert got.images_per_second == pytest.approx(960 / 54)


def test_a_ledger_of_before_communication_was_measured_is_read(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    append(path, LINE)
    body = json.loads(path.read_text())
    del body["communication_seconds"]
    path.write_text(json.dumps(body) + "\n")
    assert read(path) == LedgerFile((LINE,), 0) and LINE.communication_seconds is None
    append(path, replace(LINE, from_step=10, step=20, seconds=4.0, communication_seconds=1.0))
    append(path, replace(LINE, from_step=20, step=30, seconds=6.0, communication_seconds=3.0))
    append(path, replace(LINE, from_step=30, step=40, seconds=0.0, communication_seconds=0.0))
    got = sums(read(path).entries).committed
    assert got.communication_seconds == 4.0 and got.communication_share == 0.4  # of the lines that know it
    nothing = sums([LINE]).committed
    assert nothing.communication_seconds is None and nothing.communication_share is None


@pytest.mark.parametrize("value", ["1", True, [1.0], "Infinity"])
def test_communication_of_the_wrong_kind_costs_the_line(tmp_path: Path, value: object) -> None:
    path = tmp_path / "ledger.jsonl"
    append(path, LINE)
    path.write_text(json.dumps({**json.loads(path.read_text()), "communication_seconds": value}) + "\n")
    assert read(path) == LedgerFile((), 1)


def test_nothing_is_a_ledger_too_and_a_gap_is_seen(tmp_path: Path) -> None:
    empty = sums(read(tmp_path / "none.jsonl").entries)
    assert empty.committed_share is None and empty.committed.images_per_second is None and empty.last_step == 0
    assert sums([interval(1, 0, 10), interval(1, 20, 30)]).missing_steps == 10


# -- damaged and doubled lines -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seconds", -5), ("seconds", 1e300), ("data_wait_seconds", -1e-9), ("communication_seconds", -1.0),
        ("devices", 0), ("devices", -1), ("images", -1), ("tokens", 2**100 + 1), ("model_flops", 10**400),
        ("six_nd", -1), ("from_step", -1), ("step", 0), ("mfu", -0.1), ("mfu", 1e300), ("loss", 10**400),
        ("attempt", -1), ("device_name", 7),
    ],
)  # fmt: skip
def test_a_line_with_a_value_that_cannot_be_is_skipped(tmp_path: Path, name: str, value: object) -> None:
    path = tmp_path / "ledger.jsonl"
    append(path, LINE)
    body = json.loads(path.read_text())
    with open(path, "a") as file:
        file.write(json.dumps({**body, "from_step": 10, "step": 20, name: value}) + "\n")
    got = read(path)
    assert (got.lines, got.skipped, got.overlapping) == ((LINE,), 1, ())


def test_the_largest_counts_are_read(tmp_path: Path) -> None:
    line = replace(LINE, model_flops=2**100, tokens=0, seconds=0.0, mfu=0.0)
    append(tmp_path / "ledger.jsonl", line)
    assert read(tmp_path / "ledger.jsonl").lines == (line,)


def test_a_resume_from_below_nothing_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text('{"attempt": 1, "resumed_from": -1}\n{"attempt": 1, "resumed_from": 0}\n')
    assert read(tmp_path / "ledger.jsonl") == LedgerFile((Resumed(1, 0),), 1)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_steps_of_an_attempt_count_once_whatever_is_doubled(data: st.DataObject, tmp_path_factory) -> None:
    """Any lines of any attempts in any order, doubled and overlapping: sums hold no step of an attempt twice."""
    interval_of = st.tuples(st.integers(1, 3), st.integers(0, 12), st.integers(1, 5))
    drawn = data.draw(st.lists(interval_of, max_size=14))
    path = tmp_path_factory.mktemp("doubled") / "ledger.jsonl"
    for attempt, start, length in drawn:
        append(path, interval(attempt, start, start + length))
    if data.draw(st.booleans()) and drawn:
        append(path, Resumed(2, data.draw(st.integers(0, 12))))
    file = read(path)
    assert len(file.lines) + len(file.overlapping) == len(drawn) and file.skipped == 0
    spent = [(line.attempt, step) for line in file.lines for step in range(line.from_step, line.step)]
    assert len(spent) == len(set(spent))
    for line in file.overlapping:  # each repeats a step that counts
        assert {(line.attempt, step) for step in range(line.from_step, line.step)} & set(spent)
    kept = [step for line in committed_lines(file.entries) for step in range(line.from_step, line.step)]
    assert len(kept) == len(set(kept))
    got = sums(file.entries)
    assert got.missing_steps >= 0 and (got.committed_share is None or 0 <= got.committed_share <= 1)


def test_a_doubled_line_counts_once_and_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    first, second = interval(1, 0, 10), interval(1, 10, 20)
    for entry in (Resumed(1, 0), first, second, second, interval(1, 15, 25), interval(1, 25, 30)):
        append(path, entry)
    got = read(path)
    assert got.overlapping == (second, interval(1, 15, 25)) and got.skipped == 0
    assert sums(got.entries).missing_steps == 5  # 20 to 25 lay in the line that overlaps
    assert sums(got.entries).committed.images == sum(line.images for line in (first, second, interval(1, 25, 30)))


def test_an_attempt_without_its_first_line_supersedes_what_it_did_again() -> None:
    """The line that says from where attempt 2 resumed was cut: its own first line says it as well."""
    entries = [
        Resumed(1, 0),
        *(interval(1, at, at + 10) for at in (0, 10, 20)),
        *(interval(2, at, at + 10) for at in (10, 20)),
    ]
    assert [(line.attempt, line.step) for line in committed_lines(entries)] == [(1, 10), (2, 20), (2, 30)]
    assert sums(entries).missing_steps == 0
