"""The device programs of the engine: read prompts, put them into lanes, and sample one token of every slot, over and over.

A slot holds one completion in progress, with a cache of its new tokens. A lane holds one prompt, with a cache that all slots of
its group read: a step reads a prompt once for its group. Slots and lanes begin at position 0 of their caches, so a completion
computes the same numbers in any slot, beside any others. Each shard of the batch has slots and lanes of its own.

Shapes: R slots, L lanes, W places of a lane, S tokens of a prompt, N new tokens, P prompts read together, C tokens of a chunk.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lm.experiment import Layer
from lm.model.transformer import Attend, KVCache, Transformer
from lm.parallel.rules import constrain, split_ways
from lm.rollout.sampler import choose, completion_keys
from lm.rollout.slot_cache import (
    Columns,
    attend_columns,
    columns_of,
    empty_columns,
    longest,
    put_token,
    visible_columns,
)
from lm.types import Anywhere, pytree


@pytree
class Slots:
    """Prompts in lanes and completions in slots, with their caches; `hidden` is the state that the next token follows."""

    prompts: tuple[Columns, ...]  # of the lanes, one for each layer
    prompt_lengths: Int[Array, " L"]
    prompt_hidden: Float[Array, "L D"]
    columns: tuple[Columns, ...]  # of the slots' own tokens
    hidden: Float[Array, "R D"]
    steps: Int[Array, " R"]  # tokens sampled so far
    done: Bool[Array, " R"]
    tokens: Int[Array, "R N"]
    logp: Float[Array, "R N"]


@pytree
class Assignment:
    """Which completion is in which slot. A slot without one has limit 0. Lanes and slots are counted within their shard.

    `started` slots begin their completion now; `members` are the slots at the places of a lane (any other number: none).
    """

    started: Bool[Anywhere, " R"]
    prompts: Int[Anywhere, " R"]
    samples: Int[Anywhere, " R"]
    limits: Int[Anywhere, " R"]
    lanes: Int[Anywhere, " R"]
    places: Int[Anywhere, " R"]
    members: Int[Anywhere, "L W"]


sampling_model = jax.jit(Transformer.for_sampling)
decoding_model = jax.jit(Transformer.for_decoding)


# keep_unused: with no argument on a device, the arrays would be of no mesh, and each program would compile once more for them.
@functools.partial(jax.jit, static_argnames=("slots", "lanes", "prompt", "new", "cache"), keep_unused=True)
def empty_slots(model: Transformer, slots: int, lanes: int, prompt: int, new: int, cache: str = "same") -> Slots:
    """Slots and lanes without contents, for prompts of at most `prompt` and completions of at most `new` tokens.

    Args:
        cache: "int8" or "same", see `empty_columns`.
    """
    width, dtype = model.config.embed_dim, jnp.dtype(model.config.compute_dtype)
    made = Slots(
        empty_columns(model.config, lanes, prompt, cache), jnp.zeros(lanes, jnp.int32), jnp.zeros((lanes, width), dtype),
        empty_columns(model.config, slots, new, cache), jnp.zeros((slots, width), dtype), jnp.zeros(slots, jnp.int32), jnp.ones(slots, bool), jnp.zeros((slots, new), jnp.int32), jnp.zeros((slots, new), jnp.float32),
    )  # fmt: skip
    return _placed(made)


@functools.partial(jax.jit, static_argnames=("rows", "prompt"), keep_unused=True)
def empty_reader(model: Transformer, rows: int, prompt: int) -> tuple[KVCache, Float[Array, "P D"]]:
    """A cache for prompts that are read together, and their last hidden states."""
    cache = model.empty_cache(rows, prompt)
    hidden = jnp.zeros((rows, model.config.embed_dim), jnp.dtype(model.config.compute_dtype))
    return _placed((cache, hidden))


@functools.partial(jax.jit, donate_argnames=("cache", "hidden"))
def read_chunk(
    model: Transformer,
    cache: KVCache,
    hidden: Float[Array, "P D"],
    start: Int[Array, ""],
    tokens: Int[Array, "P C"],
    lengths: Int[Array, " P"],
) -> tuple[KVCache, Float[Array, "P D"]]:
    """Read the tokens from column `start` of right-padded prompts; also gives the last hidden state of those that end here."""
    column = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
    # What the cache holds of earlier prompts comes after every token of this chunk, so no query attends to it.
    found, cache = model.extend(cache, start, tokens, column, jnp.ones_like(tokens))
    last = lengths - 1 - start
    mine = jnp.take_along_axis(found, jnp.clip(last, 0, tokens.shape[1] - 1)[:, None, None], axis=1)[:, 0]
    hidden = jnp.where(((last >= 0) & (last < tokens.shape[1]))[:, None], mine, hidden)
    return _placed((cache, hidden))


@functools.partial(jax.jit, donate_argnames=("slots",))
def fill_lanes(
    slots: Slots, cache: KVCache, hidden: Float[Array, "P D"], lengths: Int[Array, " P"], lanes: Int[Array, " P"]
) -> Slots:
    """Copy prompts that have been read into their lanes; a row whose lane does not exist is dropped."""
    shards = split_ways(len(slots.done), "batch")

    def put(old: Array, new: Array) -> Array:
        return _by_shard(lambda x, y, at: x.at[at].set(y, mode="drop"), shards, old, new, lanes)

    read = tuple(
        columns_of(keys, values, lengths, like)
        for keys, values, like in zip(cache.keys, cache.values, slots.prompts, strict=True)
    )
    filled = dataclasses.replace(
        slots,
        prompts=jax.tree.map(put, slots.prompts, read),
        prompt_lengths=put(slots.prompt_lengths, lengths),
        prompt_hidden=put(slots.prompt_hidden, hidden),
    )
    return _placed(filled)


@functools.partial(jax.jit, static_argnames=("top_k", "top_p", "end_ids", "vocab_size"), donate_argnames=("slots",))
def sample_tokens(
    model: Transformer,
    slots: Slots,
    assigned: Assignment,
    key: PRNGKeyArray,
    temperature: float | Float[Array, ""],
    burst: int | Int[Array, ""],
    enough: int | Int[Array, ""],
    *,
    end_ids: tuple[int, ...],
    top_k: int = 0,
    top_p: float = 1.0,
    vocab_size: int | None = None,
) -> Slots:
    """Sample tokens of all slots, until `enough` completions have ended, all have, or each slot has `burst` more tokens.

    Args:
        temperature: 0 is greedy.
        end_ids: the tokens that end a completion.
        vocab_size: see `choose`.
    """
    rows = len(slots.done)
    temperature = jnp.asarray(temperature, jnp.float32)
    keys = completion_keys(key, assigned.prompts, assigned.samples)

    slots, lengths = begin(slots, assigned)
    before = slots.done.sum()

    def going_on(carry: tuple[Array, Slots]) -> Bool[Array, ""]:
        count, slots = carry
        ended = slots.done.sum()
        return (count < burst) & (ended < rows) & (ended - before < enough)

    def one_more(carry: tuple[Array, Slots]) -> tuple[Array, Slots]:
        count, slots = carry
        token, logp = choose(
            whole_rows(model.logits(slots.hidden)), keys, slots.steps, temperature, top_k, top_p, vocab_size
        )
        return count + 1, append(model, slots, assigned, lengths, token, logp, end_ids)

    return _placed(jax.lax.while_loop(going_on, one_more, (jnp.int32(0), slots))[1])


def append(
    model: Transformer,
    slots: Slots,
    assigned: Assignment,
    lengths: Int[Array, " R"],
    token: Int[Array, " R"],
    logp: Float[Array, " R"],
    end_ids: tuple[int, ...],
) -> Slots:
    """The slots with one more token each, read by the model; slots that are done stay as they are.

    Args:
        lengths: length of each slot's prompt.
    """
    rows, new, every = len(slots.done), slots.tokens.shape[1], jnp.arange(len(slots.done))
    token, logp = _placed((token, logp))
    at = jnp.where(slots.done, new, slots.steps)  # what a slot that is done writes is dropped
    done = functools.reduce(operator.or_, (token == one for one in end_ids), slots.done)
    columns = list(slots.columns)
    attend_of = _attention_of(slots, assigned, columns, lengths)
    ones = jnp.ones((rows, 1), jnp.int32)
    found = model.attended(token[:, None], (lengths + slots.steps)[:, None], ones, attend_of)
    steps = slots.steps + ~slots.done
    return dataclasses.replace(
        slots,
        tokens=slots.tokens.at[every, at].set(token, mode="drop"),
        logp=slots.logp.at[every, at].set(logp, mode="drop"),
        columns=tuple(columns),
        hidden=found[:, 0],
        steps=steps,
        done=done | (steps >= assigned.limits),
    )


def begin(slots: Slots, assigned: Assignment) -> tuple[Slots, Int[Array, " R"]]:
    """The slots with the completions that begin now, and the length of each slot's prompt."""
    shared, shards = _sharing(slots, assigned)

    def of_lane(x: Array) -> Array:
        return _by_shard(lambda x, lane: x[lane], shards, x, assigned.lanes) if shared else x

    steps = jnp.where(assigned.started, 0, slots.steps)
    begun = dataclasses.replace(
        slots,
        hidden=jnp.where(assigned.started[:, None], of_lane(slots.prompt_hidden), slots.hidden),
        steps=steps,
        done=(~assigned.started & slots.done) | (steps >= assigned.limits),
    )
    return begun, of_lane(slots.prompt_lengths)


def _sharing(slots: Slots, assigned: Assignment) -> tuple[bool, int]:
    """Whether slots share lanes, and the number of shards of the batch."""
    return assigned.members.shape[1] > 1, split_ways(len(slots.done), "batch")


def _attention_of(
    slots: Slots, assigned: Assignment, columns: list[Columns], lengths: Int[Array, " R"]
) -> Callable[[int, Layer], Attend]:
    """The attention of one new token per slot, over its prompt and its new tokens; puts its key and value into `columns`.

    Args:
        lengths: length of each slot's prompt.
    """
    shared, shards = _sharing(slots, assigned)

    def to_lanes(x: Array) -> Array:
        """What the places of each lane hold, [L, W, ...]; of an empty place, zeros."""
        if not shared:
            return x[:, None]
        return _by_shard(lambda x, at: x.at[at].get(mode="fill", fill_value=0), shards, x, assigned.members)

    def to_slots(x: Array) -> Array:
        if not shared:
            return x[:, 0]
        return _by_shard(lambda x, lane, place: x[lane, place], shards, x, assigned.lanes, assigned.places)

    position, new = to_lanes(lengths + slots.steps), slots.steps + 1
    used_of_prompts, used = longest(lengths, ~slots.done), longest(new, ~slots.done)

    def attend_of(number: int, layer: Layer) -> Attend:
        prompts, size = slots.prompts[number], columns[number].size
        in_prompt = visible_columns(prompts, slots.prompt_lengths, position, layer)
        in_slot = visible_columns(columns[number], new, slots.steps[:, None], layer)
        at = jnp.where(slots.done, size, slots.steps % size)  # what a slot that is done writes is dropped

        def attend(q: Array, k: Array, v: Array) -> Array:
            columns[number] = own = put_token(columns[number], k[:, :, 0], v[:, :, 0], at)
            of_lanes = jnp.swapaxes(to_lanes(q[:, :, 0]), 1, 2)
            of_prompts = attend_columns(of_lanes, prompts, in_prompt, used_of_prompts, layer.softcap)
            back = jax.tree.map(lambda x: to_slots(jnp.swapaxes(x, 1, 2))[:, :, None], of_prompts)
            return attend_columns(q, own, in_slot, used, layer.softcap, back).normalised.astype(q.dtype)

        return attend

    return attend_of


def whole_rows(logits: Float[Array, "R V"]) -> Float[Array, "R V"]:
    """Logits with the vocabulary on one device, and rows split over the devices that split the vocabulary.

    The first constraint keeps the compiler from gathering the head instead.
    """
    if split_ways(len(logits), "sampled") == split_ways(len(logits), "batch"):
        return logits
    return constrain(constrain(logits, "batch", "vocab"), "sampled")


def _placed(tree: Any) -> Any:
    """The arrays with slots, lanes or prompts split over the mesh: always alike, so that no program compiles again."""
    return jax.tree.map(lambda x: constrain(x, *placement(x)), tree)


def placement(x: Array) -> tuple[str, ...]:
    """Logical names of the first dimensions of an array of slots, lanes or prompts: that of the batch, and the heads of a cache."""
    return ("batch", "kv_heads") if x.ndim > 3 else ("batch",)


def _by_shard(function: Callable[..., Array], shards: int, *arrays: Array) -> Array:
    """A function of the rows of one shard, applied to every shard's."""
    found = jax.vmap(function)(*(x.reshape(shards, -1, *x.shape[1:]) for x in arrays))
    return constrain(found.reshape(-1, *found.shape[2:]), "batch")
