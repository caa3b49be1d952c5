"""Attention on TPUs by JAX's Pallas kernel: blocks of queries and keys, softmax on the way, no [T, T] array in memory.

The kernel knows a causal mask by place and segment ids, which is what packed rows need: inside a segment positions
rise with the place. Source: FlashAttention-2, arXiv 2307.08691; the kernel is jax.experimental.pallas.ops.tpu.
"""

from __future__ import annotations

import functools
import math

import jax
from jaxtyping import Array, Float, Int

from lm.parallel.rules import spec, ways

LANES = 128  # the width of a TPU's vector: blocks and the head are multiples of it


def fits(rows: int, length: int, head_dim: int) -> bool:
    """Whether the kernel takes `rows` rows of `length` tokens and heads of `head_dim`, on the mesh that is set.

    Every device must get as many rows: those of an evaluation may be too few.
    """
    mesh = jax.sharding.get_abstract_mesh()
    divides = mesh.empty or (rows % ways("batch", mesh.shape) == 0 and ways("length", mesh.shape) == 1)
    return divides and length % LANES == 0 and head_dim % LANES == 0


def block_size(length: int, largest: int) -> int:
    """The largest multiple of 128 that divides `length` and is at most `largest`, but at least 128."""
    return max(size for size in range(LANES, max(largest, LANES) + 1, LANES) if length % size == 0)


def splash(
    q: Float[Array, "B H T K"],
    k: Float[Array, "B N T K"],
    v: Float[Array, "B N T K"],
    segments: Int[Array, "B T"],
    block: int,
    interpret: bool = False,
) -> Float[Array, "B H T K"]:
    """softmax(q·kᵀ/√K)·v of each token over the tokens of its segment that are not after it.

    Args:
        block: most queries, and keys, of one block.
        interpret: run the kernel as ordinary operations, on any device; slow, for tests.
    """
    local = functools.partial(_local, block=block_size(q.shape[2], block), interpret=interpret)
    if jax.sharding.get_abstract_mesh().empty:
        return local(q, k, v, segments)
    # A kernel is opaque to the partitioner: each device gets its rows and heads.
    queries, keys = (spec(("batch", name, None, None)) for name in ("heads", "kv_heads"))
    rows = spec(("batch", None))
    whole = jax.shard_map(local, in_specs=(queries, keys, keys, rows), out_specs=queries, check_vma=False)
    return whole(q, k, v, segments)


def _local(q: Array, k: Array, v: Array, segments: Array, block: int, interpret: bool) -> Array:
    # Imported where it is used: it takes a second, and no CPU run needs it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    heads, length, head_dim = q.shape[1:]
    sizes = kernel.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=None, block_kv_dq=None, use_fused_bwd_kernel=True,
    )  # fmt: skip
    causal = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
    attend = kernel.make_splash_mha(causal, head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=interpret)

    def one(q: Array, k: Array, v: Array, segments: Array) -> Array:
        return attend(q, k, v, kernel.SegmentIds(segments, segments))

    return jax.vmap(one)(q / math.sqrt(head_dim), k, v, segments)
