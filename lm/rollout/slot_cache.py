"""Keys and values of lanes and slots, with the attention of new tokens over them.

A column holds a token; a layer with a window has columns for its window only, and a new token replaces the oldest. On a CPU the columns are
in blocks of 64, with the tokens of a key block last, for which its products are several times as fast; and a step reads only the chunks of
blocks that the longest of its prompts and completions use. Masked columns count exactly 0, so that it changes no bit which are read.

Shapes: R rows (slots or lanes), H key heads, K head_dim, N blocks of a chunk, C columns of a block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lm.experiment import Layer, Model
from lm.model.attention import PartialHeads, attend_partly, join_parts, keys_turned, turned
from lm.parallel.rules import one_device, platform
from lm.types import pytree

BLOCK = 64  # columns of a block on a CPU
CHUNKS = 4  # most chunks of blocks that are read or not


@pytree
class Columns:
    """Keys and values of one layer, one array for each chunk; keys are [R H N C K] where `keys_turned` says no."""

    keys: tuple[Float[Array, "R H N K C"], ...]
    values: tuple[Float[Array, "R H N C K"], ...]

    @property
    def size(self) -> int:
        """Number of columns."""
        return sum(x.shape[2] * x.shape[3] for x in self.values)


def empty_columns(config: Model, rows: int, length: int) -> tuple[Columns, ...]:
    """Columns of each layer for `length` tokens of each row, without contents."""
    return tuple(_empty(config, rows, length, config.layer(number)) for number in range(config.num_layers))


def _empty(config: Model, rows: int, length: int, layer: Layer) -> Columns:
    # A CPU converts bfloat16 arrays to float32 and back when a column is written, and its products are no faster.
    dtype = jnp.dtype(config.compute_dtype)
    dtype = jnp.promote_types(dtype, jnp.float32) if platform() == "cpu" else dtype
    shapes = [(rows, config.num_kv_heads, *chunk, config.head_dim) for chunk in chunks_of(length, layer.window)]
    # Separate arrays, so that a caller may donate them.
    return Columns(
        tuple(turned(jnp.zeros(shape, dtype)) for shape in shapes), tuple(jnp.zeros(shape, dtype) for shape in shapes)
    )


def chunks_of(length: int, window: int = 0) -> list[tuple[int, int]]:
    """(blocks, columns of a block) of each chunk, for `length` tokens of which a window is visible (0: all)."""
    length = min(length, window or length)
    if platform() != "cpu" or length <= BLOCK:
        return [(1, length)]
    blocks = -(-length // BLOCK)
    parts = min(CHUNKS, blocks) if one_device() else 1
    return [(blocks * (i + 1) // parts - blocks * i // parts, BLOCK) for i in range(parts)]


def put_token(cache: Columns, k: Float[Array, "R H K"], v: Float[Array, "R H K"], at: Int[Array, " R"]) -> Columns:
    """The columns with the key and value of one token of each row in column `at`; one beyond all columns is dropped."""
    rows, start, found = jnp.arange(len(at)), 0, Columns((), ())
    for keys, values in zip(cache.keys, cache.values, strict=True):
        blocks, width = values.shape[2:4]
        inside = (at >= start) & (at < start + blocks * width)
        block, column = jnp.where(inside, (at - start) // width, blocks), (at - start) % width
        place = (rows, slice(None), block, slice(None), column) if keys_turned() else (rows, slice(None), block, column)
        keys = keys.at[place].set(k.astype(keys.dtype), mode="drop")
        values = values.at[rows, :, block, column].set(v.astype(values.dtype), mode="drop")
        found, start = Columns((*found.keys, keys), (*found.values, values)), start + blocks * width
    return found


def columns_of(
    keys: Float[Array, "P H S K"], values: Float[Array, "P H S K"], lengths: Int[Array, " P"], like: Columns
) -> Columns:
    """Keys and values of prompts in columns like those of a lane: of a prompt that is longer, its last tokens."""

    def chunks(x: Array) -> list[Array]:
        size = like.size
        if size < x.shape[2]:
            token = _last_in(jnp.arange(size), lengths[:, None], size)
            x = jnp.take_along_axis(x, jnp.maximum(token, 0)[:, None, :, None], axis=2)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, size - x.shape[2]), (0, 0)))
        found, start = [], 0
        for one in like.values:
            blocks, width = one.shape[2:4]
            part = x[:, :, start : start + blocks * width]
            found.append(part.reshape(*x.shape[:2], blocks, width, -1).astype(one.dtype))
            start += blocks * width
        return found

    return Columns(tuple(map(turned, chunks(keys))), tuple(chunks(values)))


def _last_in(column: Int[Array, "..."], length: Int[Array, "..."], size: int) -> Int[Array, "..."]:
    """The last of `length` tokens in a column, of `size`; negative if there is none."""
    return length - 1 - (length - 1 - column) % size


def visible_columns(
    cache: Columns, lengths: Int[Array, " R"], after: Int[Array, "R T"], layer: Layer
) -> Bool[Array, "R _ S"]:
    """Attention mask of the columns for queries `after` so many tokens of their row, of which `lengths` are in its columns."""
    token = _last_in(jnp.arange(cache.size), lengths[:, None], cache.size)[:, None]
    window = layer.window
    return (token >= 0) & (after[:, :, None] - token < window if window else True)


def attend_columns(
    q: Float[Array, "R Q T K"],
    cache: Columns,
    mask: Bool[Array, "R _ S"],
    used: Int[Array, ""],
    softcap: float,
    before: PartialHeads | None = None,
) -> PartialHeads:
    """Attention over the columns, joined with the attention over what was `before`.

    Args:
        used: columns that no row has used are after this number.
    """

    def joined(part: PartialHeads | None, keys: Array, values: Array, mask: Array) -> PartialHeads:
        found = attend_partly(q, keys, values, mask, softcap)
        return found if part is None else join_parts(part, found)

    part, start = before, 0
    for keys, values in zip(cache.keys, cache.values, strict=True):
        end = start + values.shape[2] * values.shape[3]
        chunk = keys, values, mask[:, :, start:end]
        if start == 0:
            part = joined(part, *chunk)
        else:
            part = jax.lax.cond(used > start, joined, lambda part, *_: part, part, *chunk)
        start = end
    assert part is not None
    return part


def longest(lengths: Int[Array, " R"], of: Bool[Array, " R"]) -> Int[Array, ""]:
    """The largest length `of` some rows."""
    return jnp.where(of, lengths, 0).max()
