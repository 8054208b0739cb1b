"""Defences taken out, one by one, in a copy of the tree: the tests of the fault must notice."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.faults.running import Outcome, environment, run_tests

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = (
    ".venv",
    ".git",
    ".hypothesis",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    "__pycache__",
    "runs",
    "*.egg-info",
)
SECONDS = 420.0  # for the tests of one defence

# A patch that breaks the program proves nothing: these are what a slip in it looks like, wherever it comes up.
SLIPS = re.compile(
    r"^(?:E\s+)?(SyntaxError|IndentationError|NameError|UnboundLocalError|ImportError|ModuleNotFoundError)\b.*", re.M
)


@dataclass(frozen=True)
class Patch:
    """``old``, which stands once in ``file`` (from the root), becomes ``new``."""

    file: str
    old: str
    new: str

    def applied(self, text: str) -> str:
        """Raises ValueError where ``old`` does not stand in ``text`` exactly once."""
        count = text.count(self.old)
        if count != 1:
            raise ValueError(f"{self.file} holds {count} times, not once:\n{self.old}")
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Defence:
    """One thing that keeps a fault from doing harm; ``patches`` take it out, ``caught_by`` are the tests that see it."""

    what: str
    caught_by: tuple[str, ...]
    patches: tuple[Patch, ...]


@dataclass(frozen=True)
class Fault:
    """One of the thirty: what must hold, the tests that show it, and what makes it hold."""

    number: int
    title: str
    holds: str
    tests: tuple[str, ...]
    defences: tuple[Defence, ...]


@dataclass(frozen=True)
class Proof:
    """What the tests said of the program without the defence; ``wrong`` says why that proves nothing, else None."""

    defence: Defence
    outcomes: tuple[Outcome, ...]
    wrong: str | None

    @property
    def seconds(self) -> float:
        return sum(outcome.seconds for outcome in self.outcomes)

    @property
    def failed(self) -> list[str]:
        return [outcome.test for outcome in self.outcomes if outcome.status == "failed"]


def stale(defence: Defence, tree: Path = ROOT) -> list[str]:
    """Why the patches of ``defence`` do not apply to ``tree``; nothing where they do."""
    try:
        patched(defence, tree)
    except (ValueError, OSError, SyntaxError) as error:
        return [str(error)]
    return []


def patched(defence: Defence, tree: Path) -> dict[Path, str]:
    """The files of ``tree`` without the defence; each is still Python."""
    texts: dict[Path, str] = {}
    for patch in defence.patches:
        path = tree / patch.file
        if path not in texts:
            texts[path] = path.read_text("utf-8")
        texts[path] = patch.applied(texts[path])
    for path, text in texts.items():
        compile(text, str(path), "exec")
    return texts


class Copy:
    """A copy of the tree whose modules are the ones that tests in it import."""

    def __init__(self, folder: Path, root: Path = ROOT) -> None:
        self.folder = folder
        shutil.copytree(root, folder, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
        self._check_imports()

    def _check_imports(self) -> None:
        """From anywhere, ``longskip`` and ``tests`` are those of this folder; raises RuntimeError otherwise."""
        code = "import longskip, tests; print(longskip.__file__); print(tests.__file__)"
        for place in (self.folder, self.folder.parent):
            ran = subprocess.run(
                [sys.executable, "-c", code],
                cwd=place,
                env=environment(self.folder),
                capture_output=True,
                text=True,
                check=True,
                timeout=120,
            )
            outside = [
                line for line in ran.stdout.split() if not Path(line).resolve().is_relative_to(self.folder.resolve())
            ]
            if outside:
                raise RuntimeError(f"the copy in {self.folder} imports {outside[0]}, not its own modules")

    def prove(self, defence: Defence) -> Proof:
        """Take the defence out, run its tests, put it back."""
        texts = patched(defence, self.folder)
        kept = {path: path.read_text("utf-8") for path in texts}
        try:
            for path, text in texts.items():
                path.write_text(text, "utf-8")
            session = run_tests(defence.caught_by, self.folder, seconds=SECONDS, stop_at_first=True)
        finally:
            for path, text in kept.items():
                path.write_text(text, "utf-8")
        return Proof(defence, session.outcomes, _why_not(session.outcomes, session.output, session.timed_out))


def _why_not(outcomes: tuple[Outcome, ...], output: str, timed_out: bool) -> str | None:
    """Why the outcomes do not show that the tests see the missing defence; None where they do."""
    if timed_out:
        return f"the tests did not end within {SECONDS:.0f} s"
    if not outcomes:
        return f"no test ran:\n{output[-2000:]}"
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if not failed:
        broken = [outcome for outcome in outcomes if outcome.status == "error"]
        return (
            f"{broken[0].test} could not be set up:\n{broken[0].message[-2000:]}" if broken else "its tests still pass"
        )
    for outcome in failed:
        slip = SLIPS.search(outcome.message) or SLIPS.search(outcome.output)
        if slip is None:
            return None
    return f"the patch does not take the defence out but breaks the program: {slip.group(0)}"  # type: ignore[union-attr]
