"""The `Sweep` value: a base experiment, axes along which it varies, seeds, and the search (grid, random, TPE, …)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lm.config.field import MAX_NAME, Reading, check_name, read, shown
from lm.experiment import Experiment, UserError, strict
from lm.files import defined_in, file_of

MOST_NAME = MAX_NAME - 13  # a trial's name is the sweep's, a dash and a key of 12 digits
Change = Callable[[Experiment], Any]


@dataclass(frozen=True)
class Uniform:
    """Uniform distribution from `low` to `high`; integers if the field is an integer."""

    low: float
    high: float


@dataclass(frozen=True)
class LogUniform:
    """Log-uniform distribution from `low` to `high`; integers if the field is an integer."""

    low: float
    high: float


Range = Uniform | LogUniform
Variant = Change | Mapping[str, Any] | None
"""A named variant of an axis: a function of the experiment, fields by dotted name, or None (the base unchanged)."""

Values = Range | tuple | Mapping[str, Variant]
"""The values of an axis: a distribution, a tuple of values (or functions of the experiment), or variants by name."""


@dataclass(frozen=True)
class Grid:
    """Every combination of the axes' values."""


@dataclass(frozen=True)
class Zip:
    """One trial for the first values of all axes, one for the second values, …"""


@dataclass(frozen=True)
class Random:
    """Random search: `trials` settings drawn independently, first the base's own settings if the axes contain them."""

    trials: int
    seed: int = 0


@dataclass(frozen=True)
class TPE:
    """Tree-structured Parzen estimator: `trials` settings, of which the first `startup` are drawn at random.

    Source: Bergstra et al. 2011, as in Optuna (multivariate).
    """

    trials: int
    startup: int = 10
    seed: int = 0


@dataclass(frozen=True)
class Halving:
    """Asynchronous successive halving: random settings, of which the best 1/`reduction` continue after each rung.

    Rungs are `first`, first · reduction, … steps of the last stage; its `eval_every` must measure the metric there.
    Source: Li et al. 2020, as in Optuna.
    """

    trials: int
    first: int
    reduction: int = 3
    seed: int = 0


Search = Grid | Zip | Random | TPE | Halving
Suggested = Random | TPE | Halving  # searches that draw settings while the sweep runs


@dataclass(frozen=True)
class Sweep:
    """A sweep: a base experiment, the axes along which it varies, the seeds, and the search.

    Args:
        axes: axis name -> values. An axis of values or a distribution is named by a field, as on the command line; an
            axis of variants may have any name.
        seeds: every setting is run with each seed.
        metric: `EVAL` or `EVAL.FIELD` after the last stage, which a search optimises; "": the first eval of the base.
        baseline: the settings that others are compared with, axis -> value as text; default: an axis's first value.
        conditions: axis name -> predicate; the axis applies only if it holds for the experiment with all earlier axes set.
        keep: predicate; only experiments for which it holds are run.
    """

    name: str
    base: Experiment
    axes: Mapping[str, Values] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    search: Search = Grid()
    metric: str = ""
    baseline: Mapping[str, str] = field(default_factory=dict)
    conditions: Mapping[str, Callable[[Experiment], bool]] = field(default_factory=dict)
    keep: Callable[[Experiment], bool] = lambda experiment: True


def load(name: str) -> Sweep:
    """Load the value `sweep` of a file, given as a path or a (dotted) name below `experiments/`; FILE:NAME: another value.

    Raises:
        UserError: there is no such file (lists the existing ones), or it defines no such value.
    """
    file, _, value = name.partition(":")
    return _strict(defined_in(file_of(file), value or "sweep", Sweep))


TYPES: dict[str, tuple[Any, str]] = {
    "name": (str, "text"),
    "axes": (Mapping, "a mapping"),
    "seeds": (tuple | list, "a tuple of integers"),
    "search": (Search, "a search, such as Grid()"),
    "metric": (str, "text"),
    "baseline": (Mapping, "a mapping"),
    "conditions": (Mapping, "a mapping"),
    "keep": (Callable, "a function"),
}
"""Type of each field of a sweep except its base, and its description in error messages."""


def _strict(sweep: Sweep) -> Sweep:
    """Check a sweep's fields as strictly as an experiment's. Raises UserError naming the field."""
    for name, (kind, words) in TYPES.items():
        if not isinstance(value := getattr(sweep, name), kind):
            raise UserError(f"sweep {name} is {shown(value)}; it should be {words}")
    check_name(sweep.name, "sweep name")
    if len(sweep.name) > MOST_NAME:
        raise UserError(f"sweep name is {shown(sweep.name)}; it should have at most {MOST_NAME} characters")
    reading, seed = Reading(plain=False, names=True), Experiment.__dataclass_fields__["seed"].metadata
    seeds = (read(value, int, f"sweep seeds.{place}", reading, seed) for place, value in enumerate(sweep.seeds))
    return replace(sweep, base=strict(sweep.base), seeds=tuple(seeds))


STORE = Path("sweeps") / "shared"
"""Default folder of the stages that trials share."""


def folder_of(sweep: Sweep) -> Path:
    """Default folder of a sweep."""
    return Path("sweeps") / sweep.name
