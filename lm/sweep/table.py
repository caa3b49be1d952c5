"""Writes a comparison as tables on the terminal, or as CSV or Parquet with a row per run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet
from rich.console import Console
from rich.table import Table

from lm.experiment import UserError
from lm.sweep.compare import Comparison, Metric, conclusion, part_of
from lm.sweep.results import Result
from lm.sweep.statistics import Estimate
from lm.sweep.trials import digest

MOST_FIELDS = 12
DIGITS = 4  # significant digits


def show(comparison: Comparison, console: Console) -> None:
    """Print the differing fields, the baseline, a table for each metric, and the notes."""
    for line in (differences(comparison), baseline(comparison)):
        console.print(line, highlight=False, soft_wrap=True)
    for metric in comparison.metrics:
        console.print(_table(comparison, metric))
    for note in comparison.notes:
        console.print(note, highlight=False)


def differences(comparison: Comparison) -> str:
    """A line with the differing fields; if there are many, their number in each part of the experiment."""
    names = comparison.changed
    if not names:
        return "What differs: nothing but the seed"
    if len(names) <= MOST_FIELDS:
        return f"What differs: {', '.join(names)}"
    parts = Counter(map(part_of, names)).most_common()
    some = ", ".join(f"{part} ({count})" for part, count in parts[:MOST_FIELDS])
    more = f" and {len(parts) - MOST_FIELDS} more" if len(parts) > MOST_FIELDS else ""
    return f"What differs: {len(names)} fields, in {some}{more}; runs are labelled by folder, and the page lists the fields"


def baseline(comparison: Comparison) -> str:
    """A line with the baseline, the reason for it, and the option that changes it."""
    why = f" ({comparison.why_baseline})" if comparison.why_baseline else ""
    return f"Baseline: {comparison.baseline.label}{why}; --baseline NAME chooses another"


def _table(comparison: Comparison, metric: Metric) -> Table:
    table = Table(title=metric.label, title_justify="left", box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    for name in ("seeds", "last", "best", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("against the baseline", overflow="fold")
    for group in comparison.groups:
        cell = comparison.cells[group.label, metric]
        note = f" ({group.note})" if group.note else ""
        p = "" if math.isnan(cell.corrected) else f"{cell.corrected:.2g}"
        said = conclusion(cell, metric)
        table.add_row(group.label + note, str(cell.final.count), number(cell.final), number(cell.best), p, said)
    return table


def number(found: Estimate) -> str:
    """An estimate as text, `1.234 ± 0.012`; without an interval for one seed, – for none."""
    if not found.count:
        return "–"
    if math.isnan(found.half):
        return f"{found.mean:.{DIGITS}g}"
    if found.half == 0:
        return f"{found.mean:.{DIGITS}g} (all equal)"
    return f"{found.mean:.{DIGITS}g} ± {found.half:.2g}"


def rows(comparison: Comparison) -> list[dict[str, Any]]:
    """A row for every run: group, seed, settings, results, and origin."""
    return [_row(result, group.label, comparison.metrics) for group in comparison.groups for result in group.results]


def _row(result: Result, label: str, metrics: Iterable[Metric]) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    for metric in metrics:
        name = f"{metric.name}.{metric.field}"
        numbers |= {
            name: result.final(metric.name, metric.field),
            f"{name}.best": result.best(metric.name, metric.field),
        }
    return {"group": label, "seed": result.seed, **result.settings, **numbers, **origin(result)}


def origin(result: Result) -> dict[str, Any]:
    """Origin of a run's numbers: state, folder, experiment, commit, data, versions, device, start."""
    session = result.session
    git, state = session.get("git") or {}, "finished" if result.finished else "not finished"
    return {
        "state": f"failed: {result.failed}" if result.failed else "ended early" if result.pruned else state,
        "folder": str(result.folder),
        "experiment": digest({k: v for k, v in result.experiment.items() if k != "name"}),
        "commit": git.get("commit"),
        "changed": bool(git.get("dirty")),
        "data": digest(session.get("data_fingerprint", {})),
        "versions": ", ".join(f"{name} {version}" for name, version in session.get("versions", {}).items()),
        "device": session.get("devices", {}).get("kind"),
        "started": session.get("started"),
    }


WRITERS = {".csv": pyarrow.csv.write_csv, ".parquet": pyarrow.parquet.write_table}


def write(comparison: Comparison, path: Path) -> Path:
    """Write a row for every run to a .csv or .parquet file. Raises UserError for another suffix."""
    if path.suffix not in WRITERS:
        raise UserError(f"{path} should end in {' or '.join(WRITERS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    WRITERS[path.suffix](pyarrow.Table.from_pylist(rows(comparison)), path)
    return path
