"""The parametric scaling law L(N, D) = E + A/N^α + B/D^β fitted to finished trainings (arXiv 2203.15556, approach 3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from longskip.errors import ConfigError
from longskip.profiling.fits import LEVEL, Point, Prediction
from longskip.profiling.laws import Interval, Optimum, ParametricLaw, Tokens

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

MIN_POINTS = 8
HUBER_DELTA = 1e-3  # arXiv 2203.15556, eq. 3

_PREDICTED = ("params", "tokens", "loss")
_CONSTANTS = ("E", "A", "alpha", "B", "beta", "params_exponent")


@dataclass(frozen=True)
class ParametricFit:
    """L(N, D) = E + A/N^α + B/D^β; ``intervals`` by names ``E A alpha B beta params_exponent``.

    ``scatter`` is the root mean square of the residuals of ln L; ``starts`` how many starts were descended from;
    ``draws`` the laws of the resampled points.
    """

    law: ParametricLaw
    intervals: dict[str, Interval]
    scatter: float
    starts: int
    points: tuple[Point, ...]
    draws: tuple[ParametricLaw, ...] = field(default=(), repr=False, compare=False)
    warnings: tuple[str, ...] = ()

    def predict(self, flops: float) -> Prediction:
        """The best N, D and loss of ``flops``; intervals are percentiles over what the draws say of it. ConfigError for a
        budget that is none."""
        best = self.law.optimum(flops)
        found = [one for draw in self.draws if (one := _optimum(draw, flops)) is not None]
        if not found:
            return Prediction(best, None, None, None)
        return Prediction(best, *(percentiles([getattr(one, name) for one in found]) for name in _PREDICTED))

    def as_json(self) -> dict[str, Any]:
        return {
            "form": "parametric",
            "points": len(self.points),
            "law": self.law.as_json(),
            "params_exponent": self.law.params_exponent,
            "intervals": {name: list(pair) for name, pair in self.intervals.items()},
            "level": LEVEL,
            "scatter": self.scatter,
            "starts": self.starts,
            "warnings": list(self.warnings),
        }


def fit_parametric(
    points: Iterable[Point], *, tokens: Tokens = "all", seed: int = 0, resamples: int = 200
) -> ParametricFit:
    """L(N, D) by the Huber loss (δ = 1e-3) of ln L, L-BFGS over a grid of starts (2203.15556, approach 3).

    The grid is laid about the data's own means; the best starts of it are descended from, and the lowest end counts.
    Intervals are percentiles over resampled points. ConfigError below 8 points or 3 sizes or 3 token counts, where N and
    D go together so closely that their terms cannot be told apart, or where the loss falls with only one of them.
    """
    import numpy as np

    points = tuple(points)
    sizes, seen = {point.params for point in points}, {point.tokens for point in points}
    if len(points) < MIN_POINTS or len(sizes) < 3 or len(seen) < 3:
        raise ConfigError(
            f"the parametric form has 5 numbers and needs {MIN_POINTS} points with 3 sizes and 3 token counts; got "
            f"{len(points)} points, {len(sizes)} sizes, {len(seen)} token counts",
            cure="add trainings of other sizes and lengths",
        )
    x, z, y = (np.log([getattr(point, name) for point in points]) for name in ("params", "tokens", "loss"))
    correlation = float(np.corrcoef(x, z)[0, 1])
    if abs(correlation) > 0.999:
        raise ConfigError(
            f"N and D go together (correlation of their logarithms {correlation:.4f}): the terms A/N^α and B/D^β "
            "cannot be told apart",
            cure="train one size for several lengths, and one length with several sizes",
        )
    problem = _Parametric(x, z, y)
    starts = problem.starts()
    ends = [problem.descend(start, 300) for start in starts]
    best = min(ends, key=lambda end: end[1])[0]
    for _ in range(3):  # a new start clears the memory of curvature where the valley has bent
        best = problem.descend(best, 2000)[0]
    if not (0 < best[3] < 20 and 0 < best[4] < 20):
        raise ConfigError(
            f"the fit ends at α = {best[3]:.3g}, β = {best[4]:.3g}: the loss does not fall with both N and D",
            cure="widen the range of sizes and token counts, or look for diverged trainings among the points",
        )
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(resamples):
        chosen = rng.integers(0, len(points), len(points))
        if len({points[i].params for i in chosen}) >= 3 and len({points[i].tokens for i in chosen}) >= 3:
            resampled = _Parametric(x[chosen], z[chosen], y[chosen], centres=problem.centres)
            rows.append(problem.constants(resampled.descend(best, 1000)[0]))
    intervals = {name: percentiles([row[i] for row in rows]) for i, name in enumerate(_CONSTANTS)}
    c = sorted(point.flops for point in points)
    law = replace(
        _law(problem.constants(best)), source="your own fit, parametric form", budgets=(c[0], c[-1]), tokens=tokens,
        intervals={"level": LEVEL} | {name: list(pair) for name, pair in intervals.items()},
    )  # fmt: skip
    return ParametricFit(
        law,
        intervals,
        float(np.sqrt(np.mean(problem.residuals(best) ** 2))),
        len(starts),
        points,
        tuple(_law(row) for row in rows if _sound(row)),
    )


def _law(constants: Sequence[float]) -> ParametricLaw:
    e, a, alpha, b, beta = constants[:5]
    return ParametricLaw("fit", "", e, a, alpha, b, beta)


def percentiles(values: Sequence[float]) -> Interval:
    """The middle 95% of the values."""
    import numpy as np

    tails = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(np.asarray(values), [tails, 100 - tails])
    return float(low), float(high)


def _optimum(law: ParametricLaw, flops: float) -> Optimum | None:
    """None where the law's numbers are so far apart that its optimum is none."""
    try:
        return law.optimum(flops)
    except ConfigError:
        return None


def _sound(constants: Sequence[float]) -> bool:
    """Whether a law with these has an optimum: resampled points can leave one of the two exponents at nothing."""
    return all(0 < value < float("inf") for value in constants[:5])


class _Parametric:
    """min over θ = (u, v, e, α, β) of Σ huber(logsumexp(u − αx, v − βz, e) − ln L), x and z about their means."""

    def __init__(self, x: Array, z: Array, y: Array, centres: tuple[float, float] | None = None) -> None:
        self.centres = centres or (float(x.mean()), float(z.mean()))
        self.x, self.z, self.y = x - self.centres[0], z - self.centres[1], y

    def residuals(self, theta: Array) -> Array:
        return self._terms(theta)[0] - self.y

    def _terms(self, theta: Array) -> tuple[Array, Array]:
        """ln of the prediction (n,), and the three terms' shares of it (3, n)."""
        import numpy as np

        u, v, e, alpha, beta = theta
        parts = np.stack([u - alpha * self.x, v - beta * self.z, np.full_like(self.x, e)])
        top = parts.max(axis=0)
        grown = np.exp(parts - top)
        total = grown.sum(axis=0)
        return top + np.log(total), grown / total

    def value(self, theta: Array) -> tuple[float, Array]:
        """The objective over δ², so that its size is of order 1 for good fits, and its gradient."""
        import numpy as np

        predicted, shares = self._terms(theta)
        r = (predicted - self.y) / HUBER_DELTA
        small = np.abs(r) <= 1
        total = float(np.where(small, 0.5 * r * r, np.abs(r) - 0.5).sum())
        pull = np.clip(r, -1, 1) / HUBER_DELTA
        a, b, e = pull * shares
        return total, np.array([a.sum(), b.sum(), e.sum(), -(a * self.x).sum(), -(b * self.z).sum()])

    def starts(self, keep: int = 16) -> list[Array]:
        """The best of a grid over how the mean loss is shared among the three terms, and over both exponents."""
        import itertools

        import numpy as np

        level = float(self.y.mean())
        shares, constant, exponents = np.log([0.02, 0.1, 0.4]), np.log([0.1, 0.5, 0.9]), (0.1, 0.3, 0.6, 1.0)
        grid = [
            np.array([level + u, level + v, level + e, alpha, beta])
            for u, v, e, alpha, beta in itertools.product(shares, shares, constant, exponents, exponents)
        ]
        return sorted(grid, key=lambda theta: self.value(theta)[0])[:keep]

    def descend(self, theta: Array, steps: int) -> tuple[Array, float]:
        """L-BFGS from a start; where it ends, and the objective there."""
        from scipy.optimize import minimize

        found = minimize(
            self.value, theta, jac=True, method="L-BFGS-B",
            options={"maxiter": steps, "maxfun": 2 * steps, "ftol": 1e-15, "gtol": 1e-9, "maxcor": 20},
        )  # fmt: skip
        return found.x, float(found.fun)

    def constants(self, theta: Array) -> tuple[float, ...]:
        """E, A, α, B, β and β/(α + β)."""
        import numpy as np

        u, v, e, alpha, beta = (float(value) for value in theta)
        with np.errstate(over="ignore"):
            a, b = np.exp(u + alpha * self.centres[0]), np.exp(v + beta * self.centres[1])
        return float(np.exp(e)), float(a), alpha, float(b), beta, beta / (alpha + beta)
