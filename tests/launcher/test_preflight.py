"""The preflight: every check fails once, alone, on made-up nodes; and real nodes, on one real store, with real failures."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longskip.engine.fitting import Memory
from longskip.engine.ports import free_port
from longskip.errors import EXIT_USAGE, ConfigError, PreflightError, RendezvousError
from longskip.launcher import preflight
from longskip.launcher.facts import Facts
from longskip.launcher.needs import Needs, needs_of
from longskip.launcher.verdicts import Finding, judge, named
from tests.figures import figure
from tests.nodes import HEALTHY, MemoryStore, facts_of, own_mounts, run_nodes, status_of, two_networks
from tests.ranks import small_config

GIB = 1 << 30
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")


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


def test_store_that_breaks_is_an_error_that_a_supervisor_hears(shapes: Path, in_tmp: Path) -> None:
    class Broken(MemoryStore):
        def get(self, key: str, timeout: float) -> str:
            return "{" if key.endswith("verdict") else super().get(key, timeout)

    store = Broken()
    store.set("preflight/verdict", "")
    options: dict[str, Any] = {"members": [0, 1], "ranks": 1, "config": small_config(shapes), "quick": True}
    store.set("preflight/mark", '{"name": "x", "written": false}')
    store.set("preflight/hello/0", '{"error": "x"}')
    with pytest.raises(PreflightError, match=r"heard no verdict.*JSONDecodeError"):
        preflight.check(store, node=1, run=in_tmp / "a", **options)


# --- real nodes ---------------------------------------------------------------------------------------------------------


def _printed(findings: list[Finding]) -> str:
    out = io.StringIO()
    with redirect_stdout(out):
        preflight.print_outcome(preflight.Outcome(tuple(findings), 3, 1.5, {}))
    return out.getvalue()


def test_table_has_a_row_a_check_and_the_cures() -> None:
    text = _printed(judged({"software/packages/torch": "2.12.0", "devices/open_files": 99}))
    assert "2.12.0 on node 1" in re.sub(r"\s+", " ", text)
    assert "ulimit -n 1000" in text and "refused (1 failed, 1 warnings)" in text


def test_refusal_names_every_failure_with_its_cure() -> None:
    findings = judged({"software/code": "0" * 64, "run/free": 5, "devices/open_files": 99})
    outcome = preflight.Outcome(tuple(findings), 3, 1.5, {})
    with pytest.raises(PreflightError) as caught:
        outcome.refuse()
    assert caught.value.exit_code == EXIT_USAGE
    for text in ("000000000000… on node 1", "cure", "5 bytes", "64,000,000,000", "free space"):
        assert text in str(caught.value)
    assert "open files" not in str(caught.value)  # a warning refuses nothing
    preflight.Outcome(tuple(judged({"devices/open_files": 99})), 3, 1.5, {}).refuse()


def test_one_node_is_quick_and_leaves_nothing(shapes: Path, in_tmp: Path) -> None:
    config = small_config(shapes)
    run = in_tmp / "runs" / "a"
    outcome = preflight.check(MemoryStore(), node=0, members=range(1), ranks=2, config=config, run=run, quick=True)
    assert not outcome.refused, [each.message for each in wrong(list(outcome.findings))]
    assert {"data", "run folder", "locks", "disk", "memory"} <= {each.what for each in outcome.findings}
    assert "interconnect" not in outcome.slowest
    assert not run.exists() and not run.parent.exists()
    figure(f"preflight of one node, without processes: {outcome.seconds:.2f} s")


def test_what_stands_in_the_run_folder_stays(shapes: Path, in_tmp: Path) -> None:
    run = in_tmp / "runs" / "a"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("x")
    old, young = run / ".preflight-0001", run / ".preflight-0002"
    for path in (old, young):
        path.write_text("")
    os.utime(old, (1, 1))
    preflight.check(MemoryStore(), node=0, members=range(1), ranks=1, config=small_config(shapes), run=run, quick=True)
    assert sorted(os.listdir(run)) == [".preflight-0002", "config.yaml"]


def test_two_real_nodes_agree(shapes: Path, in_tmp: Path) -> None:
    config = small_config(shapes)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    first, second = run_nodes(2, config, in_tmp / "runs" / "a", in_tmp)
    for told in (first, second):
        assert not told["refused"], told
        for what in (
            "nodes",
            "python",
            "packages",
            "configuration",
            "data",
            "run folder",
            "locks",
            "disk",
            "ports",
            "clocks",
        ):
            assert status_of(told, what) == {"ok"}, (what, told)
        assert status_of(told, "interconnect") == {"ok"}
    assert first["findings"] == second["findings"]
    assert not (in_tmp / "runs").exists()
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    seen = next(each["seen"] for each in first["findings"] if each["what"] == "interconnect")
    figure(f"preflight of two nodes on this machine: {max(first['seconds'], second['seconds']):.1f} s; {seen}")


def test_other_configurations_are_refused_on_both_nodes_by_key_and_without_values(shapes: Path, in_tmp: Path) -> None:
    configs = {0: small_config(shapes), 1: small_config(shapes, train={"seed": 41_414_141})}
    for told in run_nodes(2, configs, in_tmp / "runs" / "a", in_tmp, quick=True):
        assert told["refused"] and told["raised"] == "PreflightError" and told["exit_code"] == 2
        assert "train.seed differs on node 1" in told["message"]
        assert "41414141" not in json.dumps(told)


def _without_a_shard(folder: Path) -> None:
    own_mounts()
    copy = folder.parent / "half"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(copy)], check=True)
    for path in folder.iterdir():
        if path.suffix != ".tar":
            (copy / path.name).write_bytes(path.read_bytes())
    subprocess.run(["mount", "--bind", str(copy), str(folder)], check=True)


@root_only
def test_shard_that_one_node_does_not_see(in_tmp: Path) -> None:
    from longskip.engine.data.shapes import write_shapes

    write_shapes(in_tmp / "train", 40, seed=0)
    (in_tmp / "half").mkdir()
    config = small_config(in_tmp, data={"validation": None})
    before = {1: lambda: _without_a_shard(in_tmp / "train")}
    for told in run_nodes(2, config, in_tmp / "runs" / "a", in_tmp, quick=True, before=before):
        assert told["refused"]
        (found,) = [each for each in told["findings"] if each["what"] == "data"]
        assert found["nodes"] == [1] and ".tar" in found["seen"] and "data index" in found["cure"]


def _hide(folder: Path, *options: str) -> None:
    own_mounts()
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], check=True)


@root_only
def test_run_folder_that_is_another_one_on_a_node(shapes: Path, in_tmp: Path) -> None:
    (in_tmp / "runs" / "a").mkdir(parents=True)
    before = {1: lambda: _hide(in_tmp / "runs" / "a")}
    for told in run_nodes(2, small_config(shapes), in_tmp / "runs" / "a", in_tmp, quick=True, before=before):
        assert told["refused"]
        (found,) = [each for each in told["findings"] if each["what"] == "run folder"]
        assert found["nodes"] == [1] and "does not show what node 0 wrote" in found["seen"]
    assert (in_tmp / "runs" / "a").is_dir() and not os.listdir(in_tmp / "runs" / "a")


@root_only
def test_run_folder_that_cannot_be_written(shapes: Path, in_tmp: Path) -> None:
    (in_tmp / "runs" / "a").mkdir(parents=True)
    before = {node: lambda: _hide(in_tmp / "runs", "-o", "ro") for node in (0,)}
    for told in run_nodes(2, small_config(shapes), in_tmp / "runs" / "a", in_tmp, quick=True, before=before):
        (found,) = [each for each in told["findings"] if each["what"] == "run folder"]
        assert found["status"] == "failed" and found["nodes"] == [0]
        assert "Read-only file system" in found["seen"] and "read-write" in found["cure"]


@root_only
def test_disk_that_does_not_hold_two_checkpoints(shapes: Path, in_tmp: Path) -> None:
    config = small_config(shapes)
    (in_tmp / "runs").mkdir()
    # 558,932 parameters at the most: 2 × 16 bytes of each are 17.1 MiB
    before = {0: lambda: _hide(in_tmp / "runs", "-o", "size=12m")}
    (told,) = run_nodes(1, config, in_tmp / "runs" / "a", in_tmp, quick=True, before=before)
    (found,) = [each for each in told["findings"] if each["what"] == "disk"]
    assert found["status"] == "failed"
    free, needed = (int(re.search(r"([\d,]+) bytes", found[key])[1].replace(",", "")) for key in ("seen", "limit"))  # type: ignore[index]
    assert free <= 12 << 20 and 2 * 16 * 558_932 <= needed < 2 * 16 * 558_932 + (1 << 20)


def test_run_folder_of_another_job(shapes: Path, in_tmp: Path) -> None:
    from longskip.engine.runs import RunFolder

    other = RunFolder(in_tmp / "runs" / "a")
    other.lock()
    try:
        outcome = preflight.check(
            MemoryStore(), node=0, members=range(1), ranks=1, config=small_config(shapes), run=other.path, quick=True
        )
    finally:
        other.unlock()
    (found,) = [each for each in outcome.findings if each.what == "run folder"]
    assert found.status == "failed" and f"process {os.getpid()}" in found.seen


def test_nodes_that_are_left_keep_their_numbers(shapes: Path, in_tmp: Path) -> None:
    """Nodes 0 and 2 of three, as an elastic launch goes on without node 1."""
    store, outcomes = MemoryStore(), {}

    def node(number: int) -> None:
        outcomes[number] = preflight.check(
            store, node=number, members=[0, 2], ranks=1, config=small_config(shapes), run=in_tmp / "a", quick=True,
            bind="127.0.0.1",
        )  # fmt: skip

    threads = [threading.Thread(target=node, args=(number,)) for number in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert outcomes[0].findings == outcomes[2].findings
    assert not outcomes[0].refused, wrong(list(outcomes[0].findings))
    assert "2 ways open" in next(each.seen for each in outcomes[0].findings if each.what == "ports")


def test_what_listens_beyond_loopback_is_warned_of(shapes: Path, in_tmp: Path) -> None:
    import socket

    with socket.create_server(("0.0.0.0", 0)) as open_to_all:
        port = open_to_all.getsockname()[1]
        options: dict[str, Any] = {"node": 0, "members": [0], "ranks": 1, "config": small_config(shapes), "quick": True}
        outcome = preflight.check(MemoryStore(), run=in_tmp / "a", **options)
    (found,) = [each for each in outcome.findings if each.what == "exposure" and f":{port}" in each.seen]
    assert found.status == "warning" and "every interface" in found.seen
    outcome = preflight.check(MemoryStore(), run=in_tmp / "a", **options)
    assert not any(f":{port}" in each.seen for each in outcome.findings)


def test_batch_that_does_not_divide_is_a_finding(shapes: Path, in_tmp: Path) -> None:
    options: dict[str, Any] = {"node": 0, "members": [0], "ranks": 3, "config": small_config(shapes), "quick": True}
    outcome = preflight.check(MemoryStore(), run=in_tmp / "a", **options)
    (found,) = [each for each in outcome.findings if each.what == "plan"]
    assert found.status == "failed" and "batch_size 8" in found.seen and "[1, 2, 4, 8]" in found.cure
    outcome = preflight.check(MemoryStore(), run=in_tmp / "a", elastic=True, **options)
    (found,) = [each for each in outcome.findings if each.what == "plan"]
    assert found.status == "ok" and "2 rank(s)" in found.seen


def _all_reduces() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE and "longskip.launcher.reduction" in child.cmdline()
    ]


@pytest.mark.slow
def test_all_reduce_that_is_stopped_is_a_finding_in_time(shapes: Path, in_tmp: Path) -> None:
    """SIGSTOP of one node's process: the preflight ends all the same, in its 20 s (and what a busy machine adds)."""
    stopped: list[int] = []

    def stop_one() -> None:
        until = time.monotonic() + 20
        while not stopped and time.monotonic() < until:
            for process in _all_reduces():
                process.send_signal(signal.SIGSTOP)
                stopped.append(process.pid)
                break
            time.sleep(0.01)

    thread = threading.Thread(target=stop_one)
    thread.start()
    first, second = run_nodes(2, small_config(shapes), in_tmp / "runs" / "a", in_tmp)
    thread.join()
    assert stopped and first["refused"] and second["refused"]
    failed = [each for each in first["findings"] if each["what"] == "interconnect"]
    assert {node for each in failed for node in each["nodes"]} == {0, 1} and {each["status"] for each in failed} == {
        "failed"
    }
    assert "within" in failed[0]["seen"] and "GLOO_SOCKET_IFNAME" in failed[0]["cure"]
    assert not _all_reduces() and not psutil.pid_exists(stopped[0])
    seconds = max(first["seconds"], second["seconds"])
    figure(f"preflight of two nodes, one all-reduce stopped: {seconds:.1f} s")
    assert seconds < 40


@pytest.mark.slow
@root_only
@pytest.mark.skipif(shutil.which("tc") is None, reason="tc (iproute2) shapes the link")
def test_bandwidth_is_that_of_the_link(shapes: Path, in_tmp: Path) -> None:
    """Two namespaces and a link of 400 Mbit/s: 50 MB/s, a known figure. Their MTUs differ, which is told."""
    with two_networks("400mbit", mtu=(1500, 1400)) as enter:
        run = in_tmp / "runs" / "a"
        first, second = run_nodes(
            2, small_config(shapes, launch={"network": "ndr"}), run, in_tmp, before=enter, bind="10.77.0.1"
        )
    assert first["findings"] == second["findings"] and not first["refused"], first
    seen = {each["what"]: each for each in first["findings"]}
    assert "packets of 1500 on node 0, 1400 on node 1" in seen["ports"]["seen"]
    assert status_of(first, "ports") == {"warning"} and seen["ports"]["nodes"] == [1]
    assert status_of(first, "clocks") == {"ok"}
    assert seen["interconnect"]["status"] == "warning" and "25% of 50 GB/s (ndr)" in seen["interconnect"]["limit"]
    busbw = 1e9 * float(seen["interconnect"]["seen"].split(" GB/s")[0])
    figure(f"an all-reduce over a link of 50.0 MB/s: {busbw / 1e6:.1f} MB/s busbw")
    assert 0.6 * 50e6 < busbw < 1.05 * 50e6
    listening = seen["exposure"]
    assert listening["status"] == "warning" and listening["nodes"] == [0]


@pytest.mark.slow
def test_node_that_never_comes(shapes: Path, in_tmp: Path) -> None:
    outcome = preflight.check(
        MemoryStore(),
        node=0,
        members=[0, 1],
        ranks=1,
        config=small_config(shapes),
        run=in_tmp / "a",
        bind="127.0.0.1",
        quick=True,
    )
    assert outcome.refused
    found = {each.what: each for each in wrong(list(outcome.findings))}
    assert found["nodes"].nodes == (1,) and "did not answer" in found["nodes"].seen
    figure(f"preflight with a node that never comes: {outcome.seconds:.1f} s")
    with pytest.raises(PreflightError, match="heard no verdict"):
        preflight.check(
            MemoryStore(), node=1, members=range(2), ranks=1, config=small_config(shapes), run=in_tmp / "a", quick=True
        )


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "longskip.launcher", *words]


def _yaml(path: Path, shapes: Path) -> Path:
    from longskip.engine.configio import dump_yaml

    path.write_text(dump_yaml(small_config(shapes)))
    return path


@pytest.mark.slow
def test_launch_stops_after_a_preflight_where_it_was_asked_to(shapes: Path, in_tmp: Path) -> None:
    config = _yaml(in_tmp / "run.yaml", shapes)
    words = ["launch", "--local", "2", "--preflight-only", "--json", "--", "train", str(config)]
    ended = subprocess.run(_command(*words), capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["refused"] is False and {"data", "disk", "memory"} <= {each["what"] for each in told["findings"]}
    assert not (in_tmp / "runs" / "run" / "config.yaml").exists()  # no rank was started
    ended = subprocess.run(_command(*words, "data.path=/nowhere"), capture_output=True, text=True, timeout=120)
    assert ended.returncode == EXIT_USAGE and json.loads(ended.stdout)["refused"] is True
    assert "/nowhere does not exist" in ended.stderr and "cure: " in ended.stderr


@pytest.mark.slow
def test_supervisors_with_other_settings_all_refuse(shapes: Path, in_tmp: Path) -> None:
    config, port = _yaml(in_tmp / "run.yaml", shapes), free_port()
    words = ["supervise", "--nodes", "2", "--ranks", "1", "--store", f"127.0.0.1:{port}"]
    other = ["--", "train", str(config), "optim.lr=0.5"]
    lines = [_command(*words, "--node", "0", *other[:-1]), _command(*words, "--node", "1", *other)]
    nodes = [subprocess.Popen(line, stderr=subprocess.PIPE, text=True) for line in lines]
    said = [node.communicate(timeout=120)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [EXIT_USAGE, EXIT_USAGE], said
    assert all("optim.lr differs on node 1" in each for each in said)
    assert not any((in_tmp / "runs").glob("*/config.yaml"))


def test_torch_is_not_imported_for_a_node_alone(shapes: Path, in_tmp: Path) -> None:
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})
from longskip.engine.configio import validate
from longskip.launcher import preflight
class Store(dict):
    set = dict.__setitem__
    has = dict.__contains__
    def get(self, key, timeout): return self[key]
config = validate({{"model": {{"preset": "uvit-tiny", "resolution": 32}}, "data": {{"path": {str(shapes / "train")!r}}}}})
preflight.check(Store(), node=0, members=range(1), ranks=1, config=config, run=Path("runs/a"), quick=True)
sys.exit(3 if "torch" in sys.modules else 0)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
