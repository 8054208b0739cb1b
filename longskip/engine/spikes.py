"""Losses that jump: which of them is a spike, by a robust rule over the last steps (no torch).

The loss is the global one, the same on all ranks, so that all of them judge alike without telling each other.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW = 128
"""Losses that a new one is compared with."""
WARM_UP = 32
"""Losses that there must be, before one is judged."""
LEAST_SPREAD = 0.01
"""Of the median: the spread of losses that hardly vary, any of which would be a spike among them."""
ROLLBACKS = 3
"""Times that a run goes back to the same checkpoint."""


@dataclass(frozen=True)
class Spike:
    """A ``loss`` above ``limit`` = ``median`` + factor × spread of the losses before it."""

    loss: float
    median: float
    limit: float

    def __str__(self) -> str:
        return f"loss {self.loss:.4g} is above {self.limit:.4g}, the median of the steps before is {self.median:.4g}"


def judge(loss: float, before: Sequence[float], factor: float) -> Spike | None:
    """The spike that ``loss`` is after the losses ``before``, the latest ``WINDOW`` of which count; None where it is none.

    The spread is the median absolute deviation from the median (MAD), which outliers among the losses do not widen.
    """
    recent = before[-WINDOW:]
    if len(recent) < WARM_UP:
        return None
    median = statistics.median(recent)
    spread = statistics.median(abs(value - median) for value in recent)
    limit = median + factor * max(spread, LEAST_SPREAD * abs(median))
    return Spike(loss, median, limit) if loss > limit else None
