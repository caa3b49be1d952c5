"""The decoder: an embedding, blocks in a repeating pattern, a head; a pytree of parameters with methods.

Shapes: B batch, T tokens, D embed, H query heads, N key heads, K head_dim, F mlp, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lm.experiment import Layer, Model
from lm.model.attention import (
    attend,
    attention_mask,
    attention_of,
    rope_angles,
    rope_attention_factor,
    rope_frequencies,
)
from lm.model.block import Block
from lm.model.linear import Embedding, Linear, TransposedWeight, project, transpose_weights
from lm.model.norm import Norm
from lm.model.parameter import axes_of, gather, leaf_name, parameter, stack_layers
from lm.model.shared_prompt import shared_attention_of
from lm.parallel.row_order import WHOLE, from_zigzag, to_zigzag, zigzag_layout
from lm.parallel.rules import constrain, one_device, platform, shardings
from lm.types import Aux, SharedPrompt, pytree

PRODUCTS = ("qkv", "attention", "mid", "mlp", "rms")
REMAT: dict[str, Callable[..., Any]] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "minimal": jax.checkpoint_policies.save_only_these_names("qkv", "attention"),
    "dots": jax.checkpoint_policies.save_only_these_names(*PRODUCTS),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["qkv", "attention"],
        offload_src="device", offload_dst="pinned_host",
    ),
}  # fmt: skip
"""Model.remat -> names (given below) of the values that the forward pass saves of a block, besides the block's input."""


Attend = Callable[[Array, Array, Array], Array]
"""Queries, keys and values to heads, head-major."""


def _embed_std(config: Model) -> float:
    """Initial standard deviation of the embedding: 1, or small if it is also the head, so that the first logits are small."""
    return 0.02 if config.tied_head else 1.0


@pytree
class KVCache:
    """Keys and values of the tokens so far, one array per layer, with their positions and segments.

    A slot with segment 0 is empty: no query attends to it.
    """

    keys: tuple[Float[Array, "B N S K"], ...]
    values: tuple[Float[Array, "B N S K"], ...]
    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"]


def write(into: Callable[[Array, Array], Array], old: Array, new: Array) -> Array:
    """`into(old, new)`, which puts `new` into some places of `old`; on CPU bfloat16 numbers are written as integers.

    XLA would convert all of `old` to float32 there, and the result back.
    """
    new = new.astype(old.dtype)
    if platform() != "cpu" or old.dtype != jnp.bfloat16:
        return into(old, new)
    bits = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.uint16)
    return jax.lax.bitcast_convert_type(into(bits(old), bits(new)), old.dtype)


class Transformer(nnx.Module):
    """A language model. `Transformer(config, vocab_size, key)` inside `jax.eval_shape` is abstract."""

    def __init__(self, config: Model, vocab_size: int, key: PRNGKeyArray):
        self.config = c = config
        embed_key, block_key, head_key = jax.random.split(key, 3)
        self.embed = Embedding(embed_key, _embed_std(c), c.param_dtype, vocab_size, c.embed_dim)
        # The initial outputs of blocks are small beside the embedding; otherwise they hide the tokens' identity, and learning
        # to copy takes several times as many steps.
        block = functools.partial(Block, c, out_std=_embed_std(c) * (2 * c.num_layers) ** -0.5)
        self.blocks = stack_layers(block, jax.random.split(block_key, c.num_layers))
        self.norm = Norm(c, c.embed_dim)
        narrow, vocab = {"embed": c.embed_dim}, {"vocab": vocab_size}
        self.head = None if c.tied_head else Linear(head_key, c.embed_dim**-0.5, c.param_dtype, narrow, vocab)

    @property
    def vocab_size(self) -> int:
        return self.embed.weight[...].shape[0]

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segments: Int[Array, "B T"], causal: bool = True
    ) -> Float[Array, "B T V"]:
        """Logits of the next token at every position, float32."""
        return self.logits(self.hidden(tokens, positions, segments, causal=causal)[0])

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        shared: SharedPrompt | None = None,
        causal: bool = True,
        branches: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Aux]:
        """The last hidden state of each token, normed; and the metrics of the layers by name, such as a router's loss.

        Args:
            shared: set if the rows are folded, each a prompt and all its answers (shared_prompt.py).
            causal: False: a token attends to its whole segment, as in an encoder.
            branches: continuations of one context in one segment, each a branch (`attention_of`); its positions begin after
                those of the context. The rows are not split over devices.
        """
        c, whole = self.config, shared or branches is not None
        cut = WHOLE if whole else zigzag_layout(tokens.shape[1])
        tokens, positions, segments = (to_zigzag(x, cut) for x in (tokens, positions, segments))
        x = self._embed(tokens)

        def kind(layer: Layer) -> Callable[[Array, Block], tuple[Array, Aux]]:
            """The function that the layers of one kind apply to the residual stream."""
            angles = self._angles(positions, layer)
            if shared:
                attend = shared_attention_of(c, layer, positions, segments, shared)
            else:
                attend = attention_of(c, layer, positions, segments, causal=causal, branches=branches)

            def run(x: Array, block: Block) -> tuple[Array, Aux]:
                return block(x, angles, attend, segments)

            return run if c.remat == "none" else jax.checkpoint(run, policy=REMAT[c.remat], prevent_cse=False)

        x, aux = _scan_layers(c, {layer: kind(layer) for layer in c.period}, x, self.blocks)
        return from_zigzag(self.norm(x), cut), aux

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Scores of every token of the vocabulary, in `config.logits_dtype` (float64 for a float64 model)."""
        dtype = jnp.promote_types(hidden.dtype, jnp.dtype(self.config.logits_dtype))
        weight, cap = self.embed.weight[...].T if self.head is None else self.head.weight, self.config.final_softcap
        if isinstance(weight, TransposedWeight):
            logits = weight.project(hidden, dtype)
        else:
            logits = project(hidden, weight[...].astype(hidden.dtype), preferred=dtype)
        return cap * jnp.tanh(logits / cap) if cap else logits

    def with_whole_tables(self) -> Transformer:
        """This model with embedding and head in the compute dtype and gathered along `embed` on every device.

        A training step calls it once: a tied table is read twice, but gathered, and its gradient reduced, only once.
        """
        model = jax.tree.map(lambda x: x, self)
        for part in (model.embed, model.head):
            if part is not None:
                whole = gather(part.weight, jnp.dtype(self.config.compute_dtype))
                part.weight = parameter(whole, axes_of(part.weight))
        return model

    def first_layers(self, count: int) -> Transformer:
        """The first `count` layers of this model, without final norm and head."""
        model = jax.tree.map(lambda x: x, self)
        if count < self.config.num_layers:
            model.config = dataclasses.replace(self.config, num_layers=count)
            model.blocks = jax.tree.map(lambda x: x[:count], self.blocks)
        return model

    def with_matrices(self, change: Callable[[Array], Array]) -> Transformer:
        """This model with a function applied to its matrices; norms and biases are unchanged."""

        def changed(path: tuple, x: Array) -> Array:
            return change(x) if leaf_name(path).endswith("weight") else x

        return jax.tree_util.tree_map_with_path(changed, self)

    def for_sampling(self) -> Transformer:
        """This model with its matrices in the compute dtype: cast once, not for every token.

        Its parameters are placed by the rules on the current mesh, which may be another one than that of this model. Its
        blocks are a tuple with separate arrays for each layer; a loop would copy them out of the stack in every iteration.
        """
        dtype = jnp.dtype(self.config.compute_dtype)
        model = self.with_matrices(lambda x: x.astype(dtype))
        if not one_device():
            places = shardings(model, jax.sharding.get_abstract_mesh())
            model = jax.lax.with_sharding_constraint(model, places)
        model.blocks = nnx.data(jax.lax.optimization_barrier(self._layers(model.blocks)))
        return model

    def for_decoding(self) -> Transformer:
        """This model of `for_sampling` for reading one token of each row: on one CPU device with its weights transposed."""
        model = jax.tree.map(lambda x: x, self)
        for part in (*model.blocks, model) if platform() == "cpu" and one_device() else ():
            transpose_weights(part)
        return model

    def _layers(self, blocks: Block | tuple[Block, ...]) -> tuple[Block, ...]:
        return blocks if isinstance(blocks, tuple) else _apart(blocks, self.config.num_layers)

    def empty_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `length` tokens per row."""
        c = self.config
        shape, dtype = (batch, c.num_kv_heads, length, c.head_dim), jnp.dtype(c.compute_dtype)
        # Separate arrays, so that a caller may donate the cache.
        keys, values = (tuple(jnp.zeros(shape, dtype) for _ in range(c.num_layers)) for _ in range(2))
        return KVCache(keys, values, jnp.zeros((batch, length), jnp.int32), jnp.zeros((batch, length), jnp.int32))

    def extend(
        self,
        cache: KVCache,
        start: Int[Array, ""],
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Hidden states of new tokens, given the tokens in the cache; their keys and values go into the slots from `start`.

        Layers are unrolled, so that each layer's cache is updated in place.
        """
        c = self.config

        def put(old: Array, new: Array, axis: int) -> Array:
            return write(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, axis), old, new)

        slot_positions, slot_segments = put(cache.positions, positions, 1), put(cache.segments, segments, 1)
        keys, values = list(cache.keys), list(cache.values)
        masks: dict[Layer, Bool[Array, "B T S"]] = {
            layer: attention_mask(positions, slot_positions, segments, slot_segments, layer.window)
            for layer in c.period
        }

        def attend_cached(number: int, layer: Layer) -> Attend:
            def attend_slots(q: Array, k: Array, v: Array) -> Array:
                keys[number], values[number] = put(keys[number], k, 2), put(values[number], v, 2)
                return attend(q, keys[number], values[number], masks[layer], layer.softcap)

            return attend_slots

        hidden = self.attended(tokens, positions, segments, attend_cached)
        return hidden, KVCache(tuple(keys), tuple(values), slot_positions, slot_segments)

    def attended(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        attend_of: Callable[[int, Layer], Attend],
    ) -> Float[Array, "B T D"]:
        """Hidden states of tokens, with the attention function of each layer, which keeps keys and values where it likes."""
        c, x = self.config, self._embed(tokens)
        angles = {layer: self._angles(positions, layer) for layer in c.period}
        for number, block in enumerate(self._layers(self.blocks)):
            layer = c.layer(number)
            x, _ = block(x, angles[layer], attend_of(number, layer), segments)
        return self.norm(x)

    def _embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The residual stream before the first block."""
        dtype = jnp.dtype(self.config.compute_dtype)
        x = constrain(self.embed(tokens, dtype), "batch", "length", "act_embed")
        scale = self.config.embed_scale
        return x if scale == 1 else x * jnp.asarray(scale, dtype)

    def _angles(self, positions: Int[Array, "B T"], layer: Layer) -> tuple[Array, Array]:
        c, scaling = self.config, layer.rope_scaling
        frequencies = rope_frequencies(c.rotated, layer.rope_theta, scaling, c.max_len)
        return rope_angles(positions, frequencies, rope_attention_factor(scaling))


def _scan_layers(
    config: Model,
    kinds: dict[Layer, Callable[[Array, Block], tuple[Array, Aux]]],
    x: Float[Array, "B T D"],
    blocks: Block,
) -> tuple[Float[Array, "B T D"], Aux]:
    """The residual stream after all layers, and the sums of their metrics: a scan over the periods of the pattern.

    Layers after the last complete period are unrolled.
    """
    period, count = config.period, config.num_layers
    size = len(period)
    turns = count // size

    def body(x: Array, some: Block) -> tuple[Array, Aux]:
        found = []
        for layer, block in zip(period, _apart(some, size) if size > 1 else (some,), strict=True):
            x, aux = kinds[layer](x, block)
            found.append(aux)
        return x, _total(found)

    whole = blocks
    if size > 1:
        whole = jax.tree.map(lambda w: w[: turns * size].reshape(turns, size, *w.shape[1:]), blocks)
    x, stacked = jax.lax.scan(body, x, whole, unroll=max(1, min(config.scan_unroll, count) // size))
    found = [jax.tree.map(lambda each: each.sum(0), stacked)]
    for number in range(turns * size, count):
        x, aux = kinds[config.layer(number)](x, jax.tree.map(lambda w, i=number: w[i], blocks))
        found.append(aux)
    return x, _total(found)


def _apart(blocks: Block, count: int) -> tuple[Block, ...]:
    """Stacked layers one by one."""
    return tuple(jax.tree.map(lambda w, i=i: w[i], blocks) for i in range(count))


def _total(found: list[Aux]) -> Aux:
    """The sum of the metrics of several layers, by name."""
    names = dict.fromkeys(name for aux in found for name in aux)
    return {name: functools.reduce(operator.add, (aux[name] for aux in found if name in aux)) for name in names}


def num_params(tree: Any) -> int:
    """Number of scalars in a tree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
