"""Parameters: arrays whose dimensions have logical axis names (`lm/parallel/rules.py`).

Parts of the model are nnx modules because such a module is a plain pytree to which jax.jit, grad, scan, checkpoint
and eval_shape apply. nnx's graph mode and its eager sharding are switched off in the calls here; no global mode of nnx
is set or needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from lm.parallel.rules import gathered


def parameter(value: Array, axes: tuple[str | None, ...]) -> nnx.Param:
    """A parameter whose dimensions have these logical names, which decide its sharding."""
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


def normal(key: PRNGKeyArray, std: float, dtype: str, **axes: int) -> nnx.Param:
    """A normally initialised parameter whose dimensions have these logical names and sizes."""
    value = jax.random.normal(key, tuple(axes.values()), jnp.float32) * std
    return parameter(value.astype(jnp.dtype(dtype)), tuple(axes))


def stack_layers(make: Callable[[PRNGKeyArray], nnx.Module], keys: PRNGKeyArray) -> Any:
    """One module with the stacked parameters of all layers, each from its own key; the first dimension is named `layers`."""
    return jax.vmap(nnx.transform_metadata(make, in_axes=0, out_axes=0, partition="layers", graph=False))(keys)


def axes_of(param: Any) -> tuple[str | None, ...]:
    """Logical names of a parameter's dimensions; inside a scan over layers without `layers`.

    Those of a quantised weight (`lm/model/quantised.py`) are those of its codes.
    """
    param = param if isinstance(param, nnx.Variable) else param.codes
    names: tuple[str | None, ...] = param.get_metadata("out_sharding")
    return names[-param.get_value().ndim :]


def gather(param: nnx.Param, dtype: Any) -> Array:
    """A parameter ready for use: cast to `dtype` and gathered along `embed` on every device."""
    return gathered(param[...], axes_of(param), dtype)


def leaf_name(path: tuple[Any, ...]) -> str:
    """Name of a parameter by its path, such as `policy/blocks/q`; nnx's final `.value` is left out."""
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/") or "value"
