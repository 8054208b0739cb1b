"""A node that comes after the preflight of all, or back: it is looked at alone before an attempt takes it in (no torch).

``look`` runs in its supervisor, ``admit`` in node 0's, beside the ranks that train. Both use the preflight's probes and
verdicts; what is left out, and why, stands in the section "Preflight" of ``docs/launching.md``.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from longskip.engine.config import Config
from longskip.errors import RendezvousError
from longskip.launcher import probes
from longskip.launcher.board import Board, Store
from longskip.launcher.common_folder import CommonFolder
from longskip.launcher.facts import Facts
from longskip.launcher.needs import Needs, needs_of
from longskip.launcher.preflight import FACTS_SECONDS, looks_at
from longskip.launcher.reduction import SECONDS as REDUCTION_SECONDS
from longskip.launcher.reduction import interconnect
from longskip.launcher.verdicts import Finding, judge


def look(store: Store, *, node: int, config: Config, run: Path, bind: str | None, prefix: str) -> None:
    """What this node finds, told to node 0 under ``prefix``; takes 17 s at the most. ``bind``: this node's own address."""
    board = Board(store, prefix)
    folder = CommonFolder(board, run, node)
    looks = looks_at(config, board, folder, node, (0, node), bind)
    if probes.uses_gpus():  # by itself: node 0's are busy
        looks.append(probes.Timed("interconnect", interconnect(board, node, (node,), bind), REDUCTION_SECONDS + 1.0))
    board.put(f"facts/{node}", Facts(node, socket.gethostname(), *probes.run_probes(looks)).to_json())


def admit(
    store: Store,
    *,
    guest: int,
    members: Sequence[int],
    ranks: int,
    config: Config,
    run: Path,
    known: Facts,
    bind: str | None,
    prefix: str,
) -> list[Finding]:
    """What stands against the guest; nothing where it may take part. Takes 17 s at the most, on node 0.

    ``members``: the nodes of the next attempt, the guest among them. ``known``: what node 0 found before its ranks began to
    use its devices and data; its software, run folder and clock are looked at anew.
    """
    began = time.monotonic()
    board = Board(store, prefix)
    folder = CommonFolder(board, run, 0)
    anew = ("software", "run", "reach")
    looks = [look for look in looks_at(config, board, folder, 0, (0, guest), bind) if look.name in anew]
    try:
        found, failed, seconds = probes.run_probes(looks)
        own = replace(known, found={**known.found, **found}, failed={**known.failed, **failed}, seconds=seconds)
        needs = needs_of(config, run, members, ranks, elastic=True)
        theirs: Facts | None = None
        with suppress(TimeoutError, RendezvousError):
            theirs = Facts.from_json(board.take(f"facts/{guest}", began + FACTS_SECONDS - time.monotonic()), guest)
        return against(own, theirs, guest, needs)
    finally:
        folder.release()


def against(own: Facts, theirs: Facts | None, guest: int, needs: Needs) -> list[Finding]:
    """What fails with the guest and does not without it; ``theirs`` is None where it has not answered.

    A run that cannot be planned, or a disk that is full, is no fault of a guest's.
    """
    alone = {each.what for each in _failures([own], replace(needs, members=(0,))) if guest not in each.nodes}
    both = _failures([own] if theirs is None else [own, theirs], replace(needs, members=(0, guest)))
    return [each for each in both if each.what not in alone]


def _failures(facts: Sequence[Facts], needs: Needs) -> list[Finding]:
    # The run's lock is held by the run itself.
    unlocked = [replace(f, found={**f.found, "run": {**f.of("run"), "owner": None}}) for f in facts]
    return [each for each in judge(unlocked, needs) if each.status == "failed"]


def told(findings: Sequence[Finding]) -> str:
    """All that stands against a guest, with the cures, as one line."""
    return "; ".join(each.message + (f" ({each.cure})" if each.cure else "") for each in findings)
