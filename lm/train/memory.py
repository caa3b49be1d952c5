"""Memory check before compilation: a lower bound on the memory of a stage. `lm plan` is exact."""

from __future__ import annotations

import math
import os
from typing import Any

import jax
import optax

from lm.algorithms.state import abstract_model, abstract_state
from lm.experiment import Experiment, Model, Stage, UserError, rows_per_update
from lm.model.flops import trains_in_layers
from lm.model.heads import Scorer, policy_of
from lm.model.transformer import Transformer, num_params
from lm.train_step import partition

GB = 1e9
BYTES = {"float32": 4, "bfloat16": 2}


def check_memory(experiment: Experiment, sizes: dict[str, int], vocab_size: int, capacity: int | None = None) -> None:
    """Check that every stage's parameters, gradients, optimizer state and saved activations fit a device.

    Args:
        sizes: of the mesh axes.
        capacity: bytes of a device; None: this machine's devices.

    Raises:
        UserError: a stage needs more; says how much, and for what.
    """
    have = device_memory() if capacity is None else capacity
    for stage in experiment.stages:
        state, activations = least_bytes(experiment.model, stage, sizes, vocab_size)
        if state + activations > have:
            rows = rows_per_update(stage) // stage.microbatches
            whole, trained = map(num_params, _trained(stage, experiment.model, vocab_size))
            part = "" if whole == trained else f", {trained:,} of them"
            raise UserError(
                f"{stage.name} needs at least {(state + activations) / GB:,.1f} GB a device: {state / GB:,.1f} for "
                f"{whole:,} parameters{part} with gradients and optimizer, "
                f"{activations / GB:,.1f} for activations of {rows:,} rows of {stage.seq_len:,} tokens; this machine has "
                f"{have / GB:,.1f} GB a device: make model.*, {stage.name}.batch_size or {stage.name}.seq_len smaller, or "
                f"raise {stage.name}.microbatches or mesh.fsdp"
            )


def least_bytes(model: Model, stage: Stage, sizes: dict[str, int], vocab_size: int) -> tuple[float, float]:
    """Lower bound on a stage's bytes per device: (parameters, gradients and optimizer state; activations).

    Of the model that is trained alone, not of a critic, whose size is not known before. Parameters are sharded over all axes
    but `slices` and `data`. Only what trains has a gradient and optimizer state. A rematerialised layer saves its input;
    with remat `offload` only one at a time, and where the backward pass does not go through the layers none.
    """
    shards = sizes["fsdp"] * sizes["expert"] * sizes["context"] * sizes["tensor"]
    whole, trained = _trained(stage, model, vocab_size)
    o, weights = stage.optimizer, BYTES[model.param_dtype]
    moments = (2 if o.kind == "adamw" else 1) * BYTES[o.state_dtype]
    master = 4 if weights < 4 and o.master_weights else 0
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(whole)) + num_params(trained) * (
        weights + moments + master
    )
    # The rows of a group share the activations of their prompt.
    length = stage.objective.max_new_tokens if stage.objective.samples else stage.seq_len
    tokens = rows_per_update(stage) // stage.microbatches * length / math.prod(sizes.values())
    layers = 1 if model.remat == "offload" else stage.objective.trained_model(model).num_layers
    saved = tokens * model.embed_dim * layers * BYTES[model.compute_dtype]
    return state / shards, saved if trains_in_layers(trained) else 0.0


def _trained(stage: Stage, model: Model, vocab_size: int) -> tuple[Transformer | Scorer, Transformer | Scorer]:
    """The stage's language or reward model as shapes, and the same with None for each parameter that does not train."""
    if not stage.objective.trains:
        whole = abstract_model(model, vocab_size)
        return whole, jax.tree.map(lambda x: None, whole)
    models = abstract_state(stage, optax.identity(), model, vocab_size).models
    return policy_of(models), policy_of(partition(models, stage)[0])


def device_memory() -> int:
    """Memory of one device of this process in bytes; CPU devices share the machine's."""
    device: Any = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
