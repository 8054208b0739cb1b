"""Training under the supervisor, hurt from outside: it comes up again and ends bitwise where the straight run ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longskip.engine import checkpoint
from longskip.engine.configio import dump_yaml
from longskip.profiling import ledger
from tests.engine.test_resume import assert_same_run
from tests.figures import figure
from tests.launcher.supervised import Launched, gone, launch
from tests.ranks import small_config, train_ranks

pytestmark = pytest.mark.slow
STEPS = 30


@pytest.fixture(scope="module")
def straight(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without a fault, and the configuration that all of them have."""
    folder = tmp_path_factory.mktemp("straight")
    config = small_config(shapes, train={"steps": STEPS}, checkpoint={"every": 5}, logging={"every": 1})
    (folder / "run.yaml").write_text(dump_yaml(config))
    assert train_ranks(2, config, folder / "run") == [0, 0]
    return folder / "run"


@pytest.fixture
def run(straight: Path, in_tmp: Path) -> Path:
    (in_tmp / "run.yaml").write_text((straight.parent / "run.yaml").read_text())
    return in_tmp / "runs" / "run"


def trained(one: Launched, step: int) -> None:
    one.until(lambda: max(one.steps(), default=0) >= step)


def resumed(run: Path) -> list[int]:
    """Where the attempts after the first went on."""
    entries = ledger.read(run / "ledger.jsonl").entries
    return [entry.resumed_from for entry in entries if isinstance(entry, ledger.Resumed)][1:]


@pytest.mark.parametrize("victim", [0, 1])
def test_fault_15_sigkill_in_a_step(run: Path, straight: Path, victim: int) -> None:
    with launch(run) as one:
        trained(one, 12)
        ranks = [one.rank(0), one.rank(1)]
        ranks[victim].kill()
        killed = time.monotonic()
        before = len(one.steps())
        one.until(lambda: gone(ranks))
        down = time.monotonic() - killed
        one.until(lambda: len(one.steps()) > before + 1 and resumed(run))
        figure(
            f"SIGKILL of rank {victim} of 2: all ranks gone after {down:.1f} s, the next step after "
            f"{time.monotonic() - killed:.1f} s"
        )
        assert one.wait() == 0
    assert_same_run(run, straight, steps=STEPS)
    assert one.incidents() == ["rank_died", "restarted"]
    assert f"rank {victim} died" in one.text() and "SIGKILL" in one.text() and "Traceback" not in one.text()
    (went_on,) = resumed(run)
    entries = ledger.read(run / "ledger.jsonl").entries
    reached = max(e.step for e in entries if isinstance(e, ledger.LedgerLine) and e.attempt == 1)
    assert 10 <= went_on <= reached
    assert ledger.sums(entries).spent.steps == STEPS + reached - went_on  # the redone steps are in what was spent


def test_fault_16_sigstop_in_a_step(run: Path, straight: Path) -> None:
    with launch(run, "launch.step_timeout=8") as one:
        trained(one, 7)
        ranks = [one.rank(0), one.rank(1)]
        ranks[1].suspend()
        begin = time.monotonic()
        one.until(lambda: "rank_hung" in one.incidents())
        seconds = time.monotonic() - begin
        assert gone(ranks)
        figure(f"SIGSTOP of a rank, step time-out 8 s: found, stacks dumped and all ranks gone after {seconds:.1f} s")
        assert one.wait() == 0
    for rank in (0, 1):
        assert "trainer.py" in (run / "logs" / f"stacks-1-rank-{rank}.txt").read_text()
    (hung,) = [line for line in one.lines("incidents.jsonl") if line["kind"] == "rank_hung"]
    assert hung["rank"] == 1 and "stopped by a signal" in hung["detail"]
    assert_same_run(run, straight, steps=STEPS)


@pytest.mark.parametrize(("number", "times"), [(signal.SIGTERM, 1), (signal.SIGTERM, 2), (signal.SIGUSR1, 1)])
def test_fault_17_a_signal_saves_and_the_same_command_goes_on(
    run: Path, straight: Path, number: signal.Signals, times: int
) -> None:
    with launch(run) as one:
        trained(one, 7)
        below = one.everything()
        begin = time.monotonic()
        for _ in range(times):
            one.send(number)
            time.sleep(0.2)
        assert one.wait() == 75
        figure(f"{number.name} × {times}: saved and left after {time.monotonic() - begin:.1f} s")
        assert gone(below)
    found, complaints = checkpoint.newest(run / "checkpoints")
    assert found is not None and not complaints
    saved = checkpoint.read_state(found)["step"]
    assert saved >= 7 and max(one.steps()) == saved
    assert sorted(one.incidents()) == ["signal", "signal"]  # the supervisor's, and the ranks'
    with launch(run) as again:
        assert again.wait() == 0
    assert resumed(run) == [saved]
    assert_same_run(run, straight, steps=STEPS)


def test_a_signal_before_the_first_step(run: Path, straight: Path) -> None:
    """Asked while the ranks import: kept for the first step's end."""
    with launch(run) as one:
        one.rank(0)
        one.send(signal.SIGTERM)
        assert one.wait() == 75
    with launch(run) as one:
        assert one.wait() == 0
    assert_same_run(run, straight, steps=STEPS)


def test_a_start_does_not_load_torchs_compiler() -> None:
    """A second of every rank's start, and so of every recovery: DeepSpeed's Muon would be compiled where it is imported."""
    program = (
        "import sys\nfrom longskip.engine.distributed import import_deepspeed\nimport_deepspeed()\n"
        "import deepspeed.runtime.zero.muon.original_muon\nassert 'torch._inductor.compile_fx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
