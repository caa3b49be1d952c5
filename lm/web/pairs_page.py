"""A page about a reward model on pairs: calibration, accuracy by difference of length, and the pairs it gets most wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.axes
import numpy as np

from lm.data.chat import said_by
from lm.web.charts import GRID, SERIES, SvgChart, dress, sketch
from lm.web.hover import Hovered
from lm.web.numbers import percent
from lm.web.report import fill, write_page

if TYPE_CHECKING:
    from lm.evals.preferences import Worth
    from lm.train.judging import PairScores

SHOWN = 10  # pairs with the largest errors


def write_pairs_page(judged: PairScores, path: Path) -> Path:
    """Write the page with the result of `lm.train.judging.judge_pairs`; returns its path."""
    return write_page(path, render(judged))


def render(judged: PairScores) -> str:
    """Render the page as HTML."""
    worst = np.argsort(judged.scored.gaps)[:SHOWN]
    wrong = [(judged.scored.rows[i], float(judged.scored.gaps[i])) for i in worst if judged.scored.gaps[i] < 0]
    return fill(
        "pairs_page.html.j2",
        judged=judged,
        worth=judged.worth,
        charts=[calibration(judged.worth), by_length(judged.worth), gaps(judged.scored.gaps)],
        wrong=[(_asked(row), _said(row["chosen"]), _said(row["rejected"]), gap) for row, gap in wrong],
        percent=lambda value: f"{100 * value:.1f} %",
    )


def calibration(worth: Worth) -> SvgChart:
    """Draw the accuracy over the predicted probability; a calibrated model follows the diagonal."""

    def paint(axes: matplotlib.axes.Axes) -> None:
        axes.plot([0.5, 1], [0.5, 1], color=GRID, linewidth=1, linestyle=(0, (3, 3)))
        x, y = [one.mean for one in worth.calibration], [one.right for one in worth.calibration]
        axes.plot(x, y, color=SERIES[0], linewidth=1.6, marker="o", markersize=4)
        dress(axes)
        axes.set_xlim(0.49, 1.01)

    told = [f"{percent(one.right)} right of {one.pairs:,}" for one in worth.calibration]
    hovered = Hovered(0, "", [one.mean for one in worth.calibration], [one.right for one in worth.calibration], told)
    svg = sketch(
        "calibration",
        "accuracy over predicted probability",
        paint,
        hovered=[hovered],
        where=lambda x: f"predicted {percent(x)}",
    )
    note = "Fraction of pairs ranked correctly over the predicted probability; a calibrated model follows the dashed diagonal."
    return SvgChart("Calibration", svg, [(0, "error", f"{worth.calibration_error:.3f}")], note)


def by_length(worth: Worth) -> SvgChart:
    """Draw the accuracy by length difference of the two answers."""

    def paint(axes: matplotlib.axes.Axes) -> None:
        places = range(len(worth.by_length))
        axes.bar(places, [one.right for one in worth.by_length], color=SERIES[1], width=0.7)
        axes.axhline(0.5, color=GRID, linewidth=1)
        dress(axes)
        axes.set_xticks(list(places), [f"{one.mean:+.0f}" for one in worth.by_length])

    bins = worth.by_length
    told = [f"{percent(one.right)} right of {one.pairs:,}" for one in bins]
    hovered = Hovered(1, "", list(range(len(bins))), [one.right for one in bins], told)
    svg = sketch(
        "by length", "accuracy by how many tokens the chosen answer is longer", paint,
        hovered=[hovered], where=lambda x: f"{bins[int(x)].mean:+.0f} tokens",
    )  # fmt: skip
    note = "Pairs grouped by how many tokens the chosen answer is longer; a model without length bias has equal bars."
    return SvgChart("Accuracy by length difference", svg, [], note)


def gaps(found: np.ndarray) -> SvgChart:
    """Draw a histogram of the score differences of the pairs."""

    counts, edges = np.histogram(found, bins=30)
    middles = ((edges[1:] + edges[:-1]) / 2).tolist()

    def paint(axes: matplotlib.axes.Axes) -> None:
        axes.bar(middles, counts, width=edges[1] - edges[0], color=SERIES[2])
        axes.axvline(0, color=GRID, linewidth=1)
        dress(axes)

    hovered = Hovered(2, "", middles, counts.tolist(), [f"{count:,} pairs" for count in counts])
    label = "histogram of the chosen answer's score minus the rejected one's"
    svg = sketch("gaps", label, paint, hovered=[hovered], where=lambda x: f"about {x:+.2f}")
    note = "Number of pairs by score difference; healthy: most of them right of 0."
    return SvgChart("Score: chosen minus rejected", svg, [(2, "mean", f"{found.mean():+.2f}")], note)


def _asked(row: dict[str, Any]) -> str:
    prompt = row.get("prompt", row["chosen"][:-1] if isinstance(row["chosen"], list) else "")
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{turn['role']}: {said_by(turn)}" for turn in prompt)


def _said(answer: Any) -> str:
    return answer if isinstance(answer, str) else said_by(answer[-1])
