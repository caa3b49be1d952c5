"""Attention on TPUs by JAX's Pallas kernel: blocks of queries and keys, softmax on the way, no [T, T] array in memory.

The kernel knows a causal mask by place and segment ids, which is what packed rows need: inside a segment positions
rise with the place. Source: FlashAttention-2, arXiv 2307.08691; the kernel is jax.experimental.pallas.ops.tpu.

Where the mesh splits the tokens of a row (`context`), every device keeps its queries and gathers all keys and values.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name as named
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from lm.model import splash_backward
from lm.model.splash_backward import LANES, Shown, Tiles
from lm.parallel.rules import device_kind, spec, split_ways, ways

COMPUTED = 512  # most keys of a block that are worked on at a time


class Blocks(NamedTuple):
    """Most queries and keys of a block, in the forward and in the backward kernel."""

    q: int
    kv: int
    q_backward: int
    kv_backward: int


BLOCKS = {"TPU v5 lite": Blocks(512, 512, 512, 512), "TPU v5": Blocks(1024, 1024, 1024, 1024)}
"""The best found for a chip, by jax's name of it, by the compiler's estimate; others take v5's."""


def fits(rows: int, length: int, head_dim: int) -> bool:
    """Whether the kernel takes `rows` rows of `length` tokens and heads of `head_dim`, on the mesh that is set.

    Every device must get as many rows (those of an evaluation may be too few), and whole vectors of tokens.
    """
    mesh = jax.sharding.get_abstract_mesh()
    divides = mesh.empty or rows % ways("batch", mesh.shape) == 0
    return (
        divides and length % (LANES * (1 if mesh.empty else ways("length", mesh.shape))) == 0 and head_dim % LANES == 0
    )


def block_size(length: int, largest: int) -> int:
    """The largest multiple of 128 that divides `length` and is at most `largest`, but at least 128."""
    return max(size for size in range(LANES, max(largest, LANES) + 1, LANES) if length % size == 0)


def splash(
    q: Float[Array, "B H T K"],
    k: Float[Array, "B N T K"],
    v: Float[Array, "B N T K"],
    segments: Int[Array, "B T"],
    blocks: tuple[int, ...] = (),
    window: int = 0,
    softcap: float = 0.0,
    interpret: bool = False,
) -> Float[Array, "B H T K"]:
    """softmax(q·kᵀ/√K)·v of each token over the tokens of its segment that are not after it.

    Args:
        blocks: as `Blocks`; empty: what suits the chip.
        window, softcap: as in `lm.model.attention`.
        interpret: run the kernel as ordinary operations, on any device; slow, for tests.
    """
    sizes = Blocks(*blocks) if blocks else BLOCKS.get(device_kind(), BLOCKS["TPU v5"])
    mesh = jax.sharding.get_abstract_mesh()
    length, parts = q.shape[2], split_ways(q.shape[2], "length")
    heads = q.shape[1] // split_ways(q.shape[1], "heads")
    kept = splash_backward.fits(length // parts, length, q.shape[-1])
    kernel = _kernel((heads, length), parts, sizes, window, softcap, interpret, kept)
    attend = _attend
    if kept:
        tiles = Tiles(block_size(length // parts, sizes.q_backward), *_keys_of(length, sizes.kv_backward))
        attend = functools.partial(_attend_with_own_gradients, tiles, Shown(window, softcap), interpret)
    q = q / math.sqrt(q.shape[-1])
    if mesh.empty:
        return attend(kernel, q, k, v, segments, segments, jnp.zeros(1, jnp.int32))
    # A kernel is opaque to the partitioner: each device gets its rows, heads and queries.
    queries = spec(("batch", "heads", "length", None))
    keys, rows = spec(("batch", "kv_heads", None, None)), spec(("batch", None))
    axis = spec(("length",))
    by_place = NamedSharding(mesh, PartitionSpec(None, *axis))  # the mask's part for a device's queries
    places = jnp.arange(parts, dtype=jnp.int32) * (length // parts)  # of the first query of each part
    return jax.shard_map(
        attend,
        in_specs=(kernel.manual_sharding_spec(by_place), queries, keys, keys, spec(("batch", "length")), rows, axis),
        out_specs=queries,
        check_vma=False,
    )(kernel, q, k, v, segments, segments, places)


def _attend(kernel: Any, q: Array, k: Array, v: Array, q_segments: Array, k_segments: Array, place: Array) -> Any:
    """The kernel's result for each row; where it was made for that, with the logarithm of every query's sum."""
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    def row(q: Array, k: Array, v: Array, q_segments: Array, k_segments: Array) -> Array:
        return kernel(q, k, v, SegmentIds(q_segments, k_segments))

    return jax.vmap(row)(q, k, v, q_segments, k_segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend_with_own_gradients(tiles: Tiles, shown: Shown, interpret: bool, *inputs: Any) -> Array:
    return _attend(*inputs)[0]


def _forward(tiles: Tiles, shown: Shown, interpret: bool, *inputs: Any) -> tuple[Array, tuple]:
    out, (logsumexp,) = _attend(*inputs)
    out, logsumexp = named(out, "attention"), named(logsumexp, "attention")
    return out, (*inputs[1:], out, logsumexp)


def _backward(tiles: Tiles, shown: Shown, interpret: bool, kept: tuple, d_out: Array) -> tuple:
    q, k, v, q_segments, k_segments, place, out, logsumexp = kept
    delta = jnp.einsum("bhtk,bhtk->bht", out, d_out, preferred_element_type=jnp.float32)
    found = splash_backward.gradients(
        q, k, v, (q_segments, k_segments), place, logsumexp, delta, d_out, tiles, shown, interpret
    )
    return None, *found, None, None, None


_attend_with_own_gradients.defvjp(_forward, _backward)


def _keys_of(length: int, largest: int) -> tuple[int, int]:
    """Keys of a block, and those worked on at a time."""
    kv = block_size(length, largest)
    return kv, min(kv, COMPUTED)


def _kernel(
    shape: tuple[int, int], parts: int, blocks: Blocks, window: int, softcap: float, interpret: bool, forward: bool
) -> Any:
    """The causal kernel for one device's heads over rows, (H, T), its mask cut into `parts` along the queries.

    Args:
        forward: it gives no gradients, but what they need: (result, (logarithm of every query's sum,)).
    """
    # Imported where it is used: it takes a second, and no CPU run needs it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_attention
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    heads, length = shape
    mask: masks.Mask
    if window:
        mask = masks.LocalMask((length, length), (window - 1, 0), offset=0, shard_count=parts)
    else:
        mask = masks.CausalMask((length, length), shard_count=parts)
    q, q_backward = (block_size(length // parts, size) for size in (blocks.q, blocks.q_backward))
    (kv, compute), (kv_backward, compute_backward) = (
        _keys_of(length, size) for size in (blocks.kv, blocks.kv_backward)
    )
    sizes = splash_attention.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=compute,
        block_q_dkv=q_backward, block_kv_dkv=kv_backward, block_kv_dkv_compute=compute_backward,
        block_q_dq=None, block_kv_dq=None, use_fused_bwd_kernel=True,
    )  # fmt: skip
    return splash_attention.make_splash_mha(
        masks.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=parts, block_sizes=sizes,
        attn_logits_soft_cap=softcap or None, residual_checkpoint_name="attention", interpret=interpret,
        save_residuals=forward,
    )  # fmt: skip
