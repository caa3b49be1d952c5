"""The one matrix product of the model: the last dimension of x with the first of w, over all tokens at once."""

from __future__ import annotations

import math

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def project(
    x: Float[Array, "... I"], w: Float[Array, "I ..."], preferred: DTypeLike | None = None
) -> Float[Array, "... O"]:
    """x·w with x's leading dimensions flattened to one, and w's trailing ones too: [..., I] and [I, O] give [..., O].

    With two batch dimensions the gradient of w contracts both, for which XLA on CPU leaves its fast matrix product
    (half the speed of a SwiGLU layer); as a plain matrix product it stays.

    Args:
        preferred: dtype of the result; that of x if None.
    """
    flat = jax.numpy.matmul(x.reshape(-1, w.shape[0]), w.reshape(w.shape[0], -1), preferred_element_type=preferred)
    return flat.reshape(*x.shape[:-1], math.prod(w.shape[1:]))
