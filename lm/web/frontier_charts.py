"""Drawings of gold reward against KL over seeds: SVG for the page, and PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import matplotlib.axes
import matplotlib.figure
import matplotlib.ticker
import numpy as np
from jaxtyping import Float

from lm.stored import write_atomic
from lm.web.charts import GRID, INK, SERIES, SvgChart, dress, sketch, tick
from lm.web.hover import Hovered
from lm.web.numbers import percent, signed
from lm.web.watch_charts import as_percent, rises_from, tell

if TYPE_CHECKING:
    from lm.web.frontier import Estimate, FrontierCurve, Panel

SIZE = (5.6, 3.9)  # inches
MARKS = "osD^v"
# The light colours of report.css, for the PNG.
LIGHT = {INK: "#6b6b66", GRID: "#e2e2dc"} | dict(
    zip(SERIES, ("#2d5fb8", "#c4611a", "#1a7f4b", "#8a4fae", "#6b6b66"), strict=True)
)


def chart(panel: Panel) -> SvgChart:
    """Draw a panel for the page; the legend has each curve's highest reward."""
    svg = sketch(
        f"{panel.verifier} {panel.path}",
        "Gold reward over KL to the reference, means over seeds",
        lambda axes: paint(axes, panel, dict(zip(LIGHT, LIGHT, strict=True))),
        SIZE,
        [
            Hovered(
                i % len(SERIES),
                curve.name,
                [point.kl.mean for point in curve.points],
                [point.reward.mean for point in curve.points],
                [f"{percent(point.reward.mean)} ({point.label})" for point in curve.points],
            )
            for i, curve in enumerate(panel.curves)
        ],
        lambda x: f"KL {hundredths_of(x)}",
    )
    legend = [
        (i % len(SERIES), curve.name, percent(curve.points[curve.peak].reward.mean))
        for i, curve in enumerate(panel.curves)
    ]
    note = "Each curve is one method, from step 0 on; better methods reach higher reward at lower KL, and a falling end is over-optimisation."
    return SvgChart(f"Reward by the verifier {panel.verifier} over KL", svg, legend, note)


def save_png(panels: Sequence[Panel], path: Path) -> None:
    """Draw all panels in one PNG, stacked, on white, with legends."""
    with matplotlib.rc_context({"font.size": 10, "font.family": "sans-serif"}):
        figure = matplotlib.figure.Figure(figsize=(7, 4.4 * len(panels)), layout="constrained")
        for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
            paint(axes, panel, LIGHT)
            axes.set_ylabel(f"gold reward ({panel.verifier})", color=LIGHT[INK])
            axes.legend(frameon=False, labelcolor=LIGHT[INK])
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    write_atomic(path, drawn.getvalue())


def paint(axes: matplotlib.axes.Axes, panel: Panel, colours: dict[str, str]) -> None:
    """Draw curves, seeds thin and means thick; KL on a square-root axis, as in Gao et al. (arXiv:2210.10760)."""
    axes.set_xscale("function", functions=(_root, _square))
    for i, curve in enumerate(panel.curves):
        _paint_curve(axes, curve, colours[SERIES[i % len(SERIES)]], MARKS[i % len(MARKS)])
    dress(axes)
    axes.grid(axis="y", color=colours[GRID], linewidth=0.8)
    axes.spines["bottom"].set_color(colours[GRID])
    axes.tick_params(colors=colours[INK])
    axes.margins(y=0.12)
    found = [kl for curve in panel.curves for seed in curve.seeds for kl, _ in seed]
    low, high = _root(np.array([min(0.0, *found), max(found)]))
    room = 0.06 * (high - low) or 0.1
    axes.set_xlim(*_square(np.array([low - room, high + room])))
    axes.xaxis.set_major_locator(matplotlib.ticker.FixedLocator(ticks_of(high)))
    axes.xaxis.set_major_formatter(lambda value, _: tick(value))
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.yaxis.set_major_formatter(as_percent)
    axes.set_xlabel("KL to the reference, nats per answer (square-root axis)", color=colours[INK])
    for i, curve in enumerate(panel.curves):
        _tell_curve(axes, curve, colours[SERIES[i % len(SERIES)]], below=i % 2 == 1)


def _paint_curve(axes: matplotlib.axes.Axes, curve: FrontierCurve, colour: str, mark: str) -> None:
    kl, reward = [p.kl.mean for p in curve.points], [p.reward.mean for p in curve.points]
    for seed in curve.seeds if len(curve.seeds) > 1 else ():
        line = 0.8 if curve.joined else 0
        axes.plot(*zip(*seed, strict=True), color=colour, marker=mark, markersize=2.5, linewidth=line, alpha=0.4, mew=0)
    axes.plot(
        kl, reward, color=colour, marker=mark, markersize=5, markeredgewidth=0, linewidth=1.4 if curve.joined else 0,
        label=curve.name,
    )  # fmt: skip


def _tell_curve(axes: matplotlib.axes.Axes, curve: FrontierCurve, colour: str, below: bool) -> None:
    """Label the peak (above or `below` it) and the last step of a stage; or every n, below its point."""
    rewards = [point.reward.mean for point in curve.points]
    last = len(rewards) - 1
    for place in dict.fromkeys((curve.peak, last)) if curve.joined else range(last + 1):
        point, peak = curve.points[place], curve.joined and place == curve.peak
        text = point.label if curve.joined or place == 0 else point.label.removeprefix("n = ")
        under = below if peak else rises_from(rewards, place) or not curve.joined
        tell(axes, point.kl.mean, point.reward.mean, text, colour, ring=peak, below=under, ink=colour)


def _root(kl: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    return np.sign(kl) * np.sqrt(np.abs(kl))


def _square(root: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    return np.sign(root) * np.square(root)


def ticks_of(high: float) -> list[float]:
    """About five round KL ticks from 0 to `high`, evenly spread on the square-root axis."""
    ticks = [0.0]
    for root in np.linspace(0, high, 6)[1:] if high > 0 else ():
        value = root**2
        size = 10 ** math.floor(math.log10(value))
        rounded = min((1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10), key=lambda part: abs(part * size - value)) * size
        if rounded > ticks[-1]:
            ticks.append(rounded)
    return ticks


# ---- numbers -----------------------------------------------------------------------------------------------------


def told(value: Estimate) -> str:
    """A reward with its interval: 61.3 ± 2.0 %."""
    if math.isnan(value.half):
        return percent(value.mean)
    return percent(value.mean).replace(
        "\N{NARROW NO-BREAK SPACE}", f" ± {100 * value.half:.1f}\N{NARROW NO-BREAK SPACE}"
    )


def hundredths_of(value: float) -> str:
    """A KL without an interval: 7.69."""
    return signed(f"{value:z.2f}")


def hundredths(value: Estimate) -> str:
    """A KL or a score with its interval: 7.69 ± 0.19."""
    half = "" if math.isnan(value.half) else f" ± {value.half:.2f}"
    return hundredths_of(value.mean) + half
