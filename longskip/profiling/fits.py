"""Fits of scaling laws: power laws and isoFLOP parabolas, with bootstrap intervals.

Intervals of straight lines and of minima are bootstrap-t: studentised, over smoothed residuals. With the handful of
budgets that people can afford, percentiles of plain resamples are far too narrow, and unsmoothed ones studentise by a
scatter that is nearly zero now and then. Intervals say how far the scatter reaches, not whether the form is right. Every
draw is seeded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from longskip.errors import ConfigError
from longskip.profiling.laws import FrontierLaw, Interval, Optimum, PowerLaw, Tokens

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

LEVEL = 0.95
SAME_BUDGET = 1.02
SMOOTHING = 0.5  # of the scatter; 0.25 is unsteady at 4 points, 1 is nearly Student's t
MIN_BUDGETS = 3
MIN_SIZES = 3
UNLIKELY = 0.01  # a bend that scatter alone makes less often than this is told
_LARGEST = 700.0  # whose exponential a float still holds
_NEGLIGIBLE = 1e-6  # of a value: what rounding leaves, not scatter


@dataclass(frozen=True, slots=True)
class Point:
    """One finished training: C in FLOPs, N, D, and the loss it ended with; ``origin`` says where it was read."""

    flops: float
    params: float
    tokens: float
    loss: float
    origin: str


@dataclass(frozen=True)
class PowerFit:
    """y = a·x^b by least squares in logs. Intervals are None below 4 points: three leave one residual to judge by."""

    law: PowerLaw
    exponent_interval: Interval | None
    coefficient_interval: Interval | None
    scatter: float
    n: int
    _draws: _Line | None = field(repr=False, compare=False)

    def interval(self, x: float) -> Interval | None:
        """Confidence interval of the line (not of a new point) at x."""
        import math

        if self._draws is None:
            return None
        low, high = self._draws.interval(math.log(x))
        return math.exp(min(low, _LARGEST)), math.exp(min(high, _LARGEST))

    def as_json(self) -> dict[str, Any]:
        return self.law.as_json() | {
            "exponent_interval": _pair(self.exponent_interval),
            "coefficient_interval": _pair(self.coefficient_interval),
            "level": LEVEL,
            "scatter": self.scatter,
            "points": self.n,
        }


@dataclass(frozen=True)
class Parabola:
    """Loss against ln N at one budget, and its minimum: ``params`` N_opt, ``tokens`` D_opt, ``loss``.

    ``curve``: (curvature, slope, height) about ``centre``, the mean of ln N. ``params_interval`` is None below 5 sizes.
    """

    flops: float
    points: tuple[Point, ...]
    curve: tuple[float, float, float]
    centre: float
    params: float
    tokens: float
    loss: float
    params_interval: Interval | None

    def __call__(self, params: float) -> float:
        import math

        u = math.log(params) - self.centre
        return self.curve[0] * u * u + self.curve[1] * u + self.curve[2]

    def as_json(self) -> dict[str, Any]:
        return {
            "flops": self.flops,
            "sizes": len(self.points),
            "params": self.params,
            "tokens": self.tokens,
            "loss": self.loss,
            "params_interval": _pair(self.params_interval),
        }


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a fit says of a budget, and the intervals of it: of the law, not of one more training; None without any."""

    best: Optimum
    params: Interval | None
    tokens: Interval | None
    loss: Interval | None

    def as_json(self) -> dict[str, Any]:
        spans = {name: _pair(getattr(self, name)) for name in ("params", "tokens", "loss")}
        values = {name: getattr(self.best, name) for name in ("flops", *spans, "extrapolation")}
        return values | {f"{name}_interval": span for name, span in spans.items()}


@dataclass(frozen=True)
class FrontierFit:
    """Power laws of the best N, D and loss against C; ``parabolas`` is empty where points were taken as optima.

    ``warnings``: where the points do not lie as these laws say, a sentence each.
    """

    law: FrontierLaw
    params: PowerFit
    data: PowerFit
    loss: PowerFit
    points: tuple[Point, ...]
    parabolas: tuple[Parabola, ...] = ()
    warnings: tuple[str, ...] = ()

    def predict(self, flops: float) -> Prediction:
        """The best N, D and loss of ``flops``, with intervals; ConfigError for a budget that is none."""
        best = self.law.optimum(flops)
        return Prediction(best, *(line.interval(best.flops) for line in (self.params, self.data, self.loss)))

    def as_json(self) -> dict[str, Any]:
        return {
            "form": "isoflop" if self.parabolas else "power",
            "points": len(self.points),
            "law": self.law.as_json(),
            "params": self.params.as_json(),
            "data": self.data.as_json(),
            "loss": self.loss.as_json(),
            "minima": [parabola.as_json() for parabola in self.parabolas],
            "warnings": list(self.warnings),
        }


def fit_power(x: Sequence[float], y: Sequence[float], *, seed: int = 0, resamples: int = 2000) -> PowerFit:
    """y = a·x^b by least squares in logs; ConfigError below 3 different x or for numbers that have no logarithm."""
    import numpy as np

    if len(x) != len(y):
        raise ConfigError(f"{len(x)} x for {len(y)} y", cure="give one y for each x")
    if not all(0 < value < float("inf") for value in (*x, *y)):
        raise ConfigError("a power law needs positive finite numbers", cure="remove rows with 0, negatives or NaN")
    if len({float(value) for value in x}) < MIN_BUDGETS:
        raise ConfigError(
            f"a power law needs {MIN_BUDGETS} different budgets, got {len({float(value) for value in x})}",
            cure="two points lie on a line whatever they are; train at more budgets",
        )
    draws = _Line(np.log(np.asarray(x, float)), np.log(np.asarray(y, float)), seed, resamples)
    law = PowerLaw(float(np.exp(draws.at(0.0))), draws.slope)
    if len(x) < 4:
        return PowerFit(law, None, None, draws.scatter, len(x), None)
    low, high = draws.interval(0.0)
    with np.errstate(over="ignore"):
        coefficient = (float(np.exp(low)), float(np.exp(high)))
    return PowerFit(law, draws.slope_interval(), coefficient, draws.scatter, len(x), draws)


def fit_isoflop(points: Iterable[Point], *, tokens: Tokens = "all", seed: int = 0) -> FrontierFit:
    """A parabola of the loss in ln N per budget, and power laws through their minima (2203.15556, approach 2).

    ConfigError below 3 budgets or 3 sizes a budget, or where a budget's parabola has no minimum among its sizes; it
    says which sizes to train.
    """
    points = tuple(points)
    groups = by_budget(points)
    few = [group for group in groups if len({point.params for point in group}) < MIN_SIZES]
    if few or len(groups) < MIN_BUDGETS:
        shown = ", ".join(f"{g[0].flops:.3g} FLOPs: {len({p.params for p in g})}" for g in groups[:8])
        raise ConfigError(
            f"isoFLOP curves need {MIN_BUDGETS} budgets of {MIN_SIZES} sizes each; got {len(groups)} budget(s), "
            f"sizes at {shown}{', …' if len(groups) > 8 else ''}",
            cure=f"train more sizes at the same C (C within {SAME_BUDGET - 1:.0%} counts as one budget), or take "
            "--form parametric, which needs no common budgets",
        )
    curves = tuple(_parabola(group, seed + index) for index, group in enumerate(groups))
    budgets = [curve.flops for curve in curves]
    return _frontier(budgets, curves, points, tokens, "isoFLOP parabolas", seed, curves)


def fit_frontier(points: Iterable[Point], *, tokens: Tokens = "all", seed: int = 0) -> FrontierFit:
    """Power laws through points that are each the best of their budget already. ConfigError below 3 budgets."""
    points = tuple(sorted(points, key=lambda point: point.flops))
    for group in by_budget(points):
        if len(group) > 1:
            raise ConfigError(
                f"{len(group)} points have the budget {group[0].flops:.3g} FLOPs, and --form power takes each for the "
                "best of its own",
                cure="take --form isoflop to find the best of every budget, or give one row a budget",
            )
    return _frontier([point.flops for point in points], points, points, tokens, "power laws", seed, ())


def by_budget(points: Iterable[Point]) -> list[tuple[Point, ...]]:
    """The points in groups of one budget, in order of C: within 2% of the group's least C."""
    groups: list[list[Point]] = []
    for point in sorted(points, key=lambda point: (point.flops, point.params)):
        if groups and point.flops <= groups[-1][0].flops * SAME_BUDGET:
            groups[-1].append(point)
        else:
            groups.append([point])
    return [tuple(sorted(group, key=lambda point: point.params)) for group in groups]


def _frontier(
    budgets: Sequence[float],
    best: Sequence[Point] | Sequence[Parabola],
    points: tuple[Point, ...],
    tokens: Tokens,
    how: str,
    seed: int,
    parabolas: tuple[Parabola, ...],
) -> FrontierFit:
    lines = [
        fit_power(budgets, [getattr(one, name) for one in best], seed=seed) for name in ("params", "tokens", "loss")
    ]
    params, data, loss = lines
    law = FrontierLaw(
        name="fit",
        source=f"your own fit, {how}",
        params=params.law,
        data=data.law,
        loss=loss.law,
        budgets=(min(budgets), max(budgets)),
        tokens=tokens,
        intervals={"level": LEVEL} | {
            name: {"exponent": _pair(line.exponent_interval), "coefficient": _pair(line.coefficient_interval)}
            for name, line in (("params", params), ("data", data), ("loss", loss))
        },
    )  # fmt: skip
    return FrontierFit(law, params, data, loss, points, parabolas, tuple(_misses(budgets, best, lines, parabolas)))


def _misses(
    budgets: Sequence[float],
    best: Sequence[Point] | Sequence[Parabola],
    lines: Sequence[PowerFit],
    parabolas: Sequence[Parabola],
) -> Iterator[str]:
    """Where a straight line misses its points by more than these scatter about a curve, or about their parabolas."""
    import math

    x = [math.log(flops) for flops in budgets]
    named = (("N_opt", "params"), ("D_opt", "tokens"), ("loss", "loss"))
    for (name, attribute), line in zip(named, lines, strict=True):
        if line.scatter < _NEGLIGIBLE:
            continue
        y = [math.log(getattr(one, attribute)) for one in best]
        chance, bend = _curvature(x, y)
        if name == "loss":
            chance = min(chance, _beyond_parabolas(line.scatter, parabolas))
        if chance > UNLIKELY:
            continue
        off = max(abs(math.expm1(math.log(line.law(c)) - value)) for c, value in zip(budgets, y, strict=True))
        said = (
            f"{name} does not lie on a straight line in log–log: it misses its own points by up to {100 * off:.2g}%, "
            f"more than they scatter (a chance of {chance:.1g})"
        )
        if name == "loss" and bend > 0:
            said += (
                "; the loss flattens, as one does that cannot fall below a constant: a form with one fits better "
                "(--form parametric), and this line promises too low a loss beyond the largest budget"
            )
        yield said


def _curvature(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """How likely scatter alone would bend a line as much as the points (two-sided t of the square term), and the bend;
    1 where no point is left over to judge by."""
    import numpy as np
    from scipy import stats

    u = np.asarray(x) - np.mean(x)
    design = np.stack([u * u, u, np.ones_like(u)], axis=1)
    curve, *_ = np.linalg.lstsq(design, np.asarray(y), rcond=None)
    left = len(u) - 3
    if left < 1:
        return 1.0, float(curve[0])
    residuals = np.asarray(y) - design @ curve
    error = float(np.sqrt((residuals**2).sum() / left * np.linalg.inv(design.T @ design)[0, 0]))
    return (float(2 * stats.t.sf(abs(curve[0]) / error, left)) if error > 0 else 0.0), float(curve[0])


def _beyond_parabolas(scatter: float, parabolas: Sequence[Parabola]) -> float:
    """How likely the minima would miss their line by ``scatter`` (n − 2 degrees of freedom) if they scattered as the
    trainings do about their parabolas (F); 1 where these have no point left over."""
    from scipy import stats

    left = sum(len(one.points) - 3 for one in parabolas)
    if left < 2:
        return 1.0
    square = sum((one(p.params) / p.loss - 1) ** 2 for one in parabolas for p in one.points) / left
    ratio = scatter**2 / max(square, _NEGLIGIBLE**2)
    return float(stats.f.sf(ratio, len(parabolas) - 2, left))


def _parabola(group: tuple[Point, ...], seed: int) -> Parabola:
    import numpy as np

    x = np.log([point.params for point in group])
    centre = float(x.mean())
    u, y = x - centre, np.asarray([point.loss for point in group])
    design = np.stack([u * u, u, np.ones_like(u)], axis=1)
    solve = np.asarray(np.linalg.pinv(design), dtype=np.float64)
    curve = solve @ y
    curvature, slope, height = (float(value) for value in curve)
    sizes = [point.params for point in group]
    vertex = -slope / (2 * curvature) if curvature > 0 else np.nan
    if not u.min() <= vertex <= u.max():
        least = min(group, key=lambda point: point.loss)
        falling = least.params == max(sizes) or (curvature > 0 and vertex > u.max())
        side = f"above {max(sizes):.4g}" if falling else f"below {min(sizes):.4g}"
        bend = "opens downwards" if curvature <= 0 else f"has its minimum at N = {np.exp(vertex + centre):.4g}"
        raise ConfigError(
            f"at {group[0].flops:.3g} FLOPs the parabola of the loss in log N {bend}, not among the sizes "
            f"{min(sizes):.4g} to {max(sizes):.4g}",
            cure=f"train sizes {side} parameters at this budget until the loss rises on both sides"
            if curvature > 0 or least.params in (min(sizes), max(sizes))
            else "look for a diverged or an unfinished training among these points",
        )
    flops = float(np.exp(np.mean(np.log([point.flops for point in group]))))
    # C = k·N·D with k = 6 by the rule of thumb; with exact FLOPs k depends on the size, so D is read off at the minimum
    k = np.polyfit(u, np.log([point.flops / (point.params * point.tokens) for point in group]), 1)
    params = float(np.exp(vertex + centre))
    return Parabola(
        flops=flops,
        points=group,
        curve=(curvature, slope, height),
        centre=centre,
        params=params,
        tokens=flops / (params * float(np.exp(np.polyval(k, vertex)))),
        loss=height - slope**2 / (4 * curvature),
        params_interval=_vertex_interval(design, solve, curve, y, centre, seed),
    )


def _vertex_interval(
    design: Array, solve: Array, curve: Array, y: Array, centre: float, seed: int, resamples: int = 2000
) -> Interval | None:
    """Where the parabola's slope may be 0: bootstrap-t of the slope at the minimum, carried over by the curvature."""
    import numpy as np

    n = len(y)
    if n < 5:
        return None
    vertex = -curve[1] / (2 * curve[0])
    direction = np.array([2 * vertex, 1.0, 0.0])  # d/du at the vertex, as a combination of the coefficients
    residuals = y - design @ curve
    spread = float(np.sqrt(direction @ solve @ solve.T @ direction))
    deviation = float(np.sqrt((residuals**2).sum() / (n - 3)))
    noise = _resampled(residuals, deviation, seed, resamples)
    moved = noise @ solve.T  # coefficients of resampled noise alone
    scatter = np.sqrt(((noise - moved @ design.T) ** 2).sum(axis=1) / (n - 3))
    t = _studentised(moved @ direction, scatter * spread)
    tails = (1 - LEVEL) / 2
    low, high = (float(np.quantile(t, share)) for share in (tails, 1 - tails)) if len(t) else (0.0, 0.0)
    unit = deviation * spread / (2 * float(curve[0]))
    return float(np.exp(vertex - high * unit + centre)), float(np.exp(vertex - low * unit + centre))


class _Line:
    """A least-squares line with residual bootstrap; values and intervals at any x."""

    def __init__(self, x: Array, y: Array, seed: int, resamples: int) -> None:
        import numpy as np

        n = len(x)
        self.centre, self.height = float(x.mean()), float(y.mean())
        u = x - self.centre
        self.square, self.n = float((u**2).sum()), n
        self.slope = float((u * y).sum() / self.square)
        residuals = y - self.height - self.slope * u
        self.scatter = float(np.sqrt((residuals**2).sum() / (n - 2)))
        noise = _resampled(residuals, self.scatter, seed, resamples)
        self._heights, self._slopes = noise.mean(axis=1), noise @ u / self.square
        rest = noise - self._heights[:, None] - self._slopes[:, None] * u
        self._scatters = np.sqrt((rest**2).sum(axis=1) / (n - 2))

    def at(self, x: float) -> float:
        return self.height + self.slope * (x - self.centre)

    def slope_interval(self) -> Interval:
        return self._interval(self.slope, self._slopes, self.square**-0.5)

    def interval(self, x: float) -> Interval:
        away = x - self.centre
        spread = float((1 / self.n + away**2 / self.square) ** 0.5)
        return self._interval(self.at(x), self._heights + self._slopes * away, spread)

    def _interval(self, value: float, moved: Array, spread: float) -> Interval:
        import numpy as np

        t = _studentised(moved, self._scatters * spread)
        if not len(t):
            return value, value
        tails = (1 - LEVEL) / 2
        low, high = (float(np.quantile(t, share)) for share in (tails, 1 - tails))
        return value - high * self.scatter * spread, value - low * self.scatter * spread


def _resampled(residuals: Array, deviation: float, seed: int, resamples: int) -> Array:
    """Noise (resamples, n): residuals drawn with replacement, and smoothed."""
    import numpy as np

    rng, shape = np.random.default_rng(seed), (resamples, len(residuals))
    return rng.choice(residuals, shape) + SMOOTHING * deviation * rng.standard_normal(shape)


def _studentised(moved: Array, errors: Array) -> Array:
    """moved ÷ its own standard error; nothing where there is no scatter to resample."""
    known = errors > 0
    return moved[known] / errors[known]


def _pair(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)
