"""Predictions as texts that claim no more than they know: far outside the range of a law two digits, marked as rough."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from longskip.profiling import units

if TYPE_CHECKING:
    from longskip.profiling.fits import Prediction
    from longskip.profiling.laws import Interval

__all__ = ["FAR", "prediction_rows", "rough_count", "shown", "span_text"]

_ROUGH = "≈ "
FAR = 30.0  # times beyond the fitted budgets: as far again as the span of most fits


def shown(value: float | None, extrapolation: float | None, form: Callable[[float], str]) -> str:
    """``form(value)``; beyond ``FAR`` times the fitted range two digits behind "≈"; a dash for no value."""
    if value is None:
        return units.NONE
    if extrapolation is None or extrapolation <= FAR:
        return form(value)
    return _ROUGH + _two_digits(value)


def rough_count(value: float, extrapolation: float | None) -> str:
    """A count as ``units.count`` has it, and beyond ``FAR`` in two digits."""
    if extrapolation is None or extrapolation <= FAR:
        return units.count(value)
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= 0.995 * scale:
            return f"{_ROUGH}{_two_digits(value / scale)} {letter}"
    return _ROUGH + _two_digits(value)


def span_text(span: Interval, extrapolation: float | None, name: str) -> str:
    """`` (LOW to HIGH)`` of an interval of ``params``, ``tokens`` or ``loss``, as exact as the value beside it."""
    ends = [
        shown(end, extrapolation, "{:.4f}".format) if name == "loss" else rough_count(end, extrapolation)
        for end in span
    ]
    return f" ({' to '.join(end.removeprefix(_ROUGH) for end in ends)})"


def prediction_rows(predictions: Sequence[Prediction]) -> list[tuple[str, ...]]:
    """Rows of texts: C, then N, D and loss each with its 95% interval, and how far outside the fitted budgets C is."""
    rows = []
    for one in predictions:
        best = one.best
        cells = [units.scientific(best.flops)]
        for value, span, form in (
            (best.params, one.params, units.count),
            (best.tokens, one.tokens, units.count),
            (best.loss, one.loss, "{:.4f}".format),
        ):
            far = best.extrapolation
            ends = [
                rough_count(end, far) if form is units.count and end is not None else shown(end, far, form)
                for end in (value, *(span or ()))
            ]
            low_high = [end.removeprefix(_ROUGH) for end in ends[1:]]
            cells += [ends[0], " to ".join(low_high) or units.NONE]
        rows.append((*cells, best.range_word))
    return rows


def _two_digits(value: float) -> str:
    """Two significant digits without an exponent: 0.53, 5.5, 25, 960."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    place = 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, place)
    place = 1 - math.floor(math.log10(abs(rounded)))  # 0.0996 has become 0.10
    return f"{rounded:,.{max(0, place)}f}"
