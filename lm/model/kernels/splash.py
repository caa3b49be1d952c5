"""Attention on TPUs by Pallas kernels: blocks of queries and keys with an online softmax, without a [T, T] array.

The mask is causal by index in the row, and by segment id; that suffices for packed rows, where positions rise with the index
inside a segment. The kernels are in splash_kernels.py; this file has the code around them: block sizes, devices, gradients.
Source: FlashAttention-2, arXiv 2307.08691.

Where the mesh splits the tokens of a row (`context`), every device keeps its queries and gathers all keys and values.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name as named
from jaxtyping import Array, Float, Int

from lm.model.kernels.splash_kernels import LANES, Shown, Sides, Tiles, attention, gradients, longest
from lm.parallel.row_order import to_zigzag, zigzag_layout
from lm.parallel.rules import constrain, device_kind, spec, ways

COMPUTED = 512  # maximum keys of a block that are computed at a time


class Blocks(NamedTuple):
    """Maximum block sizes of queries and keys, in the forward and in the backward kernel."""

    q: int
    kv: int
    q_backward: int
    kv_backward: int


BLOCKS = {"TPU v5": Blocks(1024, 1024, 1024, 1024), "TPU v6 lite": Blocks(1024, 1024, 1024, 1024)}
"""jax's name of a chip -> the fastest block sizes by the compiler's estimate; other chips use blocks of 512."""


class How(NamedTuple):
    """Static parameters of the kernels: tile sizes of forward and backward pass, and the attention mask."""

    tiles: Tiles
    backward_tiles: Tiles
    shown: Shown
    interpret: bool


def fits(rows: int, length: int, head_dim: int) -> bool:
    """Whether the kernel supports `rows` rows of `length` tokens and heads of `head_dim` on the current mesh.

    Every device must get the same number of rows (an evaluation may have too few), and whole vectors of tokens.
    """
    mesh, cut = jax.sharding.get_abstract_mesh(), zigzag_layout(length)
    divides = mesh.empty or rows % ways("batch", mesh.shape) == 0
    split = mesh.empty or cut.parts == ways("length", mesh.shape)
    return divides and split and length % (LANES * cut.parts * cut.each) == 0 and head_dim % LANES == 0


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
        q, k, v, segments: in device order (lm/parallel/row_order.py) if the mesh splits rows.
        blocks: as `Blocks`; empty: the sizes for the chip.
        window, softcap: as in `lm.model.attention`.
        interpret: run the kernels as ordinary operations, on any device; slow, for tests.
    """
    sizes = Blocks(*blocks) if blocks else BLOCKS.get(device_kind(), Blocks(512, 512, 512, 512))
    length, cut = q.shape[2], zigzag_layout(q.shape[2])
    chunk = length // (cut.parts * cut.each)
    how = How(_tiles(chunk, sizes[:2]), _tiles(chunk, sizes[2:]), Shown(window, softcap), interpret)
    q = q / math.sqrt(q.shape[-1])
    places = to_zigzag(jnp.arange(0, length, chunk, dtype=jnp.int32)[None], cut)[0]
    sides = Sides(segments, segments, places, places)
    if jax.sharding.get_abstract_mesh().empty:
        return _attend(how, q, k, v, sides)
    # Saved for the backward pass are a device's own keys and values, not the gathered rows.
    k, v = (constrain(x, "batch", "kv_heads", "length") for x in (k, v))
    # A kernel is opaque to the partitioner: each device gets its rows, heads and queries.
    queries = spec(("batch", "heads", "length", None))
    keys = spec(("batch", "kv_heads", None, None))
    split: Any = [spec(names) for names in (("batch", "length"), ("batch", None), ("length",), (None,))]
    return jax.shard_map(
        functools.partial(_attend, how),
        in_specs=(queries, keys, keys, Sides(*split)),
        out_specs=queries,
        check_vma=False,
    )(q, k, v, sides)


def _tiles(chunk: int, largest: tuple[int, ...]) -> Tiles:
    kv = block_size(chunk, largest[1])
    return Tiles(block_size(chunk, largest[0]), kv, block_size(kv, COMPUTED))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: How, q: Array, k: Array, v: Array, sides: Sides) -> Array:
    return attention(q, k, v, sides, how.tiles, how.shown, how.interpret)[0]


def _forward(how: How, q: Array, k: Array, v: Array, sides: Sides) -> tuple[Array, tuple]:
    out, logsumexp = attention(q, k, v, sides, how.tiles, how.shown, how.interpret)
    out, logsumexp = named(out, "attention"), named(logsumexp, "attention")
    return out, (q, k, v, sides, out, logsumexp)


def _backward(how: How, kept: tuple, d_out: Array) -> tuple:
    q, k, v, sides, out, logsumexp = kept
    delta = jnp.einsum("bhtk,bhtk->bht", out, d_out, preferred_element_type=jnp.float32)
    most, (q_tile, k_tile, _) = longest(q.shape[-1]), how.backward_tiles
    queries, keys = _pieces(q.shape[2], sides.q_places, q_tile, most), _pieces(k.shape[2], sides.k_places, k_tile, most)
    found = {}
    for (h, q_places), (t, k_places) in itertools.product(queries, keys):
        part = Sides(sides.q_segments[:, h], sides.k_segments[:, t], q_places, k_places)
        found[h.start, t.start] = gradients(
            q[:, :, h], k[:, :, t], v[:, :, t], part, logsumexp[:, :, h], delta[:, :, h], d_out[:, :, h],
            how.backward_tiles, how.shown, how.interpret,
        )  # fmt: skip
    dq = jnp.concatenate([_sum([found[h.start, t.start][0] for t, _ in keys]) for h, _ in queries], axis=2)
    dk, dv = (
        jnp.concatenate([_sum([found[h.start, t.start][x] for h, _ in queries]) for t, _ in keys], axis=2)
        for x in (1, 2)
    )
    return dq, dk, dv, None


_attend.defvjp(_forward, _backward)


def _pieces(length: int, places: Array, tile: int, longest: int) -> list[tuple[slice, Array]]:
    """A device's part of the rows, cut into pieces of limited length, and the start of each piece, or of its chunks, in the row."""
    if length <= longest:
        return [(slice(0, length), places)]
    chunk = length // len(places)
    size = max(size for size in range(tile, max(longest, tile) + 1, tile) if chunk % size == 0)
    return [
        (slice(start, start + size), places[start // chunk, None] + start % chunk) for start in range(0, length, size)
    ]


def _sum(parts: list[Array]) -> Array:
    """The sum, computed in float32 and cast to the dtype of the parts."""
    return sum((part.astype(jnp.float32) for part in parts[1:]), parts[0].astype(jnp.float32)).astype(parts[0].dtype)
