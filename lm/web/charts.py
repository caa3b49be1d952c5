"""Line charts of a stage's metrics, as inline SVG in the colours of the page."""

from __future__ import annotations

import functools
import html
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib
import matplotlib.axes
import matplotlib.figure
import matplotlib.ticker
import numpy as np

from lm.config.objective import MetricChart
from lm.experiment import OBJECTIVES
from lm.train.run_files import Line, StageFiles
from lm.web.hover import STRIPS, Hovered, layer
from lm.web.numbers import percent, plain
from lm.web.story import METRICS, Mixture

# Placeholder colours that the page replaces, so that one drawing serves light and dark mode.
INK, GRID, SERIES = "#010101", "#020202", ("#030301", "#030302", "#030303", "#030304", "#030305")
PAGE_COLOURS = {INK: "var(--muted)", GRID: "var(--line)"} | {
    colour: f"var(--series-{i})" for i, colour in enumerate(SERIES)
}
MAX_POINTS = 300
UNKNOWN = Mixture()
SMALL_STRIPS = 24  # hover strips of a small chart
MAIN, SMALL = (4.3, 2.35), (2.6, 1.15)  # inches


@dataclass(frozen=True)
class Series:
    """Values y over steps x; `points` are drawn as marks, and a long curve with its moving average."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    points: bool = False


@dataclass(frozen=True)
class SvgChart:
    """A chart as SVG: title, legend of (colour index, label, last value), and a sentence on how to read it."""

    title: str
    svg: str
    legend: list[tuple[int, str, str]]
    note: str
    small: bool = False


BEFORE = (
    MetricChart("Learning rate", {"lr": ""}, "Warmup, then the schedule's decay."),
    MetricChart("Gradient norm", {"grad_norm": ""}, "Before clipping; healthy: steady or falling, few spikes."),
)
AFTER = (
    MetricChart("Tokens/s", {"tokens_per_second": ""}, "Training speed; healthy: flat."),
    MetricChart("MFU", {"mfu": ""}, "Fraction of the chips' peak FLOP/s; healthy: flat.", percent=True),
)
"""Small charts of every stage, before and after those of its objective."""

LOSS = "Training loss of the objective; healthy: falls and flattens out, with held-out points close to the curve."
RL_LOSS = "Policy-gradient loss; its size says little, the reward tells the progress."
HELD_OUT = "Held-out metrics at each evaluation of the stage; healthy: none falls beyond noise."
OTHER_LOSS = "Held-out loss at each evaluation; healthy: falls with the training loss."


def stage_charts(stage: StageFiles, mixture: Mixture = UNKNOWN) -> list[SvgChart]:
    """Draw the charts of a stage, the most important first; none before its first step.

    Held-out losses are drawn in the chart of the training loss if they are measured on the same data.
    """
    if not stage.metrics:
        return []
    objective = OBJECTIVES[stage.kind]
    loss = _loss_chart(stage, mixture, small=objective.data == "prompts")
    main = [drawn for chart in objective.charts for drawn in _metric_charts(stage, chart)]
    others = (*BEFORE, *objective.small_charts, *AFTER)
    small = [drawn for chart in others for drawn in _metric_charts(stage, chart, small=True)]
    if objective.data == "prompts":
        return [*main, *_heldout_charts(stage), *loss, *small]
    return [*loss, *_other_losses(stage, mixture), *main, *_heldout_charts(stage), *small]


def _loss_chart(stage: StageFiles, mixture: Mixture, small: bool) -> list[SvgChart]:
    """The chart of the training loss, titled by its data, with held-out losses on the same data."""
    if small:
        return _metric_charts(stage, MetricChart("Loss", {"loss": ""}, RL_LOSS), small)
    found = _series(stage, MetricChart("Loss", {"loss": "training"}, LOSS))
    if not found:
        return []
    held_out = [
        Series(f"held out, {name}", *_curve(points, "loss"), points=True)
        for name, points in _text_evals(stage).items()
        if mixture.is_of_all(name)
    ]
    of = f" on {mixture.words()}" if mixture.parts else ""
    return [draw(f"{stage.name} Loss", f"Loss{of}", [*found, *held_out], LOSS)]


def _other_losses(stage: StageFiles, mixture: Mixture) -> list[SvgChart]:
    """Separate charts of held-out losses on only a part of the training mixture, or on other data."""
    return [
        draw(
            f"{stage.name} Loss {name}",
            f"Held-out loss on {mixture.source_of(name)} alone",
            [Series(name, *_curve(points, "loss"), points=True)],
            OTHER_LOSS,
        )
        for name, points in _text_evals(stage).items()
        if not mixture.is_of_all(name) and len(points) > 1
    ]


def _text_evals(stage: StageFiles) -> dict[str, list[Line]]:
    return by_eval(stage, "bits_per_byte") if OBJECTIVES[stage.kind].data == "text" else {}


def _series(stage: StageFiles, chart: MetricChart) -> list[Series]:
    lines = stage.metrics
    return [
        Series(label, [line["step"] for line in lines if key in line], [line[key] for line in lines if key in line])
        for key, label in chart.found_in(dict.fromkeys(key for line in lines for key in line)).items()
    ]


def _metric_charts(stage: StageFiles, chart: MetricChart, small: bool = False) -> list[SvgChart]:
    """Draw a chart of metrics, in several drawings if it has more curves than there are colours."""
    series = _series(stage, chart)
    if small and not any(value for one in series for value in one.y):
        return []
    as_percent = chart.percent and _parts(series)
    return [
        draw(f"{stage.name} {chart.title} {i}", chart.title, group, chart.note, as_percent, small)
        for i, group in enumerate(_by_colours(series))
    ]


def _by_colours(series: list[Series]) -> list[list[Series]]:
    """The series in groups of at most as many as there are colours."""
    return [series[i : i + len(SERIES)] for i in range(0, len(series), len(SERIES))]


def _parts(series: list[Series]) -> bool:
    """Whether all values are fractions of 1: verifier rewards are, reward model scores are not."""
    return all(0 <= value <= 1 for one in series for value in one.y if math.isfinite(value))


def _heldout_charts(stage: StageFiles) -> list[SvgChart]:
    """Charts of held-out rewards and accuracies measured during the stage."""
    found = [
        Series(name, *_curve(lines, metric), points=True)
        for metric in METRICS
        if metric != "bits_per_byte"
        for name, lines in by_eval(stage, metric).items()
        if len(lines) > 2
    ]
    return [
        draw(f"{stage.name} held out {i}", "Held out", group, HELD_OUT, True)
        for i, group in enumerate(_by_colours(found))
    ]


def by_eval(stage: StageFiles, metric: str) -> dict[str, list[Line]]:
    lines = [line for line in stage.evals if line["metric"] == metric]
    return {name: [line for line in lines if line["eval"] == name] for name in dict.fromkeys(x["eval"] for x in lines)}


def _curve(lines: list[Line], key: str) -> tuple[list[float], list[float]]:
    return [line["step"] for line in lines], [line[key] for line in lines]


# ---- drawing -----------------------------------------------------------------------------------------------------


def draw(
    salt: str, title: str, series: list[Series], note: str, as_percent: bool = False, small: bool = False
) -> SvgChart:
    """Draw a chart of series over steps; `salt` keeps the element ids of two drawings on one page distinct.

    The legend shows the last value of points and in small charts, and for other curves the mean of the last steps.
    """
    few = ((one, *thin(one.x, one.y)) for one in series)
    known = tuple(Series(one.label, tuple(x), tuple(y), one.points) for one, x, y in few)
    show = percent if as_percent else plain
    legend = [(i, *headline(one, show, small)) for i, one in enumerate(series)]
    return SvgChart(title, _curves(salt, title, known, as_percent, small), legend, note, small)


def headline(one: Series, show: Callable[[float], str], small: bool = False, unit: str = "steps") -> tuple[str, str]:
    """Legend text of a series: its label, and the mean of its last values; of points and small charts the last value."""
    last = [value for value in one.y[len(one.y) - last_steps(len(one.y)) :] if math.isfinite(value)]
    if one.points or small or len(last) < 2 or not math.isfinite(one.y[-1]):
        return one.label, show(one.y[-1])
    return f"{one.label}, mean of the last {len(last)} {unit}".removeprefix(", "), show(sum(last) / len(last))


def last_steps(count: int) -> int:
    """Number of last steps averaged in the legend: a tenth of all, but at least 8 if that is at most a fifth."""
    return max(1, min(count // 5, max(8, count // 10)))


@functools.lru_cache(maxsize=512)  # a run draws its report after every stage, with all earlier stages
def _curves(salt: str, title: str, series: tuple[Series, ...], as_percent: bool, small: bool) -> str:
    def paint(axes: matplotlib.axes.Axes) -> None:
        for one, colour in zip(series, SERIES[: len(series)], strict=True):
            _plot(axes, one, colour, small)
        dress(axes, as_percent, small)

    show = percent if as_percent else plain
    hovered = [Hovered(i, one.label, one.x, one.y, [show(value) for value in one.y]) for i, one in enumerate(series)]
    return sketch(salt, f"{title} over steps", paint, SMALL if small else MAIN, hovered)


def sketch(
    salt: str,
    label: str,
    paint: Callable[[matplotlib.axes.Axes], None],
    size: tuple[float, float] = MAIN,
    hovered: Sequence[Hovered] = (),
    where: Callable[[float], str] = lambda x: f"step {x:,.0f}",
) -> str:
    """Draw with `paint` on empty axes and return an <svg> element of `size` inches; `label` is the accessible text.

    Args:
        hovered: the series whose values are shown on hover.
        where: formatter of x values.
    """
    font = 9.5 if size == SMALL else 10
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": font}):
        figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
        paint(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    over = layer(figure.axes, hovered, where, SMALL_STRIPS if size == SMALL else STRIPS)
    return _inline(file.getvalue(), label).replace("</svg>", f"{over}</svg>")


def _plot(axes, one: Series, colour: str, small: bool) -> None:
    x, y = one.x, one.y
    width = 1.2 if small else 1.6
    if one.points:
        axes.plot(x, y, color=colour, linewidth=1, marker="o", markersize=4, markeredgewidth=0, linestyle=(0, (2, 2)))
    elif len(y) > 40 and not small:
        axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.28)
        axes.plot(x, smooth(y, len(y) // 20), color=colour, linewidth=width)
    else:
        axes.plot(x, y, color=colour, linewidth=width)


def dress(axes: matplotlib.axes.Axes, as_percent: bool = False, small: bool = False) -> None:
    """Style axes for the page: light lines, few ticks, placeholder colours."""
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=INK)
    axes.margins(x=0.02, y=0.08)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(2 if small else 4, integer=True))
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(2 if small else 4))
    axes.xaxis.set_major_formatter(lambda value, _: tick(value))
    if as_percent:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.02), min(high, 1.02))
        axes.yaxis.set_major_formatter(
            lambda value, _: percent_tick(value, _tick_step(axes)) if -1e-9 < value < 1 + 1e-9 else ""
        )
    else:
        axes.yaxis.set_major_formatter(lambda value, _: tick(value, _tick_step(axes)))


def _tick_step(axes: matplotlib.axes.Axes) -> float:
    return float(np.diff(axes.get_yticks()).min(initial=1))


def percent_tick(value: float, step: float) -> str:
    """Tick label of a fraction: 50%, 49.5%; exact for ticks that are `step` away, of two digits at most."""
    digits = max(0, 1 - math.floor(math.log10(100 * step)))
    return f"{round(100 * value, digits):g}%"


def tick(value: float, step: float = 1) -> str:
    """Short tick label: 0, 250, 1,500, 12k, 0.3, 3e-4; exact enough to differ from a tick that is `step` away."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 10_000:
        return f"{value / 1000:g}k"
    if size >= 1000:
        return f"{value:,.0f}"
    digits = max(3, 1 + math.floor(math.log10(size)) - math.floor(math.log10(step)))
    if size >= 0.01:
        return f"{value:.{digits}g}"
    return np.format_float_scientific(value, precision=digits - 1, trim="-", exp_digits=1)


def _inline(svg: str, label: str) -> str:
    """Extract the <svg> element: page colours and fonts, responsive width, unique ids."""
    svg = svg[svg.index("<svg") :]
    for colour, value in PAGE_COLOURS.items():
        svg = svg.replace(colour, value)
    svg = re.sub(r' id="[A-Za-z0-9]+_\d+"', "", svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1)
    said = f'role="img" aria-label="{html.escape(label)}"'  # an eval's name may be in it
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', lambda found: f"<svg {said} {found[1]}", svg, count=1)
    return re.sub(r"\s*\n\s*", "\n", svg)


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Reduce to at most MAX_POINTS points: means of equal buckets. The last bucket ends at the last point."""
    size = math.ceil(len(y) / MAX_POINTS)
    if size <= 1:
        return list(x), list(y)
    starts = range(len(y) % size or size, len(y) + 1, size)
    buckets = [slice(max(end - size, 0), end) for end in starts]
    return [x[b.stop - 1] for b in buckets], [sum(y[b]) / len(y[b]) for b in buckets]


def smooth(y: Sequence[float], reach: int) -> list[float]:
    """Centred moving average over `reach` values to either side, fewer near the ends to keep slopes; finite values only."""
    averages = []
    for i in range(len(y)):
        near = min(reach, i, len(y) - 1 - i)
        window = [value for value in y[i - near : i + near + 1] if math.isfinite(value)]
        averages.append(sum(window) / len(window) if window else math.nan)
    return averages
