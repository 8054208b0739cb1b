"""Node 0's decisions on made-up observations: no process, no network, no clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longskip.launcher.members import Ending, Guest, Leader, Note, Plan, Report, Terms

TIMEOUT, PATIENCE = 30.0, 1800.0


class Play:
    """Nodes that are told what to report; time passes when it is said."""

    def __init__(
        self, nodes: int = 2, ranks: int = 1, *, fits: Callable[[int], int] = lambda n: n, **terms: Any
    ) -> None:
        given = {"elastic": False, "min_nodes": 1, "restarts": 3, "preflight": "no"} | terms
        self.commit, self.number = -1, 0
        self.now = 0.0
        self.notes: list[Note] = []
        self.reports: dict[int, Report] = {0: Report("s0")}
        self.dead: set[int] = set()
        terms_ = Terms(
            nodes=nodes, ranks=ranks, patience=PATIENCE, node_timeout=TIMEOUT, fits=fits,
            committed=lambda: self.commit, numbered=lambda: self.number, **given,
        )  # fmt: skip
        self.leader = Leader(terms_, "leader", self.now)

    def says(self, node: int, **words: Any) -> Plan:
        words.setdefault("session", f"s{node}")
        self.reports[node] = replace(self.reports.get(node, Report(words["session"])), **words)
        return self.turn()

    def turn(self, seconds: float = 1.0) -> Plan:
        """Time passes; every node that is not dead beats."""
        self.now += seconds
        for node, report in self.reports.items():
            if node not in self.dead:
                self.reports[node] = replace(report, beat=report.beat + 1)
        plan = self.leader.decide(self.now, dict(self.reports))
        self.notes += self.leader.notes
        self.leader.notes.clear()
        return plan

    def pass_(self, seconds: float) -> Plan:
        for _ in range(int(seconds)):
            plan = self.turn()
        return plan

    def run(self, *nodes: int) -> Plan:
        """The nodes come and start the attempt that the plan orders."""
        for node in nodes:
            plan = self.says(node, state="idle")
        assert plan.order == "run", plan
        for node in nodes:
            if plan.shares[node]:
                plan = self.says(node, state="running", attempt=plan.attempt, endings=())
        return plan

    def ends(self, node: int, *endings: Ending, **words: Any) -> Plan:
        return self.says(node, state="idle", endings=endings, **words)

    def kinds(self) -> list[str]:
        return [note.kind for note in self.notes if note.kind not in ("started", "ended")]


def died(rank: int, detail: str = "killed by SIGKILL", step: int = 4, signal: int = 9) -> Ending:
    return Ending(rank, "died", detail, step, signal)


def test_nodes_are_waited_for_and_ranks_numbered_node_by_node() -> None:
    play = Play(nodes=3, ranks=2)
    assert play.turn().order == "wait"
    assert play.says(2).order == "wait"
    plan = play.says(1)
    assert (plan.order, plan.attempt, plan.shares, plan.world) == ("run", 1, (2, 2, 2), 6)
    assert [plan.first_rank(node) for node in range(3)] == [0, 2, 4]


def test_nodes_that_do_not_come_end_the_launch_and_are_named() -> None:
    play = Play(nodes=4)
    play.says(2)
    assert play.pass_(PATIENCE - 10).order == "wait"
    plan = play.pass_(20)
    assert (plan.order, plan.code) == ("stop", 1)
    assert "nodes 1, 3 did not come within 30 minutes" in play.notes[-1].detail


def test_all_ranks_done() -> None:
    play = Play(ranks=2)
    play.run(0, 1)
    assert play.ends(1, Ending(2, "done"), Ending(3, "done")).order == "run"
    plan = play.ends(0, Ending(0, "done"), Ending(1, "done"))
    assert (plan.order, plan.code, play.kinds()) == ("stop", 0, [])
    assert play.says(1, state="left").order == "stop" and not play.leader.alive(1)
    assert play.kinds() == []  # who leaves at the end is not lost


def test_a_rank_that_dies_when_all_is_done_is_no_incident() -> None:
    play = Play(nodes=1, ranks=2)
    play.run(0)
    plan = play.ends(0, Ending(0, "done"), died(1, "killed by SIGABRT"))
    while plan.order != "stop":
        plan = play.turn()
    assert (plan.code, play.kinds()) == (0, [])
    (ended,) = (note for note in play.notes if note.kind == "ended")
    assert "rank 1 died" in ended.detail


def test_a_rank_that_dies_ends_all_and_the_next_attempt_waits_until_they_are_gone() -> None:
    play = Play()
    play.commit = 3
    play.run(0, 1)
    plan = play.says(1, endings=(died(1),), state="idle")
    assert (plan.order, plan.attempt, plan.at_once) == ("end", 1, True)  # who misses it need not say so
    assert play.pass_(5).order == "end"  # node 0's rank still runs
    play.says(0, state="idle", endings=(Ending(0, "died", "exit code 1", 4),))
    plan = play.turn()
    assert (plan.order, plan.attempt) == ("run", 2)
    note = next(note for note in play.notes if note.kind == "rank_died")
    assert (note.rank, note.step, note.attempt) == (1, 4, 1) and "SIGKILL" in note.detail
    assert play.kinds() == ["rank_died", "restarted"]


def test_the_cause_is_the_signal_and_not_the_neighbour_that_was_seen_first() -> None:
    play = Play()
    play.run(0, 1)
    play.says(0, state="idle", endings=(Ending(0, "died", "exit code 1", 4),))
    play.says(1, state="idle", endings=(died(1),))
    play.turn()
    (note,) = [note for note in play.notes if note.kind == "rank_died"]
    assert note.rank == 1


@pytest.mark.parametrize(("kind", "code"), [("refused", 2), ("final", 1)])
def test_what_would_come_again_is_not_tried_again(kind: Any, code: int) -> None:
    play = Play()
    play.run(0, 1)
    plan = play.says(1, state="idle", endings=(died(1, "exit code 1", signal=0),))
    assert (plan.order, plan.at_once) == ("end", False)
    plan = play.ends(0, Ending(0, kind))  # said while the ranks are being put down
    assert (plan.order, plan.code) == ("stop", code)


def crash(play: Play) -> Plan:
    play.run(0, 1)
    play.says(1, state="idle", endings=(died(1),))
    return play.ends(0)


def test_a_crash_loop_stops_after_three_restarts_without_a_commit() -> None:
    play = Play()
    for _ in range(3):
        assert crash(play).order == "wait"
    plan = crash(play)
    assert (plan.order, plan.code, plan.attempt) == ("stop", 1, 4)
    assert play.kinds() == ["rank_died", "restarted"] * 3 + ["rank_died", "crash_loop", "stopped"]


def test_a_new_commit_begins_the_count_anew() -> None:
    play = Play()
    for commit in (-1, -1, -1, 10, 10, 10):
        play.commit = commit
        assert crash(play).order == "wait"
    assert crash(play).order == "stop"


def test_a_hang_is_dumped_everywhere_before_the_ranks_are_put_down() -> None:
    play = Play()
    play.run(0, 1)
    plan = play.says(1, endings=(Ending(1, "hung", "in 'step' for 31 s", 4),))
    assert (plan.order, plan.dump) == ("end", True)
    play.ends(1, Ending(1, "hung", "in 'step' for 31 s", 4))
    play.ends(0, Ending(0, "hung", "stopped by a signal for 31 s", 4, signal=19))
    plan = play.turn()
    assert (plan.order, plan.dump, plan.attempt) == ("run", False, 2)
    assert [(n.kind, n.rank) for n in play.notes if n.kind == "rank_hung"] == [("rank_hung", 0)]


def test_a_signal_to_any_node_is_passed_on_to_all_and_ends_with_75() -> None:
    play = Play()
    play.run(0, 1)
    plan = play.says(1, asked="SIGTERM")
    assert (plan.order, plan.signal) == ("save", "SIGTERM")
    assert play.turn().order == "save"
    play.ends(1, Ending(1, "saved"))
    plan = play.ends(0, Ending(0, "saved"))
    assert (plan.order, plan.code) == ("stop", 75)
    assert play.kinds() == ["signal"]


def test_a_signal_while_nodes_are_waited_for() -> None:
    play = Play()
    plan = play.says(0, asked="SIGINT")
    assert (plan.order, plan.code) == ("stop", 75)


@pytest.mark.parametrize(("commit", "told"), [(-1, "the beginning"), (40, "step 40")])
def test_a_rank_that_dies_instead_of_saving_loses_nothing_that_was_committed(commit: int, told: str) -> None:
    """75, so that a scheduler starts the run again; what happened is kept."""
    play = Play()
    play.commit = commit
    play.run(0, 1)
    play.says(0, asked="SIGTERM")
    play.ends(1, died(1))
    plan = play.ends(0)
    assert (plan.order, plan.code) == ("stop", 75)
    assert play.kinds() == ["signal", "rank_died", "stopped"]
    assert play.notes[-1].detail.endswith(f"the same command goes on from {told}")


def test_a_node_that_is_lost_while_all_are_asked_to_save() -> None:
    play = Play()
    play.run(0, 1)
    play.says(0, asked="SIGUSR1")
    play.dead.add(1)
    play.pass_(TIMEOUT)
    plan = play.ends(0)
    assert (plan.order, plan.code) == ("stop", 75) and "node_lost" in play.kinds()


def test_what_is_final_stays_final_when_all_are_asked_to_save() -> None:
    play = Play()
    play.run(0, 1)
    play.says(0, asked="SIGTERM")
    play.ends(1, Ending(1, "final"))
    plan = play.ends(0)
    assert (plan.order, plan.code) == ("stop", 1)


def test_a_crash_loop_is_one_though_it_is_asked_to_stop() -> None:
    """Else a scheduler would start it again for ever."""
    play = Play()
    for _ in range(3):
        assert crash(play).order == "wait"
    play.run(0, 1)
    play.says(0, asked="SIGTERM")
    play.ends(1, died(1))
    plan = play.ends(0)
    assert (plan.order, plan.code) == ("stop", 1) and "crash_loop" in play.kinds()


def test_ranks_that_were_asked_by_others_than_us() -> None:
    """A scheduler that sends every process its signal: all save, and we go with them."""
    play = Play()
    play.run(0, 1)
    play.ends(0, Ending(0, "saved"))
    plan = play.ends(1, Ending(1, "saved"))
    assert (plan.order, plan.code) == ("stop", 75)


def test_a_node_that_is_not_heard_of_is_lost_and_ends_a_launch_that_is_not_elastic() -> None:
    play = Play()
    play.run(0, 1)
    play.dead.add(1)
    assert play.pass_(TIMEOUT - 2).order == "run"
    assert play.pass_(3).order == "end"
    plan = play.ends(0)
    assert play.turn().code == 1 and play.leader.plan.order == "stop"
    assert play.kinds()[0] == "node_lost" and "--elastic" in play.notes[-1].detail
    assert plan.attempt == 1


def divides(batch: int) -> Callable[[int], int]:
    return lambda ranks: max((w for w in range(1, ranks + 1) if batch % w == 0), default=0)


def test_elastic_goes_on_with_those_that_are_left_and_grows_when_a_node_returns() -> None:
    play = Play(nodes=3, ranks=1, elastic=True, fits=divides(8))
    play.pass_(2)
    play.says(1)
    assert play.pass_(TIMEOUT - 5).order == "wait"  # the third may be on its way
    plan = play.pass_(5)
    assert (plan.order, plan.shares) == ("run", (1, 1, 0))
    play.run(0, 1)
    assert play.says(2).order == "run"  # three ranks do not divide a batch of eight: nothing to gain
    assert play.pass_(5).order == "run"
    play.dead.add(1)
    play.pass_(TIMEOUT)
    assert play.leader.plan.order == "end"
    play.ends(0)
    plan = play.turn()
    assert (plan.order, plan.attempt, plan.shares) == ("run", 2, (1, 0, 1))
    assert "node_lost" in play.kinds()


def test_elastic_growth_asks_for_a_save_first_and_is_no_failure() -> None:
    play = Play(nodes=2, ranks=2, elastic=True, restarts=0)
    play.pass_(TIMEOUT + 1)
    play.run(0)
    assert play.leader.plan.shares == (2, 0)
    plan = play.says(1)
    assert (plan.order, plan.signal) == ("save", "SIGUSR1")
    play.commit = 7
    plan = play.ends(0, Ending(0, "saved", step=7), Ending(1, "saved", step=7))
    plan = play.turn()
    assert (plan.order, plan.attempt, plan.shares) == ("run", 2, (2, 2))
    assert play.kinds() == []


def test_a_node_that_fell_silent_before_it_told_of_its_ranks_is_not_taken_in() -> None:
    """Its last word is of before the attempt: that none of its ranks runs. Only another word makes it one of the next."""
    play = Play(nodes=2, elastic=True)
    play.says(1)
    play.says(0, state="running", attempt=1)
    play.dead.add(1)
    play.ends(0, Ending(0, "died", "exit code 1"))
    assert play.pass_(10).attempt == 1
    plan = play.pass_(TIMEOUT)
    assert (plan.attempt, plan.shares) == (2, (1, 0))


def test_a_node_that_was_lost_and_is_back_is_told() -> None:
    play = Play(nodes=2, elastic=True)
    play.run(0, 1)
    play.dead.add(1)
    play.pass_(TIMEOUT + 1)
    play.ends(0)
    play.run(0)
    assert play.leader.plan.shares == (1, 0)
    play.dead.clear()
    plan = play.says(1, session="another", state="idle")
    assert plan.order == "save"
    assert play.kinds() == ["node_lost", "restarted", "node_back"]


def test_a_supervisor_that_was_started_anew_has_lost_its_ranks() -> None:
    play = Play()
    play.run(0, 1)
    assert play.says(1, session="another", attempt=0, state="idle").order == "end"
    play.ends(0)
    assert (play.turn().order, play.leader.plan.attempt) == ("run", 2)


def test_a_finished_job_is_finished_though_a_node_is_lost_at_its_end() -> None:
    play = Play()
    play.run(0, 1)
    play.ends(0, Ending(0, "done"))
    play.dead.add(1)
    plan = play.pass_(TIMEOUT + 2)
    assert (plan.order, plan.code) == ("stop", 0)


def test_min_nodes() -> None:
    play = Play(nodes=3, elastic=True, min_nodes=2)
    assert play.pass_(TIMEOUT + 5).order == "wait"
    assert play.says(2).shares == (1, 0, 1)


def test_the_preflight_is_done_once_and_by_all() -> None:
    play = Play(preflight="yes")
    plan = play.says(1)
    assert (plan.order, plan.shares) == ("preflight", (1, 1))
    assert play.says(0, checked="ok").order == "preflight"
    play.says(1, checked="ok")
    assert play.turn().order == "run"
    assert crash(play).order == "wait"
    assert play.turn().order == "run"  # not checked again


@pytest.mark.parametrize(("preflight", "answers", "code"), [("yes", ("ok", "2"), 2), ("only", ("ok", "ok"), 0)])
def test_how_a_preflight_ends(preflight: Any, answers: tuple[str, str], code: int) -> None:
    play = Play(preflight=preflight)
    play.says(1)
    play.says(0, checked=answers[0])
    plan = play.says(1, checked=answers[1])
    assert (plan.order, plan.code, plan.attempt) == ("stop", code, 0)
    told = [note.detail for note in play.notes if note.kind == "stopped"]
    assert told == (["node 1 refused the run in the preflight; what it said stands there"] if code else [])


def alone(**terms: Any) -> Play:
    """Node 0 of two trains, its preflight done; node 1 did not come in time."""
    play = Play(elastic=True, preflight="yes", **terms)
    assert play.pass_(TIMEOUT).order == "preflight"
    assert play.says(0, checked="ok").shares == (1, 0)
    play.run(0)
    return play


def saved(play: Play, *nodes: int) -> Plan:
    """Every rank saves, and the next attempt begins."""
    for node in nodes:
        plan = play.ends(node, Ending(play.leader.plan.first_rank(node), "saved"))
    return plan if plan.order == "run" else play.turn()


def test_a_node_that_comes_late_is_looked_at_before_it_is_taken_in() -> None:
    play = alone()
    plan = play.says(1)
    assert (plan.order, plan.guest) == ("run", Guest(1, 1, "s1"))
    assert play.pass_(TIMEOUT).order == "run"  # the others are not disturbed by it
    plan = play.says(0, judged=(1, ""))
    assert (plan.order, plan.signal, plan.guest) == ("save", "SIGUSR1", None)
    assert saved(play, 0).shares == (1, 1)
    assert play.kinds() == []


def test_a_node_that_fails_its_preflight_is_refused_once_and_a_good_one_is_taken_in() -> None:
    play = alone()
    play.says(1)
    plan = play.says(0, judged=(1, "code: other"))
    assert (plan.order, plan.guest, plan.refused) == ("run", None, (("s1", "code: other"),))
    assert play.pass_(TIMEOUT).guest is None
    play.says(1, state="left")
    plan = play.says(1, session="again", state="idle")
    assert plan.guest == Guest(2, 1, "again")
    play.says(0, judged=(2, "code: other"))
    play.says(1, state="left")
    assert play.kinds() == ["node_refused"]  # its coming and going is no news
    (note,) = [note for note in play.notes if note.kind == "node_refused"]
    assert (note.node, note.detail) == (1, "node 1 is not taken in: code: other")
    assert play.says(1, session="good", state="idle").guest == Guest(3, 1, "good")
    assert play.says(0, judged=(2, "code: other")).order == "run"  # an old verdict is not this one's
    plan = play.says(0, judged=(3, ""))
    assert (plan.order, plan.refused) == ("save", ())
    assert saved(play, 0).shares == (1, 1)
    assert play.kinds() == ["node_refused", "node_back"]


def test_a_node_that_was_lost_is_looked_at_again_when_it_is_back() -> None:
    play = Play(elastic=True, preflight="yes")
    play.says(1)
    play.says(0, checked="ok")
    play.says(1, checked="ok")
    assert play.turn().order == "run"
    play.run(0, 1)
    play.dead.add(1)
    play.pass_(TIMEOUT + 1)
    play.ends(0)
    play.run(0)
    play.dead.clear()
    plan = play.says(1, state="idle")  # the same supervisor, behind a link that was cut
    assert (plan.order, plan.shares, plan.guest) == ("run", (1, 0), Guest(1, 1, "s1"))
    assert play.kinds() == ["node_lost", "restarted"]
    assert play.says(0, judged=(1, "")).order == "save"
    assert play.turn().order == "save"
    assert play.kinds() == ["node_lost", "restarted", "node_back"]


def test_a_guest_that_goes_while_it_is_looked_at() -> None:
    """Node 0 looks at one at a time: the next one waits for the verdict of the one that is gone, which counts for nobody."""
    play = Play(nodes=3, elastic=True, preflight="yes")
    play.pass_(TIMEOUT)
    play.says(0, checked="ok")
    play.run(0)
    play.says(1)
    assert play.says(2).guest == Guest(1, 1, "s1")
    assert play.says(1, session="another").guest == Guest(1, 1, "s1")
    plan = play.says(0, judged=(1, "code: other"))
    assert (plan.order, plan.guest, plan.refused) == ("run", Guest(2, 1, "another"), ())
    assert play.kinds() == []
    plan = play.says(0, judged=(2, ""))
    assert (plan.guest, plan.order) == (Guest(3, 2, "s2"), "save")
    assert saved(play, 0).shares == (1, 1, 0)


def test_without_elastic_a_supervisor_that_is_started_anew_and_refused_ends_the_launch() -> None:
    play = Play(preflight="yes")
    play.says(1)
    play.says(0, checked="ok")
    play.says(1, checked="ok")
    play.run(0, 1)
    play.says(1, session="anew", attempt=0, state="idle")
    play.ends(0)
    assert play.turn().order == "wait" and play.leader.plan.guest == Guest(1, 1, "anew")
    plan = play.says(0, judged=(1, "packages: other"))
    assert (plan.order, plan.code) == ("stop", 1) and "node 1 not taken in" in play.notes[-1].detail


def test_numbers_of_attempts_go_on_from_the_runs_records() -> None:
    play = Play()
    play.number = 6
    play.says(1)
    assert play.leader.plan.attempt == 7
    play.number = 9  # the ranks have rolled back twice
    crash(play)
    assert play.turn().attempt == 10


def test_plans_and_reports_survive_the_way() -> None:
    import json
    from dataclasses import asdict

    report = Report("s", 4, 2, "running", (died(3),), "SIGTERM", 5, judged=(3, "why"))
    guest = Guest(4, 2, "t")
    plan = Plan("l", 9, 2, "save", (2, 0, 1), True, signal="SIGUSR1", code=75, guest=guest, refused=(("u", "why"),))
    assert Report.from_json(json.loads(json.dumps(asdict(report)))) == report
    assert Plan.from_json(json.loads(json.dumps(asdict(plan)))) == plan


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_happens_every_attempt_is_whole_and_the_launch_ends(data: st.DataObject) -> None:
    """Random deaths, losses, returns and signals: an attempt begins only when no rank of another runs on a node that is
    alive; its world divides the batch; nobody takes part whom no preflight has passed; and with no commit a launch ends
    after a bounded number of attempts."""
    elastic, checks = data.draw(st.booleans()), data.draw(st.booleans())
    play = Play(nodes=3, ranks=2, elastic=elastic, fits=divides(8), preflight="yes" if checks else "no")
    started: list[Plan] = []
    passed: set[str] = set()
    for node in (1, 2):
        play.says(node)
    for _ in range(120):
        plan = play.turn(3.0)
        if plan.order == "stop":
            break
        if plan.order == "run" and (not started or plan.attempt > started[-1].attempt):
            running = [n for n, r in play.reports.items() if r.state == "running" and play.leader.alive(n)]
            assert not running
            assert plan.world and (not elastic or 8 % plan.world == 0)
            assert not checks or {play.reports[n].session for n, share in enumerate(plan.shares) if share} <= passed
            started.append(plan)
        if plan.guest is not None and data.draw(st.booleans()):
            good = data.draw(st.booleans())
            passed |= {plan.guest.session} if good else set()
            play.reports[0] = replace(play.reports[0], judged=(plan.guest.number, "" if good else "bad"))
        for node in sorted(play.reports):
            if node in play.dead:
                if data.draw(st.integers(0, 9)) == 0:
                    play.dead.discard(node)
                    play.reports[node] = Report(f"s{node}-{play.now}")
                continue
            report = play.reports[node]
            mine = plan.shares[node] if plan.shares else 0
            if plan.order == "preflight" and mine:
                report = replace(report, checked="ok")
                passed.add(report.session)
            if plan.order == "run" and mine and report.attempt != plan.attempt:
                report = replace(report, state="running", attempt=plan.attempt, endings=())
            elif plan.order == "save" and report.state == "running":
                ranks = range(plan.first_rank(node), plan.first_rank(node) + mine)
                report = replace(report, state="idle", endings=tuple(Ending(rank, "saved") for rank in ranks))
            elif plan.order in ("end", "wait") and report.state == "running":
                report = replace(report, state="idle")
            elif report.state == "running" and data.draw(st.integers(0, 4)) == 0:
                rank = plan.first_rank(node)
                report = replace(report, endings=(died(rank),), state="idle")
            play.reports[node] = report
            if node and data.draw(st.integers(0, 19)) == 0:
                play.dead.add(node)
    failures = sum(note.kind in ("restarted", "crash_loop") for note in play.notes)
    assert failures <= 4  # three restarts, and the end
    assert len({plan.attempt for plan in started}) == len(started)
