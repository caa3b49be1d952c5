"""The trials of a sweep: experiments made by applying the axes' values to the base, checked before any runs."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lm.changes import without_defaults
from lm.check import check
from lm.experiment import Experiment, UserError, nearest, resolve_sources, to_dict
from lm.overrides import leaf, replaced
from lm.sweep.results import metric_name
from lm.sweep.sweep import Grid, LogUniform, Range, Suggested, Sweep, Uniform, Values, Zip

KEY_LENGTH = 12  # hexadecimal digits; the chance of a collision among a million trials is 2e-3
MOST_TRIALS = 100_000

Point = dict[str, Any]
"""Axis name -> index of a value on the axis, or the number drawn from its distribution."""


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: its experiment, and the settings (axis -> value as text) that produced it.

    `impossible` is the reason why the trial cannot run ("" if it can); its experiment then has only the settings that
    could be applied.
    """

    settings: dict[str, str]
    experiment: Experiment
    key: str
    impossible: str = ""


def trials(sweep: Sweep) -> list[Trial]:
    """All trials of a grid or zip, each experiment once, the base's own settings first.

    Raises:
        UserError: an axis or value is invalid, or no trial can run.
    """
    check_sweep(sweep)
    if isinstance(sweep.search, Suggested):
        raise ValueError("the trials of a search are not known before it runs")
    found: dict[str, Trial] = {}
    for point in _points(sweep):
        for seed in sweep.seeds:
            if (trial := trial_at(sweep, point, seed)) is not None:
                found.setdefault(trial.key, trial)
    if not found:
        raise UserError(f"sweep {sweep.name} has no trial: `keep` holds for none of its experiments")
    first = next(iter(found.values()))
    if all(trial.impossible for trial in found.values()):
        which = "its trial" if len(found) == 1 else f"none of its {len(found)} trials can run; the first"
        raise UserError(f"sweep {sweep.name}: {which}, {settings_text(first.settings)}: {first.impossible}")
    own = {key_of(with_seed(sweep.base, seed)) for seed in sweep.seeds}
    return sorted(found.values(), key=lambda trial: trial.key not in own)


def trial_at(sweep: Sweep, point: Point, seed: int) -> Trial | None:
    """The trial at a point of the axes; None if `keep` excludes it. A trial that cannot run has `impossible` set."""
    experiment, settings, impossible = with_seed(sweep.base, seed), dict[str, str](), ""
    try:
        for name, place in point.items():
            if name in sweep.conditions and not sweep.conditions[name](experiment):
                continue
            settings[name] = _value_text(sweep.axes[name], place)
            experiment, settings[name] = apply(experiment, name, sweep.axes[name], place)
        experiment = resolve_sources(experiment)
        if not sweep.keep(experiment):
            return None
    except Exception as error:  # a function of the sweep's file may raise anything: only this trial fails
        impossible = error_text(error)
        settings |= {name: _value_text(sweep.axes[name], point[name]) for name in point if name not in settings}
        return Trial(settings, experiment, digest([sweep.name, settings, seed]), impossible)
    try:
        experiment = check(_with_init(experiment) if experiment.init else experiment)
        if experiment.evals or isinstance(sweep.search, Suggested):  # only a grid needs no eval
            metric_name(experiment, sweep.metric)
    except UserError as error:
        impossible = str(error)
    key = key_of(experiment)
    return Trial(settings, dataclasses.replace(experiment, name=f"{sweep.name}-{key}"), key, impossible)


def _with_init(experiment: Experiment) -> Experiment:
    from lm.open_weights import with_init  # with jax

    return with_init(experiment)


def error_text(error: Exception) -> str:
    """The message of an error in one line; of errors other than UserError with the type's name."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}".removesuffix(": ")


def _value_text(values: Values, place: Any) -> str:
    """A value of an axis as text, without applying it."""
    if isinstance(values, Range):
        return shown(float(place))
    if isinstance(values, Mapping):
        return list(values)[place]
    return f"value {place + 1}" if callable(values[place]) else shown(values[place])


def label_on(experiment: Experiment, name: str, values: Values, place: Any) -> str:
    """A value of an axis as text; `value N` if the function that gives it fails."""
    try:
        return apply(experiment, name, values, place)[1]
    except Exception:  # the trials with this value report the failure
        return _value_text(values, place)


def apply(experiment: Experiment, name: str, values: Values, place: Any) -> tuple[Experiment, str]:
    """Apply a value of one axis; returns the experiment and the value as text."""
    if isinstance(values, Range):
        number = round(place) if leaf(experiment, name)[0] is int else place
        return replaced(experiment, name, number), shown(number)
    if isinstance(values, Mapping):
        label = list(values)[place]
        return _variant(experiment, f"{name}, {label}", values[label]), label
    value = values[place](experiment) if callable(values[place]) else values[place]
    return replaced(experiment, name, value), shown(value)


def _variant(experiment: Experiment, where: str, variant: Any) -> Experiment:
    if variant is None:
        return experiment
    if isinstance(variant, Mapping):
        for name, value in variant.items():
            experiment = replaced(experiment, name, value(experiment) if callable(value) else value)
        return experiment
    changed = variant(experiment)
    if not isinstance(changed, Experiment):
        raise UserError(f"axis {where}: the function returns {type(changed).__name__}; it should return an Experiment")
    return changed


def with_seed(experiment: Experiment, seed: int) -> Experiment:
    return dataclasses.replace(experiment, seed=seed)


def key_of(experiment: Experiment) -> str:
    """The key of an experiment: a digest of its value except the name."""
    return digest(
        {k: v for k, v in without_defaults(resolve_sources(experiment)).items() if k not in ("name", "sinks")}
    )


def digest(value: Any) -> str:
    """A short digest of a plain value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]


def shown(value: Any) -> str:
    """A value of an axis as text for tables."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(to_dict(value), ensure_ascii=False) if not isinstance(value, str) else value


def settings_text(settings: Mapping[str, str]) -> str:
    """Settings in one line, each named by the last part of its dotted name if that is unique."""
    ends = [name.rsplit(".", 1)[-1] for name in settings]
    short = ends if len(set(ends)) == len(ends) else list(settings)
    return ", ".join(f"{name} {value}" for name, value in zip(short, settings.values(), strict=True)) or "the base"


# ---- points ------------------------------------------------------------------------------------------------------


def _points(sweep: Sweep) -> Iterator[Point]:
    lengths = [len(typing.cast(tuple | Mapping, values)) for values in sweep.axes.values()]
    if isinstance(sweep.search, Zip):
        places: Any = zip(*(range(length) for length in lengths), strict=True)
    else:
        places = itertools.product(*(range(length) for length in lengths))
    return (dict(zip(sweep.axes, place, strict=True)) for place in places)


def base_point(sweep: Sweep) -> Point | None:
    """The point of the axes at which the experiment equals the base; None if there is none."""
    point: Point = {}
    for name, values in sweep.axes.items():
        if isinstance(values, Range):
            _, value = leaf(sweep.base, name)
            if not values.low <= value <= values.high:
                return None
            point[name] = value
        else:
            place = next((place for place in range(len(values)) if _equals_base(sweep.base, name, values, place)), None)
            if place is None:
                return None
            point[name] = place
    return point


def _equals_base(base: Experiment, name: str, values: Values, place: int) -> bool:
    try:
        return apply(base, name, values, place)[0] == base
    except Exception:  # a function of the sweep's file failed; its trials report the failure
        return False


# ---- checks ------------------------------------------------------------------------------------------------------


def check_sweep(sweep: Sweep) -> None:
    """Check a sweep before it runs, except its experiments, which `trial_at` checks.

    Raises:
        UserError: names the axis, its value and what would work.
    """
    where = f"sweep {sweep.name}"
    if not sweep.seeds or len(set(sweep.seeds)) < len(sweep.seeds):
        raise UserError(f"{where}: seeds are {sweep.seeds}; they should be distinct, at least one")
    if sweep.metric:
        metric_name(sweep.base, sweep.metric)
    for name, values in sweep.axes.items():
        try:
            _check_axis(sweep, name, values)
        except UserError as error:
            raise UserError(f"{where}, axis {name!r}: {error}") from None
    for kind, names in (("conditions", sweep.conditions), ("baseline", sweep.baseline)):
        for name in names:
            if name not in sweep.axes:
                raise UserError(f"{where}: {kind} names no axis {name!r}{nearest(name, sweep.axes)}")
    _check_search(sweep, where)


def _check_axis(sweep: Sweep, name: str, values: Values) -> None:
    if name == "seed":
        raise UserError("the seed cannot be an axis: list seeds in `seeds`, and results are compared within each seed")
    if isinstance(values, Range):
        kind, _ = leaf(sweep.base, name)
        low = 0.0 if isinstance(values, LogUniform) else -float("inf")
        if kind not in (int, float) or not low < values.low < values.high:
            raise UserError(f"a distribution is for a number, from low to a larger high, above {low:g}; it is {values}")
        return
    if not isinstance(values, tuple | Mapping) or not len(values):
        raise UserError(f"it is {values!r}; it should be a tuple of values, variants by name, or a distribution")
    if isinstance(values, tuple) and not any(map(callable, values)):
        for value in values:
            if not isinstance(value, float) or math.isfinite(
                value
            ):  # other numbers make failed trials, as out of range
                replaced(sweep.base, name, value)
    elif isinstance(values, tuple):
        leaf(sweep.base, name)
    first = with_seed(sweep.base, sweep.seeds[0])
    _refuse_if_all_fail(first, name, values)
    labels = [label_on(first, name, values, place) for place in range(len(values))]
    if len(set(labels)) < len(labels) and name not in sweep.conditions:
        raise UserError(f"has a value twice: {', '.join(labels)}")


def _refuse_if_all_fail(experiment: Experiment, name: str, values: tuple | Mapping) -> None:
    """Raise UserError if no value of an axis can be applied (a single one that cannot is a failed trial)."""
    refused: UserError | None = None
    for place in range(len(values)):
        try:
            apply(experiment, name, values, place)
        except UserError as error:
            refused = refused or error
        except Exception:  # the function may depend on earlier axes; its trials report the failure
            return
        else:
            return
    if refused is not None:
        raise refused


def _check_search(sweep: Sweep, where: str) -> None:
    ranged = [name for name, values in sweep.axes.items() if isinstance(values, Uniform | LogUniform)]
    if isinstance(sweep.search, Suggested):
        if sweep.search.trials < 1 or not sweep.axes:
            raise UserError(f"{where}: a search needs an axis and at least one trial")
        if not sweep.base.evals:
            raise UserError(f"{where}: a search needs an eval to optimise; the base has no evals")
        return
    if ranged:
        raise UserError(
            f"{where}: {type(sweep.search).__name__} needs values, and axis {ranged[0]!r} has a distribution"
        )
    lengths = {name: len(typing.cast(tuple | Mapping, values)) for name, values in sweep.axes.items()}
    if isinstance(sweep.search, Zip) and len(set(lengths.values())) > 1:
        raise UserError(f"{where}: Zip needs as many values on every axis; there are {lengths}")
    total = len(sweep.seeds)
    for length in lengths.values():
        total *= length
    if isinstance(sweep.search, Grid) and total > MOST_TRIALS:
        raise UserError(f"{where}: the grid has {total:,} trials; search it (Random, TPE) instead")
