"""Who takes part in the next attempt, and when one begins and ends: decisions from observations alone (no torch, no clock).

Every supervisor says again and again what its node is at (``Report``); node 0's ``Leader`` answers with what all should be
at (``Plan``). Both are whole states, not messages: what is lost on the way is said again, and a supervisor that comes
late, or back, finds everything that it needs in the newest plan.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from longskip.errors import EXIT_DONE, EXIT_FAILED, EXIT_SAVED, EXIT_USAGE

Kind = Literal["done", "saved", "refused", "final", "died", "hung"]
Order = Literal["wait", "preflight", "run", "save", "end", "stop"]
State = Literal["idle", "running", "left"]


@dataclass(frozen=True)
class Ending:
    """How a rank ended by itself, or that it hangs; ``step`` is the last step that it finished (−1: none is known)."""

    rank: int
    kind: Kind
    detail: str = ""
    step: int = -1
    signal: int = 0  # it died of this one, or stands still by it: the cause, where others lost a neighbour


@dataclass(frozen=True)
class Report:
    """What a node's supervisor says of itself. ``attempt`` is the last one that it started ranks for, 0 before any."""

    session: str  # of the supervisor's process: another one is another supervisor
    beat: int = 0
    attempt: int = 0
    state: State = "idle"
    endings: tuple[Ending, ...] = ()
    asked: str = ""  # the name of a signal that this supervisor was sent
    step: int = -1
    checked: str = ""  # preflight: "" not done, "ok", or the exit code
    judged: tuple[int, str] = (0, "")  # node 0's: the last guest that it looked at, and what stands against it

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Report:
        endings = tuple(Ending(**ending) for ending in value["endings"])
        number, why = value["judged"]
        return cls(**(value | {"endings": endings, "judged": (number, why)}))


@dataclass(frozen=True)
class Guest:
    """A supervisor that came after the preflight, or back, and is being looked at; ``number`` counts them from 1."""

    number: int
    node: int
    session: str


@dataclass(frozen=True)
class Plan:
    """What all nodes should be at: ``shares`` are the ranks of every node in ``attempt``, in the order of the nodes.

    ``guest`` is looked at beside that; ``refused`` are (session, why) of supervisors that are not taken in.
    """

    session: str
    beat: int = 0
    attempt: int = 0
    order: Order = "wait"
    shares: tuple[int, ...] = ()
    dump: bool = False  # with end: the stacks of all ranks first
    at_once: bool = False  # with end: no time for the ranks to say what is wrong with them
    signal: str = ""  # with save: the signal that is passed on
    code: int = 0  # with stop
    guest: Guest | None = None
    refused: tuple[tuple[str, str], ...] = ()

    @property
    def world(self) -> int:
        return sum(self.shares)

    def first_rank(self, node: int) -> int:
        return sum(self.shares[:node])

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Plan:
        guest = Guest(**value["guest"]) if value["guest"] else None
        refused = tuple((session, why) for session, why in value["refused"])
        return cls(**(value | {"shares": tuple(value["shares"]), "guest": guest, "refused": refused}))


@dataclass(frozen=True)
class Terms:
    """What was asked for, and what is asked of the run; times in seconds.

    ``fits(n)``: the largest world of at most n ranks that divides the batch, 0 for none; ``committed()``: the newest
    committed step, −1 for none; ``numbered()``: the newest attempt's number in the run's records, 0 for none.
    """

    nodes: int
    ranks: int
    elastic: bool
    min_nodes: int
    patience: float
    node_timeout: float
    restarts: int
    preflight: Literal["yes", "no", "only"]
    fits: Callable[[int], int]
    committed: Callable[[], int]
    numbered: Callable[[], int]


@dataclass(frozen=True)
class Note:
    """Something to be told: an incident, or an attempt's beginning (``started``) or end (``ended``)."""

    kind: str
    detail: str
    attempt: int
    step: int = -1
    node: int | None = None
    rank: int | None = None
    shares: tuple[int, ...] = ()


@dataclass
class Leader:
    """Node 0's decisions. ``decide`` is called again and again with the reports; ``notes`` are taken out by the caller."""

    terms: Terms
    session: str
    now: float
    notes: list[Note] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.attempt = 0  # the last one that was begun
        self.plan = Plan(self.session)
        self.phase: Literal["gathering", "checking", "running", "ending", "stopped"] = "gathering"
        self._since = self.now
        self._first = True
        self._checked = self.terms.preflight == "no"
        self._reports: dict[int, Report] = {}  # the last readable one of every node that ever said something
        self._marks: dict[int, tuple[str, int]] = {}
        self._heard: dict[int, float] = {}
        self._lost: set[int] = set()
        self._sessions: dict[int, str] = {}
        self._passed: dict[int, str] = {}  # node -> the session that a preflight found nothing against
        self._refused: dict[int, tuple[str, str]] = {}  # node -> (session, why)
        self._told: dict[int, str] = {}  # node -> why it was refused, when that was last told
        self._guests = 0
        self._back: set[int] = set()  # were lost, and are heard of again; told once they may run
        self._endings: list[Ending] = []
        self._gone: list[int] = []  # nodes whose loss ended the attempt
        self._asked = ""
        self._growing = False
        self._tries = 0  # restarts since the last new commit
        self._base = self._step = self.terms.committed()

    # --- hearing ------------------------------------------------------------------------------------------------------

    def alive(self, node: int) -> bool:
        """Whether the node was heard of lately and has not left."""
        return node in self._heard and node not in self._lost

    def _may_run(self, node: int) -> bool:
        """Whether the node is alive, and no preflight of it is still to be done or has refused it."""
        return self.alive(node) and (not self._checks_guests or self._passed.get(node) == self._marks[node][0])

    @property
    def _checks_guests(self) -> bool:
        """Whether the preflight of all is over, so that who comes now is looked at alone."""
        return self._checked and self.terms.preflight == "yes"

    def _hear(self, reports: Mapping[int, Report]) -> None:
        for node, report in reports.items():
            mark = (report.session, report.beat)
            if self._marks.get(node) != mark and report.state != "left":
                self._marks[node], self._heard[node] = mark, self.now
                if node in self._lost:
                    self._lost.discard(node)
                    self._back.add(node)
                if node in self._back and self._may_run(node):
                    self._back.discard(node)
                    self._note("node_back", f"node {node} is heard of again", node=node)
            silent = self.now - self._heard.get(node, self.now)
            if self.phase == "stopped":  # they leave because they were told to
                if report.state == "left":
                    self._lost.add(node)
                continue
            if self.alive(node) and (report.state == "left" or silent >= self.terms.node_timeout):
                known = self._may_run(node)
                self._lost.add(node)
                self._passed.pop(node, None)
                left = "its supervisor has ended" if report.state == "left" else f"not heard of for {silent:.0f} s"
                if known:  # a guest's coming was not told either
                    self._note("node_lost", f"node {node} is lost: {left}", node=node)

    def _note(self, kind: str, detail: str, **where: Any) -> None:
        self.notes.append(Note(kind, detail, self.attempt, **({"step": self._step} | where)))

    def forgive(self, seconds: float) -> None:
        """Count so many seconds of silence less, of every node."""
        self._heard = {node: heard + seconds for node, heard in self._heard.items()}

    # --- deciding -----------------------------------------------------------------------------------------------------

    def decide(self, now: float, reports: Mapping[int, Report]) -> Plan:
        """The plan now, on the newest reports; ``now`` is of one monotonic clock."""
        self.now = now
        self._reports.update(reports)
        reports = self._reports
        self._hear(reports)
        self._step = max([self._step, *(r.step for n, r in reports.items() if r.attempt == self.attempt)])
        if not self._asked:
            for node, report in sorted(reports.items()):
                if report.asked and self.alive(node):
                    self._asked = report.asked
                    self._note("signal", f"{report.asked} to node {node}: all ranks are asked to save", node=node)
                    break
        self._receive(reports)
        act = {"gathering": self._gather, "checking": self._check, "running": self._run, "ending": self._end}
        if self.phase != "stopped":
            act[self.phase](reports)
        self.plan = replace(self.plan, beat=self.plan.beat + 1)
        return self.plan

    def _receive(self, reports: Mapping[int, Report]) -> None:
        """Have those that came after the preflight, or back, looked at one after another."""
        if not self._checks_guests or self._asked or self.phase == "stopped":
            return
        guest = self.plan.guest
        if guest is not None and reports[0].judged[0] == guest.number:
            if self.alive(guest.node) and self._marks[guest.node][0] == guest.session:
                self._answer(guest, reports[0].judged[1])
            guest = None
        if guest is None:
            waiting = [
                node
                for node in range(self.terms.nodes)
                if self.alive(node)
                and not self._may_run(node)
                and self._refused.get(node, ("",))[0] != self._marks[node][0]
            ]
            if waiting:
                self._guests += 1
                guest = Guest(self._guests, waiting[0], self._marks[waiting[0]][0])
        refused = tuple(sorted(self._refused.values()))
        self.plan = replace(self.plan, guest=guest, refused=refused)

    def _answer(self, guest: Guest, why: str) -> None:
        """Take the guest in, or refuse it; a node that comes again with the same fault is not told of again."""
        if not why:
            self._passed[guest.node] = guest.session
            self._refused.pop(guest.node, None)
            self._told.pop(guest.node, None)
            return
        self._refused[guest.node] = (guest.session, why)
        if self._told.get(guest.node) != why:
            self._told[guest.node] = why
            self._note("node_refused", f"node {guest.node} is not taken in: {why}", node=guest.node)

    def _gather(self, reports: Mapping[int, Report]) -> None:
        """Wait for the nodes, then begin an attempt on those that are there."""
        if self._asked:
            return self._stop(EXIT_SAVED, "asked to stop before the ranks were started")
        terms = self.terms
        waited = self.now - self._since
        here = [node for node in range(terms.nodes) if self._may_run(node)]
        absent = [node for node in range(terms.nodes) if node not in here]
        if any(reports[node].state == "running" or self._heard[node] <= self._since for node in here):
            return (
                None  # ranks of the attempt before are being put down, or a node may be lost: it has said nothing since
            )
        if absent and not terms.elastic and (lost := [node for node in absent if node in self._lost]):
            return self._stop(EXIT_FAILED, f"{_nodes(lost)} lost; launch --elastic goes on with those that are left")
        if not terms.elastic and (refused := [n for n in absent if n in self._refused]):
            return self._stop(EXIT_FAILED, f"{_nodes(refused)} not taken in, and without --elastic all are needed")
        enough = not absent or (
            terms.elastic
            and len(here) >= terms.min_nodes
            and not (self._first and waited < terms.node_timeout)  # all may still be on their way
        )
        world = self._world(len(here)) if enough else 0
        if world:
            return self._begin(here, world) if self._checked else self._preflight(here)
        if waited >= terms.patience:
            why = f"{_nodes(absent)} did not come within {terms.patience / 60:.3g} minutes"
            return self._stop(EXIT_FAILED, why if absent else "no number of these ranks divides the batch")
        return None

    def _world(self, nodes: int) -> int:
        ranks = nodes * self.terms.ranks
        return self.terms.fits(ranks) if self.terms.elastic else ranks

    def _preflight(self, here: Sequence[int]) -> None:
        self.phase = "checking"
        self._sessions = {node: self._marks[node][0] for node in here}
        shares = tuple(self.terms.ranks if node in here else 0 for node in range(self.terms.nodes))
        self.plan = replace(self.plan, order="preflight", shares=shares)

    def _check(self, reports: Mapping[int, Report]) -> None:
        """Every node has checked what it has to be checked for, or one refuses."""
        found = {node: reports[node].checked for node in self._sessions}
        refused = {node: code for node, code in found.items() if code not in ("", "ok")}
        if refused:
            # Node 0 tells why itself where it refuses, and the others what is their own.
            why = (
                "" if 0 in refused else f"{_nodes(refused)} refused the run in the preflight; what it said stands there"
            )
            return self._stop(int(next(iter(refused.values()))), why)
        if self._asked:
            return self._stop(EXIT_SAVED, "asked to stop before the ranks were started")
        if any(not self.alive(node) for node in found):
            return self._stop(EXIT_FAILED, "a node was lost during the preflight")
        if all(code == "ok" for code in found.values()):
            self._checked, self._passed = True, dict(self._sessions)
            if self.terms.preflight == "only":
                return self._stop(EXIT_DONE, "")
            self.phase = "gathering"
        return None

    def _begin(self, here: Sequence[int], world: int) -> None:
        shares, left = [], world
        for node in range(self.terms.nodes):
            shares.append(min(left, self.terms.ranks) if node in here else 0)
            left -= shares[-1]
        self.attempt = max(self.attempt, self.terms.numbered()) + 1  # a rank's roll-back takes a number as well
        self.phase, self._first, self._growing = "running", False, False
        self._sessions = {node: self._marks[node][0] for node, share in enumerate(shares) if share}
        self._endings, self._gone, self._step = [], [], self.terms.committed()
        self.plan = Plan(
            self.session, self.plan.beat, self.attempt, "run", tuple(shares),
            guest=self.plan.guest, refused=self.plan.refused,
        )  # fmt: skip
        self._note("started", f"{world} rank(s) on {_nodes(self._sessions)}", shares=tuple(shares))

    def _run(self, reports: Mapping[int, Report]) -> None:
        """Watch an attempt until something ends it."""
        ours = {n: r for n in self._sessions if (r := reports[n]).attempt == self.attempt}
        self._take_endings(ours.values())
        self._gone = [n for n in self._sessions if not self.alive(n) or reports[n].session != self._sessions[n]]
        bad = [ending for ending in self._endings if ending.kind not in ("done", "saved")]
        if bad or self._gone:
            self.phase = "ending"
            dump = any(ending.kind == "hung" for ending in bad)
            # Where a rank was killed or a node is lost the others have nothing to say but that they miss it.
            at_once = all(ending.signal == signal.SIGKILL for ending in bad)
            self.plan = replace(self.plan, order="end", dump=dump, at_once=at_once)
        elif len(self._endings) == self.plan.world and all(r.state != "running" for r in ours.values()):
            self._close()
        elif self._asked and not self.plan.signal:
            self.plan = replace(self.plan, order="save", signal=self._asked)
        elif self.terms.elastic and self.plan.order == "run":
            here = [n for n in range(self.terms.nodes) if self._may_run(n)]
            if self._world(len(here)) > self.plan.world:
                self._growing = True
                self.plan = replace(self.plan, order="save", signal="SIGUSR1")

    def _take_endings(self, reports: Any) -> None:
        known = {(ending.rank, ending.kind) for ending in self._endings}
        for report in reports:
            self._endings += [e for e in report.endings if (e.rank, e.kind) not in known]

    def _end(self, reports: Mapping[int, Report]) -> None:
        """All ranks are put down; what they say while they end is still heard."""
        ours = [r for n in self._sessions if (r := reports[n]).attempt == self.attempt]
        self._take_endings(ours)
        waiting = [n for n in self._sessions if self.alive(n) and reports[n].state == "running"]
        # A node whose ranks are down may be silent because it is lost, which only time tells.
        if waiting:
            return
        self._close()

    def _close(self) -> None:
        """An attempt is over: what comes next."""
        kinds = {ending.kind for ending in self._endings}
        finished = any(ending.rank == 0 and ending.kind == "done" for ending in self._endings)
        cause = self._cause()
        if cause is not None:
            verb = "hangs" if cause.kind == "hung" else "died" if cause.kind == "died" else "ended"
            kind = {"hung": "rank_hung", "died": "rank_died"}.get(cause.kind)
            why = f"rank {cause.rank} {verb} at step {cause.step + 1}: {cause.detail}"
            # Who dies on leaving, after the last commit, costs nothing: the attempt's line tells.
            if kind and not finished:
                self._note(kind, why, rank=cause.rank, step=cause.step)
        elif self._gone:
            why = f"{_nodes(self._gone)} lost"
        else:
            why = "done" if "done" in kinds else "saved"
        committed = self.terms.committed()
        self._note("ended", why, step=committed)
        if "refused" in kinds:
            return self._stop(EXIT_USAGE, "")
        if "final" in kinds:
            return self._stop(EXIT_FAILED, "this error would come again; the ranks are not started again")
        if finished:
            return self._stop(EXIT_DONE, "")
        if cause is None and not self._gone and (self._asked or not self._growing):
            return self._stop(EXIT_SAVED, "")
        if self._asked and not self._is_loop(committed):
            step = "the beginning" if committed < 0 else f"step {committed}"
            return self._stop(EXIT_SAVED, f"asked to stop, and not saved: the same command goes on from {step}")
        self.phase, self._since = "gathering", self.now
        self.plan = replace(self.plan, order="wait")
        if cause is None and not self._gone:
            return None  # more nodes are there
        return self._again(committed)

    def _cause(self) -> Ending | None:
        """What ended the attempt: a signal before an error, which may be a neighbour's loss; else what came first."""
        bad = [ending for ending in self._endings if ending.kind not in ("done", "saved")]
        return next((e for e in bad if e.signal), bad[0] if bad else None)

    def _is_loop(self, committed: int) -> bool:
        """Whether ``restarts`` attempts since the last new commit have failed already."""
        if committed > self._base:
            self._base, self._tries = committed, 0
        return self._tries >= self.terms.restarts

    def _again(self, committed: int) -> None:
        """After a failure: once more, unless it is a crash loop."""
        step = "from the beginning" if committed < 0 else f"from step {committed}"
        if self._is_loop(committed):
            said = f"{self._tries} restart(s) {step} have not led to a new commit"
            self._note("crash_loop", said)
            return self._stop(EXIT_FAILED, f"{said}: the run ends here")
        self._tries += 1
        self._note("restarted", f"{step}; restart {self._tries} of {self.terms.restarts} without a new commit")
        return None

    def _stop(self, code: int, why: str) -> None:
        self.phase = "stopped"
        self.plan = replace(self.plan, order="stop", code=code)
        if why:
            self._note("stopped", why)


def _nodes(numbers: Any) -> str:
    listed = ", ".join(map(str, sorted(numbers)))
    return f"node {listed}" if len(numbers) == 1 else f"nodes {listed}"
