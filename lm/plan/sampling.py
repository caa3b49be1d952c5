"""Analytic estimate of the sampler in a GRPO or PPO stage: cache, memory in addition to the training state, speed."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lm.parallel.rules import ways
from lm.plan.one_device import analysis_of, cast_bytes, local_batch, one_device, single_device_mesh
from lm.plan.program import Program, abstract_batch
from lm.plan.trace import block_of
from lm.plan.traffic import gather_seconds
from lm.rollout.sampler import generate
from lm.rollout.sampler_gap import trainer_view


@dataclass(frozen=True)
class Sampling:
    """Memory and speed of a step's rollouts on one device; all completions of a rollout are sampled at once."""

    rows: int
    cache_bytes: int
    sampler_bytes: int  # memory of sampling in addition to the training state, including the cache
    trainer_bytes: int  # memory of the trainer's forward pass over the completions
    prompt_s: float
    memory_s: float  # seconds to sample one token of every row, bound by reading parameters and cache from HBM
    network_s: float  # the same, bound by gathering parameters
    new_tokens: int
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
        """Seconds of a rollout whose completions all have `new_tokens` tokens."""
        return self.prompt_s + self.new_tokens * self.token_s


def sampling(program: Program) -> Sampling | None:
    """Estimate a stage's rollouts; None for a stage that does not sample."""
    objective = program.stage.objective
    if not objective.samples:
        return None
    group = objective.completions_per_prompt
    local = one_device(program)
    params = local.parameters()
    devices, prompts = ways("batch", program.sizes), program.stage.batch_size
    rows = -(-prompts * group // devices)
    width = program.stage.seq_len - objective.max_new_tokens
    # The sampler computes a prompt once per group if all devices have the same number of prompts.
    group_size = 1 if prompts % devices else group
    abstract = [
        jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows // group_size, width), (rows // group_size,))
    ]
    call = functools.partial(
        generate,
        temperature=objective.temperature,
        group_size=group_size,
        max_new_tokens=objective.max_new_tokens,
        end_ids=(0,),
        pad_id=0,
    )
    with jax.sharding.use_abstract_mesh(single_device_mesh(program)):
        block = block_of(jax.make_jaxpr(call)(params, *abstract, jax.eval_shape(lambda: jax.random.key(0))))
        cache = jax.eval_shape(lambda: params.empty_cache(rows, program.stage.seq_len))
    analysis = dataclasses.replace(analysis_of(program), ways=1)  # sampling has one token per row, not split
    whole = analysis.usage(block, set(block.inputs[: len(jax.tree.leaves(params))]))
    turn = whole.turns[-1]  # one iteration of the loop over new tokens
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
    """Bytes (in addition to the training state) and seconds of the trainer's forward pass over the rows of an update."""
    local, (rows, tokens) = one_device(program), local_batch(program)
    params, stage = local.parameters(), program.stage
    call = functools.partial(trainer_view, temperature=stage.objective.temperature, pieces=stage.microbatches)
    with jax.sharding.use_abstract_mesh(single_device_mesh(program)):
        block = block_of(jax.make_jaxpr(call)(params, abstract_batch(stage, rows, tokens)))
    usage = analysis_of(program).usage(block, set(block.inputs[: len(jax.tree.leaves(params))]))
    needed = usage.peak.total() + cast_bytes(program.parameters(), program)
    return needed, usage.seconds + gather_seconds(program, usage)
