"""What a sweep costs before it runs: each stage once, however many trials share it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lm.experiment import Collect, Experiment, rows_per_update, updates_per_step
from lm.model.flops import update_flops_per_token
from lm.plan.advise import plan_stage
from lm.plan.chips import parse_topology
from lm.steps import forward_only, trained
from lm.sweep.folder import SweepFolder
from lm.sweep.shared import stage_keys
from lm.sweep.sweep import Suggested, Sweep
from lm.sweep.trials import Trial, own_point, trial_at, trials
from lm.train.run_folder import read_json


@dataclass(frozen=True)
class Cost:
    """FLOPs of the training (sampling is not among them); hours of all devices of a topology; seconds measured before."""

    flops: float
    hours: float | None = None
    seconds: float | None = None

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            None if self.hours is None or other.hours is None else self.hours + other.hours,
            None if self.seconds is None or other.seconds is None else self.seconds + other.seconds,
        )


@dataclass(frozen=True)
class Row:
    """A trial, what it costs beyond the trials before it, and the stages that it has from them."""

    trial: Trial
    cost: Cost
    has: tuple[str, ...]


def estimate(sweep: Sweep, folder: SweepFolder, topology: str | None) -> list[Row]:
    """Every trial of a grid with its cost; of a search one trial for each seed, which stands for all that come.

    Args:
        topology: of TPUs, as `lm plan` takes it; None: no hours.

    Raises:
        UserError: the sweep cannot work, or the experiment does not fit the topology.
    """
    known: set[str] = set()
    rows = []
    for trial in representatives(sweep):
        new, had = Cost(0.0, None if topology is None else 0.0, 0.0), []
        for index, key in enumerate(stage_keys(trial.experiment)):
            if key in known:
                had.append(trial.experiment.stages[index].name)
                continue
            known.add(key)
            new += _stage(trial, index, folder.shared(key), folder.trial(trial.key), topology)
        rows.append(Row(trial, new, tuple(had)))
    return rows


def representatives(sweep: Sweep) -> list[Trial]:
    """The trials of a grid; of a search the first setting, with every seed."""
    if not isinstance(sweep.search, Suggested):
        return trials(sweep)
    point = own_point(sweep) or {name: getattr(values, "low", 0) for name, values in sweep.axes.items()}
    return [trial for seed in sweep.seeds if (trial := trial_at(sweep, point, seed)) is not None]


def total(costs: Iterable[Cost]) -> Cost:
    first, *rest = costs
    return sum(rest, first)


def _stage(trial: Trial, index: int, shared: Path, run_dir: Path, topology: str | None) -> Cost:
    experiment = trial.experiment
    stage = experiment.stages[index]
    summaries = [shared / "summary.json", run_dir / "stages" / stage.name / "summary.json"]
    measured = next((read_json(path)["seconds"] for path in summaries if path.is_file()), None)
    hours = None if topology is None else _hours(experiment, stage.name, topology)
    return Cost(flops(experiment, index), hours, measured)


def flops(experiment: Experiment, index: int) -> float:
    """Of a stage's updates: rows · tokens · operations a token. Nothing for a stage that trains nothing."""
    stage = experiment.stages[index]
    if isinstance(stage.objective, Collect):
        return 0.0
    per_token = update_flops_per_token(
        experiment.model, experiment.tokenizer.vocab_size, stage.seq_len, forward_only(stage), *trained(stage)
    )
    return stage.steps * updates_per_step(stage) * rows_per_update(stage) * stage.seq_len * per_token


def _hours(experiment: Experiment, name: str, topology: str) -> float:
    """Device-hours of a stage by `lm plan`'s arithmetic, with as much sampling as there can be."""
    plan = plan_stage(experiment, name, parse_topology(topology, experiment.mesh.slices))
    stage = plan.program.stage
    sampled = plan.sampling.rollouts * plan.sampling.rollout_s if plan.sampling else 0.0
    seconds = stage.steps * (updates_per_step(stage) * plan.step_s + sampled)
    return seconds * plan.program.topology.devices / 3600
