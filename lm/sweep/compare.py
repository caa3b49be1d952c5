"""Comparison of runs: fields that differ, results over seeds, and significance of differences to a baseline.

Runs whose experiments are equal except for the seed form a group. Every group is compared with the baseline group,
paired by seed, with p-values corrected for the number of comparisons. Groups are compared only on the same held-out data.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.experiment import UserError, flatten, nearest
from lm.sweep.results import Result, better, main_field
from lm.sweep.statistics import Difference, Estimate, detectable, estimate, holm, paired
from lm.sweep.trials import settings_text, shown

FREE = ("name", "seed")  # fields that may differ within a group
LEVEL = 0.05
ABSENT = "–"  # shown for a field that a run does not have
MOST_IN_LABEL = 6  # differing fields that a label can list; with more a group is labelled by its folder
MOST_NAMED = 10
MOST_FAILURES = 5


@dataclass(frozen=True)
class Group:
    """Runs whose experiments differ only in the seed."""

    label: str
    settings: dict[str, str]
    results: tuple[Result, ...]

    @property
    def ended(self) -> list[Result]:
        """The runs that finished with a result."""
        return [result for result in self.results if result.measured]

    @property
    def note(self) -> str:
        """Counts of the other runs: failed, ended early, not finished."""
        states = {
            "failed": sum(bool(result.failed) for result in self.results),
            "ended early": sum(result.pruned for result in self.results),
            "not finished": sum(not (r.finished or r.failed or r.pruned) for r in self.results),
        }
        return ", ".join(f"{count} {state}" for state, count in states.items() if count)


@dataclass(frozen=True)
class Metric:
    """A field of an eval's result; `name` is the eval's name."""

    name: str
    field: str

    @property
    def label(self) -> str:
        return f"{self.name} {self.field.replace('_', ' ')}"


@dataclass(frozen=True)
class Cell:
    """A group's result in one metric, over seeds: final value, best value, and paired difference to the baseline.

    `corrected` is the p-value with Holm's correction over all comparisons of the metric. `difference` is None for the
    baseline.
    """

    final: Estimate
    best: Estimate
    difference: Difference | None = None
    corrected: float = math.nan
    comparisons: int = 1  # number of groups compared in this metric
    excluded: str = ""  # reason why the group is not compared; "" if it is

    @property
    def differs(self) -> bool:
        return self.corrected < LEVEL


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`; `cells` by (label of the group, metric)."""

    groups: tuple[Group, ...]
    metrics: tuple[Metric, ...]
    baseline: Group
    why_baseline: str  # reason for the choice of baseline, to print
    cells: Mapping[tuple[str, Metric], Cell]
    changed: tuple[str, ...]  # fields and parts in which the groups differ; see `differing_fields`
    notes: tuple[str, ...]

    @property
    def results(self) -> list[Result]:
        return [result for group in self.groups for result in group.results]


def compare(
    results: Sequence[Result], baseline: Mapping[str, str] | str | None = None, only: Sequence[str] = (), why: str = ""
) -> Comparison:
    """Group runs and compare every group with the baseline. Duplicates (same folder, or same experiment) count once.

    Args:
        baseline: the group to compare with, by label, by the folder (or folder name) of one of its runs, or by values of
            differing fields; None: the first group with a finished run.
        only: names of evals to compare; empty: all evals.
        why: reason for the given baseline, to print.

    Raises:
        UserError: no run has finished, or there is no such group or eval.
    """
    results, notes = _without_duplicates(results)
    if not any(result.finished for result in results):
        raise UserError("no run has finished: there is nothing to compare yet" + _first_failure(results))
    groups = group(results)
    base = _find_group(groups, baseline) if isinstance(baseline, str) else _baseline(groups, baseline or {})
    if not baseline:
        why = (
            why
            if base is groups[0] and why
            else "the first " + ("of those named" if base is groups[0] else "that has finished")
        )
    metrics = _metrics(results, only)
    cells: dict[tuple[str, Metric], Cell] = {}
    notes += _failures(groups)
    for metric in metrics:
        cells |= _compared(groups, base, metric, notes)
    seeds = {len({result.seed for result in one.ended}) for one in groups if one.ended}
    if not metrics:
        notes.append("the runs have no evals with a number each: there is nothing to compare but what differs")
    if metrics and seeds == {1}:
        notes.append("one seed each: no interval, so a difference may be chance")
    return Comparison(groups, metrics, base, why, cells, differing_fields(results), tuple(dict.fromkeys(notes)))


def _without_duplicates(results: Sequence[Result]) -> tuple[list[Result], list[str]]:
    """Remove duplicate runs (same folder, or same experiment and seed); returns the rest and notes about the removed."""
    folders: dict[Path, Result] = {}
    for result in results:
        folders.setdefault(result.folder.resolve(), result)
    kept: dict[str, Result] = {}
    notes = []
    if again := len(results) - len(folders):
        notes.append(f"{again} {'run is' if again == 1 else 'runs are'} named again, and counted once")
    for result in folders.values():
        of_it = [str(result.folder)] if result.impossible else [json.dumps(_leaves(result)), str(result.seed)]
        key = "\n".join(of_it)
        other = kept.get(key)
        if other is None:
            kept[key] = result
            continue
        better_one = result if result.measured and not other.measured else other
        left = other if better_one is result else result
        kept[key] = better_one
        notes.append(f"{left.folder} is the same experiment with the same seed as {better_one.folder}: counted once")
    return list(kept.values()), notes


def _failures(groups: Sequence[Group]) -> list[str]:
    """A line for each failed run with its reason, at most MOST_FAILURES and a count of the others."""
    lines = [
        f"{one.label}, seed {result.seed} failed: {result.failed}"
        for one in groups
        for result in one.results
        if result.failed
    ]
    more = len(lines) - MOST_FAILURES
    return [*lines[:MOST_FAILURES], f"and {more} more failed: --csv has the reason of each"] if more > 0 else lines


def _first_failure(results: Sequence[Result]) -> str:
    failed = [result.failed for result in results if result.failed]
    return f"; {len(failed)} of {len(results)} failed, the first: {failed[0]}" if failed else ""


def group(results: Sequence[Result]) -> tuple[Group, ...]:
    """Group runs whose experiments are equal except for the seed, in order of first occurrence."""
    names, differing = changed_fields(results), differing_fields(results)
    found: dict[str, list[Result]] = {}
    for result in results:
        leaves = _leaves(result)
        own = result.settings if result.impossible else {}  # its settings could not be applied to its experiment
        found.setdefault(json.dumps([[leaves.get(name) for name in names], own]), []).append(result)
    groups = []
    for same in found.values():
        leaves = _leaves(same[0])
        settings = same[0].settings or {name: field_text(leaves, name) for name in differing}
        many = not same[0].settings and len(differing) > MOST_IN_LABEL
        label = _label(settings, of_axes=bool(same[0].settings))
        groups.append(Group(same[0].folder.name if many else label, settings, tuple(same)))
    labels = [one.label for one in groups]
    return tuple(
        dataclasses.replace(one, label=f"{one.label} ({place})") if labels.count(one.label) > 1 else one
        for place, one in enumerate(groups, start=1)
    )


def _label(settings: Mapping[str, str], of_axes: bool) -> str:
    """Label of settings in one line; of a sweep's single axis of variants only the variant's name."""
    names = [name for name in settings if "." not in name]
    if of_axes and len(settings) == 1 and names:
        return settings[names[0]]
    there = {name: value for name, value in settings.items() if value != ABSENT}
    return settings_text(there or dict(settings)) if settings else "all runs"


@functools.lru_cache(maxsize=4096)
def _flat(text: str) -> dict[str, Any]:
    return {name: value for name, value in flatten(json.loads(text)).items() if name not in FREE}


def _leaves(result: Result) -> dict[str, Any]:
    return _flat(json.dumps(result.experiment))


def changed_fields(results: Iterable[Result]) -> tuple[str, ...]:
    """Dotted names of the fields in which runs differ, except name and seed."""
    first, *rest = map(_leaves, results)
    changed: dict[str, None] = {}
    for other in rest:
        if other is not first:
            changed |= dict.fromkeys(n for n in {**first, **other} if first.get(n) != other.get(n))
    return tuple(changed)


def differing_fields(results: Sequence[Result]) -> tuple[str, ...]:
    """The differing fields to show: a stage or eval that only some runs have is one entry instead of all its fields.

    Its fields follow only if they differ between the runs that have it.
    """
    everything = list(dict.fromkeys(json.dumps(result.experiment) for result in results))
    within = [(leaves, {part_of(name) for name in leaves}) for leaves in map(_flat, everything)]
    found: dict[str, None] = {}
    for name in changed_fields(results):
        having = [leaves for leaves, parts in within if part_of(name) in parts]
        if len(having) < len(within):
            found[part_of(name)] = None
        if any(leaves.get(name) != having[0].get(name) for leaves in having):
            found[name] = None
    return tuple(found)


def field_text(leaves: Mapping[str, Any], name: str) -> str:
    """The value of a field as text; for a stage or an eval whether the run has it."""
    if name not in leaves and part_of(name) == name:
        return "present" if any(part_of(leaf) == name for leaf in leaves) else ABSENT
    return shown(leaves[name]) if name in leaves else ABSENT


def part_of(name: str) -> str:
    """Name of the stage, eval or other part of an experiment that a field belongs to."""
    return ".".join(name.split(".")[: 2 if name.startswith("evals.") else 1])


def _find_group(groups: Sequence[Group], name: str) -> Group:
    """Find a group by its label, or by the folder (or folder name) of one of its runs."""
    here = Path(name).resolve()
    for one in groups:
        if one.label == name:
            return one
    for one in groups:
        if any(result.folder.resolve() == here or result.folder.name == name for result in one.results):
            return one
    labels = [one.label for one in groups]
    raise UserError(
        f"baseline: no group or run is called {name!r}{nearest(name, labels)}; use one of {_few(labels, '; ')}, or NAME=VALUE"
    )


def _few(names: Sequence[str], between: str = ", ") -> str:
    """The first MOST_NAMED names, and the number of others."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{between.join(names[:MOST_NAMED])}{more}"


def _baseline(groups: Sequence[Group], wanted: Mapping[str, str]) -> Group:
    axes = list(dict.fromkeys(name for one in groups for name in one.settings))
    for name, value in wanted.items():
        if name not in axes:
            raise UserError(
                f"baseline: {name!r} does not differ between the runs{nearest(name, axes)}; these do: {_few(axes) or 'none'}"
            )
        values = list(dict.fromkeys(one.settings[name] for one in groups if name in one.settings))
        if value not in values:
            raise UserError(f"baseline: no run has {name} {value!r}{nearest(value, values)}; there are {_few(values)}")
    found = [one for one in groups if all(one.settings.get(n) == v for n, v in wanted.items())]
    if not found:
        raise UserError(f"baseline: no run has {settings_text(dict(wanted))}")
    return next((one for one in found if one.ended), found[0])


def _metrics(results: Sequence[Result], only: Sequence[str]) -> tuple[Metric, ...]:
    found: dict[Metric, None] = {}
    for result in results:
        for item in result.experiment["evals"]:
            if item["metric"] != "best_of_n":  # its result is a curve, which `lm report RUN RUN` draws
                found.setdefault(Metric(item["name"], main_field(item["metric"])))
    names = {metric.name for metric in found}
    for name in only:
        if name not in names:
            raise UserError(f"no run has an eval {name!r}{nearest(name, names)}; there are {', '.join(sorted(names))}")
    return tuple(metric for metric in found if not only or metric.name in only)


def _compared(groups: Sequence[Group], base: Group, metric: Metric, notes: list[str]) -> dict[tuple[str, Metric], Cell]:
    """Compare every group with the baseline in one metric, by the runs measured on the same data; appends to `notes`."""
    first = next(iter(_measured(base, metric)), None)
    own = first and measurement_setup(first[0], metric.name)
    of_base = dict[int, float]()
    cells: dict[str, Cell] = {}
    everything: list[float] = []
    for one in (base, *(other for other in groups if other is not base)):
        found = _measured(one, metric)
        setups = [measurement_setup(result, metric.name) for result, _ in found]
        same = [measured for measured, setup in zip(found, setups, strict=True) if setup == own]
        what = next((setup_difference(own, setup) for setup in setups if setup != own), "")
        if what:
            who = f"{len(found) - len(same)} of {len(found)} runs of {one.label} are" if same else f"{one.label} is"
            notes.append(
                f"{metric.label}: {who} not compared, since {'their' if same else 'its'} held-out data differ ({what})"
            )
        values = {result.seed: value for result, value in same or found}
        bests = [result.best(metric.name, metric.field) for result, _ in same or found]
        everything += values.values()
        cell = Cell(estimate(list(values.values())), estimate(list(filter(math.isfinite, bests))))
        if one is base:
            of_base = values
        elif what and not same:
            cell = dataclasses.replace(cell, excluded=what)
        else:
            cell = dataclasses.replace(cell, difference=paired(values, of_base))
        missing = len(one.ended) - len(found)
        if missing:
            notes.append(f"{metric.label}: missing in {missing} of {len(one.ended)} runs of {one.label}")
        cells[one.label] = cell
    if len(everything) > 1 and len(set(everything)) == 1:
        notes.append(
            f"{metric.label}: all equal ({everything[0]:.4g} in {len(everything)} runs), as at a floor or ceiling: the "
            "comparison has no power"
        )
    tested = [label for label, cell in cells.items() if cell.difference is not None]
    corrected = holm([cells[label].difference.p for label in tested])  # type: ignore[union-attr]
    for label, p in zip(tested, corrected, strict=True):
        cells[label] = dataclasses.replace(cells[label], corrected=p, comparisons=len(tested))
    return {(label, metric): cell for label, cell in cells.items()}


def _measured(one: Group, metric: Metric) -> list[tuple[Result, float]]:
    """The runs of a group that ended with a finite value of the metric, and that value."""
    found = [(result, result.final(metric.name, metric.field)) for result in one.ended]
    return [(result, value) for result, value in found if math.isfinite(value)]


def measurement_setup(result: Result, name: str) -> dict[str, Any] | None:
    """Everything that must be equal for two measurements to be comparable: the eval's fields and its data's content."""
    item = next((item for item in result.experiment["evals"] if item["name"] == name), None)
    if item is None:
        return None
    known = result.session.get("data_fingerprint", {})
    content = known.get(item["source"]["path"])
    left_out = ("name", "source.weight", *(("source.path",) if content else ()))  # equal files may have other places
    found = {key: value for key, value in flatten(item).items() if key not in left_out}
    if item["metric"] == "bits_per_byte":  # longer windows have more context
        found["model.max_len"] = result.experiment["model"]["max_len"]
    read = {f"{name} content": known[item[name]] for name in ("verifier", "environment") if item.get(name) in known}
    return found | read | {"content": content}


def setup_difference(own: dict[str, Any] | None, other: dict[str, Any] | None) -> str:
    """Description of the differences between two results of `measurement_setup`."""
    if own is None or other is None:
        return f"{'the baseline' if own is None else 'it'} has none"
    return ", ".join(
        f"{name} {own.get(name)} and {other.get(name)}" for name in own | other if own.get(name) != other.get(name)
    )


def conclusion(cell: Cell, metric: Metric, digits: int = 3) -> str:
    """The conclusion about a group against the baseline, as one sentence."""
    found = cell.difference
    if cell.excluded:
        return f"not compared: {cell.excluded}"
    if found is None:
        return "the baseline"
    if found.count == 0:
        return "no seed in common with the baseline" if cell.final.count else "no number to compare"
    if found.count == 1:
        return f"{found.mean:+.{digits}f} in the one common seed"
    if math.isnan(found.p):
        if found.mean == 0:
            return f"all equal to the baseline in {found.count} seeds: no spread, so no interval and no power"
        return f"{found.mean:+.{digits}f} in each of {found.count} seeds: no spread, so no interval and no p-value"
    interval = f"{found.mean:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    if cell.differs:
        return f"{interval}, {'better' if found.mean * better(metric.field) > 0 else 'worse'}"
    least = detectable(found.error, found.count, LEVEL / cell.comparisons)
    many = "" if found.low <= 0 <= found.high else f" after correction for {cell.comparisons} comparisons"
    return f"{interval}, no significant difference{many}; {least:.{digits}f} was detectable"
