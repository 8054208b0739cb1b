from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from longskip.errors import ConfigError
from longskip.models.presets import PRESETS, preset
from longskip.profiling.accounting import (
    LanguageModel,
    Work,
    accounts,
    chinchilla_flops,
    chinchilla_params,
    chinchilla_ratio,
    of_spec,
    params_without_embeddings,
)
from longskip.profiling.fits import Point, by_budget, fit_frontier, fit_isoflop, fit_power
from longskip.profiling.laws import (
    CHINCHILLA,
    DIT_IN_CONTEXT,
    EXPONENTS_2410_08184,
    TIFA_2404_02883,
    FrontierLaw,
    ParametricLaw,
    PowerLaw,
    bounded,
    find_law,
    interval_budgets,
    intervals_at,
    load_law,
    times_text,
)
from longskip.profiling.parametric import _Parametric, fit_parametric
from longskip.profiling.predicted import FAR, prediction_rows, rough_count, shown
from tests.figures import figure

BUDGETS = (1e17, 3e17, 6e17, 1e18, 3e18, 6e18)  # of arXiv 2410.08184
PUBLISHED = [  # C, N, D, loss, FID of arXiv 2410.08184, with as many figures as are known
    (1e17, "4.06e+06", "4.11e+09", "0.8224", "237"),
    (6e18, "4.15e+07", "2.409e+10", "0.7354", "91.1"),
    (1.5e21, "9.56e+08", "2.615e+11", "0.6325", "25.0"),
]
FORMS = (".2e", None, ".4f", None)


def valley(budget: float, factors: tuple[float, ...], noise: float = 0.0, seed: int = 0) -> list[Point]:
    """Trainings at one budget about 2410.08184's optimum: an exact parabola in log N, which is not the fit's code."""
    rng, best = np.random.default_rng(seed), DIT_IN_CONTEXT.optimum(budget)
    points = []
    for factor in factors:
        n = best.params * factor
        loss = best.loss + 0.03 * math.log(factor) ** 2 + noise * rng.normal()
        points.append(Point(budget, n, budget / (6 * n), loss, f"{budget:g}"))
    return points


def surface(law: ParametricLaw, noise: float = 0.0, seed: int = 0) -> list[Point]:
    rng, points = np.random.default_rng(seed), []
    for budget in (6e18, 3e19, 1e20, 6e20, 3e21):
        for factor in (0.2, 0.5, 1.0, 2.0, 5.0):
            n = law.optimum(budget).params * factor
            d = budget / (6 * n)
            points.append(Point(budget, n, d, law.loss(n, d) * math.exp(noise * rng.normal()), ""))
    return points


@pytest.mark.parametrize("flops, params, tokens, loss, fid", PUBLISHED)
def test_the_published_predictions_come_out(flops: float, params: str, tokens: str, loss: str, fid: str) -> None:
    best = DIT_IN_CONTEXT.optimum(flops)
    assert f"{best.params:.2e}" == params
    assert f"{best.tokens:.{len(tokens) - 6}e}" == tokens
    assert f"{best.loss:.4f}" == loss and f"{best.fid:.3g}" == f"{float(fid):.3g}"
    assert 6 * best.params * best.tokens == pytest.approx(flops, rel=2e-5)
    assert replace(DIT_IN_CONTEXT, params=replace(DIT_IN_CONTEXT.params, coefficient=9e-4)).params(1e17) > 4.085e6


def test_the_range_of_validity_is_said_with_its_factor() -> None:
    assert DIT_IN_CONTEXT.optimum(1e18).extrapolation == 1 and "inside" in DIT_IN_CONTEXT.optimum(1e18).range_note
    beyond, below = DIT_IN_CONTEXT.optimum(1.5e21), DIT_IN_CONTEXT.optimum(1e16)
    assert beyond.extrapolation == pytest.approx(250) and not beyond.below and "250× above" in beyond.range_note
    assert below.extrapolation == pytest.approx(10) and below.below and "10× below" in below.range_note
    assert [DIT_IN_CONTEXT.optimum(c).extrapolation == 1 for c in (9.9e16, 9.7e16, 6.1e18, 6.2e18)] == [1, 0, 1, 0]
    assert replace(DIT_IN_CONTEXT, budgets=None).optimum(1e30).extrapolation is None


@settings(max_examples=25, deadline=None)
@given(flops=st.floats(1e15, 1e26))
def test_chinchillas_closed_form_is_the_minimum_of_its_loss(flops: float) -> None:
    best = CHINCHILLA.optimum(flops)
    found = optimize.minimize_scalar(
        lambda u: CHINCHILLA.loss(math.exp(u), flops / (6 * math.exp(u))), bounds=(5, 40), method="bounded",
        options={"xatol": 1e-10},
    )  # fmt: skip
    assert found.x == pytest.approx(math.log(best.params), abs=1e-4)
    assert found.fun == pytest.approx(best.loss, rel=1e-12)
    assert 6 * best.params * best.tokens == pytest.approx(flops, rel=1e-9)


def test_exponents_of_both_designs_and_of_tifa() -> None:
    in_context, cross = EXPONENTS_2410_08184["in-context"], EXPONENTS_2410_08184["cross-attention"]
    assert (in_context.params, in_context.data, in_context.loss) == (0.56, 0.43, -0.0273)
    assert (cross.params, cross.data, cross.loss) == (0.54, 0.46, -0.0385)
    by_params = TIFA_2404_02883["params"]
    sdxl = 2391.824644  # millions of parameters
    assert by_params(sdxl) == pytest.approx(0.77 * sdxl**0.011) and by_params(sdxl) < 1
    assert f"{0.77 * sdxl**0.11:.2f}" == "1.81" and "1.81" in by_params.note and "0.11" in by_params.note
    assert TIFA_2404_02883["compute"](1e12) == pytest.approx(0.47 * 1e12**0.02)
    assert TIFA_2404_02883["data"](7300) == pytest.approx(0.64 * 7300**0.03)
    assert by_params.extrapolation(sdxl) == 1 and by_params.extrapolation(10 * sdxl) == pytest.approx(10)


@pytest.mark.parametrize("flops", [0, -1e20, float("nan"), float("inf"), 1e31])
def test_absurd_budgets_are_refused(flops: float) -> None:
    for law in (DIT_IN_CONTEXT, CHINCHILLA):
        with pytest.raises(ConfigError, match="budget of"):
            law.optimum(flops)


def test_laws_by_name() -> None:
    assert find_law("chinchilla") is CHINCHILLA and find_law("2410.08184") is DIT_IN_CONTEXT
    for name, said in (("chinchila", "did you mean 'chinchilla'"), ("2410.08184-cross", "only exponents"),
                       ("2404.02883", "not the best size")):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            find_law(name)


@pytest.mark.parametrize("law", [DIT_IN_CONTEXT, CHINCHILLA, replace(DIT_IN_CONTEXT, fid=None, budgets=None)])
def test_a_law_written_and_read_again_is_the_same(law, tmp_path: Path) -> None:
    (tmp_path / "law.json").write_text(json.dumps(law.as_json()))
    assert load_law(tmp_path / "law.json") == law
    (tmp_path / "fit.json").write_text(json.dumps({"form": "isoflop", "law": law.as_json()}))
    assert find_law(str(tmp_path / "fit.json")) == law


def test_a_users_law_in_yaml_and_what_is_wrong_with_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = "form: parametric\nE: 0.5\nA: 1e3\nalpha: 0.3\nB: 2e3\nbeta: 0.3\nbudgets: [1e17, 1e19]\ntokens: image\n"
    file.write_text(text)
    law = load_law(file)
    assert isinstance(law, ParametricLaw) and (law.a, law.budgets, law.tokens) == (1000.0, (1e17, 1e19), "image")
    assert law.name == "mine"
    for changed, said in (
        (text.replace("alpha: 0.3\n", ""), "'alpha' is missing"),
        (text.replace("beta:", "betta:"), "did you mean 'beta'"),
        (text.replace("E: 0.5", "E: -1"), "not above 0"),
        (text.replace("E: 0.5", "E: true"), "not a finite number"),
        (text.replace("[1e17, 1e19]", "[1e19, 1e17]"), "backwards"),
        (text.replace("parametric", "cubic"), "form = 'cubic'"),
        (text.replace("image", "words"), "tokens = 'words'"),
        ("- 1\n", "not a mapping"),
        ("a: [", "not valid YAML"),
    ):
        file.write_text(changed)
        with pytest.raises(ConfigError, match=said):
            load_law(file)
    with pytest.raises(ConfigError, match="does not exist"):
        load_law(tmp_path / "none.json")


# -- accountings -------------------------------------------------------------------------------------------------------

TABLE_A4 = {  # arXiv 2203.15556: width, MLP, head, heads, layers, and FLOPs ÷ 6ND
    "73M": ((640, 2560, 64, 10, 10), "1.0250"),
    "305M": ((1024, 4096, 64, 16, 20), "1.1008"),
    "552M": ((1280, 5120, 128, 10, 24), "1.0829"),
    "1.1B": ((1792, 7168, 128, 14, 26), "1.0441"),
    "1.6B": ((2048, 8192, 128, 16, 28), "1.0329"),
    "6.8B": ((3584, 14336, 128, 28, 40), "0.9941"),
}


@pytest.mark.parametrize("name", TABLE_A4)
def test_chinchillas_table_a4(name: str) -> None:
    shape, ratio = TABLE_A4[name]
    assert f"{chinchilla_ratio(LanguageModel(*shape)):.4f}" == ratio


def test_chinchillas_embeddings_and_logits_are_one_product_each() -> None:
    model = LanguageModel(640, 2560, 64, 10, 10)
    assert chinchilla_flops(model, 2048, 32_000) - chinchilla_flops(model, 2048) == 3 * 2 * (2 * 2048 * 32_000 * 640)
    assert chinchilla_params(model, 32_001) - chinchilla_params(model, 32_000) == 640
    with pytest.raises(ConfigError, match="n_layers = 0"):
        LanguageModel(640, 2560, 64, 10, 0)


@pytest.mark.parametrize(
    "name, side, all_tokens, image_tokens",
    [
        ("uvit-2.3b", 32, "1.0237", "1.3356"), ("uvit-2.3b", 64, "1.0805", None), ("uvit-2.3b", 128, "1.3077", None),
        ("uvit-8b", 32, "1.0160", None), ("uvit-8b", 64, "1.0541", None), ("uvit-8b", 128, "1.2065", None),
        ("uvit-h2-imagenet256", 32, "1.0308", "1.0389"),
    ],
)  # fmt: skip
def test_how_wrong_6nd_is(name: str, side: int, all_tokens: str, image_tokens: str | None) -> None:
    spec = preset(name, latent_size=(side, side))
    found = {one.name: one for one in accounts([of_spec(spec, 7)], spec.param_counts().total, spec)}
    assert f"{found['six_nd'].exact_share:.4f}" == all_tokens
    if image_tokens:
        assert f"{found['image_tokens'].exact_share:.4f}" == image_tokens
    assert found["exact"].flops == 7 * spec.flops(1).model_flops


@settings(max_examples=25, deadline=None)
@given(heads=st.integers(1, 6), depth=st.integers(1, 9), side=st.sampled_from([4, 8, 12]), images=st.integers(1, 50))
def test_kaplan_and_chinchilla_on_a_uvit_by_hand(heads: int, depth: int, side: int, images: int) -> None:
    h = 64 * heads
    spec = replace(PRESETS["uvit-2.3b"], width=h, depth=depth, n_heads=heads, latent_size=(2 * side, 2 * side))
    blocks, skips, length = 2 * (depth // 2) + 1, depth // 2, side * side + 1 + 77
    own = blocks * (12 * h**2 + 10 * h) + skips * (2 * h**2 + h) + 2 * h
    assert params_without_embeddings(spec) == own
    found = {one.name: one for one in accounts([of_spec(spec, images)], 10, spec)}
    tokens = images * length
    assert found["kaplan"].flops == 6 * own * tokens
    assert found["kaplan_context"].flops == 3 * tokens * (2 * own + 2 * blocks * length * h)
    softmax = 3 * images * blocks * 3 * heads * length**2
    assert found["chinchilla"].flops == found["exact"].flops + softmax
    assert found["six_nd"].flops == 60 * tokens and found["image_tokens"].flops == 60 * images * side * side


def test_accounts_of_parts_add_up_and_need_no_spec() -> None:
    spec = PRESETS["uvit-s2-coco"]
    whole = accounts([of_spec(spec, 12)], 100, spec)
    parts = accounts([of_spec(spec, 5), of_spec(spec, 7), Work(0, 0, 0, 0)], 100, spec)
    assert parts == whole
    assert [one.name for one in accounts([of_spec(spec, 12)], 100, None)] == ["exact", "six_nd", "image_tokens"]


# -- fits --------------------------------------------------------------------------------------------------------------


def test_the_published_predictions_give_back_the_published_exponents() -> None:
    points = [Point(c, float(n), float(d), float(loss), "") for c, n, d, loss, _ in PUBLISHED]
    fit = fit_frontier(points, tokens="image")
    assert fit.law.params.exponent == pytest.approx(0.5681, abs=3e-4)
    assert fit.law.data.exponent == pytest.approx(0.4319, abs=3e-4)
    assert f"{fit.law.loss.exponent:.4f}" == "-0.0273"
    assert fit.params.exponent_interval is None  # three points


def test_isoflop_curves_give_back_the_law_they_were_drawn_from() -> None:
    points = [point for budget in BUDGETS for point in valley(budget, (0.3, 0.6, 1.1, 2.0, 3.5))]
    fit = fit_isoflop(points, tokens="image")
    law = fit.law
    assert (f"{law.params.exponent:.4f}", f"{law.data.exponent:.4f}") == ("0.5681", "0.4319")
    assert law.params.coefficient == pytest.approx(8.9196e-4, rel=1e-6)
    assert law.data.coefficient == pytest.approx(186.8535, rel=1e-4)
    assert (f"{law.loss.exponent:.4f}", f"{law.loss.coefficient:.4f}") == ("-0.0273", "2.3943")
    assert law.budgets == pytest.approx((1e17, 6e18)) and law.tokens == "image"
    assert f"{law.optimum(1.5e21).params / 1e6:.0f}" == "956" and law.optimum(1.5e21).extrapolation == pytest.approx(
        250
    )


def test_tokens_of_a_minimum_follow_exact_flops_and_not_6nd() -> None:
    """C = k(N)·N·D with k a power of N: D at the minimum is C / (k N)."""
    points = []
    for point in (p for budget in BUDGETS for p in valley(budget, (0.3, 0.6, 1.1, 2.0, 3.5))):
        points.append(replace(point, tokens=point.flops / (point.params * 9 * point.params**-0.02)))
    fit = fit_isoflop(points)
    for curve in fit.parabolas:
        assert curve.tokens == pytest.approx(curve.flops / (9 * curve.params**0.98), rel=1e-9)


def coverage(runs: int, hit) -> float:
    return sum(hit(seed) for seed in range(runs)) / runs


@pytest.mark.parametrize("n", [4, 6])
def test_intervals_of_power_laws_cover_as_often_as_they_say(n: int) -> None:
    """Of 300 noisy lines 95% must hold the truth: 3.5 binomial deviations allow 0.906 to 0.994."""
    x = np.geomspace(1e17, 6e18, n)

    def both(seed: int) -> tuple[bool, bool]:
        noise = np.exp(0.1 * np.random.default_rng(1000 + seed).normal(size=n))
        fit = fit_power(x, 3 * x**0.5 * noise, seed=seed, resamples=400)
        low, high = fit.exponent_interval
        at = fit.interval(1e20)
        return low <= 0.5 <= high, at[0] <= 3 * 1e20**0.5 <= at[1]

    shares = np.mean([both(seed) for seed in range(300)], axis=0)
    figure(
        f"95% intervals of power laws over {n} points cover {shares[0]:.3f} (exponent), {shares[1]:.3f} (prediction)"
    )
    assert all(0.906 <= share <= 0.994 for share in shares)


def test_intervals_of_minima_cover_as_often_as_they_say() -> None:
    best = DIT_IN_CONTEXT.optimum(1e18).params

    def hit(seed: int) -> bool:
        sizes = (0.3, 0.55, 1.0, 1.8, 3.3)
        points = [p for i, c in enumerate(BUDGETS) for p in valley(c, sizes, noise=0.002, seed=seed + i)]
        at = next(p for p in fit_isoflop(points, seed=seed).parabolas if p.flops == pytest.approx(1e18))
        return at.params_interval[0] <= best <= at.params_interval[1]

    share = coverage(100, hit)
    figure(f"95% intervals of isoFLOP minima over 5 sizes cover {share:.3f}")
    assert 0.87 <= share <= 1.0


def test_intervals_are_about_as_wide_as_students() -> None:
    """The same lines and parabolas by scipy's and numpy's own standard errors; medians over 40 noisy data sets."""
    x, sizes = np.geomspace(1e17, 6e18, 6), (0.3, 0.55, 1.0, 1.8, 3.3)
    lines, minima = [], []
    for seed in range(40):
        y = 3 * x**0.5 * np.exp(0.1 * np.random.default_rng(seed).normal(size=6))
        low, high = fit_power(x, y, seed=seed).exponent_interval
        lines.append((high - low) / (2 * stats.t.ppf(0.975, 4) * stats.linregress(np.log(x), np.log(y)).stderr))
        points = [p for i, c in enumerate(BUDGETS[:3]) for p in valley(c, sizes, noise=0.0005, seed=9 * seed + i)]
        for found in fit_isoflop(points, seed=seed).parabolas:
            u = np.log([p.params for p in found.points]) - found.centre
            (a, b, _), cov = np.polyfit(u, [p.loss for p in found.points], 2, cov=True)
            gradient = np.array([b / (2 * a * a), -1 / (2 * a), 0])  # of the vertex −b/2a
            error = math.sqrt(gradient @ cov @ gradient)
            minima.append(np.diff(np.log(found.params_interval))[0] / (2 * stats.t.ppf(0.975, 2) * error))
    assert np.median(lines) == pytest.approx(1, abs=0.12)
    assert np.median(minima) == pytest.approx(1, abs=0.15)


def test_fits_are_seeded() -> None:
    points = [p for i, c in enumerate(BUDGETS) for p in valley(c, (0.3, 0.6, 1.1, 2, 3.5), noise=0.002, seed=i)]
    one, same, other = (fit_isoflop(points, seed=seed).as_json() for seed in (1, 1, 2))
    assert one == same and one != other and one["law"]["intervals"] != other["law"]["intervals"]
    assert one["law"] | {"intervals": {}} == other["law"] | {"intervals": {}}


def test_the_parametric_form_is_found_again_exactly_without_noise() -> None:
    fit = fit_parametric(surface(CHINCHILLA), resamples=2)
    law = fit.law
    assert (law.irreducible, law.a, law.alpha, law.b, law.beta) == pytest.approx(
        (1.69, 406.4, 0.34, 410.7, 0.28), rel=1e-5
    )
    assert law.params_exponent == pytest.approx(0.28 / 0.62, rel=1e-6) and fit.scatter < 1e-8
    for budget in (6e18, 1e24):
        assert law.optimum(budget).params == pytest.approx(CHINCHILLA.optimum(budget).params, rel=1e-4)


def test_the_parametric_form_with_noise_and_outliers() -> None:
    points = surface(CHINCHILLA, noise=0.002, seed=3)
    points[7] = replace(points[7], loss=points[7].loss * 1.2)  # a diverged training
    fit = fit_parametric(points, resamples=40, seed=1)
    assert fit.law.irreducible == pytest.approx(1.69, abs=0.05)
    assert fit.law.params_exponent == pytest.approx(CHINCHILLA.params_exponent, abs=0.03)
    low, high = fit.intervals["params_exponent"]
    assert low < fit.law.params_exponent < high and low <= CHINCHILLA.params_exponent <= high


def test_the_objectives_gradient_is_its_derivative_and_its_value_the_papers() -> None:
    points = surface(CHINCHILLA, noise=0.01)
    x, z, y = (np.log([getattr(p, name) for p in points]) for name in ("params", "tokens", "loss"))
    problem = _Parametric(x, z, y)
    theta = problem.starts(1)[0] + 0.01
    value, gradient = problem.value(theta)
    numeric = optimize.approx_fprime(theta, lambda t: problem.value(t)[0], 1e-7)
    assert gradient == pytest.approx(numeric, rel=1e-4, abs=1e-2 * np.abs(gradient).max())
    e, a, alpha, b, beta, _ = problem.constants(theta)
    residuals = [math.log(e + a / p.params**alpha + b / p.tokens**beta) - math.log(p.loss) for p in points]
    huber = sum(0.5 * r * r if abs(r) <= 1e-3 else 1e-3 * (abs(r) - 0.5e-3) for r in residuals)
    assert value * 1e-6 == pytest.approx(huber, rel=1e-9)


@pytest.mark.slow
def test_the_best_starts_end_where_the_whole_grid_ends() -> None:
    points = surface(CHINCHILLA, noise=0.003, seed=5)
    problem = _Parametric(*(np.log([getattr(p, name) for p in points]) for name in ("params", "tokens", "loss")))
    whole = min(problem.descend(start, 2000)[1] for start in problem.starts(432)[::3])
    assert min(problem.descend(start, 300)[1] for start in problem.starts()) <= whole * (1 + 1e-3)
    assert problem.value(problem_end(points, problem))[0] <= whole * (1 + 1e-6)


def problem_end(points: list[Point], problem: _Parametric) -> np.ndarray:
    """The end of the fit in the problem's own coordinates."""
    law = fit_parametric(points, resamples=1).law
    x, z = problem.centres
    terms = (math.log(law.a) - law.alpha * x, math.log(law.b) - law.beta * z, math.log(law.irreducible))
    return np.array([*terms, law.alpha, law.beta])


# -- refused -----------------------------------------------------------------------------------------------------------


def test_budgets_are_told_apart_by_two_percent() -> None:
    points = [Point(c, n, 1e9, 1.0, "") for c, n in ((1e18, 3), (1.019e18, 1), (1.021e18, 2), (5e18, 1))]
    assert [[p.params for p in group] for group in by_budget(points)] == [[1, 3], [2], [1]]


@pytest.mark.parametrize(
    "budgets, factors, said",
    [
        (BUDGETS[:2], (0.5, 1, 2), "needs? 3 budgets|need 3 budgets"),
        (BUDGETS, (0.5, 2), "3 sizes each; got 6 budget"),
        (BUDGETS, (1.5, 2, 3, 4), "below 6.083e"),
        (BUDGETS, (0.1, 0.2, 0.4), "above 1.622e"),
    ],
)
def test_isoflop_refuses_what_shows_no_minimum(budgets: tuple, factors: tuple, said: str) -> None:
    points = [point for budget in budgets for point in valley(budget, factors)]
    with pytest.raises(ConfigError, match=said):
        fit_isoflop(points)


def test_isoflop_refuses_a_hill() -> None:
    points = [p for budget in BUDGETS for p in valley(budget, (0.5, 1, 2))]
    hill = [replace(p, loss=3 - p.loss) for p in points]
    with pytest.raises(ConfigError, match="opens downwards"):
        fit_isoflop(hill)


def test_power_laws_refuse_too_few_budgets_and_what_has_no_logarithm() -> None:
    with pytest.raises(ConfigError, match="needs 3 different budgets, got 2"):
        fit_power([1e17, 1e18, 1e18], [1, 2, 3])
    with pytest.raises(ConfigError, match="positive finite"):
        fit_power([1e17, 1e18, 1e19], [1, 0, 3])
    with pytest.raises(ConfigError, match="give one y"):
        fit_power([1e17, 1e18, 1e19], [1, 2])
    with pytest.raises(ConfigError, match="2 points have the budget 1e"):
        fit_frontier(valley(1e18, (0.5, 1.0)))


def test_the_parametric_form_refuses_what_cannot_tell_its_terms_apart() -> None:
    points = surface(CHINCHILLA)
    with pytest.raises(ConfigError, match="needs 8 points"):
        fit_parametric(points[:7])
    with pytest.raises(ConfigError, match="1 sizes"):
        fit_parametric([replace(p, params=1e8) for p in points])
    with pytest.raises(ConfigError, match="go together"):
        fit_parametric([replace(p, tokens=20 * p.params) for p in points])
    with pytest.raises(ConfigError, match="does not fall"):
        fit_parametric([replace(p, loss=math.exp(0.01 * math.log(p.params))) for p in points], resamples=2)


# -- how sure ----------------------------------------------------------------------------------------------------------


def test_predictions_of_power_laws_have_the_intervals_of_their_lines() -> None:
    points = [p for i, c in enumerate(BUDGETS) for p in valley(c, (0.3, 0.6, 1.1, 2, 3.5), noise=0.002, seed=i)]
    fit = fit_isoflop(points)
    near, far = fit.predict(1e18), fit.predict(1e22)
    assert near.best == fit.law.optimum(1e18)
    for one in (near, far):
        for name, line in (("params", fit.params), ("tokens", fit.data), ("loss", fit.loss)):
            low, high = getattr(one, name)
            assert (low, high) == line.interval(one.best.flops) and low < getattr(one.best, name) < high
    near_width, far_width = (math.log(one.params[1] / one.params[0]) for one in (near, far))
    assert far_width > 3 * near_width  # farther out less is known
    three = fit_isoflop([p for p in points if p.flops >= 1e18])
    assert (three.predict(1e18).params, three.law.intervals["params"]["exponent"]) == (None, None)


def test_predictions_of_the_parametric_form_cover_the_truth_and_follow_the_draws() -> None:
    fit = fit_parametric(surface(CHINCHILLA, noise=0.002, seed=3), resamples=40, seed=1)
    one = fit.predict(1e22)
    truth = CHINCHILLA.optimum(1e22)
    for name in ("params", "tokens", "loss"):
        low, high = getattr(one, name)
        assert low < getattr(truth, name) < high and low < getattr(one.best, name) < high
    # N·D = C/6 in every draw, so the ends of N and D are each other's mirror
    assert one.params[0] * one.tokens[1] == pytest.approx(1e22 / 6, rel=0.05)
    assert replace(fit, draws=()).predict(1e22).params is None
    wild = replace(CHINCHILLA, alpha=1e-8, beta=1e-8)
    assert replace(fit, draws=(wild, CHINCHILLA)).predict(1e22).params == pytest.approx((truth.params, truth.params))


def test_intervals_are_kept_in_the_laws_file(tmp_path: Path) -> None:
    points = [p for i, c in enumerate(BUDGETS) for p in valley(c, (0.3, 0.6, 1.1, 2, 3.5), noise=0.002, seed=i)]
    frontier, parametric = fit_isoflop(points), fit_parametric(surface(CHINCHILLA, 0.002), resamples=5)
    assert frontier.law.intervals["loss"]["exponent"] == list(frontier.loss.exponent_interval)
    assert parametric.law.intervals["alpha"] == list(parametric.intervals["alpha"])
    for law in (frontier.law, parametric.law):
        file = tmp_path / "law.json"
        file.write_text(json.dumps(replace(law, fitted_on="these").as_json()))
        assert load_law(file) == replace(law, fitted_on="these")
    file.write_text(json.dumps(parametric.law.as_json() | {"intervals": [1]}))
    with pytest.raises(ConfigError, match="is no mapping"):
        load_law(file)
    (tmp_path / "law.yaml").write_text(file.read_text().replace("[1]", "{since: 2026-01-01}").replace("{", "{ "))
    with pytest.raises(ConfigError, match="intervals holds what JSON has no form for"):
        load_law(tmp_path / "law.yaml")


def bent(irreducible: float, noise: float, seed: int, budgets: tuple[float, ...]) -> list[Point]:
    """Optima of a loss that falls as a power law to ``irreducible``, N and D on power laws of their own."""
    rng = np.random.default_rng(seed)
    return [
        Point(c, 0.1 * c**0.5, c**0.5 / 0.6, (irreducible + 40 * c**-0.1) * math.exp(noise * rng.normal()), "")
        for c in budgets
    ]


def test_a_loss_that_flattens_is_told_and_the_parametric_form_named() -> None:
    budgets = tuple(float(c) for c in np.geomspace(1e17, 1e21, 7))
    (warning,) = fit_frontier(bent(1.0, 0.001, 0, budgets)).warnings
    assert warning.startswith("loss") and "--form parametric" in warning
    line = fit_frontier(bent(1.0, 0.001, 0, budgets)).law.loss
    off = max(abs(line(p.flops) / p.loss - 1) for p in bent(1.0, 0.001, 0, budgets))
    assert f"by up to {100 * off:.2g}%" in warning
    for one in (fit_frontier(bent(0.0, 0.0, 0, budgets)), fit_frontier(bent(1.0, 0.0, 0, budgets[:3]))):
        assert one.warnings == ()  # a straight line; three points, and nothing to judge by


def test_the_warning_is_rare_where_the_law_is_right() -> None:
    """Of 200 straight lines with scatter some 1% may be told to be bent: 3.5 binomial deviations allow 6."""
    budgets = tuple(float(c) for c in np.geomspace(1e17, 1e21, 6))
    told = sum(bool(fit_frontier(bent(0.0, 0.01, seed, budgets)).warnings) for seed in range(200))
    found = sum(bool(fit_frontier(bent(1.0, 0.003, seed, budgets)).warnings) for seed in range(100))
    figure(f"bends told: {told} of 200 straight lines, {found} of 100 bent ones")
    assert told <= 6 and found > 50


def test_three_minima_are_judged_by_the_scatter_about_their_parabolas() -> None:
    def fit(irreducible: float):
        law = ParametricLaw("", "", irreducible, 406.4, 0.34, 406.4, 0.34)  # its valleys are symmetric
        points = [
            Point(c, law.optimum(c).params * f, c / 6 / (law.optimum(c).params * f), 0.0, "")
            for c in (1e18, 3e20, 1e23) for f in (0.5, 0.7, 1.0, 1.4, 2.0)
        ]  # fmt: skip
        return fit_isoflop([replace(p, loss=law.loss(p.params, p.tokens)) for p in points])

    (warning,) = fit(1.69).warnings
    assert "--form parametric" in warning and fit(1e-12).warnings == ()


def test_far_outside_two_digits_are_claimed() -> None:
    exact = "{:.4f}".format
    assert shown(0.52964, FAR, exact) == "0.5296" and shown(0.52964, None, exact) == "0.5296"
    assert [shown(x, 1.67e5, exact) for x in (0.5296, 5.5, 24.96, 551.0, 0.0996, 0.999, 12345.0)] == [
        "≈ 0.53", "≈ 5.5", "≈ 25", "≈ 550", "≈ 0.10", "≈ 1.0", "≈ 12,000",
    ]  # fmt: skip
    assert [rough_count(x, 31.0) for x in (9.56e8, 9.96e8, 1.234e9, 2.615e11, 123456.0)] == [
        "≈ 960 M", "≈ 1.0 B", "≈ 1.2 B", "≈ 260 B", "≈ 120,000",
    ]  # fmt: skip
    assert rough_count(9.56e8, 30.0) == "956 M"
    assert [times_text(x) for x in (16.12, 250.0, 167_000.0)] == ["16.1×", "250×", "170,000×"]
    points = [p for i, c in enumerate(BUDGETS) for p in valley(c, (0.3, 0.6, 1.1, 2, 3.5), noise=0.002, seed=i)]
    near, far = prediction_rows([fit_isoflop(points).predict(c) for c in (6e18, 6e20)])
    assert near[-1] == "inside" and "≈" not in "".join(near) and " to " in near[2]
    assert far[-1] == "100× beyond" and all(cell.startswith("≈") for cell in far[1:7:2])
    assert all("≈" not in cell and " to " in cell for cell in far[2:7:2])


def test_laws_say_what_they_were_fitted_on() -> None:
    assert all(word in DIT_IN_CONTEXT.fitted_on for word in ("rectified-flow", "CLIP", "108M", "256²"))
    assert "rounded" in CHINCHILLA.note and "2404.10102" in CHINCHILLA.note


def test_a_law_whose_numbers_no_float_holds_is_refused() -> None:
    steep = FrontierLaw("steep", "", PowerLaw(1.0, 100.0), PowerLaw(1.0, -200.0))
    nothing = ParametricLaw("nothing", "", 1.0, 1.0, 1e-9, 5.0, 1e-9)
    for law in (steep, nothing, replace(steep, params=PowerLaw(1.0, 1.0))):
        with pytest.raises(ConfigError, match=f"law '{law.name}' has no N and D"):
            law.optimum(1e21)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 1e300])
def test_prices_and_powers_are_bounded(value: float) -> None:
    with pytest.raises(ConfigError, match="price"):
        bounded("price", value, 1e9)
    assert bounded("price", None, 1e9) is None and bounded("price", 0.0, 1e9) == 0.0


def test_a_laws_file_tells_its_intervals_at_any_budget(tmp_path: Path) -> None:
    """Between the budgets that they are kept at they are those of the fit itself, to a hundredth of their width."""
    points = [p for i, c in enumerate(BUDGETS) for p in valley(c, (0.3, 0.6, 1.1, 2, 3.5), noise=0.002, seed=i)]
    fit = fit_isoflop(points)
    low, high = fit.law.budgets or (0.0, 0.0)
    kept = [fit.predict(c).as_json() for c in interval_budgets(low, high)]
    assert (kept[0]["flops"], kept[-1]["flops"]) == pytest.approx((low / 10, 1e4 * high))
    (tmp_path / "law.json").write_text(json.dumps(replace(fit.law, intervals={"at": kept}).as_json()))
    law = load_law(tmp_path / "law.json")
    for c in (low / 10, low, 1.7 * low, high, 37 * high, 1e4 * high):
        said, own = intervals_at(law, c), fit.predict(c)
        for name in ("params", "tokens", "loss"):
            a, b = (np.log(span) for span in (said[name], getattr(own, name)))
            assert np.abs(a - b).max() < 0.05 * (b[1] - b[0]), (c, name)
    assert intervals_at(law, 1.1e4 * high) == {} == intervals_at(law, low / 11)
    for strange in (
        "all",
        [1],
        [{"flops": 1e18}],
        [{"flops": "x", "params_interval": [1, 2]}],
        [{"params_interval": 3}],
    ):
        assert intervals_at(replace(law, intervals={"at": strange}), 1e18) == {}
