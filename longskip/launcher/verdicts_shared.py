"""The verdict on what the nodes share: data, run folder, disk, network, clocks (no torch)."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from longskip.engine.fitting import readable
from longskip.launcher.facts import Facts
from longskip.launcher.needs import Needs
from longskip.launcher.verdicts import Finding, Rule, agree, named, unless

CLOCK_WARNING, CLOCK_LIMIT = 1.0, 300.0
"""Seconds between clocks: from the first on, times in logs mislead; past the second, Kerberos refuses a client (RFC 4120
recommends five minutes). A run's own order never hangs on clocks."""
SHARE_OF_NETWORK = 0.25
"""Of a network's figure that an all-reduce must reach, and of the other nodes' median that every node must."""


def _data(facts: Sequence[Facts], needs: Needs) -> Iterable[Finding]:
    problems = []
    names = sorted({each["name"] for f in facts for each in f.of("data").get("sets", [])})
    for name in names:
        by_error: dict[tuple[str, str], list[int]] = {}
        for each in facts:
            found = _set(each, name)
            if found.get("error"):
                by_error.setdefault((found["error"], found.get("cure", "")), []).append(each.node)
        for (error, cure), nodes in by_error.items():
            seen = f"{name}: {error} on {named(nodes)}"
            cure = cure or "make the data's folder visible on every node, under the same path"
            problems.append(Finding("data", "failed", seen, "readable on every node", cure, tuple(nodes)))
        problems += agree(
            facts,
            "data",
            lambda f, name=name: _set(f, name).get("fingerprint"),  # type: ignore[misc]
            "copy the same data to all nodes, or read them from one place",
            prefix=f"{name} has the fingerprint ",
        )
    files: dict[tuple[str, str], list[int]] = {}
    for each in facts:
        for setting, path in each.of("data").get("files", {}).items():
            files.setdefault((setting, path), []).append(each.node)
    for (setting, path), nodes in files.items():
        seen = f"{setting} {path} is not there on {named(nodes)}"
        problems.append(Finding("data", "failed", seen, "there on every node", "copy or mount it there", tuple(nodes)))
    yield from unless(
        problems, "data", "; ".join(_told(facts, name) for name in names) or "none", "the same everywhere"
    )


def _set(facts: Facts, name: str) -> dict[str, Any]:
    return next((each for each in facts.of("data").get("sets", []) if each["name"] == name), {})


def _told(facts: Sequence[Facts], name: str) -> str:
    found = _set(facts[0], name)
    if found.get("kind") == "folder":
        return f"{name}: {found.get('samples', 0):,} pictures"
    checked = sum(_set(each, name).get("checked", 0) for each in facts)
    looked = f", {checked:,} looked into" if checked else ""
    shards = found.get("shards", 0)
    return f"{name}: {found.get('samples', 0):,} samples in {shards:,} shard{'s' if shards != 1 else ''}{looked}"


def _shards(facts: Sequence[Facts], needs: Needs) -> Iterable[Finding]:
    """Fewer shards than readers: no rank runs dry, since the plan gives every rank samples, not shards. From a URL all
    readers then wait for the same few transfers."""
    sets = [
        each for each in (facts[0].of("data").get("sets", []) if facts else []) if each["name"] != "data.validation"
    ]
    shards = sum(each.get("shards", 0) for each in sets)
    if not shards:
        return
    limit = f"{needs.readers} readers (ranks × workers)"
    streamed = any(each.get("kind") == "url" for each in sets)
    if shards >= needs.readers:
        yield Finding("shards", "ok", f"{shards:,}", limit)
    elif streamed:
        cure = "cut the data into more shards (longskip data pack --shard-size), or fewer data.workers"
        yield Finding("shards", "warning", f"{shards:,}, which are fetched whole while all wait", limit, cure)
    else:
        yield Finding("shards", "ok", f"{shards:,}; fewer than readers is no harm to local ones", limit)


def _run_folder(facts: Sequence[Facts], needs: Needs) -> Iterable[Finding]:
    problems, locks = [], []
    for each in facts:
        run = each.of("run")
        where = f"{run.get('path', 'the run folder')} on {named([each.node])}"
        why = f": {run['error']}" if run.get("error") else ""
        if run.get("owner"):
            cure = "wait for it, stop it, or choose another train.name"
            problems.append(_of(each, "run folder", f"{where} is in use by {run['owner']}", "one job", cure))
        if run.get("seen") is False:
            cure = "put runs/ on a file system that all nodes share, and start in the same folder everywhere"
            seen = f"{where} does not show what node 0 wrote there{why}"
            problems.append(_of(each, "run folder", seen, "one folder on all nodes", cure))
        elif run.get("writable") is False:
            cure = "give the job the right to write there, free space, or mount it read-write"
            problems.append(_of(each, "run folder", f"{where} cannot be written{why}", "writable on every node", cure))
        elif run.get("locked") is False:
            cure = "mount it with locks that all nodes share (NFS: without nolock and local_lock)"
            seen = f"{where} does not respect {'locks' if each.node == 0 else 'the lock that node 0 holds'}{why}"
            locks.append(_of(each, "locks", seen, "flock across the nodes", cure))
    first = facts[0].of("run").get("path", "") if facts else ""
    yield from unless(problems, "run folder", str(first), "one, writable everywhere")
    if not problems:
        yield from unless(locks, "locks", "respected", "flock across the nodes")


def _of(each: Facts, what: str, seen: str, limit: str, cure: str) -> Finding:
    return Finding(what, "failed", seen, limit, cure, (each.node,))


def _disk(facts: Sequence[Facts], needs: Needs) -> Iterable[Finding]:
    frees = {each.node: each.of("run")["free"] for each in facts if "free" in each.of("run")}
    if not frees or not needs.checkpoint:
        return
    node = min(frees, key=lambda n: frees[n])
    free, two = frees[node], 2 * needs.checkpoint
    held = max((each.of("run").get("steps", 0) for each in facts), default=0)
    most = max(2, needs.keep + 1 - held) * needs.checkpoint  # before the oldest is pruned, the new one is there
    seen, limit = f"{readable(free)} free for checkpoints", f"{readable(two)}, two of {readable(needs.checkpoint)}"
    cure = "free space there, or put runs/ elsewhere; a full disk stops no training, but saves nothing"
    if free < two:
        yield Finding(
            "disk", "failed", f"{seen} ({free:,} bytes) on {named([node])}", f"{limit} ({two:,} bytes)", cure, (node,)
        )
    elif free < most:
        kept = f"{readable(most)} until checkpoint.keep_last: {needs.keep} are kept"
        yield Finding("disk", "warning", f"{seen} on {named([node])}", kept, "free space, or keep fewer", (node,))
    else:
        yield Finding("disk", "ok", seen, limit)


def _ports(facts: Sequence[Facts], needs: Needs) -> Iterable[Finding]:
    problems = []
    for each in facts:
        found = each.of("reach")
        if found.get("error"):
            seen, cure = f"{found['error']} on {named([each.node])}", "name an address of that node: --bind"
            problems.append(_of(each, "ports", seen, "an address to listen at", cure))
        elif "address" in found and not found.get("interface"):
            seen = f"{named([each.node])} has no interface with {found['address']}"
            problems.append(
                _of(each, "ports", seen, "an interface for the ranks' traffic", "name an address of it: --bind")
            )
    unreached: dict[int, dict[int, str]] = {}
    for each in facts:
        for other, why in each.of("reach").get("unreached", {}).items():
            unreached.setdefault(int(other), {})[each.node] = why
    silent = {each.node for each in facts if each.of("reach").get("error")}
    for other, by in sorted(unreached.items()):
        if other in silent:
            continue  # told above
        seen = f"{named([other])} cannot be reached from {named(by)}: {next(iter(by.values()))}"
        cure = "open all TCP ports between the nodes (ranks meet at ports that nobody chose), or name another interface: --bind"
        problems.append(Finding("ports", "failed", seen, "every node from every other", cure, (other,)))
    mtu = agree(
        [each for each in facts if each.of("reach").get("mtu")],
        "ports",
        lambda f: f.of("reach").get("mtu"),
        "give all interfaces between the nodes one MTU: large packets may vanish",
        "warning",
        prefix="packets of ",
    )
    if needs.nodes > 1 or problems:
        reached = sum(each.of("reach").get("reached", 0) for each in facts)
        interfaces = sorted(
            {str(each.of("reach").get("interface")) for each in facts if each.of("reach").get("interface")}
        )
        yield from unless(problems + mtu, "ports", f"{reached} ways open, over {', '.join(interfaces)}", "every node")


def _clock(facts: Sequence[Facts], needs: Needs) -> Iterable[Finding]:
    if needs.nodes < 2:
        return
    problems, known = [], []
    cure = "set the clocks (chrony, systemd-timesyncd)"
    for each in facts:
        offset, give = each.of("reach").get("offset"), each.of("reach").get("uncertainty", 0.0)
        if offset is None:
            continue
        known.append(abs(offset))
        if abs(offset) - give > CLOCK_WARNING:
            status = "failed" if abs(offset) - give > CLOCK_LIMIT else "warning"
            way = "ahead of" if offset > 0 else "behind"
            seen = f"{named([each.node])} is {abs(offset):.3f} ± {give:.3f} s {way} node 0"
            limit = f"{CLOCK_WARNING:g} s, at the most {CLOCK_LIMIT:g} s"
            problems.append(Finding("clocks", status, seen, limit, cure, (each.node,)))  # type: ignore[arg-type]
    if known:
        yield from unless(problems, "clocks", f"{max(known):.3f} s apart", f"{CLOCK_WARNING:g} s")


def _exposure(facts: Sequence[Facts], needs: Needs) -> Iterable[Finding]:
    """A store has no password: whoever reaches it can end the run."""
    for each in facts:
        if heard := each.of("reach").get("listening"):
            anywhere = any(at.startswith(("0.0.0.0:", "[::]:")) for at in heard)
            where = "every interface" if anywhere else "its interface"
            seen = f"{named([each.node])} listens on {where}: {', '.join(heard[:4])}"
            cure = "name the address of a private interface (--bind)" if anywhere else ""
            cure = f"{cure}{'; ' if cure else ''}keep strangers from it with a firewall"
            limit = "loopback alone" if needs.nodes == 1 else "a network without strangers"
            yield Finding("exposure", "warning", seen, limit, cure, (each.node,))


def _interconnect(facts: Sequence[Facts], needs: Needs) -> Iterable[Finding]:
    found = {each.node: each.of("interconnect") for each in facts if "busbw" in each.of("interconnect")}
    wrong = [each.node for each in facts if each.of("interconnect").get("right") is False]
    if wrong:
        cure = "do not train on it: look at the network cards, cables and drivers of these nodes"
        seen = f"an all-reduce gave a wrong sum on {named(wrong)}"
        yield Finding("interconnect", "failed", seen, "the exact sum", cure, tuple(wrong))
        return
    if not found:
        return
    slowest = min(each["busbw"] for each in found.values())
    latency = max(each.get("latency", 0.0) for each in found.values())
    backend = next(iter(found.values())).get("backend")
    seen = f"{slowest / 1e9:.3g} GB/s busbw, {latency * 1e6:,.0f} µs, {backend}"
    limit, problems = "", []
    if needs.network is not None:
        name, figure = needs.network
        limit = f"{SHARE_OF_NETWORK:.0%} of {figure / 1e9:.3g} GB/s ({name})"
        if slowest < SHARE_OF_NETWORK * figure:
            cure = "see whether the traffic goes over that network (--bind, NCCL_SOCKET_IFNAME, NCCL_IB_HCA, NCCL_DEBUG=INFO)"
            problems.append(Finding("interconnect", "warning", seen, limit, cure))
    inward = {node: each["inward"] for node, each in found.items() if each.get("inward")}
    usual = statistics.median(inward.values()) if inward else 0.0
    # A slow node is slow to send as well: the node after it gets as little, and only one of the two need be named.
    if slow := sorted(node for node, rate in inward.items() if rate < SHARE_OF_NETWORK * usual):
        told = ", ".join(f"{inward[node] / 1e9:.3g} GB/s into {named([node])}" for node in slow)
        problems.append(
            Finding(
                "interconnect",
                "warning",
                told,
                f"{SHARE_OF_NETWORK:.0%} of the median, {usual / 1e9:.3g} GB/s",
                "look at the cable and card of these nodes and of those before them (node n gets from node n - 1)",
                tuple(slow),
            )
        )
    yield from unless(problems, "interconnect", seen, limit)


SHARED: tuple[Rule, ...] = (
    _data, _shards, _run_folder, _disk, _ports, _clock, _exposure, _interconnect,
)  # fmt: skip
