"""What a sweep costs before it runs: each stage once, however many trials share it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lm.algorithms.table import algorithm_of, flops_per_token
from lm.experiment import Experiment, Stage, rows_per_update, updates_per_step
from lm.model.flops import forward_flops_per_token, layer_matrices, layer_vectors
from lm.plan.advise import plan_stage
from lm.plan.chips import parse_topology
from lm.stored import read_record
from lm.sweep.folder import SweepFolder
from lm.sweep.shared import stage_keys
from lm.sweep.sweep import Range, Suggested, Sweep
from lm.sweep.trials import Trial, own_point, trial_at, trials

START_SECONDS = 20.0  # of a stage: a process, its imports, reading data, compilation
USED = 0.2  # of the speed of a large matrix product, by a training step
TIMED = 768  # rows and columns of the matrices that are timed
TIMED_SECONDS = 0.2
MOST_TRIED = 200  # corners of a search's axes, for one that can run
BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Cost:
    """What stages cost, summed.

    Args:
        flops: of the training.
        other_flops: of evaluations and of answers that are sampled, at most.
        bytes: of checkpoints, when the stages are finished, by what is kept of them.
        hours: of all devices of a topology.
        seconds: measured before, of stages that are finished.
        ahead: seconds that the other stages will take, about.
    """

    flops: float = 0.0
    other_flops: float = 0.0
    bytes: float = 0.0
    hours: float | None = None
    seconds: float = 0.0
    ahead: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        def summed(name: str) -> float | None:
            ours, theirs = getattr(self, name), getattr(other, name)
            return None if ours is None or theirs is None else ours + theirs

        return Cost(**{field.name: summed(field.name) for field in dataclasses.fields(self)})  # type: ignore[arg-type]

    def times(self, count: int) -> Cost:
        return total([self] * count)


@dataclass(frozen=True)
class Speed:
    """FLOPs a second, seconds of a stage beside them, and in words where both are from."""

    flops: float
    start: float
    source: str


@dataclass(frozen=True)
class TrialRow:
    """A trial, what it costs beyond the trials before it, and the stages that it has from them."""

    trial: Trial
    cost: Cost
    has: tuple[str, ...]


def estimate(sweep: Sweep, folder: SweepFolder, topology: str | None) -> tuple[list[TrialRow], Speed]:
    """Every trial of a grid with its cost; of a search one trial for each seed, which stands for all that come.

    Args:
        topology: of TPUs, as `lm plan` takes it; None: no hours.

    Raises:
        UserError: the sweep cannot work, or the experiment does not fit the topology.
    """
    known: set[str] = set()
    found: list[tuple[Trial, list[Cost], tuple[str, ...]]] = []
    for trial in map(folder.placed, representatives(sweep)):
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
    """By the stages that are finished; else by a matrix product of this machine."""
    done = [cost for cost in costs if cost.seconds]
    if done:
        whole = sum((cost.flops + cost.other_flops) / cost.seconds for cost in done) / len(done)
        if whole:
            return Speed(whole, 0.0, f"by the {len(done)} stages that are finished")
    a = np.ones((TIMED, TIMED), np.float32)
    a @ a  # the first one wakes threads
    count, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < TIMED_SECONDS:
        a @ a
        count += 1
    return Speed(
        USED * count * 2 * TIMED**3 / passed,
        START_SECONDS,
        f"by a matrix product on this machine's CPU, of whose speed {USED:.0%} are counted on, and {START_SECONDS:.0f} s to "
        "start a stage; better known when a stage is finished",
    )


def _timed(cost: Cost, speed: Speed) -> Cost:
    seconds = speed.start + (cost.flops + cost.other_flops) / speed.flops
    return dataclasses.replace(cost, ahead=0.0 if cost.seconds else seconds)


def representatives(sweep: Sweep) -> list[Trial]:
    """The trials of a grid; of a search the first setting that can run, with every seed."""
    if not isinstance(sweep.search, Suggested):
        return trials(sweep)
    ends = [(v.low, v.high) if isinstance(v, Range) else range(len(v)) for v in sweep.axes.values()]
    corners = (dict(zip(sweep.axes, corner, strict=True)) for corner in itertools.product(*ends))
    own = own_point(sweep)
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
        (read_record(path, {}, {"seconds": (int, float)}).get("seconds", 0.0) for path in summaries if path.is_file()),
        0.0,
    )
    hours = None if topology is None else _hours(experiment, stage.name, topology)
    other = evaluation_flops(experiment, stage) + sampling_flops(experiment, stage)
    return Cost(flops(experiment, index), other, checkpoint_bytes(experiment, stage), hours, measured)


def flops(experiment: Experiment, index: int) -> float:
    """Of a stage's updates: rows · tokens · operations a token. Nothing for a stage that trains nothing."""
    stage = experiment.stages[index]
    if not stage.objective.trains:
        return 0.0
    per_token = flops_per_token(stage, experiment.model, experiment.tokenizer.vocab_size)
    return stage.steps * updates_per_step(stage) * rows_per_update(stage) * stage.seq_len * per_token


def evaluation_flops(experiment: Experiment, stage: Stage) -> float:
    """At most, of the evals before, during and after a stage: every row as long as the model reads."""
    during = stage.steps // stage.eval_every if stage.eval_every else 0
    rows = 0
    for item in experiment.evals:
        each = {"pair_accuracy": 2, "best_of_n": item.best_of, "pass_at_k": item.best_of}.get(item.metric, 1)
        rows += item.count * each * (2 + (during if item.name in stage.evals else 0))
    rows += len(experiment.prompts) * (2 + during)
    return rows * experiment.model.max_len * _forward(experiment, experiment.model.max_len)


def sampling_flops(experiment: Experiment, stage: Stage) -> float:
    """At most, of the completions that a stage samples: every row as long as its own."""
    o = stage.objective
    if not o.samples:
        return 0.0
    rows = stage.steps * stage.batch_size * o.completions_per_prompt * o.max_rollouts
    return rows * stage.seq_len * _forward(experiment, stage.seq_len)


def _forward(experiment: Experiment, length: int) -> float:
    return forward_flops_per_token(experiment.model, experiment.tokenizer.vocab_size, length)


def parameters(experiment: Experiment) -> int:
    """Of a language model of the experiment."""
    m = experiment.model
    vocabulary = experiment.tokenizer.vocab_size * m.embed_dim * (1 if m.tied_head else 2)
    return m.num_layers * (layer_matrices(m) + layer_vectors(m)) + vocabulary + m.embed_dim


def checkpoint_bytes(experiment: Experiment, stage: Stage) -> float:
    """Of the checkpoints that are kept when the stage is finished; of muon's matrices one moment too many is counted."""
    if not stage.objective.trains:
        return 0.0
    kind = experiment.model.param_dtype
    model = parameters(experiment) * BYTES[kind]
    masters = 4 if kind != "float32" and stage.optimizer.master_weights else 0
    moments = parameters(experiment) * (2 * BYTES[stage.optimizer.state_dtype] + masters)
    models = sum(algorithm_of(stage).trained_model_counts(stage.objective))  # of PPO a critic of its own, too
    for_good = stage.steps // stage.keep_every if stage.keep_every else 0
    newest = min(stage.keep_last, math.ceil(stage.steps / stage.save_every))
    if not stage.keep_moments:
        return (1 + for_good) * model
    return (
        (newest + max(0, for_good - (newest if stage.keep_every == stage.save_every else 0)))
        * models
        * (model + moments)
    )


def _hours(experiment: Experiment, name: str, topology: str) -> float:
    """Device-hours of a stage by `lm plan`'s arithmetic, with as much sampling as there can be."""
    plan = plan_stage(experiment, name, parse_topology(topology, experiment.mesh.slices))
    stage = plan.program.stage
    sampling = plan.sampling
    sampled = sampling.rollouts * sampling.rollout_s + sampling.trainer_s if sampling else 0.0
    seconds = stage.steps * (updates_per_step(stage) * plan.step_s + sampled)
    return seconds * plan.program.topology.devices / 3600
