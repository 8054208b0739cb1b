"""Readers of a run folder: what a run wrote while it trained, as plain values.

Every reader takes a folder as a crash left it: a missing file is empty, a line cut short is skipped and counted in
``RunLog.skipped_lines``. Only a folder that is no run at all, or a configuration that cannot be parsed, is an error.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from longskip.errors import ConfigError, RunFolderError
from longskip.profiling.ledger import LedgerFile, Sums, json_rows, sums
from longskip.profiling.ledger import read as read_ledger
from longskip.profiling.yamlfiles import read_yaml

_MARKS = ("run.json", "config.yaml", "metrics.jsonl", "ledger.jsonl")
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True, slots=True)
class SampleGrid:
    """The samples drawn at one step: ``grid`` is the labelled picture, ``files`` the single ones, in prompts' order.

    ``settings`` holds the rest of ``prompts.json``: sampler, steps, guidance, weights, seed.
    """

    step: int
    grid: Path
    prompts: tuple[str, ...]
    files: tuple[Path, ...]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class RunLog:
    """One run folder. The files are read on first use and kept; open the folder again to see a running job's news."""

    path: Path
    skipped_lines: dict[str, int] = field(default_factory=dict, compare=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str], runs: str | os.PathLike[str] = "runs") -> RunLog:
        """The run at ``path``, or the run of that name under the folder ``runs``.

        RunFolderError when neither exists, or when the folder holds none of the files that a run writes.
        """
        folder = Path(path)
        if not folder.exists() and not folder.is_absolute() and (Path(runs) / folder).exists():
            folder = Path(runs) / folder
        if not folder.exists():
            raise RunFolderError(f"run {os.fspath(path)!r} does not exist", cure=_near(str(path), Path(runs)))
        if not folder.is_dir():
            raise RunFolderError(f"{folder} is a file, not a run folder", cure="give the folder that holds config.yaml")
        if not any((folder / mark).is_file() for mark in _MARKS):
            raise RunFolderError(
                f"{folder} is no run folder: it holds none of {', '.join(_MARKS)}", cure=_near(str(path), folder)
            )
        return cls(folder)

    @cached_property
    def info(self) -> dict[str, Any]:
        """``run.json``: name, status, params, params_token, flops_per_image, image_tokens, tokens; {} without it."""
        return self._json("run.json")

    @property
    def name(self) -> str:
        """The run's name; the folder's when ``run.json`` does not say it."""
        name = self.info.get("name")
        return name if isinstance(name, str) and name else self.path.resolve().name

    @property
    def status(self) -> str | None:
        status = self.info.get("status")
        return status if isinstance(status, str) else None

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.yaml``, the resolved configuration; {} without it, RunFolderError when it is no YAML mapping."""
        file = self.path / "config.yaml"
        if not file.is_file():
            return {}
        try:
            return read_yaml(file, "configuration")
        except ConfigError as error:
            raise RunFolderError(error.message, cure="restore the file from a backup") from error

    @cached_property
    def environment(self) -> dict[str, Any]:
        """``environment.json``: versions, devices, commit, command; {} without it."""
        return self._json("environment.json")

    @cached_property
    def metrics(self) -> dict[int, dict[str, Any]]:
        """Step → the metrics of that step, in order of steps. The last line per step and key counts."""
        merged: dict[int, dict[str, Any]] = {}
        for row in self._jsonl("metrics.jsonl"):
            step = row.get("step")
            if isinstance(step, int) and not isinstance(step, bool):
                merged.setdefault(step, {}).update(row)
        return dict(sorted(merged.items()))

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """The steps that have a number under ``key``, and the numbers; NaN and infinities are kept."""
        steps, values = [], []
        for step, row in self.metrics.items():
            value = row.get(key)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                steps.append(step)
                values.append(float(value))
        return steps, values

    @cached_property
    def ledger(self) -> LedgerFile:
        """The ledger's entries in file order, superseded ones included."""
        return read_ledger(self.path / "ledger.jsonl")

    @cached_property
    def sums(self) -> Sums:
        """Committed and spent."""
        return sums(self.ledger.entries)

    @property
    def device_name(self) -> str | None:
        """The device of the newest ledger line."""
        lines = self.ledger.lines
        return lines[-1].device_name if lines else None

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """``eval/step-*.json`` in order of steps, several of one step in order of their names, and those that earlier
        versions put aside in ``eval/earlier/`` last. ``examples`` under ``judge`` and ``nearest`` is a full path where the
        file exists.
        """
        found = []
        folders = (self.path / "eval", self.path / "eval" / "earlier")
        for file in (file for folder in folders for file in sorted(folder.glob("step-*.json"))):
            body = _load_object(file)
            step = body.get("step", _step_of(file.stem))
            if not isinstance(step, int):
                self.skipped_lines["eval"] = self.skipped_lines.get("eval", 0) + 1
                continue
            body["step"] = step
            for name in ("judge", "nearest"):
                part = body.get(name)
                if isinstance(part, dict):
                    examples = part.get("examples")
                    path = self._inside(file.parent, examples) if isinstance(examples, str) else None
                    body[name] = {**part, "examples": path}
            found.append(body)
        return sorted(found, key=lambda body: body["step"])

    @cached_property
    def samples(self) -> list[SampleGrid]:
        """``samples/step-*`` that have a ``grid.png``, in order of steps."""
        found = []
        for folder in (self.path / "samples").glob("step-*"):
            step, grid = _step_of(folder.name), folder / "grid.png"
            if step is None or not grid.is_file():
                continue
            body = _load_object(folder / "prompts.json")
            files = (self._inside(folder, name) for name in _strings(body.pop("files", None)))
            prompts = _strings(body.pop("prompts", None))
            found.append(SampleGrid(step, grid, tuple(prompts), tuple(file for file in files if file), body))
        return sorted(found, key=lambda grid: grid.step)

    @cached_property
    def incidents(self) -> list[dict[str, Any]]:
        """``incidents.jsonl``: time, attempt, step, kind, detail."""
        return self._jsonl("incidents.jsonl")

    @cached_property
    def bad_samples(self) -> list[dict[str, Any]]:
        """``bad_samples.jsonl``: key, sample, reason, detail, step."""
        return self._jsonl("bad_samples.jsonl")

    def _json(self, name: str) -> dict[str, Any]:
        return _load_object(self.path / name)

    def _jsonl(self, name: str) -> list[dict[str, Any]]:
        file = self.path / name
        if not file.is_file():
            return []
        rows, skipped = json_rows(file.read_bytes())
        self.skipped_lines[name] = skipped
        return rows

    def _inside(self, folder: Path, name: str) -> Path | None:
        """The file ``name`` of ``folder``; None when it does not exist or lies outside the run folder."""
        file = folder / name
        try:
            return file if file.is_file() and file.resolve().is_relative_to(self.path.resolve()) else None
        except OSError:  # a name that is too long for the file system
            return None


def _load_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        body = json.loads(file.read_bytes())
    except (ValueError, RecursionError):  # a crash can leave such a file half written; the run is readable without it
        return {}
    return body if isinstance(body, dict) else {}


def _strings(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _step_of(name: str) -> int | None:
    match = _STEP.fullmatch(name)
    return int(match.group(1)) if match else None


def _near(wanted: str, parent: Path) -> str:
    """A cure that names the runs that could have been meant."""
    runs = []
    if parent.is_dir():
        runs = sorted(child.name for child in parent.iterdir() if any((child / mark).is_file() for mark in _MARKS))
    if not runs:
        return "give the folder that training wrote (it holds config.yaml and metrics.jsonl)"
    near = difflib.get_close_matches(Path(wanted).name, runs, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(near)}?" if near else f"runs under {parent}: {', '.join(runs[:8])}"
