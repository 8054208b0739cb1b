"""One supervisor per node: it starts the node's ranks, watches them, and starts them again (``docs/launching.md``).

What to do is decided by node 0's ``Leader`` (``members.py``); here is what is done: a loop that looks at this node's ranks,
tells what it sees, hears the plan and follows it. Nothing in the loop waits for the network.
"""

from __future__ import annotations

import contextlib
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from longskip.engine.config import Config
from longskip.engine.configio import load_config
from longskip.engine.ports import interface_of, is_loopback
from longskip.engine.runs import RUNS, RunFolder
from longskip.engine.signals import ASKING
from longskip.errors import EXIT_FAILED, EXIT_SAVED, ConfigError, LongskipError, RendezvousError, RunFolderError
from longskip.launcher import store
from longskip.launcher.chronicle import Chronicle, newest_commit
from longskip.launcher.facts import Facts
from longskip.launcher.members import Guest, Leader, Plan, Report, Terms
from longskip.launcher.processes import Limits, Team, rank_environment

TICK_SECONDS = 0.1
FAREWELL_SECONDS = 5.0
ASLEEP_SECONDS = 5.0  # a turn of the loop that takes so long: this process itself stood still


@dataclass(frozen=True)
class Supervision:
    """What ``longskip supervise`` was asked for.

    ``ranks`` are those of one node, ``store`` is ``host:port`` of node 0's store (port 0 with one node: any free one),
    ``bind`` the address that node 0 serves it at (None: the store's host), ``arguments`` are ``train CONFIG a.b=c …``.
    ``as_json``: node 0 prints the preflight as one JSON object.
    """

    nodes: int
    node: int
    ranks: int
    store: str
    bind: str | None
    elastic: bool
    min_nodes: int
    preflight: Literal["yes", "no", "only"]
    arguments: tuple[str, ...]
    as_json: bool = False


def supervise(what: Supervision) -> int:
    """Run until the job ends; returns its exit code: 0 done, 1 failed, 2 configuration, 75 saved on a signal.

    Raises ConfigError for what cannot be started, RendezvousError for a store that cannot be served or is not reached. Call
    it from the main thread: signals are received there, and ranks die with the thread that started them.
    """
    if not (0 <= what.node < what.nodes and what.ranks >= 1 and 1 <= what.min_nodes <= what.nodes):
        raise ConfigError(
            f"node {what.node} of {what.nodes} with {what.ranks} rank(s), at least {what.min_nodes} node(s)",
            cure="0 <= --node < --nodes, --ranks at least 1, --min-nodes from 1 to --nodes",
        )
    config, run = read_arguments(what.arguments)
    with _remembered_signals() as asked:
        return Supervisor(what, config, run, asked).watch()


def read_arguments(arguments: Sequence[str]) -> tuple[Config, Path]:
    """The configuration and the run's folder that ``train CONFIG a.b=c …`` names; raises ConfigError."""
    if not arguments or arguments[0] != "train":
        raise ConfigError("launch starts ranks of train only", cure="longskip launch --local 2 -- train CONFIG")
    if len(arguments) < 2 or (options := [word for word in arguments[1:] if word.startswith("-")]):
        given = f"{options[0]!r} is no configuration and no override" if len(arguments) > 1 else "no CONFIG is given"
        raise ConfigError(f"train: {given}", cure="longskip launch --local 2 -- train CONFIG a.b=c")
    path = Path(arguments[1])
    config = load_config(path, arguments[2:])
    return config, RUNS / (config.train.name or path.stem)


class Supervisor:
    """This node's supervisor; ``asked`` fills with the signals that this process receives."""

    def __init__(self, what: Supervision, config: Config, run: Path, asked: list[int]) -> None:
        self.what, self.config, self.run, self.asked = what, config, run, asked
        self.session = secrets.token_hex(8)
        launch = config.launch
        self.patience = 60.0 * launch.timeout_minutes
        limits = Limits(None if launch.step_timeout == "auto" else launch.step_timeout, self.patience)
        self.team = Team(what.arguments, run, limits)
        self.mine: tuple[str, int] = ("", 0)  # the leader's session and attempt that our ranks are of
        self.beat = 0
        self.checked = ""
        self._checking: threading.Thread | None = None
        self._known: Facts | None = None  # what the preflight of all found on this node
        self._looking: threading.Thread | None = None
        self._looked = 0  # the number of the last guest that was looked at from here
        self.judged: tuple[int, str] = (0, "")
        self._refusal: LongskipError | None = None
        self._shown = 0
        if not what.elastic:
            config.batch(what.nodes * what.ranks, self._kept_micro())  # refused before anything is started
        self.host, port = store.parse_endpoint(what.store)
        self.leader: Leader | None = None
        if what.node == 0:
            listening, self.endpoint = store.listen(self.host, port, what.bind)
            self._warn_of_listening()
            nodes = [f"node/{node}" for node in range(1, what.nodes)]
            self.chronicle = Chronicle(run)
            try:
                self.chronicle.lock()
            except OSError as error:
                raise RunFolderError(
                    f"{run} cannot be written: {error}", cure="see its owner, and what is free"
                ) from None
            self.leader = Leader(self._terms(), self.session, time.monotonic())
            server: list[Any] = []
            serving = threading.Lock()

            def serve() -> Any:
                with serving:  # loading torch may take longer than a thread of the exchange is waited for
                    if not server:
                        server.append(store.open_server(listening, self.endpoint, ["plan", *nodes]))
                    return server[0]

            self.exchange = store.Exchange(serve, "plan", nodes)
        else:
            self.endpoint = store.Endpoint(self.host, port, "")
            self.exchange = store.Exchange(self._connect, f"node/{what.node}", ["plan"])

    def _connect(self) -> Any:
        client, local = store.open_client(self.host, self.endpoint.port)
        self.endpoint = store.Endpoint(self.host, self.endpoint.port, local)
        return client

    def _terms(self) -> Terms:
        what, launch = self.what, self.config.launch
        return Terms(
            nodes=what.nodes, ranks=what.ranks, elastic=what.elastic, min_nodes=what.min_nodes, patience=self.patience,
            node_timeout=launch.node_timeout, restarts=launch.restarts, preflight=what.preflight, fits=self._fits,
            committed=lambda: newest_commit(self.run), numbered=self.chronicle.last_attempt,
        )  # fmt: skip

    def _kept_micro(self) -> int | None:
        """The micro-batch that the run began with; None before it began."""
        value = RunFolder(self.run).summary().get("micro_batch")
        return value if isinstance(value, int) else None

    def _fits(self, ranks: int) -> int:
        """The largest number of at most ``ranks`` ranks that divides the batch with the run's micro-batch; 0 for none."""
        kept = self._kept_micro()
        for world in range(ranks, 0, -1):
            with contextlib.suppress(ConfigError):
                return self.config.batch(world, kept).world
        return 0

    def _warn_of_listening(self) -> None:
        if not is_loopback(self.endpoint.local):
            say(
                f"node 0 listens at {self.endpoint.local}:{self.endpoint.port} for the other nodes, without a password: "
                "whoever reaches it can disturb the run"
            )

    # --- the loop -----------------------------------------------------------------------------------------------------

    def watch(self) -> int:
        """The loop; returns the exit code with no rank left, however it ends."""
        turned = time.monotonic()
        try:
            while True:
                turned = self._forgive(turned)
                self.team.poll()
                self._show_last_words()
                plan = self._lead() if self.leader else self._hear()
                code = self._follow(plan) if plan else None
                if self.leader:
                    self.chronicle.write(self.leader.notes)
                if code is None and plan is None:
                    code = self._out_of_reach()
                if code is not None:
                    self._say_farewell()
                    if self._refusal is not None and code:
                        raise self._refusal
                    return code
                time.sleep(TICK_SECONDS)
        finally:
            self.team.kill()
            self.exchange.close()
            if self.leader:
                self.chronicle.write(self.leader.notes)
                self.chronicle.close()

    def _forgive(self, turned: float) -> float:
        """Time in which this process stood still (a job that is suspended, a machine that sleeps) is held against nobody."""
        now = time.monotonic()
        if (gap := now - turned) > ASLEEP_SECONDS:
            self.team.forgive(gap)
            self.exchange.forgive(gap)
            if self.leader:
                self.leader.forgive(gap)
        return now

    def _report(self, left: bool = False) -> Report:
        self.beat += 1
        return Report(
            session=self.session,
            beat=self.beat,
            attempt=self.mine[1],
            state="left" if left else "running" if self.team.running else "idle",
            endings=tuple(self.team.endings),
            asked=signal.Signals(self.asked[0]).name if self.asked else "",
            step=self.team.step,
            checked=self.checked,
            judged=self.judged,
        )

    def _lead(self) -> Plan:
        assert self.leader is not None
        plan = self.leader.decide(time.monotonic(), {0: self._report(), **self._reports()})
        self.exchange.say(asdict(plan))
        return plan

    def _reports(self) -> dict[int, Report]:
        """What the other nodes say; nothing of one that cannot be read, which is as good as silence."""
        reports = {}
        for key, word in self.exchange.hear().items():
            with contextlib.suppress(TypeError, KeyError, ValueError):
                reports[int(key.removeprefix("node/"))] = Report.from_json(word)
        return reports

    def _hear(self) -> Plan | None:
        """The newest plan; None while node 0 is out of reach."""
        self.exchange.say(asdict(self._report()))
        word = self.exchange.hear().get("plan")
        if word is None or self.exchange.age() > self.config.launch.node_timeout:
            return None
        with contextlib.suppress(TypeError, KeyError, ValueError):
            return Plan.from_json(word)
        return None

    def _follow(self, plan: Plan) -> int | None:
        """Do what the plan says of this node; the exit code where it says to stop."""
        node, current = self.what.node, (plan.session, plan.attempt)
        share = plan.shares[node] if node < len(plan.shares) else 0
        if plan.order == "stop":
            return plan.code
        if (why := dict(plan.refused).get(self.session)) is not None:
            # Not 2, by which Kubernetes would end the whole job.
            self._refusal = LongskipError(
                f"node {node} is not taken in: {why}", cure="put that right there, and start this node again"
            )
            return EXIT_FAILED
        if plan.guest is not None:
            self._look_at(plan.guest, plan)
        if self.team.running and (self.mine != current or plan.order not in ("run", "save")):
            self.team.end(dump=plan.dump, at_once=plan.at_once)
        if plan.order == "preflight" and share:
            self._check([member for member, ranks in enumerate(plan.shares) if ranks])
        if plan.order == "run" and share and self.mine != current:
            self.mine = current
            self._shown = 0
            try:
                self.team.start(plan.attempt, plan.first_rank(node), share, plan.world, self._environment(plan, share))
            except OSError as error:  # no room for a log, too many processes
                raise LongskipError(f"node {node} cannot start its ranks: {error}") from None
        if plan.order == "save" or self.asked:
            self.team.ask(signal.Signals[plan.signal] if plan.signal else self.asked[0])
        return None

    def _environment(self, plan: Plan, share: int) -> dict[str, str]:
        environment = rank_environment(share)
        host = self.endpoint.local if self.what.node == 0 else self.host
        where = store.Endpoint(host, self.endpoint.port, "")
        environment |= {
            "MASTER_ADDR": host,
            "MASTER_PORT": str(where.port),
            "LONGSKIP_STORE": str(where),
            "LONGSKIP_ATTEMPT": str(plan.attempt),
        }
        if interface := interface_of(self.endpoint.local):
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                environment.setdefault(name, interface)
        return environment

    def _out_of_reach(self) -> int | None:
        """Without a word of node 0: this node's ranks are ended after ``launch.node_timeout``, we after our patience."""
        silent = self.exchange.age()
        if self.asked and not self.team.running:
            return EXIT_SAVED
        if not self.exchange.connected:
            if silent > self.patience:
                raise RendezvousError(
                    f"node {self.what.node} did not reach node 0 at {self.endpoint} within "
                    f"{self.config.launch.timeout_minutes} minutes ({self.exchange.failure or 'no answer'})",
                    cure="start node 0, give all nodes the same --store; launch.timeout_minutes is how long they wait",
                )
            return None
        if silent <= self.config.launch.node_timeout:
            return None
        if self.team.running:
            say(f"node 0 is out of reach for {silent:.0f} s: the ranks of node {self.what.node} are ended")
            self.team.kill()
        if self.what.elastic and silent <= self.patience:
            return None
        say(f"node {self.what.node} ends: node 0 is out of reach for {silent:.0f} s")
        return EXIT_FAILED

    def _say_farewell(self) -> None:
        """Before leaving: no rank runs, and the others have heard what is to be heard."""
        self.team.end()
        if not self.leader:
            self.exchange.say(asdict(self._report(left=True)))
            if self.exchange.age() <= self.config.launch.node_timeout:
                self.exchange.flush(2.0)
            return
        deadline = time.monotonic() + FAREWELL_SECONDS
        while time.monotonic() < deadline:
            reports = self._reports()
            self.exchange.say(asdict(self.leader.decide(time.monotonic(), {0: self._report(), **reports})))
            if all(report.state == "left" or not self.leader.alive(node) for node, report in reports.items()):
                return
            time.sleep(TICK_SECONDS)

    # --- what is told and looked at -----------------------------------------------------------------------------------

    def _show_last_words(self) -> None:
        """What the first rank of this node to fail wrote last, where it wrote to a log."""
        for ending in self.team.endings[self._shown :]:
            first = not any(e.kind in ("died", "refused", "final") for e in self.team.endings[: self._shown])
            if ending.kind in ("died", "refused", "final") and first and (words := self.team.last_words(ending.rank)):
                print(
                    "\n".join(f"[rank {ending.rank}] {line}" for line in words.splitlines()),
                    file=sys.stderr,
                    flush=True,
                )
            self._shown += 1

    def _check(self, members: Sequence[int]) -> None:
        """The preflight, in a thread of its own: it waits for the other nodes, which this loop must not."""
        if self._checking is None:
            self._checking = threading.Thread(
                target=self._preflight, args=(members,), name="longskip-preflight", daemon=True
            )
            self._checking.start()

    def _preflight(self, members: Sequence[int]) -> None:
        from longskip.launcher import preflight

        what = self.what
        try:
            wall = store.Wall(self._wall_client())
            outcome = preflight.check(
                wall, node=what.node, members=members, ranks=what.ranks, config=self.config, run=self.run,
                bind=self.endpoint.local or None, elastic=what.elastic,
                quick=what.nodes == 1 and what.preflight != "only",
            )  # fmt: skip
            if what.node == 0:
                preflight.print_outcome(outcome, as_json=what.as_json, brief=what.preflight != "only")
            outcome.refuse()
            self._known = outcome.own
            self.checked = "ok"
        except LongskipError as error:
            self._refusal, self.checked = error, str(error.exit_code)
        except Exception as error:  # whatever it is, the others must hear that this node has not checked
            said = f"the preflight of node {what.node} failed: {type(error).__name__}: {error}"
            self._refusal, self.checked = LongskipError(said), str(EXIT_FAILED)

    def _look_at(self, guest: Guest, plan: Plan) -> None:
        """Of a node that came late, or back: what it finds, or what node 0 holds against it; in a thread, as it waits."""
        mine = self.leader is not None or guest.session == self.session
        if not mine or guest.number == self._looked or (self._looking is not None and self._looking.is_alive()):
            return
        self._looked = guest.number
        act = self._admit if self.leader is not None else self._look
        self._looking = threading.Thread(target=act, args=(guest, plan), name="longskip-guest", daemon=True)
        self._looking.start()

    def _look(self, guest: Guest, plan: Plan) -> None:
        from longskip.launcher import joining

        with contextlib.suppress(Exception):  # node 0 then hears nothing, and refuses
            joining.look(
                store.Wall(self._wall_client()), node=guest.node, config=self.config, run=self.run,
                bind=self.endpoint.local or None, prefix=f"guest-{guest.number}",
            )  # fmt: skip

    def _admit(self, guest: Guest, plan: Plan) -> None:
        from longskip.launcher import joining

        there = {0, guest.node, *(node for node, share in enumerate(plan.shares) if share)}
        assert self._known is not None
        try:
            found = joining.admit(
                store.Wall(self._wall_client()), guest=guest.node, members=sorted(there), ranks=self.what.ranks,
                config=self.config, run=self.run, known=self._known, bind=self.endpoint.local or None,
                prefix=f"guest-{guest.number}",
            )  # fmt: skip
            why = joining.told(found)
        except Exception as error:  # whatever it is: who has not been looked at is not taken in
            why = f"node 0 could not look at it: {type(error).__name__}: {error}"
        self.judged = (guest.number, why)

    def _wall_client(self) -> Any:
        host = self.endpoint.local if self.what.node == 0 else self.host
        client, _ = store.open_client(host, self.endpoint.port)
        return client


def say(text: str) -> None:
    """One line of the supervisor's for people."""
    print(f"longskip: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _remembered_signals() -> Iterator[list[int]]:
    """Signals that ask to save, in the order of their arrival, instead of their usual effect."""
    asked: list[int] = []
    before = {number: signal.signal(number, lambda got, frame: asked.append(got)) for number in ASKING}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
