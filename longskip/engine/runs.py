"""The run folder: where it is, whose it is, what it was made with. No pickle ever stands in it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from longskip import __version__
from longskip.engine.config import Config
from longskip.engine.configio import dump_yaml, validate
from longskip.engine.identity import differing_keys
from longskip.engine.jsonfiles import read_object
from longskip.errors import ConfigError, RunFolderError, RunLockedError, RunMismatchError
from longskip.profiling.yamlfiles import parse_yaml

RUNS = Path("runs")


def find_run(run: str | Path) -> Path:
    """A run's folder from a path or a name under ``runs/``; raises ConfigError naming what is there."""
    for candidate in (Path(run), RUNS / run):
        if (candidate / "config.yaml").is_file():
            return candidate
    there = sorted(p.parent.name for p in RUNS.glob("*/config.yaml"))
    raise ConfigError(
        f"no run at {run} nor at {RUNS / run}",
        cure=f"one of {', '.join(there)}" if there else "longskip train CONFIG makes one",
    )


def write_atomic(path: Path, text: str) -> None:
    """Write ``text`` so that a crash leaves the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def append_json(path: Path, value: dict[str, Any]) -> None:
    """Append one JSON line in one write, so that lines of several processes never mix."""
    line = (json.dumps(value, ensure_ascii=False) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


@contextmanager
def tolerant(what: str) -> Iterator[None]:
    """Records for people must not end a training: a failure to write one is said on standard error, once each."""
    try:
        yield
    except OSError as error:
        if what not in _complained:
            _complained.add(what)
            print(f"longskip: {what} cannot be written: {error}", file=sys.stderr, flush=True)


_complained: set[str] = set()


class RunFolder:
    """One run on disk. Rank 0 writes; every rank may read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Any = None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def lock(self) -> None:
        """Own this folder until the process ends; raises RunLockedError naming the owner.

        The kernel releases the lock when its holder dies, so that a crash never leaves a stale one.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        file = open(self.path / "run.lock", "a+", encoding="utf-8")  # noqa: SIM115 - held until exit
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "an unknown process"
            file.close()
            raise RunLockedError(
                f"{self.path} is in use by {owner}", cure="wait for it, stop it, or choose another train.name"
            ) from None
        except OSError as error:
            file.close()
            raise ConfigError(
                f"{self.path} cannot be locked: {error}", cure="put runs on a file system with locks (flock)"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        self._lock = file

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def sweep_failed_start(self) -> None:
        """Remove what a start that never became a run left behind; a folder with a configuration is left alone."""
        if (self.path / "config.yaml").exists():
            return
        for name in ("run.lock", "vocabulary.json", "buckets.npy", "buckets.json"):
            (self.path / name).unlink(missing_ok=True)
        with suppress(OSError):  # something else stands in it
            self.path.rmdir()

    def check(self, config: Config) -> bool:
        """True when this folder holds a run of ``config`` already, False when it is new.

        Raises RunMismatchError with the differing keys when it holds another run.
        """
        path = self.path / "config.yaml"
        if not path.is_file():
            return False
        saved = validate(parse_yaml(path.read_text("utf-8"), str(path)))
        differing = differing_keys(saved, config)
        if differing:
            listed = "; ".join(f"{key}: {old!r} saved, {new!r} now" for key, (old, new) in differing.items())
            raise RunMismatchError(
                f"{self.path} holds a run of another configuration ({listed})",
                cure="set them back, or give the new run its own train.name=…",
            )
        return True

    def summary(self) -> dict[str, Any]:
        """What ``run.json`` says; nothing where there is none. Raises RunFolderError where it cannot be read."""
        path = self / "run.json"
        return read_object(path, RunFolderError, cure="bring it back from a copy") if path.is_file() else {}

    def check_data(self, name: str, data: dict[str, Any]) -> None:
        """Raise RunMismatchError unless ``data`` (``samples``, ``fingerprint``) is what this run was trained on."""
        saved = self.summary().get("data", {})
        if saved.get("fingerprint") != data["fingerprint"]:
            raise RunMismatchError(
                f"{name} is not the data that {self.path} was trained on: {_changed(saved, data)}",
                cure="bring the data back, or give the new run its own train.name=…",
            )

    def write_identity(self, config: Config, ds_config: dict[str, Any], summary: dict[str, Any]) -> None:
        """``config.yaml``, ``ds_config.json``, ``environment.json`` and ``run.json``, each atomically."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_atomic(self / "ds_config.json", json.dumps(ds_config, indent=2))
        write_atomic(self / "environment.json", json.dumps(environment(), indent=2))
        write_atomic(self / "run.json", json.dumps(summary, indent=2))
        write_atomic(self / "config.yaml", dump_yaml(config))  # last: it makes the folder a run

    def note(self, **facts: Any) -> None:
        """Add to ``run.json``, or replace what it says."""
        write_atomic(self / "run.json", json.dumps(self.summary() | facts, indent=2))


def _changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How data differ, for people: their samples, and where those are as many, their fingerprints."""
    counts = [each.get("samples") for each in (then, now)]
    if counts[0] != counts[1]:
        told = [f"{count:,}" if isinstance(count, int) else "an unknown number of" for count in counts]
        return f"{told[0]} samples then, {told[1]} now"
    prints = [str(each.get("fingerprint"))[:12] for each in (then, now)]
    return f"{counts[1]:,} samples as then, but others or changed ones (fingerprint {prints[0]} then, {prints[1]} now)"


def environment() -> dict[str, Any]:
    """What this run is made of: versions, machine, threads; no environment variable that could hold a secret."""
    versions: dict[str, str | None] = {}
    for package in ("torch", "deepspeed", "triton", "webdataset", "numpy", "safetensors", "pydantic", "fvcore"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "longskip": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "packages": versions,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
