"""A profile as one self-contained HTML page: treemap, roofline, 6ND under every accounting, tables (no torch).

Drawings are laid out here, in percent of their frame, so that the page needs no script to be read; its own small script
shows figures under the pointer. A content security policy names that script by its hash and forbids everything else.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from longskip import __version__
from longskip.profiling import outputs
from longskip.profiling import profile_text as words
from longskip.profiling.profiles import Line, Profile, label
from longskip.profiling.roofline import Bound
from longskip.profiling.treemap import Box, squarified
from longskip.profiling.units import count, exact, share

__all__ = ["render_html", "render_profile"]

# The frame that the treemap is laid out for; narrower screens squeeze its width.
_TREE = Box(0.0, 0.0, 1084.0, 500.0)
_HEAD, _GAP = 22.0, 2.0
_COLOURS = 7  # of the page's eight; the last one, grey, is everything else's
_ROOF = (1000.0, 380.0)
_MEASURES: tuple[tuple[str, str, Callable[[Line], int]], ...] = (
    ("hardware", "hardware FLOPs", lambda line: line.hardware),
    ("elementwise", "elementwise FLOPs", lambda line: line.elementwise),
    ("bytes", "bytes moved", lambda line: line.bytes),
)


def render_profile(found: Profile, out: str | os.PathLike[str]) -> Path:
    """Write the page to ``out``, replaced as a whole; ConfigError where that cannot be written."""
    return outputs.write_text(out, render_html(found))


def render_html(found: Profile) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("longskip.profiling", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"integer": exact, "share": share, "flops": words.flops, "bytes": words.bytes_of}
    environment.filters |= {"intensity": words.intensity, "seconds": words.seconds, "place": "{:.3f}".format}
    environment.filters["percent"] = words.percent
    script, style = (
        "".join(_asset(environment, name) for name in names)
        for names in (("profile.js",), ("report.css", "profile.css"))
    )
    colours = _colours(found.lines("op"))
    return environment.get_template("profile.html.j2").render(
        found=found,
        subject=found.subject,
        total=found.total,
        heading=words.heading(found),
        tiles=_tiles(found),
        figures=words.figures(found),
        trees=_trees(found, colours),
        splits=_splits(found),
        roof=_roof(found, colours) if found.device else None,
        bars=_bars(found),
        table=_table(found),
        rows=found.lines("row"),
        bounds=sorted(found.bounds, key=lambda bound: -bound.seconds),
        predicted=found.prediction,
        name_of=words.name_of,
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=__version__,
    )


def _asset(environment: jinja2.Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


# --- figures ----------------------------------------------------------------------------------------------------------


def _tiles(found: Profile) -> list[dict[str, str]]:
    ledger, total = found.ledger, found.total
    per_image = ledger.model_flops // ledger.batch
    tiles = [
        {"label": "Parameters N", "value": count(found.parameters), "note": exact(found.parameters)},
        {
            "label": "Model FLOPs",
            "value": words.si(per_image),
            "note": f"per image, 3 × forward: {exact(per_image)}",
        },
        {
            "label": "Hardware FLOPs",
            "value": words.si(ledger.hardware_flops),
            "note": f"executed in a step of {exact(ledger.batch)}, {ledger.hardware_flops / ledger.model_flops:.4f} × model",
        },
        {
            "label": "Exact ÷ 6ND",
            "value": f"{found.ratio('six_nd'):.4f}",
            "note": f"all tokens; {found.ratio('image_tokens'):.4f} with image tokens alone",
        },
    ]
    if found.device is None:
        moved = words.bytes_of(total.bytes)
        return [
            *tiles,
            {
                "label": "Bytes moved",
                "value": moved,
                "note": f"a step; {words.intensity(total.intensity)} FLOPs a byte",
            },
        ]
    ceiling = "no MFU: rates were measured" if found.mfu_ceiling is None else f"MFU at most {share(found.mfu_ceiling)}"
    step = {"label": f"Shortest step on {found.device.name}", "value": words.seconds(found.bound_seconds)}
    return [*tiles, step | {"note": f"the roofline's bound; {ceiling}"}]


def _splits(found: Profile) -> list[dict[str, Any]]:
    """Bars of shares: executed contractions by pass, the forward by tokens and by weights."""
    total, ledger = found.total, found.ledger
    passes = {
        "forward": total.forward, "backward": total.backward, "recomputed": total.recomputed,
        "repeated in attention": total.repeated,
    }  # fmt: skip
    weights = {words.WEIGHTS[name]: value for name, value in ledger.forward_by_parameters().items()}
    tokens = {str(name): value for name, value in ledger.forward_by_tokens().items()}
    found_splits = []
    for title, parts in (
        ("Executed, by pass", passes), ("Forward, by token", tokens), ("Forward, by how often weights act", weights),
    ):  # fmt: skip
        whole = sum(parts.values())
        kept = [
            {"name": name, "value": value, "share": value / whole, "colour": index % _COLOURS}
            for index, (name, value) in enumerate(sorted(parts.items(), key=lambda item: -item[1]))
            if value
        ]
        found_splits.append({"title": title, "parts": kept, "whole": whole})
    return found_splits


def _bars(found: Profile) -> list[dict[str, Any]]:
    longest = max(account.flops for account in found.accounts)
    return [
        {
            "label": label(account),
            "exact": account.name == "exact",
            "flops": account.flops,
            "share": account.flops / longest,
            "ratio": account.exact_share,
            "of": "" if account.params is None else f"N {count(account.params)}, D {exact(account.tokens)}",
        }
        for account in found.accounts
    ]


def _table(found: Profile) -> list[tuple[Line, list[Line]]]:
    lines = found.lines("op")
    return [(block, [line for line in lines if line.block == block.block]) for block in found.lines("block")]


# --- treemap ----------------------------------------------------------------------------------------------------------


def _colours(lines: Sequence[Line]) -> dict[str, int]:
    """An op's colour wherever it stands: those with the largest share of any measure have one of their own, the others
    share the last."""
    largest: dict[str, float] = {}
    for _, _, measure in _MEASURES:
        sums: dict[str, int] = {}
        for line in lines:
            sums[line.name] = sums.get(line.name, 0) + measure(line)
        whole = sum(sums.values()) or 1
        largest = {name: max(largest.get(name, 0.0), value / whole) for name, value in sums.items()}
    order = sorted(largest, key=lambda name: -largest[name])
    return {name: min(at, _COLOURS) for at, name in enumerate(order)}


def _key(colours: dict[str, int], groups: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
    """The names of the colours that stand in these groups."""
    there = {cell["colour"] for group in groups for cell in group["cells"]}
    own = [(name, colour) for name, colour in colours.items() if colour < _COLOURS]
    return [(name, colour) for name, colour in (*own, ("others", _COLOURS)) if colour in there]


def _trees(found: Profile, colours: dict[str, int]) -> list[dict[str, Any]]:
    """A treemap per measure: blocks, and the ops within them; places in percent across and in pixels down."""
    blocks, lines = found.lines("block"), found.lines("op")
    trees = []
    for name, title, measure in _MEASURES:
        whole = sum(measure(block) for block in blocks)
        if not whole:
            continue
        groups = []
        for block, box in zip(blocks, squarified([measure(block) for block in blocks], _TREE), strict=True):
            own = [line for line in lines if line.block == block.block]
            head = _HEAD if box.height > 3 * _HEAD and box.width > 60 else 0.0
            inner = box.inner(_GAP, head)
            cells = [
                _cell(line, measure(line), whole, cell, colours)
                for line, cell in zip(own, squarified([measure(line) for line in own], inner), strict=True)
                if cell.width > 0.2 and cell.height > 0.2
            ]
            if cells:
                groups.append({
                    "name": words.name_of(block), "share": measure(block) / whole, "cells": cells, "head": bool(head),
                    "x": 100 * (box.x + _GAP) / _TREE.width, "y": box.y + 2 + 13, "width": 100 * box.width / _TREE.width,
                })  # fmt: skip
        trees.append({"name": name, "title": title, "whole": whole, "groups": groups, "key": _key(colours, groups)})
    return trees


def _cell(line: Line, value: int, whole: int, box: Box, colours: dict[str, int]) -> dict[str, Any]:
    share_of = value / whole
    wide = box.width > 7.2 * len(line.name) + 12
    return {
        "x": 100 * box.x / _TREE.width,
        "y": box.y,
        "width": 100 * max(box.width - 1, 0.2) / _TREE.width,
        "height": max(box.height - 1, 0.2),
        "colour": colours[line.name],
        "name": line.name if wide and box.height > 20 else "",
        "share": share(share_of) if wide and box.height > 38 and box.width > 52 else "",
        "tip": "\n".join(_tip(line, share_of)),
    }


def _tip(line: Line, share_of: float) -> list[str]:
    """The first line is its head; the others are ``name: figure``."""
    passes = {
        "forward": line.forward, "backward": line.backward, "recomputed": line.recomputed, "repeated": line.repeated,
        "elementwise": line.elementwise, "padded": line.padded,
    }  # fmt: skip
    several = f" ×{len(line.units)}" if len(line.units) > 1 else ""
    return [
        f"{line.block}{several} · {line.name}: {share(share_of)}",
        *(f"{name}: {exact(value)} FLOPs" for name, value in passes.items() if value),
        f"bytes: {exact(line.bytes)}" if line.bytes else "bytes: not counted",
        f"intensity: {words.intensity(line.intensity)} FLOPs a byte",
    ]


# --- roofline ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axes:
    """Logarithmic axes; places in percent of the frame."""

    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, intensity: float, rate: float) -> tuple[float, float]:
        def place(value: float, ends: tuple[float, float]) -> float:
            return 100 * (math.log(value) - math.log(ends[0])) / (math.log(ends[1]) - math.log(ends[0]))

        return place(intensity, self.x), 100 - place(rate, self.y)


def _roof(found: Profile, colours: dict[str, int]) -> dict[str, Any]:
    """Intensity against the FLOP/s that the device allows: its roof, and every op's passes as points under it."""
    device, dtype = found.device, found.subject.precision
    assert device is not None
    peak, bandwidth = device.peak(dtype), device.bandwidth
    ridge = peak / bandwidth
    points = [bound for bound in found.bounds if bound.intensity]
    spread = [bound.intensity or 1.0 for bound in points] + [ridge]
    x = (min(spread) / 2, max(spread) * 3)
    y = (min([bound.attainable for bound in points] + [x[0] * bandwidth]) / 2, peak * 2.5)
    axes = _Axes(x, y)
    work = max(bound.flops + bound.elementwise for bound in points)
    circles = [
        _point(bound, axes, colours, math.sqrt((bound.flops + bound.elementwise) / work))
        for bound in sorted(points, key=lambda bound: -(bound.flops + bound.elementwise))
    ]
    _label(circles)
    slope = [axes.at(x[0], x[0] * bandwidth), axes.at(ridge, peak), axes.at(x[1], peak)]
    return {
        "device": device,
        "dtype": dtype,
        "peak": words.si(peak, "FLOP/s"),
        "bandwidth": words.si(bandwidth, "B/s"),
        "ridge": words.intensity(ridge),
        "segments": list(pairwise(slope)),
        "ridge_at": axes.at(ridge, peak),
        "vector": _vector(found, axes),
        "points": circles,
        "across": [(axes.at(10.0**power, y[0])[0], _power(power)) for power in _powers(x)],
        "up": [
            (axes.at(x[0], 10.0**power)[1], words.si(10.0**power, "FLOP/s").replace(".00", "").replace(".0", ""))
            for power in _powers(y)
        ],
    }


def _vector(found: Profile, axes: _Axes) -> dict[str, Any] | None:
    """The lower ceiling of elementwise work, where it is lower."""
    device = found.device
    assert device is not None
    rate = device.peak("fp32")
    if rate >= device.peak(found.subject.precision):
        return None
    start, y = axes.at(rate / device.bandwidth, rate)
    return {"x": start, "y": y, "name": f"elementwise: {words.si(rate, 'FLOP/s')} in fp32"}


def _point(bound: Bound, axes: _Axes, colours: dict[str, int], size: float) -> dict[str, Any]:
    x, y = axes.at(bound.intensity or 1.0, bound.attainable)
    lines = [
        f"{bound.block} · {bound.name}, {bound.phase}",
        f"bound by: {bound.binds}",
        f"contractions: {exact(bound.flops)} FLOPs",
        f"elementwise: {exact(bound.elementwise)} FLOPs",
        f"bytes: {exact(bound.bytes)}",
        f"intensity: {words.intensity(bound.intensity)} FLOPs a byte",
        f"at least: {words.seconds(bound.seconds)}, {words.si(bound.attainable, 'FLOP/s')} at most",
    ]
    return {
        "x": x, "y": y, "radius": 3.5 + 13 * size, "colour": colours[bound.name], "phase": bound.phase,
        "name": bound.name, "label": "", "place": "", "slope": bound.binds == "memory", "tip": "\n".join(lines),
    }  # fmt: skip


def _label(circles: Sequence[dict[str, Any]]) -> None:
    """Names beside the points, the largest first, each op once, where they do not cover one another: above or below the
    flat roof, and to the lower right of the slope."""
    taken: list[Box] = []
    named: set[str] = set()
    width, height = _ROOF
    for circle in circles:
        x, y, radius = circle["x"] / 100 * width, circle["y"] / 100 * height, circle["radius"]
        long = 6.6 * len(circle["name"]) + 6
        places = {
            "above": Box(x - long / 2, y - radius - 17, long, 14),
            "below": Box(x - long / 2, y + radius + 3, long, 14),
        }
        if circle["slope"]:
            places = {"beside": Box(x + radius + 2, y + 1, long, 14)}
        for place, box in places.items():
            free = box.x > 0 and box.x + box.width < width and not any(_meet(box, other) for other in taken)
            if free and circle["name"] not in named:
                circle |= {"label": circle["name"], "place": place}
                taken.append(box)
                named.add(circle["name"])


def _meet(a: Box, b: Box) -> bool:
    return a.x < b.x + b.width and b.x < a.x + a.width and a.y < b.y + b.height and b.y < a.y + a.height


def _powers(ends: tuple[float, float]) -> list[int]:
    return list(range(math.ceil(math.log10(ends[0])), math.floor(math.log10(ends[1])) + 1))


def _rate(power: int) -> str:
    """A power of ten in FLOP/s, without decimals."""
    number, unit = words.si(10.0**power, "FLOP/s").split(" ")
    return f"{float(number):.0f} {unit}"


def _power(power: int) -> str:
    return f"{10.0**power:,.{max(0, -power)}f}"
