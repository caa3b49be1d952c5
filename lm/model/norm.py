"""RMSNorm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name as named
from jaxtyping import Array, Float

from lm.experiment import Model
from lm.model.parameter import parameter


def rms_norm(
    x: Float[Array, "... D"], scale: Float[Array, "..."], eps: float, axis: int | tuple[int, ...] = -1
) -> Float[Array, "... D"]:
    """RMSNorm, x / rms(x) · scale, in float32 or wider. Source: arXiv 1910.07467 eq. 4."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    normed = wide * named(jax.lax.rsqrt(jnp.mean(wide * wide, axis=axis, keepdims=True) + eps), "rms")
    return (normed * scale.astype(wide.dtype)).astype(x.dtype)


class Norm(nnx.Module):
    """RMSNorm with its scale, over the last dimension, or over heads and head dimensions of a head-major array.

    With `norm_plus_one` the parameter is the scale minus 1, as in Gemma.
    """

    def __init__(self, config: Model, *sizes: int):
        start = jnp.zeros if config.norm_plus_one else jnp.ones
        self.scale = parameter(start(sizes, jnp.dtype(config.param_dtype)), ("norm",) * len(sizes))
        self.eps, self.plus_one = config.norm_eps, config.norm_plus_one

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.scale[...]
        if self.plus_one:
            scale = 1 + scale.astype(jnp.promote_types(scale.dtype, jnp.float32))
        if scale.ndim == 1:
            return rms_norm(x, scale, self.eps)
        return rms_norm(x, scale[:, None], self.eps, axis=(-3, -1))
