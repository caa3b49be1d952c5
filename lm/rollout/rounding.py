"""A model as an inference engine may hold it: its matrices rounded to fewer bits than it is trained with.

The numbers are rounded and stay in the model's own type: what is shown is what the rounding does, not how fast it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lm.model.transformer import Transformer

Weights = Float[Array, "..."]


def to_bfloat16(weights: Weights) -> Weights:
    """8 bits of the fraction, rounded to the nearest."""
    return weights.astype(jnp.bfloat16).astype(weights.dtype)


def to_integers(weights: Weights, bits: int) -> Weights:
    """Whole numbers of `bits` bits times a scale for each row (along the last axis), so that its largest is the largest.

    Source: symmetric absmax quantisation, arXiv:2208.07339, section 2.
    """
    most = 2 ** (bits - 1) - 1
    scale = jnp.abs(weights).max(-1, keepdims=True) / most
    return jnp.round(weights / jnp.where(scale > 0, scale, 1)) * scale


ROUNDINGS: dict[str, Callable[[Weights], Weights]] = {
    "bfloat16": to_bfloat16,
    "int8": functools.partial(to_integers, bits=8),
    "int4": functools.partial(to_integers, bits=4),
}


@functools.partial(jax.jit, static_argnames="precision")
def rounded(model: Transformer, precision: str) -> Transformer:
    """The model with its matrices rounded as ROUNDINGS say; the weights of its norms stay as they are."""

    def change(param: nnx.Variable) -> nnx.Variable:
        norm = "norm" in param.get_metadata("out_sharding")
        return param if norm else jax.tree.map(ROUNDINGS[precision], param)

    return jax.tree.map(change, model, is_leaf=lambda x: isinstance(x, nnx.Variable))
