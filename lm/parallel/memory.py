"""Memory check before compilation: a lower bound on the memory of a stage. `lm plan` is exact."""

from __future__ import annotations

import math
import os
from typing import Any

import jax

from lm.experiment import Experiment, Model, Stage, UserError, rows_per_update

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
            raise UserError(
                f"{stage.name} needs at least {(state + activations) / GB:,.1f} GB a device: {state / GB:,.1f} for "
                f"{num_parameters(experiment.model, vocab_size):,} parameters with gradients and optimizer, "
                f"{activations / GB:,.1f} for activations of {rows:,} rows of {stage.seq_len:,} tokens; this machine has "
                f"{have / GB:,.1f} GB a device: make model.*, {stage.name}.batch_size or {stage.name}.seq_len smaller, or "
                f"raise {stage.name}.microbatches or mesh.fsdp"
            )


def least_bytes(model: Model, stage: Stage, sizes: dict[str, int], vocab_size: int) -> tuple[float, float]:
    """Lower bound on a stage's bytes per device: (parameters, gradients and optimizer state; activations).

    Parameters are sharded over all axes but `slices` and `data`. A rematerialised layer saves its input; with
    remat `offload` only one at a time.
    """
    model = stage.objective.trained_model(model)
    parameters = num_parameters(model, vocab_size) / (
        sizes["fsdp"] * sizes["expert"] * sizes["context"] * sizes["tensor"]
    )
    if not stage.objective.trains:
        return parameters * BYTES[model.param_dtype], 0.0
    o, weights = stage.optimizer, BYTES[model.param_dtype]
    moments = (2 if o.kind == "adamw" else 1) * BYTES[o.state_dtype]
    master = 4 if weights < 4 and o.master_weights else 0
    # The rows of a group share the activations of their prompt.
    length = stage.objective.max_new_tokens if stage.objective.samples else stage.seq_len
    tokens = rows_per_update(stage) // stage.microbatches * length / math.prod(sizes.values())
    layers = 1 if model.remat == "offload" else model.num_layers
    return parameters * (2 * weights + moments + master), tokens * model.embed_dim * layers * BYTES[model.compute_dtype]


def num_parameters(model: Model, vocab_size: int) -> int:
    """Number of parameters in the matrices of a language model."""
    heads = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
    layer = model.embed_dim * (heads + (3 if model.gated_mlp else 2) * model.mlp_dim)
    return model.num_layers * layer + (1 if model.tied_head else 2) * vocab_size * model.embed_dim


def device_memory() -> int:
    """Memory of one device of this process in bytes; CPU devices share the machine's."""
    device: Any = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
