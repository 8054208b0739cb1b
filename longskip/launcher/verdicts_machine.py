"""The verdict on each node by itself and on how alike they are: software, devices, memory, limits (no torch)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from longskip.engine.fitting import MARGIN, Free, Memory, readable
from longskip.launcher.facts import Facts
from longskip.launcher.needs import Needs
from longskip.launcher.probes import PACKAGES
from longskip.launcher.verdicts import Finding, Rule, Status, agree, differing, named, unless

_SAME = "install the same versions on all nodes (pip install -c constraints.txt)"


def _python(facts: Sequence[Facts], needs: Needs) -> Iterable[Finding]:
    problems = []
    for each in facts:
        version = str(each.of("software").get("python", ""))
        if version and _numbers(version) < (3, 10):
            seen = f"{version} on {named([each.node])}"
            problems.append(Finding("python", "failed", seen, "3.10 or newer", "install a newer Python", (each.node,)))
    minor = differing(facts, lambda f: _minor(f.of("software").get("python")))
    status: Status = "failed" if minor else "warning"
    problems += agree(facts, "python", lambda f: f.of("software").get("python"), _SAME, status)
    first = facts[0].of("software").get("python", "unknown") if facts else "unknown"
    yield from unless(problems, "python", str(first), "the same, 3.10 or newer")


def _minor(version: object) -> str | None:
    return None if version is None else ".".join(str(version).split(".")[:2])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _packages(facts: Sequence[Facts], needs: Needs) -> Iterable[Finding]:
    from packaging.requirements import InvalidRequirement, Requirement

    problems = []
    for package in PACKAGES:
        problems += agree(facts, "packages", lambda f, name=package: _version(f, name), _SAME, prefix=f"{package} ")  # type: ignore[misc]
    for text in needs.requirements:
        try:
            wanted = Requirement(text)
        except InvalidRequirement:
            continue
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        unfit: dict[str, list[int]] = {}
        for each in facts:
            version = _version(each, wanted.name)
            if version == "missing" or (version and not wanted.specifier.contains(version, prereleases=True)):
                unfit.setdefault(version, []).append(each.node)
        for version, nodes in unfit.items():
            seen = f"{wanted.name} {version} on {named(nodes)}"
            limit = f"{wanted.name}{wanted.specifier}"
            problems.append(Finding("packages", "failed", seen, limit, f"pip install '{limit}' there", tuple(nodes)))
    versions = facts[0].of("software").get("packages", {}) if facts else {}
    seen = ", ".join(f"{name} {versions[name]}" for name in ("torch", "deepspeed", "triton") if versions.get(name))
    yield from unless(problems, "packages", seen, f"{len(PACKAGES)} the same, {len(needs.requirements)} new enough")


def _version(facts: Facts, package: str) -> str | None:
    """The package's version there, ``missing``, or None where it was not looked for."""
    packages = facts.of("software").get("packages")
    if not isinstance(packages, dict) or package not in packages:
        return None
    return packages[package] or "missing"


def _code(facts: Sequence[Facts], needs: Needs) -> Iterable[Finding]:
    cure = "install one and the same longskip on all nodes (a shared folder, or one commit)"
    problems = agree(facts, "code", lambda f: f.of("software").get("code"), cure)
    first = str(facts[0].of("software").get("code", "unknown")) if facts else "unknown"
    yield from unless(problems, "code", first[:12], "the same on all nodes")


def _configuration(facts: Sequence[Facts], needs: Needs) -> Iterable[Finding]:
    cure = "give all nodes the same CONFIG and overrides"
    keys = sorted({key for each in facts for key in each.of("software").get("config", {})})
    groups: dict[tuple[int, ...], list[str]] = {}
    for key in keys:
        found = agree(facts, "configuration", lambda f, name=key: _setting(f, name), cure)  # type: ignore[misc]
        if found:
            groups.setdefault(found[0].nodes, []).append(key)
    problems = [
        Finding(
            "configuration",
            "failed",
            f"{', '.join(keys[:6])}{' …' if len(keys) > 6 else ''} differ{'s' if len(keys) == 1 else ''} on {named(nodes)}",
            "the same on all nodes",
            cure,
            nodes,
        )
        for nodes, keys in groups.items()
    ]
    problems += agree(
        [each for each in facts if "deepspeed" in each.of("software")],
        "configuration",
        lambda f: f.of("software")["deepspeed"] or "none",
        cure,
        prefix="deepspeed.config's file is ",
    )
    yield from unless(problems, "configuration", f"{len(keys)} settings", "the same on all nodes")


def _setting(facts: Facts, key: str) -> str | None:
    """The hash of a setting; a node that has not got the setting differs from one that has."""
    settings = facts.of("software").get("config")
    return None if not settings else settings.get(key, "absent")


def _devices(facts: Sequence[Facts], needs: Needs) -> Iterable[Finding]:
    kind = "devices"
    problems = agree(
        facts, kind, lambda f: f.of("devices").get("kind"), "take nodes of one kind, or DS_ACCELERATOR=cpu"
    )
    cure = f"ask for {needs.ranks} GPUs on every node, start fewer ranks a node, or see why they are not visible"
    for each in facts:
        found = each.of("devices")
        if found.get("kind") != "cuda":
            continue
        gpus = found.get("gpus", [])
        counts = [len(gpus)] + [n for n in (each.of("interconnect").get("cuda"),) if n is not None]
        if min(counts) < needs.ranks:
            by = " that torch can use" if counts[-1] < counts[0] else ""
            problems.append(_at(each, kind, f"{min(counts)} GPUs{by}", f"{needs.ranks} a node", cure))
        if found.get("health"):
            seen = f"health unknown: {found['health']}"
            problems.append(_at(each, kind, seen, "ECC, clocks and memory read", "pip install nvidia-ml-py", "warning"))
        for i, gpu in enumerate(gpus):
            if gpu.get("uncorrected"):
                seen = f"GPU {i} has {gpu['uncorrected']} uncorrected memory errors"
                problems.append(_at(each, kind, seen, "0", "reset it (nvidia-smi -r) or leave the node out"))
            if gpu.get("slowed"):
                seen = f"GPU {i} is slowed down: {', '.join(gpu['slowed'])}"
                problems.append(_at(each, kind, seen, "full clocks", "look at its cooling and power", "warning"))
    problems += agree(
        facts,
        kind,
        lambda f: sorted({gpu["name"] for gpu in f.of("devices").get("gpus", []) if "name" in gpu}) or None,
        "take nodes with the same GPUs: the slowest decides the step's time",
        "warning",
    )
    yield from unless(problems, kind, _devices_seen(facts), f"{needs.ranks} ranks a node")


def _devices_seen(facts: Sequence[Facts]) -> str:
    found = facts[0].of("devices") if facts else {}
    if found.get("kind") == "cuda":
        gpus = found.get("gpus", [])
        return f"{len(gpus)} × {gpus[0].get('name', 'CUDA') if gpus else 'CUDA'}"
    return f"CPU, {min((each.of('devices').get('cores', 0) for each in facts), default=0)} cores"


def _at(each: Facts, what: str, seen: str, limit: str, cure: str, status: Status = "failed") -> Finding:
    return Finding(what, status, f"{seen} on {named([each.node])}", limit, cure, (each.node,))


def _threads(facts: Sequence[Facts], needs: Needs) -> Iterable[Finding]:
    problems = []
    for each in facts:
        found = each.of("devices")
        cores, threads = found.get("cores", needs.ranks), str(found.get("threads") or "1").partition(",")[0]
        if cores < needs.ranks:
            seen, cure = f"{cores} cores", "start fewer ranks a node: they take turns"
            problems.append(_at(each, "cores", seen, f"{needs.ranks}, one a rank", cure, "warning"))
        elif threads.isdigit() and int(threads) * needs.ranks > cores:
            seen = f"OMP_NUM_THREADS={threads} with {needs.ranks} ranks on {cores} cores"
            cure = f"unset OMP_NUM_THREADS, or set it to {cores // needs.ranks}"
            problems.append(_at(each, "cores", seen, f"{cores} threads", cure, "warning"))
    least = min((each.of("devices").get("cores", 0) for each in facts), default=0)
    yield from unless(problems, "cores", f"{least} a node", f"{needs.ranks}, one a rank")


def _memory(facts: Sequence[Facts], needs: Needs) -> Iterable[Finding]:
    frees = {each.node: free for each in facts if (free := _free(each, needs.ranks)) is not None}
    if not needs.memory or not frees:
        return
    unfit = {stage: [node for node, free in frees.items() if not free.holds(needed)] for stage, needed in needs.memory}
    fitting = [stage for stage, nodes in unfit.items() if not nodes]
    if fitting:
        stage, needed = next(pair for pair in needs.memory if pair[0] == fitting[0])
        least = min(frees.values(), key=lambda free: free.device)
        yield Finding("memory", "ok", f"{least} free a rank", f"{_needed(needed)} at ZeRO-{stage}, {MARGIN:.0%} usable")
        return
    stage, needed = min(needs.memory, key=lambda pair: pair[1].device + pair[1].host)
    # A stage that was asked for is taken whatever is free, so that only what cannot be held at all is refused.
    close = len(needs.memory) == 1 and all(_just_holds(frees[node], needed) for node in unfit[stage])
    worst = min((frees[node] for node in unfit[stage]), key=lambda free: free.device)
    yield Finding(
        "memory",
        "warning" if close else "failed",
        f"{worst} free a rank on {named(unfit[stage])}",
        f"{_needed(needed)} at ZeRO-{stage}, {MARGIN:.0%} usable",
        "end what else runs there; more ranks, a smaller train.micro_batch, engine.checkpointing: 1, train.dtype: bf16, "
        "deepspeed.offload_optimizer: cpu; longskip plan shows what fits",
        tuple(unfit[stage]),
    )


def _needed(needed: Memory) -> str:
    host = f" and {readable(needed.host)} of host memory" if needed.host else ""
    return f"{readable(needed.device)}{host}"


def _just_holds(free: Free, needed: Memory) -> bool:
    if free.host is None:
        return needed.device + needed.host <= free.device
    return needed.device <= free.device and needed.host <= free.host


def _free(each: Facts, ranks: int) -> Free | None:
    """What a rank of this node may take; None where it is not known."""
    found = each.of("devices")
    if "available" not in found:
        return None
    host = int(found["available"]) // max(1, ranks)
    if found.get("kind") != "cuda":
        return Free(host)
    free = [gpu["free"] for gpu in found.get("gpus", [])[:ranks] if "free" in gpu]
    return Free(min(free), host) if free else None


def _shared_memory(facts: Sequence[Facts], needs: Needs) -> Iterable[Finding]:
    if not needs.shared:
        return
    cure = (
        "more of it (docker run --shm-size=…, an emptyDir of medium Memory in Kubernetes), fewer data.workers, or "
        "data.workers: 0, which needs none"
    )
    problems = [
        _at(
            each,
            "shared memory",
            f"{readable(free)} free in /dev/shm",
            f"{readable(needs.shared)} for data workers",
            cure,
        )
        for each in facts
        if (free := each.of("devices").get("shared")) is not None and free < needs.shared
    ]
    least = min((each.of("devices").get("shared") or 0 for each in facts), default=0)
    yield from unless(
        problems, "shared memory", f"{readable(least)} free", f"{readable(needs.shared)} for data workers"
    )


def _open_files(facts: Sequence[Facts], needs: Needs) -> Iterable[Finding]:
    problems = []
    for each in facts:
        limit = each.of("devices").get("open_files", -1)
        if 0 <= limit < needs.open_files:
            most = each.of("devices").get("open_files_most", -1)
            cure = f"ulimit -n {needs.open_files} before the launch"
            if 0 <= most < needs.open_files:
                cure = f"have the hard limit raised, which is {most} (limits.conf, LimitNOFILE)"
            limit_text = f"{needs.open_files} for a rank with all its shards open"
            problems.append(_at(each, "open files", f"{limit} may be open", limit_text, cure, "warning"))
    limits = [limit for each in facts if (limit := each.of("devices").get("open_files", -1)) >= 0]
    yield from unless(problems, "open files", str(min(limits)) if limits else "no limit", str(needs.open_files))


MACHINE: tuple[Rule, ...] = (
    _python, _packages, _code, _configuration, _devices, _threads, _memory, _shared_memory, _open_files,
)  # fmt: skip
