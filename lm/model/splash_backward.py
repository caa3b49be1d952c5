"""Gradients of block-wise attention on TPUs by one Pallas kernel that keeps their sums on the chip.

A kernel that forms the queries' gradient block by block has to write a part for every block of keys and leave their sum
to the compiler: memory and time that grow with the square of the row. Here all three sums of a head stay in the chip's
vector memory, float32, until they are whole. With s the scaled scores, p = exp(s - logsumexp) and δ = Σ out·d_out,

    dv = pᵀ·d_out    ds = p ∘ (d_out·vᵀ - δ)    dk = dsᵀ·q    dq = ds·k

Source: FlashAttention-2, arXiv 2307.08691, sec. 3.1.2.
"""

from __future__ import annotations

import functools
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lm.parallel.rules import device_kind

LANES = 128  # the width of a TPU's vector
MASKED = -1e30

MIB = 2**20
VECTOR_MEMORY = {"TPU v5 lite": 128 * MIB, "TPU v5": 96 * MIB, "TPU v6 lite": 128 * MIB, "TPU7x": 64 * MIB}
"""Bytes of a core's vector memory, by jax's name of the chip; 16 MiB on others."""
WORK = 24 * MIB  # blocks that come and go, and what is computed of them


class Tiles(NamedTuple):
    """Queries and keys of a block, and keys that are worked on at a time."""

    q: int
    kv: int
    compute: int


class Shown(NamedTuple):
    """Which keys a query is shown besides the order: see `lm.model.attention`."""

    window: int
    softcap: float


def fits(queries: int, keys: int, head_dim: int) -> bool:
    """Whether the sums of one head's gradients leave room for the work in the vector memory of the devices."""
    return _sums(queries, keys, head_dim) + WORK <= VECTOR_MEMORY.get(device_kind(), 16 * MIB)


def _sums(queries: int, keys: int, head_dim: int) -> int:
    """Bytes of the float32 sums for dq, dk and dv of one head."""
    return (queries + 2 * keys) * head_dim * 4


def gradients(
    q: Float[Array, "B H T K"],
    k: Float[Array, "B N S K"],
    v: Float[Array, "B N S K"],
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]],
    offset: Int[Array, "1"],
    logsumexp: Float[Array, "B H T"],
    delta: Float[Array, "B H T"],
    d_out: Float[Array, "B H T K"],
    tiles: Tiles,
    shown: Shown,
    interpret: bool = False,
) -> tuple[Float[Array, "B H T K"], Float[Array, "B N S K"], Float[Array, "B N S K"]]:
    """(dq, dk, dv) of causal attention over segments; the queries are scaled already.

    Args:
        segments: of the queries and of the keys.
        offset: the place of the first query among the keys.
        delta: Σ out·d_out of every query, float32.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (b, h, t, d), (n, s) = q.shape, k.shape[1:3]
    group, blocks = h // n, (s // tiles.kv, t // tiles.q)
    grid = (b, n, group, *blocks)
    block = pl.BlockSpec

    def near(j: Array, i: Array, offset: Array) -> Array:
        """The block of queries to have at hand: where keys j show nothing to block i, one that is needed later."""
        first, last = _needed(j, tiles, shown, offset[0])
        return jnp.clip(jnp.clip(i, first, last), 0, blocks[1] - 1)

    def of_queries(*shape: int) -> pl.BlockSpec:
        return block((None, None, *shape), lambda b, n, g, j, i, o: (b, n * group + g, near(j, i, o), 0))

    of_keys = block((None, None, tiles.kv, d), lambda b, n, g, j, i, o: (b, n, j, 0))
    a_number = block((None, None, 1, tiles.q), lambda b, n, g, j, i, o: (b, n * group + g, 0, near(j, i, o)))
    # A result leaves the chip when the next block's begins: until its own turn comes, every block claims to be the first.
    to_queries = block(
        (None, None, tiles.q, d), lambda b, n, g, j, i, o: (b, n * group + g, jnp.where(j == blocks[0] - 1, i, 0), 0)
    )
    to_keys = block((None, None, tiles.kv, d), lambda b, n, g, j, i, o: (b, n, jnp.where(g == group - 1, j, 0), 0))
    name = "splash_mha_dkv_whole"  # estimators know attention kernels by this name, and their blocks by the metadata
    with jax.named_scope(name):
        dq, dk, dv = pl.pallas_call(
            functools.partial(_kernel, tiles=tiles, shown=shown, grid=grid),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=grid,
                in_specs=[
                    of_queries(tiles.q, d), of_keys, of_keys,
                    block((None, 1, tiles.q), lambda b, n, g, j, i, o: (b, 0, near(j, i, o))),
                    block((None, tiles.kv, LANES), lambda b, n, g, j, i, o: (b, j, 0)),
                    a_number, a_number, of_queries(tiles.q, d),
                ],
                out_specs=[to_queries, to_keys, to_keys],
                scratch_shapes=[pltpu.VMEM((size, d), jnp.float32) for size in (t, s, s)],
            ),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"),
                vmem_limit_bytes=_sums(t, s, d) + WORK,
            ),
            name=name,
            interpret=interpret,
            metadata={
                "xprof_metadata": json.dumps(
                    {"block_q_dkv": tiles.q, "block_kv_dkv": tiles.kv, "block_kv_dkv_compute": tiles.compute}
                )
            },
        )(
            offset, q, k, v, segments[0][:, None], jnp.broadcast_to(segments[1][:, :, None], (b, s, LANES)),
            logsumexp[:, :, None], delta[:, :, None], d_out,
        )  # fmt: skip
    return dq, dk, dv


def _needed(j: Array, tiles: Tiles, shown: Shown, offset: Array) -> tuple[Array, Array]:
    """The first and the last block of queries that are shown a key of block j; they may lie outside the row."""
    first = lax.div(jnp.maximum(j * tiles.kv - offset, 0), tiles.q)
    if not shown.window:
        return first, jnp.int32(2**30)
    end = (j + 1) * tiles.kv - 1 + shown.window - 1 - offset  # the last query that is shown the last key
    return first, jnp.where(end < 0, -1, lax.div(end, tiles.q))


def _kernel(
    offset, q, k, v, q_segments, k_segments, logsumexp, delta, d_out, dq, dk, dv, sum_q, sum_k, sum_v, *, tiles, shown, grid
):  # fmt: skip
    """One block of queries against one block of keys, of one head: all refs are in the chip's memory."""
    from jax.experimental import pallas as pl

    g, j, i = (pl.program_id(axis) for axis in (2, 3, 4))
    last_g, last_j, last_i = (at == size - 1 for at, size in zip((g, j, i), grid[2:], strict=True))

    @pl.when((j == 0) & (i == 0))
    def _a_head_begins():
        sum_q[...] = jnp.zeros_like(sum_q)

    @pl.when((g == 0) & (j == 0) & (i == 0))
    def _a_group_begins():
        sum_k[...], sum_v[...] = jnp.zeros_like(sum_k), jnp.zeros_like(sum_v)

    first, last = _needed(j, tiles, shown, offset[0])
    of_queries = pl.ds(i * tiles.q, tiles.q)

    @pl.when((first <= i) & (i <= last))
    def _work():
        places = offset[0] + i * tiles.q, j * tiles.kv
        for start in range(0, tiles.kv, tiles.compute):
            here, there = pl.ds(start, tiles.compute), pl.ds(j * tiles.kv + start, tiles.compute)
            part = k[here, :], v[here, :], k_segments[here, :1]
            add_q, add_k, add_v = _block(
                q[...],
                d_out[...],
                (q_segments[...], logsumexp[...], delta[...]),
                part,
                (places[0], places[1] + start),
                shown,
            )
            sum_q[of_queries, :] += add_q
            sum_k[there, :] += add_k
            sum_v[there, :] += add_v

    @pl.when(last_j)
    def _queries_are_whole():
        dq[...] = sum_q[of_queries, :].astype(dq.dtype)

    @pl.when(last_g & last_i)
    def _keys_are_whole():
        of_keys = pl.ds(j * tiles.kv, tiles.kv)
        dk[...], dv[...] = sum_k[of_keys, :].astype(dk.dtype), sum_v[of_keys, :].astype(dv.dtype)


def _block(q, d_out, of_queries, of_keys, places, shown: Shown):
    """What queries [q, K] and keys [k, K] add to (dq, dk, dv). Scores stand with the keys along the first axis."""
    q_segments, logsumexp, delta = of_queries
    k, v, k_segments = of_keys
    scores = _product(k, q, (1, 1))
    if shown.softcap:
        squeezed = jnp.tanh(scores / shown.softcap)
        scores = shown.softcap * squeezed
    back = (
        places[0] + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        - places[1] - lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    )  # fmt: skip
    mask = (k_segments == q_segments) & (back >= 0)
    if shown.window:
        mask &= back < shown.window
    p = jnp.exp(jnp.where(mask, scores, MASKED) - logsumexp)
    ds = p * (_product(v, d_out, (1, 1)) - delta)
    if shown.softcap:
        ds *= 1 - squeezed * squeezed
    add_v = _product(p.astype(d_out.dtype), d_out, (1, 0))
    add_k = _product(ds.astype(q.dtype), q, (1, 0))
    return _product(ds.T.astype(k.dtype), k, (1, 0)), add_k, add_v


def _product(left: Array, right: Array, over: tuple[int, int]) -> Array:
    """left·right over these axes, the sum in float32."""
    return lax.dot_general(left, right, (((over[0],), (over[1],)), ((), ())), preferred_element_type=jnp.float32)
