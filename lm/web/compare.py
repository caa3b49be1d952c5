"""compare.html: a self-contained page that compares runs."""

from __future__ import annotations

import functools
import os
import urllib.parse
from collections.abc import Callable
from pathlib import Path

from lm import experiment as experiments
from lm.sweep.compare import Comparison, Group, Metric, conclusion, differing_fields, field_text
from lm.sweep.explain import MOST_AXES, importance, scalings, varied
from lm.sweep.results import Result, better, measurements
from lm.sweep.statistics import Curve, curve_points
from lm.sweep.table import number, origin
from lm.web.bands import bands, finite, fitted, parallel
from lm.web.charts import MAX_POINTS, SERIES, SvgChart
from lm.web.report import fill, write_page

Points = list[tuple[int, float]]  # (step, value)
TRAINED = ("reward", "loss")  # training metrics of the last stage: the first that exists is drawn


def write_comparison(comparison: Comparison, path: Path) -> Path:
    """Write the page and return its path."""
    return write_page(path, render(comparison, path.parent))


def render(comparison: Comparison, home: Path = Path()) -> str:
    """Render the page as HTML for a file in the folder `home`, to which its links to runs are relative."""
    return fill(
        "compare.html.j2",
        comparison=comparison,
        metrics=[(metric, _table(comparison, metric), _charts(comparison, metric)) for metric in comparison.metrics],
        differences=[(group.label, _differences(comparison, group)) for group in comparison.groups],
        importances=importances,
        training=_training(comparison),
        links={str(result.folder): link(result.folder, home) for result in comparison.results},
        origins=[(group.label, result.seed, origin(result)) for group in comparison.groups for result in group.results],
    )


def link(run: Path, home: Path) -> str:
    """Relative link to a run's report from a page in `home`; to its folder where there is no report yet."""
    report = run / "report.html"
    target = report if report.is_file() else run
    return urllib.parse.quote(Path(os.path.relpath(target.resolve(), home.resolve())).as_posix())


def _table(comparison: Comparison, metric: Metric) -> list[tuple[Group, str, str, str, str]]:
    """Table rows: (group, last, best, difference from the baseline in words, tone)."""
    rows = []
    for group in comparison.groups:
        cell = comparison.cells[group.label, metric]
        tone = "even"
        if cell.differs and cell.difference:
            tone = "better" if cell.difference.mean * better(metric.field) > 0 else "worse"
        rows.append((group, number(cell.final), number(cell.best), conclusion(cell, metric), tone))
    return rows


def _differences(comparison: Comparison, group: Group) -> list[tuple[str, str, str]]:
    """Differences of a group's experiment from the baseline's: (name, baseline's value, group's value).

    A stage or eval that only one of them has is one row.
    """
    there, here = (experiments.flatten(one.results[0].experiment) for one in (comparison.baseline, group))
    names = differing_fields([comparison.baseline.results[0], group.results[0]])
    return [(name, field_text(there, name), field_text(here, name)) for name in names]


def _chosen(comparison: Comparison, metric: Metric) -> list[Group]:
    """The groups whose curves are drawn: the baseline and the best others, in table order.

    A group then keeps one colour over all metrics, as long as there are no more groups than colours.
    """
    others = [
        group
        for group in comparison.groups
        if group is not comparison.baseline and comparison.cells[group.label, metric].final.count
    ]
    others.sort(key=lambda group: -better(metric.field) * comparison.cells[group.label, metric].final.mean)
    best = others[: len(SERIES) - 1]
    return [comparison.baseline, *(group for group in comparison.groups if group in best)]


def _charts(comparison: Comparison, metric: Metric) -> list[SvgChart]:
    """The charts of a metric: curves, parallel coordinates and fits, where there is data."""
    found = []

    def held_out(result: Result) -> list[tuple[int, float]]:
        last = next((s for s in reversed(result.stages.values()) if measurements(s, metric.name, metric.field)), None)
        return measurements(last, metric.name, metric.field) if last else []

    curves = _curves(_chosen(comparison, metric), held_out)
    if any(len(curve.points) > 1 for curve in curves):
        found.append(bands(f"{metric.label}, on the way", curves))
    names = varied(comparison)
    measured = [group for group in comparison.groups if comparison.cells[group.label, metric].final.count]
    if 1 < len(names) <= MOST_AXES and len(measured) > 2:
        settings = [[str(group.settings.get(name, "–")) for name in names] for group in measured]
        values = [comparison.cells[group.label, metric].final.mean for group in measured]
        found.append(
            parallel(metric.label, [n.rsplit(".", 1)[-1] for n in names], settings, values, better(metric.field))
        )
    for law in scalings(comparison, metric):
        told = f"{metric.label} ∝ {law.what}^{law.fit.exponent:.3f} [{law.fit.low:.3f}, {law.fit.high:.3f}]"
        found.append(fitted(told, law.points, law.fit.factor, law.fit.exponent, law.what, metric.label))
    return found


def importances(comparison: Comparison, metric: Metric) -> list[tuple[str, float]]:
    """Importance of each axis, the largest first; none where there are few settings."""
    return sorted(importance(comparison, metric).items(), key=lambda item: -item[1])


def _training(comparison: Comparison) -> list[SvgChart]:
    """The last stage's training curve, for the groups that the first metric selects."""
    if not comparison.metrics:
        return []
    groups = _chosen(comparison, comparison.metrics[0])
    found = [(field, _curves(groups, functools.partial(_trained, field))) for field in TRAINED]
    drawn = next(((field, curves) for field, curves in found if curves), None)
    return [bands(f"Training {drawn[0]} of the last stage", drawn[1])] if drawn else []


def _trained(field: str, result: Result) -> Points:
    return result.training(list(result.stages)[-1], field)


def _curves(groups: list[Group], of_run: Callable[[Result], Points]) -> list[Curve]:
    """Curves of means and intervals over seeds, at every step that all runs of a group have."""
    found = []
    for group in groups:
        measured = filter(None, map(of_run, group.ended))
        points = finite(curve_points([dict(points) for points in measured]))
        if points:
            found.append(Curve(group.label, points[:: -(-len(points) // MAX_POINTS)]))
    return found
