"""A sweep for the terminal: its trials, and what they cost, before they run."""

from __future__ import annotations

from lm.sweep.cost import Cost, estimate, total
from lm.sweep.folder import SweepFolder
from lm.sweep.sweep import Suggested, Sweep
from lm.sweep.trials import told

MOST_ROWS = 60


def dry_run(sweep: Sweep, folder: SweepFolder, topology: str | None) -> str:
    """Every trial with its cost beyond what it shares, and the sum. Raises UserError where the sweep cannot work."""
    rows = estimate(sweep, folder, topology)
    lines = [
        f"{told(row.trial.settings)}, seed {row.trial.experiment.seed}: {_cost(row.cost)}"
        + (f"; has {', '.join(row.has)} from above" if row.has else "")
        for row in rows
    ]
    if len(lines) > MOST_ROWS:
        lines[MOST_ROWS:] = [f"… and {len(lines) - MOST_ROWS} more"]
    if isinstance(sweep.search, Suggested):
        lines.append(
            f"of such settings there will be {sweep.search.trials}, of which those stages are trained once that no axis changes"
        )
    else:
        lines.append(f"{len(rows)} trials: {_cost(total([row.cost for row in rows]))}")
    return "\n".join(lines)


def _cost(cost: Cost) -> str:
    """As far as it is known: training FLOPs, hours of the devices, seconds that it has taken."""
    parts = [f"{cost.flops:.2g} FLOPs of training"]
    if cost.hours is not None:
        parts.append(f"{cost.hours:.2g} device-hours")
    if cost.seconds:
        parts.append(f"done in {cost.seconds:.0f} s")
    return ", ".join(parts)
