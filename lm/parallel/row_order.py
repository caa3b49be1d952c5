"""Zigzag order of a row's tokens over the devices of the mesh axis `context`, which balances causal attention.

A token attends to all before it, so that of C equal parts the last has almost twice the mean work. With 2C
chunks instead, device i holds chunks i and 2C-1-i, an early and a late one: equal work for all.
Source: Llama 3 (arXiv 2407.21783) sec. 3.3.2.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from lm.parallel.rules import split_ways


class ZigzagLayout(NamedTuple):
    """Layout of a row over `parts` devices, with `each` chunks per device."""

    parts: int
    each: int


WHOLE = ZigzagLayout(1, 1)


def zigzag_layout(length: int) -> ZigzagLayout:
    """The layout of rows of this length on the current mesh: two chunks per device, or one where that is uneven."""
    parts = split_ways(length, "length")
    return ZigzagLayout(parts, 2 if parts > 1 and length % (2 * parts) == 0 else 1)


def to_zigzag(x: Array, cut: ZigzagLayout, axis: int = 1) -> Array:
    """Reorder from text order to zigzag order along `axis`; the identity with one chunk per device."""
    if cut.each == 1:
        return x
    pieces = x.reshape(*x.shape[:axis], 2 * cut.parts, -1, *x.shape[axis + 1 :])
    early, late = jnp.split(pieces, 2, axis=axis)
    return jnp.stack([early, jnp.flip(late, axis)], axis + 1).reshape(x.shape)


def from_zigzag(x: Array, cut: ZigzagLayout, axis: int = 1) -> Array:
    """Reorder from zigzag order back to text order; the inverse of `to_zigzag`."""
    if cut.each == 1:
        return x
    pieces = x.reshape(*x.shape[:axis], cut.parts, 2, -1, *x.shape[axis + 1 :])
    early, late = (jnp.take(pieces, i, axis + 1) for i in (0, 1))
    return jnp.concatenate([early, jnp.flip(late, axis)], axis).reshape(x.shape)
