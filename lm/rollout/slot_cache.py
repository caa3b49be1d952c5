"""Keys and values of lanes and slots, with the attention of new tokens over them.

A column holds a token; a layer with a window has columns for its window only, and a new token replaces the oldest. On a CPU the columns are
in blocks of 64, with the tokens of a key block last, for which its products are several times as fast; and a step reads only the chunks of
blocks that the longest of its prompts and completions use. Masked columns count exactly 0, so that it changes no bit which are read.

Shapes: R rows (slots or lanes), H key heads, K head_dim, N blocks of a chunk, C columns of a block.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lm.experiment import Layer, Model
from lm.model.attention import PartialHeads, attend_partly, join_parts, keys_turned, turned
from lm.parallel.rules import one_device, platform
from lm.types import pytree

BLOCK = 64  # columns of a block on a CPU
CHUNKS = 4  # most chunks of blocks that are read or not


@pytree
class Chunk:
    """Keys or values of some blocks, int8 with a scale for each head of a column, or as they were computed."""

    numbers: Array  # [R H N C K], of keys where `keys_turned` says so [R H N K C]
    scales: Float[Array, "R H N C"] | None


@pytree
class Columns:
    """Keys and values of one layer, in chunks."""

    keys: tuple[Chunk, ...]
    values: tuple[Chunk, ...]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(blocks, columns of a block) of each chunk."""
        return [(x.numbers.shape[2], x.numbers.shape[3]) for x in self.values]

    @property
    def size(self) -> int:
        """Number of columns."""
        return sum(blocks * width for blocks, width in self.shapes)


def empty_columns(config: Model, rows: int, length: int, cache: str = "same") -> tuple[Columns, ...]:
    """Columns of each layer for `length` tokens of each row, without contents.

    Args:
        cache: "int8": int8 numbers with scales; "same": numbers as they are computed.
    """
    # A CPU converts bfloat16 arrays to float32 and back when a column is written, and its products are no faster.
    dtype = jnp.dtype(config.compute_dtype)
    dtype = jnp.promote_types(dtype, jnp.float32) if platform() == "cpu" else dtype

    def empty(chunk: tuple[int, int]) -> Chunk:
        shape = rows, config.num_kv_heads, *chunk
        # Separate arrays, so that a caller may donate them.
        if cache == "int8":
            return Chunk(jnp.zeros((*shape, config.head_dim), jnp.int8), jnp.zeros(shape, jnp.float32))
        return Chunk(jnp.zeros((*shape, config.head_dim), dtype), None)

    def of_layer(layer: Layer) -> Columns:
        chunks = chunks_of(length, layer.window)
        keys = (empty(chunk) for chunk in chunks)
        return Columns(
            tuple(dataclasses.replace(x, numbers=turned(x.numbers)) for x in keys), tuple(map(empty, chunks))
        )

    return tuple(of_layer(config.layer(number)) for number in range(config.num_layers))


def _stored(x: Float[Array, "... K"], like: Chunk) -> tuple[Array, Float[Array, "..."] | None]:
    """Keys or values as numbers and scales of a chunk."""
    if like.scales is None:
        return x.astype(like.numbers.dtype), None
    wide = x.astype(jnp.float32)
    scales = jnp.maximum(jnp.abs(wide).max(-1), 1e-20) / 127
    return jnp.round(wide / scales[..., None]).astype(jnp.int8), scales


def _numbers(chunk: Chunk, dtype: DTypeLike, turned: bool = False) -> Array:
    """Keys or values of a chunk."""
    if chunk.scales is None:
        return chunk.numbers
    return chunk.numbers.astype(dtype) * jnp.expand_dims(chunk.scales, -2 if turned else -1).astype(dtype)


def chunks_of(length: int, window: int = 0) -> list[tuple[int, int]]:
    """(blocks, columns of a block) of each chunk, for `length` tokens of which a window is visible (0: all).

    The first chunk is one block: short prompts in a cache for long ones read no more.
    """
    length = min(length, window or length)
    if platform() != "cpu" or length <= BLOCK:
        return [(1, length)]
    blocks = -(-length // BLOCK)
    parts = min(CHUNKS, blocks) if one_device() else 1
    if parts == 1:
        return [(blocks, BLOCK)]
    rest, others = blocks - 1, parts - 1
    return [(1, BLOCK), *((rest * (i + 1) // others - rest * i // others, BLOCK) for i in range(others))]


def put_token(cache: Columns, k: Float[Array, "R H K"], v: Float[Array, "R H K"], at: Int[Array, " R"]) -> Columns:
    """The columns with the key and value of one token of each row in column `at`; one beyond all columns is dropped."""
    rows, start, keys, values = jnp.arange(len(at)), 0, [], []
    for key, value, (blocks, width) in zip(cache.keys, cache.values, cache.shapes, strict=True):
        inside = (at >= start) & (at < start + blocks * width)
        block, column = jnp.where(inside, (at - start) // width, blocks), (at - start) % width
        place = rows, slice(None), block, column
        keys.append(_put(key, k, place, (*place[:3], slice(None), column) if keys_turned() else place))
        values.append(_put(value, v, place, place))
        start += blocks * width
    return Columns(tuple(keys), tuple(values))


def _put(chunk: Chunk, x: Float[Array, "R H K"], place: tuple[Any, ...], of_numbers: tuple[Any, ...]) -> Chunk:
    numbers, scales = _stored(x, chunk)
    numbers = chunk.numbers.at[of_numbers].set(numbers, mode="drop")
    if chunk.scales is None or scales is None:
        return Chunk(numbers, None)
    return Chunk(numbers, chunk.scales.at[place].set(scales, mode="drop"))


def columns_of(
    keys: Float[Array, "P H S K"], values: Float[Array, "P H S K"], lengths: Int[Array, " P"], like: Columns
) -> Columns:
    """Keys and values of prompts in columns like those of a lane: of a prompt that is longer, its last tokens."""
    size = like.size

    def chunks(x: Array) -> list[Chunk]:
        if size < x.shape[2]:
            token = _last_in(jnp.arange(size), lengths[:, None], size)
            x = jnp.take_along_axis(x, jnp.maximum(token, 0)[:, None, :, None], axis=2)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, size - x.shape[2]), (0, 0)))
        found, start = [], 0
        for one, (blocks, width) in zip(like.values, like.shapes, strict=True):
            part = x[:, :, start : start + blocks * width].reshape(*x.shape[:2], blocks, width, -1)
            found.append(Chunk(*_stored(part, one)))
            start += blocks * width
        return found

    of_keys = (dataclasses.replace(x, numbers=turned(x.numbers)) for x in chunks(keys))
    return Columns(tuple(of_keys), tuple(chunks(values)))


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

    def joined(part: PartialHeads | None, keys: Chunk, values: Chunk, mask: Array) -> PartialHeads:
        found = attend_partly(q, _numbers(keys, q.dtype, keys_turned()), _numbers(values, q.dtype), mask, softcap)
        return found if part is None else join_parts(part, found)

    part, start = before, 0
    for keys, values, (blocks, width) in zip(cache.keys, cache.values, cache.shapes, strict=True):
        chunk = keys, values, mask[:, :, start : start + blocks * width]
        if start == 0:
            part = joined(part, *chunk)
        else:
            part = jax.lax.cond(used > start, joined, lambda part, *_: part, part, *chunk)
        start += blocks * width
    assert part is not None
    return part


def longest(lengths: Int[Array, " R"], of: Bool[Array, " R"]) -> Int[Array, ""]:
    """The largest length `of` some rows."""
    return jnp.where(of, lengths, 0).max()
