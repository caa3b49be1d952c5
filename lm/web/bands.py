"""Curves with intervals, parallel coordinates and power-law fits, as inline SVG in the colours of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import matplotlib.axes
import matplotlib.ticker

from lm.sweep.statistics import Curve, Point
from lm.web.charts import GRID, INK, SERIES, Series, SvgChart, dress, headline, sketch, tick
from lm.web.hover import Hovered
from lm.web.numbers import plain

WIDE = (6.4, 3.0)  # inches
LARGE = (8.6, 3.4)


def bands(
    title: str,
    curves: Sequence[Curve],
    x: str = "steps",
    y: str = "",
    log_x: bool = False,
    log_y: bool = False,
    salt: str = "",
    note: str = "Means over seeds with 95 % intervals; curves differ clearly where the bands do not overlap.",
) -> SvgChart:
    """Draw at most five curves of means with shaded intervals; `salt` keeps the element ids of two drawings distinct."""
    curves = curves[: len(SERIES)]
    few = all(len(curve.points) <= 12 for curve in curves)

    def paint(axes: matplotlib.axes.Axes) -> None:
        for curve, colour in zip(curves, SERIES[: len(curves)], strict=True):
            across, mean, low, high = zip(*curve.points, strict=True)
            axes.plot(across, mean, color=colour, linewidth=1.6, marker="o" if few else "", markersize=3.5)
            axes.fill_between(across, low, high, color=colour, alpha=0.16, linewidth=0)
        dress(axes)
        _scales(axes, log_x, log_y)
        axes.set_xlabel(x, color=INK)
        axes.set_ylabel(y, color=INK)

    hovered = [
        Hovered(i, curve.label, *_columns(curve.points), [interval(*point[1:]) for point in curve.points])
        for i, curve in enumerate(curves)
    ]
    svg = sketch(f"bands {salt} {title}", f"{title}: {y} over {x}", paint, WIDE, hovered, place_on(x))
    smoothed = [Series(curve.label, *_columns(curve.points), points=few or x != "steps") for curve in curves]
    legend = [(i, *headline(one, plain, unit="points")) for i, one in enumerate(smoothed)]
    return SvgChart(title, svg, legend, note)


def place_on(name: str) -> Callable[[float], str]:
    """Formatter of x values on the axis with that name."""
    return lambda x: f"step {x:,.0f}" if name == "steps" else f"{name} {plain(x)}"


def interval(mean: float, low: float, high: float) -> str:
    """A mean as text, with its interval if it has one."""
    return plain(mean) if low == high == mean else f"{plain(mean)} [{plain(low)}, {plain(high)}]"


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point[0] for point in points], [point[1] for point in points]


def _scales(axes: matplotlib.axes.Axes, log_x: bool, log_y: bool) -> None:
    for log, axis, set_scale in ((log_x, axes.xaxis, axes.set_xscale), (log_y, axes.yaxis, axes.set_yscale)):
        if log:
            set_scale("log")
            axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 3.0)))
            axis.set_minor_locator(matplotlib.ticker.NullLocator())
            axis.set_major_formatter(lambda value, _: tick(value))


def fitted(
    title: str, points: Sequence[tuple[float, float]], factor: float, exponent: float, x: str, y: str
) -> SvgChart:
    """Points and the power law through them, on logarithmic axes."""

    def paint(axes: matplotlib.axes.Axes) -> None:
        across, up = zip(*points, strict=True)
        ends = (min(across), max(across))
        axes.plot(ends, [factor * end**exponent for end in ends], color=SERIES[1], linewidth=1.4)
        axes.plot(across, up, color=SERIES[0], marker="o", markersize=4, linestyle="")
        dress(axes)
        _scales(axes, True, True)
        axes.set_xlabel(x, color=INK)
        axes.set_ylabel(y, color=INK)

    hovered = [Hovered(0, y, *_columns(points), [plain(value) for _, value in points])]  # type: ignore[arg-type]
    note = (
        "Power law fitted to the measured points, on logarithmic axes; trust it only where the points follow the line."
    )
    return SvgChart(
        title, sketch(f"fit {title}", f"{title}: {y} over {x}", paint, WIDE, hovered, place_on(x)), [], note
    )


def parallel(
    title: str, names: Sequence[str], settings: Sequence[Sequence[str]], values: Sequence[float], up: int
) -> SvgChart:
    """Parallel coordinates: a line for each setting, ending at its value; the best tenth (at least one) in colour."""
    choices = [_ordered({row[i] for row in settings}) for i in range(len(names))]
    low, high = min(values), max(values)
    best = sorted(range(len(values)), key=lambda i: -up * values[i])[: max(1, len(values) // 10)]

    def height(i: int, row: Sequence[str]) -> float:
        return choices[i].index(row[i]) / max(1, len(choices[i]) - 1)

    def paint(axes: matplotlib.axes.Axes) -> None:
        for k, (row, value) in enumerate(zip(settings, values, strict=True)):
            line = [height(i, row) for i in range(len(names))] + [(value - low) / ((high - low) or 1)]
            chosen = k in best
            axes.plot(
                line, color=SERIES[0] if chosen else INK, linewidth=1.8 if chosen else 0.7, alpha=1 if chosen else 0.35
            )
        dress(axes)
        axes.set_yticks([])
        axes.set_xticks(range(len(names) + 1), [*names, title], color=INK)
        for i, options in enumerate(choices):
            for place, option in enumerate(options[:: max(1, len(options) // 8)]):
                where = place * max(1, len(options) // 8) / max(1, len(options) - 1)
                axes.text(i + 0.03, where, option, color=INK, fontsize=8, va="center")
        for value, where in ((low, 0.0), (high, 1.0)):
            axes.text(len(names) + 0.03, where, plain(value), color=INK, fontsize=8, va="center")
        for i in range(len(names) + 1):
            axes.axvline(i, color=GRID, linewidth=0.8)
        axes.set_xlim(-0.1, len(names) + 0.4)

    note = "One line per setting across the axes of the sweep; an axis matters where the best lines share a value."
    return SvgChart(title, sketch(f"parallel {title}", f"{title} by {', '.join(names)}", paint, LARGE), [], note)


def _ordered(options: set[str]) -> list[str]:
    """Sort numerically where all are numbers, else by name."""
    try:
        return sorted(options, key=float)
    except ValueError:
        return sorted(options)


def finite(points: Sequence[Point]) -> list[Point]:
    """The points with a finite mean; a non-finite interval becomes the mean."""
    kept = [p for p in points if math.isfinite(p[1])]
    return [
        (x, mean, mean if math.isnan(low) else low, mean if math.isnan(high) else high) for x, mean, low, high in kept
    ]
