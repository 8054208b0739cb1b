"""Numbers as people read them: counts, FLOPs, durations, shares. Each function takes None and gives an em dash."""

from __future__ import annotations

import math

NONE = "—"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_SCALES = ((10**12, "T"), (10**9, "B"), (10**6, "M"))
_SPANS = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))


def exact(value: float | None) -> str:
    """An integer with its thousands set apart: ``1,141,380``."""
    if value is None:
        return NONE
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}"  # as a float an integer would lose its end


def count(value: float | None) -> str:
    """A count, exact below a million and in three figures above: ``112,000``, ``2.34 B``."""
    if value is None:
        return NONE
    for scale, letter in _SCALES:
        if abs(value) >= scale:
            scaled = value / scale
            decimals = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            return f"{scaled:,.{decimals}f} {letter}"
    return f"{value:,.0f}"


def scientific(value: float | None, digits: int = 3) -> str:
    """A large number as a mantissa of ``digits`` figures and a power of ten in superscript."""
    if value is None:
        return NONE
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}\N{MULTIPLICATION SIGN}10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def rate(value: float | None) -> str:
    """A rate in three figures: ``0.42``, ``13.7``, ``9,120``."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def share(value: float | None) -> str:
    """A share of 1 in percent: ``97.5%``, below 1% ``0.042%``."""
    if value is None:
        return NONE
    return f"{100 * value:.2g}%" if 0 < abs(value) < 0.00995 else f"{100 * value:.1f}%"


def duration(seconds: float | None) -> str:
    """A span of time in its two leading units: ``2 h 13 min``, ``41.3 s``."""
    if seconds is None:
        return NONE
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds else "0 s"
    whole = round(seconds)
    large, large_name, small, small_name = next(span for span in _SPANS if whole >= span[0])
    rest = whole % large // small
    return f"{whole // large:,} {large_name} {rest} {small_name}" if rest else f"{whole // large:,} {large_name}"
