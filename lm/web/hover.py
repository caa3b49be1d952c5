"""Hover values of charts: a layer of invisible strips over a drawing, each with a line, marks and values.

Pure markup and CSS without script: a strip's content is hidden until the pointer is on it.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import matplotlib.axes
import numpy as np

STRIPS = 48  # most strips over the width of a drawing
FEW = 12  # a series of at most so many points has a strip for each
LABEL = 24  # characters of a series' name beside its value
NEAR = 0.008  # fraction of the width: points of other series this close to a strip are shown in it


@dataclass(frozen=True)
class Hovered:
    """A series with hover values: colour, name, points and the text of each point.

    `axes`: index of the drawing's axes that it is on; a second y axis is 1.
    """

    colour: int
    label: str
    x: Sequence[float]
    y: Sequence[float]
    texts: Sequence[str]
    axes: int = 0


class Mark(NamedTuple):
    """A point's position on the drawing, in typographic points from the left and top."""

    across: float
    down: float
    x: float
    text: str


class Box(NamedTuple):
    """The plot area, in typographic points from the left and top."""

    left: float
    right: float
    top: float
    bottom: float


def layer(
    axes: Sequence[matplotlib.axes.Axes],
    series: Sequence[Hovered],
    where: Callable[[float], str],
    strips: int = STRIPS,
) -> str:
    """The hover layer of a drawn figure as SVG; empty without finite values.

    Args:
        where: formatter of x values: `step 120`.
    """
    marks = [_marks(axes[one.axes], one) for one in series]
    every = sorted({(mark.across, mark.x) for found in marks for mark in found})
    few = {(mark.across, mark.x) for found in marks if len(found) <= FEW for mark in found}
    chosen = sorted({*_spread(every, strips), *few})
    if not chosen:
        return ""
    box = _box(axes[0])
    width = box.right - box.left
    edges = [box.left, *((a + b) / 2 for (a, _), (b, _) in itertools.pairwise(chosen)), box.right]
    reach = max(0.12, 1 / len(chosen)) * width if len(chosen) > 1 else width  # no strip far from all points
    found = []
    for (across, x), start, end in zip(chosen, edges, edges[1:], strict=False):
        near = []
        for one, its in zip(series, marks, strict=True):
            mark = min(its, key=lambda mark: abs(mark.across - across), default=None)
            if mark is not None and abs(mark.across - across) <= NEAR * width:
                near.append((one, mark))
        span = (max(start, across - reach), min(end, across + reach))
        found.append(_strip(box, span, across, where(x), near))
    return f'<g class="hover">{"".join(found)}</g>'


def _marks(axes: matplotlib.axes.Axes, one: Hovered) -> list[Mark]:
    figure = axes.get_figure(root=True)
    assert figure is not None
    width, height = figure.get_size_inches() * 72  # SVG counts in points, from the top
    to_share = figure.transFigure.inverted()
    found = []
    for x, y, text in zip(one.x, one.y, one.texts, strict=True):
        if math.isfinite(x) and math.isfinite(y):
            across, up = to_share.transform(axes.transData.transform((x, y)))
            if math.isfinite(across) and math.isfinite(up):
                found.append(Mark(round(float(across * width), 1), round(float((1 - up) * height), 1), float(x), text))
    return found


def _box(axes: matplotlib.axes.Axes) -> Box:
    figure = axes.get_figure(root=True)
    assert figure is not None
    width, height = figure.get_size_inches() * 72
    (left, low), (right, high) = figure.transFigure.inverted().transform(axes.bbox.get_points())
    return Box(float(left * width), float(right * width), float((1 - high) * height), float((1 - low) * height))


def _strip(box: Box, span: tuple[float, float], across: float, place: str, near: list[tuple[Hovered, Mark]]) -> str:
    start, end = span
    anchor, at = ("end", box.right) if across > (box.left + box.right) / 2 else ("start", box.left)
    text = _text(f"{at:.1f}", place, near)
    circles = "".join(
        f'<circle cx="{mark.across}" cy="{mark.down}" r="2.6" style="fill: var(--series-{one.colour})"/>'
        for one, mark in near
    )
    return (
        f'<g class="at">'
        f'<rect x="{start:.1f}" y="{box.top:.1f}" width="{max(end - start, 0.1):.1f}" height="{box.bottom - box.top:.1f}"/>'
        f'<path d="M{across} {box.top:.1f}V{box.bottom:.1f}"/>{circles}'
        f'<text x="{at:.1f}" y="{box.top + 8:.1f}" text-anchor="{anchor}">{text}</text></g>'
    )


def _text(at: str, place: str, near: list[tuple[Hovered, Mark]]) -> str:
    """The text of a strip: place and value in one line; for several series, a line each with its name."""
    if len(near) == 1:
        one, mark = near[0]
        return f'{html.escape(place)}: <tspan style="fill: var(--series-{one.colour})">{html.escape(mark.text)}</tspan>'
    lines = [
        f'<tspan x="{at}" dy="10.5" style="fill: var(--series-{one.colour})">{html.escape(_short(one.label))} '
        f"{html.escape(mark.text)}</tspan>"
        for one, mark in near
    ]
    return html.escape(place) + "".join(lines)


def _short(label: str) -> str:
    return label if len(label) <= LABEL else f"{label[: LABEL - 1]}…"


def _spread(places: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` of the places, evenly spread, including the first and the last."""
    if len(places) <= most:
        return places
    return [places[i] for i in np.unique(np.linspace(0, len(places) - 1, most).round().astype(int))]
