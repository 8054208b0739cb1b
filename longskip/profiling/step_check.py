"""Predicted against measured training steps on this machine: what ``longskip bench predict`` runs.

The measured step is a bare loop: noising, a U-ViT forward, the loss, backward, AdamW, by the torch kernels in float32.
Each round calibrates every op of the model once and then takes steps, so that both see the same machine; medians over the
rounds of both are compared, by processor time first. A second prediction does without the model's own calibration: it
knows the ops only at the sizes of the other models.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longskip import kernels
from longskip.errors import ConfigError
from longskip.models.conditioning import Conditioning
from longskip.models.presets import preset
from longskip.models.specs import UViTSpec
from longskip.models.uvit import UViT
from longskip.profiling.calibration import Calibration, ReadClock, Seconds, calls_of, clock_of
from longskip.profiling.efficiency import Clock, Efficiencies
from longskip.profiling.flop_ledger import FlopLedger, flop_ledger, loss_rows, optimizer_row
from longskip.profiling.hardware import Device, processor
from longskip.profiling.machine import measured_device
from longskip.profiling.step_time import StepTime, step_time

__all__ = ["CASES", "LIMIT", "StepCase", "predict_steps", "to_markdown"]

LIMIT = 0.15  # relative error asked of the prediction
_WORTH = 0.2  # seconds of steps in a round
_MOST = 20
_WARM_UP = 2


@dataclass(frozen=True)
class StepCase:
    """A model and its micro-batch."""

    name: str
    spec: UViTSpec
    batch: int

    def ledger(self) -> FlopLedger:
        """What a step of the bare loop executes: no EMA, no clipping."""
        values = self.spec.c_out * math.prod(self.spec.latent_size)
        optimizer = optimizer_row(self.spec.param_counts().total, ema=False, clip=False)
        return flop_ledger(self.spec, batch=self.batch).with_rows((*loss_rows(values, self.batch), optimizer))


CASES: tuple[StepCase, ...] = (
    StepCase("uvit-tiny, batch 8", preset("uvit-tiny"), 8),
    StepCase("width 256, depth 6, batch 8", preset("uvit-shapes", width=256, depth=6, n_heads=4), 8),
    StepCase("width 512, depth 4, batch 4, 334 tokens", preset("uvit-0.3b", width=512, depth=4, n_heads=8), 4),
)


class BareLoop:
    """A step as a user would write it with longskip's model and kernels."""

    def __init__(self, case: StepCase) -> None:
        spec, batch = case.spec, case.batch
        self.model = UViT(spec)
        self.clean = torch.randn(batch, spec.channels, *spec.latent_size)
        self.noise, self.time, self.weight = torch.randn_like(self.clean), torch.rand(batch), torch.ones(batch)
        text = torch.randn(batch, spec.n_txt, spec.text_width) if spec.n_txt else None
        self.condition = Conditioning(text=text)
        self.parameters = list(self.model.parameters())
        self.states = [[torch.zeros_like(p) for p in self.parameters] for _ in range(2)]
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        at = self.time[:, None, None, None]
        out = self.model((1 - at) * self.clean + at * self.noise, self.time, self.condition)
        kernels.diffusion_loss(out, self.clean, self.noise, self.time, self.weight).mean().backward()
        values = [p.data for p in self.parameters]
        kernels.adamw(
            values, [_grad(p) for p in self.parameters], *self.states, lr=1e-4, betas=(0.9, 0.99), eps=1e-8,
            weight_decay=0.01, step=self.steps,
        )  # fmt: skip
        for parameter in self.parameters:
            parameter.grad = None


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None  # every parameter of the model takes part in the loss
    return parameter.grad


def predict_steps(
    cases: Sequence[StepCase] = CASES,
    *,
    rounds: int = 5,
    device: Device | None = None,
    read: ReadClock | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """A row per case: measured and predicted seconds by both clocks, the errors, and what binds.

    ``rounds`` of calibration and steps in turns. ConfigError for less than one round or for a GPU.
    """
    if rounds < 1:
        raise ConfigError(f"--rounds {rounds}", cure="give at least 1")
    device = device or measured_device()
    read = read or clock_of(torch.device("cpu"))
    tables: list[Efficiencies] = []
    rows: list[dict[str, Any]] = []
    for case in cases:
        table, steps = _measure(case, rounds, read)
        tables.append(table)
        rows.append(_row(case, table, steps, device))
        progress(_line(rows[-1]))
    for at, case in enumerate(cases):
        others = [entry for number, table in enumerate(tables) if number != at for entry in table.entries]
        if others:
            told = replace(tables[at], entries=tuple(others))
            predicted = step_time(case.ledger(), device, dtype="fp32", measured=told)
            rows[at]["from_other_sizes"] = _against(predicted.seconds, rows[at]["cpu"]["measured"])
    return rows


def _measure(case: StepCase, rounds: int, read: ReadClock) -> tuple[Efficiencies, list[Seconds]]:
    loop = BareLoop(case)
    calibration = Calibration(
        calls_of(case.spec, case.batch), parameters=[p.numel() for p in loop.parameters], read=read
    )
    for _ in range(_WARM_UP):
        start = read()
        loop.step()
        took = read().since(start).wall
    often = max(1, min(_MOST, int(_WORTH / max(took, 1e-9))))
    spans: list[Seconds] = []
    for _ in range(rounds):
        calibration.round()
        for _ in range(often):
            start = read()
            loop.step()
            spans.append(read().since(start))
    return calibration.result(processor()), spans


def _row(case: StepCase, table: Efficiencies, steps: Sequence[Seconds], device: Device) -> dict[str, Any]:
    clocks: tuple[Clock, Clock] = ("cpu", "wall")
    predicted = {clock: step_time(case.ledger(), device, dtype="fp32", measured=table, clock=clock) for clock in clocks}
    found: dict[str, Any] = {
        "case": case.name,
        "tokens": case.spec.n_tokens,
        "parameters": case.spec.param_counts().total,
        "steps": len(steps),
        "model_flops": case.ledger().model_flops,
    }
    for clock in clocks:
        found[clock] = _against(predicted[clock].seconds, statistics.median(getattr(span, clock) for span in steps))
    best: StepTime = predicted["cpu"]
    found |= {"met": abs(found["cpu"]["error"]) <= LIMIT, "binds": best.binds, "by_term": dict(best.by_term)}
    return found | {"by_phase": dict(best.by_phase), "measured_share": best.measured_share}


def _against(predicted: float, measured: float) -> dict[str, float]:
    return {"predicted": predicted, "measured": measured, "error": predicted / measured - 1}


def _line(found: Mapping[str, Any]) -> str:
    cpu = found["cpu"]
    return (
        f"{found['case']}: predicted {1e3 * cpu['predicted']:.2f} ms, measured {1e3 * cpu['measured']:.2f} ms of processor "
        f"time ({cpu['error']:+.1%})"
    )


def to_markdown(rows: Sequence[Mapping[str, Any]], device: Device) -> list[str]:
    """The lines of the result's table."""
    lines = [
        f"Ceilings of the run: {device.peak('fp32') / 1e9:.1f} GFLOP/s in float32, {device.bandwidth / 1e9:.1f} GB/s copied. "
        f"Asked: within {LIMIT:.0%} of the measured step, by processor time.",
        "",
        "| step | tokens | measured, ms | predicted, ms | error | by wall clock | from other models' sizes | binds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in rows:
        cpu, wall, other = found["cpu"], found["wall"], found.get("from_other_sizes")
        lines.append(
            f"| {found['case']} | {found['tokens']} | {1e3 * cpu['measured']:.2f} | {1e3 * cpu['predicted']:.2f} | "
            f"{cpu['error']:+.1%}, {'met' if found['met'] else 'missed'} | {wall['error']:+.1%} | "
            f"{'' if other is None else format(other['error'], '+.1%')} | {found['binds']} |"
        )
    return lines
