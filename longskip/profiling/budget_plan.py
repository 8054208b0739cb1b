"""What a budget of C training FLOPs buys: the size and the data that a scaling law asks for, as models that can be built."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from longskip.errors import ConfigError
from longskip.models.presets import PRESETS
from longskip.models.specs import UViTSpec
from longskip.profiling.hardware import Device
from longskip.profiling.laws import (
    DIT_IN_CONTEXT,
    MOST_PRICE,
    MOST_WATTS,
    TIFA_2404_02883,
    Law,
    Optimum,
    ParametricLaw,
    bounded,
    intervals_at,
    positive_budget,
)

NO_MFU = (
    "no hours, days, money and energy: they need --mfu, the share that an earlier run reached (longskip budget report)"
)
HEAD_WIDTH = 64
VAE_FACTOR = 8
BASE = "uvit-2.3b"  # whose patch, channels and text a custom shape takes
_USUAL_ASPECT = 48  # width ÷ blocks of uvit-2.3b and uvit-8b
_ASPECTS = (16, 80)
_WIDE = 1024  # from here on widths are multiples of 128, whole tiles of every kernel
_CLOSE = 0.03
_MOST_OFF = 1.5
_MAX_WIDTH, _MAX_SIDE, _MAX_BATCH = 16_384, 16_384, 10**7


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the plan runs on: ``gpus`` devices with ``peak`` FLOP/s each, of which ``mfu`` (0 to 1) is used; None where
    nobody knows it. ``assumed``: nobody said how many devices."""

    device: Device
    precision: str
    mfu: float | None
    gpus: int
    assumed: bool = False

    @property
    def flops_per_hour(self) -> float | None:
        """Model FLOPs that one device spends in an hour; None without an MFU."""
        peak = self.device.peak(self.precision)
        return None if self.mfu is None else 3600 * peak * self.mfu


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model for the budget. ``off`` = N ÷ N_opt. Steps of the global batch that spend C: ``steps_6nd`` by 6ND with the
    law's tokens, ``steps`` by exact FLOPs; ``exact_flops`` is what they really spend, ``exact_flops_6nd`` what the steps
    by 6ND would. ``data_off`` = the tokens of ``steps`` ÷ D_opt. ``loss`` only where the law speaks of any N and D.
    """

    name: str
    spec: UViTSpec
    params: int
    off: float
    flops_per_image: int
    steps_6nd: int
    steps: int
    images: int
    image_tokens: int
    tokens: int
    exact_flops: int
    exact_flops_6nd: int
    data_off: float
    loss: float | None

    def as_json(self) -> dict[str, Any]:
        body = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "spec"}
        shape = {"width": self.spec.width, "depth": self.spec.depth, "n_heads": self.spec.n_heads}
        return body | shape | {"n_blocks": self.spec.n_blocks, "preset": self.name in PRESETS}


@dataclass(frozen=True, slots=True)
class Plan:
    """``candidates``: the custom shape first, then the nearest presets. Hours, days, money and energy are of all C;
    None where no device, MFU, price or power was given. ``tifa`` by what it is predicted from."""

    flops: int
    law: Law
    optimum: Optimum
    batch: int
    latent_size: tuple[int, int]
    candidates: tuple[Candidate, ...]
    hardware: Hardware | None
    device_hours: float | None
    days: float | None
    money: float | None
    currency: str
    energy_kwh: float | None
    tifa: dict[str, dict[str, Any]]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        told = ("name", "source", "note", "tokens", "budgets", "fitted_on", "intervals")
        law = {name: getattr(self.law, name) for name in told}
        on = self.hardware
        return {
            "flops": self.flops,
            "law": law,
            "optimum": asdict(self.optimum)
            | {"range": self.optimum.range_note}
            | {f"{name}_interval": list(span) for name, span in intervals_at(self.law, self.flops).items()},
            "batch": self.batch,
            "latent_size": list(self.latent_size),
            "candidates": [candidate.as_json() for candidate in self.candidates],
            "hardware": None
            if on is None
            else {"gpu": on.device.name, "gpus": on.gpus, "gpus_assumed": on.assumed, "precision": on.precision,
                  "mfu": on.mfu, "peak_flops": on.device.peak(on.precision)},
            "device_hours": self.device_hours,
            "days": self.days,
            "money": self.money,
            "currency": self.currency,
            "energy_kwh": self.energy_kwh,
            "tifa": self.tifa,
            "notes": list(self.notes),
        }  # fmt: skip


def make_plan(
    flops: int,
    law: Law,
    *,
    resolution: tuple[int, int] = (256, 256),
    batch: int = 2048,
    hardware: Hardware | None = None,
    price: float | None = None,
    currency: str = "USD",
    watts: float | None = None,
    presets: int = 2,
) -> Plan:
    """The plan for C = ``flops``; ``resolution`` (H, W) in pixels, ``price`` in ``currency`` and ``watts`` per device (hour).

    ConfigError for numbers out of range, a batch that the budget cannot pay once, or an N_opt that no U-ViT has.
    """
    bounded("price", price, MOST_PRICE)
    bounded("watts", watts, MOST_WATTS)
    optimum = law.optimum(positive_budget(flops))
    if not 1 <= batch <= _MAX_BATCH:
        raise ConfigError(f"batch {batch} is outside 1 to {_MAX_BATCH:,}", cure="2048 is usual at these sizes")
    base = replace(PRESETS[BASE], latent_size=latents(resolution))
    shapes = {"custom": shape_for(optimum.params, base)} | dict(nearest_presets(optimum.params, base, presets))
    candidates = tuple(_candidate(name, spec, flops, law, optimum, batch) for name, spec in shapes.items())
    rate = None if hardware is None else hardware.flops_per_hour
    hours = None if rate is None else flops / rate
    power = watts if watts is not None else hardware.device.watts if hardware else None
    return Plan(
        flops=flops,
        law=law,
        optimum=optimum,
        batch=batch,
        latent_size=base.latent_size,
        candidates=candidates,
        hardware=hardware,
        device_hours=hours,
        days=hours / hardware.gpus / 24 if hours is not None and hardware else None,
        money=hours * price if hours is not None and price is not None else None,
        currency=currency,
        energy_kwh=hours * power / 1000 if hours is not None and power is not None else None,
        tifa=_tifa(flops, optimum.params),
        notes=tuple(_notes(law, base, hardware, power, watts)),
    )


def latents(resolution: tuple[int, int]) -> tuple[int, int]:
    """Latents (H, W) of pixels (H, W); ConfigError for sides that patches of latents do not divide, or absurd ones."""
    unit = VAE_FACTOR * PRESETS[BASE].patch
    for side in resolution:
        if side < unit or side % unit or side > _MAX_SIDE:
            near = min(max(round(side / unit), 1) * unit, _MAX_SIDE)
            raise ConfigError(
                f"resolution side {side} is not a multiple of {unit} between {unit} and {_MAX_SIDE:,}",
                cure=f"take {near}",
            )
    return resolution[0] // VAE_FACTOR, resolution[1] // VAE_FACTOR


def shape_for(params: float, base: UViTSpec) -> UViTSpec:
    """The U-ViT with heads of 64 whose N is nearest to ``params``; patch, channels and conditions are ``base``'s.

    Among shapes within 3% of N the one whose width ÷ blocks is nearest to 48, that of the published sizes. ConfigError
    where even the nearest is off by more than half.
    """
    found = [(abs(math.log(spec.param_counts().total / params)), spec) for spec in _shapes(params, base)]
    close = [spec for distance, spec in found if distance <= _CLOSE]
    if close:
        return min(close, key=lambda spec: abs(math.log(spec.width / spec.n_blocks / _USUAL_ASPECT)))
    distance, spec = min(found, key=lambda pair: pair[0])
    if distance > math.log(_MOST_OFF):
        total = spec.param_counts().total
        side = "small" if total > params else "large"
        raise ConfigError(
            f"N_opt = {params:,.0f} is too {side} for a U-ViT with heads of {HEAD_WIDTH}; the nearest has {total:,}",
            cure="give a larger budget" if side == "small" else "give a smaller budget",
        )
    return spec


def _shapes(params: float, base: UViTSpec) -> Iterator[UViTSpec]:
    """For every width the two depths on both sides of N, within the usual aspects."""
    narrow, wide = range(HEAD_WIDTH, _WIDE, HEAD_WIDTH), range(_WIDE, _MAX_WIDTH + 1, 2 * HEAD_WIDTH)
    for width in (*narrow, *wide):
        one = replace(base, width=width, depth=2, n_heads=width // HEAD_WIDTH)
        first = one.param_counts().total
        per_pair = replace(one, depth=4).param_counts().total - first
        pairs = 1 + (params - first) / per_pair
        low, high = (max(1, math.floor(width / aspect / 2)) for aspect in reversed(_ASPECTS))
        for halves in {min(max(low, whole), high) for whole in (math.floor(pairs), math.ceil(pairs))}:
            yield replace(one, depth=2 * halves)


def nearest_presets(params: float, base: UViTSpec, count: int) -> list[tuple[str, UViTSpec]]:
    """The text-to-image presets on latents, at ``base``'s resolution, whose N is nearest."""
    fitting = {
        name: replace(spec, latent_size=base.latent_size)
        for name, spec in PRESETS.items()
        if spec.n_txt and spec.channels == base.channels and spec.patch == base.patch
    }
    return sorted(fitting.items(), key=lambda item: abs(math.log(item[1].param_counts().total / params)))[:count]


def _candidate(name: str, spec: UViTSpec, flops: int, law: Law, optimum: Optimum, batch: int) -> Candidate:
    cost, params = spec.flops(1), spec.param_counts().total
    per_image = cost.image_tokens if law.tokens == "image" else cost.tokens
    steps = flops // (batch * cost.model_flops)
    steps_6nd = flops // (6 * params * per_image * batch)
    if steps < 1:
        raise ConfigError(
            f"{flops:.3g} FLOPs do not pay one step of {batch:,} images of {name} ({batch * cost.model_flops:.3g})",
            cure=f"a batch of at most {flops // cost.model_flops:,}, or a larger budget"
            if flops >= cost.model_flops
            else "give a larger budget",
        )
    images = steps * batch
    seen = images * per_image
    return Candidate(
        name=name,
        spec=spec,
        params=params,
        off=params / optimum.params,
        flops_per_image=cost.model_flops,
        steps_6nd=steps_6nd,
        steps=steps,
        images=images,
        image_tokens=images * cost.image_tokens,
        tokens=images * cost.tokens,
        exact_flops=images * cost.model_flops,
        exact_flops_6nd=steps_6nd * batch * cost.model_flops,
        data_off=float(Fraction(seen) / Fraction(optimum.tokens)),
        loss=law.loss(params, seen) if isinstance(law, ParametricLaw) else None,
    )


def _tifa(flops: int, params: float) -> dict[str, dict[str, Any]]:
    found = {}
    for name, x in (("compute", flops / 1e9), ("params", params / 1e6)):
        function = TIFA_2404_02883[name]
        found[name] = {"tifa": function(x), "of": function.of, "extrapolation": function.extrapolation(x)}
    return found


def _notes(
    law: Law, base: UViTSpec, hardware: Hardware | None, power: float | None, watts: float | None
) -> Iterator[str]:
    if law.note:
        yield f"{law.name}: {law.note}"
    if law is DIT_IN_CONTEXT and base.n_img != 256:
        yield f"the law was fitted at 256 image tokens an image (256² pixels); this resolution has {base.n_img:,}"
    if TIFA_2404_02883["params"].note:
        yield f"TIFA by parameters (2404.02883): {TIFA_2404_02883['params'].note}"
    if hardware is not None and hardware.mfu is None:
        yield NO_MFU
    elif hardware is not None and power is None:
        yield f"energy unknown: no rated power for {hardware.device.name}; give --watts"
    elif hardware is not None and watts is None:
        yield f"energy at the board's rated power, {power:g} W, which is a ceiling"
