"""The preflight's judge: every check fails once, alone, on made-up nodes, and says which node, which value and the cure."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longskip.engine.fitting import Memory
from longskip.errors import EXIT_USAGE, ConfigError, PreflightError, RendezvousError
from longskip.launcher import preflight
from longskip.launcher.facts import Facts
from longskip.launcher.needs import Needs, needs_of
from longskip.launcher.verdicts import Finding, judge, named
from tests.nodes import HEALTHY, facts_of
from tests.ranks import small_config

GIB = 1 << 30


def _memory(device: int, host: int = 0) -> Memory:
    return Memory(device, 0, 0, 0, 0, 0, host)


NEEDS = Needs(
    members=(0, 1, 2),
    ranks=8,
    world=24,
    requirements=("torch>=2.11", "rich>=13", "numpy>=1.26"),
    parameters=2_000_000_000,
    checkpoint=32_000_000_000,
    keep=3,
    memory=((3, _memory(60 * GIB, 10 * GIB)),),
    shared=GIB,
    open_files=1000,
    readers=96,
    batch="batch 96",
    network=("ndr", 50e9),
)


def judged(
    altered: dict[str, Any] | None = None, *, nodes: int = 3, at: int = 1, needs: Needs = NEEDS
) -> list[Finding]:
    needs = replace(needs, members=tuple(range(nodes)))
    return judge([facts_of(node, altered if node == at else None) for node in range(nodes)], needs)


def wrong(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.status != "ok"]


def test_healthy_nodes_pass_every_check() -> None:
    findings = judged()
    assert not wrong(findings)
    assert [finding.what for finding in findings] == [
        "nodes", "plan", "python", "packages", "code", "configuration", "devices", "cores", "memory", "shared memory",
        "open files", "data", "shards", "run folder", "locks", "disk", "ports", "clocks", "interconnect",
    ]  # fmt: skip


# what is altered on node 1 → (check, status, texts that the line holds besides the node)
ALTERED: list[tuple[dict[str, Any], str, str, list[str]]] = [
    ({"software/python": "3.12.1"}, "python", "failed", ["3.12.1", "3.11.7"]),
    ({"software/python": "3.11.9"}, "python", "warning", ["3.11.9"]),
    ({"software/packages/torch": "2.12.0+cpu"}, "packages", "failed", ["torch 2.13.0+cpu", "2.12.0+cpu"]),
    ({"software/packages/safetensors": None}, "packages", "failed", ["safetensors", "missing"]),
    ({"software/packages/rich": "12.6.0"}, "packages", "failed", ["rich 12.6.0", "rich>=13", "pip install 'rich>=13'"]),
    ({"software/packages/rich": None}, "packages", "failed", ["rich missing", ">=13"]),
    ({"software/code": "0" * 64}, "code", "failed", ["000000000000", "abababababab"]),
    ({"software/config/train.seed": "999999999999"}, "configuration", "failed", ["train.seed"]),
({"software/deepspeed": "1" * 64}, "configuration", "failed", ["111111111111", "none"]),
    ({"devices/kind": "cpu"}, "devices", "failed", ["cuda", "cpu"]),
    ({"devices/gpus": HEALTHY["devices"]["gpus"][:7]}, "devices", "failed", ["7 GPUs", "8 a node"]),
    ({"interconnect/cuda": 0}, "devices", "failed", ["0 GPUs that torch can use", "8 a node"]),
    ({"devices/gpus/2/uncorrected": 4}, "devices", "failed", ["GPU 2", "4 uncorrected"]),
    ({"devices/gpus/5/slowed": ["too hot"]}, "devices", "warning", ["GPU 5", "too hot"]),
    ({"devices/gpus/0/name": "NVIDIA A100-SXM4-80GB"}, "devices", "warning", ["A100", "H100"]),
    ({"devices/health": "nvidia-ml-py is not installed"}, "devices", "warning", ["nvidia-ml-py"]),
    ({"devices/cores": 6}, "cores", "warning", ["6 cores", "8"]),
    ({"devices/threads": "16"}, "cores", "warning", ["OMP_NUM_THREADS=16", "64 cores", "set it to 8"]),
    ({"devices/gpus/7/free": 50 * GIB}, "memory", "failed", ["50.00 GiB", "60.00 GiB", "ZeRO-3"]),
    ({"devices/gpus/7/free": 62 * GIB}, "memory", "warning", ["62.00 GiB", "60.00 GiB"]),
    ({"devices/available": 40 * GIB}, "memory", "failed", ["5.00 GiB of host memory", "10.00 GiB"]),
    ({"devices/shared": 64 << 20}, "shared memory", "failed", ["64.0 MiB", "1.00 GiB", "data.workers"]),
    ({"devices/open_files": 256}, "open files", "warning", ["256", "1000", "ulimit -n 1000"]),
    ({"devices/open_files": 256, "devices/open_files_most": 512}, "open files", "warning", ["hard limit", "512"]),
    ({"data/sets/0/error": "/data/train/00007.tar is missing", "data/sets/0/cure": "restore it"}, "data", "failed",
     ["data.path", "00007.tar", "restore it"]),
    ({"data/sets/0/fingerprint": "0" * 64}, "data", "failed", ["data.path", "000000000000"]),
    ({"data/sets/1/fingerprint": "0" * 64}, "data", "failed", ["data.validation", "000000000000"]),
    ({"data/files": {"encoders.vae.path": "/models/vae"}}, "data", "failed", ["encoders.vae.path", "/models/vae"]),
    ({"run/seen": False}, "run folder", "failed", ["/work/runs/a", "does not show", "all nodes"]),
    ({"run/writable": False, "run/error": "OSError: Read-only file system"}, "run folder", "failed", ["Read-only"]),
    ({"run/owner": "process 4 on n7"}, "run folder", "failed", ["process 4 on n7", "train.name"]),
    ({"run/locked": False}, "locks", "failed", ["lock that node 0 holds", "nolock"]),
    ({"run/free": 63_000_000_000}, "disk", "failed", ["63,000,000,000", "64,000,000,000"]),
    ({"run/free": 100_000_000_000}, "disk", "warning", ["keep_last: 3"]),
    ({"reach/interface": None}, "ports", "failed", ["no interface", "10.0.0.2", "--bind"]),
    ({"reach/mtu": 1500}, "ports", "warning", ["9000", "1500"]),
    ({"reach/error": "10.9.9.9: Cannot assign requested address"}, "ports", "failed", ["10.9.9.9", "--bind"]),
    ({"reach/offset": -3.5}, "clocks", "warning", ["3.500", "behind", "1 s"]),
    ({"reach/offset": 3600.0}, "clocks", "failed", ["3600.000", "ahead", "300 s"]),
    ({"reach/listening": ["0.0.0.0:29500"]}, "exposure", "warning", ["0.0.0.0:29500", "every interface", "firewall"]),
    ({"interconnect/right": False}, "interconnect", "failed", ["wrong sum"]),
    ({"interconnect/inward": 2e9}, "interconnect", "warning", ["2 GB/s", "45 GB/s"]),
    ({"failed/data": "hangs: no answer within 12 s", "data/sets": []}, "data", "failed", ["hangs", "12 s"]),
    ({"failed/data": "hangs: no answer within 12 s"}, "data", "failed", ["hangs"]),
    ({"failed/data": "hangs: no answer within 12 s", "data/sets/1/kind": "folder"}, "data", "warning", ["hangs"]),
    ({"failed/interconnect": "RuntimeError: no all-reduce"}, "interconnect", "failed", ["no all-reduce", "GLOO_SOCKET_IFNAME"]),
    ({"failed/devices": "hangs: no answer within 8 s"}, "devices", "failed", ["hangs", "8 s"]),
]  # fmt: skip


@pytest.mark.parametrize(("altered", "what", "status", "texts"), ALTERED, ids=lambda value: str(value)[:60])
def test_each_check_fails_alone_and_says_node_value_limit_and_cure(
    altered: dict[str, Any], what: str, status: str, texts: list[str]
) -> None:
    found = wrong(judged(altered))
    assert [(each.what, each.status) for each in found] == [(what, status)]
    (one,) = found
    assert one.nodes == (1,)
    assert one.limit and one.cure
    line = f"{one.message} {one.cure}"
    assert "node 1" in line
    for text in texts:
        assert text in line, line


def test_unreached_node_is_the_one_that_nobody_reaches() -> None:
    facts = [
        facts_of(0, {"reach/unreached": {"1": "timed out"}}),
        facts_of(1),
        facts_of(2, {"reach/unreached": {"1": "timed out"}}),
    ]
    (found,) = wrong(judge(facts, NEEDS))
    assert (found.what, found.status, found.nodes) == ("ports", "failed", (1,))
    assert "node 1 cannot be reached from nodes 0, 2" in found.seen


def test_silent_node_is_missed() -> None:
    (found,) = wrong(judge([facts_of(0), facts_of(2)], NEEDS))
    assert (found.what, found.status, found.nodes) == ("nodes", "failed", (1,))


def test_slow_network_is_told_by_its_name() -> None:
    facts = [facts_of(node, {"interconnect/busbw": 10e9}) for node in range(3)]
    (found,) = wrong(judge(facts, NEEDS))
    assert (found.what, found.status) == ("interconnect", "warning")
    assert "10 GB/s" in found.seen and "25% of 50 GB/s (ndr)" in found.limit
    assert not wrong(judge(facts, replace(NEEDS, network=("roce-100", 12.5e9))))


def test_what_cannot_be_planned_is_refused() -> None:
    needs = replace(NEEDS, wrong=(("train.batch_size 8 does not divide over 24 rank(s)", "start one of [1, 2, 4, 8]"),))
    (found,) = wrong(judged(needs=needs))
    assert (found.what, found.status, found.cure) == ("plan", "failed", "start one of [1, 2, 4, 8]")


def test_memory_takes_the_smallest_stage_that_all_nodes_hold() -> None:
    stages = tuple((stage, _memory(size * GIB)) for stage, size in ((0, 200), (1, 70), (2, 65), (3, 20)))
    needs = replace(NEEDS, memory=stages)
    line = next(each for each in judged(needs=needs) if each.what == "memory")
    assert line.status == "ok" and "ZeRO-1" in line.limit
    line = next(each for each in judged({"devices/gpus/1/free": 30 * GIB}, needs=needs) if each.what == "memory")
    assert line.status == "ok" and "ZeRO-3" in line.limit
    line = next(each for each in judged({"devices/gpus/1/free": 21 * GIB}, needs=needs) if each.what == "memory")
    assert line.status == "failed" and line.nodes == (1,)  # the engine's own choice refuses it too


def test_fewer_shards_than_readers_matter_to_streams_alone() -> None:
    few = {"data/sets/0/shards": 50}
    everywhere = [facts_of(node, few) for node in range(3)]
    assert not wrong(judge(everywhere, NEEDS))
    streamed = [facts_of(node, few | {"data/sets/0/kind": "url"}) for node in range(3)]
    (found,) = wrong(judge(streamed, NEEDS))
    assert (found.what, found.status) == ("shards", "warning") and "50" in found.seen and "96 readers" in found.limit


def test_one_node_has_no_rows_about_others() -> None:
    findings = judge([facts_of(0)], replace(NEEDS, members=(0,), world=8))
    assert not {"clocks", "ports"} & {each.what for each in findings}


SAME = [
    ("software/python", "python"), ("software/packages/torch", "packages"), ("software/packages/numpy", "packages"),
    ("software/packages/webdataset", "packages"), ("software/code", "code"), ("software/config/train.seed", "configuration"),
    ("software/config/optim.lr", "configuration"), ("devices/kind", "devices"), ("data/sets/0/fingerprint", "data"),
    ("data/sets/1/fingerprint", "data"), ("reach/mtu", "ports"),
]  # fmt: skip
VALUES = {"software/python": "3.14.0", "reach/mtu": 1492, "devices/kind": "rocm"}


@settings(max_examples=60, deadline=None)
@given(nodes=st.integers(3, 9), data=st.data())
def test_one_altered_field_among_equal_nodes_is_found_and_its_node_named(nodes: int, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, nodes - 1))
    path, what = data.draw(st.sampled_from(SAME))
    value = VALUES.get(path) or data.draw(st.sampled_from(["99.1.0", "99.2.7"]))
    found = wrong(judged({path: value}, nodes=nodes, at=at))
    assert [(each.what, each.nodes) for each in found] == [(what, (at,))]
    assert f"{named([at])}" in found[0].seen


def _paths(tree: Any, way: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path for key, value in items for path in [(*way, str(key)), *_paths(value, (*way, str(key)))]]


@settings(max_examples=150, deadline=None)
@given(gone=st.lists(st.sampled_from([p for p in _paths(HEALTHY) if len(p) > 1]), max_size=6), at=st.integers(0, 2))
def test_facts_that_are_missing_never_break_the_judge(gone: list[tuple[str, ...]], at: int) -> None:
    facts = [facts_of(node) for node in range(3)]
    for path in gone:
        place: Any = facts[at].found
        for step in path[:-1]:
            place = (place.get(step) if isinstance(place, dict) else None) if not isinstance(place, list) else (
                place[int(step)] if int(step) < len(place) else None
            )  # fmt: skip
        if isinstance(place, dict) and path[-2:-1] != ("sets",) and path[-1] != "name":
            place.pop(path[-1], None)
    for finding in judge(facts, NEEDS):
        assert finding.message


@settings(max_examples=100, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=4), lambda inner: st.lists(inner, max_size=3)
       | st.dictionaries(st.sampled_from(["node", "host", "found", "failed", "seconds", "x"]), inner, max_size=6)))  # fmt: skip
def test_facts_that_nobody_sends_are_refused(value: Any) -> None:
    try:
        facts = Facts.from_json(value, 1)
    except RendezvousError as error:
        assert error.cure
    else:
        assert facts.node == 1 and isinstance(facts.host, str)


def test_facts_and_findings_survive_the_store() -> None:
    facts = facts_of(1)
    assert Facts.from_json(json.loads(json.dumps(facts.to_json())), 1) == facts
    for finding in judged({"software/python": "3.12.1"}):
        assert Finding.from_json(json.loads(json.dumps(finding.to_json()))) == finding


@pytest.mark.parametrize(
    ("nodes", "text"), [([3], "node 3"), ([0, 1], "nodes 0, 1"), ([5, 0, 2, 3, 4], "nodes 0, 2–5")]
)
def test_nodes_are_named_in_runs(nodes: list[int], text: str) -> None:
    assert named(nodes) == text


def test_network_is_named_in_the_configuration(shapes: Path, in_tmp: Path) -> None:
    config = small_config(shapes, launch={"network": "100GbE"})
    assert needs_of(config, in_tmp / "a", [0, 1], 4).network == (
        "100gbe",
        12.5e9 / 4,
    )  # a node's port, shared by its ranks
    with pytest.raises(ConfigError, match="unknown network 'ndx'") as caught:
        small_config(shapes, launch={"network": "ndx"})
    assert "did you mean 'ndr'" in str(caught.value)


# --- what is shown ----------------------------------------------------------------------------------------------------


def _printed(findings: list[Finding]) -> str:
    out = io.StringIO()
    with redirect_stdout(out):
        preflight.print_outcome(preflight.Outcome(tuple(findings), 3, 1.5, {}, facts_of(0)))
    return out.getvalue()


def test_table_has_a_row_a_check_and_the_cures() -> None:
    text = _printed(judged({"software/packages/torch": "2.12.0", "devices/open_files": 99}))
    assert "2.12.0 on node 1" in re.sub(r"\s+", " ", text)
    assert "ulimit -n 1000" in text and "refused (1 failed, 1 warnings)" in text


def test_refusal_names_every_failure_with_its_cure() -> None:
    findings = judged({"software/code": "0" * 64, "run/free": 5, "devices/open_files": 99})
    outcome = preflight.Outcome(tuple(findings), 3, 1.5, {}, facts_of(0))
    with pytest.raises(PreflightError) as caught:
        outcome.refuse()
    assert caught.value.exit_code == EXIT_USAGE
    for text in ("000000000000… on node 1", "cure", "5 bytes", "64,000,000,000", "free space"):
        assert text in str(caught.value)
    assert "open files" not in str(caught.value)  # a warning refuses nothing
    preflight.Outcome(tuple(judged({"devices/open_files": 99})), 3, 1.5, {}, facts_of(0)).refuse()
