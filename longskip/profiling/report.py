"""The report of one or several runs: one HTML file that needs nothing beside it.

Pictures are data URIs, charts are drawn as SVG by the page's own script, fonts are the reader's. A content security
policy names that script by its hash and forbids everything else, so that a caption, a path or a bad sample's message
can neither run nor fetch anything, whatever it says; each is escaped besides.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from longskip import __version__
from longskip.errors import RunFolderError
from longskip.profiling import outputs, reportdata, units
from longskip.profiling.ledger import Resumed
from longskip.profiling.runlog import RunLog, SampleGrid

MAX_GRIDS = 16
MAX_SIDE = 2400
_KEEP_BYTES = 1_500_000
_TEMPLATES = "templates"


def render_report(runs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] | None = None) -> Path:
    """Renders the runs (folders, or names under ``runs/``) into one self-contained HTML file and returns its path.

    Several runs are laid over one another in the charts and side by side in the tables. ``out`` is by default
    ``report.html`` in the run's folder, for several runs in the current one. The file is replaced as a whole.
    RunFolderError when there is no run, or a folder is none; ConfigError when the file cannot be written.
    """
    if not runs:
        raise RunFolderError("a report needs at least 1 run, got 0", cure="name a run folder")
    logs = [RunLog.open(run) for run in runs]
    target = Path(out) if out is not None else (logs[0].path if len(logs) == 1 else Path()) / "report.html"
    html = render_html(logs)
    return outputs.write_text(target, html)


def render_html(logs: Sequence[RunLog]) -> str:
    """The page of these runs as text."""
    names = reportdata.labels(logs)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("longskip.profiling", _TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["integer"] = lambda value: units.exact(value) if isinstance(value, int) else str(value)
    environment.filters["share"] = units.share
    script = _asset(environment, "report.js")
    data = reportdata.chart_data(logs, names)
    differing = reportdata.comparison([log.config for log in logs], only_differing=True)
    page = environment.get_template("report.html.j2")
    return page.render(
        runs=[_run(log, name, {row["key"] for row in differing}) for log, name in zip(logs, names, strict=True)],
        figures=reportdata.figure_rows(logs),
        scores=reportdata.score_rows(logs),
        nearest=reportdata.nearest_rows(logs),
        quality=reportdata.quality_rows(logs),
        steps=sorted({grid.step for log in logs for grid in _shown(log.samples)}),
        config_rows=differing,
        environment_rows=reportdata.comparison(
            [log.environment | reportdata.served(log) for log in logs], only_differing=False
        ),
        charts=defaultdict(list, data["charts"]),
        data=_json(data),
        style=Markup(_asset(environment, "report.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        rendered=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
    )


def _run(log: RunLog, name: str, differing: set[str]) -> dict[str, Any]:
    judged, near = reportdata.last_judged(log), reportdata.last_judged(log, "nearest")
    return {
        "name": name,
        "folder": str(log.path),
        "status": log.status or "unknown",
        "device": log.device_name,
        "sums": log.sums,
        "resumed": any(isinstance(entry, Resumed) and entry.resumed_from for entry in log.ledger.entries),
        "skipped": {**log.skipped_lines, "ledger.jsonl": log.ledger.skipped},
        "overlapping": len(log.ledger.overlapping),
        "grids": [grid for item in _shown(log.samples) if (grid := _grid(item))],
        "grids_left_out": max(0, len(log.samples) - MAX_GRIDS),
        "judged": judged,
        "judged_how": reportdata.drawn(judged),
        "examples": _picture(judged["judge"].get("examples")) if judged else None,
        "near_examples": _picture(near["nearest"].get("examples")) if near else None,
        "ledger": reportdata.ledger_rows(log),
        "attempts": reportdata.attempts(log),
        "wall": reportdata.wall_rows(log),
        "config": reportdata.config_lines(log.config, differing),
        "incidents": reportdata.incident_rows(log),
        "incident_count": len(log.incidents),
        "bad_samples": reportdata.bad_sample_rows(log),
        "bad_sample_count": len(log.bad_samples),
        "bad_sample_reasons": reportdata.bad_sample_reasons(log),
    }


def _shown(grids: Sequence[SampleGrid]) -> list[SampleGrid]:
    """At most ``MAX_GRIDS`` of them, evenly spread, the first and the last among them."""
    if len(grids) <= MAX_GRIDS:
        return list(grids)
    return [grids[round(i * (len(grids) - 1) / (MAX_GRIDS - 1))] for i in range(MAX_GRIDS)]


def _grid(grid: SampleGrid) -> dict[str, Any] | None:
    picture = _picture(grid.grid)
    if picture is None:
        return None
    simple = {key: value for key, value in grid.settings.items() if isinstance(value, (str, int, float))}
    settings = " · ".join(f"{key} {value}" for key, value in simple.items())
    return {"step": grid.step, "picture": picture, "prompts": grid.prompts, "settings": settings}


def _picture(file: Path | None) -> dict[str, Any] | None:
    """A picture as a data URI with its size; None when the file is no PNG, JPEG or WebP that can be read whole."""
    if file is None:
        return None
    raw = file.read_bytes()
    try:
        with Image.open(io.BytesIO(raw), formats=("PNG", "JPEG", "WEBP")) as image:
            image.load()
            kind, size = str(image.format), image.size
            if max(size) > MAX_SIDE or len(raw) > _KEEP_BYTES:
                smaller = image.convert("RGB")
                smaller.thumbnail((MAX_SIDE, MAX_SIDE))
                buffer = io.BytesIO()
                smaller.save(buffer, "JPEG", quality=88)
                raw, kind, size = buffer.getvalue(), "JPEG", smaller.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises on a broken file
        return None
    uri = f"data:image/{kind.lower()};base64,{base64.b64encode(raw).decode()}"
    return {"uri": Markup(uri), "width": size[0], "height": size[1]}


def _json(value: object) -> Markup:
    """JSON that is safe inside a script element: no character in it can end the element or start a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _asset(environment: jinja2.Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]
