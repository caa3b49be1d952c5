"""Charts of the reward-hacking watch: judge's reward over KL, reward model's score and judge's reward over steps."""

from __future__ import annotations

import math

import matplotlib.axes
import matplotlib.ticker

from lm.train.run_files import Line, StageFiles, finite
from lm.web import charts
from lm.web.charts import INK, SERIES, Series, SvgChart, draw, dress, sketch
from lm.web.hover import Hovered
from lm.web.numbers import percent, plain
from lm.web.story import METRICS

JUDGE, PROXY = 0, 1  # indices of their colours
OWN = (  # metric name, title, note, whether it is a fraction of 1
    ("length", "Answer length, tokens", "Healthy: no growth up to max_new_tokens.", False),
    ("entropy", "Entropy, nats per token", "Healthy: does not collapse to 0.", False),
    ("distinct_2", "Distinct bigrams", "Diversity of the answers; healthy: does not collapse.", True),
    ("eos_rate", "Answers that ended", "Not cut off; healthy: close to 100 %.", True),
)
OTHER_EVALS = "Another held-out eval, for side effects of the stage; healthy: does not get worse."
OVER_KL = "One point per evaluation, in order of steps; healthy: rises. A fall at growing KL is over-optimisation."
TOGETHER = "Healthy: both rise. A rising reward model's score with a falling judge's reward is reward hacking."


def main_charts(stage: str, name: str, lines: list[Line]) -> list[SvgChart]:
    """The judge's reward over KL, and, if a reward model scored the answers, its score and the judge's reward over steps."""
    found = [judge_against_kl(f"{stage} {name} kl", finite(lines, "reward", "kl"))]
    scored = finite(lines, "reward", "score")
    return [*found, proxy_and_judge(f"{stage} {name} proxy", scored)] if len(scored) > 1 else found


def judge_against_kl(salt: str, lines: list[Line]) -> SvgChart:
    """Draw the judge's reward over KL, joined in order of steps, with the first, best and last step labelled."""
    kl, reward = _column(lines, "kl"), _column(lines, "reward")
    best = max(range(len(lines)), key=reward.__getitem__)

    def paint(axes: matplotlib.axes.Axes) -> None:
        colour = SERIES[JUDGE]
        whiskers(axes, kl, reward, _twice(lines, "kl"), _twice(lines, "reward"), colour)
        axes.plot(kl, reward, color=colour, linewidth=1.2, marker="o", markersize=4.5, markeredgewidth=0)
        dress(axes)
        axes.margins(x=0.09, y=0.14)
        axes.yaxis.set_major_formatter(as_percent)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
        axes.set_xlabel("KL, nats per answer", color=INK)
        for place in dict.fromkeys((0, best, len(lines) - 1)):
            told = f"step {lines[place]['step']:,}"
            tell(axes, kl[place], reward[place], told, colour, ring=place == best, below=rises_from(reward, place))

    told = [f"{percent(line['reward'])} at step {line['step']:,}" for line in lines]
    svg = sketch(
        salt,
        "The judge's reward over the KL to the reference, points joined in order of steps",
        paint,
        hovered=[Hovered(JUDGE, "judge", kl, reward, told)],
        where=lambda x: f"KL {plain(x)}",
    )
    legend = [(JUDGE, "best", percent(reward[best])), (JUDGE, "last", percent(reward[-1]))]
    return SvgChart("Judge's reward over KL", svg, legend, OVER_KL)


def proxy_and_judge(salt: str, lines: list[Line]) -> SvgChart:
    """Draw the judge's reward and the reward model's score over steps, each on its own y axis."""
    steps = _column(lines, "step")
    curves = (("reward", JUDGE, as_percent), ("score", PROXY, lambda value, _: charts.tick(value)))

    def paint(axes: matplotlib.axes.Axes) -> None:
        dress(axes)
        for (key, index, ticks), side in zip(curves, (axes, axes.twinx()), strict=True):
            colour, values = SERIES[index], _column(lines, key)
            whiskers(side, steps, values, None, _twice(lines, key), colour)
            side.plot(steps, values, color=colour, linewidth=1.2, marker="o", markersize=4.5, markeredgewidth=0)
            dress(side)
            side.grid(visible=index == JUDGE, axis="y")
            side.margins(x=0.04, y=0.1)
            side.tick_params(axis="y", colors=colour)
            side.yaxis.set_major_formatter(ticks)

    hovered = [
        Hovered(JUDGE, "judge", steps, _column(lines, "reward"), [percent(line["reward"]) for line in lines]),
        Hovered(
            PROXY, "reward model", steps, _column(lines, "score"), [plain(line["score"]) for line in lines], axes=1
        ),
    ]
    label = "The judge's reward and the reward model's score over steps, each on its own axis"
    svg = sketch(salt, label, paint, hovered=hovered)
    legend = [
        (JUDGE, "judge, left axis", percent(lines[-1]["reward"])),
        (PROXY, "reward model, right axis", plain(lines[-1]["score"])),
    ]
    return SvgChart("Reward model and judge", svg, legend, TOGETHER)


def small_charts(stage: StageFiles, name: str, lines: list[Line]) -> list[SvgChart]:
    """Small charts of other metrics of the same answers, then of every other eval with two or more measurements."""
    found = [(key, title, note, part, finite(lines, key)) for key, title, note, part in OWN]
    for metric, shown in METRICS.items():
        for other, its in charts.by_eval(stage, metric).items():
            if other != name:
                title = f"{other}, {shown.label.split(',')[0]}"
                found.append((metric, title, OTHER_EVALS, metric != "bits_per_byte", finite(its, metric)))
    return [
        draw(
            f"{stage.name} {name} {title}",
            title,
            [Series("", _column(its, "step"), _column(its, key), points=True)],
            note,
            part,
            True,
        )
        for key, title, note, part, its in found
        if len(its) > 1
    ]


# ---- drawing, shared with the page over several runs -------------------------------------------------------------


def whiskers(
    axes: matplotlib.axes.Axes,
    x: list[float],
    y: list[float],
    x_half: list[float] | None,
    y_half: list[float] | None,
    colour: str,
) -> None:
    """Draw faint error bars; nan draws none."""
    axes.errorbar(x, y, xerr=x_half, yerr=y_half, fmt="none", ecolor=colour, elinewidth=1, alpha=0.35)


def rises_from(values: list[float], place: int) -> bool:
    """Whether the neighbour of an end point is higher, so that the point's label is placed below."""
    if place not in (0, len(values) - 1) or len(values) < 2:
        return False
    return values[1 if place == 0 else -2] > values[place]


def tell(
    axes: matplotlib.axes.Axes,
    x: float,
    y: float,
    text: str,
    colour: str,
    *,
    ring: bool = False,
    below: bool = False,
    ink: str = INK,
) -> None:
    """Label a point on the side that has room; `ring` marks the best point."""
    left, right = axes.get_xlim()
    (start, _), (here, _), (end, _) = axes.transData.transform([(left, y), (x, y), (right, y)])
    far = (here - start) / (end - start) > 0.6
    if ring:
        axes.plot(
            [x], [y], marker="o", markersize=9, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=1.2
        )
    shift = (-7 if far else 7, -7 if below else 7)
    axes.annotate(
        text, (x, y), shift, textcoords="offset points", color=ink,
        ha="right" if far else "left", va="top" if below else "bottom",
    )  # fmt: skip


def as_percent(value: float, _: object = None) -> str:
    return f"{100 * value:.3g}%".replace("-", "\N{MINUS SIGN}")


def _column(lines: list[Line], key: str) -> list[float]:
    return [line[key] for line in lines]


def _twice(lines: list[Line], key: str) -> list[float]:
    return [2 * line.get(f"{key}_stderr", math.nan) for line in lines]
