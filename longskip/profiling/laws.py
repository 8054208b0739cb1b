"""Scaling laws: how many parameters and tokens a budget of C training FLOPs is best spent on, and what loss it buys.

Two forms, each with the range of budgets that it was fitted on. Outside the range a law is still evaluated, and the
answer says how far outside it is. Built in: ``2410.08184`` (diffusion transformers, the default) and ``chinchilla``
(language models). A fit of one's own is read from the file that ``longskip budget fit --out`` writes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from longskip.errors import ConfigError, did_you_mean
from longskip.profiling.yamlfiles import parse_yaml

Tokens = Literal["all", "image"]
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """y = coefficient · x^exponent."""

    coefficient: float
    exponent: float

    def __call__(self, x: float) -> float:
        return math.exp(math.log(self.coefficient) + self.exponent * math.log(x))

    def as_json(self) -> dict[str, float]:
        return {"coefficient": self.coefficient, "exponent": self.exponent}


@dataclass(frozen=True, slots=True)
class Optimum:
    """The best use of ``flops``: parameters N, tokens D, and what they buy (None where the law does not say).

    ``extrapolation`` is 1 inside the law's fitted budgets; outside the factor by which C lies beyond the nearer end;
    None where the law names no range. ``below`` says on which side.
    """

    flops: float
    params: float
    tokens: float
    loss: float | None
    fid: float | None
    extrapolation: float | None
    below: bool = False

    @property
    def range_note(self) -> str:
        """How far this prediction can be trusted, as a sentence for people."""
        if self.extrapolation is None:
            return "the law names no range of budgets it was fitted on"
        if self.extrapolation == 1:
            return "inside the budgets that the law was fitted on"
        end = "below the smallest" if self.below else "above the largest"
        return f"extrapolation: {times_text(self.extrapolation)} {end} budget that the law was fitted on"

    @property
    def range_word(self) -> str:
        """The same in a word, for tables."""
        if self.extrapolation is None:
            return "unknown"
        if self.extrapolation == 1:
            return "inside"
        return f"{times_text(self.extrapolation)} {'below' if self.below else 'beyond'}"


class Law(Protocol):
    """What a planner asks of a law. ``tokens`` says which D it means: all that the model processes, or image tokens;
    ``fitted_on`` what was trained to find it; ``intervals`` those of a fit of one's own, as its ``as_json`` has them."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def note(self) -> str: ...
    @property
    def tokens(self) -> Tokens: ...
    @property
    def budgets(self) -> Interval | None: ...
    @property
    def fitted_on(self) -> str: ...
    @property
    def intervals(self) -> Mapping[str, Any]: ...

    def optimum(self, flops: float) -> Optimum: ...

    def as_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class FrontierLaw:
    """Straight lines in log–log of the best N, D, loss and FID against C."""

    name: str
    source: str
    params: PowerLaw
    data: PowerLaw
    loss: PowerLaw | None = None
    fid: PowerLaw | None = None
    budgets: Interval | None = None
    tokens: Tokens = "all"
    note: str = ""
    fitted_on: str = ""
    intervals: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def optimum(self, flops: float) -> Optimum:
        """ConfigError for a budget that is not a positive number."""
        flops = positive_budget(flops)
        try:
            said = [None if line is None else line(flops) for line in (self.params, self.data, self.loss, self.fid)]
        except OverflowError:
            raise _no_number(self, flops) from None
        return _optimum(self, flops, *said)

    def as_json(self) -> dict[str, Any]:
        lines = {"params": self.params, "data": self.data, "loss": self.loss, "fid": self.fid}
        return _head("power", self) | {key: line.as_json() for key, line in lines.items() if line is not None}


@dataclass(frozen=True)
class ParametricLaw:
    """L(N, D) = E + A/N^α + B/D^β (arXiv 2203.15556, eq. 2), under C = 6ND."""

    name: str
    source: str
    irreducible: float
    a: float
    alpha: float
    b: float
    beta: float
    budgets: Interval | None = None
    tokens: Tokens = "all"
    note: str = ""
    fitted_on: str = ""
    intervals: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def loss(self, params: float, tokens: float) -> float:
        """Predicted loss of N parameters after D tokens."""
        return self.irreducible + self.a * params**-self.alpha + self.b * tokens**-self.beta

    @property
    def params_exponent(self) -> float:
        """a of N_opt ∝ C^a: β/(α + β)."""
        return self.beta / (self.alpha + self.beta)

    def optimum(self, flops: float) -> Optimum:
        """The closed form of arXiv 2203.15556, eq. 4: N = G·(C/6)^a, D = (C/6)^b / G, G = (αA/βB)^(1/(α+β))."""
        flops = positive_budget(flops)
        try:
            g = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
            params = g * (flops / 6) ** self.params_exponent
            tokens = (flops / 6) ** (1 - self.params_exponent) / g
            loss = self.loss(params, tokens)
        except (OverflowError, ZeroDivisionError):
            raise _no_number(self, flops) from None
        return _optimum(self, flops, params, tokens, loss, None)

    def as_json(self) -> dict[str, Any]:
        return _head("parametric", self) | {
            "E": self.irreducible,
            "A": self.a,
            "alpha": self.alpha,
            "B": self.b,
            "beta": self.beta,
        }


DIT_IN_CONTEXT = FrontierLaw(
    name="2410.08184",
    source="arXiv 2410.08184, in-context diffusion transformers",
    params=PowerLaw(8.9196e-4, 0.5681),  # printed rounded as 0.0009, with which C = 6ND would not hold
    data=PowerLaw(186.8535, 0.4319),
    loss=PowerLaw(2.3943, -0.0273),
    fid=PowerLaw(2.2566e6, -0.234),
    budgets=(1e17, 6e18),
    tokens="image",
    note="coefficient of N 8.9196e-4, so that C = 6ND holds; the printed 0.0009 is rounded. D counts image tokens",
    fitted_on="rectified-flow loss and FID by CLIP features, 108M image–text pairs, latents of 256² pixels",
)
CHINCHILLA = ParametricLaw(
    name="chinchilla",
    source="arXiv 2203.15556, eq. 10 (approach 3)",
    irreducible=1.69,
    a=406.4,
    alpha=0.34,
    b=410.7,
    beta=0.28,
    budgets=(6e18, 3e21),
    note="fitted on language models: take its N and D as a split of the budget; its loss is nats per text token, no "
    "diffusion loss. The coefficients are the paper's, as rounded there; arXiv 2404.10102 fitted them anew",
    fitted_on="language models on text",
)
BUILT_IN: dict[str, Law] = {law.name: law for law in (DIT_IN_CONTEXT, CHINCHILLA)}
LANGUAGE_LAWS = frozenset({CHINCHILLA.name})


@dataclass(frozen=True, slots=True)
class Exponents:
    """Exponents of C for the best N, the best D and the loss, as printed."""

    params: float
    data: float
    loss: float


# The paper compares its two designs by exponents; coefficients are printed for the first alone.
EXPONENTS_2410_08184 = {
    "in-context": Exponents(0.56, 0.43, -0.0273),
    "cross-attention": Exponents(0.54, 0.46, -0.0385),
}


@dataclass(frozen=True, slots=True)
class ScalingFunction:
    """A Pareto frontier of arXiv 2404.02883: TIFA against one quantity ``of``, and the range it was drawn from."""

    of: str
    law: PowerLaw
    fitted: Interval
    note: str = ""

    def __call__(self, x: float) -> float:
        return self.law(x)

    def extrapolation(self, x: float) -> float:
        """1 inside the fitted range, else the factor beyond it."""
        return float(_outside(x, self.fitted)[0] or 1.0)


TIFA_FITTED_ON = "UNets at 256²"
# Ranges: compute of SDXL-C128 and SDXL over the longest training (600K steps of 2048 images), sizes of the same UNets,
# and the two data sets without and with synthetic captions.
TIFA_2404_02883 = {
    "compute": ScalingFunction("training GFLOPs", PowerLaw(0.47, 0.02), (2.572e11, 1.462e12)),
    "params": ScalingFunction(
        "millions of parameters",
        PowerLaw(0.77, 0.011),
        (423.971332, 2391.824644),
        note="the paper prints the exponent 0.11; that gives 1.81 for SDXL's UNet, and TIFA is a share: it is 0.011",
    ),
    "data": ScalingFunction("millions of image–noun pairs", PowerLaw(0.64, 0.03), (1800.0, 7300.0)),
}

MOST_FLOPS = 1e30
MOST_PRICE = 1e9  # of a device and hour, in any currency
MOST_WATTS = 1e6  # of a device
_EDGE = 1.02


def positive_budget(flops: float) -> float:
    """The budget as it was given; ConfigError when it is no positive number or beyond anything that is built."""
    if not math.isfinite(flops) or flops <= 0:
        raise ConfigError(f"a budget of {flops!r} FLOPs is not positive", cure="give training FLOPs, for example 1e21")
    if flops > MOST_FLOPS:
        raise ConfigError(
            f"a budget of {flops:.3g} FLOPs is above the limit {MOST_FLOPS:.0e}",
            cure="the largest trainings known are below 1e27; give total training FLOPs",
        )
    return flops


def times_text(times: float) -> str:
    """How many times, in three figures, from a thousand on in two: ``16.1×``, ``170,000×``."""
    text = f"{times:.3g}" if times < 999.5 else f"{float(f'{times:.2g}'):,.0f}"
    return f"{text}\N{MULTIPLICATION SIGN}"


def interval_budgets(low: float, high: float) -> list[float]:
    """Budgets at which a fit keeps its intervals: three a decade from a tenth of ``low`` to 10,000 times ``high``."""
    first, last = low / 10, min(1e4 * high, MOST_FLOPS)
    count = math.ceil(3 * math.log10(last / first))
    return [*(first * (last / first) ** (k / count) for k in range(count)), last]


def intervals_at(law: Law, flops: float) -> dict[str, Interval]:
    """The intervals of a fit of one's own at a budget, by ``params``, ``tokens`` and ``loss``.

    Between the two nearest budgets that the law's file keeps them at, straight in log–log; nothing for what has none,
    or for a budget outside of those.
    """
    kept = law.intervals.get("at")
    points = [one for one in kept if isinstance(one, Mapping)] if isinstance(kept, list) else []
    found: dict[str, Interval] = {}
    for name in ("params", "tokens", "loss"):
        spans = [(one.get("flops"), one.get(f"{name}_interval")) for one in points]
        ends = [(float(c), (span[0], span[1])) for c, span in spans if c is not None and span and _spans(span, c)]
        below = max((end for end in ends if end[0] <= flops), default=None, key=lambda end: end[0])
        above = min((end for end in ends if end[0] >= flops), default=None, key=lambda end: end[0])
        if below is None or above is None:
            continue
        apart = math.log(above[0] / below[0])
        share = math.log(flops / below[0]) / apart if apart else 0.0
        low, high = (
            math.exp((1 - share) * math.log(a) + share * math.log(b)) for a, b in zip(below[1], above[1], strict=True)
        )
        found[name] = (low, high)
    return found


def _spans(span: Any, flops: Any) -> bool:
    """Whether a file's ``[low, high]`` at a budget are numbers to reckon with."""
    numbers = [*span, flops] if isinstance(span, (list, tuple)) and len(span) == 2 else [None]
    return all(isinstance(n, (int, float)) and not isinstance(n, bool) and 0 < n < math.inf for n in numbers)


def bounded(option: str, value: float | None, most: float) -> float | None:
    """A price or a power as it was given; ConfigError where it is not between 0 and ``most``."""
    if value is not None and not 0 <= value <= most:
        raise ConfigError(f"{option} {value!r} is not between 0 and {most:,.0f}", cure="leave it out where unknown")
    return value


def find_law(name: str) -> Law:
    """The built-in law of that name, or the law in the file of that name; ConfigError with what was meant instead."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name.startswith("2410.08184"):
        e = EXPONENTS_2410_08184["cross-attention"]
        raise ConfigError(
            f"law {name!r}: of 2410.08184's cross-attention design only exponents are known "
            f"(N {e.params}, D {e.data}, loss {e.loss}), which predict nothing without coefficients",
            cure="use --law 2410.08184 (in-context), or fit your own: longskip budget fit",
        )
    if name.startswith("2404.02883"):
        raise ConfigError(
            f"law {name!r}: 2404.02883 gives TIFA for a size, a compute or a data set, not the best size of a budget",
            cure="every plan shows its TIFA beside the law's predictions",
        )
    if Path(name).suffix.lower() in (".json", ".yaml", ".yml") or Path(name).exists():
        return load_law(name)
    raise ConfigError(f"unknown law {name!r}", cure=f"{did_you_mean(name, BUILT_IN)}; or a JSON or YAML file of a fit")


def load_law(path: str | os.PathLike[str]) -> Law:
    """A law from a JSON or YAML file in the form that ``longskip budget fit --out`` writes (``as_json`` of a law).

    ``form: power`` has ``params`` and ``data`` (each ``coefficient`` and ``exponent``), and may have ``loss`` and
    ``fid``; ``form: parametric`` has ``E A alpha B beta``. Both may have ``name source note budgets: [low, high]
    tokens: all | image, fitted_on, intervals`` (kept as they stand). ConfigError names the key that is missing or wrong.
    """
    file = Path(path)
    try:
        text = file.read_text("utf-8")
        body = json.loads(text) if file.suffix.lower() == ".json" else parse_yaml(text, str(file))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{file} does not exist", cure="longskip budget fit … --out FOLDER writes law.json"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read as JSON or YAML: {error}", cure="see load_law's form") from error
    if isinstance(body, Mapping) and isinstance(body.get("law"), Mapping):
        body = body["law"]  # the whole output of ``budget fit --json``
    if not isinstance(body, Mapping):
        raise ConfigError(f"{file} holds no mapping", cure="form: power or parametric, and the law's numbers")
    reader = _Reader(file, body)
    head: dict[str, Any] = {
        "name": str(body.get("name", file.stem)),
        "source": str(body.get("source", file)),
        "note": str(body.get("note", "")),
        "budgets": reader.budgets(),
        "tokens": reader.choice("tokens", ("all", "image"), "all"),
        "fitted_on": str(body.get("fitted_on", "")),
        "intervals": reader.mapping("intervals"),
    }
    if reader.choice("form", ("power", "parametric"), None) == "power":
        reader.only({"params", "data", "loss", "fid"})
        wanted = ("params", "data", *(key for key in ("loss", "fid") if key in body))
        return FrontierLaw(**head | {key: reader.line(key) for key in wanted})
    reader.only({"E", "A", "alpha", "B", "beta"})
    keys = {"irreducible": "E", "a": "A", "alpha": "alpha", "b": "B", "beta": "beta"}
    return ParametricLaw(**head | {into: reader.number(key) for into, key in keys.items()})


_HEAD = {"form", "name", "source", "note", "budgets", "tokens", "fitted_on", "intervals"}


@dataclass(frozen=True)
class _Reader:
    """Reads the keys of a law's file and names the file and the key in every complaint."""

    file: Path
    body: Mapping[str, Any] = field(repr=False)

    def only(self, known: Iterable[str]) -> None:
        allowed = {*known, *_HEAD}
        for key in self.body:
            if key not in allowed:
                raise ConfigError(f"{self.file}: unknown key {key!r}", cure=did_you_mean(str(key), allowed))

    def number(self, key: str, body: Mapping[str, Any] | None = None, *, above: float | None = 0.0) -> float:
        body = self.body if body is None else body
        if key not in body:
            raise ConfigError(f"{self.file}: {key!r} is missing", cure="give it as a number")
        try:
            value = float(body[key])  # YAML reads 1e17 as a text
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value) or isinstance(body[key], bool):
            raise ConfigError(f"{self.file}: {key} = {body[key]!r} is not a finite number", cure="give a number")
        if above is not None and value <= above:
            raise ConfigError(f"{self.file}: {key} = {value:g} is not above {above:g}", cure="give a positive number")
        return value

    def mapping(self, key: str) -> Mapping[str, Any]:
        given = self.body.get(key) or {}
        if not isinstance(given, Mapping):
            raise ConfigError(f"{self.file}: {key} = {given!r} is no mapping", cure="leave it out")
        try:
            json.dumps(given)
        except (TypeError, ValueError) as error:  # YAML has dates, sets and circles
            raise ConfigError(
                f"{self.file}: {key} holds what JSON has no form for: {error}", cure="leave it out"
            ) from None
        return given

    def line(self, key: str) -> PowerLaw:
        part = self.body.get(key)
        if not isinstance(part, Mapping):
            raise ConfigError(f"{self.file}: {key!r} is missing or no mapping", cure="give coefficient and exponent")
        return PowerLaw(self.number("coefficient", part), self.number("exponent", part, above=None))

    def choice(self, key: str, known: tuple[str, ...], default: str | None) -> Any:
        value = self.body.get(key, default)
        if value not in known:
            raise ConfigError(f"{self.file}: {key} = {value!r} is unknown", cure=f"one of {', '.join(known)}")
        return value

    def budgets(self) -> Interval | None:
        given = self.body.get("budgets")
        if given is None:
            return None
        if not isinstance(given, (list, tuple)) or len(given) != 2:
            raise ConfigError(f"{self.file}: budgets = {given!r} is not [low, high]", cure="give two FLOP counts")
        low, high = (self.number("budgets", {"budgets": value}) for value in given)
        if low > high:
            raise ConfigError(
                f"{self.file}: budgets {low:g} to {high:g} run backwards", cure="give the lower one first"
            )
        return low, high


def _optimum(
    law: Law, flops: float, params: float | None, tokens: float | None, loss: float | None, fid: float | None
) -> Optimum:
    """ConfigError where N or D is no number above 0."""
    if not params or not tokens or not math.isfinite(params) or not math.isfinite(tokens):
        raise _no_number(law, flops)
    return Optimum(flops, params, tokens, loss, fid, *_outside(flops, law.budgets))


def _no_number(law: Law, flops: float) -> ConfigError:
    return ConfigError(
        f"law {law.name!r} has no N and D for {flops:.3g} FLOPs that a number holds",
        cure="mend its coefficients and exponents, or give a budget nearer to those it was fitted on",
    )


def _head(form: str, law: Law) -> dict[str, Any]:
    return {
        "form": form,
        "name": law.name,
        "source": law.source,
        "note": law.note,
        "budgets": None if law.budgets is None else list(law.budgets),
        "tokens": law.tokens,
        "fitted_on": law.fitted_on,
        "intervals": dict(law.intervals),
    }


def _outside(x: float, fitted: Interval | None) -> tuple[float | None, bool]:
    """The factor by which ``x`` lies outside the range (1 inside), and whether it lies below.

    Within 2% of an end is inside: budgets that are spent in whole steps differ by as much.
    """
    if fitted is None:
        return None, False
    low, high = fitted
    if x * _EDGE < low:
        return low / x, True
    return (x / high if x > high * _EDGE else 1.0), False
