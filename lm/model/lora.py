"""LoRA adapters: adds low-rank factors to the linear layers of a model, freezes them, removes them, and merges them."""

from __future__ import annotations

import fnmatch
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from lm.experiment import LoRA, Stage, UserError
from lm.model.linear import Linear, LowRank, column_norms
from lm.model.parameter import axes_of, leaf_name, parameter

M = TypeVar("M", bound=nnx.Module)
Factors = Mapping[str, LowRank | None]
"""Low-rank factors by the path of their linear layer, such as `blocks/attention/q`."""

OWN = ("*/lora/*", "*/score/*", "critic/weight")
"""Path patterns of the parameters that a stage with an adapter trains: its factors, and heads of reward models and critics."""
APART = ("*/lora/*", "*/earlier/*", "score/*")
"""Path patterns of the parameters of a model with an adapter that are not part of its base."""


def linears(model: nnx.Module, path: str = "") -> Iterator[tuple[str, Linear]]:
    """(path, linear layer) of each linear layer of a model; stacked layers count as one."""
    for name, part in vars(model).items():
        where = f"{path}/{name}".lstrip("/")
        if isinstance(part, Linear):
            yield where, part
        elif isinstance(part, nnx.Module):
            yield from linears(part, where)


def has_adapter(model: nnx.Module) -> bool:
    """Whether a model has factors of the current stage, in addition to those of earlier stages."""
    return any(linear.lora is not None for _, linear in linears(model))


def with_adapter(model: M, factors: Factors) -> M:
    """The model with exactly these factors of the current stage; its arrays are shared."""
    model = jax.tree.map(lambda x: x, model)
    for path, linear in linears(model):
        linear.lora = factors.get(path)
    return model


def without_adapter(model: M) -> M:
    """The model without the current stage's factors: the model that entered the stage, as a view that shares its arrays."""
    return with_adapter(model, {})


def base_of(model: M) -> M:
    """The model without the factors of this and of earlier stages, as a view that shares its arrays."""
    model = without_adapter(model)
    for _, linear in linears(model):
        linear.earlier = None
    return model


def sharing_base(model: M, other: M) -> M:
    """The model with the arrays of another one of the same base for all parameters that are not of an adapter."""
    arrays = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(other)}

    def shared(path: tuple[Any, ...], leaf: Any) -> Any:
        name = leaf_name(path)
        return leaf if any(fnmatch.fnmatchcase(name, one) for one in APART) else arrays[name]

    return jax.tree_util.tree_map_with_path(shared, model)


def without_base(model: Any) -> Any:
    """A model with None in place of the parameters of its adapter's base; a model without an adapter is unchanged."""
    if not (isinstance(model, nnx.Module) and has_adapter(model)):
        return model

    def apart(path: tuple[Any, ...], leaf: Any) -> Any:
        return leaf if any(fnmatch.fnmatchcase(leaf_name(path), one) for one in APART) else None

    return jax.tree_util.tree_map_with_path(apart, model)


def freeze_adapter(model: M) -> M:
    """The model with the current stage's factors appended to those of earlier stages: one pair whose rank is the sum of both.

    The sum of the products is the product of the concatenated factors, so nothing is rounded into a weight. DoRA's
    magnitudes become a gain, c, of each output: c·(g·(w + a₁·b₁) + a₂·b₂) = c·g·(w + a₁·b₁ + a₂·b₂/g).
    """
    model = jax.tree.map(lambda x: x, model)
    for _, linear in linears(model):
        if linear.lora is not None:
            linear.earlier, linear.lora = _joined(linear), None
    return model


def merged(model: M, dtype: Any = None) -> M:
    """The model with all factors merged into its weights, computed in float32 and rounded to `dtype` (None: the weights' own)."""
    model = jax.tree.map(lambda x: x, model)
    for _, linear in linears(model):
        if linear.lora is not None or linear.earlier is not None:
            weight = _of_each_layer(Linear.effective, linear)(linear)
            linear.weight = parameter(weight.astype(dtype or linear.weight.dtype), axes_of(linear.weight))
            linear.earlier = linear.lora = None
    return model


def adapted(model: M, stage: Stage, key: PRNGKeyArray, role: str) -> M:
    """The model of a role with new factors by `stage.lora`: a random and b zero, so that its outputs do not change.

    Raises:
        UserError: a pattern of the targets matches no linear layer of the blocks.
    """
    lora, found = stage.lora, {path: one for path, one in linears(model) if "blocks/" in path}
    if not lora.rank or not found:
        return model
    names = {path: path[path.index("blocks/") :] for path in found}
    for pattern in lora.targets:
        if not fnmatch.filter(names.values(), pattern):
            raise UserError(
                f"{stage.name}.lora.targets has {pattern!r}, which matches no linear layer of the blocks; there are "
                f"{', '.join(names.values())}"
            )
    chosen = [path for path in found if any(fnmatch.fnmatchcase(names[path], one) for one in lora.targets or ("*",))]
    return with_adapter(model, {path: _new(found[path], lora, key, f"{role}/{path}") for path in chosen})


def _new(linear: Linear, lora: LoRA, key: PRNGKeyArray, path: str) -> LowRank:
    """New factors: a uniform in ±1/√inputs, as in PEFT, and b zero."""
    shape, names = linear.weight.shape, axes_of(linear.weight)
    first = len(_layers(linear))
    middle = first + linear.inputs
    bound = math.prod(shape[first:middle]) ** -0.5
    own = jax.random.fold_in(key, zlib.crc32(path.encode()))
    dtype = jnp.promote_types(linear.weight.dtype, jnp.float32)
    a = jax.random.uniform(own, (*shape[:middle], lora.rank), dtype, -bound, bound)
    b = jnp.zeros((*shape[:first], lora.rank, *shape[middle:]), dtype)
    magnitude = None
    if lora.dora:
        norms = _of_each_layer(lambda one: column_norms(one.entering(), one.inputs), linear)(linear)
        magnitude = parameter(norms, (*names[:first], *names[middle:]))
    return LowRank(
        parameter(a, (*names[:middle], "rank")), parameter(b, (*names[:first], "rank", *names[middle:])),
        lora.scale, magnitude,
    )  # fmt: skip


def _joined(linear: Linear) -> LowRank:
    """The factors of earlier stages and of the current stage of a linear layer as one pair, without a scale."""
    before, own = linear.earlier, linear.lora
    assert own is not None
    gain = None if own.magnitude is None else _of_each_layer(Linear.gain, linear)(linear, own)
    a, b, at = own.a[...], own.b[...] * own.scale, len(_layers(linear))
    if before is not None:
        if before.magnitude is not None:
            b = b / jnp.expand_dims(before.magnitude[...], at)
            gain = before.magnitude[...] * (1.0 if gain is None else gain)
        a, b = jnp.concatenate([before.a[...], a], -1), jnp.concatenate([before.b[...], b], at)
    names = axes_of(linear.weight)
    outputs = (*names[:at], *names[at + linear.inputs :])
    return LowRank(
        parameter(a, axes_of(own.a)), parameter(b, axes_of(own.b)),
        magnitude=None if gain is None else parameter(gain, outputs), normed=False,
    )  # fmt: skip


def _layers(linear: Linear) -> tuple[str, ...]:
    """("layers",), the name of the leading dimension, if layers are stacked; else ()."""
    return ("layers",) if axes_of(linear.weight)[0] == "layers" else ()


def _of_each_layer(function: Callable[..., Any], linear: Linear) -> Callable[..., Array]:
    """A function of a single linear layer, mapped over the layers if they are stacked."""
    return jax.vmap(function) if _layers(linear) else function
