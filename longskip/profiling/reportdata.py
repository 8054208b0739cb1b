"""What a report shows, worked out from run logs: figures, tables and the points of the charts, as plain values.

Nothing here knows HTML. Texts are passed on as they stand in the run folder; the template escapes them.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import yaml

from longskip.profiling import hardware, units
from longskip.profiling.goodput import goodput
from longskip.profiling.ledger import LedgerLine, Resumed, Totals, committed_lines
from longskip.profiling.runlog import RunLog

MAX_POINTS = 1500
MAX_ROWS = 200
_ATTRIBUTES = ("full", "objects", "colour", "size", "shape", "position", "relation")
_VERDICTS = 3  # of the headline figures: what a judge says


@dataclass(frozen=True, slots=True)
class Figure:
    """One headline figure: ``value`` is large, ``note`` small beside it."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Cell:
    """A number of a table: the short form, and the exact one behind it."""

    text: str
    exact: str = ""


def labels(logs: Sequence[RunLog]) -> list[str]:
    """The runs' names, told apart by a number where two are alike."""
    seen: Counter[str] = Counter()
    names = []
    for log in logs:
        seen[log.name] += 1
        names.append(log.name if seen[log.name] == 1 else f"{log.name} ({seen[log.name]})")
    return names


def figure_rows(logs: Sequence[RunLog]) -> list[tuple[Figure, ...]]:
    """The headline figures, a row per figure and in it one per run; of a judge's, those that some run has."""
    rows = list(zip(*(headline(log) for log in logs), strict=True))
    return [row for at, row in enumerate(rows) if at >= _VERDICTS or any(each.value != units.NONE for each in row)]


def headline(log: RunLog) -> list[Figure]:
    """The figures a reader looks for first: the same labels for every run, unknown values as a dash."""
    committed, spent, info = log.sums.committed, log.sums.spent, log.info
    figures = _verdicts(log)
    params = _number(info.get("params"))
    params_token = _number(info.get("params_token"))
    if committed.steps == 0:
        unknown = ("Model FLOPs C", "C₆ND = 6·N·D", "Images", "Tokens D")
        figures += [Figure(label, units.NONE) for label in unknown]
    else:
        figures += [
            Figure("Model FLOPs C", units.scientific(committed.model_flops), "exact: 3 times the forward"),
            Figure(
                "C₆ND = 6·N·D",
                units.scientific(committed.six_nd),
                f"C ÷ C₆ND = {committed.model_flops / committed.six_nd:.4f}" if committed.six_nd else "",
            ),
            Figure("Images", units.count(committed.images), f"in {log.sums.last_step:,} steps"),
            Figure("Tokens D", units.count(committed.tokens), f"{units.count(committed.image_tokens)} image tokens"),
        ]
    per_token = f"{units.count(params_token)} act on every token" if params_token is not None else ""
    figures.append(Figure("Parameters N", units.count(params), per_token))
    if committed.steps == 0:
        times = ("Wall time", "Images per second", "Data wait", "Communication", "Goodput")
        figures += [Figure(label, units.NONE) for label in times]
    else:
        tokens_per_second = f"{units.rate(committed.tokens_per_second)} tokens/s"
        figures += [
            Figure("Wall time", units.duration(spent.seconds), "everything executed, first step to last logged one"),
            Figure("Images per second", units.rate(committed.images_per_second), tokens_per_second),
            Figure("Data wait", units.share(committed.data_wait_share), "of the wall time"),
            Figure("Communication", units.share(committed.communication_share), _communication_note(committed)),
            _goodput(log),
        ]
    return [*figures, _mfu(log, committed)]


def _verdicts(log: RunLog) -> list[Figure]:
    """What the judges say of the newest step that each judged."""
    judged, near = last_judged(log), last_judged(log, "nearest")
    figures = []
    for split, label in (("seen", "Full match, seen"), ("held_out", "Full match, held out")):
        scores = _mapping(_mapping(judged.get("judge")).get(split))
        note = "judged by the nearest picture alone" if near else "not judged"
        if scores:
            note = f"{units.exact(_number(scores.get('count')))} prompts, step {judged['step']:,}"
        figures.append(Figure(label, units.share(_number(scores.get("full"))), note))
    found = _mapping(near.get("nearest"))
    note = "not asked"
    if found:
        of = " of ".join(units.exact(_number(found.get(name))) for name in ("hits", "count"))
        note = f"{of} training pictures, chance {units.share(_number(found.get('chance')))}, step {near['step']:,}"
    figures.append(Figure("Found again", units.share(_number(found.get("share"))), note))
    return figures


def _goodput(log: RunLog) -> Figure:
    """Kept time as a share of the wall time: with starting, ending and restarts where a supervisor wrote them down."""
    found = goodput(log)
    if not found.watched:
        return Figure("Goodput", units.share(found.share), "of the wall time was kept")
    note = f"of {units.duration(found.wall)} from start to end was kept"
    return Figure("Goodput", units.share(found.share), note)


def wall_rows(log: RunLog) -> list[dict[str, str]]:
    """Where the wall time of a supervised run went, a row per part; nothing where no supervisor wrote it down."""
    found = goodput(log)
    if not found.watched or found.wall <= 0:
        return []
    parts = (
        ("steps that were kept", found.useful), ("steps done again", found.redone),
        ("starting up, saving at the end, dying", found.around), ("between an attempt and its restart", found.pauses),
        ("from start to end", found.wall),
    )  # fmt: skip
    return [
        {"label": label, "time": units.duration(seconds), "share": units.share(seconds / found.wall)}
        for label, seconds in parts
    ]


def _communication_note(committed: Totals) -> str:
    if committed.communication_share is None:
        return "not measured (on CUDA, and in older ledgers)"
    return "of the wall time in collectives"


def _mfu(log: RunLog, committed: Totals) -> Figure:
    device = log.device_name
    if committed.mfu is not None:
        return Figure("MFU", units.share(committed.mfu), f"HFU {units.share(committed.hfu)} · {device}")
    if device is None:
        return Figure("MFU", units.NONE, "nothing was measured yet")
    return Figure("MFU", units.NONE, hardware.mfu_reason(device) or "the ledger holds none")


def last_judged(log: RunLog, score: str = "judge") -> dict[str, Any]:
    """The evaluation of the newest step that has ``score``, as ``evaluated`` chooses it; {} without any."""
    return (evaluated(log, score) or [{}])[-1]


def evaluated(log: RunLog, score: str) -> list[dict[str, Any]]:
    """Of the evaluations with ``score`` (judge, nearest, loss) one a step, in order of steps.

    One that drew as the configuration says goes before others, then one of more prompts. ``others`` is how many
    more there are of its step.
    """

    def worth(body: dict[str, Any]) -> tuple[bool, float]:
        part = _mapping(body[score])
        counts = [part.get("count"), part.get("samples")]
        counts += [_mapping(part.get(split)).get("count") for split in ("seen", "held_out")]
        return body.get("as_configured") is not False, sum(_number(each) or 0 for each in counts)

    steps: dict[int, list[dict[str, Any]]] = {}
    for body in log.evaluations:
        if _mapping(body.get(score)):
            steps.setdefault(body["step"], []).append(body)
    chosen = []
    for _, bodies in sorted(steps.items()):
        best = max(bodies, key=worth)
        chosen.append({**best, "others": len(bodies) - 1})
    return chosen


def nearest_rows(logs: Sequence[RunLog]) -> list[dict[str, Any]]:
    """Whether training pictures came back, a row per run and step that was asked: shares, and ``how`` they were drawn."""
    rows = []
    for index, log in enumerate(logs):
        for body in evaluated(log, "nearest"):
            found = _mapping(body["nearest"])
            figures = {name: _number(found.get(name)) for name in ("share", "chance", "share_among_all")}
            counts = {name: units.exact(_number(found.get(name))) for name in ("hits", "count", "among_all")}
            rows.append({"run": index, "step": body["step"], "how": drawn(body), **figures, **counts})
    return rows[-MAX_ROWS:]


def drawn(body: Mapping[str, Any]) -> str:
    """How the pictures of an evaluation were drawn, and how many more evaluations of its step there are."""
    names = ("weights", "sampler", "steps", "guidance", "seed")
    how = [f"{name} {_text(body[name])}" for name in names if body.get(name) is not None]
    others = body.get("others")
    if others:
        how.append(f"{others} more evaluation{'s' if others > 1 else ''} of this step in eval/")
    return " · ".join(how)


def score_rows(logs: Sequence[RunLog]) -> list[dict[str, Any]]:
    """The judge's newest scores: a row per attribute, in it per run the shares for seen and held-out prompts."""
    judged = [_mapping(last_judged(log).get("judge")) for log in logs]
    rows = []
    for attribute in _ATTRIBUTES:
        bars = []
        for index, judge in enumerate(judged):
            seen, held_out = (_number(_mapping(judge.get(split)).get(attribute)) for split in ("seen", "held_out"))
            if seen is not None or held_out is not None:
                bars.append({"run": index, "seen": seen, "held_out": held_out})
        if bars:
            rows.append({"attribute": "full match" if attribute == "full" else attribute, "bars": bars})
    return rows


def quality_rows(logs: Sequence[RunLog]) -> list[dict[str, Any]]:
    """Evaluations with FID, KID, CLIP score or likelihood: a row each, and ``how``, what its figures depend on."""
    rows = []
    for index, log in enumerate(logs):
        for body in log.evaluations:
            fidelity, clip = _mapping(body.get("fidelity")), _mapping(body.get("clip_score"))
            fid, kid = _mapping(fidelity.get("fid")), _mapping(fidelity.get("kid"))
            likelihood = _mapping(body.get("likelihood"))
            bound, ode = _mapping(likelihood.get("vlb")), _mapping(likelihood.get("ode"))
            figures = [
                _figure(fid.get("value")),
                _figure(kid.get("mean"), kid.get("std")),
                _figure(clip.get("value"), clip.get("standard_error")),
                _figure(bound.get("bits_per_dim"), _mapping(bound.get("bits_per_dim_error")).get("over_samples")),
                _figure(ode.get("bits_per_dim"), _mapping(ode.get("bits_per_dim_error")).get("over_samples")),
            ]
            if not any(figures):
                continue
            how = [drawn(body)]
            counted = (("FID, KID", fidelity), ("CLIP", clip), ("bound", bound), ("ODE", ode))
            how += [f"{name} of {units.exact(_number(part.get('count')))}" for name, part in counted if part]
            hashed = ((name, _mapping(fidelity.get(name)).get("sha256")) for name in ("network", "statistics"))
            how += [f"{name} {_text(sha256)[:12]}" for name, sha256 in hashed if sha256]
            warnings = fid.get("warnings")
            rows.append(
                {
                    "run": index,
                    "step": body["step"],
                    "figures": figures,
                    "how": " · ".join(how),
                    "warnings": [_text(text) for text in warnings] if isinstance(warnings, list) else [],
                }
            )
    return rows[-MAX_ROWS:]


def _figure(value: object, error: object = None) -> str:
    """A number in five figures, with its error in two where it has one; "" where it is none."""
    known, spread = _number(value), _number(error)
    if known is None:
        return ""
    return f"{known:.5g}" if spread is None else f"{known:.5g} ± {spread:.2g}"


def ledger_rows(log: RunLog) -> list[dict[str, Any]]:
    """Committed against spent, a row per quantity; ``redone`` is the difference."""
    committed, spent = log.sums.committed, log.sums.spent
    if spent.steps == 0:
        return []
    rows = []
    for label, name, short in (
        ("Steps", "steps", units.exact),
        ("Images", "images", units.count),
        ("Image tokens", "image_tokens", units.count),
        ("All tokens D", "tokens", units.count),
        ("Model FLOPs C", "model_flops", units.scientific),
        ("Hardware FLOPs", "hardware_flops", units.scientific),
        ("C₆ND", "six_nd", units.scientific),
        ("Wall time", "seconds", units.duration),
        ("Waiting for data", "data_wait_seconds", units.duration),
        ("In collectives", "communication_seconds", units.duration),
    ):
        kept, all_of_it = getattr(committed, name), getattr(spent, name)
        if kept is None or all_of_it is None:
            continue
        cells = [Cell(short(value), _exact(value)) for value in (kept, all_of_it, all_of_it - kept)]
        rows.append({"label": label, "cells": cells})
    if spent.mfu is not None:
        for label, name in (("MFU", "mfu"), ("HFU", "hfu")):
            values = (getattr(committed, name), getattr(spent, name))
            rows.append({"label": label, "cells": [*(Cell(units.share(value)) for value in values), Cell("")]})
    return rows


def attempts(log: RunLog) -> list[dict[str, Any]]:
    """The attempts of a run: from which step, to which step, how long, on what."""
    found: dict[int, dict[str, Any]] = {}
    for entry in log.ledger.entries:
        fresh = {"attempt": entry.attempt, "from": None, "to": None, "seconds": 0.0, "device": ""}
        row = found.setdefault(entry.attempt, fresh)
        if isinstance(entry, Resumed):
            row["from"] = entry.resumed_from
        elif isinstance(entry, LedgerLine):
            row["from"] = entry.from_step if row["from"] is None else row["from"]
            row["to"] = entry.step
            row["seconds"] += entry.seconds
            row["device"] = f"{entry.devices} \N{MULTIPLICATION SIGN} {entry.device_name}"
    return [{**row, "time": units.duration(row["seconds"])} for row in found.values()]


def config_lines(config: Mapping[str, Any], differing: set[str]) -> list[dict[str, Any]]:
    """A configuration as YAML lines ``{indent, key, value, differs}``."""
    lines: list[dict[str, Any]] = []

    def walk(group: Mapping[str, Any], prefix: str, indent: int) -> None:
        for key, value in group.items():
            path = f"{prefix}{key}"
            if isinstance(value, Mapping) and value:
                lines.append({"indent": indent, "key": key, "value": "", "differs": False})
                walk(value, f"{path}.", indent + 1)
            else:
                lines.append({"indent": indent, "key": key, "value": _yaml(value), "differs": path in differing})

    walk(config, "", 0)
    return lines


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys with their values as YAML text."""
    flat: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            flat.update(flatten(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = _yaml(item)
    return flat


def served(log: RunLog) -> dict[str, Any]:
    """``{"kernels": {op: "backend (reason), …"}}``: which implementation served each op; {} where the run does not say."""
    said = log.info.get("kernels")
    if not isinstance(said, dict):
        return {}
    texts = {}
    for op, by in said.items():
        if isinstance(by, dict):
            texts[op] = ", ".join(f"{backend} ({reason})" for backend, reason in by.items())
        elif isinstance(by, list) and len(by) == 2:  # before the first step: what was going to serve
            texts[op] = f"{by[0]} ({by[1]})"
    return {"kernels": texts}


def comparison(maps: Sequence[Mapping[str, Any]], *, only_differing: bool) -> list[dict[str, Any]]:
    """Dotted keys side by side: ``{key, values, differs}``; a key that one of the maps lacks has None there."""
    flat = [flatten(item) for item in maps]
    rows = []
    for key in dict.fromkeys(key for item in flat for key in item):
        values = [item.get(key) for item in flat]
        differs = len(set(values)) > 1
        if differs or not only_differing:
            rows.append({"key": key, "values": values, "differs": differs})
    return rows


def incident_rows(log: RunLog) -> list[dict[str, str]]:
    """The newest incidents, newest last, as texts."""
    keys = ("time", "attempt", "step", "kind", "detail")
    return [{key: _text(row.get(key)) for key in keys} for row in log.incidents[-MAX_ROWS:]]


def bad_sample_rows(log: RunLog) -> list[dict[str, str]]:
    """The newest bad samples as texts."""
    keys = ("key", "reason", "detail", "step")
    return [{key: _text(row.get(key)) for key in keys} for row in log.bad_samples[-MAX_ROWS:]]


def bad_sample_reasons(log: RunLog) -> list[tuple[str, int]]:
    """Bad samples per reason, most frequent first."""
    return Counter(_text(row.get("reason")) for row in log.bad_samples).most_common()


def chart_data(logs: Sequence[RunLog], names: Sequence[str]) -> dict[str, Any]:
    """All charts as JSON-ready values: runs with their axes, and the charts that have data, by id."""
    charts: dict[str, Any] = {}
    for key, name in (
        ("loss", "loss/global_avg"),
        ("validation", "validation/loss"),
        ("lr", "lr"),
        ("grad_norm", "grad_norm"),
        ("images_per_second", "images_per_second"),
        ("tokens_per_second", "tokens_per_second"),
        ("data_wait", "time/data_loading(%)"),
        ("communication", "time/communication(%)"),
        ("mfu", "mfu(%)"),
    ):
        series = [_points(index, *log.series(name)) for index, log in enumerate(logs)]
        charts[key] = [item for item in series if item["x"]]
    if not charts["validation"]:
        charts["validation"] = [item for index, log in enumerate(logs) if (item := _evaluated(index, log))["x"]]
    charts["scores"] = [item for index, log in enumerate(logs) for item in _scores(index, log)]
    charts["bins"] = [item for index, log in enumerate(logs) for item in _bins(index, log, only_last=len(logs) > 1)]
    runs = [{"name": name, **_axes(log)} for name, log in zip(names, logs, strict=True)]
    return {"runs": runs, "charts": {key: series for key, series in charts.items() if series}}


def _axes(log: RunLog) -> dict[str, Any]:
    """Knots that map a step to images and to model FLOPs: the committed ledger, cumulated; and where it resumed."""
    steps, images, flops = [0], [0], [0]
    for line in sorted(committed_lines(log.ledger.entries), key=lambda line: line.step):
        steps.append(line.step)
        images.append(images[-1] + line.images)
        flops.append(flops[-1] + line.model_flops)
    stride = max(1, math.ceil(len(steps) / MAX_POINTS))
    keep = sorted({*range(0, len(steps), stride), len(steps) - 1})
    resumed = [entry.resumed_from for entry in log.ledger.entries if isinstance(entry, Resumed) and entry.resumed_from]
    return {
        "steps": [steps[i] for i in keep],
        "images": [images[i] for i in keep],
        "flops": [float(flops[i]) for i in keep],
        "resumed": sorted(set(resumed)),
    }


def _points(run: int, steps: Sequence[int], values: Sequence[float], **extra: Any) -> dict[str, Any]:
    """A series of a chart, at most ``MAX_POINTS`` long: means over equal groups of neighbours beyond that."""
    group = max(1, math.ceil(len(steps) / MAX_POINTS))
    x, y = [], []
    for start in range(0, len(steps), group):
        finite = [value for value in values[start : start + group] if math.isfinite(value)]
        x.append(steps[min(start + group, len(steps)) - 1])
        y.append(_short(math.fsum(finite) / len(finite)) if finite else None)
    return {"run": run, "x": x, "y": y, "group": group, **extra}


def _evaluated(run: int, log: RunLog) -> dict[str, Any]:
    pairs = [(body["step"], _number(_mapping(body["loss"]).get("mean"))) for body in evaluated(log, "loss")]
    known = [(step, value) for step, value in pairs if value is not None]
    return _points(run, [step for step, _ in known], [value for _, value in known])


def _scores(run: int, log: RunLog) -> Iterable[dict[str, Any]]:
    for split, label in (("seen", "seen"), ("held_out", "held out")):
        pairs = []
        for body in evaluated(log, "judge"):
            full = _number(_mapping(_mapping(body["judge"]).get(split)).get("full"))
            if full is not None:
                pairs.append((body["step"], 100 * full))
        if len(pairs) > 1:
            steps, values = zip(*pairs, strict=True)
            yield _points(run, steps, values, label=label, dashed=split == "held_out")


def _bins(run: int, log: RunLog, *, only_last: bool) -> list[dict[str, Any]]:
    """Validation loss over the time bins, a curve per evaluation; the newest is the last."""
    curves: list[tuple[int, list[float | None], list[float]]] = []
    for step, row in log.metrics.items():
        curves.append((step, row.get("validation/loss_bins"), row.get("validation/bin_edges")))  # type: ignore[arg-type]
    if not any(bins for _, bins, _ in curves):
        for body in evaluated(log, "loss"):
            loss = _mapping(body["loss"])
            curves.append((body["step"], loss.get("bins"), loss.get("edges")))  # type: ignore[arg-type]
    found = []
    for step, bins, edges in curves:
        if not isinstance(bins, list) or not isinstance(edges, list) or len(edges) != len(bins) + 1:
            continue
        if not all(_number(edge) is not None for edge in edges):
            continue
        centres = [(left + right) / 2 for left, right in pairwise(edges)]
        values = [None if _number(value) is None else _short(float(value)) for value in bins]  # type: ignore[arg-type]
        found.append({"run": run, "step": step, "x": centres, "y": values, "edges": edges})
    if only_last:
        return found[-1:]
    stride = max(1, math.ceil(len(found) / 6))
    return found[::-1][::stride][::-1]


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if abs(value) <= sys.float_info.max else None  # an integer may be beyond every float


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _exact(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f} s"


def _yaml(value: object) -> str:
    if isinstance(value, str) and "\n" not in value:
        text = yaml.safe_dump(value, allow_unicode=True, width=10**6)
        return text.removesuffix("\n...\n").removesuffix("\n")
    return json.dumps(value, ensure_ascii=False, default=str)


def _text(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
