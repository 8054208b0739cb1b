"""Named tests run by pytest in a process of its own, and what became of each."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

Status = Literal["passed", "failed", "error", "skipped"]


@dataclass(frozen=True)
class Outcome:
    """What became of one test: ``failed`` by its own assertions, ``error`` where it could not be set up or collected."""

    test: str
    status: Status
    seconds: float
    message: str = ""
    output: str = ""


@dataclass(frozen=True)
class Session:
    """One run of pytest: an outcome for each test that ran, and what it printed."""

    outcomes: tuple[Outcome, ...]
    output: str
    timed_out: bool = False

    def of(self, node: str) -> list[Outcome]:
        """The outcomes of a test, of all its parameters where ``node`` names none."""
        return [
            o for o in self.outcomes if o.test == node or (not node.endswith("]") and o.test.startswith(f"{node}["))
        ]


def environment(tree: Path) -> dict[str, str]:
    """That of tests of ``tree``: its modules come first, one thread a process, no GPU's accelerator on a CPU."""
    variables = dict(os.environ, PYTHONPATH=str(tree))
    for name, value in (("OMP_NUM_THREADS", "1"), ("OMP_WAIT_POLICY", "PASSIVE"), ("DS_ACCELERATOR", "cpu")):
        variables.setdefault(name, value)
    return variables


def run_tests(
    tests: Iterable[str],
    tree: Path,
    *,
    jobs: int = 1,
    seconds: float = 1200,
    stop_at_first: bool = False,
    show: bool = False,
) -> Session:
    """Run the named tests of ``tree``, with what they leave ended and removed; ``show`` passes pytest's progress on."""
    with tempfile.TemporaryDirectory(prefix="longskip-faults-") as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}",
            "-o", "junit_logging=all", f"--basetemp={folder}/tests",
            *(["-n", str(jobs), "--dist", "loadfile"] if jobs > 1 else []),
            *(["-x"] if stop_at_first else []), *tests,
        ]  # fmt: skip
        log = Path(folder) / "log"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command,
                cwd=tree,
                env=environment(tree),
                stdout=None if show else output,
                stderr=subprocess.STDOUT if not show else None,
                start_new_session=True,
            )
            timed_out = False
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:
                end_tree(process)
        outcomes = _outcomes(report) if report.is_file() else ()
        return Session(outcomes, log.read_text("utf-8", errors="replace"), timed_out)


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to ``process`` and everything below it that still runs."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.Error:
        family = []
    for member in family:
        try:
            member.kill()
        except psutil.Error:
            continue
    process.wait()


def _outcomes(report: Path) -> tuple[Outcome, ...]:
    """The test cases of a JUnit file under the names that pytest takes."""
    found = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        status: Status = "passed"
        message = ""
        for kind, named in (("skipped", "skipped"), ("failure", "failed"), ("error", "error")):
            element = case.find(kind)
            if element is not None:
                status, message = named, f"{element.get('message', '')}\n{element.text or ''}"  # type: ignore[assignment]
        module, name = case.get("classname", ""), case.get("name", "")
        test = f"{module.replace('.', '/')}.py::{name}" if module else name
        output = "\n".join(
            element.text or "" for kind in ("system-out", "system-err") for element in case.findall(kind)
        )
        found.append(Outcome(test, status, float(case.get("time", 0)), message, output))
    return tuple(found)


def summary(outcomes: Sequence[Outcome]) -> Status:
    """One word for several: the worst; ``skipped`` only where nothing else ran."""
    words = {outcome.status for outcome in outcomes}
    for status in ("error", "failed", "passed", "skipped"):
        if status in words:
            return status  # type: ignore[return-value]
    return "error"
