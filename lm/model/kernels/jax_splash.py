"""Attention on TPUs by jax's own splash kernel, for devices on which lm's kernel disagrees with plain attention.

It supports only rows in the order of the text. Source: jax.experimental.pallas.ops.tpu.splash_attention.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lm.model.kernels.on_each_device import on_each_device
from lm.model.kernels.splash import block_size

BLOCK = 512  # maximum queries, and maximum keys, of a block


def jax_splash(
    q: Float[Array, "B H T K"],
    k: Float[Array, "B N T K"],
    v: Float[Array, "B N T K"],
    segments: Int[Array, "B T"],
    window: int = 0,
    softcap: float = 0.0,
    interpret: bool = False,
) -> Float[Array, "B H T K"]:
    """Like `lm.model.kernels.splash.splash`, for a mesh that does not split rows."""
    attend = functools.partial(_attend, window=window, softcap=softcap, interpret=interpret)
    q = q / math.sqrt(q.shape[-1])
    return on_each_device(attend, q, k, v, segments)


def _attend(q: Array, k: Array, v: Array, segments: Array, window: int, softcap: float, interpret: bool) -> Array:
    # Only TPUs need them, and every start of a run would load them.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    rows, heads, length, width = q.shape
    group = heads // k.shape[1]
    size = block_size(length, BLOCK)
    mask: masks.Mask = masks.CausalMask((length, length))
    if window:
        mask = masks.LocalMask((length, length), (window - 1, 0), 0)
    kernel = kernels.make_splash_mqa_single_device(
        masks.MultiHeadMask([mask] * group),
        block_sizes=kernels.BlockSizes(
            block_q=size, block_kv=size, block_kv_compute=size, block_q_dkv=size, block_kv_dkv=size,
            block_kv_dkv_compute=size, use_fused_bwd_kernel=True,
        ),
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )  # fmt: skip

    def row(q: Array, k: Array, v: Array, segments: Array) -> Array:
        return jax.vmap(lambda *heads: kernel(*heads, kernels.SegmentIds(segments, segments)))(q, k, v)

    grouped = jax.vmap(row)(q.reshape(rows, -1, group, length, width), k, v, segments)
    return jnp.reshape(grouped, q.shape)
