"""Analytic estimate of the sampler in a GRPO or PPO stage: cache, memory in addition to the training state, speed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lm.model.heads import policy_of
from lm.model.transformer import Transformer
from lm.parallel.rules import RULES
from lm.plan.one_device import (
    analysis_of,
    cast_bytes,
    local_batch,
    one_device,
    parameter_bytes,
    single_device_mesh,
    whole_mesh,
)
from lm.plan.program import Program, abstract_batch
from lm.plan.trace import block_of
from lm.plan.traffic import NETWORK, collective, gather_seconds
from lm.plan.usage import Usage
from lm.rollout.batching import Sizes, sizes_of
from lm.rollout.sampler_gap import trainer_view
from lm.rollout.slots import Assignment, empty_reader, empty_slots, read_chunk, sample_tokens


@dataclass(frozen=True)
class Sampling:
    """Memory and speed of a step's rollouts on one device.

    `weights_s`, `cache_s` and `collectives_s` are the roofline of sampling one token of every row: reading the weights and the
    cache of an answer of half the length from HBM, and collectives at the links' rate.
    """

    sizes: Sizes  # shapes of the engine's programs, on all devices
    rows: float  # slots of a device, the completions that are sampled at once
    cache_bytes: int
    sampler_bytes: int  # memory of sampling in addition to the training state, including the cache
    trainer_bytes: int  # memory of the trainer's forward pass over the completions
    reshard_s: float  # seconds in which the sampler gets the weights
    prompt_s: float
    token_s: float  # seconds to sample one token of every row
    weights_s: float
    cache_s: float
    collectives_s: float
    new_tokens: float  # of each slot, one completion after another
    rollouts: int  # maximal number of rollouts per step
    trainer_s: float  # seconds of the trainer's forward pass over all tokens of a step, for comparison with the sampler
    check_s: float  # seconds of that pass with the weights that sampled, if these are older
    copy_bytes: int  # copy of these weights
    compiler: str = ""  # whose memory and seconds the sampler's are; empty: by arithmetic
    compile_s: float = 0.0
    compile_cpu_s: float = 0.0

    @property
    def roofline(self) -> dict[str, float]:
        """Seconds to sample one token of every row by each resource."""
        return {"weights": self.weights_s, "cache": self.cache_s, "collectives": self.collectives_s}

    @property
    def peak_bytes(self) -> int:
        """Peak memory of a rollout in addition to the training state."""
        return max(self.sampler_bytes, self.trainer_bytes)

    @property
    def tokens_per_s(self) -> float:
        """Upper bound of the tokens sampled per second on one device."""
        return self.rows / self.token_s

    @property
    def rollout_s(self) -> float:
        """Seconds of a rollout whose completions all have the maximum of tokens."""
        return self.reshard_s + self.prompt_s + self.new_tokens * self.token_s


def sampling(program: Program) -> Sampling | None:
    """Estimate a stage's rollouts; None for a stage that does not sample."""
    objective = program.stage.objective
    if not objective.samples:
        return None
    sampler, cache = program.sampler, objective.sampler_cache
    sizes = engine_sizes(sampler)
    local = _of_one_device(sizes)
    with jax.sharding.use_abstract_mesh(single_device_mesh(sampler)):
        whole, model = (
            jax.eval_shape(Transformer.for_sampling, p.parameters()) for p in (sampler, one_device(sampler))
        )
        slots = jax.eval_shape(lambda: empty_slots(model, local.slots, local.lanes, local.prompt, local.new, cache))
        reading = _usage(sampler, model, functools.partial(_read, local))
        turn = _usage(sampler, model, functools.partial(_sample, local, objective.temperature, cache))
    prompts, own = _bytes(slots.prompts), _bytes(slots.columns)
    one = turn.turns[-1]  # one iteration of the loop over new tokens
    rate, network_s = sampler.topology.chip.hbm_rate, gather_seconds(sampler, one) + _sum_seconds(sampler, local.slots)
    trainer_bytes, trainer_s = _trainer_pass(program)
    completions = program.stage.batch_size * objective.completions_per_prompt
    return Sampling(
        sizes=sizes,
        rows=sizes.slots / sampler.devices,
        cache_bytes=prompts + own,
        sampler_bytes=turn.peak.total() + reading.peak.total() + parameter_bytes(whole, sampler),
        trainer_bytes=trainer_bytes,
        reshard_s=_reshard_seconds(program, whole),
        prompt_s=reads(program, sizes) * reading.seconds,
        token_s=max(one.moved / rate, network_s),
        weights_s=_weight_bytes(model) / rate,
        cache_s=(prompts + own / 2) / rate,
        collectives_s=network_s,
        new_tokens=objective.max_new_tokens * max(1.0, completions / sizes.slots),
        rollouts=objective.max_rollouts,
        trainer_s=trainer_s * completions / program.rows,
        check_s=trainer_s * completions / program.rows * program.devices / sampler.devices * bool(objective.staleness),
        copy_bytes=_copy_bytes(program),
    )


def _copy_bytes(program: Program) -> int:
    """Bytes on one device of the weights that sample while the others train: of all on devices of their own, else of what trains."""
    if not program.stage.objective.staleness:
        return 0
    policy = program.parameters() if program.rollout.devices else policy_of(program.trained())
    return parameter_bytes(policy, program.sampler if program.rollout.devices else program)


def engine_sizes(sampler: Program) -> Sizes:
    """Shapes of the engine's programs for the rollouts of a stage."""
    stage, objective = sampler.stage, sampler.stage.objective
    width = stage.seq_len - objective.max_new_tokens
    with jax.sharding.use_abstract_mesh(whole_mesh(sampler)):
        return sizes_of(stage.batch_size, objective.completions_per_prompt, width, objective.max_new_tokens)


def reads(program: Program, sizes: Sizes) -> int:
    """Number of chunks of prompts that are read one after another in a rollout."""
    prompts = -(-program.stage.batch_size // sizes.shards)
    return -(-prompts * sizes.shards // sizes.reading) * (sizes.prompt // sizes.chunk)


def _of_one_device(sizes: Sizes) -> Sizes:
    """The share of one part of the batch."""
    parts = {name: getattr(sizes, name) // sizes.shards for name in ("shards", "slots", "lanes", "reading")}
    return dataclasses.replace(sizes, **parts)


def _bytes(arrays: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def _weight_bytes(model: Transformer) -> int:
    """Bytes of the weights that a token's products read: all but a table that is not the head."""
    return _bytes(model) - (0 if model.head is None else _bytes(model.embed))


def _sum_seconds(sampler: Program, rows: int) -> float:
    """Seconds of the sums over `tensor` for one token of every row: of the embedding, and after attention and MLP."""
    m = sampler.model
    size = (2 * m.num_layers + 1) * rows * m.embed_dim * jnp.dtype(m.compute_dtype).itemsize
    return collective(sampler, "", RULES["heads"], "all-reduce", size).seconds


def _reshard_seconds(program: Program, model: Transformer) -> float:
    """Seconds in which every device receives the sampler's part of the weights; 0 in the layout of training."""
    if program.sampler.sizes == program.sizes:
        return 0.0
    everywhere = tuple(axis for axis in program.sizes if axis != NETWORK)
    size = parameter_bytes(model, program.sampler)
    return collective(program, "", everywhere, "all-gather", size).seconds


def _usage(program: Program, model: Any, call: Callable[..., Any]) -> Usage:
    """Usage of a program of the engine. Its tokens are not split, and the model has the compute dtype."""
    block = block_of(jax.make_jaxpr(call)(model))
    analysis = dataclasses.replace(analysis_of(program), ways=1)
    return analysis.usage(block, set(block.inputs[: len(jax.tree.leaves(model))]))


def _read(sizes: Sizes, model: Any) -> Any:
    """Read one chunk of prompts."""
    rows = jnp.zeros(sizes.reading, jnp.int32)
    reader = empty_reader(model, sizes.reading, sizes.prompt)
    return read_chunk(model, *reader, jnp.int32(0), jnp.zeros((sizes.reading, sizes.chunk), jnp.int32), rows)


def _sample(sizes: Sizes, temperature: float, cache: str, model: Any) -> Any:
    """Sample tokens of all slots."""
    slots = empty_slots(model, sizes.slots, sizes.lanes, sizes.prompt, sizes.new, cache)
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
