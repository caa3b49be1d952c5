"""In which order the tokens of a row lie on the devices that split it (mesh axis `context`).

A token looks at all before it, so that of C equal parts the last has almost twice the work of the mean. ZigzagLayout into 2C
chunks instead, device i takes the chunks i and 2C-1-i: an early one and a late one, the same work for all.
Source: Llama 3 (arXiv 2407.21783) sec. 3.3.2.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from lm.parallel.rules import split_ways


class ZigzagLayout(NamedTuple):
    """Rows over `parts` devices, in `each` chunks a device."""

    parts: int
    each: int


WHOLE = ZigzagLayout(1, 1)


def zigzag_layout(length: int) -> ZigzagLayout:
    """How rows of this length are cut on the mesh that is set: in two chunks a device, or one where that is uneven."""
    parts = split_ways(length, "length")
    return ZigzagLayout(parts, 2 if parts > 1 and length % (2 * parts) == 0 else 1)


def to_zigzag(x: Array, cut: ZigzagLayout, axis: int = 1) -> Array:
    """From the order of the text to that of the devices, along `axis`; the same where a device has one chunk."""
    if cut.each == 1:
        return x
    pieces = x.reshape(*x.shape[:axis], 2 * cut.parts, -1, *x.shape[axis + 1 :])
    early, late = jnp.split(pieces, 2, axis=axis)
    return jnp.stack([early, jnp.flip(late, axis)], axis + 1).reshape(x.shape)


def from_zigzag(x: Array, cut: ZigzagLayout, axis: int = 1) -> Array:
    """What `to_zigzag` did, undone."""
    if cut.each == 1:
        return x
    pieces = x.reshape(*x.shape[:axis], cut.parts, 2, -1, *x.shape[axis + 1 :])
    early, late = (jnp.take(pieces, i, axis + 1) for i in (0, 1))
    return jnp.concatenate([early, jnp.flip(late, axis)], axis).reshape(x.shape)
