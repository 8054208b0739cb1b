"""Before the first step: every node looks about, node 0 judges all of it together, and all go on or none does.

``check`` runs in every node's supervisor at the same time. What is looked at, and when a run is refused: the section
"Preflight" of ``docs/launching.md``.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longskip.engine.config import Config
from longskip.errors import LongskipError, PreflightError, RendezvousError
from longskip.launcher import probes
from longskip.launcher.board import Board, Store
from longskip.launcher.common_folder import CommonFolder
from longskip.launcher.facts import Facts
from longskip.launcher.needs import Needs, needs_of
from longskip.launcher.reach import reach
from longskip.launcher.reduction import SECONDS as REDUCTION_SECONDS
from longskip.launcher.reduction import interconnect
from longskip.launcher.verdicts import ORDER, Finding, judge

__all__ = ["Outcome", "Store", "check", "print_outcome"]

FACTS_SECONDS = 17.0
"""After which node 0 judges what it has been told; a node that said nothing is a finding. No probe takes longer."""
VERDICT_SECONDS = FACTS_SECONDS + 3.0
HEARD_SECONDS = 2.0


@dataclass(frozen=True)
class Outcome:
    """The verdict, the same on all nodes. ``seconds``: of this node's whole preflight; ``slowest``: probe → seconds on the node
    where it took longest. ``own``: what this node found."""

    findings: tuple[Finding, ...]
    nodes: int
    seconds: float
    slowest: dict[str, float]
    own: Facts

    @property
    def refused(self) -> bool:
        return any(finding.status == "failed" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        return {
            "refused": self.refused,
            "nodes": self.nodes,
            "seconds": round(self.seconds, 3),
            "probe_seconds": self.slowest,
            "findings": [finding.to_json() for finding in self.findings],
        }

    def refuse(self) -> None:
        """Raise PreflightError where something failed: every failure with value, limit and cure."""
        failed = [finding for finding in self.findings if finding.status == "failed"]
        if not failed:
            return
        first, *others = failed
        lines = [f"the preflight refuses this run: {first.message}"]
        lines += [f"  and {each.message}" + (f"\n    cure: {each.cure}" if each.cure else "") for each in others]
        error = PreflightError("\n".join(lines), cure=first.cure or None)
        error.alike = True
        raise error


def looks_at(
    config: Config, board: Board, folder: CommonFolder, node: int, members: Sequence[int], bind: str | None
) -> list[probes.Timed]:
    """What any node looks at, by itself or with the ``members``, each with its limit in seconds."""
    return [
        probes.Timed("software", probes.software(config), 8.0),
        probes.Timed("devices", probes.devices, 8.0),
        probes.Timed("data", probes.data(config, node), 12.0),
        probes.Timed("run", folder.probe, 13.0),
        probes.Timed("reach", reach(board, node, members, bind), 14.0),
    ]


def check(
    store: Store,
    *,
    node: int,
    members: Sequence[int],
    ranks: int,
    config: Config,
    run: Path,
    bind: str | None = None,
    elastic: bool = False,
    prefix: str = "preflight",
    quick: bool = False,
) -> Outcome:
    """Look at this node, hear from the others, and return the verdict that node 0 gives for all; in 20 s at the most.

    ``members``: the nodes that take part, node 0 first; all begin within seconds of one another. ``ranks`` of a node.
    ``bind``: the address at which node 0 serves, or another node's own. ``network``: the name of what
    joins the nodes, and the bytes/s that a rank has of it. ``prefix`` is another one each
    time that a store is used for a preflight. ``quick`` starts no process, so that GPUs and interconnect are not tried.
    The caller raises the refusal: ``outcome.refuse()``.

    Raises PreflightError where node 0 gives no verdict.
    """
    began = time.monotonic()
    board = Board(store, prefix)
    folder = CommonFolder(board, run, node)
    looks = looks_at(config, board, folder, node, members, bind)
    if not quick and (len(members) > 1 or probes.uses_gpus()):
        looks.append(probes.Timed("interconnect", interconnect(board, node, members, bind), REDUCTION_SECONDS + 1.0))
    needs: list[Needs] = []
    if node == 0:
        looks.append(
            probes.Timed(
                "plan",
                lambda _: needs.append(needs_of(config, run, members, ranks, elastic=elastic)),
                12.0,
            )
        )
    try:
        facts = Facts(node, socket.gethostname(), *probes.run_probes(looks))
        board.put(f"facts/{node}", facts.to_json())
        if node == 0:
            known = needs[0] if needs else Needs(tuple(members), ranks, len(members) * ranks)
            verdict = _verdict(board, facts, known, began + FACTS_SECONDS)
            board.put("verdict", verdict)
            _await_heard(board, verdict["answered"])
        else:
            verdict = board.take("verdict", began + VERDICT_SECONDS - time.monotonic())
            board.put(f"heard/{node}", True)
        if "error" in verdict:
            raise PreflightError(f"node 0 could not judge: {verdict['error']}", cure="see node 0's log")
        findings = tuple(Finding.from_json(each) for each in verdict["findings"])
    except LongskipError:
        raise
    except (
        Exception
    ) as error:  # whatever the store, or another version's node 0, has done to us: the supervisor must hear
        raise PreflightError(
            f"node {node} heard no verdict of the preflight from node 0: {type(error).__name__}: {error}",
            cure="see node 0's log, and whether this node still reaches its store",
        ) from None
    finally:
        folder.release()
    return Outcome(findings, len(members), time.monotonic() - began, verdict["slowest"], facts)


def _verdict(board: Board, own: Facts, needs: Needs, until: float) -> dict[str, Any]:
    """Node 0's verdict over all that answer by ``until``; an error of the judge's own is told too, for all are waiting."""
    everyone = [own]
    for other in needs.members[1:]:
        with suppress(TimeoutError, RendezvousError):
            everyone.append(Facts.from_json(board.take(f"facts/{other}", until - time.monotonic()), other))
    try:
        findings = judge(everyone, needs)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "answered": [each.node for each in everyone[1:]]}
    slowest: dict[str, float] = {}
    for each in everyone:
        for probe, seconds in each.seconds.items():
            slowest[probe] = max(seconds, slowest.get(probe, 0.0))
    return {
        "findings": [finding.to_json() for finding in findings],
        "slowest": slowest,
        "answered": [each.node for each in everyone[1:]],
    }


def _await_heard(board: Board, nodes: Sequence[int]) -> None:
    """Node 0 keeps the store: it must not leave before those who answered have read why."""
    until = time.monotonic() + HEARD_SECONDS
    for node in nodes:
        with suppress(TimeoutError):
            board.take(f"heard/{node}", until - time.monotonic())


def print_outcome(outcome: Outcome, *, as_json: bool = False, brief: bool = False) -> None:
    """The table for people, or one JSON object; cures below the table, where they have room. ``brief``: only warnings, and
    nothing where there are none: what failed is told by the error that ``refuse`` raises."""
    if as_json:
        print(json.dumps(outcome.to_json()))
        return
    shown = [each for each in outcome.findings if not brief or each.status == "warning"]
    if not shown:
        return
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    marks = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "failed": "[red]✗[/]"}
    table = Table("", "what", "seen", "needed", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for each in shown:
        table.add_row(marks[each.status], each.what, escape(each.seen), escape(each.limit))
    console = Console()
    console.print(table)
    for each in shown:
        if each.status != "ok" and each.cure:
            console.print(f"{marks[each.status]} {each.what}: {escape(each.cure)}", highlight=False, soft_wrap=True)
    counts = {status: sum(each.status == status for each in outcome.findings) for status in ORDER}
    nodes = "1 node" if outcome.nodes == 1 else f"{outcome.nodes} nodes"
    verdict = "refused" if outcome.refused else "ready"
    console.print(
        f"preflight of {nodes} in {outcome.seconds:.1f} s: {verdict} ({counts['failed']} failed, {counts['warning']} warnings)",
        highlight=False,
    )
