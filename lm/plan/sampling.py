"""Analytic estimate of the sampler in a GRPO or PPO stage: cache, memory in addition to the training state, speed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lm.parallel.rules import ways
from lm.plan.one_device import analysis_of, cast_bytes, local_batch, one_device, single_device_mesh
from lm.plan.program import Program, abstract_batch
from lm.plan.trace import block_of
from lm.plan.traffic import gather_seconds
from lm.plan.usage import Usage
from lm.rollout.batching import Sizes, sizes_of
from lm.rollout.sampler_gap import trainer_view
from lm.rollout.slots import Assignment, empty_reader, empty_slots, read_chunk, sample_tokens


@dataclass(frozen=True)
class Sampling:
    """Memory and speed of a step's rollouts on one device."""

    rows: int  # slots, the completions that are sampled at once
    cache_bytes: int
    sampler_bytes: int  # memory of sampling in addition to the training state, including the cache
    trainer_bytes: int  # memory of the trainer's forward pass over the completions
    prompt_s: float
    memory_s: float  # seconds to sample one token of every row, bound by reading parameters and cache from HBM
    network_s: float  # the same, bound by gathering parameters
    new_tokens: float  # of each slot, one completion after another
    rollouts: int  # maximal number of rollouts per step
    trainer_s: float  # seconds of the trainer's forward pass over all tokens of a step, for comparison with the sampler

    @property
    def peak_bytes(self) -> int:
        """Peak memory of a rollout in addition to the training state."""
        return max(self.sampler_bytes, self.trainer_bytes)

    @property
    def token_s(self) -> float:
        """Seconds to sample one token of every row if reading and gathering overlap."""
        return max(self.memory_s, self.network_s)

    @property
    def tokens_per_s(self) -> float:
        """Upper bound of the tokens sampled per second on one device."""
        return self.rows / self.token_s

    @property
    def rollout_s(self) -> float:
        """Seconds of a rollout whose completions all have the maximum of tokens."""
        return self.prompt_s + self.new_tokens * self.token_s


def sampling(program: Program) -> Sampling | None:
    """Estimate a stage's rollouts; None for a stage that does not sample."""
    objective = program.stage.objective
    if not objective.samples:
        return None
    group = objective.completions_per_prompt
    devices, prompts = ways("batch", program.sizes), program.stage.batch_size
    rows, group_size = -(-prompts * group // devices), group
    if prompts % devices:  # a prompt's completions are on several devices
        group_size = 1
    with jax.sharding.use_abstract_mesh(single_device_mesh(program)):
        width = program.stage.seq_len - objective.max_new_tokens
        sizes = sizes_of(rows // group_size, group_size, width, objective.max_new_tokens)
        model = jax.eval_shape(lambda model: model.for_sampling(), one_device(program).parameters())
        slots = jax.eval_shape(lambda: empty_slots(model, sizes.slots, sizes.lanes, sizes.prompt, sizes.new))
        reading, turn = (
            _program(program, model, functools.partial(_read, sizes)),
            _program(program, model, functools.partial(_sample, sizes, objective.temperature)),
        )
    caches = (*slots.prompt_keys, *slots.prompt_values, *slots.keys, *slots.values)
    cast = cast_bytes(program.parameters(), program)
    trainer_bytes, trainer_s = _trainer_pass(program)
    reads = -(-(rows // group_size) // sizes.reading) * (sizes.prompt // sizes.chunk)
    one = turn.turns[-1]  # one iteration of the loop over new tokens
    return Sampling(
        rows=sizes.slots,
        cache_bytes=sum(x.size * x.dtype.itemsize for x in caches),
        sampler_bytes=turn.peak.total() + reading.peak.total() + cast,
        trainer_bytes=trainer_bytes,
        prompt_s=reads * reading.seconds,
        memory_s=one.moved / program.topology.chip.hbm_rate,
        network_s=gather_seconds(program, one),
        new_tokens=objective.max_new_tokens * rows / sizes.slots,
        rollouts=objective.max_rollouts,
        trainer_s=trainer_s * prompts * group / program.rows,
    )


def _program(program: Program, model: Any, call: Callable[..., Any]) -> Usage:
    """Usage of a program of the engine. Its tokens are not split, and the model has the compute dtype."""
    block = block_of(jax.make_jaxpr(call)(model))
    analysis = dataclasses.replace(analysis_of(program), ways=1)
    return analysis.usage(block, set(block.inputs[: len(jax.tree.leaves(model))]))


def _read(sizes: Sizes, model: Any) -> Any:
    """Read one chunk of prompts."""
    rows = jnp.zeros(sizes.reading, jnp.int32)
    reader = empty_reader(model, sizes.reading, sizes.prompt)
    return read_chunk(model, *reader, jnp.int32(0), jnp.zeros((sizes.reading, sizes.chunk), jnp.int32), rows)


def _sample(sizes: Sizes, temperature: float, model: Any) -> Any:
    """Sample tokens of all slots."""
    slots = empty_slots(model, sizes.slots, sizes.lanes, sizes.prompt, sizes.new)
    zeros = jnp.zeros(sizes.slots, jnp.int32)
    members = jnp.zeros((sizes.lanes, sizes.places), jnp.int32)
    assigned = Assignment(zeros == 0, zeros, zeros, zeros, zeros, zeros, members)
    return sample_tokens(model, slots, assigned, jax.random.key(0), temperature, sizes.new, sizes.slots, end_ids=(0,))


def _trainer_pass(program: Program) -> tuple[int, float]:
    """Bytes (in addition to the training state) and seconds of the trainer's forward pass over the rows of an update."""
    local, (rows, tokens) = one_device(program), local_batch(program)
    params, stage = local.parameters(), program.stage
    call = functools.partial(trainer_view, temperature=stage.objective.temperature, pieces=stage.microbatches)
    with jax.sharding.use_abstract_mesh(single_device_mesh(program)):
        block = block_of(jax.make_jaxpr(call)(params, abstract_batch(stage, rows, tokens)))
    usage = analysis_of(program).usage(block, set(block.inputs[: len(jax.tree.leaves(params))]))
    needed = usage.peak.total() + cast_bytes(program.parameters(), program)
    return needed, usage.seconds + gather_seconds(program, usage)
