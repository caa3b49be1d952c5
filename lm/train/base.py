"""The base model of an adapter: the stage that produced it, its fingerprint, and the addition of a checkpoint's factors."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Shaped, UInt32

from lm import open_weights
from lm.experiment import Experiment, Stage, UserError, start_of
from lm.model.lora import APART
from lm.model.parameter import leaf_name
from lm.model.quantised import QUANTISED, stored
from lm.model.transformer import Transformer
from lm.parallel.distributed import fetch
from lm.train.named_arrays import named_leaves

M = TypeVar("M")
Known = Mapping[int | None, Transformer]
"""Models that are already loaded, by the `base_stage` of each; their arrays are shared instead of read again."""
ODD = (2654435761, 2246822519), (3266489917, 668265263)


def base_stage(experiment: Experiment, index: int | None) -> int | None:
    """Index of the stage whose model is the base: the last one up to `index`, along `start`, that trained all weights.

    None: the run's initial weights.
    """
    return _nearest(experiment, index, with_adapter=False)


def adapter_stage(experiment: Experiment, index: int | None) -> int | None:
    """Index of the last stage up to `index`, along `start`, that trained an adapter; None if there is none."""
    return _nearest(experiment, index, with_adapter=True)


def _nearest(experiment: Experiment, index: int | None, with_adapter: bool) -> int | None:
    while index is not None and bool(experiment.stages[index].lora.rank) != with_adapter:
        index = start_of(experiment, index)
    return index


def adapters_on_random_weights(experiment: Experiment) -> list[str]:
    """One line for each stage whose adapter has an untrained base."""
    stages = enumerate(experiment.stages)
    untrained = [
        one for i, one in stages if one.lora.rank and base_stage(experiment, i) is None and not experiment.init
    ]
    return [
        f"{stage.name}.lora.rank is {stage.lora.rank}, and its base is the random initial weights, which no stage trains: "
        "train an earlier stage without lora, or start from open weights (--init FOLDER)"
        for stage in untrained
    ]


def with_base(model: M, base: Any) -> M:
    """A model without its base (see `without_base`), completed with the arrays of `base`."""

    def is_weight(x: Any) -> bool:
        return isinstance(x, (nnx.Variable, *QUANTISED.values()))

    kept = {leaf_name(path): one for path, one in jax.tree.leaves_with_path(base, is_leaf=is_weight)}

    def one(path: tuple[Any, ...], param: Any) -> Any:
        return param if jax.tree.leaves(param) else jax.tree.map(lambda x: x, kept.get(leaf_name(path), param))

    return jax.tree_util.tree_map_with_path(one, model, is_leaf=is_weight)


def fingerprint(model: Any) -> str:
    """A digest of all bits of a model's base, independent of its sharding."""
    named = {k: x for k, x in named_leaves(model).items() if not any(fnmatch.fnmatchcase(k, one) for one in APART)}
    return _digest(_sums_of(named))


def read_stored(experiment: Experiment, mesh: Mesh, base: str) -> tuple[Transformer, str]:
    """Read open weights into the storage `base` of `LoRA.base`; also returns the fingerprint of the original weights.

    Parameters are converted one at a time: memory holds the converted ones and at most one original.
    """
    lines: list[str] = []

    def store(name: str, param: nnx.Param, inputs: int) -> Any:
        lines.extend(_sums_of({name: param[...]}))
        return stored(name, param, inputs, base, mesh)

    return open_weights.read(experiment, mesh, store), _digest(lines)


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _sums_of(named: dict[str, Array]) -> list[str]:
    """A line for each array, by name: its dtype, shape, and sums of its bits."""
    sums = fetch(_sums(named))
    return [f"{name} {x.dtype}{list(x.shape)} {sums[name].tolist()}" for name, x in named.items()]


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


def recorded_base(stage: Stage, model: Transformer, known: str = "") -> dict[str, str]:
    """The checkpoint's entry for the base of a stage's adapter, its fingerprint; empty without an adapter.

    Args:
        known: fingerprint of a model whose weights are already stored as `LoRA.base`; "": computed here.
    """
    return {"base": known or fingerprint(model)} if stage.lora.rank else {}


def check_base(experiment: Experiment, index: int, meta: Mapping[str, Any], recorded: Mapping[str, str]) -> None:
    """Raise UserError if the meta of a stage's checkpoint records a base other than `recorded`."""
    found, at = recorded.get("base", ""), base_stage(experiment, index)
    then = meta.get("base", found)
    if then != found:
        source = f"stage {experiment.stages[at].name}" if at is not None else experiment.init
        raise UserError(
            f"the adapter of stage {experiment.stages[index].name} was trained on a base with fingerprint {then[:16]}, and "
            f"{source or f'the random weights of seed {experiment.seed}'} has {found[:16]}: restore the weights of that time"
        )
