"""What a node can find out about itself before the first step (no torch); ``facts.py`` lists what each probe tells.

A probe is a function that fills a mapping as it goes. It runs in a thread of its own under a limit, for what it touches may
hang: a dead file server, a driver that does not answer. One that is not back by then is left behind, and said to hang.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import longskip
from longskip.engine.config import Config, leaves
from longskip.engine.data.index import INDEX_NAME, check_shard, load_index
from longskip.engine.data.plan import permute
from longskip.engine.data.remote import RemoteSource, open_remote
from longskip.engine.data.sources import open_source
from longskip.engine.data.transport import Patience, is_url, shown
from longskip.engine.runs import RUNS
from longskip.errors import LongskipError, ShardError

PACKAGES = ("longskip", "torch", "deepspeed", "triton", "numpy", "safetensors", "webdataset")
"""What must be the same everywhere: it computes, or it writes what another node reads."""
SHARED_MEMORY = Path("/dev/shm")
_NVIDIA = Path("/dev/nvidiactl")
_CGROUPS = Path("/sys/fs/cgroup")
_DATA_SECONDS = 4.0  # in which as many shards are looked at as may be

Found = dict[str, Any]
Probe = Callable[[Found], None]


@dataclass(frozen=True)
class Timed:
    """A probe and the seconds that it may take."""

    name: str
    act: Probe
    limit: float


def run_probes(probes: list[Timed]) -> tuple[dict[str, Found], dict[str, str], dict[str, float]]:
    """(found, failed, seconds) by probe, all run at once; returns when the last one is done or has used up its limit.

    What a probe had found before it failed is kept.
    """
    found: dict[str, Found] = {probe.name: {} for probe in probes}
    failed: dict[str, str] = {}
    seconds: dict[str, float] = {}

    def run(probe: Timed) -> None:
        began = time.monotonic()
        try:
            probe.act(found[probe.name])
        except LongskipError as error:
            failed[probe.name] = error.message + (f" (cure: {error.cure})" if error.cure else "")
        except Exception as error:  # whatever it was, the other nodes must hear of it
            failed[probe.name] = f"{type(error).__name__}: {error}"
        seconds[probe.name] = round(time.monotonic() - began, 3)

    began = time.monotonic()
    threads = [
        threading.Thread(target=run, args=(probe,), name=f"preflight-{probe.name}", daemon=True) for probe in probes
    ]
    for thread in threads:
        thread.start()
    for thread, probe in zip(threads, probes, strict=True):
        thread.join(max(0.0, began + probe.limit - time.monotonic()))
        if thread.is_alive():
            failed[probe.name] = f"hangs: no answer within {probe.limit:g} s"
            seconds[probe.name] = probe.limit
    return json.loads(json.dumps({name: dict(each) for name, each in found.items()})), dict(failed), dict(seconds)


# --- software ---------------------------------------------------------------------------------------------------------


def software(config: Config) -> Probe:
    """Python, packages, longskip's own files, and the configuration, of which no value leaves this node."""

    def probe(found: Found) -> None:
        found["python"] = ".".join(map(str, sys.version_info[:3]))
        found["packages"] = {name: version_of(name) for name in PACKAGES} | {
            name: version_of(name) for name in required_names()
        }
        found["config"] = {key: _short(value) for key, value in leaves(config.model_dump(mode="json"))}
        own = config.deepspeed.config
        found["deepspeed"] = hashlib.sha256(Path(own).read_bytes()).hexdigest() if own else None
        found["code"] = code_hash(Path(longskip.__file__).parent)

    return probe


def version_of(package: str) -> str | None:
    if package == "longskip":
        return longskip.__version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def required_names() -> list[str]:
    """The packages that longskip's metadata require on any platform; none where it was not installed."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("longskip") or []
    except metadata.PackageNotFoundError:
        return []
    return sorted({Requirement(line).name for line in lines if "extra ==" not in line})


def code_hash(folder: Path) -> str:
    """SHA-256 over names and contents of a package's files, compiled ones left out."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".pyc", ".so"):
            content = hashlib.sha256(path.read_bytes()).digest()
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + content)
    return digest.hexdigest()


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


# --- devices, memory, limits ------------------------------------------------------------------------------------------


def devices(found: Found) -> None:
    """GPUs and their health, cores, memory, limits of this process."""
    found["kind"] = "cuda" if uses_gpus() else "cpu"
    found["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found["threads"] = os.environ.get("OMP_NUM_THREADS")
    found["open_files"], found["open_files_most"] = resource.getrlimit(resource.RLIMIT_NOFILE)
    found["available"], found["total"] = host_memory()
    try:
        state = os.statvfs(SHARED_MEMORY)
        found["shared"] = state.f_bavail * state.f_frsize
    except OSError:
        found["shared"] = None
    if found["kind"] == "cuda":
        found["gpus"], found["health"] = gpus()


def uses_gpus() -> bool:
    """Whether ranks started here would take GPUs, as far as that can be told without torch."""
    return _NVIDIA.exists() and os.environ.get("DS_ACCELERATOR") != "cpu"


def host_memory() -> tuple[int, int]:
    """(bytes that are available, bytes in all) of this machine, or of the control group that this process is confined to."""
    memory = psutil.virtual_memory()
    available, total = int(memory.available), int(memory.total)
    for group in _own_groups():
        try:
            limit = (group / "memory.max").read_text("ascii").strip()
            used = int((group / "memory.current").read_text("ascii"))
            stat = dict(line.split() for line in (group / "memory.stat").read_text("ascii").splitlines())
        except (OSError, ValueError):
            continue
        if limit != "max":
            total = min(total, int(limit))
            # Pages of files that nobody uses just now are given back before anybody is killed.
            available = min(available, max(0, int(limit) - used + int(stat.get("inactive_file", 0))))
    return available, total


def _own_groups() -> list[Path]:
    """This process's control group (version 2) and those above it."""
    try:
        lines = Path("/proc/self/cgroup").read_text("ascii").splitlines()
    except OSError:
        return []
    for line in lines:
        if line.startswith("0::/"):
            own = _CGROUPS / line[4:]
            return [own, *(parent for parent in own.parents if parent.is_relative_to(_CGROUPS))]
    return []


def gpus() -> tuple[list[dict[str, Any]], str | None]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, with free memory and health; and why that is not known, where it is not."""
    try:
        import pynvml
    except ImportError:
        asked = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = list(Path("/dev").glob("nvidia[0-9]*")) if asked is None else list(filter(None, asked.split(",")))
        return [{} for _ in seen], "nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [], f"the driver does not answer: {error}"
    if "MIG-" in (asked := os.environ.get("CUDA_VISIBLE_DEVICES", "")):
        return [{} for _ in filter(None, asked.split(","))], "parts of GPUs (MIG) are not looked into"
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    names = [_text(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    return [_gpu(pynvml, handles[i]) for i in _visible(names)], None


def _visible(names: list[str]) -> list[int]:
    """The places of the devices that CUDA_VISIBLE_DEVICES names by number or (the beginning of) UUID; CUDA ends its list at
    the first name that is none."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked is None:
        return list(range(len(names)))
    out = []
    for name in (part.strip() for part in asked.split(",")):
        places = (
            [int(name)] if name.isdigit() else [i for i, uuid in enumerate(names) if name and uuid.startswith(name)]
        )
        if len(places) != 1 or places[0] >= len(names):
            break
        out += places
    return out


def _gpu(nvml: Any, handle: Any) -> dict[str, Any]:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    gpu: dict[str, Any] = {
        "name": _text(nvml.nvmlDeviceGetName(handle)),
        "free": int(memory.free),
        "total": int(memory.total),
        "uncorrected": 0,
        "slowed": [],
    }
    with suppress(nvml.NVMLError):  # a device without ECC
        kinds = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        gpu["uncorrected"] = int(nvml.nvmlDeviceGetTotalEccErrors(handle, *kinds))
    try:
        reasons = int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
    except nvml.NVMLError:
        return gpu
    known = {
        "hardware slowdown": "nvmlClocksThrottleReasonHwSlowdown",
        "too hot": "nvmlClocksThrottleReasonHwThermalSlowdown",
        "power brake": "nvmlClocksThrottleReasonHwPowerBrakeSlowdown",
    }
    gpu["slowed"] = [name for name, mask in known.items() if reasons & getattr(nvml, mask, 0)]
    return gpu


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


# --- data -------------------------------------------------------------------------------------------------------------


def data(config: Config, node: int) -> Probe:
    """Every data set of the run as this node sees it, and the files and folders that the configuration names."""

    def probe(found: Found) -> None:
        named = {"data.path": config.data.path, "data.validation": config.data.validation}
        named |= {f"data.mix[{i}]": each.path for i, each in enumerate(config.data.mix)}
        found["files"] = {name: places[0] for name, places in _paths(config).items() if not _any_there(places)}
        found["sets"] = []
        until = time.monotonic() + _DATA_SECONDS
        for name, path in named.items():
            if path:
                kind = _kind(path)
                found["sets"].append({"name": name, "path": shown(path) if kind == "url" else path, "kind": kind})
                found["sets"][-1].update(_data_set(config, path, kind, node, until))

    return probe


def _paths(config: Config) -> dict[str, list[str]]:
    """Where the files and folders may lie that a rank opens beside the data."""
    start = config.train.init_from
    named = {
        "encoders.vae.path": [config.encoders.vae.path],
        "encoders.text.path": [config.encoders.text.path],
        "deepspeed.config": [config.deepspeed.config],
        "train.init_from": [start, start and str(RUNS / start)],
    }
    return {name: [path for path in paths if path] for name, paths in named.items() if paths[0]}


def _any_there(paths: list[str]) -> bool:
    return any(Path(path).expanduser().exists() for path in paths)


def _kind(path: str) -> str:
    if is_url(path):
        return "url"
    return "shards" if Path(path).name == INDEX_NAME or (Path(path) / INDEX_NAME).is_file() else "folder"


def _data_set(config: Config, path: str, kind: str, node: int, until: float) -> dict[str, Any]:
    try:
        if kind == "url":
            index = _remote(config, path).index
            return _told(len(index.shards), index.total, index.fingerprint())
        if kind == "shards":
            return shards(Path(path).parent if Path(path).name == INDEX_NAME else Path(path), node, until)
        pictures = open_source(path, fields=config.data.captions)
        return _told(0, len(pictures), pictures.fingerprint())
    except LongskipError as error:
        return {"error": error.message, "cure": error.cure or ""}
    except OSError as error:
        return {"error": f"{path} cannot be read: {error}", "cure": "mount it, or give the job the right to read it"}


def _remote(config: Config, url: str) -> RemoteSource:
    """The source as a run opens it, but given up soon."""
    data = config.data
    return open_remote(
        url,
        transport=data.remote,
        cache=data.cache,
        cache_gib=data.cache_gib,
        window_shards=data.window_shards,
        seed=config.train.seed,
        patience=Patience(attempts=2, silence=3.0, total=_DATA_SECONDS),
    )


def shards(folder: Path, node: int, until: float) -> dict[str, Any]:
    """An indexed folder: all shards and tables listed, and as many opened as there is time for, other ones on other nodes."""
    index = load_index(folder, check=False)
    told = _told(len(index.shards), index.total, index.fingerprint()) | {"checked": 0}
    there: dict[Path, set[str]] = {}
    missing = []
    for entry in index.shards:
        for path in (folder / entry.file, folder / entry.table):
            if path.parent not in there:
                there[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
            if path.name not in there[path.parent]:
                missing.append(str(path))
    if missing:
        more = f" and {len(missing) - 1} more files" if missing[1:] else ""
        raise ShardError(f"{missing[0]}{more}, which {folder / INDEX_NAME} lists, cannot be found",
                         cure=f"bring it back, or index what is there: longskip data index {folder}")  # fmt: skip
    n = len(index.shards)
    for place in permute(np.arange(n), n, node, 0).tolist():
        check_shard(folder, index.shards[place])
        told["checked"] += 1
        if time.monotonic() > until:
            break
    return told


def _told(n_shards: int, samples: int, fingerprint: str) -> dict[str, Any]:
    return {"shards": n_shards, "samples": samples, "fingerprint": fingerprint}
