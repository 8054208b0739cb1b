"""Supervisors in processes of their own, with ranks that train or with fake ones, for tests that hurt them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from longskip.launcher.processes import rank_environment
from tests.launcher.fake_rank import SETTINGS

ROOT = Path(__file__).resolve().parent.parent.parent


class Launched:
    """A supervisor under way; a context manager that leaves no process behind."""

    def __init__(self, command: Sequence[str], run: Path, environment: dict[str, str] | None = None) -> None:
        self.run = run
        self.said = run.parent / f"{run.name}-{len(list(run.parent.glob(f'{run.name}-*.out')))}.out"
        run.parent.mkdir(parents=True, exist_ok=True)
        variables = rank_environment(2) | {"PYTHONPATH": str(ROOT)} | (environment or {})
        with open(self.said, "wb") as out:
            self.process = subprocess.Popen(command, env=variables, stdout=out, stderr=subprocess.STDOUT)
        self._seen: dict[int, psutil.Process] = {}

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        left = [*self.everything(), *self._seen.values()]
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for process in left:
            if process.is_running():
                process.kill()
        psutil.wait_procs(left, timeout=10)

    def everything(self) -> list[psutil.Process]:
        """All processes below the supervisor."""
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.Error:
            found = []
        self._seen.update({process.pid: process for process in found})
        return found

    def rank(self, number: int, seconds: float = 60) -> psutil.Process:
        """The process of a rank."""

        def find() -> psutil.Process | None:
            for process in psutil.Process(self.process.pid).children():
                try:
                    if process.environ().get("RANK") == str(number):
                        return process
                except psutil.Error:
                    continue
            return None

        found = self.until(find, seconds)
        self._seen[found.pid] = found
        return found

    def until(self, condition: Callable[[], Any], seconds: float = 120) -> Any:
        """The condition's value once it is true; fails where the supervisor ends before, or it takes too long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if value := condition():
                return value
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.text()}"
            time.sleep(0.02)
        raise AssertionError(f"not within {seconds} s:\n{self.text()}")

    def wait(self, seconds: float = 120) -> int:
        """The exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end within {seconds} s:\n{self.text()}") from None

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def text(self) -> str:
        return self.said.read_text(errors="replace")

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.run / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def incidents(self) -> list[str]:
        return [line["kind"] for line in self.lines("incidents.jsonl")]

    def steps(self) -> list[int]:
        """The steps that the run has logged, in the order of their execution, redone ones again."""
        return [line["step"] for line in self.lines("metrics.jsonl") if "loss/global_avg" in line]


def gone(processes: Sequence[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def fake(run: Path, nodes: int = 1, node: int = 0, ranks: int = 2, store: str = "127.0.0.1:0", *, elastic: bool = False,
         preflight: bool = False, config: str = "", overrides: Sequence[str] = (), environment: dict[str, str] | None = None,
         **settings: Any) -> Launched:  # fmt: skip
    """A supervisor with fake ranks; ``run`` is ``FOLDER/runs/NAME``, and FOLDER the current one."""
    path = Path(f"{run.name}.yaml")
    if not path.exists():
        path.write_text(config or "launch: {step_timeout: 2, node_timeout: 5}\n")
    way = ("elastic" if elastic else "fixed") + (",preflight" if preflight else "")
    words = [str(nodes), str(node), str(ranks), store, way, str(path), *overrides]
    command = [sys.executable, "-m", "tests.launcher.fake_rank", *words]
    return Launched(command, run, {SETTINGS: json.dumps(settings)} | (environment or {}))


def launch(run: Path, *overrides: str, ranks: int = 2) -> Launched:
    """``longskip launch --local`` of ``run.yaml`` in the current folder."""
    command = [sys.executable, "-m", "longskip.launcher", "launch", "--local", str(ranks), "--", "train", "run.yaml"]
    return Launched([*command, f"train.name={run.name}", *overrides], run)


def step_of_fake(run: Path, rank: int = 0) -> int:
    """The newest step that a fake rank began."""
    path = run / f"steps-{rank}"
    lines = path.read_text().splitlines() if path.exists() else []
    return int(lines[-1].split()[1]) if lines else 0


def free_place() -> str:
    from longskip.engine.ports import free_port

    return f"127.0.0.1:{free_port()}"
