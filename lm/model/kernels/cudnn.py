"""Attention on NVIDIA GPUs by cuDNN's fused kernel, through `jax.nn.dot_product_attention`.

The scores of the heads are never stored; what remains of a [T, T] array is the mask of a row's documents and window, shared by its heads.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lm.model.kernels.on_each_device import on_each_device
from lm.parallel.rules import split_ways, ways

WIDEST_HEAD = 128  # the widest head that every GPU with this kernel supports


def fits(rows: int, length: int, head_dim: int, dtype: str, softcap: float) -> bool:
    """Whether the kernel supports `rows` rows of `length` tokens on this machine's GPUs and the current mesh.

    It reads 16-bit numbers only, has no soft cap, and needs whole rows, the same number on every device.
    """
    if jax.default_backend() != "gpu" or dtype != "bfloat16" or softcap:  # another backend: a plan for GPUs elsewhere
        return False
    mesh = jax.sharding.get_abstract_mesh()
    divides = mesh.empty or rows % ways("batch", mesh.shape) == 0
    whole = split_ways(length, "length") == 1 and length % 2 == 0
    return divides and whole and head_dim % 8 == 0 and head_dim <= WIDEST_HEAD


def cudnn_attention(
    q: Float[Array, "B H T K"],
    k: Float[Array, "B N T K"],
    v: Float[Array, "B N T K"],
    segments: Int[Array, "B T"],
    window: int = 0,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B H T K"]:
    """softmax(q·kᵀ/√K)·v over the tokens of a token's segment that are not after it, and less than `window` before it (0: any)."""
    attend = functools.partial(_attend, window=window, implementation=implementation)
    return on_each_device(attend, q, k, v, segments)


def _attend(
    q: Array, k: Array, v: Array, segments: Array, window: int, implementation: Literal["cudnn", "xla"]
) -> Array:
    mask = segments[:, :, None] == segments[:, None, :]
    if window:
        place = jnp.arange(segments.shape[1])
        mask &= place[:, None] - place < window
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    heads = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], is_causal=True, implementation=implementation)
    return jnp.swapaxes(heads, 1, 2)
