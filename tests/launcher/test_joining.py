"""A node that comes late, or back: what stands against it, from made-up facts and of real supervisors."""

from __future__ import annotations

import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longskip.engine.config import Config
from longskip.engine.configio import dump_yaml
from longskip.engine.runs import RunFolder
from longskip.launcher import joining, preflight
from longskip.launcher.facts import Facts
from longskip.launcher.verdicts import Finding
from tests.figures import figure
from tests.launcher.supervised import ROOT, fake, free_place
from tests.launcher.test_preflight import ALTERED, NEEDS
from tests.nodes import MemoryStore, facts_of
from tests.ranks import small_config


def against(theirs: dict[str, Any] | None, own: dict[str, Any] | None = None, **needs: Any) -> list[Finding]:
    return joining.against(facts_of(0, own), facts_of(4, theirs), 4, replace(NEEDS, members=(0, 1, 4), **needs))


def test_a_healthy_node_is_taken_in_and_nodes_that_are_not_asked_are_not_missed() -> None:
    assert against(None) == []


@pytest.mark.parametrize(("altered", "what", "status"), [row[:3] for row in ALTERED])
def test_what_would_refuse_a_launch_refuses_a_guest_and_a_warning_does_not(
    altered: dict[str, Any], what: str, status: str
) -> None:
    found = {each.what for each in against(altered)}
    own = "run/owner" in altered  # only node 0 looks, and finds its own run
    assert found == ({what} if status == "failed" and not own else set())


@pytest.mark.parametrize(
    ("own", "needs"),
    [
        ({"run/owner": "process 4 on n7"}, {}),  # the run itself
        ({"run/free": 1 << 20}, {}),
        ({}, {"wrong": (("no plan", "cure"),)}),
        ({"devices/gpus/0/uncorrected": 3}, {}),
    ],
)
def test_node_zeros_own_faults_are_not_the_guests(own: dict[str, Any], needs: dict[str, Any]) -> None:
    theirs = {"run/free": own["run/free"] - 1} if "run/free" in own else {}
    assert against(theirs, own, **needs) == []
    (found,) = against({**theirs, "software/code": "0" * 64}, own, **needs)
    assert (found.what, found.nodes) == ("code", (4,))


def test_ways_both_to_and_from_the_guest_are_needed() -> None:
    assert [each.what for each in against({"reach/unreached": {"0": "refused"}})] == ["ports"]
    assert [each.what for each in against({}, {"reach/unreached": {"4": "refused"}})] == ["ports"]


def test_a_guest_that_does_not_answer() -> None:
    (found,) = joining.against(facts_of(0), None, 4, NEEDS)
    assert found.what == "nodes" and "node 4 did not answer" in found.seen


def test_what_is_told_holds_value_limit_and_cure() -> None:
    said = joining.told(
        against({"software/config/train.seed": "999999999999", "data/files": {"encoders.vae.path": "/v"}})
    )
    assert "train.seed differs on node 4" in said and "same CONFIG" in said and "; data: encoders.vae.path" in said


def visit(config: Config, guest: Config, run: Path) -> list[Finding]:
    """Node 1 as node 0's guest, in threads on one store; node 0's ranks hold the run's lock."""
    store, found = MemoryStore(), list[list[Finding]]()
    options: dict[str, Any] = {"ranks": 1, "config": config, "run": run}
    known = preflight.check(store, node=0, members=[0], quick=True, **options).own
    assert isinstance(known, Facts)
    folder = RunFolder(run)
    folder.lock()
    try:
        thread = threading.Thread(
            target=lambda: found.append(
                joining.admit(
                    store, guest=1, members=[0, 1], known=known, bind="127.0.0.1", prefix="guest-1", **options
                )
            )
        )
        thread.start()
        joining.look(store, node=1, config=guest, run=run, bind="127.0.0.1", prefix="guest-1")
        thread.join(60)
    finally:
        folder.unlock()
    return found[0]


def test_real_probes_find_nothing_against_a_good_node_and_name_another_setting(shapes: Path, in_tmp: Path) -> None:
    config, run = small_config(shapes), in_tmp / "runs" / "a"
    run.mkdir(parents=True)
    assert visit(config, config, run) == []
    (found,) = visit(config, small_config(shapes, train={"seed": 41_414_141}), run)
    assert found.what == "configuration" and "train.seed differs on node 1" in found.seen
    assert not list(run.glob(".preflight-*"))


@pytest.mark.slow
def test_a_node_of_other_code_or_settings_is_refused_and_a_good_one_is_taken_in(shapes: Path, in_tmp: Path) -> None:
    """Node 1 is killed, and started again three times: with other code, with another seed, and as it was."""
    run, place = in_tmp / "runs" / "r", free_place()
    shutil.copytree(ROOT / "longskip", in_tmp / "other" / "longskip")
    with open(in_tmp / "other" / "longskip" / "errors.py", "a") as file:
        file.write("# another line\n")
    config = dump_yaml(small_config(shapes, launch={"step_timeout": 20, "node_timeout": 10}))
    settings: dict[str, Any] = {"elastic": True, "preflight": True, "config": config, "steps": 1_000_000, "pause": 0.05}

    def line() -> tuple[int, int]:
        """Attempt and world that rank 0 is at."""
        path = run / "steps-0"
        words = path.read_text().splitlines()[-1].split() if path.exists() else ["0", "0", "0"]
        return int(words[0]), int(words[2])

    def refused(*overrides: str, **environment: str) -> str:
        with fake(run, 2, 1, 1, place, overrides=overrides, environment=environment, **settings) as guest:
            assert guest.wait() == 1
            return guest.text()

    with fake(run, 2, 0, 1, place, **settings) as one:
        with fake(run, 2, 1, 1, place, **settings) as two:
            one.until(lambda: line() == (1, 2))
            two.rank(1)
            two.send(signal.SIGKILL)
            two.wait()
            one.until(lambda: line() == (2, 1))
        said = refused(PYTHONPATH=f"{in_tmp / 'other'}:{ROOT}")
        assert "node 1 is not taken in: code: " in said and "one and the same longskip" in said
        for _ in range(2):  # the second time is no news
            said = refused("train.seed=41414141")
            assert "train.seed differs on node 1" in said and "41414141" not in said
        assert line() == (2, 1)
        with fake(run, 2, 1, 1, place, **settings) as two:
            one.until(lambda: line() == (3, 2))
            one.send(signal.SIGTERM)
            assert (one.wait(), two.wait()) == (75, 75)
    nodes = [line for line in one.lines("incidents.jsonl") if line["kind"].startswith("node")]
    assert [line["kind"] for line in nodes] == ["node_lost", "node_refused", "node_refused", "node_back"]
    assert all(line["node"] == 1 for line in nodes) and "code: " in nodes[1]["detail"]
    assert [line["world"] for line in one.lines("launch/attempts.jsonl") if line["ended"]] == [2, 1, 2]
    figure(
        "a node with other code and one with another seed refused beside a run that goes on; then the good one is in"
    )
