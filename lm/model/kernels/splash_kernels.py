"""Two Pallas kernels for TPUs: causal attention block by block, and its gradients with their sums kept on the chip.

Score blocks have the keys along the first axis, so that the numbers of a query (maximum, sum, δ) form a row of a vector
register. Fully masked blocks are neither fetched nor computed. With s the scaled scores,

    out = softmax(s)·v,  p = exp(s - logsumexp),  δ = Σ out·d_out
    dv = pᵀ·d_out    ds = p ∘ (d_out·vᵀ - δ)    dk = dsᵀ·q    dq = ds·k

All three gradient sums of a head stay in vector memory, in float32, until they are complete. The alternative, a partial dq for
every block of keys, costs memory and time that grow with the square of the row's length.
Source: FlashAttention-2, arXiv 2307.08691, sec. 3.1.
"""

from __future__ import annotations

import functools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lm.parallel.rules import device_kind

LANES = 128  # width of a TPU vector
MASKED = -1e30

MIB = 2**20
VECTOR_MEMORY = {"TPU v5 lite": 128 * MIB, "TPU v5": 64 * MIB, "TPU v6 lite": 128 * MIB, "TPU7x": 64 * MIB}
"""jax's name of a chip -> bytes of a core's vector memory; 16 MiB on all others. Half of it is for the sums of a head."""
WORK = 24 * MIB  # limit, within the other half, on blocks in transfer and values computed from them


class Tiles(NamedTuple):
    """Numbers of queries and keys in a block, and of keys that are computed at a time."""

    q: int
    kv: int
    compute: int


class Shown(NamedTuple):
    """The attention mask of the kernels, as in `lm.model.attention`."""

    window: int
    softcap: float


class Sides(NamedTuple):
    """Segments of the queries and of the keys, and the start of each of their equal chunks in the row."""

    q_segments: Int[Array, "B T"]
    k_segments: Int[Array, "B S"]
    q_places: Int[Array, " M"]
    k_places: Int[Array, " N"]


def longest(head_dim: int) -> int:
    """Maximum number of queries and keys whose three gradient sums fit into the vector memory of the devices."""
    return _vector_memory() // 2 // (3 * head_dim * 4)


def _vector_memory() -> int:
    return VECTOR_MEMORY.get(device_kind(), 16 * MIB)


def attention(
    q: Float[Array, "B H T K"],
    k: Float[Array, "B N S K"],
    v: Float[Array, "B N S K"],
    sides: Sides,
    tiles: Tiles,
    shown: Shown,
    interpret: bool = False,
) -> tuple[Float[Array, "B H T K"], Float[Array, "B H T"]]:
    """(softmax(s)·v, log Σ exp s) for queries that are already scaled; every query must have at least one unmasked key."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (b, h, t, d), (n, s) = q.shape, k.shape[1:3]
    group, grid = h // n, (b, h, t // tiles.q, s // tiles.kv)
    pair = _pair(sides, grid[2:], tiles, shown)

    def near(i: Array, j: Array, *places: Any) -> Array:
        """The block of keys to fetch; for a masked block the first one, with which the next queries begin."""
        return jnp.where(pair(i, j, *places)[2], j, 0)

    of_queries = pl.BlockSpec((None, None, tiles.q, d), lambda b, h, i, j, *p: (b, h, i, 0))
    of_keys = pl.BlockSpec((None, None, tiles.kv, d), lambda b, h, i, j, *p: (b, h // group, near(i, j, *p), 0))
    number = pl.BlockSpec((None, None, 1, tiles.q), lambda b, h, i, j, *p: (b, h, 0, i))
    call = _call(
        functools.partial(_attention_kernel, pair=pair, tiles=tiles, shown=shown, last_j=grid[3] - 1),
        grid, parallel=3,
        in_specs=[
            of_queries, of_keys, of_keys,
            pl.BlockSpec((None, 1, tiles.q), lambda b, h, i, j, *p: (b, 0, i)),
            pl.BlockSpec((None, tiles.kv, LANES), lambda b, h, i, j, *p: (b, near(i, j, *p), 0)),
        ],
        out_specs=[of_queries, number],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, h, 1, t), jnp.float32)],
        scratch_shapes=[pltpu.VMEM((rows, tiles.q), jnp.float32) for rows in (1, 1, d)],
        name="splash_mha_fwd", tiles=tiles, shown=shown, sums=0, interpret=interpret,
    )  # fmt: skip
    out, logsumexp = call(sides.q_places, sides.k_places, q, k, v, *_segments(sides))
    return out, logsumexp[:, :, 0]


def gradients(
    q: Float[Array, "B H T K"],
    k: Float[Array, "B N S K"],
    v: Float[Array, "B N S K"],
    sides: Sides,
    logsumexp: Float[Array, "B H T"],
    delta: Float[Array, "B H T"],
    d_out: Float[Array, "B H T K"],
    tiles: Tiles,
    shown: Shown,
    interpret: bool = False,
) -> tuple[Float[Array, "B H T K"], Float[Array, "B N S K"], Float[Array, "B N S K"]]:
    """(dq, dk, dv) of `attention`.

    Args:
        delta: Σ out·d_out of every query, float32.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (b, h, t, d), (n, s) = q.shape, k.shape[1:3]
    group = h // n
    grid = (b, n, group, s // tiles.kv, t // tiles.q)
    last_g, last_j, last_i = (size - 1 for size in grid[2:])

    pair = _pair(sides, (grid[4], grid[3]), tiles, shown)

    def near(j: Array, i: Array, *places: Any) -> Array:
        """The block of queries to fetch; for a masked block, the last, which often attends to the next keys."""
        return jnp.where(pair(i, j, *places)[2], i, last_i)

    of_queries = pl.BlockSpec((None, None, tiles.q, d), lambda b, n, g, j, i, *p: (b, n * group + g, near(j, i, *p), 0))
    of_keys = pl.BlockSpec((None, None, tiles.kv, d), lambda b, n, g, j, i, *p: (b, n, j, 0))
    number = pl.BlockSpec((None, None, 1, tiles.q), lambda b, n, g, j, i, *p: (b, n * group + g, 0, near(j, i, *p)))
    # A result block is written to HBM when the output index changes; so the index stays 0 until the sums are complete.
    to_queries = pl.BlockSpec(
        (None, None, tiles.q, d), lambda b, n, g, j, i, *p: (b, n * group + g, jnp.where(j == last_j, i, 0), 0)
    )
    to_keys = pl.BlockSpec((None, None, tiles.kv, d), lambda b, n, g, j, i, *p: (b, n, jnp.where(g == last_g, j, 0), 0))
    call = _call(
        functools.partial(_gradients_kernel, pair=pair, tiles=tiles, shown=shown, last=(last_g, last_j, last_i)),
        grid, parallel=2,
        in_specs=[
            of_queries, of_keys, of_keys,
            pl.BlockSpec((None, 1, tiles.q), lambda b, n, g, j, i, *p: (b, 0, near(j, i, *p))),
            pl.BlockSpec((None, tiles.kv, LANES), lambda b, n, g, j, i, *p: (b, j, 0)),
            number, number, of_queries,
        ],
        out_specs=[to_queries, to_keys, to_keys],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
        scratch_shapes=[pltpu.VMEM((size, d), jnp.float32) for size in (t, s, s)],
        name="splash_mha_dkv", tiles=tiles, shown=shown, sums=(t + 2 * s) * d * 4, interpret=interpret,
    )  # fmt: skip
    numbers = logsumexp[:, :, None], delta[:, :, None]
    return call(sides.q_places, sides.k_places, q, k, v, *_segments(sides), *numbers, d_out)


def _call(
    kernel: Any, grid: tuple[int, ...], parallel: int, *, in_specs: list, out_specs: list, out_shape: list,
    scratch_shapes: list, name: str, tiles: Tiles, shown: Shown, sums: int, interpret: bool,
) -> Any:  # fmt: skip
    """Call a kernel over a grid whose first `parallel` axes are independent; its first inputs are the chunk starts.

    Args:
        sums: bytes of the vector memory for the scratch.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    order: list[Any] = ["parallel"] * parallel + ["arbitrary"] * (len(grid) - parallel)
    # `lm plan` recognises attention kernels by their names, and reads blocks and window from this.
    suffix = "_dkv" if name.endswith("_dkv") else ""
    sizes = {f"block_q{suffix}": tiles.q, f"block_kv{suffix}": tiles.kv, f"block_kv{suffix}_compute": tiles.compute}
    sizes |= {"window": shown.window} if shown.window else {}
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=grid, in_specs=in_specs, out_specs=out_specs, scratch_shapes=scratch_shapes
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=order,
            vmem_limit_bytes=sums + min(WORK, _vector_memory() // 2),
        ),
        name=name,
        interpret=interpret,
        metadata={"xprof_metadata": json.dumps(sizes)},
    )


def _segments(sides: Sides) -> tuple[Int[Array, "B 1 T"], Int[Array, "B S lanes"]]:
    """Segments in the layout of score blocks: those of queries as a row, those of keys as a column."""
    b, s = sides.k_segments.shape
    return sides.q_segments[:, None], jnp.broadcast_to(sides.k_segments[:, :, None], (b, s, LANES))


def _pair(sides: Sides, blocks: tuple[int, ...], tiles: Tiles, shown: Shown) -> Any:
    """(block of queries, block of keys, chunk starts) -> start of each in the row, and whether any key is unmasked.

    Args:
        blocks: number of blocks of queries and of keys.
    """
    each = blocks[0] // len(sides.q_places), blocks[1] // len(sides.k_places)  # blocks of a chunk

    def pair(i: Array, j: Array, q_places: Any, k_places: Any) -> tuple[Array, Array, Array]:
        q = q_places[lax.div(i, each[0])] + lax.rem(i, each[0]) * tiles.q
        k = k_places[lax.div(j, each[1])] + lax.rem(j, each[1]) * tiles.kv
        seen = k <= q + tiles.q - 1
        if shown.window:
            seen &= k + tiles.kv - 1 > q - shown.window
        return q, k, seen

    return pair


def _attention_kernel(
    q_places, k_places, q, k, v, q_segments, k_segments, out, logsumexp, largest, total, sums,
    *, pair, tiles, shown, last_j,
):  # fmt: skip
    """One block of queries of one head against one block of keys."""
    from jax.experimental import pallas as pl

    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _begin():
        largest[...], total[...] = jnp.full_like(largest, MASKED), jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    of_q, of_k, seen = pair(i, j, q_places, k_places)

    @pl.when(seen)
    def _work():
        for start in range(0, tiles.kv, tiles.compute):
            here, places = pl.ds(start, tiles.compute), (of_q, of_k + start)
            scores, _ = _scores(q[...], k[here, :], (q_segments[...], k_segments[here, :1]), places, shown)
            new = jnp.maximum(largest[...], scores.max(0, keepdims=True))
            p, rescale = jnp.exp(scores - new), jnp.exp(largest[...] - new)
            largest[...], total[...] = new, total[...] * rescale + p.sum(0, keepdims=True)
            sums[...] = sums[...] * rescale + _product(v[here, :], p.astype(v.dtype), (0, 0))

    @pl.when(j == last_j)
    def _end():
        out[...] = (sums[...] / total[...]).T.astype(out.dtype)
        logsumexp[...] = largest[...] + jnp.log(total[...])


def _gradients_kernel(
    q_places, k_places, q, k, v, q_segments, k_segments, logsumexp, delta, d_out, dq, dk, dv, sum_q, sum_k, sum_v,
    *, pair, tiles, shown, last,
):  # fmt: skip
    """One block of queries of one head against one block of keys."""
    from jax.experimental import pallas as pl

    g, j, i = (pl.program_id(axis) for axis in (2, 3, 4))
    of_queries = pl.ds(i * tiles.q, tiles.q)

    @pl.when((j == 0) & (i == 0))
    def _a_head_begins():
        sum_q[...] = jnp.zeros_like(sum_q)

    @pl.when((g == 0) & (j == 0) & (i == 0))
    def _a_group_begins():
        sum_k[...], sum_v[...] = jnp.zeros_like(sum_k), jnp.zeros_like(sum_v)

    of_q, of_k, seen = pair(i, j, q_places, k_places)

    @pl.when(seen)
    def _work():
        for start in range(0, tiles.kv, tiles.compute):
            here, there = pl.ds(start, tiles.compute), pl.ds(j * tiles.kv + start, tiles.compute)
            places = of_q, of_k + start
            scores, slope = _scores(q[...], k[here, :], (q_segments[...], k_segments[here, :1]), places, shown)
            p = jnp.exp(scores - logsumexp[...])
            ds = p * (_product(v[here, :], d_out[...], (1, 1)) - delta[...]) * slope
            sum_v[there, :] += _product(p.astype(d_out.dtype), d_out[...], (1, 0))
            sum_k[there, :] += _product(ds.astype(q.dtype), q[...], (1, 0))
            sum_q[of_queries, :] += _product(ds.astype(k.dtype), k[here, :], (0, 0))

    @pl.when(j == last[1])
    def _queries_are_whole():
        dq[...] = sum_q[of_queries, :].astype(dq.dtype)

    @pl.when((g == last[0]) & (i == last[2]))
    def _keys_are_whole():
        of_keys = pl.ds(j * tiles.kv, tiles.kv)
        dk[...], dv[...] = sum_k[of_keys, :].astype(dk.dtype), sum_v[of_keys, :].astype(dv.dtype)


def _scores(q, k, segments, places, shown: Shown):
    """(masked scores [k, q], derivative of the scores by the product q·k).

    Args:
        segments: of the queries, as a row, and of the keys, as a column.
        places: index of the first query and of the first key in the row.
    """
    scores = _product(k, q, (1, 1))
    slope: Array | float = 1.0
    if shown.softcap:
        squeezed = jnp.tanh(scores / shown.softcap)
        scores, slope = shown.softcap * squeezed, 1 - squeezed * squeezed
    of_query = places[0] + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    back = of_query - places[1] - lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    mask = (segments[0] == segments[1]) & (back >= 0)
    if shown.window:
        mask &= back < shown.window
    return jnp.where(mask, scores, MASKED), slope


def _product(left: Array, right: Array, over: tuple[int, int]) -> Array:
    """left·right contracted over these axes, summed in float32."""
    return lax.dot_general(left, right, (((over[0],), (over[1],)), ((), ())), preferred_element_type=jnp.float32)
