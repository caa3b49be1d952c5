"""Cost of a sweep, estimated before it runs: FLOPs, time and bytes, counting each shared stage once."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lm.algorithms.state import abstract_state, flops_per_token
from lm.experiment import Experiment, Model, Optimizer, Stage, rows_per_update, updates_per_step
from lm.model.flops import forward_flops_per_token
from lm.optimizer import make_optimizer
from lm.plan.advise import plan_stage
from lm.plan.chips import parse_topology
from lm.shapes import is_number
from lm.stored import read_record
from lm.sweep.folder import SweepFolder
from lm.sweep.shared import stage_keys
from lm.sweep.sweep import Range, Suggested, Sweep
from lm.sweep.trials import Trial, base_point, trial_at, trials
from lm.train.loop import PRODUCED, checkpoint_items, untrained
from lm.train.named_arrays import named_leaves

START_SECONDS = 20.0  # time to start a stage: process, imports, reading data, compilation
STEP_EFFICIENCY = 0.2  # speed of a training step as a fraction of that of a large matrix product
TIMED_SIZE = 768  # rows and columns of the timed matrices
TIMED_SECONDS = 0.2
MOST_TRIED = 200  # points of a search's axes that are tried to find one that can run


@dataclass(frozen=True)
class Cost:
    """Cost of one or more stages.

    Args:
        flops: FLOPs of training.
        other_flops: FLOPs of evaluations and sampling, an upper bound.
        bytes: size of the checkpoints that are kept after the stages finished.
        hours: device-hours on a TPU topology; None without one.
        seconds: measured seconds of finished stages.
        remaining: estimated seconds of the other stages.
    """

    flops: float = 0.0
    other_flops: float = 0.0
    bytes: float = 0.0
    hours: float | None = None
    seconds: float = 0.0
    remaining: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        def summed(name: str) -> float | None:
            ours, theirs = getattr(self, name), getattr(other, name)
            return None if ours is None or theirs is None else ours + theirs

        return Cost(**{field.name: summed(field.name) for field in dataclasses.fields(self)})  # type: ignore[arg-type]

    def times(self, count: int) -> Cost:
        return total([self] * count)


@dataclass(frozen=True)
class Speed:
    """Speed of training: FLOPs per second, seconds to start a stage, and a description of how both were found."""

    flops: float
    start: float
    source: str


@dataclass(frozen=True)
class TrialRow:
    """A trial, its cost without the stages it shares with earlier trials, and the names of those stages (`shared`)."""

    trial: Trial
    cost: Cost
    shared: tuple[str, ...]


def estimate(sweep: Sweep, folder: SweepFolder, topology: str | None) -> tuple[list[TrialRow], Speed]:
    """Estimate the cost of every trial of a grid; of a search, of one representative trial per seed.

    Args:
        topology: TPUs, as for `lm plan`; None: no device-hours.

    Raises:
        UserError: the sweep is invalid, or the experiment does not fit the topology.
    """
    known: set[str] = set()
    found: list[tuple[Trial, list[Cost], tuple[str, ...]]] = []
    for trial in map(folder.with_existing_key, representatives(sweep)):
        new, had = list[Cost](), list[str]()
        for index, key in enumerate([] if trial.impossible else stage_keys(trial.experiment)):
            if key in known:
                had.append(trial.experiment.stages[index].name)
                continue
            known.add(key)
            new.append(_stage(trial, index, folder.shared(key), folder.trial(trial.key), topology))
        found.append((trial, new, tuple(had)))
    speed = _speed([cost for _, costs, _ in found for cost in costs])
    nothing = Cost(hours=None if topology is None else 0.0)
    return [TrialRow(trial, sum((_timed(c, speed) for c in costs), nothing), had) for trial, costs, had in found], speed


def _speed(costs: Iterable[Cost]) -> Speed:
    """Speed from the finished stages, else from a timed matrix product on this machine's CPU."""
    done = [cost for cost in costs if cost.seconds]
    if done:
        whole = sum((cost.flops + cost.other_flops) / cost.seconds for cost in done) / len(done)
        if whole:
            return Speed(whole, 0.0, f"estimated from {len(done)} finished stages")
    a = np.ones((TIMED_SIZE, TIMED_SIZE), np.float32)
    a @ a  # warm-up
    count, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < TIMED_SECONDS:
        a @ a
        count += 1
    return Speed(
        STEP_EFFICIENCY * count * 2 * TIMED_SIZE**3 / passed,
        START_SECONDS,
        f"estimated from {STEP_EFFICIENCY:.0%} of the speed of a matrix product on this machine's CPU, and {START_SECONDS:.0f} s to "
        "start a stage; a finished stage gives a better estimate",
    )


def _timed(cost: Cost, speed: Speed) -> Cost:
    seconds = speed.start + (cost.flops + cost.other_flops) / speed.flops
    return dataclasses.replace(cost, remaining=0.0 if cost.seconds else seconds)


def representatives(sweep: Sweep) -> list[Trial]:
    """The trials whose cost is estimated: all of a grid; of a search the first setting that can run, with every seed."""
    if not isinstance(sweep.search, Suggested):
        return trials(sweep)
    ends = [(v.low, v.high) if isinstance(v, Range) else range(len(v)) for v in sweep.axes.values()]
    corners = (dict(zip(sweep.axes, corner, strict=True)) for corner in itertools.product(*ends))
    own = base_point(sweep)
    points = itertools.chain([own] if own else [], itertools.islice(corners, MOST_TRIED))
    first: list[Trial] = []
    for point in points:
        found = [trial for seed in sweep.seeds if (trial := trial_at(sweep, point, seed)) is not None]
        if found and not any(trial.impossible for trial in found):
            return found
        first = first or found
    return first


def total(costs: Iterable[Cost]) -> Cost:
    first, *rest = costs
    return sum(rest, first)


def _stage(trial: Trial, index: int, shared: Path, run_dir: Path, topology: str | None) -> Cost:
    experiment = trial.experiment
    stage = experiment.stages[index]
    summaries = [shared / "summary.json", run_dir / "stages" / stage.name / "summary.json"]
    measured = next(
        (read_record(path, {"seconds?": is_number}).get("seconds", 0.0) for path in summaries if path.is_file()),
        0.0,
    )
    hours = None if topology is None else _hours(experiment, stage.name, topology)
    other = evaluation_flops(experiment, stage) + sampling_flops(experiment, stage)
    return Cost(flops(experiment, index), other, checkpoint_bytes(experiment, stage), hours, measured)


def flops(experiment: Experiment, index: int) -> float:
    """Training FLOPs of a stage: updates · rows · tokens per row · FLOPs per token; 0 for a stage that does not train."""
    stage = experiment.stages[index]
    if not stage.objective.trains:
        return 0.0
    per_token, *_ = _shape_costs(experiment, stage)
    return stage.steps * updates_per_step(stage) * rows_per_update(stage) * stage.seq_len * per_token


# Rows read for an example; of choices the usual number, of `core`, whose count is that of each task, with the 22 usual tasks.
ROWS_OF_METRIC = {"pair_accuracy": 2, "choice_accuracy": 4, "core": 66}


def evaluation_flops(experiment: Experiment, stage: Stage) -> float:
    """Upper bound of the FLOPs of evals before, during and after a stage, with every row of length `max_len`."""
    during = stage.steps // stage.eval_every if stage.eval_every else 0
    rows = 0
    for item in experiment.evals:
        each = ROWS_OF_METRIC.get(item.metric, item.best_of if item.metric in ("best_of_n", "pass_at_k") else 1)
        rows += item.count * each * (2 + (during if item.name in stage.evals else 0))
    rows += len(experiment.prompts) * (2 + during)
    return rows * experiment.model.max_len * _forward(experiment, experiment.model.max_len)


def sampling_flops(experiment: Experiment, stage: Stage) -> float:
    """Upper bound of the FLOPs of a stage's sampling, with every row of length `seq_len`."""
    o = stage.objective
    if not o.samples:
        return 0.0
    rows = stage.steps * stage.batch_size * o.completions_per_prompt * o.max_rollouts
    return rows * stage.seq_len * _forward(experiment, stage.seq_len)


def _forward(experiment: Experiment, length: int) -> float:
    return forward_flops_per_token(experiment.model, experiment.tokenizer.vocab_size, length)


def checkpoint_bytes(experiment: Experiment, stage: Stage) -> float:
    """Size in bytes of the checkpoints kept after a stage finished; parameters that it does not train count once."""
    if not stage.objective.trains:
        return 0.0
    _, model, whole, once = _shape_costs(experiment, stage)
    for_good = stage.steps // stage.keep_every if stage.keep_every else 0
    newest = min(stage.keep_last, math.ceil(stage.steps / stage.save_every))
    if not stage.keep_moments:
        return once + (1 + for_good) * model
    return once + (newest + max(0, for_good - (newest if stage.keep_every == stage.save_every else 0))) * whole


def _shape_costs(experiment: Experiment, stage: Stage) -> tuple[float, int, int, int]:
    """Shape-dependent costs of a stage that trains: FLOPs per token of an update, and bytes on disk.

    The bytes: of a checkpoint's trained models, of all of a checkpoint, and of what is stored once for all of them.

    Cached, so that trials that differ in numbers only, such as a learning rate, share the computation.
    """
    o = stage.optimizer
    optimizer = Optimizer(kind=o.kind, state_dtype=o.state_dtype, master_weights=o.master_weights)
    alike = Stage(
        stage.name, stage.objective, (), optimizer, seq_len=stage.seq_len, trainable=stage.trainable, lora=stage.lora
    )
    return _cached_costs(alike, experiment.model, experiment.tokenizer.vocab_size)


@functools.cache
def _cached_costs(stage: Stage, model: Model, vocab_size: int) -> tuple[float, int, int, int]:
    state = abstract_state(stage, make_optimizer(stage.optimizer, 1), model, vocab_size)
    apart = untrained(stage, state.models)
    sizes = {
        f"{item}/{name}": leaf.size * leaf.dtype.itemsize
        for item, tree in checkpoint_items(state).items()
        for name, leaf in named_leaves(tree).items()
    }
    once = sum(sizes.pop(name) for name in apart)
    produced = sum(size for name, size in sizes.items() if name.split("/")[0] in PRODUCED)
    return flops_per_token(stage, model, vocab_size), produced, sum(sizes.values()), once


def _hours(experiment: Experiment, name: str, topology: str) -> float:
    """Device-hours of a stage by the arithmetic of `lm plan`, with completions of maximal length."""
    plan = plan_stage(experiment, name, parse_topology(topology, experiment.mesh.slices))
    return plan.program.stage.steps * plan.step_s * plan.program.topology.devices / 3600
