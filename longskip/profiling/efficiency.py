"""What share of a device's ceilings each op reaches: measured tables, and stated assumptions where nothing was measured.

An op's ideal time is the longer of two: its arithmetic at the device's rates (contractions at the dtype's peak,
everything else at the float32 peak) and its bytes at the memory's bandwidth. An efficiency is ideal ÷ real. A measured
one holds for both terms; an assumed one is a share of the rates and another of the bandwidth. No torch.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from longskip.errors import ConfigError
from longskip.kernels.formulas import OpCost
from longskip.profiling.hardware import Device, lookup

__all__ = ["ASSUMED", "Efficiencies", "Ideal", "Measured", "Share", "adopt", "cache_folder", "ideal"]

Direction = Literal["forward", "backward"]
Case = Literal["slow", "likely", "fast"]
CASES: tuple[Case, Case, Case] = ("slow", "likely", "fast")
Clock = Literal["cpu", "wall"]
DIRECTIONS: tuple[Direction, Direction] = ("forward", "backward")
# Entries of another size say little beyond this factor in FLOPs or bytes; the prediction then names it.
NEAR = 4.0
_SAME = 1e-3


@dataclass(frozen=True, slots=True)
class Ideal:
    """The shortest possible times of some work on a device, in seconds: its arithmetic and its bytes."""

    compute: float
    memory: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory)


def ideal(cost: OpCost, device: Device, dtype: str) -> Ideal:
    """Contractions at the peak of ``dtype`` plus elementwise FLOPs at the float32 peak; bytes at the bandwidth."""
    compute = cost.flops / device.peak(dtype) if cost.macs else 0.0
    if cost.elementwise:
        compute += cost.elementwise / device.peak("fp32")
    return Ideal(compute, cost.bytes / device.bandwidth)


@dataclass(frozen=True, slots=True)
class Measured:
    """One call of an op in one direction, as measured: its sizes, its declared cost and its median seconds.

    ``cpu``: processor seconds of the process, divided by its threads; ``wall``: seconds of the wall clock. On a GPU
    both are the device's time. ``macs`` are the executed ones, a fused attention's second QKᵀ among them.
    """

    op: str
    direction: Direction
    sizes: Mapping[str, int]
    macs: int
    elementwise: int
    bytes: int
    cpu: float
    wall: float

    @property
    def cost(self) -> OpCost:
        return OpCost(self.macs, self.elementwise, self.bytes)


@dataclass(frozen=True, slots=True)
class Share:
    """Efficiencies of one op: of its arithmetic and of its bytes; ``origin`` says where they come from."""

    compute: float
    memory: float
    origin: str
    measured: bool


@dataclass(frozen=True, slots=True)
class Assumption:
    """Efficiencies where nothing was measured, with their reason; ``slow`` and ``fast``: (compute, memory) of the ends
    between which the truth is taken to lie."""

    name: str
    compute: float
    memory: float
    slow: tuple[float, float]
    fast: tuple[float, float]
    reason: str

    def share(self, case: Case = "likely") -> Share:
        compute, memory = {"slow": self.slow, "likely": (self.compute, self.memory), "fast": self.fast}[case]
        return Share(compute, memory, f"assumed: {self.name}", False)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.compute:.0%} of the peak ({self.slow[0]:.0%} to {self.fast[0]:.0%}), {self.memory:.0%} of "
            f"the bandwidth ({self.slow[1]:.0%} to {self.fast[1]:.0%}); {self.reason}"
        )


_COPY, _SLOW_COPY, _FAST_COPY = 0.85, 0.70, 0.92  # of the bandwidth, by kernels that move bytes and little else
_FA3 = "FlashAttention-3's figures on an H100 of 989 TFLOP/s at 512 to 4,000 tokens (arXiv 2407.08608, section 4.1)"


def _attention(name: str, compute: float, reason: str) -> Assumption:
    """8 points to either side, about half of what the figures spread."""
    ends = (compute - 0.08, _SLOW_COPY), (compute + 0.08, _FAST_COPY)
    return Assumption(f"attention {name}", compute, _COPY, *ends, f"{_FA3}: {reason}")


ASSUMED: Mapping[str, Assumption] = {
    assumption.name: assumption
    for assumption in (
        Assumption(
            "products",
            0.70,
            _COPY,
            (0.60, _SLOW_COPY),
            (0.80, _FAST_COPY),
            "the best large products reach 80 to 90% of an H100's peak (arXiv 2407.08608, section 1); "
            "a model's are smaller and alternate with other work",
        ),
        _attention("forward, head dim up to 64", 0.40, "34 to 48%"),
        _attention("forward, head dim above 64", 0.55, "47 to 65%"),
        _attention("backward, head dim up to 64", 0.35, "27 to 46%"),
        _attention("backward, head dim above 64", 0.45, "32 to 55%"),
        Assumption(
            "elementwise",
            0.50,
            _COPY,
            (0.30, _SLOW_COPY),
            (0.70, _FAST_COPY),
            "the best norm kernels reach 90% of an H100's bandwidth (quack), unfused ones less",
        ),
    )
}


def assumed(op: str, direction: Direction, sizes: Mapping[str, int], contraction: bool, case: Case = "likely") -> Share:
    """The default efficiencies of an op, marked as assumed."""
    if op.startswith("attention"):
        wide = "above 64" if sizes.get("head_dim", 64) > 64 else "up to 64"
        return ASSUMED[f"attention {direction}, head dim {wide}"].share(case)
    return ASSUMED["products" if contraction else "elementwise"].share(case)


@dataclass(frozen=True)
class Efficiencies:
    """Measured entries of one device and dtype.

    ``overhead``: seconds that a step spends beside its ops, per call of an op (modules, autograd's bookkeeping), by
    direction and clock. ``about``: versions, commit, date, command.
    """

    device: str
    dtype: str
    entries: tuple[Measured, ...] = ()
    overhead: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def share(
        self,
        op: str,
        direction: Direction,
        sizes: Mapping[str, int],
        cost: OpCost,
        device: Device,
        clock: Clock = "cpu",
    ) -> Share | None:
        """Of the entry with this cost, the same sizes first. Else the two entries that are nearest in FLOPs and bytes
        lay a line through time over ideal time, a fixed cost and a rate; below the smaller one its efficiency holds.
        None where the op was not measured in this direction."""
        found = [entry for entry in self.entries if (entry.op, entry.direction) == (op, direction)]
        if not found:
            return None
        found.sort(key=lambda entry: (distance(entry.cost, cost), dict(entry.sizes) != dict(sizes)))
        factor = math.exp(distance(found[0].cost, cost))
        near = [(ideal(entry.cost, device, self.dtype).seconds, float(getattr(entry, clock))) for entry in found[:2]]
        reached = near[0][0] / near[0][1]
        if factor - 1 < _SAME:
            return Share(reached, reached, "measured", True)
        wanted = ideal(cost, device, self.dtype).seconds
        (low, took_low), (high, took_high) = min(near), max(near)
        if wanted > low and high > low and took_high > took_low:
            line = wanted / (took_low + (took_high - took_low) / (high - low) * (wanted - low))
            reached = min(line, max(1.0, low / took_low, high / took_high))  # no more than all, unless a cache gave it
        return Share(reached, reached, f"measured at other sizes, {factor:.1f}× apart", factor <= NEAR)

    def to_json(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "dtype": self.dtype,
            "overhead": dict(self.overhead),
            "about": dict(self.about),
            "entries": [asdict(entry) | {"sizes": dict(entry.sizes)} for entry in self.entries],
        }

    def save(self, folder: Path | None = None) -> Path:
        """Write the table into ``folder`` (default: the user's cache folder); the file's path."""
        path = (folder or cache_folder()) / file_name(self.device, self.dtype)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.to_json(), indent=1) + "\n", "utf-8")
        os.replace(temporary, path)
        return path


def distance(one: OpCost, other: OpCost) -> float:
    """How far two costs are apart: the larger logarithm of the ratios of FLOPs and of bytes."""

    def apart(a: int, b: int) -> float:
        return abs(math.log(max(a, 1) / max(b, 1)))

    def work(cost: OpCost) -> int:
        return cost.flops + cost.elementwise

    return max(apart(work(one), work(other)), apart(one.bytes, other.bytes))


def cache_folder() -> Path:
    """Where measured efficiencies lie: ``$XDG_CACHE_HOME/longskip/efficiency``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longskip" / "efficiency"


def file_name(device: str, dtype: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{device} {dtype}".lower()).strip("-") + ".json"


def of_device(device: str, dtype: str, folder: Path | None = None) -> Efficiencies | None:
    """The table that was saved for the device and dtype; None where there is none."""
    path = (folder or cache_folder()) / file_name(device, dtype)
    return load(path) if path.is_file() else None


def load(path: Path) -> Efficiencies:
    """A table from its JSON, or from what ``longskip bench kernels --out`` wrote; ConfigError for anything else."""
    again = "make it anew: longskip bench machine, or longskip bench kernels --out on a GPU"
    try:
        tree = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}", cure=again) from None
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}", cure=again) from None
    if not isinstance(tree, dict) or "device" not in tree or not {"entries", "rows"} & tree.keys():
        raise ConfigError(f"{path} holds no measured efficiencies", cure=again)
    try:
        return _from_bench(tree) if "rows" in tree else _from_json(tree)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged: {error!r}", cure=again) from None


def adopt(path: Path, folder: Path | None = None) -> Path:
    """Keep a table from elsewhere (``load``) for the device that it names, under the name of that device's row, where
    ``of_device`` finds it; the new file. ConfigError for a device without a row."""
    table = load(path)
    device = lookup(table.device)
    if device is None:
        raise ConfigError(
            f"{path} was measured on {table.device!r}, which no row of the hardware table describes",
            cure="describe it in your hardware.yaml first",
        )
    return replace(table, device=device.name).save(folder)


def _from_json(tree: Mapping[str, Any]) -> Efficiencies:
    entries = tuple(Measured(**entry) for entry in tree["entries"])
    _check(entries)
    return Efficiencies(tree["device"], tree["dtype"], entries, tree.get("overhead", {}), tree.get("about", {}))


def _from_bench(tree: Mapping[str, Any]) -> Efficiencies:
    """Of each case and mode the fastest of our providers: what ``auto`` takes."""
    dtype = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[tree["dtype"]]
    if not tree.get("claim", False):
        raise ValueError("these times were taken without a GPU and claim nothing")
    best: dict[tuple[str, str, str], Measured] = {}
    for row in tree["rows"]:
        if "ms" not in row or row["mode"] not in ("forward", "backward") or row["provider"] not in ("torch", "triton"):
            continue
        seconds, key = row["ms"]["median"] / 1e3, (row["op"], row["case"], row["mode"])
        entry = Measured(row["op"], row["mode"], {}, row["flops"] // 2, 0, row["bytes"], seconds, seconds)
        if key not in best or seconds < best[key].cpu:
            best[key] = entry
    _check(best.values())
    about = {name: tree[name] for name in ("versions", "commit", "date", "command") if name in tree}
    return Efficiencies(tree["device"], dtype, tuple(best.values()), {}, about)


def _check(entries: Iterable[Measured]) -> None:
    for entry in entries:
        for seconds in (entry.cpu, entry.wall):
            if not 0 < seconds < math.inf:
                raise ValueError(f"{entry.op} took {seconds} seconds")
