"""Pictures of budgets and of scaling-law fits (PNG), and the page of a fit (one HTML file with its pictures inside)."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from longskip.profiling import outputs, units
from longskip.profiling.accounting import LABELS
from longskip.profiling.budget import RunBudget
from longskip.profiling.fits import FrontierFit, Parabola, Point, PowerFit, Prediction
from longskip.profiling.parametric import ParametricFit
from longskip.profiling.predicted import prediction_rows

Fit = FrontierFit | ParametricFit
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
_GREY = "#666666"
_LEGEND = 10


def plot_budgets(budgets: Sequence[RunBudget], path: Path) -> Path:
    """Loss against committed C of every run, and each accounting's FLOPs as a share of the exact ones."""
    bars = len(budgets) * len(LABELS)
    figure, (left, right) = _figure(12.5, min(9.0, max(4.8, 1.6 + 0.13 * bars)), 2, width_ratios=(1.15, 1))
    for index, budget in enumerate(budgets):
        colour = _colour(index, len(budgets))
        if budget.curve:
            flops, losses = zip(*budget.curve, strict=True)
            left.plot(flops, losses, "o-" if len(flops) < 40 else "-", ms=3, lw=1.5, color=colour, label=budget.name)
    left.set(xscale="log", xlabel="C, exact model FLOPs (committed)", ylabel="training loss, smoothed by 0.9")
    left.set_title("what the budget bought")
    if len(budgets) > len(_COLOURS):
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    else:
        _legend(left, len(budgets))
    names = list(LABELS)[1:]
    height = 0.8 / len(budgets)
    for index, budget in enumerate(budgets):
        shares = {account.name: 1 / account.exact_share for account in budget.accounts}
        for at, name in enumerate(names):
            if name in shares and math.isfinite(shares[name]):
                where = at + (index - (len(budgets) - 1) / 2) * height
                label = budget.name if at == 0 else None
                right.barh(where, shares[name], height * 0.92, color=_colour(index, len(budgets)), label=label)
                if len(budgets) <= 6:  # inside the bar: beside it, figures near 1 would lie on the line
                    right.text(
                        shares[name], where, f"{shares[name]:.3f} ", va="center", ha="right", fontsize=8, color="white"
                    )
    right.axvline(1, color="#222222", lw=1)
    right.set_yticks(range(len(names)), [LABELS[name].replace(" (", "\n(") for name in names])
    right.invert_yaxis()
    right.set_xlabel("share of the exact model FLOPs")
    right.set_title("what each accounting would have said")
    _save(figure, path)
    return path


def plot_fit(fit: Fit, folder: Path) -> dict[str, Path]:
    """The pictures of a fit in ``folder``: title → PNG."""
    if isinstance(fit, ParametricFit):
        return {"parametric form": _plot_parametric(fit, folder / "parametric.png")}
    pictures = {"power laws": _plot_lines(fit, folder / "power-laws.png")}
    if fit.parabolas:
        return {"isoFLOP parabolas": _plot_parabolas(fit.parabolas, folder / "isoflop.png")} | pictures
    return pictures


def write_page(fit: Fit, pictures: dict[str, Path], predictions: Sequence[Prediction], origin: str, path: Path) -> Path:
    """One self-contained HTML file: the law, its figures with intervals, the pictures, predictions and points."""
    import jinja2
    from markupsafe import Markup

    from longskip import __version__

    templates = files("longskip.profiling") / "templates"
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.from_string((templates / "fit.html.j2").read_text("utf-8")).render(
        form=fit.as_json()["form"],
        origin=origin,
        rows=figure_rows(fit),
        minima=[parabola.as_json() for parabola in getattr(fit, "parabolas", ())],
        predictions=prediction_rows(predictions),
        warnings=fit.warnings,
        points=sorted(fit.points, key=lambda point: (point.flops, point.params)),
        pictures={title: base64.b64encode(file.read_bytes()).decode() for title, file in pictures.items()},
        law=outputs.json_text(fit.law.as_json(), indent=2),
        scientific=units.scientific,
        count=units.count,
        style=Markup((templates / "report.css").read_text("utf-8")),  # a quote that is escaped ends its rule
        version=__version__,
    )
    return outputs.write_text(path, page)


def figure_rows(fit: Fit) -> list[tuple[str, str, str]]:
    """A fit's figures as texts: name, value, 95% interval (or why there is none)."""
    if isinstance(fit, ParametricFit):
        law = fit.law
        values = {"E": law.irreducible, "A": law.a, "alpha": law.alpha, "B": law.b, "beta": law.beta}
        values["params_exponent"] = law.params_exponent
        names = {"alpha": "α", "beta": "β", "params_exponent": "exponent of N_opt, β/(α+β)"}
        rows = [(names.get(key, key), f"{value:.5g}", _span(fit.intervals[key])) for key, value in values.items()]
        return [*rows, ("scatter of ln L", f"{fit.scatter:.2g}", "root mean square")]
    rows = []
    for name, line in _lines(fit).items():
        rows.append((f"{name}: exponent", f"{line.law.exponent:.4f}", _span(line.exponent_interval, "{:.4f}")))
        rows.append((f"{name}: coefficient", f"{line.law.coefficient:.5g}", _span(line.coefficient_interval)))
    return rows


def _span(interval: tuple[float, float] | None, form: str = "{:.4g}") -> str:
    if interval is None:
        return "needs 4 budgets"
    return f"{form.format(interval[0])} to {form.format(interval[1])}"


def _lines(fit: FrontierFit) -> dict[str, PowerFit]:
    return {"N_opt": fit.params, "D_opt": fit.data, "loss": fit.loss}


def _plot_parabolas(parabolas: Sequence[Parabola], path: Path) -> Path:
    import numpy as np

    figure, (panel,) = _figure(9, 5.6, 1)
    for index, parabola in enumerate(parabolas):
        colour = _colour(index, len(parabolas))
        sizes = [point.params for point in parabola.points]
        grid = np.geomspace(min(sizes) / 1.15, max(sizes) * 1.15, 120)
        panel.plot(grid, [parabola(n) for n in grid], color=colour, lw=1.4)
        panel.plot(sizes, [point.loss for point in parabola.points], "o", ms=5, color=colour,
                   label=units.scientific(parabola.flops))  # fmt: skip
        spread = parabola.params_interval
        error = (
            None if spread is None else [[max(0, parabola.params - spread[0])], [max(0, spread[1] - parabola.params)]]
        )
        panel.errorbar(parabola.params, parabola.loss, xerr=error, fmt="D", ms=7, mfc="white", mec=colour, mew=1.8,
                       ecolor=colour, elinewidth=1.8, capsize=3, zorder=5)  # fmt: skip
    panel.plot([p.params for p in parabolas], [p.loss for p in parabolas], "--", color=_GREY, lw=1, zorder=1)
    panel.set(xscale="log", xlabel="N, parameters", ylabel="loss")
    panel.set_title("isoFLOP parabolas in log N; diamonds: minima with 95% intervals")
    _legend(panel, len(parabolas), title="C, FLOPs", outside=True)
    _save(figure, path)
    return path


def _plot_lines(fit: FrontierFit, path: Path) -> Path:
    import numpy as np

    figure, panels = _figure(13.5, 4.6, 3)
    best: Sequence[Parabola | Point] = fit.parabolas or fit.points
    flops = [one.flops for one in best]
    grid = np.geomspace(min(flops) / 1.5, max(flops) * 10, 80)
    titles = {
        "N_opt": ("params", "parameters"),
        "D_opt": ("tokens", f"{fit.law.tokens} tokens"),
        "loss": ("loss", ""),
    }
    for index, (panel, (name, line)) in enumerate(zip(panels, _lines(fit).items(), strict=True)):
        attribute, unit = titles[name]
        panel.plot(grid, [line.law(c) for c in grid], color=_colour(index), lw=1.5)
        bands = [line.interval(c) for c in grid]
        if bands[0] is not None:
            low, high = zip(*bands, strict=True)  # type: ignore[arg-type]
            panel.fill_between(grid, low, high, color=_colour(index), alpha=0.18, lw=0, label="95% of the line")
        panel.plot(
            flops, [getattr(one, attribute) for one in best], "o", color="#222222", ms=5, label="best of a budget"
        )
        panel.axvspan(max(flops), grid[-1], color="#999999", alpha=0.12, lw=0)
        panel.set(
            xscale="log",
            yscale="log",
            xlabel="C, FLOPs",
            ylabel=f"{name}, {unit}".rstrip(", "),
            xlim=(grid[0], grid[-1]),
        )
        _plain_ticks(panel, [getattr(one, attribute) for one in best], name == "loss")
        panel.set_title(f"{name} = {line.law.coefficient:.4g} · C^{line.law.exponent:.4f}")
        panel.legend(fontsize=8, frameon=False)
    figure.suptitle("grey: beyond the fitted budgets", fontsize=9, color=_GREY)
    _save(figure, path)
    return path


def _plot_parametric(fit: ParametricFit, path: Path) -> Path:
    import numpy as np

    figure, (left, middle, right) = _figure(14, 4.6, 3)
    flops = np.array([point.flops for point in fit.points])
    measured = np.array([point.loss for point in fit.points])
    predicted = np.array([fit.law.loss(point.params, point.tokens) for point in fit.points])
    sizes = np.log10([point.params for point in fit.points])
    dots = left.scatter(predicted, 100 * (measured / predicted - 1), c=sizes, cmap="viridis", s=26)
    left.axhline(0, color="#222222", lw=1)
    left.set(xlabel="predicted loss", ylabel="measured above predicted, %")
    left.set_title("residuals")
    middle.scatter(flops, measured, c=sizes, cmap="viridis", s=26, label="trainings")
    grid = np.geomspace(flops.min(), flops.max() * 10, 80)
    best = [fit.law.optimum(float(c)) for c in grid]
    middle.plot(grid, [one.loss for one in best], color="#d55e00", lw=1.6, label="best of the fit")
    middle.axhline(fit.law.irreducible, color=_GREY, lw=1, ls=":", label=f"E = {fit.law.irreducible:.4g}")
    middle.set(xscale="log", xlabel="C, FLOPs", ylabel="loss")
    middle.set_title("loss against compute")
    middle.legend(fontsize=8, frameon=False)
    right.plot(grid, [one.params for one in best], color="#0072b2", lw=1.6, label="N_opt, parameters")
    right.plot(grid, [one.tokens for one in best], color="#009e73", lw=1.6, label=f"D_opt, {fit.law.tokens} tokens")
    right.set(xscale="log", yscale="log", xlabel="C, FLOPs")
    right.set_title(f"optimum: N ∝ C^{fit.law.params_exponent:.3f}, D ∝ C^{1 - fit.law.params_exponent:.3f}")
    right.legend(fontsize=8, frameon=False)
    for panel in (middle, right):
        panel.axvspan(flops.max(), grid[-1], color="#999999", alpha=0.12, lw=0)
        panel.set_xlim(grid[0] / 1.3, grid[-1])
    figure.colorbar(dots, ax=left, label="log₁₀ N")
    figure.suptitle("grey: beyond the fitted budgets", fontsize=9, color=_GREY)
    _save(figure, path)
    return path


def _plain_ticks(panel: Any, values: Sequence[float], small: bool) -> None:
    """A loss spans less than a decade, where a log axis has no tick of its own."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    if small and max(values) / min(values) < 10:
        panel.yaxis.set_major_locator(MaxNLocator(6))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        panel.yaxis.set_minor_locator(NullLocator())
    else:
        panel.yaxis.set_major_locator(LogLocator(numticks=8))
    panel.yaxis.set_minor_formatter(NullFormatter())


def _figure(width: float, height: float, columns: int, **ratios: Any) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, columns, squeeze=False, gridspec_kw=ratios or None)[0]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _legend(panel: Any, count: int, title: str | None = None, *, outside: bool = False) -> None:
    if not count:
        return
    place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)} if outside else {}
    panel.legend(fontsize=8, frameon=False, title=title, ncols=1 + (count - 1) // _LEGEND, **place)


def _colour(index: int, count: int = 0) -> Any:
    """Of few things a colour-blind safe one each; of many their place on a scale, in the order in which they came."""
    if count <= len(_COLOURS):
        return _COLOURS[index]
    import matplotlib

    return matplotlib.colormaps["viridis"](index / (count - 1))


def _save(figure: Any, path: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    outputs.write_bytes(path, drawn.getvalue())
