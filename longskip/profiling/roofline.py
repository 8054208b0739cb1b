"""An op's passes against a device's roofline: the shortest time its arithmetic and its bytes allow (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from longskip.kernels.formulas import OpCost
from longskip.profiling.flop_ledger import Row
from longskip.profiling.hardware import Device

__all__ = ["Bound", "bounds_of"]


@dataclass(frozen=True, slots=True)
class Bound:
    """One op in one pass (``forward``, ``backward``, ``recomputed``; the optimizer's is its forward).

    ``seconds`` is the longest of three: contractions at the dtype's peak, elementwise FLOPs at the float32 peak, and
    bytes at the memory's bandwidth, every tensor read and written once. ``binds``: which one (``compute``, ``elementwise``,
    ``memory``).
    """

    block: str
    name: str
    phase: str
    flops: int
    elementwise: int
    bytes: int
    seconds: float
    binds: str

    @property
    def intensity(self) -> float | None:
        """FLOPs of both kinds per byte; None where bytes are not counted."""
        return (self.flops + self.elementwise) / self.bytes if self.bytes else None

    @property
    def attainable(self) -> float:
        """FLOP/s of both kinds at the bound."""
        return (self.flops + self.elementwise) / self.seconds

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"intensity": self.intensity, "attainable_flops": self.attainable}


def bounds_of(block: str, name: str, rows: Sequence[Row], device: Device, dtype: str) -> list[Bound]:
    """The passes that ``rows`` of one op have; ConfigError for a dtype that the device has no rate for."""
    passes = {
        "forward": _sum([row.forward for row in rows]),
        "backward": _sum([row.backward + OpCost(row.repeated_macs) for row in rows]),
        "recomputed": _sum([row.recomputed for row in rows]),
    }
    found = []
    for phase, cost in passes.items():
        if cost != OpCost():
            times = {
                "compute": cost.flops / device.peak(dtype),
                "elementwise": cost.elementwise / device.peak("fp32"),
                "memory": cost.bytes / device.bandwidth,
            }
            binds = max(times, key=times.__getitem__)
            found.append(Bound(block, name, phase, cost.flops, cost.elementwise, cost.bytes, times[binds], binds))
    return found


def _sum(costs: Sequence[OpCost]) -> OpCost:
    return sum(costs, OpCost())
