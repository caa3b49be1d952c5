"""The base model of an adapter: where a run has it, its fingerprint, and how a checkpoint's factors are put on it."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt32

from lm.experiment import Experiment, Stage, UserError, start_of
from lm.model.lora import APART
from lm.model.parameter import leaf_name
from lm.model.transformer import Transformer
from lm.parallel.distributed import fetch
from lm.train.named_arrays import named_leaves

M = TypeVar("M")
Known = Mapping[int | None, Transformer]
"""Models that are loaded already, by `base_stage` of theirs: their arrays are used, and not read again."""
ODD = (2654435761, 2246822519), (3266489917, 668265263)


def base_stage(experiment: Experiment, index: int | None) -> int | None:
    """Index of the stage whose model is the base: `index` or the nearest stage that it starts from with all weights trained.

    None: the run's initial weights.
    """
    while index is not None and experiment.stages[index].lora.rank:
        index = start_of(experiment, index)
    return index


def adapters_on_random_weights(experiment: Experiment) -> list[str]:
    """One line for each stage whose adapter has a base that nothing has trained."""
    stages = enumerate(experiment.stages)
    untrained = [
        one for i, one in stages if one.lora.rank and base_stage(experiment, i) is None and not experiment.init
    ]
    return [
        f"{stage.name}.lora.rank is {stage.lora.rank}, and its base are the random initial weights, which no stage trains: "
        "an earlier stage without lora, or --init FOLDER, gives it a trained base"
        for stage in untrained
    ]


def with_base(model: M, base: Any) -> M:
    """A model without its base (`without_base`), completed with the arrays of a model that has the same base."""
    leaves = named_leaves(base)

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        return leaves.get(leaf_name(path)) if leaf is None else leaf

    return jax.tree_util.tree_map_with_path(one, model, is_leaf=lambda x: x is None)


def fingerprint(model: Any) -> str:
    """A digest of all bits of a model's base, independent of its sharding."""
    named = {k: x for k, x in named_leaves(model).items() if not any(fnmatch.fnmatchcase(k, one) for one in APART)}
    sums = fetch(_sums(named))
    lines = [f"{name} {x.dtype}{list(x.shape)} {sums[name].tolist()}" for name, x in sorted(named.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@jax.jit
def _sums(named: dict[str, Array]) -> dict[str, Array]:
    return jax.tree.map(_sum, named)


def _sum(x: Shaped[Array, "..."]) -> UInt32[Array, "2"]:
    """Two sums of an array's bits mixed with their indices; integers, so that the order of summation does not matter."""
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)

    def mixed(first: int, second: int) -> Array:
        y = (bits ^ (place * jnp.uint32(first))) * jnp.uint32(second)
        return ((y ^ (y >> 15)) * jnp.uint32(first)).sum(dtype=jnp.uint32)

    return jnp.stack([mixed(*odd) for odd in ODD])


def recorded_base(stage: Stage, model: Transformer) -> dict[str, str]:
    """What a checkpoint records of the model under a stage's adapter: its fingerprint; nothing without an adapter."""
    return {"base": fingerprint(model)} if stage.lora.rank else {}


def check_base(experiment: Experiment, index: int, meta: Mapping[str, Any], recorded: Mapping[str, str]) -> None:
    """Raise UserError if the meta of a stage's checkpoint records another base than this."""
    found, at = recorded.get("base", ""), base_stage(experiment, index)
    then = meta.get("base", found)
    if then != found:
        source = f"stage {experiment.stages[at].name}" if at is not None else experiment.init
        raise UserError(
            f"the adapter of stage {experiment.stages[index].name} was trained on a base with fingerprint {then[:16]}, and "
            f"{source or f'the random weights of seed {experiment.seed}'} has {found[:16]}: put back the weights of then"
        )
