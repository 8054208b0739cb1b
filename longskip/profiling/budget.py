"""Where runs' budgets went: FLOPs under every accounting, tokens, device time, money and energy, from their ledgers.

*Committed* counts each step once, *spent* everything executed; the difference was redone after resumes. Device time is
wall time × devices. The ledger tells apart waiting for data (and communication, where it has it); what remains of the
committed time is training with its evaluations and checkpoints, which share the clock.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from longskip.models.specs import UViTSpec
from longskip.profiling import hardware
from longskip.profiling.accounting import Account, Work, accounts
from longskip.profiling.fitdata import params_of, smoothed
from longskip.profiling.laws import MOST_PRICE, MOST_WATTS, bounded
from longskip.profiling.ledger import LedgerLine, committed_lines
from longskip.profiling.runlog import RunLog

COVERS = (
    "wall time, money, energy and the committed share run from the first step of each attempt to the last logged one: "
    "starting up before it and ending after it are not in the ledger"
)
_HOUR = 3600.0
_COUNTS = ("steps", "images", "image_tokens", "tokens", "model_flops", "hardware_flops", "six_nd", "seconds")


@dataclass(frozen=True, slots=True)
class Amount:
    """A quantity that each step counts once in (``committed``), and as often as it was executed (``spent``)."""

    committed: float
    spent: float

    @property
    def redone(self) -> float:
        return self.spent - self.committed

    def as_json(self) -> dict[str, float]:
        return {"committed": self.committed, "spent": self.spent, "redone": self.redone}

    def times(self, rate: float) -> Amount:
        return Amount(self.committed * rate, self.spent * rate)


@dataclass(frozen=True, slots=True)
class Use:
    """What device time went to: hours of one device, and the share of all that was spent."""

    name: str
    device_hours: float
    share: float


@dataclass(frozen=True, slots=True)
class RunBudget:
    """One run's budget. ``amounts`` by name: steps, images, image_tokens, tokens, model_flops, hardware_flops, six_nd,
    seconds, device_hours. ``money`` and ``energy_kwh`` are None where the price or the power is unknown; ``energy_note``
    says whose power it is, or why there is none. ``curve``: committed model FLOPs so far, and the smoothed loss, per
    interval. ``notes``: what a reader must know about these figures.
    """

    name: str
    folder: str
    status: str | None
    params: int
    params_token: int | None
    devices: tuple[str, ...]
    attempts: int
    amounts: dict[str, Amount]
    uses: tuple[Use, ...]
    accounts: tuple[Account, ...]
    committed_share: float | None
    mfu: float | None
    hfu: float | None
    loss: float | None
    price_per_hour: float | None
    currency: str
    money: Amount | None
    energy_kwh: Amount | None
    energy_note: str
    skipped_lines: int
    overlapping_lines: int
    missing_steps: int
    notes: tuple[str, ...]
    curve: tuple[tuple[int, float], ...]

    def as_json(self) -> dict[str, Any]:
        body = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "curve"}
        return body | {
            "devices": list(self.devices),
            "amounts": {name: amount.as_json() for name, amount in self.amounts.items()},
            "uses": [asdict(use) for use in self.uses],
            "accounts": [account.as_json() for account in self.accounts],
            "money": None if self.money is None else self.money.as_json(),
            "energy_kwh": None if self.energy_kwh is None else self.energy_kwh.as_json(),
            "notes": list(self.notes),
        }


def run_budget(
    log: RunLog,
    spec: UViTSpec | None = None,
    *,
    price: float | None = None,
    watts: float | None = None,
    name: str | None = None,
) -> RunBudget:
    """The budget of one run. ``spec``: its backbone's shape, without which some accountings are left out.

    ``price`` per device and hour stands for the configuration's, ``watts`` per device for the hardware table's.
    ConfigError for a ledger without lines, or with lines of different models, and for a price or power that cannot be.
    """
    bounded("price", price, MOST_PRICE)
    bounded("watts", watts, MOST_WATTS)
    params = params_of(log)
    sums, spent = log.sums, log.ledger.lines
    committed = committed_lines(log.ledger.entries)
    amounts = {key: Amount(getattr(sums.committed, key), getattr(sums.spent, key)) for key in _COUNTS}
    amounts["device_hours"] = Amount(_device_hours(committed), _device_hours(spent))
    group = log.config.get("budget")
    group = group if isinstance(group, dict) else {}
    if price is None:
        price = bounded("budget.price_per_device_hour", _number(group.get("price_per_device_hour")), MOST_PRICE)
    energy, energy_note = _energy(committed, spent, watts)
    told = log.info.get("params_token")
    return RunBudget(
        name=name or log.name,
        folder=str(log.path),
        status=log.status,
        params=params,
        params_token=told if isinstance(told, int) and 0 < told <= params else None,
        devices=tuple(dict.fromkeys(f"{line.devices} \N{MULTIPLICATION SIGN} {line.device_name}" for line in spent)),
        attempts=sums.attempts,
        amounts=amounts,
        uses=_uses(committed, amounts["device_hours"]),
        accounts=tuple(accounts(map(_work, committed), params, spec)),
        committed_share=sums.committed_share,
        mfu=sums.committed.mfu,
        hfu=sums.committed.hfu,
        loss=([None, *smoothed([line.loss for line in committed])])[-1],
        price_per_hour=price,
        currency=str(group.get("currency") or "USD"),
        money=None if price is None else amounts["device_hours"].times(price),
        energy_kwh=energy,
        energy_note=energy_note,
        skipped_lines=log.ledger.skipped,
        overlapping_lines=len(log.ledger.overlapping),
        missing_steps=sums.missing_steps,
        notes=tuple(_notes(log, spec, committed)),
        curve=tuple(_curve(committed)),
    )


def _work(line: LedgerLine) -> Work:
    return Work(line.images, line.image_tokens, line.tokens, line.model_flops)


def _device_hours(lines: Sequence[LedgerLine], seconds: Callable[[LedgerLine], float] | None = None) -> float:
    return math.fsum((seconds(line) if seconds else line.seconds) * line.devices for line in lines) / _HOUR


def _uses(committed: Sequence[LedgerLine], hours: Amount) -> tuple[Use, ...]:
    """The time spent, in parts that add up to it."""
    parts = {"waiting for data": _device_hours(committed, lambda line: line.data_wait_seconds)}
    if any(line.communication_seconds is not None for line in committed):
        parts["communication"] = _device_hours(committed, lambda line: line.communication_seconds or 0.0)
    parts = {"training, evaluation, checkpoints": hours.committed - math.fsum(parts.values())} | parts
    parts["redone after a resume"] = hours.redone
    return tuple(Use(name, value, value / hours.spent if hours.spent else 0.0) for name, value in parts.items())


def _energy(
    committed: Sequence[LedgerLine], spent: Sequence[LedgerLine], watts: float | None
) -> tuple[Amount | None, str]:
    """kWh of the devices alone, at ``watts`` each or at their boards' rated power, and whose power that is."""
    if watts is not None:
        hours = Amount(_device_hours(committed), _device_hours(spent))
        return hours.times(watts / 1000), f"{watts:g} W a device, as given"
    rated: dict[str, int] = {}
    for name in dict.fromkeys(line.device_name for line in spent):
        row = hardware.lookup(name)
        if row is None or row.watts is None:
            return None, f"unknown: no rated power for “{name}” in the hardware table; give --watts"
        rated[name] = row.watts
    sums = [
        math.fsum(line.seconds * line.devices * rated[line.device_name] for line in lines) / _HOUR / 1000
        for lines in (committed, spent)
    ]
    said = ", ".join(f"{power} W ({name})" for name, power in rated.items())
    return Amount(*sums), f"rated power of the boards, which is a ceiling: {said}"


def _notes(log: RunLog, spec: UViTSpec | None, committed: Sequence[LedgerLine]) -> list[str]:
    notes = []
    if log.ledger.skipped:
        notes.append(f"{log.ledger.skipped} line(s) of the ledger were unreadable or cut, and skipped")
    if log.ledger.overlapping:
        first = log.ledger.overlapping[0]
        notes.append(
            f"{len(log.ledger.overlapping)} line(s) of the ledger overlap others of their attempt and were left out (the "
            f"first: attempt {first.attempt}, steps {first.from_step:,} to {first.step:,})"
        )
    if log.sums.missing_steps:
        notes.append(f"no line covers {log.sums.missing_steps:,} of the {log.sums.last_step:,} committed steps")
    if spec is None:
        notes.append("config.yaml does not say the model's shape: Kaplan's and Chinchilla's accountings are left out")
    elif any(line.tokens != line.images * spec.n_tokens for line in committed):
        notes.append(
            "images of several sizes: the context of Kaplan's and Chinchilla's accountings is each line's mean"
        )
    return notes


def _curve(committed: Sequence[LedgerLine]) -> list[tuple[int, float]]:
    total, points = 0, []
    for line, loss in zip(committed, smoothed([line.loss for line in committed]), strict=True):
        total += line.model_flops
        if loss is not None:
            points.append((total, loss))
    return points


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) <= sys.float_info.max else None


def total(budgets: Sequence[RunBudget]) -> dict[str, Any]:
    """Sums over several runs: device hours, and money and energy where all of them are known (and in one currency)."""
    one_currency = len({budget.currency for budget in budgets}) == 1
    money = [budget.money for budget in budgets]
    energy = [budget.energy_kwh for budget in budgets]
    return {
        "model_flops": _sum([budget.amounts["model_flops"] for budget in budgets]),
        "device_hours": _sum([budget.amounts["device_hours"] for budget in budgets]),
        "money": _sum(money) if one_currency else None,
        "energy_kwh": _sum(energy),
    }


def _sum(amounts: Sequence[Amount | None]) -> dict[str, float] | None:
    known = [amount for amount in amounts if amount is not None]
    if len(known) < len(amounts):
        return None
    return Amount(sum(a.committed for a in known), sum(a.spent for a in known)).as_json()
