"""``longskip profile``: the ledger of one model at one size, with everything that is read off it (no torch).

A ``Subject`` says what is profiled: a preset, or what a run's configuration builds. ``profile`` makes its ledger (model,
text encoder, frozen encoders that run along, loss, optimizer) and holds it against the ways of counting 6ND and, where
a device is named, against its roofline. Sums are exact integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from longskip.errors import ConfigError
from longskip.models.calls import TokenClass
from longskip.models.specs import ParamCounts
from longskip.profiling import efficiency
from longskip.profiling.accounting import Account, Work, accounts
from longskip.profiling.flop_ledger import FlopLedger, Row
from longskip.profiling.hardware import Device
from longskip.profiling.roofline import Bound, bounds_of
from longskip.profiling.step_time import StepTime, step_time
from longskip.profiling.subjects import Subject

__all__ = ["Line", "Profile", "all_presets", "label", "profile"]

# Compute capability of the devices that our kernels are laid out for (kernels/jit.py, TARGETS).
_CAPABILITIES = {"a100": 80, "h100": 90, "h200": 90, "b200": 100, "gb200": 100}


@dataclass(frozen=True)
class Line:
    """Rows added up under a name: FLOPs of contractions by pass, elementwise FLOPs, bytes; ``units`` are how many."""

    block: str
    name: str
    op: str
    part: str
    units: tuple[str, ...]
    parameters: str | None
    forward: int
    backward: int
    recomputed: int
    repeated: int
    elementwise: int
    padded: int
    bytes: int

    @property
    def hardware(self) -> int:
        return self.forward + self.backward + self.recomputed + self.repeated

    @property
    def intensity(self) -> float | None:
        """Executed FLOPs, elementwise ones with them, per byte; None where bytes are not counted (frozen encoders)."""
        return (self.hardware + self.elementwise) / self.bytes if self.bytes else None

    @classmethod
    def of(cls, block: str, name: str, rows: Sequence[Row]) -> Line:
        """The sum of some rows; op and class of weights where all have the same."""
        ops, weights = {row.op for row in rows}, {row.parameters for row in rows}
        return cls(
            block=block,
            name=name,
            op=ops.pop() if len(ops) == 1 else "",
            part=rows[0].part,
            units=tuple(dict.fromkeys(unit for row in rows for unit in row.units)),
            parameters=weights.pop() if len(weights) == 1 else None,
            forward=2 * sum(row.forward.macs for row in rows),
            backward=2 * sum(row.backward.macs for row in rows),
            recomputed=2 * sum(row.recomputed.macs for row in rows),
            repeated=2 * sum(row.repeated_macs for row in rows),
            elementwise=sum(row.elementwise for row in rows),
            padded=2 * sum(row.padded_macs for row in rows),
            bytes=sum(row.bytes for row in rows),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "block": self.block, "name": self.name, "op": self.op, "part": self.part, "units": list(self.units),
            "parameters": self.parameters, "forward_flops": self.forward, "backward_flops": self.backward,
            "recomputed_flops": self.recomputed, "repeated_flops": self.repeated, "hardware_flops": self.hardware,
            "elementwise_flops": self.elementwise, "padded_flops": self.padded, "bytes": self.bytes,
            "intensity": self.intensity,
        }  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """A subject's ledger of one micro-batch with its optimizer step, and what is read off it.

    ``device`` None: no roofline and no times. ``notes``: what was assumed, a sentence each.
    """

    subject: Subject
    ledger: FlopLedger
    counts: ParamCounts
    device: Device | None = None
    capability: int | None = None
    notes: tuple[str, ...] = ()

    # -- lines ---------------------------------------------------------------------------------------------------------

    @cached_property
    def _skips(self) -> frozenset[str]:
        return frozenset(unit for row in self.ledger.rows if row.op == "skip_linear" for unit in row.units)

    def block_of(self, row: Row) -> str:
        """``embed``, ``blocks``, ``skip blocks``, ``head``, ``text``, ``encoders``, ``loss``, ``optimizer``."""
        return "skip blocks" if row.units[0] in self._skips else row.kind

    def lines(self, depth: str) -> list[Line]:
        """The ledger by ``block``, by ``op`` of each block, by ``unit``, or row by row (``row``)."""
        if depth == "row":
            return [Line.of(self.block_of(row), row.name, [row]) for row in self.ledger.rows]
        rows = self.ledger.per_unit().rows if depth == "unit" else self.ledger.rows
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            block = self.block_of(row)
            name = {"block": block, "op": row.name, "unit": row.units[0]}[depth]
            groups.setdefault((block, name) if depth != "unit" else ("", name), []).append(row)
        found = [Line.of(block or self.block_of(some[0]), name, some) for (block, name), some in groups.items()]
        return sorted(found, key=lambda line: _ORDER.index(line.block)) if depth != "unit" else found

    @cached_property
    def total(self) -> Line:
        return Line.of("total", "total", self.ledger.rows)

    # -- tokens and accounts -------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> dict[TokenClass, int]:
        """Per image, by class."""
        spec = self.subject.spec
        counts: dict[TokenClass, int] = {
            "label": int(bool(spec.n_classes)), "time": 1, "text": spec.n_txt, "image": spec.n_img,
        }  # fmt: skip
        return {name: count for name, count in counts.items() if count}

    @property
    def parameters(self) -> int:
        """N: everything that is trained, the text encoder with it."""
        text = self.subject.text
        return self.counts.total + (text.param_counts().total if text else 0)

    @cached_property
    def accounts(self) -> list[Account]:
        """The ways to count this step's training compute, the exact one first; 6·N_token·D after 6·N·D."""
        batch, tokens = self.ledger.batch, sum(self.tokens.values())
        work = Work(batch, batch * self.tokens["image"], batch * tokens, self.ledger.model_flops)
        found = accounts([work], self.parameters, self.subject.spec)
        per_token = 6 * self.counts.per_token * work.tokens
        own = Account("n_token", self.counts.per_token, work.tokens, per_token, work.model_flops / per_token)
        at = 1 + next(index for index, account in enumerate(found) if account.name == "six_nd")
        return [*found[:at], own, *found[at:]]

    def ratio(self, name: str) -> float:
        """Exact model FLOPs ÷ those of an account (``six_nd``, ``image_tokens``, …)."""
        return next(account.exact_share for account in self.accounts if account.name == name)

    # -- the device ----------------------------------------------------------------------------------------------------

    @cached_property
    def bounds(self) -> list[Bound]:
        """Every op's passes against the device's roofline; none without a device."""
        if self.device is None:
            return []
        found = []
        for line in self.lines("op"):
            rows = [row for row in self.ledger.rows if (self.block_of(row), row.name) == (line.block, line.name)]
            found += bounds_of(line.block, line.name, rows, self.device, self.subject.precision)
        return found

    @property
    def bound_seconds(self) -> float:
        """The shortest step that the device's datasheet allows: a bound, not a prediction."""
        return sum(bound.seconds for bound in self.bounds)

    @property
    def mfu_ceiling(self) -> float | None:
        """Model FLOPs ÷ (the bound × peak); None where the device has no datasheet rate."""
        if self.device is None or self.device.measured:
            return None
        return self.ledger.model_flops / (self.bound_seconds * self.device.peak(self.subject.precision))

    @cached_property
    def prediction(self) -> StepTime | None:
        """The step with measured efficiencies where this device was measured, else with stated assumptions."""
        if self.device is None:
            return None
        dtype = self.subject.precision
        measured = efficiency.of_device(self.device.name, dtype)
        return step_time(self.ledger, self.device, dtype=dtype, measured=measured)

    # -- for machines --------------------------------------------------------------------------------------------------

    def to_json(self, depth: str = "row") -> dict[str, Any]:
        """All figures as full integers; ``rows`` are the ledger's, or every unit's by itself (``unit``)."""
        subject, ledger, spec = self.subject, self.ledger, self.subject.spec
        rows = replace(self, ledger=ledger.per_unit()).lines("row") if depth == "unit" else self.lines("row")
        return {
            "model": subject.name,
            "preset": subject.preset,
            "pixels": list(subject.pixels),
            "latents": [spec.channels, *spec.latent_size],
            "batch": ledger.batch,
            "precision": subject.precision,
            "checkpointing": subject.checkpointing,
            "kernels": dict(subject.kernels),
            "tokens": self.tokens,
            "tokens_per_image": sum(self.tokens.values()),
            "parameters": {
                "total": self.parameters, "backbone": self.counts.total, "token": self.counts.per_token,
                "image": self.counts.per_image, "partial": self.counts.partial,
                "text": self.parameters - self.counts.total,
            },
            "flops": {
                "forward": ledger.forward_flops, "model": ledger.model_flops,
                "model_per_image": ledger.model_flops // ledger.batch, "backward": ledger.backward_flops,
                "recomputed": ledger.recomputed_flops, "repeated": ledger.repeated_flops,
                "hardware": ledger.hardware_flops, "elementwise": ledger.elementwise_flops,
                "padded": ledger.padded_flops if self.capability else None,
            },
            "bytes": ledger.bytes,
            "forward_by_tokens": ledger.forward_by_tokens(),
            "forward_by_parameters": ledger.forward_by_parameters(),
            "accounts": [asdict(account) | {"label": label(account)} for account in self.accounts],
            "device": self._device_json(),
            "rows": [line.to_json() for line in rows],
            "notes": list(self.notes),
        }  # fmt: skip

    def _device_json(self) -> dict[str, Any] | None:
        device, found = self.device, self.prediction
        if device is None or found is None:
            return None
        return {
            "name": device.name,
            "source": device.source,
            "peak_flops": device.peak(self.subject.precision),
            "bandwidth": device.bandwidth,
            "bound_seconds": self.bound_seconds,
            "mfu_ceiling": self.mfu_ceiling,
            "predicted_seconds": found.seconds,
            "predicted_seconds_range": [found.fastest, found.slowest],
            "predicted_mfu": found.mfu,
            "measured_share": found.measured_share,
            "assumptions": list(found.assumptions),
            "ops": [bound.to_json() for bound in self.bounds],
        }


_ORDER = ("encoders", "text", "embed", "blocks", "skip blocks", "head", "loss", "optimizer")


def label(account: Account) -> str:
    """An account's name for people."""
    return "6·N_token·D" if account.name == "n_token" else account.label


def profile(subject: Subject, device: Device | None = None, capability: int | None = None) -> Profile:
    """The subject's step. With kernels of Triton and a ``device`` they are laid out for, or its compute ``capability``,
    the padding of their tiles is counted, which imports torch; nothing else here does."""
    notes = list(subject.notes)
    padding = None
    asked = capability is not None
    if "triton" in subject.kernels.values():
        capability = capability or (device and _CAPABILITIES.get(device.short.partition("-")[0])) or None
        padding, reason = _padding(capability, subject.itemsize)
        notes += [reason] if reason else []
    elif asked:
        raise ConfigError(
            f"--capability {capability}: only our kernels' tiles are counted", cure="add --kernels triton"
        )
    if subject.encoders:
        notes.append("of the frozen encoders the contractions are counted, neither elementwise FLOPs nor bytes")
    ledger, counts = subject.ledger(padding=padding), subject.spec.param_counts()
    return Profile(subject, ledger, counts, device, capability if padding else None, tuple(notes))


def _padding(capability: int | None, itemsize: int) -> tuple[Any, str]:
    """The counter of padded tiles for a device, or None and the reason."""
    if capability is None:
        return (
            None,
            "padded tiles are not counted: name a device that our kernels are laid out for (--gpu, --capability)",
        )
    try:
        from longskip.kernels import jit
        from longskip.profiling.padding import padding_on
    except ImportError as error:
        return None, f"padded tiles are not counted: {error.name or error} is not installed"
    if not jit.INSTALLED:
        return None, "padded tiles are not counted: triton is not installed"
    return padding_on(capability, itemsize), ""


def all_presets(
    subjects: Sequence[Subject], device: Device | None = None, capability: int | None = None
) -> list[dict[str, Any]]:
    """One row a preset, per image: what ``longskip profile --all`` prints.

    ``elementwise_share``: of all FLOPs that the model executes forward and backward, loss and optimizer apart.
    """
    rows = []
    for subject in subjects:
        found = profile(subject, device, capability)
        own = found.ledger.by(lambda row: row.part)["model"]
        batch = found.ledger.batch
        row = {
            "preset": subject.name,
            "pixels": list(subject.pixels),
            "tokens": sum(found.tokens.values()),
            "image_tokens": found.tokens["image"],
            "parameters": found.parameters,
            "parameters_token": found.counts.per_token,
            "forward_macs": found.ledger.forward_flops // 2 // batch,
            "model_flops": found.ledger.model_flops // batch,
            "hardware_flops": found.ledger.hardware_flops // batch,
            "elementwise_share": own.elementwise_flops / (own.elementwise_flops + own.hardware_flops),
            "exact_over_6nd": found.ratio("six_nd"),
            "exact_over_6nd_image_tokens": found.ratio("image_tokens"),
        }
        if device is not None:
            row |= {"batch": batch, "bound_seconds": found.bound_seconds, "mfu_ceiling": found.mfu_ceiling}
        rows.append(row)
    return rows
