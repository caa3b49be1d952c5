"""The matrix products of the model, in the form that is fastest on the devices they are for.

On CPU both operands are matrices: with two batch dimensions the gradient of w contracts both, for which XLA leaves its
fast matrix product (half the speed of a SwiGLU layer). On TPU and GPU dimensions stay as they are, so that a projection
writes straight into the layout that attention reads, and no reshape hides from the partitioner which axis is split.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lm.parallel.rules import one_device, platform


def project(
    x: Float[Array, "... I"], w: Float[Array, "I O"], preferred: DTypeLike | None = None
) -> Float[Array, "... O"]:
    """x·w over all leading dimensions of x.

    Args:
        preferred: dtype of the result; that of x if None.
    """
    if platform() == "cpu":
        flat = _matmul(x.reshape(-1, x.shape[-1]), w, preferred or x.dtype)
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


# ---- the product of two matrices on CPU --------------------------------------------------------------------------


def transposed(x: Float[Array, "... M N"]) -> Float[Array, "... N M"]:
    """x with its last two dimensions exchanged in memory, where XLA would only note that they are.

    Its fast product on CPU wants the left operand to contract on its last dimension; a transpose before it is folded
    into the product, which is then two to three times slower in bfloat16. Through a reshape and a barrier it is not.
    """
    y = jnp.swapaxes(x, -1, -2)
    if not one_device() or y.shape[-1] % 2:
        return y
    halves = y.reshape(*y.shape[:-1], y.shape[-1] // 2, 2)
    return jax.lax.optimization_barrier(halves).reshape(y.shape)


def _matmul(x: Float[Array, "M I"], w: Float[Array, "I O"], dtype: DTypeLike) -> Float[Array, "M O"]:
    """x·w added up in float32 at least, in `dtype`."""
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def dot(a: Array, b: Array, axis: int) -> Array:
        return jax.lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=wide)

    @jax.custom_vjp
    def product(x: Array, w: Array) -> Array:
        return dot(x, w, 0).astype(dtype)

    def forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
        return product(x, w), (x, w)

    def backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
        x, w = kept
        dy = dy.astype(x.dtype)
        return dot(dy, w, 1).astype(x.dtype), dot(transposed(x), dy, 0).astype(w.dtype)

    product.defvjp(forward, backward)
    return product(x, w)
