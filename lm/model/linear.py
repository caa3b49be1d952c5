"""The matrix products of the model, in the form that is fastest on the devices they are for.

On CPU both operands are matrices: with two batch dimensions the gradient of w contracts both, for which XLA leaves its
fast matrix product (half the speed of a SwiGLU layer). On TPU and GPU dimensions stay as they are, so that a projection
writes straight into the layout that attention reads, and no reshape hides from the partitioner which axis is split.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lm.parallel.rules import platform


def project(
    x: Float[Array, "... I"], w: Float[Array, "I O"], preferred: DTypeLike | None = None
) -> Float[Array, "... O"]:
    """x·w over all leading dimensions of x.

    Args:
        preferred: dtype of the result; that of x if None.
    """
    if platform() == "cpu":
        flat = jnp.matmul(x.reshape(-1, x.shape[-1]), w, preferred_element_type=preferred)
        return flat.reshape(*x.shape[:-1], w.shape[1])
    return jnp.einsum("...i,io->...o", x, w, preferred_element_type=preferred)


def to_heads(x: Float[Array, "B T D"], w: Float[Array, "D H K"]) -> Float[Array, "B H T K"]:
    """x·w, head-major."""
    if platform() == "cpu":
        flat = project(x, w.reshape(w.shape[0], -1))
        return flat.reshape(*x.shape[:2], *w.shape[1:]).swapaxes(1, 2)
    return jnp.einsum("btd,dhk->bhtk", x, w)


def from_heads(x: Float[Array, "B H T K"], w: Float[Array, "H K D"]) -> Float[Array, "B T D"]:
    """The heads of a token side by side, times w."""
    if platform() == "cpu":
        merged = x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)
        return project(merged, w.reshape(-1, w.shape[-1]))
    return jnp.einsum("bhtk,hkd->btd", x, w)
