"""Analysis of a comparison: importance of each axis, and power laws of a metric in model size or tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import optuna

from lm.sweep.compare import Comparison, Group, Metric
from lm.sweep.results import Result, better
from lm.sweep.statistics import PowerLaw, power_law

FEWEST_GROUPS = 4  # least number of groups for importances
MOST_AXES = 12  # with more axes the runs have too little in common
FEWEST_SIZES = 3  # least number of sizes for a fit, so that its exponent has an interval


def varied(comparison: Comparison) -> list[str]:
    """Names of the axes on which the groups have more than one value, in order."""
    names = dict.fromkeys(name for group in comparison.groups for name in group.settings)
    return [name for name in names if len({group.settings.get(name) for group in comparison.groups}) > 1]


def importance(comparison: Comparison, metric: Metric) -> dict[str, float]:
    """Importance of each axis for a metric by PED-ANOVA (Watanabe et al. 2023, as in Optuna), over the better half of groups.

    Returns the share of each axis, summing to 1; {} for too few groups or axes, or if all groups have the same mean.
    """
    names = varied(comparison)
    measured = [group for group in comparison.groups if comparison.cells[group.label, metric].final.count]
    means = {comparison.cells[group.label, metric].final.mean for group in measured}
    if not 2 <= len(names) <= MOST_AXES or len(measured) < FEWEST_GROUPS or len(means) < 2:
        return {}
    choices = {name: sorted({str(group.settings.get(name, "–")) for group in measured}) for name in names}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize" if better(metric.field) > 0 else "minimize")
    for group in measured:
        study.add_trial(
            optuna.trial.create_trial(
                params={name: str(group.settings.get(name, "–")) for name in names},
                distributions={name: optuna.distributions.CategoricalDistribution(choices[name]) for name in names},
                value=comparison.cells[group.label, metric].final.mean,
            )
        )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(
        target_quantile=0.5, region_quantile=1.0, evaluate_on_local=False
    )
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


@dataclass(frozen=True)
class Scaling:
    """Power law of a lower-is-better metric in parameters or tokens: a point (x, y) per group, and the fit."""

    what: str
    metric: Metric
    points: tuple[tuple[float, float], ...]
    fit: PowerLaw


def scalings(comparison: Comparison, metric: Metric) -> list[Scaling]:
    """Fit power laws of a metric in parameters and in tokens, each only if the groups are equal in the other."""
    if better(metric.field) > 0:
        return []
    sizes = {what: _spent(comparison.groups, what) for what in ("num_params", "tokens")}
    found = []
    for what, other in (("num_params", "tokens"), ("tokens", "num_params")):
        points = [
            (sizes[what][group.label], comparison.cells[group.label, metric].final.mean)
            for group in comparison.groups
            if group.label in sizes[what] and comparison.cells[group.label, metric].final.mean > 0
        ]
        alone = len({round(math.log(value), 1) for value in sizes[other].values()}) == 1
        if alone and len({x for x, _ in points}) >= FEWEST_SIZES and len({y for _, y in points}) > 1:
            label = "parameters" if what == "num_params" else "tokens"
            found.append(Scaling(label, metric, tuple(sorted(points)), power_law(*zip(*points, strict=True))))
    return found


def _spent(groups: Sequence[Group], what: str) -> Mapping[str, float]:
    found = {group.label: [_of_run(result, what) for result in group.ended] for group in groups}
    return {label: sum(values) / len(values) for label, values in found.items() if values and min(values) > 0}


def _of_run(result: Result, what: str) -> float:
    """A run's number of parameters at its end, or its number of tokens summed over all stages."""
    summaries = [stage.summary for stage in result.stages.values() if stage.summary]
    if not summaries:
        return 0.0
    values = [one.get(what, 0) for one in summaries]
    return float(values[-1] if what == "num_params" else sum(values))
