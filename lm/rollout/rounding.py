"""Quantised samplers: a model whose matrices are rounded to fewer bits than in training, as in an inference engine.

The rounded numbers keep the model's dtype: this shows the effect of rounding on training, not the speed of a quantised engine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lm.model.transformer import Transformer

Weights = Float[Array, "..."]


def to_bfloat16(weights: Weights) -> Weights:
    """Round to bfloat16, which has eight significant bits."""
    return weights.astype(jnp.bfloat16).astype(weights.dtype)


def to_integers(weights: Weights, bits: int) -> Weights:
    """Quantise to integers of `bits` bits with one scale per row (last axis), set by the row's largest value.

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
    """The model with its matrices quantised by a function of ROUNDINGS ("same": as they are); norms stay unchanged."""
    return model if precision == "same" else model.with_matrices(ROUNDINGS[precision])
