"""The preflight of real nodes, processes on one real store, and of failures made real: mounts, links, stopped processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import pytest

from longskip.engine.ports import free_port
from longskip.errors import EXIT_USAGE, PreflightError
from longskip.launcher import preflight
from longskip.launcher.verdicts import Finding
from tests.figures import figure
from tests.nodes import MemoryStore, own_mounts, run_nodes, status_of, two_networks
from tests.ranks import small_config

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")


def wrong(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.status != "ok"]


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


def test_one_node_is_quick_and_leaves_nothing(shapes: Path, in_tmp: Path) -> None:
    config = small_config(shapes)
    run = in_tmp / "runs" / "a"
    outcome = preflight.check(MemoryStore(), node=0, members=range(1), ranks=2, config=config, run=run, quick=True)
    assert not outcome.refused, [each.message for each in wrong(outcome.findings)]
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
    assert not outcomes[0].refused, wrong(outcomes[0].findings)
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
    found = {each.what: each for each in wrong(outcome.findings)}
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
