"""A stage as a program on a topology: its mesh and optimizer, and abstract values of its state and batch."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm.algorithms import algorithm_of
from lm.algorithms.state import Sizes, abstract_model, abstract_state, teacher_sizes
from lm.experiment import (
    Experiment,
    LoRA,
    Mesh,
    Model,
    RolloutMesh,
    Stage,
    UserError,
    adapters_before,
    rows_per_update,
    updates_per_step,
)
from lm.model.transformer import Transformer
from lm.optimizer import make_optimizer
from lm.parallel.mesh import axis_sizes, check_fits, check_split, rollout_sizes
from lm.plan.chips import Topology
from lm.train_step import Models, TrainState, partition
from lm.types import NOTHING_SHARED, SharedPrompt, TokenBatch


@dataclass(frozen=True)
class Program:
    """One stage on one topology.

    Attributes:
        sizes: size of each mesh axis, including slices.
        before: adapters of earlier stages, whose factors the model keeps.
        teacher: config and vocabulary of the model that the stage learns from, if its objective names one.
        rollout: layout of sampling, on the same devices or on others.
    """

    stage: Stage
    model: Model
    vocab_size: int
    topology: Topology
    sizes: dict[str, int]
    before: tuple[LoRA, ...] = ()
    teacher: Sizes | None = None
    rollout: RolloutMesh = RolloutMesh()

    @property
    def sampler(self) -> Program:
        """This program on the mesh of sampling."""
        alone = dict.fromkeys(self.sizes, 1) | {"data": self.rollout.devices} if self.rollout.devices else self.sizes
        return dataclasses.replace(self, sizes=rollout_sizes(self.rollout, alone))

    @property
    def devices(self) -> int:
        """Number of devices of the mesh."""
        return math.prod(self.sizes.values())

    @property
    def rows(self) -> int:
        """Rows of an update on all devices."""
        return rows_per_update(self.stage)

    @property
    def tokens_per_device(self) -> float:
        """Tokens of an update divided by the number of devices."""
        return self.rows * self.stage.seq_len / self.devices

    @property
    def mesh(self) -> Mesh:
        return Mesh(**self.sizes)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.stage.optimizer, self.stage.steps * updates_per_step(self.stage))

    def parameters(self) -> Transformer:
        """The model with abstract values (shapes and dtypes)."""
        return abstract_model(self.model, self.vocab_size)

    @functools.cached_property
    def state(self) -> TrainState:
        """The training state with abstract values."""
        return abstract_state(self.stage, self.optimizer, self.model, self.vocab_size, self.before, self.teacher)

    def trained(self) -> Models:
        """The trained models with abstract values, and None for each frozen parameter."""
        return partition(self.state.models, self.stage)[0]

    def batch(self) -> TokenBatch:
        """The batch of an update with abstract values."""
        return abstract_batch(self.stage, self.rows, self.stage.seq_len)


def abstract_batch(stage: Stage, rows: int, length: int) -> TokenBatch:
    """An abstract batch of the stage's type, with `rows` rows of `length` tokens."""
    o = stage.objective
    whole, real = (jax.ShapeDtypeStruct((rows, length), dtype) for dtype in (jnp.int32, jnp.float32))
    plain = TokenBatch(tokens=whole, weights=real, segments=whole, positions=whole)
    special: dict[str, Any] = vars(plain) | {"mismatched": plain, "teacher": plain}
    special |= dict.fromkeys(("margins", "ties", "desirable"), jax.ShapeDtypeStruct((rows,), jnp.float32))
    if o.samples:  # prompts have equal width and need no logits
        group = o.completions_per_prompt
        group, rest = divmod(group, o.updates_per_step if group > 1 else 1)
        special["shared"] = NOTHING_SHARED if rest else SharedPrompt(group, length - o.max_new_tokens)
        special["teacher"] = dataclasses.replace(plain, shared=special["shared"])
    kind = algorithm_of(stage).batch(o)
    return kind(**{field.name: special.get(field.name, real) for field in dataclasses.fields(kind)})


def resolve(experiment: Experiment, stage: Stage, topology: Topology) -> Program:
    """Make the program of a stage, with an axis of size -1 resolved to the remaining devices.

    Raises:
        UserError: the mesh does not use all devices of the topology, or does not divide the model or the batch.
    """
    if not stage.objective.trains:
        raise UserError(f"stage {stage.name} does not train, so there is no step to plan: name another with --stage")
    mesh = dataclasses.replace(experiment.mesh, slices=topology.slices)
    check_split(experiment, topology.devices, topology.chip.platform)
    devices, rollout = topology.devices - experiment.rollout_mesh.devices, experiment.rollout_mesh
    sizes = axis_sizes(mesh, devices)
    used = math.prod(sizes.values())
    if used != devices:
        raise UserError(
            f"the mesh uses {used} of the {devices} devices of {topology.slices} x {topology.name}: set one of "
            "its axes to -1, which takes all remaining devices"
        )
    check_fits(dataclasses.replace(experiment, stages=(stage,)), sizes, topology.chip.platform)
    if not stage.objective.staleness:  # it samples with the devices that train
        rollout = dataclasses.replace(rollout, devices=0)
    before = adapters_before(experiment, [one.name for one in experiment.stages].index(stage.name))
    shapes = experiment.model, experiment.tokenizer.vocab_size
    return Program(stage, *shapes, topology, sizes, before, teacher_sizes(stage, *shapes), rollout)
