"""What fits are made from: rows of a CSV, or finished runs' ledgers; files and runs that do not belong together are refused."""

from __future__ import annotations

import csv
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any, Literal

from longskip.errors import ConfigError
from longskip.models.specs import UViTSpec
from longskip.profiling.fits import Point
from longskip.profiling.laws import Tokens
from longskip.profiling.ledger import LedgerLine, committed_lines
from longskip.profiling.runlog import RunLog

Compute = Literal["exact", "6nd"]
LossOf = Literal["train", "validation"]

COLUMNS = ("flops", "params", "tokens", "loss")
LEAST, MOST = 1e-30, 1e60  # of any number in a table: products of three are still numbers
USUAL_6ND = (0.5, 3.0)  # C ÷ 6ND: below it forward passes alone, above it attention over very long sequences
_EMA = 0.9  # of the loss over intervals, as arXiv 2410.08184 smooths it
# What may differ between the runs of one fit: how large the model is, how long it trains, and how it is carried out.
_SIZE = {"width", "depth", "n_heads"}
_SAME_GROUPS = ("diffusion", "encoders")


def read_csv(path: Path, compute: Compute = "exact") -> list[Point]:
    """Points from a CSV with the columns ``flops params tokens loss``; others are left alone.

    ``compute`` ``6nd`` takes 6·params·tokens for C, and needs no column flops. ConfigError names the line and column.
    """
    needed = [name for name in COLUMNS if name != "flops" or compute == "exact"]
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            titles = {title.strip().lower(): title for title in reader.fieldnames or ()}
            for name in needed:
                if name not in titles:
                    near = difflib.get_close_matches(name, titles, n=1, cutoff=0.5)
                    hint = f"; is it {near[0]!r}?" if near else ""
                    cure = "--compute 6nd takes 6·N·D instead" if name == "flops" else f"columns: {', '.join(needed)}"
                    raise ConfigError(f"{path} has no column {name!r}{hint}", cure=cure)
            return [_row(path, reader.line_num, row, titles, compute) for row in reader if any(_texts(row))]
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist", cure="give a CSV file, or runs") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"{path} cannot be read as a CSV file: {error}", cure="save it as UTF-8 with commas"
        ) from error


def units_warning(points: Sequence[Point]) -> str | None:
    """A sentence where C of a table is far from 6·N·D, as when a column counts in thousands or billions; else None."""
    factors = {point.origin: point.flops / (6 * point.params * point.tokens) for point in points}
    odd = [origin for origin, factor in factors.items() if not USUAL_6ND[0] <= factor <= USUAL_6ND[1]]
    if not odd:
        return None
    middle = median(factors[origin] for origin in odd)
    return (
        f"flops ÷ (6·params·tokens) is {middle:.3g} in {len(odd)} of {len(factors)} rows (the first is {odd[0]}), and "
        f"{USUAL_6ND[0]:g} to {USUAL_6ND[1]:g} is usual: is a column in other units (GFLOPs, millions)?"
    )


def _texts(row: Mapping[Any, Any]) -> list[str]:
    return [value for value in row.values() if isinstance(value, str) and value.strip()]


def _row(path: Path, line: int, row: Mapping[str, Any], titles: Mapping[str, str], compute: Compute) -> Point:
    if any(text.strip() for text in row.get(None) or ()):  # type: ignore[call-overload]
        raise ConfigError(
            f"{path}, line {line}: {len(row) - 1 + len(row[None])} values under {len(row) - 1} columns",  # type: ignore[index]
            cure="write numbers without commas (1_000_000 or 1e6), one value a column",
        )
    values = {}
    for name in COLUMNS:
        if name == "flops" and compute == "6nd":
            continue
        text = row.get(titles[name])
        try:
            value = float(str(text).replace("_", ""))
        except ValueError:
            value = math.nan
        if not LEAST <= value <= MOST:  # nor is NaN
            raise ConfigError(
                f"{path}, line {line}: {name} = {text and text[:80]!r} is not a positive number ({LEAST:g} to {MOST:g})",
                cure="mend or remove that line",
            )
        values[name] = value
    values.setdefault("flops", 6 * values["params"] * values["tokens"])
    return Point(**values, origin=f"{path.name}:{line}")


def params_of(log: RunLog) -> int:
    """N of a run, from its ledger: 6ND ÷ (6·D), the same in every line.

    ConfigError with the difference where lines are of different models, or another model's than ``run.json`` says.
    """
    seen: dict[tuple[int, int], LedgerLine] = {}  # N as numerator and denominator -> the first line that says so
    for line in _all_lines(log):
        if line.tokens > 0:
            divisor = math.gcd(line.six_nd, 6 * line.tokens)
            seen.setdefault((line.six_nd // divisor, 6 * line.tokens // divisor), line)
    if len(seen) > 1:
        said = "; ".join(
            f"N = {up / down:,.0f} in attempt {line.attempt}, steps {line.from_step:,} to {line.step:,}"
            for (up, down), line in list(seen.items())[:4]
        )
        raise ConfigError(
            f"the ledger of {log.name} holds lines of {len(seen)} different models: {said}",
            cure=f"give each run its own folder; {log.path / 'ledger.jsonl'} was copied together or edited",
        )
    told = log.info.get("params")
    if not seen:
        raise ConfigError(
            f"the ledger of {log.name} holds no interval yet", cure="let the run reach its first log line"
        )
    (up, down), _ = next(iter(seen.items()))
    if down != 1:
        raise ConfigError(
            f"the ledger of {log.name} does not hold 6·N·D: N would be {up / down:,.3f}", cure="restore ledger.jsonl"
        )
    if isinstance(told, int) and told != up:
        raise ConfigError(
            f"{log.name} mixes two models: run.json says {told:,} parameters, ledger.jsonl {up:,} "
            f"(a difference of {up - told:+,})",
            cure=f"bring together the run.json and ledger.jsonl of one run in {log.path}",
        )
    _same_cost(log)
    return up


def _all_lines(log: RunLog) -> tuple[LedgerLine, ...]:
    """Those too that count in no sum: of another model they would show that files were mixed."""
    return (*log.ledger.lines, *log.ledger.overlapping)


def _same_cost(log: RunLog) -> None:
    """Refuses lines that cost differently per image although their images have the same tokens: another model's."""
    seen: dict[tuple[int, int], LedgerLine] = {}
    sizes = set()
    for line in _all_lines(log):
        if line.images > 0:
            sizes.add((line.tokens / line.images, line.image_tokens / line.images))
            divisor = math.gcd(line.model_flops, line.images)
            seen.setdefault((line.model_flops // divisor, line.images // divisor), line)
    if len(sizes) == 1 and len(seen) > 1:
        said = "; ".join(
            f"{line.model_flops / line.images:,.0f} FLOPs an image in attempt {line.attempt}, step {line.step:,}"
            for line in list(seen.values())[:4]
        )
        raise ConfigError(
            f"the ledger of {log.name} holds lines of different models of one size: {said}",
            cure=f"give each run its own folder; {log.path / 'ledger.jsonl'} was copied together or edited",
        )


def read_runs(
    logs: Sequence[RunLog],
    specs: Sequence[UViTSpec | None],
    *,
    compute: Compute = "exact",
    tokens: Tokens = "all",
    loss: LossOf = "train",
) -> list[Point]:
    """One point a run: committed FLOPs and tokens, N, and the loss it ended with.

    ``train``: the intervals' losses, smoothed by 0.9; ``validation``: the newest validation loss. ConfigError with the
    difference for runs that are not one family: another patch, text, objective, encoder or data set.
    """
    _one_family(logs, specs)
    points = []
    for log in logs:
        params = params_of(log)
        lines = sorted(committed_lines(log.ledger.entries), key=lambda line: line.step)
        seen = sum(line.tokens if tokens == "all" else line.image_tokens for line in lines)
        exact = sum(line.model_flops for line in lines)
        end = smoothed([line.loss for line in lines])[-1:] if loss == "train" else _validation(log, lines)
        if not lines or not end or end[0] is None or end[0] <= 0:
            raise ConfigError(
                f"{log.name} has no {loss} loss that ended as a positive number",
                cure="leave this run out, or let it go on" if loss == "train" else "take --loss train",
            )
        points.append(Point(exact if compute == "exact" else 6 * params * seen, params, seen, end[0], log.name))
    return points


def smoothed(losses: Iterable[float | None]) -> list[float | None]:
    """Exponential moving average with 0.9, unbiased from the first value on; None until the first known loss."""
    total = weight = 0.0
    found: list[float | None] = []
    for loss in losses:
        if loss is not None:
            total, weight = _EMA * total + (1 - _EMA) * loss, _EMA * weight + (1 - _EMA)
        found.append(total / weight if weight else None)
    return found


def _validation(log: RunLog, lines: Sequence[LedgerLine]) -> list[float | None]:
    last = max((line.step for line in lines), default=0)
    steps, values = log.series("validation/loss")
    kept = [value for step, value in zip(steps, values, strict=True) if step <= last and math.isfinite(value)]
    return list(kept[-1:])


def _one_family(logs: Sequence[RunLog], specs: Sequence[UViTSpec | None]) -> None:
    families = [_family(log, spec) for log, spec in zip(logs, specs, strict=True)]
    for log, family in zip(logs[1:], families[1:], strict=True):
        keys = [key for key in families[0].keys() | family.keys() if families[0].get(key) != family.get(key)]
        if keys:
            said = "; ".join(
                f"{key} is {families[0].get(key)!r} in {logs[0].name}, {family.get(key)!r} in {log.name}"
                for key in sorted(keys)[:6]
            )
            raise ConfigError(
                f"{logs[0].name} and {log.name} are not models of one family, whose losses lie on one law: {said}",
                cure="fit runs that differ in size and length alone; a CSV file is taken as it is",
            )


def _family(log: RunLog, spec: UViTSpec | None) -> dict[str, Any]:
    shape = {item.name: getattr(spec, item.name) for item in fields(UViTSpec) if item.name not in _SIZE} if spec else {}
    family: dict[str, Any] = {f"model.{name}": value for name, value in shape.items()}
    for group in _SAME_GROUPS:
        body = log.config.get(group)
        family |= _leaves(body, group) if isinstance(body, Mapping) else {}
    family = {key: value for key, value in family.items() if not key.endswith(".path")}  # a folder may lie anywhere
    data = log.info.get("data")
    if isinstance(data, Mapping) and "fingerprint" in data:
        family["data"] = data["fingerprint"]
    return family


def _leaves(body: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in body.items():
        flat |= _leaves(value, f"{prefix}.{key}") if isinstance(value, Mapping) else {f"{prefix}.{key}": value}
    return flat
