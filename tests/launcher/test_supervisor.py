"""The supervisor with ranks that train nothing and start in a moment: what it sees, does, writes and leaves behind.

Named for the faults of the engine's list: 15 SIGKILL, 16 SIGSTOP, 17 SIGTERM, 20 crash loop, 24 what listens.
"""

from __future__ import annotations

import itertools
import signal
import time
from pathlib import Path

import psutil
import pytest

from longskip.engine import pulse
from longskip.launcher.processes import Limits
from tests.launcher.supervised import fake, free_place, gone, launch, step_of_fake

FOREVER = 100_000


def attempts(launched: object) -> list[int]:
    return [line["attempt"] for line in launched.lines("launch/attempts.jsonl") if line["ended"]]  # type: ignore[attr-defined]


def test_fault_15_all_ranks_and_what_they_started_are_gone_soon_and_come_up_again(in_tmp: Path) -> None:
    run = in_tmp / "runs" / "r"
    with fake(run, children=True, steps=FOREVER) as one:
        one.until(lambda: min(step_of_fake(run), step_of_fake(run, 1)) > 25)  # they do not wait for each other
        victim, below = one.rank(1), one.everything()
        assert len(below) == 6  # two ranks with two children each
        victim.kill()
        begin = time.monotonic()
        one.until(lambda: gone(below))
        seconds = time.monotonic() - begin
        one.until(lambda: (run / "steps-1").read_text().splitlines()[-1].startswith("2 "))
        one.send(signal.SIGTERM)
        assert one.wait() == 75
        assert seconds < 5 + 5  # five where nobody else wants the processors
        assert one.incidents() == ["rank_died", "restarted", "signal"]
        died = one.lines("incidents.jsonl")[0]
        assert died["rank"] == 1 and "SIGKILL" in died["detail"] and died["attempt"] == 1 and died["step"] >= 20
        assert "rank 1 died" in one.text() and "SIGKILL" in one.text()
        line = one.lines("launch/attempts.jsonl")[1]
        assert line["why"] == died["detail"] and line["nodes"] == [0] and line["world"] == 2
        assert line["started"] < line["ended"] and line["step"] >= 20
    assert gone(list(one._seen.values()))


def test_fault_16_a_stopped_rank_is_found_its_stacks_dumped_and_killed(in_tmp: Path) -> None:
    run = in_tmp / "runs" / "r"
    with fake(run, steps=FOREVER) as one:
        one.until(lambda: step_of_fake(run, 0) > 5 and step_of_fake(run, 1) > 5)
        stopped, ranks = one.rank(1), [one.rank(0), one.rank(1)]
        stopped.suspend()
        begin = time.monotonic()
        one.until(lambda: "restarted" in one.incidents())
        assert time.monotonic() - begin < 2 + 5 + 5  # the time-out, and five, and five for a busy machine
        assert gone(ranks)
        hung = one.lines("incidents.jsonl")[0]
        assert (hung["kind"], hung["rank"]) == ("rank_hung", 1) and "stopped by a signal" in hung["detail"]
        for rank in (0, 1):
            assert "be_rank" in (run / "logs" / f"stacks-1-rank-{rank}.txt").read_text()
        one.send(signal.SIGTERM)
        assert one.wait() == 75


def test_a_rank_that_waits_for_ever_hangs_without_a_signal(in_tmp: Path) -> None:
    run = in_tmp / "runs" / "r"
    with fake(run, every=100, steps=100, acts={"1:0:12": "wait"}) as one:
        assert one.wait() == 0
        hung = one.lines("incidents.jsonl")[0]
        assert (hung["kind"], hung["rank"], hung["step"]) == ("rank_hung", 0, 11) and "'step'" in hung["detail"]
        assert "sleep" not in hung["detail"] and "in act" in (run / "logs" / "stacks-1-rank-0.txt").read_text()


@pytest.mark.parametrize("times", [1, 2])
def test_fault_17_sigterm_once_and_twice(in_tmp: Path, times: int) -> None:
    run = in_tmp / "runs" / "r"
    with fake(run, steps=FOREVER, children=True, pause=0.1) as one:
        one.until(lambda: step_of_fake(run) > 2)
        below = one.everything()
        for _ in range(times):
            one.send(signal.SIGTERM)
            time.sleep(0.05)
        assert one.wait() == 75
        assert gone(below)
        assert one.incidents() == ["signal"] and attempts(one) == [1]
        assert len(list((run / "checkpoints").glob("step-*"))) == 1  # once


def test_a_rank_that_dies_instead_of_saving_ends_the_run_with_75(in_tmp: Path) -> None:
    """What was committed lies there: a scheduler starts it again. The incident is kept."""
    run = in_tmp / "runs" / "r"
    with fake(run, steps=FOREVER, config="launch: {step_timeout: 60}\n") as one:
        one.until(lambda: step_of_fake(run) > 12 and step_of_fake(run, 1) > 2)
        victim = one.rank(1)
        victim.suspend()
        one.send(signal.SIGTERM)
        one.until(lambda: "all ranks are asked to save" in one.text())
        victim.kill()
        assert one.wait() == 75
        assert one.incidents() == ["signal", "rank_died"] and attempts(one) == [1]
        (ended,) = [line for line in one.lines("launch/attempts.jsonl") if line["ended"]]
        assert f"the same command goes on from step {ended['step']}" in one.text() and ended["step"] >= 10


def test_fault_20_a_crash_loop_stops_after_three_restarts(in_tmp: Path) -> None:
    run = in_tmp / "runs" / "r"
    with fake(run, every=100, steps=200, acts={"*:1:7": "raise"}) as one:
        assert one.wait() == 1
        assert one.incidents() == ["rank_died", "restarted"] * 3 + ["rank_died", "crash_loop"]
        assert attempts(one) == [1, 2, 3, 4]
        assert "[rank 1] ValueError: something that nobody foresaw" in one.text()
        assert "have not led to a new commit" in one.text()


@pytest.mark.parametrize(("act", "code"), [("final", 1), ("exit2", 2)])
def test_what_would_come_again_is_not_started_again(in_tmp: Path, act: str, code: int) -> None:
    with fake(in_tmp / "runs" / "r", every=100, steps=200, acts={"*:1:3": act}) as one:
        assert one.wait() == code
        assert attempts(one) == [1] and "restarted" not in one.incidents()
        assert act != "final" or "[rank 1] longskip: too many bad samples" in one.text()


def test_a_killed_supervisor_leaves_no_rank(in_tmp: Path) -> None:
    run = in_tmp / "runs" / "r"
    with fake(run, steps=FOREVER) as one:
        one.until(lambda: step_of_fake(run) > 2)
        ranks = one.everything()
        ranks[0].suspend()  # a stopped one must go as well
        one.send(signal.SIGKILL)
        one.wait()
        psutil.wait_procs(ranks, timeout=20)
        assert gone(ranks)


@pytest.mark.slow
def test_a_job_that_is_suspended_and_goes_on_has_not_hung(in_tmp: Path) -> None:
    run = in_tmp / "runs" / "r"
    with fake(run, steps=FOREVER, pause=1.5, config="launch: {step_timeout: 5}\n") as one:
        one.until(lambda: step_of_fake(run, 0) > 1 and step_of_fake(run, 1) > 1)
        time.sleep(0.3)  # in a step that the supervisor has seen begin
        everybody = [psutil.Process(one.process.pid), *one.everything()]
        for process in everybody:
            process.suspend()
        time.sleep(8)
        for process in everybody:
            process.resume()
            time.sleep(0.4)  # the supervisor looks at ranks that stand still since long
        step = step_of_fake(run)
        one.until(lambda: step_of_fake(run) > step + 1)
        one.send(signal.SIGTERM)
        assert one.wait() == 75
        assert one.incidents() == ["signal"]


def test_a_second_supervisor_of_a_run_is_refused_and_names_the_first(in_tmp: Path) -> None:
    run = in_tmp / "runs" / "r"
    with fake(run, steps=FOREVER) as one:
        one.until(lambda: step_of_fake(run) > 2)
        with fake(run) as two:
            assert two.wait() == 1
            assert "in use by process" in two.text() and str(one.process.pid) in two.text()
        one.send(signal.SIGTERM)
        assert one.wait() == 75
        assert attempts(one) == [1]


def test_numbers_of_attempts_go_on_when_the_command_is_given_again(in_tmp: Path) -> None:
    run = in_tmp / "runs" / "r"
    for number in (1, 2):
        with fake(run, steps=10 * number) as one:
            assert one.wait() == 0
    assert attempts(one) == [1, 2]


@pytest.mark.slow
def test_two_supervisors_on_one_machine_pass_signals_on_and_restart_together(in_tmp: Path) -> None:
    """Two nodes' supervisors, met at a store on loopback: a death on one, then a signal to the other."""
    run, place = in_tmp / "runs" / "r", free_place()
    with fake(run, 2, 0, 1, place, steps=FOREVER) as one, fake(run, 2, 1, 1, place, steps=FOREVER) as two:
        one.until(lambda: step_of_fake(run, 0) > 5 and step_of_fake(run, 1) > 5)
        two.rank(1).kill()
        two.until(lambda: "\n2 " in (run / "steps-0").read_text() and "\n2 " in (run / "steps-1").read_text())
        two.send(signal.SIGUSR1)
        assert (one.wait(), two.wait()) == (75, 75)
        assert one.incidents() == ["rank_died", "restarted", "signal"]
        assert one.lines("incidents.jsonl")[2]["node"] == 1


@pytest.mark.slow
def test_a_node_that_is_killed_and_started_again_under_elastic(in_tmp: Path) -> None:
    run, place = in_tmp / "runs" / "r", free_place()

    def world() -> int:
        path = run / "steps-0"
        return int(path.read_text().splitlines()[-1].split()[2]) if path.exists() else 0

    with fake(run, 2, 0, 1, place, elastic=True, steps=FOREVER) as one:
        with fake(run, 2, 1, 1, place, elastic=True, steps=FOREVER) as two:
            one.until(lambda: world() == 2)
            two.rank(1)
            two.send(signal.SIGKILL)
            two.wait()
            one.until(lambda: world() == 1)
        with fake(run, 2, 1, 1, place, elastic=True, steps=FOREVER) as two:
            one.until(lambda: world() == 2)
            one.send(signal.SIGTERM)
            assert (one.wait(), two.wait()) == (75, 75)
    assert [kind for kind in one.incidents() if kind.startswith("node")] == ["node_lost", "node_back"]
    done = [int(line.split()[1]) for line in (run / "steps-0").read_text().splitlines()]
    assert all(b in (a + 1, a // 10 * 10 + 1) for a, b in itertools.pairwise(done))  # on from the last commit


@pytest.mark.slow
def test_node_zero_killed_ends_the_other_nodes_ranks(in_tmp: Path) -> None:
    run, place = in_tmp / "runs" / "r", free_place()
    with fake(run, 2, 0, 1, place, steps=FOREVER) as one, fake(run, 2, 1, 1, place, steps=FOREVER) as two:
        one.until(lambda: step_of_fake(run, 1) > 5)
        rank = two.rank(1)
        one.send(signal.SIGKILL)
        begin = time.monotonic()
        assert two.wait() == 1
        assert gone([rank]) and time.monotonic() - begin > 4
        assert "node 0 is out of reach" in two.text()


def test_fault_24_the_store_listens_at_the_chosen_address_only(in_tmp: Path) -> None:
    run, place = in_tmp / "runs" / "r", free_place()
    with fake(run, 2, 0, 1, place, steps=FOREVER) as one:
        process = psutil.Process(one.process.pid)

        def listening() -> list[tuple[str, int]]:
            return [tuple(c.laddr) for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]

        assert one.until(listening) == [("127.0.0.1", int(place.rpartition(":")[2]))]
        one.send(signal.SIGTERM)
        assert one.wait() == 75
        assert not (run / "config.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--", "evaluate", "x"], "train only"),
        (["--", "train"], "train CONFIG"),
        (["--", "train", "run.yaml", "--dry-run"], "--dry-run"),
        (["--", "train", "run.yaml", "train.batch_size=7"], "does not divide over 2"),
        (["--", "train", "run.yaml", "launch.node_timeout=1"], "launch.node_timeout"),
    ],
)
def test_what_cannot_be_started_is_refused_before_a_rank(
    in_tmp: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from longskip.launcher.cli import main

    (in_tmp / "run.yaml").write_text("train: {batch_size: 8}\n")
    with pytest.raises(SystemExit) as ended:
        main(["launch", "--local", "2", *arguments])
    assert ended.value.code == 2 and said in capsys.readouterr().err
    assert not (in_tmp / "runs").exists()


def test_time_outs_are_learned_from_the_steps() -> None:
    auto, phase = Limits(None, 1800.0), 1800.0
    step = pulse.Beat(3, "step", 4, 3)
    assert auto.of(step, 0.0) == phase  # the first step may compile
    assert auto.of(step, 0.5) == 30 and auto.of(step, 7.0) == 70
    assert auto.of(pulse.Beat(3, "save"), 0.5) == phase
    assert Limits(12.0, phase).of(step, 7.0) == 12 and Limits(12.0, phase).of(step, 0.0) == 12
    assert auto.of_stopped(0.0) == 30


def test_a_pulse_is_read_as_it_was_told(tmp_path: Path) -> None:
    path = tmp_path / "pulse"
    path.write_bytes(bytes(pulse.SIZE))
    assert pulse.read(str(path)) == pulse.Beat()
    mine = pulse.Pulse(str(path))
    mine.phase("start")
    assert pulse.read(str(path)) == pulse.Beat(1, "start")
    mine.step(5)
    time.sleep(0.05)
    mine.step(6)
    beat = pulse.read(str(path))
    assert (beat.count, beat.phase, beat.step, beat.finished) == (3, "step", 6, 5) and 0.05 <= beat.slowest < 5
    mine.phase("save", finished=6)
    mine.end("final")
    beat = pulse.read(str(path))
    assert (beat.phase, beat.finished, beat.word) == ("end", 6, "final")
    path.write_bytes(b"\xff" * pulse.SIZE)
    assert pulse.read(str(path)) == pulse.Beat()


def test_a_start_that_never_became_a_run_leaves_nothing(shapes: Path, in_tmp: Path) -> None:
    from longskip.engine.configio import dump_yaml
    from tests.ranks import small_config

    (in_tmp / "run.yaml").write_text(dump_yaml(small_config(shapes)))
    with launch(in_tmp / "runs" / "run", "data.path=nowhere") as one:
        assert one.wait() in (1, 2)
        assert "nowhere" in one.text() and "Traceback" not in one.text() and "start again" not in one.text()
    left = [path for path in (in_tmp / "runs" / "run").rglob("*") if path.is_file() and path.parent.name != "launch"]
    assert not left
