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
from jax.extend.core import Literal
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from lm.parallel.rules import device_kind, spec, split_ways, ways

LANES = 128  # the width of a TPU's vector: blocks and the head are multiples of it


class Blocks(NamedTuple):
    """Most queries and keys of a block, in the forward and in the backward kernel."""

    q: int
    kv: int
    q_backward: int
    kv_backward: int


BLOCKS = {"TPU v5 lite": Blocks(512, 512, 512, 1024), "TPU v5": Blocks(1024, 1024, 1024, 1024)}
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
    kernel = _kernel((heads, length), parts, sizes, window, softcap, interpret)
    q, segments = q / math.sqrt(q.shape[-1]), jnp.asarray(segments)
    if mesh.empty:
        return _attend(kernel, q, k, v, segments, segments)
    # A kernel is opaque to the partitioner: each device gets its rows, heads and queries.
    queries = spec(("batch", "heads", "length", None))
    keys, rows = spec(("batch", "kv_heads", None, None)), spec(("batch", None))
    by_place = NamedSharding(mesh, PartitionSpec(None, *spec(("length",))))  # the mask's part for a device's queries
    return jax.shard_map(
        _attend,
        in_specs=(kernel.manual_sharding_spec(by_place), queries, keys, keys, spec(("batch", "length")), rows),
        out_specs=queries,
        check_vma=False,
    )(kernel, q, k, v, segments, segments)


def _attend(kernel: Any, q: Array, k: Array, v: Array, q_segments: Array, k_segments: Array) -> Array:
    return jax.vmap(_row, in_axes=(None, 0, 0, 0, 0, 0))(kernel, q, k, v, q_segments, k_segments)


@jax.custom_vjp
def _row(kernel: Any, q: Array, k: Array, v: Array, q_segments: Array, k_segments: Array) -> Array:
    """One row by the kernel; its gradient too, but for one sum that is written in another way."""
    return _row_forward(kernel, q, k, v, q_segments, k_segments)[0]


def _row_forward(kernel: Any, q: Array, k: Array, v: Array, q_segments: Array, k_segments: Array) -> tuple[Array, Any]:
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    return jax.vjp(lambda q, k, v: kernel(q, k, v, SegmentIds(q_segments, k_segments)), q, k, v)


def _row_backward(pullback: Any, gradient: Array) -> tuple[Array | None, ...]:
    closed = jax.make_jaxpr(pullback)(gradient)
    return None, *_parts_added_one_by_one(closed.jaxpr, closed.consts, [gradient]), None, None


_row.defvjp(_row_forward, _row_backward)


def _parts_added_one_by_one(jaxpr: Any, consts: list[Array], arguments: list[Array]) -> list[Array]:
    """What a traced function gives, a sum over the first of four axes, if it is long, taken as additions in float32.

    The backward kernel leaves a part of the gradient of the queries for each block of keys, bfloat16 [blocks, H, T,
    K], and sums them over that axis, for which the compiler has a slow way: a sixth of the attention's time at 8.
    """
    values: dict[Any, Array] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    for equation in jaxpr.eqns:
        inputs = [x.val if isinstance(x, Literal) else values[x] for x in equation.invars]
        name, inner = equation.primitive.name, equation.params.get("jaxpr")
        if name in ("jit", "pjit") and inner is not None:
            outputs = _parts_added_one_by_one(inner.jaxpr, inner.consts, inputs)
        elif name == "reduce_sum" and equation.params["axes"] == (0,) and inputs[0].ndim == 4 and len(inputs[0]) > 2:
            outputs = [_sum_of_parts(inputs[0])]
        else:
            with jax.named_scope(str(equation.source_info.name_stack) or "splash"):
                outputs = equation.primitive.bind(*inputs, **equation.params)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [x.val if isinstance(x, Literal) else values[x] for x in jaxpr.outvars]


def _sum_of_parts(parts: Float[Array, "P H T K"]) -> Float[Array, "H T K"]:
    # Slices of one long axis: that leaves the compiler no other layout, and it need not transpose.
    size = parts[0].size // parts.shape[-1]
    flat = parts.reshape(-1, parts.shape[-1])
    each = [flat[start : start + size].astype(jnp.float32) for start in range(0, len(flat), size)]
    return functools.reduce(jnp.add, each).astype(parts.dtype).reshape(parts.shape[1:])


def _kernel(shape: tuple[int, int], parts: int, blocks: Blocks, window: int, softcap: float, interpret: bool) -> Any:
    """The causal kernel for one device's heads over rows, (H, T), its mask cut into `parts` along the queries."""
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
    kv, kv_backward = (block_size(length, size) for size in (blocks.kv, blocks.kv_backward))
    sizes = splash_attention.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=min(kv, 512),
        block_q_dkv=q_backward, block_kv_dkv=kv_backward, block_kv_dkv_compute=min(kv_backward, 512),
        block_q_dq=None, block_kv_dq=None, use_fused_bwd_kernel=True,
    )  # fmt: skip
    return splash_attention.make_splash_mha(
        masks.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=parts, block_sizes=sizes,
        attn_logits_soft_cap=softcap or None, residual_checkpoint_name="attention", interpret=interpret,
    )  # fmt: skip
