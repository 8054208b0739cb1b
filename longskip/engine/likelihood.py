"""How likely a model finds given samples: a variational bound, and the likelihood by the probability-flow ODE.

Both give −log p(x0) in nats (natural logarithm), an upper bound or exactly. With 8-bit pixels (``pixels``: samples are
2·i/255 − 1) it is that of the 256 values, else that of a density, which may be negative. D is the number of values of a
sample; bits/dim = nats/(D·ln 2).

**Bound of a DDPM** (2006.11239, equation 5), steps k = 0 … T−1, ᾱ and SNR = ᾱ/(1−ᾱ) those of the schedule:

    KL(q(x_{T−1}|x0) ‖ N(0, I)) + Σ_{k ≥ 1} E KL(q(x_{k−1}|x_k, x0) ‖ p(x_{k−1}|x_k)) + E −log p(x0|x_{k=0})

p(x_{k−1}|x_k) is q's mean at x̂0 with variance β_k (or the posterior's β̃_k), so that with r = β̃_k over that variance
KL = D/2·(r − 1 − log r) + r/2·(SNR_{k−1} − SNR_k)·‖x0 − x̂0‖².

**Bound of a flow** in continuous time (2107.00630, equation 11), SNR = ((1−t)/t)², from a first time t₀ on:

    ½·∫ −SNR'(t)·E‖x0 − x̂0(x_t)‖² dt + E −log p(x0|x_{t₀}) = ∫ (1−t)/t³·E‖x0 − x̂0‖² dt + …;   x_1 is noise: its KL is 0

**Decoder** p(x0|x at the first noise level): Gaussian about x̂0 with variance 1/SNR there ((1−ᾱ_0)/ᾱ_0 = β_0/(1−β_0));
for pixels the probability that it gives to the pixel's interval of width 2/255, the first and last open (2006.11239,
equation 13).

**First noise level**: step 0 of a DDPM; a flow's ``start`` t₀ may be chosen, every one gives a bound. By default it is
``diffusion.time_floor`` for one that predicts x, which training hardly weighs below it, and for one that predicts v 0.001,
with pixels 0.01: a model that does not know that they are whole levels pays for noise far finer than a level.

**Probability-flow ODE** (2011.13456, section 4.3): the model's deterministic sampler carries N(0, I) to a density whose
logarithm changes along dy/du by −∇·(dy/du). It runs between the noisiest level and the first one, where the clean sample
is put unnoised, so the density is that of the samples blurred by ``noise_floor`` = σ/α there. Pixels are dequantised by
uniform noise first, which makes their figure a bound in the mean over that noise.

Every random number is a function of (seed, sample, draw): figures do not depend on the batch, but for the ODE's step
sizes, which are chosen for a batch together within the tolerance. A sample's prediction must depend on that sample alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from longskip.engine.data.draws import generator
from longskip.engine.data.shuffled import shuffled
from longskip.engine.diffusion import Ddpm, Objective, Predict
from longskip.engine.ode import ddpm_path, flow_path, solve
from longskip.engine.opening import sort_into_buckets
from longskip.errors import ConfigError, DataError, LongskipError
from longskip.kernels import backends

if TYPE_CHECKING:
    from longskip.engine.data.reader import MicroBatch
    from longskip.engine.data.sources import SizedSource
    from longskip.engine.inputs import Inputs

FLOW_START, FLOW_START_OF_PIXELS = 1e-3, 1e-2
EXACT_DIMS = 256  # divergence "auto" is exact up to so many values a sample
_LEVEL = 2 / 255  # width of a pixel's interval in [−1, 1]

Divergence = Literal["auto", "exact", "hutchinson"]
Variance = Literal["beta", "posterior"]


@dataclass(frozen=True)
class Estimate:
    """−log p of each sample: ``nats`` (B,) float64 and the standard error of its random numbers, ``error`` (B,).

    ``dims`` is D, ``evaluations`` at how many levels the model was asked for the batch, ``terms`` the parts of ``nats``.
    """

    nats: Tensor
    error: Tensor
    dims: int
    evaluations: int
    terms: dict[str, Tensor] = field(default_factory=dict)

    @property
    def bits_per_dim(self) -> Tensor:
        return self.nats / (self.dims * math.log(2))


@torch.no_grad()
def vlb(
    objective: Objective,
    predict: Predict,
    clean: Tensor,
    *,
    n_times: int = 128,
    seed: int = 0,
    samples: Sequence[int] | None = None,
    pixels: bool = False,
    start: float | None = None,
    variance: Variance = "beta",
) -> Estimate:
    """The variational bound on −log p of ``clean`` (B, ...) under the model ``predict(latents (B, ...), time (B,))``.

    Estimated at ``n_times`` (even) noise levels, two in each of equal strata of the integral over log t (flow) or log SNR
    (DDPM), which gives the error, and the decoder at an eighth as many draws. ``samples`` (B) number the samples for the
    random draws, 0 … B−1 by default. ``start`` is a flow's, ``variance`` a DDPM's. Raises ConfigError for an odd or small
    ``n_times`` or a ``start`` that does not fit, DataError for ``pixels`` that are none, LongskipError for a bound that is
    not finite.
    """
    if n_times < 2 or n_times % 2:
        raise ConfigError(f"{n_times} noise levels for the bound", cure="an even number, 2 or more")
    _check_pixels(clean, pixels)
    numbers = list(range(len(clean))) if samples is None else list(samples)
    x0 = clean.double()
    dims = x0[0].numel()

    def guess(time: Tensor, draw: int, purpose: str) -> Tensor:
        """x̂0 in float64 from x_t with the noise of one draw."""
        noise = _stack(seed, draw, numbers, purpose, lambda rng: rng.standard_normal(clean.shape[1:])).to(clean)
        x_t = objective.noised(clean, noise, time)
        predicted = predict(x_t, time.to(clean.dtype)).double()
        return objective.convert(predicted, x_t.double(), time, objective.group.prediction, "x")

    begin = first_time(objective, pixels=pixels, start=start)
    levels = _DdpmLevels(objective, variance) if isinstance(objective, Ddpm) else _FlowLevels(begin)
    strata = n_times // 2
    values = torch.empty(n_times, len(clean), dtype=torch.float64)
    for draw in range(n_times):
        within = _stack(seed, draw, numbers, "likelihood-time", lambda rng: rng.random())
        time, weight = levels.at((draw // 2 + within).to(clean.device) / strata)
        error = (x0 - guess(time, draw, "likelihood-noise")).square().flatten(1).sum(1)
        values[draw] = (weight * error).cpu()
    halves = values.view(strata, 2, -1)
    sampled = ((halves[:, 0] - halves[:, 1]).square().sum(0) / 4).sqrt() / strata  # of the mean over strata

    first = torch.full((len(clean),), begin, dtype=torch.float64, device=clean.device)
    spread, n_decoded = noise_floor(objective, pixels=pixels, start=start), max(2, n_times // 8)
    guesses = (guess(first, draw, "likelihood-decoder") for draw in range(n_decoded))
    decoded = torch.stack([decoder_nats(x0, mean, spread, pixels=pixels).cpu() for mean in guesses])
    terms = {
        "prior": levels.prior_nats(x0).cpu(),
        "diffusion": values.mean(0) + dims * levels.constant,
        "decoder": decoded.mean(0),
    }
    error = (sampled.square() + decoded.var(0) / n_decoded).sqrt()
    nats = torch.stack(list(terms.values())).sum(0)
    if not bool(torch.isfinite(nats).all()):
        raise LongskipError("the bound is not finite", cure="train longer, or evaluate other weights")
    return Estimate(nats, error, dims, n_times + n_decoded, terms)


def ode_log_likelihood(
    objective: Objective,
    predict: Predict,
    clean: Tensor,
    *,
    divergence: Divergence = "auto",
    probes: int = 8,
    seed: int = 0,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    samples: Sequence[int] | None = None,
    pixels: bool = False,
    start: float | None = None,
) -> Estimate:
    """−log p of ``clean`` (B, ...) by the probability-flow ODE, integrated by scipy's adaptive Runge–Kutta 4(5).

    ``divergence``: ``exact`` takes D directional derivatives an evaluation, ``hutchinson`` takes ``probes`` (2 or more)
    random ±1 directions, kept along the way, and gives the standard error over them (1810.01367); ``auto`` is exact up
    to ``EXACT_DIMS`` values. Derivatives are forward ones through the kernels' reference definitions. ``samples`` number
    the samples for the random draws, ``start`` is a flow's. Raises ConfigError for an unknown divergence, fewer probes or
    a ``start`` that does not fit, DataError for ``pixels`` that are none, LongskipError when the model's output is not
    finite or the step size vanishes.
    """
    _check_pixels(clean, pixels)
    dims = clean[0].numel()
    exact = _exact_divergence(divergence, dims)
    if not exact and probes < 2:
        raise ConfigError(f"{probes} probe(s) for the divergence have no error", cure="2 or more")
    numbers = list(range(len(clean))) if samples is None else list(samples)
    if pixels:
        within = _stack(seed, 0, numbers, "likelihood-dequantise", lambda rng: rng.random(clean.shape[1:]) - 0.5)
        clean = clean + _LEVEL * within.to(clean)
    directions = None
    if not exact:
        signs = [
            _stack(seed, k, numbers, "likelihood-probe", lambda rng: rng.choice((-1.0, 1.0), clean.shape[1:]))
            for k in range(probes)
        ]
        directions = torch.stack(signs).to(clean)  # (probes, B, ...)
    first = first_time(objective, pixels=pixels, start=start)
    path = ddpm_path(objective, predict) if isinstance(objective, Ddpm) else flow_path(objective, predict, first)
    with torch.no_grad(), backends.use("reference"):
        noisy, grown, evaluations = solve(path, path.enter * clean, directions, rtol, atol)
    noise = path.leave * noisy
    log_prior = -0.5 * (noise.square() + math.log(2 * math.pi)).flatten(1).sum(1)
    nats = -(log_prior + grown.mean(0) + dims * math.log(path.enter * path.leave))
    if pixels:
        nats = nats - dims * math.log(_LEVEL)
    error = torch.zeros_like(nats) if exact else grown.std(0) / math.sqrt(len(grown))
    return Estimate(nats, error, dims, evaluations)


def first_time(objective: Objective, *, pixels: bool = False, start: float | None = None) -> float:
    """The time of the first noise level; ConfigError for a ``start`` outside of (0, 1) or with a DDPM."""
    if isinstance(objective, Ddpm):
        if start is not None:
            raise ConfigError(f"start {start} of a DDPM's likelihood", cure="leave it out: a DDPM begins at its step 0")
        return 0.0
    if start is None:
        own = FLOW_START_OF_PIXELS if pixels else FLOW_START
        return objective.group.time_floor if objective.group.prediction == "x" else own
    if not 0 < start < 1:
        raise ConfigError(
            f"start {start} of a flow's likelihood", cure="a time above 0 and below 1, 0.001 for instance"
        )
    return start


def noise_floor(objective: Objective, *, pixels: bool = False, start: float | None = None) -> float:
    """σ/α at the first noise level, below which the likelihood does not look."""
    first = first_time(objective, pixels=pixels, start=start)
    alpha, sigma = objective.alpha_sigma(torch.tensor([first], dtype=torch.float64))
    return float(sigma / alpha)


def decoder_nats(clean: Tensor, mean: Tensor, spread: float, *, pixels: bool) -> Tensor:
    """−log p(clean | mean) (B,) of (B, ...) in float64: N(mean, spread²), or what it gives to the pixels' intervals."""
    z = (clean - mean) / spread
    if not pixels:
        return (0.5 * (z.square() + math.log(2 * math.pi)) + math.log(spread)).flatten(1).sum(1)
    half = _LEVEL / 2 / spread
    # By symmetry the interval is mirrored to the left half, where the difference of two tails keeps its digits.
    mirrored = z > 0
    upper = torch.where(mirrored, half - z, z + half)
    lower = torch.where(mirrored, -half - z, z - half)
    ends = torch.finfo(z.dtype).max
    first, last = clean < -1 + _LEVEL / 2, clean > 1 - _LEVEL / 2
    lower = torch.where((first & ~mirrored) | (last & mirrored), -ends, lower)
    upper = torch.where((first & mirrored) | (last & ~mirrored), ends, upper)
    above, below = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return -(above + torch.log1p(-torch.exp(below - above))).flatten(1).sum(1)


# --- the levels of the bound --------------------------------------------------------------------------------------


class _FlowLevels:
    """Times of the flow's integral, drawn evenly in log t between ``start`` and 1."""

    constant = 0.0

    def __init__(self, start: float) -> None:
        self.start = start

    def at(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Uniform numbers (B,) in (0, 1) → times and what ‖x0 − x̂0‖² there weighs, ½·(−SNR') over the density of t."""
        t = self.start ** (1 - uniform)
        return t, (1 - t) / t.square() * -math.log(self.start)

    def prior_nats(self, clean: Tensor) -> Tensor:
        return torch.zeros(len(clean), dtype=torch.float64)


class _DdpmLevels:
    """Steps of a DDPM's sum, drawn in proportion to how much log SNR falls over them."""

    def __init__(self, objective: Ddpm, variance: Variance) -> None:
        if variance not in ("beta", "posterior"):
            raise ConfigError(f"variance {variance!r} of a DDPM's steps", cure="beta or posterior")
        self.n_steps = objective.n_steps
        kept = objective.alphas_cumprod
        snr = kept / (1 - kept)
        fallen = torch.log(snr[:-1] / snr[1:])  # over step k = 1 … T−1
        ratio = torch.ones_like(fallen)
        if variance == "beta":  # β̃_k/β_k
            ratio = (1 - kept[:-1]) / (1 - kept[1:])
        self.constant = float((ratio - 1 - ratio.log()).sum() / 2)
        self.edges = fallen.cumsum(0) / fallen.sum()
        self.weights = ratio * (snr[:-1] - snr[1:]) / 2 * fallen.sum() / fallen
        self.last = float(kept[-1])

    def at(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Uniform numbers (B,) in (0, 1) → the steps' times and what ‖x0 − x̂0‖² there weighs over their probability."""
        place = torch.searchsorted(self.edges.to(uniform.device), uniform).clamp(max=self.n_steps - 2)
        return (place + 1).double() / self.n_steps, self.weights.to(uniform.device)[place]

    def prior_nats(self, clean: Tensor) -> Tensor:
        """KL(N(√ᾱ·x0, 1−ᾱ) ‖ N(0, I)) at the last step."""
        return 0.5 * (self.last * clean.square() - self.last - math.log1p(-self.last)).flatten(1).sum(1)


# --- a whole set --------------------------------------------------------------------------------------------------


def batches_of(
    inputs: Inputs, source: SizedSource, count: int, size: int = 32, *, seed: int = 0
) -> Iterator[MicroBatch]:
    """``count`` samples of ``source`` as a run's model is fed them, bucket by bucket, at most ``size`` at a time.

    They are the first of ``shuffled(source, seed)``. One that is in no bucket (its size is not known) counts as bad.
    """
    samples = np.fromiter(islice(shuffled(source, seed), count), dtype=np.int64)
    assignment = sort_into_buckets(inputs.config, source, 1)
    groups: list[tuple[tuple[int, int] | None, np.ndarray]] = [(None, samples)]
    if assignment is not None:
        codes = assignment.codes[samples]
        groups = [(bucket, samples[codes == code]) for code, bucket in enumerate(assignment.buckets)]
        groups.append((None, samples[codes >= len(assignment.buckets)]))
    assembler = inputs.assembler(source, buckets=assignment.buckets if assignment else ())
    for bucket, numbers in groups:
        for begin in range(0, len(numbers), size):
            part = numbers[begin : begin + size]
            yield inputs.ready(assembler.assemble(np.zeros_like(part), part, bucket))


def evaluate_likelihood(
    objective: Objective,
    model: Callable[..., Tensor],
    batches: Iterable[MicroBatch],
    *,
    methods: Sequence[Literal["vlb", "ode"]] = ("vlb", "ode"),
    pixels: bool = False,
    start: float | None = None,
    n_times: int = 128,
    variance: Variance = "beta",
    divergence: Divergence = "auto",
    probes: int = 8,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    seed: int = 0,
) -> dict[str, Any]:
    """Mean likelihoods over all samples of ``batches``, as JSON with everything that the figures depend on.

    ``model(latents (B,C,H,W), time (B,), **conditions)`` predicts. Bad samples are left out and counted. Each method has
    ``nats`` and ``bits_per_dim`` a sample, and of both the standard error that the random numbers make
    (``monte_carlo``) and the one over the samples, which has the former in it (null for one sample). Raises DataError
    when no sample is left, and what ``vlb`` and ``ode_log_likelihood`` raise.
    """
    found: dict[str, list[Estimate]] = {method: [] for method in methods}
    bad = 0
    for batch in batches:
        good = batch.weight > 0
        bad += int((~good).sum())
        if not bool(good.any()):
            continue
        clean, numbers = batch.clean[good].float(), batch.samples[good].tolist()
        conditions = {name: value[good] for name, value in batch.conditions.items()}

        def predict(latents: Tensor, time: Tensor, conditions: dict[str, Tensor] = conditions) -> Tensor:
            return model(latents, time, **conditions).to(latents.dtype)

        if "vlb" in found:
            bound = vlb(
                objective, predict, clean,
                n_times=n_times, seed=seed, samples=numbers, pixels=pixels, start=start, variance=variance,
            )  # fmt: skip
            found["vlb"].append(bound)
        if "ode" in found:
            likelihood = ode_log_likelihood(
                objective, predict, clean,
                divergence=divergence, probes=probes, seed=seed, rtol=rtol, atol=atol, samples=numbers, pixels=pixels,
                start=start,
            )  # fmt: skip
            found["ode"].append(likelihood)
    if not any(found.values()):
        raise DataError(f"no sample to find the likelihood of; {bad} were bad", cure="longskip data lint names them")
    dims = sorted({estimate.dims for estimates in found.values() for estimate in estimates})
    result: dict[str, Any] = {
        "objective": objective.group.objective,
        "prediction": objective.group.prediction,
        "of": "8-bit pixels" if pixels else "density",
        "bad": bad,
        "dims": dims[0] if len(dims) == 1 else dims,
        "noise_floor": noise_floor(objective, pixels=pixels, start=start),
        "seed": seed,
    }
    if "vlb" in found:
        result["vlb"] = _summary(found["vlb"]) | {"n_times": n_times}
        if isinstance(objective, Ddpm):
            result["vlb"]["variance"] = variance
    if "ode" in found:
        exact = [_exact_divergence(divergence, size) for size in dims]
        result["ode"] = _summary(found["ode"]) | {
            "divergence": "exact" if all(exact) else "hutchinson",
            "probes": None if all(exact) else probes,
            "solver": "RK45",
            "rtol": rtol,
            "atol": atol,
        }
    return result


def _summary(estimates: Sequence[Estimate]) -> dict[str, Any]:
    nats, errors = torch.cat([e.nats for e in estimates]), torch.cat([e.error for e in estimates])
    per_dim = torch.cat([torch.full_like(e.nats, 1 / (e.dims * math.log(2))) for e in estimates])
    count = len(nats)

    def mean(name: str, values: Tensor, own: Tensor) -> dict[str, Any]:
        over = float(values.std() / math.sqrt(count)) if count > 1 else None
        monte_carlo = float(own.square().sum().sqrt() / count)
        return {name: float(values.mean()), f"{name}_error": {"monte_carlo": monte_carlo, "over_samples": over}}

    result = {"count": count} | mean("nats", nats, errors)
    result |= mean("bits_per_dim", nats * per_dim, errors * per_dim)
    if estimates[0].terms:
        result["terms"] = {
            name: float(torch.cat([e.terms[name] for e in estimates]).mean()) for name in estimates[0].terms
        }
    return result | {"evaluations": sum(e.evaluations for e in estimates), "batches": len(estimates)}


def _exact_divergence(divergence: str, dims: int) -> bool:
    if divergence not in ("auto", "exact", "hutchinson"):
        raise ConfigError(f"divergence {divergence!r}", cure="one of auto, exact, hutchinson")
    return divergence == "exact" or (divergence == "auto" and dims <= EXACT_DIMS)


def _check_pixels(clean: Tensor, pixels: bool) -> None:
    if not pixels:
        return
    levels = (clean.double() + 1) * 127.5
    apart = float((levels - levels.round().clamp(0, 255)).abs().max())
    if apart > 1e-3:
        raise DataError(
            f"values that are {apart:.3g} of a level off the 256 of 8-bit pixels in [−1, 1]",
            cure="take the likelihood of a density (pixels=False), as of latents",
        )


def _stack(
    seed: int, draw: int, numbers: Sequence[int], purpose: str, take: Callable[[np.random.Generator], Any]
) -> Tensor:
    """What ``take`` draws for each of the samples, stacked, float64."""
    return torch.from_numpy(np.stack([np.asarray(take(generator(seed, draw, i, purpose))) for i in numbers])).double()
