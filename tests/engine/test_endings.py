"""How a training ends and what it says of it: its last lines, a finished run started again, bad samples listed once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longskip.engine import opening
from longskip.engine.config import Config
from longskip.engine.data.shapes import generate
from longskip.engine.quarantine import Noted
from longskip.engine.runs import RunFolder
from longskip.engine.trainer import closing_lines
from longskip.errors import RunMismatchError
from tests.ranks import small_config, train_ranks


def entry(sample: int, reason: str = "image_decode") -> dict[str, Any]:
    return {"key": f"{sample:03d}", "sample": sample, "reason": reason, "detail": "x"}


def listed(path: Path) -> list[tuple[int, int]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row["sample"], row["step"]) for row in rows]


# --- bad samples ------------------------------------------------------------------------------------------------------


def test_a_bad_sample_is_noted_once_over_ranks_epochs_and_starts(tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"
    one, two = Noted(path), Noted(path)
    one.add([entry(7), entry(7), entry(9, "quarantined")], 1)
    two.add([entry(3)], 1)
    two.add([entry(7), entry(3)], 4)  # what the other rank has met in the epoch before
    one.add([entry(3), entry(7), entry(5)], 6)
    Noted(path).add([entry(5), entry(8), entry(3)], 7)  # another start
    assert listed(path) == [(7, 1), (3, 1), (5, 6), (8, 7)]
    one.add([entry(5)], 9)
    assert len(listed(path)) == 4


def test_the_list_is_read_only_when_a_sample_is_new(tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"
    noted = Noted(path)
    noted.add([entry(7)], 1)
    path.unlink()
    noted.add([entry(7)], 2)  # known: neither read nor written
    assert not path.exists()


def test_a_list_with_other_lines_is_read_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"
    path.write_text('a key\n[]\n{"key": "x"}\n{"sample": "y"}\n' + json.dumps(entry(4)) + "\n")
    Noted(path).add([entry(4), entry(6)], 2)
    assert json.loads(path.read_text().splitlines()[-1])["sample"] == 6 and len(path.read_text().splitlines()) == 6


def test_what_could_not_be_written_is_written_later(tmp_path: Path) -> None:
    noted = Noted(tmp_path / "run" / "bad_samples.jsonl")
    with pytest.raises(OSError):
        noted.add([entry(1)], 1)
    (tmp_path / "run").mkdir()
    noted.add([entry(1)], 3)
    assert listed(noted.path) == [(1, 3)]


def test_what_is_known_of_bad_samples_before_they_are_read(tmp_path: Path) -> None:
    config = Config.model_validate({"data": {"max_bad_share": 0.1}})
    unread = opening.bad_so_far(config, tmp_path, 10)
    assert "more than 10% (data.max_bad_share) stop a run" in unread and opening.bad_so_far(config, None, 10) == unread
    (tmp_path / "bad_samples.jsonl").write_text("".join(json.dumps(entry(n)) + "\n" for n in (2, 7, 7)))
    said = opening.bad_so_far(config, tmp_path, 10)
    assert "2 of 10 samples are bad (met in earlier starts), 20%, above data.max_bad_share 0.1 (10%)" in said
    (tmp_path / "list").write_text("007\n")
    known = Config.model_validate({"data": {"max_bad_share": 0.1, "quarantine": str(tmp_path / "list")}})
    assert opening.bad_so_far(known, tmp_path, 10).startswith("1 of 10 samples are bad (met in earlier starts), 10%; ")


# --- the end ----------------------------------------------------------------------------------------------------------


def pictures(folder: Path, count: int, bad: int) -> None:
    folder.mkdir(parents=True)
    for number, (_, png, texts, _) in enumerate(generate(count, 0)):
        (folder / f"{number:03d}.png").write_bytes(b"no picture" if number == bad else png)
        (folder / f"{number:03d}.txt").write_text(texts[0])


def test_a_training_ends_with_what_was_done_and_a_finished_one_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps an epoch, one bad picture of 16: trained to step 4, started again, and then on to step 6 by two ranks."""
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "train", 16, bad=5)
    run, said, kept = Path("runs") / "mine", [], []
    for ranks, steps in ((1, 4), (1, 4), (2, 6)):
        data = {"max_bad_share": 0.5, "validation": None}
        config = small_config(tmp_path, train={"steps": steps, "batch_size": 8, "micro_batch": 4}, data=data)
        assert train_ranks(ranks, config, run) == [0] * ranks
        said.append(capfd.readouterr().out)
        kept.append(len(listed(run / "bad_samples.jsonl")))
    next_ = ["next: longskip evaluate mine --judge nearest", "      longskip report mine"]
    first, again, more = (text.splitlines() for text in said)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss = {row["step"]: row["loss/global_avg"] for row in rows}
    assert first[-3].startswith("done: 4 steps in ") and first[-3].endswith(f"loss {loss[4]:.4f}; the run is in {run}")
    assert more[-3].startswith("done: 2 of its 6 steps in ") and f"loss {loss[6]:.4f};" in more[-3]
    assert [lines[-2:] for lines in (first, again, more)] == [next_] * 3
    assert again[-4] == f"finished before: {run} is at step 4 of 4, and nothing was trained"
    assert "train.steps=8 (or any number above 4)" in again[-3] and not any(
        "goes on from step" in line for line in again
    )
    assert any("attempt 3 goes on from step 4" in line for line in more)
    assert kept == [1, 1, 1] and rows[-1]["bad_samples"] == 3  # an epoch each, and once in the list


@pytest.mark.parametrize(
    ("groups", "command"),
    [({}, "evaluate x --judge nearest"), ({"eval": {"judge": "shapes"}}, "evaluate x"),
     ({"data": {"validation": "there"}}, "evaluate x")],
)  # fmt: skip
def test_the_next_command_is_one_that_works(groups: dict[str, Any], command: str) -> None:
    config = Config.model_validate(groups)
    job: Any = SimpleNamespace(
        config=config, run=RunFolder(Path("runs/x")), state=SimpleNamespace(step=3), metrics=SimpleNamespace(loss=None)
    )
    told = closing_lines(job, 0, 3661.0)
    assert told[0] == "done: 3 steps in 1:01:01; the run is in runs/x" and told[1] == f"next: longskip {command}"
    job.run = RunFolder(Path("else where"))
    assert closing_lines(job, 0, 1.0)[2] == "      longskip report 'else where'"


@pytest.mark.parametrize(
    ("now", "said"),
    [({"samples": 20, "fingerprint": "b" * 64}, "trained on: 1,038 samples then, 20 now"),
     ({"samples": 1038, "fingerprint": "b" * 64}, "(fingerprint aaaaaaaaaaaa then, bbbbbbbbbbbb now)")],
)  # fmt: skip
def test_changed_data_are_told_of_in_words(tmp_path: Path, now: dict[str, Any], said: str) -> None:
    run = RunFolder(tmp_path)
    run.note(data={"samples": 1038, "fingerprint": "a" * 64})
    run.check_data("pics", {"samples": 1038, "fingerprint": "a" * 64})
    with pytest.raises(RunMismatchError) as refused:
        run.check_data("pics", now)
    assert said in str(refused.value) and "{" not in str(refused.value)


# --- signals ----------------------------------------------------------------------------------------------------------

ASKED = """
import os, signal, sys
from longskip.engine import pulse, signals
signals.listen()
if sys.argv[1] != "none":
    pulse.own().phase(sys.argv[1])
for _ in range(2):
    os.kill(os.getpid(), signal.SIGINT)
sys.exit(0 if signals.asked() and "torch" not in sys.modules else 3)
"""


@pytest.mark.parametrize(
    ("phase", "variables", "said"),
    [("none", {}, "the start-up goes on"), ("start", {"RANK": "0"}, "the start-up goes on"),
     ("step", {}, "once this step has ended"), ("step", {"RANK": "1"}, ""), ("step", {"LONGSKIP_SUPERVISOR": "1-x"}, "")],
)  # fmt: skip
def test_a_signal_is_answered_at_once_and_once(phase: str, variables: dict[str, str], said: str) -> None:
    """By one rank, where no supervisor answers; the second one changes nothing."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LONGSKIP_SUPERVISOR", "LONGSKIP_PULSE")}
    done = subprocess.run(
        [sys.executable, "-c", ASKED, phase], env=environment | variables, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    if said:
        (line,) = done.stderr.splitlines()
        assert line.startswith("longskip: SIGINT: ") and said in line
    else:
        assert done.stderr == ""


def test_a_training_that_starts_up_answers(tmp_path: Path) -> None:
    """Interrupted while it still imports: it says so long before there is a step, and is killed here."""
    pictures(tmp_path / "train", 8, bad=-1)
    (tmp_path / "run.yaml").write_text(
        "model: {preset: uvit-tiny, resolution: 32}\ndata: {path: train}\ntrain: {steps: 5000, batch_size: 8}\n"
    )
    command = [sys.executable, "-m", "longskip.launcher", "train", "run.yaml"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and not _listens(process.pid):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert "SIGINT: the start-up goes on" in process.stderr.readline()
        assert not (tmp_path / "runs" / "run" / "metrics.jsonl").exists()
    finally:
        process.kill()
        process.communicate()


def _listens(process: int) -> bool:
    """Whether a process has its handlers: SIGHUP's is set last."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (signal.SIGHUP - 1) & 1)
    return False
