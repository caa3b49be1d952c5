"""Compiles the engine's programs for a TPU topology: seconds of a chunk of prompts and of a token of every slot."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.model.transformer import Transformer
from lm.parallel.mesh import make_mesh
from lm.parallel.rules import shardings, spec
from lm.plan.compiled import compile_program, tpu_devices
from lm.plan.libtpu import find_libtpu
from lm.plan.one_device import parameter_bytes
from lm.plan.program import Program
from lm.plan.sampling import Sampling, reads
from lm.rollout.engine import LOOK
from lm.rollout.slots import Assignment, empty_reader, empty_slots, placement, read_chunk, sample_tokens


def compiled_sampling(program: Program, found: Sampling, libtpu: str | None = None) -> tuple[Sampling, str]:
    """The estimate of a stage's rollouts with the compiler's memory and seconds, and the compiled text of sampling.

    A call of the program samples LOOK tokens of every slot; its seconds are divided by them.

    Raises:
        OutOfMemory: a program does not fit.
    """
    sampler, sizes, compiler = program.sampler, found.sizes, find_libtpu(libtpu)
    cache = program.stage.objective.sampler_cache
    mesh = make_mesh(sampler.mesh, tpu_devices(program.topology, compiler))

    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))

    with jax.set_mesh(mesh):
        model = jax.eval_shape(Transformer.for_sampling, sampler.parameters())
        slots = jax.eval_shape(lambda: empty_slots(model, sizes.slots, sizes.lanes, sizes.prompt, sizes.new, cache))
        reader = jax.eval_shape(lambda: empty_reader(model, sizes.reading, sizes.prompt))
        model = jax.tree.map(_placed, model, shardings(model, mesh))
        slots, reader = (jax.tree.map(lambda x: _placed(x, _split(x, mesh)), tree) for tree in (slots, reader))
    own = integers(sizes.slots)
    started = jax.ShapeDtypeStruct(own.shape, bool, sharding=own.sharding)
    assigned = Assignment(started, own, own, own, own, own, integers(sizes.lanes, sizes.places))
    key, temperature = jax.eval_shape(lambda: jax.random.key(0)), program.stage.objective.temperature
    tokens, lengths = integers(sizes.reading, sizes.chunk), integers(sizes.reading)
    sampling = compile_program(
        lambda: sample_tokens.lower(model, slots, assigned, key, temperature, LOOK, sizes.refill, end_ids=(0,)),
        mesh, program.topology, compiler, unknown=LOOK,
    )  # fmt: skip
    reading = compile_program(
        lambda: read_chunk.lower(model, *reader, integers(), tokens, lengths), mesh, program.topology, compiler
    )
    read_bytes = reading.facts.peak_bytes - parameter_bytes(model, sampler)
    return dataclasses.replace(
        found,
        compiler=compiler.name,
        sampler_bytes=sampling.facts.peak_bytes + read_bytes,
        prompt_s=reads(program, sizes) * reading.facts.cost.schedule_s,
        token_s=sampling.facts.cost.schedule_s / LOOK,
        compile_s=sampling.seconds + reading.seconds,
        compile_cpu_s=sampling.cpu_seconds + reading.cpu_seconds,
    ), sampling.facts.text


def _placed(x: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def _split(x: Any, mesh: Mesh) -> NamedSharding:
    """Where the engine places an array of slots, lanes or prompts."""
    return NamedSharding(mesh, spec(placement(x)))
