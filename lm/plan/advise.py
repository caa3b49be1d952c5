"""Advice from the plan: the largest batch that fits, and changes that make a stage fit, each of them tried."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lm.experiment import Experiment, Stage, UserError, rows_per_example, rows_per_update
from lm.model.transformer import REMAT
from lm.overrides import override
from lm.parallel.rules import ways
from lm.plan.chips import Topology, parse_topology
from lm.plan.plan import Plan, by_arithmetic
from lm.plan.program import resolve

MOST_ROWS = 4096  # rows per device that are tried at most
TRIES = 6
ENOUGH = 3  # number of ways to fit from which pairs of changes are not tried
CLOSE = 50  # the search for the largest batch stops within 1/CLOSE of it


@dataclass(frozen=True)
class Change:
    """A change of the configuration as command-line words, and the plan with it."""

    words: tuple[str, ...]
    plan: Plan
    rank: int  # 0: the same training on the same devices; 1: more devices; 2: a smaller batch


@functools.lru_cache(maxsize=256)
def plan_stage(experiment: Experiment, name: str, topology: Topology) -> Plan:
    """Plan a stage by arithmetic (cached).

    Raises:
        UserError: the mesh does not fit the topology, the model or the batch.
    """
    return by_arithmetic(resolve(experiment, stage_of(experiment, name), topology))


def with_mesh(experiment: Experiment, plan: Plan) -> Experiment:
    """The experiment with the mesh of a plan."""
    return dataclasses.replace(experiment, mesh=plan.program.mesh)


def stage_of(experiment: Experiment, name: str) -> Stage:
    return next(stage for stage in experiment.stages if stage.name == name)


def largest_batch(plan: Plan, experiment: Experiment) -> int | None:
    """The largest `batch_size` that fits with everything else unchanged; None if not even the smallest fits."""
    program = plan.program
    unit = _batch_unit(program.stage, ways("batch", program.sizes))
    rows = rows_per_update(dataclasses.replace(program.stage, batch_size=unit)) // ways("batch", program.sizes)
    most = max(1, MOST_ROWS // rows)

    def used(count: int) -> int:
        return plan_stage(
            _with_batch(experiment, program.stage, unit * count), program.stage.name, program.topology
        ).bytes

    low, high, memory = 1, most + 1, {1: used(1), 2: used(2)}
    if memory[1] > plan.limit:
        return None
    # Memory is nearly linear in the batch size: the line through two known points gives the next guess.
    for _ in range(TRIES):
        (a, at_a), (b, at_b) = sorted(memory.items())[-2:]
        guess = a + int((plan.limit - at_a) * (b - a) / max(1, at_b - at_a))
        guess = min(max(guess, low + 1), high - 1)
        if guess <= low:
            break
        memory[guess] = used(guess)
        low, high = (guess, high) if memory[guess] <= plan.limit else (low, guess)
        if (high - low) * CLOSE <= low:
            break
    return unit * low


def _batch_unit(stage: Stage, devices: int) -> int:
    """The smallest batch size that gives every device the same number of whole rows in every microbatch."""
    for size in itertools.count(1):
        one = dataclasses.replace(stage, batch_size=size)
        rows, pieces = rows_per_update(one), stage.microbatches
        if rows and rows % (devices * pieces) == 0 and rows % (rows_per_example(one) * pieces) == 0:
            return size
    raise AssertionError


def _with_batch(experiment: Experiment, stage: Stage, size: int) -> Experiment:
    return override(experiment, [f"--{stage.name}.batch_size", str(size)])


def ways_to_fit(plan: Plan, experiment: Experiment, largest: int | None) -> list[Change]:
    """Changes that make the stage fit, best first: single ones, and pairs if fewer than ENOUGH single ones do.

    Ranked by cost: first changes that leave the training the same, by speed; then more devices; then a smaller batch.

    Args:
        largest: the largest batch size that fits without changes.
    """
    policies = [("--model.remat", policy) for policy in REMAT if policy != plan.program.model.remat]
    meshes = list(_meshes(plan))
    found = [*_tried(plan, experiment, [*policies, *meshes]), *_in_pieces(plan, experiment, ())]
    if len(found) < ENOUGH:
        found += [change for policy in policies for change in _in_pieces(plan, experiment, policy)]
    if len(found) < ENOUGH:
        found += _tried(plan, experiment, [(*policy, *mesh) for policy in policies for mesh in meshes])
    found += _larger(plan, experiment)
    if largest and largest < plan.program.stage.batch_size:
        words = (f"--{plan.program.stage.name}.batch_size", str(largest))
        smaller = plan_stage(override(experiment, list(words)), plan.program.stage.name, plan.program.topology)
        found.append(Change(words, smaller, 2))
    return sorted(found, key=lambda change: (change.rank, len(change.words), -change.plan.tokens_per_s))


def _meshes(plan: Plan) -> Iterator[tuple[str, ...]]:
    """Meshes that split the state or batch over more devices, as overrides."""
    sizes = plan.program.sizes
    if sizes["data"] > 1:
        yield ("--mesh.data", "1", "--mesh.fsdp", "-1")
    for axis in ("tensor", "context"):
        for size in (2, 4, 8):
            if size > sizes[axis]:
                yield (f"--mesh.{axis}", str(size), "--mesh.data", "1", "--mesh.fsdp", "-1")


def _in_pieces(plan: Plan, experiment: Experiment, words: tuple[str, ...]) -> Iterator[Change]:
    """The smallest number of microbatches with which the stage fits, combined with other changes (`words`)."""
    program, name = plan.program, plan.program.stage.name
    whole = plan_stage(override(experiment, list(words)), name, program.topology) if words else plan
    rows, pieces = program.rows // ways("batch", program.sizes), program.stage.microbatches
    # Memory other than the state is nearly proportional to the size of a microbatch.
    shrinking, room = whole.bytes - whole.memory.state, max(1, plan.limit - whole.memory.state)
    while pieces * room < shrinking * program.stage.microbatches or pieces == program.stage.microbatches:
        pieces *= 2
    while rows % pieces == 0:
        change = next(_tried(plan, experiment, [(*words, f"--{name}.microbatches", str(pieces))]), None)
        if change:
            yield change
            return
        pieces *= 2


def _tried(plan: Plan, experiment: Experiment, changes: Iterable[tuple[str, ...]]) -> Iterator[Change]:
    """The changes that fit."""
    for words in changes:
        try:
            changed = plan_stage(override(experiment, list(words)), plan.program.stage.name, plan.program.topology)
        except UserError:  # the change does not divide the heads, the rows, …
            continue
        if changed.fits:
            yield Change(words, changed, 0)


def _larger(plan: Plan, experiment: Experiment) -> Iterator[Change]:
    """The next larger slice of the same chip on which the stage fits."""
    topology = plan.program.topology
    for shape in topology.larger_shapes:
        larger = parse_topology(f"{topology.chip_name}:{shape}", topology.slices)
        try:
            changed = plan_stage(experiment, plan.program.stage.name, larger)
        except UserError:  # the larger slice's devices do not divide the batch
            continue
        if changed.fits:
            yield Change(("--topology", larger.name), changed, 1)
            return
