"""Text of a sweep's dry run: its trials and their estimated cost."""

from __future__ import annotations

import dataclasses

from lm.sweep.cost import Cost, TrialRow, estimate, total
from lm.sweep.folder import SweepFolder
from lm.sweep.sweep import Suggested, Sweep
from lm.sweep.trials import settings_text

MOST_ROWS = 60
UNITS = ("B", "kB", "MB", "GB", "TB")


def dry_run(sweep: Sweep, folder: SweepFolder, topology: str | None) -> str:
    """A line for every trial with its cost (without stages it shares), and the total. Raises UserError for an invalid sweep."""
    rows, speed = estimate(sweep, folder, topology)
    lines = [_line(row) for row in rows]
    if len(lines) > MOST_ROWS:
        lines[MOST_ROWS:] = [f"… and {len(lines) - MOST_ROWS} more"]
    whole = total([row.cost for row in rows])
    if isinstance(sweep.search, Suggested):
        each = dataclasses.replace(whole, seconds=0.0, remaining=whole.remaining + whole.seconds)
        lines.append(
            f"the search runs {sweep.search.trials} such settings (stages that no axis changes are trained once): "
            f"at most {_cost(each.times(sweep.search.trials))}; time {speed.source}"
        )
    else:
        impossible = sum(bool(row.trial.impossible) for row in rows)
        which = f"{len(rows)} trials" + (f", {impossible} of which cannot run" if impossible else "")
        lines.append(f"{which}: {_cost(whole)} for one worker; time {speed.source}")
    return "\n".join(lines)


def _line(row: TrialRow) -> str:
    name = f"{settings_text(row.trial.settings)}, seed {row.trial.experiment.seed}"
    if row.trial.impossible:
        return f"{name}: cannot run: {row.trial.impossible}"
    return f"{name}: {_cost(row.cost)}" + (f"; shares {', '.join(row.shared)} with trials above" if row.shared else "")


def _cost(cost: Cost) -> str:
    """A cost as text: FLOPs of training and of the rest, device-hours and time where known, bytes."""
    parts = [f"{cost.flops:.2g} FLOPs of training", f"{cost.other_flops:.2g} of evals and samples"]
    if cost.hours is not None:
        parts.append(f"{cost.hours:.2g} device-hours")
    if cost.seconds:
        parts.append(f"done in {_duration(cost.seconds)}")
    if cost.remaining:
        parts.append(f"about {_duration(cost.remaining)}{' more' if cost.seconds else ''}")
    parts.append(f"{size(cost.bytes)} of checkpoints")
    return ", ".join(parts)


def size(count: float) -> str:
    """A number of bytes with its unit, to two significant digits."""
    unit = 0
    while count >= 1000 and unit < len(UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.2g} {UNITS[unit]}" if count < 100 else f"{count:.0f} {UNITS[unit]}"


def _duration(seconds: float) -> str:
    """A rough duration: 40 s, 12 min, 3.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.2g} h"
