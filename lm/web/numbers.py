"""Formatting of numbers on pages."""

from __future__ import annotations

import math

MINUS = "\N{MINUS SIGN}"


def signed(text: str) -> str:
    """Replace the hyphen of a formatted number by a minus sign."""
    return text.replace("-", MINUS)


def percent(value: float) -> str:
    """A fraction as a percentage: 0.613 as 61.3 %."""
    if not math.isfinite(value):
        return "not finite"
    return signed(f"{100 * value:.1f}") + "\N{NARROW NO-BREAK SPACE}%"


def plain(value: float) -> str:
    """A number with about four digits, for axes and legends: 0.00034, 1.234, 12.3, 4,321."""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if size >= 1000:
        return signed(f"{value:,.0f}")
    if value == round(value):
        return signed(f"{value:.0f}")
    if size >= 0.01:
        return signed(f"{value:.3g}" if size >= 10 else f"{value:.3f}")
    return signed(f"{value:.2g}")


def count(value: float) -> str:
    """A count as text: 12, 3,400, 5.2 M, 1.3 B."""
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.1f}\N{NO-BREAK SPACE}{letter}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """A duration as text: 0.4 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
