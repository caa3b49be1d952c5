"""A sweep is a value: a base experiment, axes along which it is changed, seeds, and how the changes are searched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lm.config.field import MAX_NAME, Reading, check_name, read, shown
from lm.experiment import Experiment, UserError, strict
from lm.files import defined_in, file_of

MOST_NAME = MAX_NAME - 13  # the name of a trial has a dash and a key behind the sweep's
Change = Callable[[Experiment], Any]


@dataclass(frozen=True)
class Uniform:
    """Any number from `low` to `high`; whole numbers where the field is one."""

    low: float
    high: float


@dataclass(frozen=True)
class LogUniform:
    """Any number from `low` to `high`, its logarithm evenly; whole numbers where the field is one."""

    low: float
    high: float


Range = Uniform | LogUniform
Variant = Change | Mapping[str, Any] | None
"""What a name stands for: the experiment changed by a function, fields by dotted name, or (None) the base as it is."""

Values = Range | tuple | Mapping[str, Variant]
"""Of an axis: a distribution; values (or functions of the experiment that give one); variants by name."""


@dataclass(frozen=True)
class Grid:
    """Every combination."""


@dataclass(frozen=True)
class Zip:
    """The first value of every axis, then the second of every axis, …"""


@dataclass(frozen=True)
class Random:
    """`trials` settings drawn independently; the base's own comes first, where it lies within the axes."""

    trials: int
    seed: int = 0


@dataclass(frozen=True)
class TPE:
    """`trials` settings by the tree-structured Parzen estimator, of which `startup` are drawn at random.

    Source: Bergstra et al. 2011, as in Optuna (multivariate).
    """

    trials: int
    startup: int = 10
    seed: int = 0


@dataclass(frozen=True)
class Halving:
    """Random settings, of which at each rung only the best 1/`reduction` go on: asynchronous successive halving.

    Rungs are `first`, first · reduction, … steps of the last stage, where its held-out numbers must be taken (eval_every).
    Source: Li et al. 2020, as in Optuna.
    """

    trials: int
    first: int
    reduction: int = 3
    seed: int = 0


Search = Grid | Zip | Random | TPE | Halving
Suggested = Random | TPE | Halving  # settings are drawn while the sweep runs


@dataclass(frozen=True)
class Sweep:
    """What is run, and what of it is to be compared.

    Args:
        axes: by name. With values or a distribution, the name is that of a field, as on the command line; an axis of
            variants may have any name.
        seeds: every setting is run with each.
        metric: `EVAL` or `EVAL.FIELD` of a held-out measurement after the last stage, which a search makes better;
            "": the first eval of the base.
        baseline: the settings that the others are compared with, by axis, as they are shown; of an axis that is left
            out its first value.
        conditions: an axis with one applies only where it holds of the experiment, as the axes before it have left it.
        keep: only the experiments of which this holds are run.
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
    """The `sweep` that a file defines: a path, or a name or dotted name below `experiments/`; FILE:NAME another value.

    Raises:
        UserError: no such file (lists what is there), or it defines no such value.
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
"""What the fields of a sweep are, its base aside."""


def _strict(sweep: Sweep) -> Sweep:
    """The sweep with its base and its seeds read as strictly as an experiment; UserError names the field."""
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
"""Where stages are that trials share, unless something else is said."""


def folder_of(sweep: Sweep) -> Path:
    """Where a sweep's results are, unless something else is said."""
    return Path("sweeps") / sweep.name
