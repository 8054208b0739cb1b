"""The verdict on what all nodes found: pure functions of their facts and of what the run needs (no torch)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from longskip.launcher.facts import Facts
from longskip.launcher.needs import Needs

Status = Literal["ok", "warning", "failed"]
ORDER: tuple[Status, ...] = ("ok", "warning", "failed")


@dataclass(frozen=True)
class Finding:
    """One line of the verdict: what was looked at, what was seen, against which limit, the cure, and the nodes meant
    (none: all, or the run itself)."""

    what: str
    status: Status
    seen: str
    limit: str = ""
    cure: str = ""
    nodes: tuple[int, ...] = ()

    @property
    def message(self) -> str:
        return f"{self.what}: {self.seen}" + (f"; needed: {self.limit}" if self.limit else "")

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"nodes": list(self.nodes)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Finding:
        return cls(**(value | {"nodes": tuple(value["nodes"])}))


Rule = Callable[[Sequence[Facts], Needs], Iterable[Finding]]


def named(nodes: Iterable[int]) -> str:
    """``node 3``, ``nodes 0, 2–5``."""
    ordered = sorted(set(nodes))
    runs: list[list[int]] = []
    for node in ordered:
        if runs and node == runs[-1][1] + 1:
            runs[-1][1] = node
        else:
            runs.append([node, node])
    parts = [str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}–{b}" for a, b in runs]
    return f"node{'s' if len(ordered) > 1 else ''} {', '.join(parts)}"


@dataclass(frozen=True)
class Differing:
    """``nodes`` that differ from most others (from node 0's half where there are as many of either), and who has what."""

    nodes: tuple[int, ...]
    seen: str


def differing(facts: Sequence[Facts], value: Callable[[Facts], Any]) -> Differing | None:
    """How ``value`` differs between nodes; None where it does not. A value None is not known, and not compared."""
    groups: dict[str, list[int]] = {}
    values: dict[str, Any] = {}
    for each in facts:
        if (own := value(each)) is not None:
            key = json.dumps(own, sort_keys=True)
            groups.setdefault(key, []).append(each.node)
            values[key] = own
    if len(groups) < 2:
        return None
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), min(item[1])))
    parts = [f"{_brief(values[key])} on {named(nodes)}" for key, nodes in ordered[:4]]
    more = f" and {len(ordered) - 4} others" if len(ordered) > 4 else ""
    return Differing(tuple(sorted(node for _, nodes in ordered[1:] for node in nodes)), ", ".join(parts) + more)


def _brief(value: Any) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text


def agree(
    facts: Sequence[Facts],
    what: str,
    value: Callable[[Facts], Any],
    cure: str,
    status: Status = "failed",
    prefix: str = "",
) -> list[Finding]:
    """A finding where ``value`` is not the same on all nodes."""
    found = differing(facts, value)
    if found is None:
        return []
    return [Finding(what, status, prefix + found.seen, "the same on all nodes", cure, found.nodes)]


def unless(problems: list[Finding], what: str, seen: str, limit: str = "") -> list[Finding]:
    """The problems, or the line that says that there are none."""
    return problems or [Finding(what, "ok", seen, limit)]


def judge(facts: Sequence[Facts], needs: Needs) -> list[Finding]:
    """Everything that is right or wrong with these nodes for this run: a line a check at least, in a fixed order.

    ``facts`` are of the nodes that answered. Nothing is looked at but the arguments.
    """
    from longskip.launcher.verdicts_machine import MACHINE
    from longskip.launcher.verdicts_shared import SHARED

    rules: tuple[Rule, ...] = (_answered, _probes, _planned, *MACHINE, *SHARED)
    return [finding for rule in rules for finding in rule(facts, needs)]


def _answered(facts: Sequence[Facts], needs: Needs) -> Iterable[Finding]:
    missing = sorted(set(needs.members) - {each.node for each in facts})
    problems = []
    if missing:
        cure = "see whether longskip supervise runs there, and whether it reaches node 0's store"
        problems = [
            Finding("nodes", "failed", f"{named(missing)} did not answer", f"{needs.nodes} nodes", cure, tuple(missing))
        ]
    hosts = ", ".join(sorted({each.host for each in facts})[:4]) + (" …" if len(facts) > 4 else "")
    yield from unless(
        problems, "nodes", f"{len(facts)} × {needs.ranks} ranks ({hosts})", f"{needs.nodes} × {needs.ranks}"
    )


_PROBES = {
    "software": ("packages", "see whether the environment's file system answers"),
    "devices": ("devices", "look at the driver's log there (dmesg), reset the device, or leave the node out"),
    "data": ("data", "see whether the file system of the data answers there"),
    "run": ("run folder", "see whether the file system of the run folder answers there"),
    "reach": ("ports", "see which interface joins the nodes, and name its address: --bind"),
    "interconnect": (
        "interconnect",
        "open all ports between the nodes, and name the interface that joins them (--bind, GLOO_SOCKET_IFNAME, "
        "NCCL_SOCKET_IFNAME)",
    ),
}


def _probes(facts: Sequence[Facts], needs: Needs) -> Iterable[Finding]:
    """A probe that failed or hangs: the same reason on several nodes is one line."""
    failed: dict[tuple[str, str], list[int]] = {}
    for each in facts:
        for probe, why in each.failed.items():
            failed.setdefault((probe, why), []).append(each.node)
    for (probe, why), nodes in failed.items():
        what, cure = _PROBES.get(probe, (probe, "look at that node"))
        # A large folder of pictures takes its time to be listed, and the ranks will have it.
        slow = probe == "data" and "hangs" in why and all(_listing(each) for each in facts if each.node in nodes)
        status: Status = "warning" if slow else "failed"
        yield Finding(what, status, f"{why} on {named(nodes)}", "an answer in time", cure, tuple(nodes))


def _listing(facts: Facts) -> bool:
    """Whether a plain folder of pictures is what the data's probe had come to."""
    return any(each.get("kind") == "folder" for each in facts.of("data").get("sets", [])[-1:])


def _planned(facts: Sequence[Facts], needs: Needs) -> Iterable[Finding]:
    problems = [Finding("plan", "failed", message, "", cure) for message, cure in needs.wrong]
    yield from unless(problems, "plan", f"{needs.batch}, {needs.parameters:,} parameters")
