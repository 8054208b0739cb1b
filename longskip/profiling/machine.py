"""This machine as a device: what ``longskip bench machine`` measures, prints and keeps for ``--gpu this``.

Rates are taken by processor time per thread, so that what else runs on the machine does not count: they are what it
reaches when it is left alone. They are measured, no datasheet's, and give no MFU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from longskip.models.calls import Call
from longskip.profiling import efficiency, hardware_file
from longskip.profiling.bench_timing import BEYOND
from longskip.profiling.calibration import Ceilings, calibrate, ceilings
from longskip.profiling.efficiency import Efficiencies, Measured
from longskip.profiling.hardware import THIS, Device, processor, row, user_file

__all__ = ["Machine", "measure_machine", "measured_device"]


@dataclass(frozen=True)
class Machine:
    """The ceilings and the ops' efficiencies of this machine's processor; ``memory`` in bytes. ``load``: the load average
    of the last minute before and after, on ``cores`` cores."""

    ceilings: Ceilings
    memory: int
    efficiencies: Efficiencies | None = None
    cores: int = 0
    load: tuple[float, float] = (0.0, 0.0)

    @property
    def dtypes(self) -> tuple[str, ...]:
        return tuple(name for name in self.ceilings.by_cpu if name != "copy")

    @property
    def source(self) -> str:
        found = self.ceilings
        return (
            f"measured by longskip bench machine: products of {found.size}³ and copies of {found.copied >> 20} MiB on "
            f"{found.threads} threads, by processor time"
        )

    def fields(self) -> dict[str, Any]:
        """The row for the user's hardware file."""
        rates = self.ceilings.by_cpu
        return {
            "name": processor(),
            "short": THIS,
            "teraflops": {dtype: round(rates[dtype] / 1e12, 6) for dtype in self.dtypes},
            "memory_gb": round(self.memory / 1e9, 3),
            "bandwidth_gb_s": round(rates["copy"] / 1e9, 3),
            "measured": True,
            "source": self.source,
        }

    def device(self) -> Device:
        """The same as a device."""
        fields = self.fields()
        return row(
            fields["name"], "", short=THIS, teraflops=fields["teraflops"], gigabytes=fields["memory_gb"],
            gb_per_second=fields["bandwidth_gb_s"], source=fields["source"], measured=True,
        )  # fmt: skip

    def keep(self) -> list[str]:
        """Write the row into the user's hardware file and the efficiencies into the cache folder; the files' paths."""
        hardware_file.add_device(self.fields(), user_file())
        kept = [str(user_file())]
        if self.efficiencies is not None:
            kept.append(str(self.efficiencies.save()))
        return kept

    def shares(self) -> list[tuple[Measured, float]]:
        """Every entry with the share of its ceiling that it reached."""
        if self.efficiencies is None:
            return []
        device, dtype = self.device(), self.efficiencies.dtype
        return [(e, efficiency.ideal(e.cost, device, dtype).seconds / e.cpu) for e in self.efficiencies.entries]

    def warnings(self) -> list[str]:
        """Why the figures should not be trusted as they are, a sentence each."""
        found = []
        busiest = max(self.load)
        if self.cores and busiest > self.cores:
            found.append(
                f"the load average was {busiest:.1f} on {self.cores} cores: other work disturbed this; measure again when "
                "the machine is idle"
            )
        beyond = [f"{e.op} {e.direction} {share:.0%}" for e, share in self.shares() if share > BEYOND]
        if beyond:
            listed = ", ".join(beyond[:5]) + (f" and {len(beyond) - 5} more" if len(beyond) > 5 else "")
            found.append(
                f"above {BEYOND:.0%} of the ceiling: {listed}; caches gave it, or the ceilings were measured too low"
            )
        notes = () if self.efficiencies is None else self.efficiencies.about.get("notes", ())
        return [*found, *notes]

    def to_json(self) -> dict[str, Any]:
        rates = {"by_processor_time": dict(self.ceilings.by_cpu), "by_wall_clock": dict(self.ceilings.by_wall)}
        tree = {"row": self.fields(), "warnings": self.warnings(), "threads": self.ceilings.threads, "ceilings": rates}
        return tree | {"efficiencies": None if self.efficiencies is None else self.efficiencies.to_json()}

    def to_markdown(self) -> list[str]:
        """Lines of two tables: the ceilings, and the ops with what they reach of them."""
        lines = ["| ceiling | by processor time | by wall clock |", "|---|---|---|"]
        for name, rate in self.ceilings.by_cpu.items():
            unit, title = ("GB/s", "copy, read and written") if name == "copy" else ("GFLOP/s", f"products in {name}")
            lines.append(f"| {title} | {rate / 1e9:,.1f} {unit} | {self.ceilings.by_wall[name] / 1e9:,.1f} {unit} |")
        if self.efficiencies is not None:
            lines += ["", "| op | sizes | direction | µs | share of its ceiling |", "|---|---|---|---|---|"]
        for entry, share in self.shares():
            sizes = " ".join(f"{name}={size}" for name, size in entry.sizes.items())
            lines.append(f"| {entry.op} | {sizes} | {entry.direction} | {1e6 * entry.cpu:,.1f} | {share:.0%} |")
        if warnings := self.warnings():
            lines += ["", *(f"- warning: {line}" for line in warnings)]
        return lines


def measure_machine(
    calls: Sequence[Call] = (),
    *,
    dtypes: Sequence[str] = ("fp32",),
    size: int = 1024,
    copied: int = 1 << 27,
    repeats: int = 5,
    parameters: Sequence[int] = (),
    about: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Machine:
    """Ceilings of ``dtypes``, and float32 seconds of ``calls`` (a model's; none: ceilings alone), medians of ``repeats``."""
    import psutil

    before = os.getloadavg()[0]
    progress("ceilings")
    found = ceilings(dtypes, size=size, copied=copied, repeats=repeats)
    table = None
    if calls:
        progress(f"{len(calls)} calls of the models' ops")
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        told = {"date": now, "load_average": before, "cores": _cores(), "repeats": repeats, **(about or {})}
        table = calibrate(calls, repeats=repeats, device_name=processor(), parameters=parameters, about=told)
    load = before, os.getloadavg()[0]
    return Machine(found, int(psutil.virtual_memory().total), table, _cores(), load)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measured_device(**options: Any) -> Device:
    """This machine as a device, by its ceilings alone."""
    return measure_machine(**options).device()
