"""``longskip bench render``: the kernels' measurements as pictures and a page, from the JSON that the measuring half wrote."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from longskip.errors import ConfigError, LongskipError

Row = Mapping[str, Any]

MODES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
# Provider -> colour; ours stands out, the rest follow a colour-blind safe order (Okabe & Ito).
_COLOURS = {"triton": "#d55e00", "auto": "#cc79a7", "torch": "#56b4e9", "compile": "#009e73", "compile-max": "#0072b2"}
_OTHERS = ("#e69f00", "#f0e442", "#999999", "#000000", "#8c564b", "#7f7f7f")


def read(path: Path) -> dict[str, Any]:
    """One result; LongskipError when the file is none."""
    try:
        result = json.loads(path.read_text("utf-8"))
        rows = result["rows"]
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist", cure="longskip bench kernels --out FILE writes one") from error
    except (ValueError, KeyError, TypeError) as error:
        raise LongskipError(
            f"{path} holds no measurements of kernels", cure="longskip bench kernels --out FILE"
        ) from error
    if not any("ms" in row for row in rows):
        raise LongskipError(f"{path} holds no measurement that passed its check", cure="see its rows' `failed`")
    return result  # type: ignore[no-any-return]


def render(path: Path, out: Path | None = None) -> list[Path]:
    """Write the pictures and ``index.html`` with all of them; the files' paths.

    ``roofline.png``; per op ``OP.png``, every case, and ``OP-lines.png``, times against tokens or width, where
    cases of one series have three sizes or more. ``out``: the folder, by default the JSON's name without its ending.
    """
    result = read(path)
    folder = out or path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    roofline = folder / "roofline.png"
    _roofline(result, roofline)
    pictures: dict[str, list[Path]] = {}
    for op in dict.fromkeys(row["op"] for row in result["rows"] if "ms" in row):
        rows = [row for row in result["rows"] if row["op"] == op and "ms" in row]
        drawn = pictures.setdefault(op, [])
        if series := series_of(rows):
            drawn.append(folder / f"{op}-lines.png")
            _lines(op, series, result, drawn[-1])
        if fixed := [row for row in rows if not row.get("sweep")]:
            drawn.append(folder / f"{op}.png")
            _points(op, fixed, result, drawn[-1])
    page = folder / "index.html"
    page.write_text(_page(result, roofline, pictures), "utf-8")
    return [roofline, *(path for drawn in pictures.values() for path in drawn), page]


def series_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Series -> its rows, by size; those of three sizes or more, as fewer make no line."""
    found: dict[str, list[Row]] = {}
    for row in sorted((row for row in rows if row.get("series")), key=lambda row: row["x"]):
        found.setdefault(row["series"], []).append(row)
    return {name: here for name, here in found.items() if len({row["x"] for row in here}) > 2}


def verdicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Ours beside the best other per op, case and mode: ``{"op", "case", "mode", "ours", "best", "ratio", "clear"}``.

    ``ratio`` is the best other's median time over ours; ``clear`` says that the 20–80 percentile spans do not overlap.
    """
    found = []
    for op, case, mode in dict.fromkeys((row["op"], row["case"], row["mode"]) for row in rows if "ms" in row):
        here = [row for row in rows if (row["op"], row["case"], row["mode"]) == (op, case, mode) and "ms" in row]
        ours = [row for row in here if row["ours"]]
        others = [row for row in here if not row["ours"]]
        if ours and others:
            mine = next((row for row in ours if row["provider"] == "triton"), ours[0])
            best = min(others, key=lambda row: row["ms"]["median"])
            apart = mine["ms"]["p80"] < best["ms"]["p20"] or best["ms"]["p80"] < mine["ms"]["p20"]
            ratio = best["ms"]["median"] / mine["ms"]["median"]
            found.append(
                {"op": op, "case": case, "mode": mode, "ours": mine, "best": best, "ratio": ratio, "clear": apart}
            )
    return found


def _providers(rows: Iterable[Row]) -> dict[str, str]:
    """Provider -> colour, in the order of appearance."""
    spare = iter(_OTHERS * 4)
    names = dict.fromkeys(row["provider"] for row in rows)
    return {name: _COLOURS.get(name) or next(spare) for name in names}


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots


def _lines(op: str, series: Mapping[str, Sequence[Row]], result: Mapping[str, Any], path: Path) -> None:
    """Milliseconds against tokens or width, both by logarithm: a row of panels per series, a panel per mode.

    The dotted line is the time that the declared work takes at this run's ceilings.
    """
    from matplotlib.ticker import NullLocator

    colours = _providers([row for rows in series.values() for row in rows])
    modes = [mode for mode in MODES if any(row["mode"] == mode for rows in series.values() for row in rows)]
    figure, subplots = _figure(4.2 * len(modes) + 0.6, 3.4 * len(series) + 0.8)
    grid = subplots(len(series), len(modes), squeeze=False)
    for panels, (name, rows) in zip(grid, series.items(), strict=True):
        sizes = sorted({row["x"] for row in rows})
        for panel, mode in zip(panels, modes, strict=True):
            of_mode = [row for row in rows if row["mode"] == mode]
            least = {row["x"]: row["ms"]["median"] * _share(row) for row in of_mode}
            panel.plot(list(least), list(least.values()), ":", color="#222222", lw=1, label="at this run's ceiling")
            for provider, colour in colours.items():
                points = [row for row in of_mode if row["provider"] == provider]
                times = [[row["ms"][part] for row in points] for part in ("p20", "median", "p80")]
                ours = any(row["ours"] for row in points)
                at = [row["x"] for row in points]
                panel.fill_between(at, times[0], times[2], color=colour, alpha=0.15, lw=0)
                panel.plot(
                    at,
                    times[1],
                    "o-",
                    color=colour,
                    lw=2 if ours else 1.1,
                    ms=4,
                    zorder=3 if ours else 2,
                    label=provider,
                )
            panel.set(xscale="log", yscale="log", xlabel=rows[0]["x_name"])
            panel.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=90, fontsize=7)
            panel.xaxis.set_minor_locator(NullLocator())
            _plain_ticks(panel.yaxis)
            panel.grid(axis="y", color="#dddddd", lw=0.6)
            panel.set_title(f"{op}, {MODES[mode]}\n{name}", fontsize=9)
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("milliseconds, median and 20–80 percentiles", fontsize=8)
    _legend(figure, grid[0][0])
    figure.suptitle(_where(result), fontsize=8, color="#666666")
    figure.savefig(path)


def _plain_ticks(axis: Any) -> None:
    """1, 2, 5, 10, … on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_tick_params(labelsize=7)


def _share(row: Row) -> float:
    """Of the ceiling that counts for the row: the product's where it multiplies, else the copy's."""
    return float(row["matmul_share"] if row.get("flops") else row["copy_share"])


def _legend(figure: Any, panel: Any) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False, fontsize=8)


def _points(op: str, rows: Sequence[Row], result: Mapping[str, Any], path: Path) -> None:
    """Milliseconds of every case by logarithm, so that short ones are seen beside long ones; a panel per mode."""
    colours = _providers(rows)
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, subplots = _figure(4.6 * len(modes) + 0.6, 1.4 + max(1.0, 0.2 * len(cases) * len(colours)))
    panels = subplots(1, len(modes), squeeze=False)[0]
    step = 0.8 / len(colours)
    for panel, mode in zip(panels, modes, strict=True):
        for at, (provider, colour) in enumerate(colours.items()):
            found = {row["case"]: row["ms"] for row in rows if row["provider"] == provider and row["mode"] == mode}
            where = [cases.index(case) + (at - (len(colours) - 1) / 2) * step for case in found]
            medians = [took["median"] for took in found.values()]
            spans = [
                [took["median"] - took["p20"] for took in found.values()],
                [took["p80"] - took["median"] for took in found.values()],
            ]
            panel.errorbar(
                medians, where, xerr=spans, fmt="o", ms=5, color=colour, ecolor=colour, lw=1.2, label=provider
            )
            for took, place in zip(found.values(), where, strict=True):
                panel.text(took["p80"], place, f"  {took['median']:.3g}", va="center", fontsize=7)
        panel.set_xscale("log")
        _plain_ticks(panel.xaxis)
        for edge in range(1, len(cases)):
            panel.axhline(edge - 0.5, color="#dddddd", lw=0.6)
        panel.set_yticks(range(len(cases)), cases if panel is panels[0] else [""] * len(cases), fontsize=8)
        panel.set_ylim(len(cases) - 0.5, -0.5)
        panel.margins(x=0.2)
        panel.set_xlabel("milliseconds, median and 20–80 percentiles", fontsize=8)
        panel.set_title(f"{op}, {MODES[mode]}", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    _legend(figure, panels[0])
    figure.suptitle(_where(result), fontsize=8, color="#666666")
    figure.savefig(path)


def _roofline(result: Mapping[str, Any], path: Path) -> None:
    """Every kernel by FLOPs per byte and TFLOP/s (elementwise ones by bandwidth) under this run's measured ceilings."""
    import numpy as np

    limits = result["ceilings"]
    peak, copy = limits["matmul_tflops"], limits["copy_gbps"]
    figure, subplots = _figure(10, 5)
    left, right = subplots(1, 2, width_ratios=(3, 2))
    rows = [row for row in result["rows"] if "ms" in row and row["mode"] != "both"]
    shown = [row for row in rows if row["ours"]] or rows
    products = [row for row in shown if row.get("flops")]
    ridge = peak * 1e3 / copy
    line = np.logspace(0, np.log10(max([ridge * 8, *(row["flops"] / row["bytes"] * 2 for row in products)])), 200)
    left.plot(line, np.minimum(peak, line * copy / 1e3), color="#222222", lw=1.2)
    sloped = np.sqrt(line[0] * ridge)
    left.annotate(f"{copy:,.0f} GB/s copied  ", (sloped, sloped * copy / 1e3), fontsize=8, ha="right", va="bottom")
    left.annotate(f"{peak:,.3g} TFLOP/s, large product", (line[-1], peak), fontsize=8, ha="right", va="bottom")
    marks = {"forward": "o", "backward": "s"}
    colours = _by_op(products)
    for row in products:
        left.plot(row["flops"] / row["bytes"], row["tflops"], marks[row["mode"]], color=colours[row["op"]], ms=5)
    _keys(left, colours, marks)
    left.set(xscale="log", yscale="log", xlabel="FLOP per byte, each operand once", ylabel="TFLOP/s")
    left.set_title(
        "products" + ("" if shown is not rows else " (plain torch: nothing of ours was measured)"), fontsize=10
    )
    others = [row for row in shown if not row.get("flops")]
    names = list(dict.fromkeys(f"{row['op']} {row['case']} {row['mode']}" for row in others))
    share = [max(r["copy_share"] for r in others if f"{r['op']} {r['case']} {r['mode']}" == name) for name in names]
    right.barh(names, share, color="#d55e00")
    right.axvline(1, color="#222222", lw=1)
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize=max(4, 8 - len(names) // 10))
    right.set_xlabel("share of the copy's bandwidth")
    right.set_title("rows and values", fontsize=10)
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_where(result), fontsize=8, color="#666666")
    figure.savefig(path)


def _by_op(rows: Sequence[Row]) -> dict[str, str]:
    spare = iter(("#d55e00", "#0072b2", "#009e73", "#cc79a7", *_OTHERS) * 2)
    return {op: next(spare) for op in dict.fromkeys(row["op"] for row in rows)}


def _keys(panel: Any, colours: Mapping[str, str], marks: Mapping[str, str]) -> None:
    for op, colour in colours.items():
        panel.plot([], [], "o", color=colour, label=op)
    for mode, mark in marks.items():
        panel.plot([], [], mark, color="#777777", label=mode)
    if colours:
        panel.legend(fontsize=8, frameon=False, loc="lower right")


def _where(result: Mapping[str, Any]) -> str:
    claim = "" if result["claim"] else " · on a CPU: no claim about speed"
    return f"{result['device']} · {result['dtype']} · commit {result['commit']} · {result['date']}{claim}"


def _page(result: Mapping[str, Any], roofline: Path, pictures: Mapping[str, Sequence[Path]]) -> str:
    import jinja2

    from longskip import __version__

    templates = files("longskip.profiling") / "templates"
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string((templates / "bench.html.j2").read_text("utf-8"))
    return template.render(
        result=result,
        where=_where(result),
        modes=MODES,
        verdicts=verdicts(result["rows"]),
        rows=[row for row in result["rows"] if "ms" in row],
        failed=[row for row in result["rows"] if "failed" in row],
        share=_share,
        roofline=_inline(roofline),
        pictures={op: [_inline(path) for path in drawn] for op, drawn in pictures.items()},
        style=(templates / "report.css").read_text("utf-8"),
        version=__version__,
    )


def _inline(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
