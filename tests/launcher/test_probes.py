"""What a node finds out about itself: the probes for real on this machine, against other ways of knowing the same."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
import types
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import longskip
from longskip.engine.data.index import load_index
from longskip.launcher import common_folder, needs, probes, reach, reduction
from longskip.launcher.board import Board
from tests.nodes import MemoryStore
from tests.ranks import small_config
from tests.saved_runs import saved_run


def found_by(probe: probes.Probe) -> dict[str, Any]:
    found: dict[str, Any] = {}
    probe(found)
    return found


# --- running probes -----------------------------------------------------------------------------------------------------


def test_probe_that_hangs_or_fails_is_told_and_the_others_are_kept() -> None:
    let_go = threading.Event()

    def hangs(found: dict[str, Any]) -> None:
        found["begun"] = 1
        let_go.wait()

    def fails(found: dict[str, Any]) -> None:
        found["half"] = True
        raise OSError("no such thing")

    began = time.monotonic()
    found, failed, seconds = probes.run_probes(
        [
            probes.Timed("good", lambda found: found.update(x=[1, 2]), 5.0),
            probes.Timed("hangs", hangs, 0.2),
            probes.Timed("fails", fails, 5.0),
        ]
    )
    let_go.set()
    assert time.monotonic() - began < 4
    assert found == {"good": {"x": [1, 2]}, "hangs": {"begun": 1}, "fails": {"half": True}}
    assert failed == {"hangs": "hangs: no answer within 0.2 s", "fails": "OSError: no such thing"}
    assert set(seconds) == {"good", "hangs", "fails"}


def test_board_waits_for_a_key_and_no_longer() -> None:
    store = MemoryStore()
    board = Board(store, "here")
    threading.Timer(0.1, lambda: board.put("a", {"b": [1]})).start()
    assert board.take("a", 5.0) == {"b": [1]}
    assert list(store.values) == ["here/a"]
    with pytest.raises(TimeoutError, match="nobody has said c"):
        board.take("c", 0.1)


# --- software -----------------------------------------------------------------------------------------------------------


def test_software_is_what_is_installed(shapes: Path) -> None:
    found = found_by(probes.software(small_config(shapes)))
    assert found["packages"]["torch"] == metadata.version("torch") and found["packages"]["numpy"] == metadata.version(
        "numpy"
    )
    assert found["packages"]["longskip"] == longskip.__version__
    assert found["packages"]["PyYAML"] and "pytest" not in found["packages"]  # required by longskip, and by its extras
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert len(found["code"]) == 64 and found["deepspeed"] is None
    assert str(shapes) not in json.dumps(found)


def test_one_setting_changes_one_hash(shapes: Path) -> None:
    one = found_by(probes.software(small_config(shapes)))["config"]
    other = found_by(probes.software(small_config(shapes, optim={"lr": 2e-3})))["config"]
    assert {key for key in one if one[key] != other[key]} == {"optim.lr"}


def test_code_hash_sees_every_byte_and_name_but_no_compiled_file(tmp_path: Path) -> None:
    folder = tmp_path / "package"
    (folder / "inner" / "__pycache__").mkdir(parents=True)
    (folder / "a.py").write_text("x = 1\n")
    (folder / "inner" / "b.yaml").write_text("k: v\n")
    first = probes.code_hash(folder)
    (folder / "inner" / "__pycache__" / "a.cpython-311.pyc").write_text("compiled")
    (folder / "a.pyc").write_text("compiled")
    assert probes.code_hash(folder) == first
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert probes.code_hash(tmp_path / "elsewhere") == first
    (folder / "inner" / "b.yaml").write_text("k: w\n")
    second = probes.code_hash(folder)
    (folder / "a.py").rename(folder / "c.py")
    assert len({first, second, probes.code_hash(folder)}) == 3


# --- devices ------------------------------------------------------------------------------------------------------------


def test_devices_of_this_machine() -> None:
    found = found_by(probes.devices)
    assert found["kind"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found["cores"] == len(os.sched_getaffinity(0))
    assert found["open_files"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert 0 < found["available"] <= found["total"] <= psutil.virtual_memory().total
    state = os.statvfs("/dev/shm")
    assert abs(found["shared"] - state.f_bavail * state.f_frsize) < 1 << 30


def test_memory_is_that_of_the_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outer, inner = tmp_path, tmp_path / "pod"
    inner.mkdir()
    for group, limit, current, inactive in ((outer, "max", 50 << 20, 0), (inner, str(300 << 20), 120 << 20, 20 << 20)):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{current}\n")
        (group / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\n")
    monkeypatch.setattr(probes, "_own_groups", lambda: [inner, outer])
    assert probes.host_memory() == (200 << 20, 300 << 20)
    (inner / "memory.max").unlink()
    assert probes.host_memory()[1] == psutil.virtual_memory().total


class _Nvml(types.ModuleType):
    """A driver with three GPUs, as nvidia-ml-py shows it: the second has lost memory, the third is too hot."""

    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 0
    nvmlClocksThrottleReasonHwSlowdown, nvmlClocksThrottleReasonHwThermalSlowdown = 0x8, 0x40
    nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 0x80

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 3

    def nvmlDeviceGetHandleByIndex(self, i: int) -> int:
        return i

    def nvmlDeviceGetUUID(self, i: int) -> str:
        return f"GPU-{i}{i}{i}{i}-aa"

    def nvmlDeviceGetName(self, i: int) -> bytes:
        return b"NVIDIA H200"

    def nvmlDeviceGetMemoryInfo(self, i: int) -> Any:
        return types.SimpleNamespace(free=100 + i, total=200)

    def nvmlDeviceGetTotalEccErrors(self, i: int, kind: int, counter: int) -> int:
        assert (kind, counter) == (1, 0)
        if i == 0:
            raise self.NVMLError("not supported")
        return 7 if i == 1 else 0

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, i: int) -> int:
        return 0x48 if i == 2 else 0x4  # 0x4: the power limit, which is how these cards run


@pytest.mark.parametrize(
    ("visible", "free"),
    [(None, [100, 101, 102]), ("2,0", [102, 100]), ("GPU-1111", [101]), ("", []), ("1,9,0", [101]), ("GPU-", [])],
)
def test_gpus_are_those_that_cuda_would_show(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, free: list[int]
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _Nvml("pynvml"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus, why = probes.gpus()
    assert [gpu["free"] for gpu in gpus] == free and why is None


def test_health_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _Nvml("pynvml"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus, _ = probes.gpus()
    assert [gpu["uncorrected"] for gpu in gpus] == [0, 7, 0]
    assert [gpu["slowed"] for gpu in gpus] == [[], [], ["hardware slowdown", "too hot"]]
    assert {gpu["name"] for gpu in gpus} == {"NVIDIA H200"}
    broken = _Nvml("pynvml")
    monkeypatch.setattr(
        broken, "nvmlInit", lambda: (_ for _ in ()).throw(_Nvml.NVMLError("Driver/library version mismatch"))
    )
    monkeypatch.setitem(sys.modules, "pynvml", broken)
    assert probes.gpus() == ([], "the driver does not answer: Driver/library version mismatch")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1a,MIG-2b")
    monkeypatch.setitem(sys.modules, "pynvml", _Nvml("pynvml"))
    assert probes.gpus() == ([{}, {}], "parts of GPUs (MIG) are not looked into")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-77,GPU-88,GPU-99")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert probes.gpus() == ([{}, {}, {}], "nvidia-ml-py is not installed")


# --- data ---------------------------------------------------------------------------------------------------------------


def test_data_are_counted_and_known_by_their_fingerprint(shapes: Path) -> None:
    found = found_by(probes.data(small_config(shapes), 0))
    train, validation = sorted(found["sets"], key=lambda each: each["name"])
    index = load_index(shapes / "train")
    assert (train["kind"], train["samples"], train["shards"]) == ("shards", 300, len(index.shards))
    assert train["fingerprint"] == index.fingerprint() and train["checked"] == len(index.shards)
    assert validation["samples"] == 40 and found["files"] == {}


def _shards(folder: Path, count: int) -> Path:
    from longskip.engine.data.shapes import write_shapes

    write_shapes(folder, 4 * count, seed=0, per_shard=4)
    return folder


def test_damage_is_named_with_its_cure(tmp_path: Path) -> None:
    folder = _shards(tmp_path / "data", 3)
    config = small_config(tmp_path, data={"path": str(folder), "validation": None})
    tar = sorted(folder.glob("*.tar"))[1]
    content = tar.read_bytes()

    def error() -> str:
        (told,) = found_by(probes.data(config, 0))["sets"]
        assert told["cure"] if "error" in told else True
        return told.get("error", "")

    assert error() == ""
    tar.write_bytes(content[:-1024])
    assert f"{tar} is truncated: expected {len(content)} bytes, found {len(content) - 1024}" in error()
    tar.unlink()
    assert str(tar) in error() and "cannot be found" in error()
    tar.write_bytes(content)
    table = folder / f"{tar.stem}.idx.npy"
    table.rename(tmp_path / "away")
    assert str(table) in error()
    (tmp_path / "away").rename(table)
    (folder / "index.json").write_text("{")
    assert "not valid JSON" in error()
    shutil.rmtree(folder)
    assert "does not exist" in error()


def test_nodes_look_into_other_shards_first_and_stop_in_time(tmp_path: Path) -> None:
    folder = _shards(tmp_path / "data", 12)
    seen: dict[int, list[str]] = {}
    original = probes.check_shard
    for node in range(4):
        seen[node] = []

        def look(where: Path, entry: Any, node: int = node) -> None:
            seen[node].append(entry.file)
            original(where, entry)

        probes.check_shard = look  # type: ignore[assignment]
        try:
            told = probes.shards(folder, node, time.monotonic() - 1)  # no time left: one all the same
            assert told["checked"] == 1 and told["shards"] == 12
            assert probes.shards(folder, node, time.monotonic() + 60)["checked"] == 12
        finally:
            probes.check_shard = original
    assert all(len(set(files[1:])) == 12 for files in seen.values())
    assert len({files[0] for files in seen.values()}) > 1


def test_folder_of_pictures_and_files_that_are_not_there(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("a", "b"):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a picture")
    config = small_config(
        tmp_path,
        data={"path": str(tmp_path), "validation": None},
        train={"init_from": str(tmp_path / "other.safetensors")},
    )
    found = found_by(probes.data(config, 0))
    assert [(each["kind"], each["samples"]) for each in found["sets"]] == [("folder", 2)]
    assert found["files"] == {"train.init_from": str(tmp_path / "other.safetensors")}
    (tmp_path / "other.safetensors").write_text("x")
    assert found_by(probes.data(config, 0))["files"] == {}


def test_data_at_a_url_are_counted_and_a_dead_server_is_told_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fsspec")
    from tests.engine.remote_server import SAMPLES, Server, write_folder

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server(write_folder(tmp_path / "shards"))
    groups: dict[str, Any] = {
        "data": {
            "path": server.url, "validation": None, "shuffle": "window", "remote": "fsspec", "cache": str(tmp_path / "cache")
        }
    }  # fmt: skip
    try:
        (told,) = found_by(probes.data(small_config(tmp_path, **groups), 0))["sets"]
        index = load_index(tmp_path / "shards")
        assert (told["kind"], told["samples"], told["shards"]) == ("url", SAMPLES, len(index.shards))
        assert told["fingerprint"] == index.fingerprint()
    finally:
        server.close()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes connections and says nothing
        groups["data"]["path"] = f"http://127.0.0.1:{silent.getsockname()[1]}/data"
        began = time.monotonic()
        (told,) = found_by(probes.data(small_config(tmp_path, **groups), 0))["sets"]
    assert told["kind"] == "url" and "index.json" in told["error"]
    assert time.monotonic() - began < 30


# --- the run folder -----------------------------------------------------------------------------------------------------


def _two_nodes(run: Path, other: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The probes of two nodes that see ``run`` and ``other`` as the run folder."""
    store = MemoryStore()
    first, second = (
        common_folder.CommonFolder(Board(store, "p"), path, node) for node, path in enumerate((run, other))
    )
    found: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    first.probe(found[0])
    second.probe(found[1])
    first.release()
    second.release()
    return found


def test_common_folder_is_seen_written_and_locked(tmp_path: Path) -> None:
    first, second = _two_nodes(tmp_path / "runs" / "a", tmp_path / "runs" / "a")
    for found in (first, second):
        assert found["seen"] and found["writable"] and found["locked"] and "error" not in found
        assert abs(found["free"] - shutil.disk_usage(tmp_path).free) < 1 << 30
    assert not (tmp_path / "runs").exists()


def test_folders_that_only_have_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common_folder, "_APPEARS", 0.2)
    (tmp_path / "b").mkdir()
    first, second = _two_nodes(tmp_path / "a", tmp_path / "b")
    assert first["seen"] is True and second["seen"] is False and "FileNotFoundError" in second["error"]


def test_locks_that_nobody_respects_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that says yes to every lock (NFS mounted with local_lock)."""
    monkeypatch.setattr(common_folder.fcntl, "flock", lambda *_: None)
    first, second = _two_nodes(tmp_path, tmp_path)
    assert first["locked"] is True and second["locked"] is False


def test_owner_of_a_lock(tmp_path: Path) -> None:
    import fcntl

    assert common_folder.owner_of(tmp_path / "run.lock") is None
    with open(tmp_path / "run.lock", "w+") as file:
        file.write("process 7 on n3\n")
        file.flush()
        assert common_folder.owner_of(tmp_path / "run.lock") is None
        fcntl.flock(file, fcntl.LOCK_EX)
        assert common_folder.owner_of(tmp_path / "run.lock") == "process 7 on n3"


# --- the network ----------------------------------------------------------------------------------------------------------


def test_clock_is_known_to_half_a_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    listener = reach.Listener("127.0.0.1")
    try:
        token, offset, uncertainty = reach.ask("127.0.0.1", listener.port)
        assert token == listener.token and abs(offset) <= uncertainty + 1e-3 and uncertainty < 1
        # this node's clock 100 s ahead of the one that answers: the asking thread alone is told so
        asking, real = threading.get_ident(), time.time
        monkeypatch.setattr(reach.time, "time", lambda: real() + (100 if threading.get_ident() == asking else 0))
        _, offset, uncertainty = reach.ask("127.0.0.1", listener.port)
        assert abs(offset - 100) <= uncertainty + 1e-3
    finally:
        listener.close()
    with pytest.raises(OSError):
        reach.ask("127.0.0.1", listener.port)


def test_address_that_somebody_else_answers_is_noticed() -> None:
    store = MemoryStore()
    board, found = Board(store, "p"), {}
    other = reach.Listener("127.0.0.1")
    try:
        board.put("hello/0", {"address": "127.0.0.1", "port": other.port, "token": "00" * 16})
        board.put("met/0", True)
        reach.reach(board, 1, [0, 1], None)(found)
    finally:
        other.close()
    assert "answered by somebody else" in found["unreached"]["0"] and found["reached"] == 0
    assert "offset" not in found  # of whose clock would it be?


def test_peer_that_accepts_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "_CONNECT", 0.3)
    board, found = Board(MemoryStore(), "p"), {}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        board.put("hello/0", {"address": "127.0.0.1", "port": silent.getsockname()[1], "token": "00" * 16})
        board.put("met/0", True)
        reach.reach(board, 1, [0, 1], None)(found)
    assert "timed out" in found["unreached"]["0"]


def test_every_node_of_many_is_tried_by_some_and_none_tries_all() -> None:
    for nodes in (2, 32, 33, 100, 1000):
        tried = [reach._peers(node, range(nodes)) for node in range(nodes)]
        assert all(node not in peers and len(set(peers)) == len(peers) for node, peers in enumerate(tried))
        assert set().union(*tried) == set(range(nodes))
        assert all(0 in peers for peers in tried[1:])
        assert max(map(len, tried)) <= max(31, 2 * nodes.bit_length() + 1)


def test_interfaces_of_this_machine() -> None:
    assert reach.interface_of("127.0.0.1")["interface"] == "lo"
    assert reach.interface_of("192.0.2.77") == {"interface": None, "mtu": 0}  # of no machine (RFC 5737)


def test_address_of_no_interface_here_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "_WAIT", 0.1)
    board, found = Board(MemoryStore(), "p"), {}
    reach.reach(board, 0, [0, 1], "192.0.2.77")(found)
    assert "192.0.2.77" in found["error"] and "assign" in found["error"]
    assert "error" in board.take("hello/0", 0.1)


def test_all_reduce_of_three_real_processes() -> None:
    """Through the probe itself, three nodes as threads; a second measurement of the same bytes is the oracle's bound."""
    store = MemoryStore()
    found: list[dict[str, Any]] = [{}, {}, {}]
    errors: list[BaseException] = []

    def node(i: int) -> None:
        try:
            reduction.interconnect(Board(store, "p"), i, range(3), "127.0.0.1")(found[i])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=node, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    for each in found:
        assert each["backend"] == ("nccl" if each["cuda"] else "gloo") and each["right"] is True
        assert 0 < each["latency"] < 5 and each["bytes"] >= 1 << 18 and each["inward"] > 0
        # An all-reduce has to move 2(n−1)/n of its bytes through memory at least; no machine's loopback gives 1 TB/s.
        assert 1e5 < each["busbw"] < 1e12
    assert len({each["busbw"] for each in found}) == 1  # all ranks tell the slowest's time


def test_process_that_cannot_measure_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(MemoryStore(), "p")
    board.put("reduction", {"address": "127.0.0.1", "port": 1})  # where nobody listens
    monkeypatch.setattr(reduction, "SECONDS", 3.0)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="no all-reduce between the nodes"):
        reduction.interconnect(board, 1, [0, 1], None)({})
    assert time.monotonic() - began < 30


def test_process_dies_with_its_node() -> None:
    """A node that is killed leaves no process behind, not even one that waits for the others."""
    order = json.dumps({"rank": 0, "world": 2, "cuda": False, "address": "127.0.0.1"})
    code = (
        "import subprocess, sys, time\n"
        "process = subprocess.Popen([sys.executable, '-m', 'longskip.launcher.reduction'], stdin=subprocess.PIPE, text=True)\n"
        f"process.stdin.write({order!r} + chr(10))\nprocess.stdin.flush()\n"
        "print(process.pid, flush=True)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    assert json.loads(parent.stdout.readline())["port"]  # now it waits for the second, for SECONDS
    parent.kill()
    parent.wait()
    parent.stdout.close()
    gone, alive = psutil.wait_procs([child], timeout=reduction.SECONDS / 2)
    assert gone and not alive


# --- what the run needs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [{}, {"encoders": {"text": {"depth": 2}}}, {"model": {"depth": 6, "adaln": True}}])
def test_checkpoint_is_as_large_as_one_that_was_saved(tmp_path: Path, groups: dict[str, Any]) -> None:
    from longskip.engine.configio import load_config

    run = saved_run(tmp_path / "a", **groups)
    config = load_config(run / "config.yaml", ())
    parameters = needs.parameters_of(config, run)
    folder = next((run / "checkpoints").glob("step-*"))
    saved = sum(path.stat().st_size for path in folder.iterdir())
    tensors = json.loads((folder / "manifest.json").read_text())["tensors"]
    assert parameters == sum(int(torch.tensor(shape).prod()) for shape in tensors.values())
    predicted = needs.checkpoint_bytes(config, parameters, 1)
    assert saved <= predicted <= saved + (64 << 10)


def test_new_run_counts_the_most_words_there_may_be(shapes: Path, tmp_path: Path) -> None:
    config = small_config(shapes)
    most = needs.parameters_of(config, tmp_path / "none")
    assert most == config.backbone().param_counts().total + 4096 * 64
    assert needs.needs_of(config, tmp_path / "none", [0], 2).checkpoint > 16 * most


@pytest.mark.parametrize(
    "groups",
    [
        {"data": {"workers": 2}},
        {"data": {"workers": 3}, "train": {"accumulation": 2}},
        {"data": {"workers": 1, "buckets": [[32, 32], [64, 32]]}},
    ],
)
def test_shared_memory_is_what_the_reader_asks_for(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: dict[str, Any]
) -> None:
    """Against the real reader: the bytes that it asks room for when it starts its workers."""
    from longskip.engine.data import workers
    from longskip.engine.data.plan import Plan
    from longskip.engine.data.reader import Reader
    from longskip.engine.data.sources import ShardSource
    from longskip.engine.data.tokens import Vocabulary
    from longskip.engine.inputs import Inputs

    config = small_config(shapes, **groups)
    batch = config.batch(2)
    asked: list[int] = []

    class Asked(Exception):
        pass

    def room(n_bytes: int) -> None:
        asked.append(n_bytes)
        raise Asked

    monkeypatch.setattr(workers, "_room_for", room)
    source = ShardSource(shapes / "train")
    settings = Inputs(config, Vocabulary.build(["a red circle"], 300), torch.device("cpu"), source).settings()

    class Bucketed(Plan):
        buckets = config.buckets  # type: ignore[assignment]

    reader = Reader(
        source,
        Bucketed(len(source), batch.total),
        world=2,
        micro=batch.micro,
        accumulation=batch.accumulation,
        workers=config.data.workers,
        **settings,
    )
    with pytest.raises(Asked):
        next(reader)
    assert needs.reader_bytes(config, batch) == asked[0]
    assert needs.needs_of(config, tmp_path, [0], 2).shared == 2 * asked[0]
    assert needs.reader_bytes(small_config(shapes), batch) == 0


def test_hash_of_a_deepspeed_json(shapes: Path, tmp_path: Path) -> None:
    own = tmp_path / "ds.json"
    own.write_text('{"wall_clock_breakdown": false}')
    found = found_by(probes.software(small_config(shapes, deepspeed={"config": str(own)})))
    assert found["deepspeed"] == hashlib.sha256(own.read_bytes()).hexdigest()
