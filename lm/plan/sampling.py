"""The sampler of a GRPO or PPO stage, by arithmetic: its cache, its memory beside the training state, its speed."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lm.parallel.rules import ways
from lm.plan.one_device import analysis_of, cast_bytes, local_batch, lone_mesh, one_device
from lm.plan.program import Program, abstract_batch
from lm.plan.trace import block_of
from lm.plan.traffic import gather_seconds
from lm.rollout.sampler import generate
from lm.rollout.sampler_gap import trainer_view


@dataclass(frozen=True)
class Sampling:
    """The rollouts of a step on one device; the completions of each are sampled side by side."""

    rows: int
    cache_bytes: int
    sampler_bytes: int  # all that sampling needs beside the training state, the cache included
    trainer_bytes: int  # and the trainer's pass over what was sampled
    prompt_s: float
    memory_s: float  # a token of every row, bound by what is read from HBM: parameters and cache
    network_s: float  # and by the parameters that are gathered for it
    new_tokens: int
    rollouts: int  # a step has at most so many
    trainer_s: float  # the trainer's log-probabilities of all tokens of a step, with which the sampler's are compared

    @property
    def peak_bytes(self) -> int:
        """The most that a rollout needs beside the training state."""
        return max(self.sampler_bytes, self.trainer_bytes)

    @property
    def token_s(self) -> float:
        """A token of every row at best: reading and gathering overlap."""
        return max(self.memory_s, self.network_s)

    @property
    def tokens_per_s(self) -> float:
        """At best, on this device."""
        return self.rows / self.token_s

    @property
    def rollout_s(self) -> float:
        """Of completions that all reach their full length."""
        return self.prompt_s + self.new_tokens * self.token_s


def sampling(program: Program) -> Sampling | None:
    """What the stage's rollouts need; None of a stage that samples nothing."""
    objective = program.stage.objective
    if not objective.samples:
        return None
    group = objective.completions_per_prompt
    local = one_device(program)
    params = local.parameters()
    devices, prompts = ways("batch", program.sizes), program.stage.batch_size
    rows = -(-prompts * group // devices)
    width = program.stage.seq_len - objective.max_new_tokens
    # The sampler reads a prompt once where all devices have as many.
    group_size = 1 if prompts % devices else group
    abstract = [
        jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows // group_size, width), (rows // group_size,))
    ]
    call = functools.partial(
        generate,
        temperature=objective.temperature,
        group_size=group_size,
        max_new_tokens=objective.max_new_tokens,
        eos_id=0,
        pad_id=0,
    )
    with jax.sharding.use_abstract_mesh(lone_mesh(program)):
        block = block_of(jax.make_jaxpr(call)(params, *abstract, jax.eval_shape(lambda: jax.random.key(0))))
        cache = jax.eval_shape(lambda: params.empty_cache(rows, program.stage.seq_len))
    analysis = dataclasses.replace(analysis_of(program), ways=1)  # tokens come one by one: nothing to split
    whole = analysis.usage(block, set(block.inputs[: len(jax.tree.leaves(params))]))
    turn = whole.turns[-1]  # the loop over new tokens, counted as one turn
    trainer_bytes, trainer_s = _trainer_pass(program)
    return Sampling(
        rows=rows,
        cache_bytes=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)),
        sampler_bytes=whole.peak.total(),
        trainer_bytes=trainer_bytes,
        prompt_s=whole.seconds - turn.seconds,
        memory_s=turn.moved / program.topology.chip.hbm_rate,
        network_s=gather_seconds(program, turn),
        new_tokens=objective.max_new_tokens,
        rollouts=objective.max_rollouts,
        trainer_s=trainer_s * prompts * group / program.rows,
    )


def _trainer_pass(program: Program) -> tuple[int, float]:
    """Bytes beside the training state, and seconds, of the trainer's log-probabilities of the rows of an update."""
    local, (rows, tokens) = one_device(program), local_batch(program)
    params, stage = local.parameters(), program.stage
    call = functools.partial(trainer_view, temperature=stage.objective.temperature, pieces=stage.microbatches)
    with jax.sharding.use_abstract_mesh(lone_mesh(program)):
        block = block_of(jax.make_jaxpr(call)(params, abstract_batch(stage, rows, tokens)))
    usage = analysis_of(program).usage(block, set(block.inputs[: len(jax.tree.leaves(params))]))
    needed = usage.peak.total() + cast_bytes(program.parameters(), program)
    return needed, usage.seconds + gather_seconds(program, usage)
