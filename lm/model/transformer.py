"""The decoder: RMSNorm, rotary grouped-query attention, SwiGLU; a pytree of parameters with methods.

Shapes: B batch, T tokens, D embed, H query heads, N key heads, K head_dim, F mlp, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name as named
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lm.experiment import Model
from lm.model.attention import attend, attention_mask, attention_of, rope_angles, rope_frequencies, rotate
from lm.model.linear import from_heads, look_up, project, to_heads
from lm.model.shared_prompt import shared_attention_of
from lm.parallel.row_order import WHOLE, from_zigzag, to_zigzag, zigzag_layout
from lm.parallel.rules import constrain, gathered, platform, row_major
from lm.types import SharedPrompt, pytree

# Tree mode: a module is a plain pytree, and jax.jit, grad, scan, checkpoint and eval_shape apply to it.
nnx.set_graph_mode(False)
nnx.set_graph_updates(False)
nnx.use_eager_sharding(False)

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
"""Model.remat -> what the forward pass keeps of a block, by the names given below, beside the block's input."""


def _param(key: PRNGKeyArray, config: Model, std: float, **axes: int) -> nnx.Param:
    """A normal parameter whose dimensions have these logical names and sizes."""
    dtype = jnp.dtype(config.param_dtype)
    value = jax.random.normal(key, tuple(axes.values()), jnp.float32) * std
    return nnx.Param(value.astype(dtype), out_sharding=tuple(axes))


def _whole(param: nnx.Param, dtype: Any) -> Array:
    """A parameter as a matrix product takes it. In a scan over layers the names still begin with that of the layers."""
    w = param[...]
    return gathered(w, param.get_metadata("out_sharding")[-w.ndim :], dtype)


def _embed_std(config: Model) -> float:
    """1 for a table of its own; a table that is the head too begins small, so that the first logits do."""
    return 0.02 if config.tied_head else 1.0


def _scale(config: Model, size: int) -> nnx.Param:
    return nnx.Param(jnp.ones(size, jnp.dtype(config.param_dtype)), out_sharding=("norm",))


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "... D"]:
    """x / rms(x) · scale, in float32 at least. Source: arXiv 1910.07467 eq. 4."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    normed = wide * named(jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps), "rms")
    return (normed * scale.astype(wide.dtype)).astype(x.dtype)


class Norm(nnx.Module):
    """RMSNorm with its scale."""

    def __init__(self, config: Model, size: int):
        self.scale = _scale(config, size)

    def __call__(self, x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
        return rms_norm(x, self.scale[...], eps)


@pytree
class KVCache:
    """Keys and values of the tokens seen so far, one array a layer, and where they stand.

    A slot with segment 0 is empty: no query looks at it.
    """

    keys: tuple[Float[Array, "B N S K"], ...]
    values: tuple[Float[Array, "B N S K"], ...]
    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"]


class Block(nnx.Module):
    """x + attention(norm(x)), then x + swiglu(norm(x)); all layers in one when stacked."""

    def __init__(self, config: Model, key: PRNGKeyArray):
        c, keys = config, iter(jax.random.split(key, 7))
        # What blocks add begins small beside the embedding, or the tokens' identity drowns in it: copying then takes
        # several times as many steps to learn.
        narrow, out = c.embed_dim**-0.5, _embed_std(c) * (2 * c.num_layers) ** -0.5
        self.attn_norm = Norm(c, c.embed_dim)
        self.q = _param(next(keys), c, narrow, embed=c.embed_dim, heads=c.num_heads, head_dim=c.head_dim)
        self.k = _param(next(keys), c, narrow, embed=c.embed_dim, kv_heads=c.num_kv_heads, head_dim=c.head_dim)
        self.v = _param(next(keys), c, narrow, embed=c.embed_dim, kv_heads=c.num_kv_heads, head_dim=c.head_dim)
        wide = (c.num_heads * c.head_dim) ** -0.5
        self.o = _param(next(keys), c, wide * out, heads=c.num_heads, head_dim=c.head_dim, embed=c.embed_dim)
        self.q_norm = Norm(c, c.head_dim) if c.qk_norm else None
        self.k_norm = Norm(c, c.head_dim) if c.qk_norm else None
        self.mlp_norm = Norm(c, c.embed_dim)
        self.gate = _param(next(keys), c, narrow, embed=c.embed_dim, mlp=c.mlp_dim)
        self.up = _param(next(keys), c, narrow, embed=c.embed_dim, mlp=c.mlp_dim)
        self.down = _param(next(keys), c, c.mlp_dim**-0.5 * out, mlp=c.mlp_dim, embed=c.embed_dim)

    def qkv(self, x: Float[Array, "B T D"], angles: tuple[Array, Array], eps: float) -> tuple[Array, Array, Array]:
        """Head-major queries [B H T K], keys and values [B N T K], rotated."""
        y = self.attn_norm(x, eps)
        q, k, v = (to_heads(y, _whole(w, y.dtype)) for w in (self.q, self.k, self.v))
        if self.q_norm is None or self.k_norm is None:
            q, k = rotate(q, angles), rotate(k, angles)
            return named(q, "qkv"), named(k, "qkv"), named(v, "qkv")
        # The gradient of a norm wants what went into it: kept before it, and turned again on the way back.
        q, k, v = named(q, "qkv"), named(k, "qkv"), named(v, "qkv")
        return rotate(self.q_norm(q, eps), angles), rotate(self.k_norm(k, eps), angles), v

    def output_and_mlp(
        self, x: Float[Array, "B T D"], heads: Float[Array, "B H T K"], eps: float
    ) -> Float[Array, "B T D"]:
        """What follows attention: the output projection and the SwiGLU (arXiv 2002.05202), each added to x."""
        x = residual(x + from_heads(heads, _whole(self.o, x.dtype)), "mid")
        y = self.mlp_norm(x, eps)
        gate, up = (named(project(y, _whole(w, y.dtype)), "mlp") for w in (self.gate, self.up))
        return residual(x + project(jax.nn.silu(gate) * up, _whole(self.down, x.dtype)), "out")


def residual(x: Float[Array, "B T D"], name: str) -> Float[Array, "B T D"]:
    """The residual stream, named for rematerialisation, in its place on the mesh."""
    places = ("batch", "length", "act_embed")
    return named(constrain(row_major(x, *places), *places), name)


class Transformer(nnx.Module):
    """A language model. `Transformer(config, vocab_size, key)` inside `jax.eval_shape` is abstract."""

    def __init__(self, config: Model, vocab_size: int, key: PRNGKeyArray):
        self.config = config
        embed_key, block_key, head_key = jax.random.split(key, 3)
        self.embed = _param(embed_key, config, _embed_std(config), vocab=vocab_size, embed=config.embed_dim)
        stack = nnx.transform_metadata(functools.partial(Block, config), in_axes=0, out_axes=0, partition="layers")
        self.blocks = jax.vmap(stack)(jax.random.split(block_key, config.num_layers))
        self.norm = Norm(config, config.embed_dim)
        self.head = (
            None
            if config.tied_head
            else _param(head_key, config, config.embed_dim**-0.5, embed=config.embed_dim, vocab=vocab_size)
        )

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segments: Int[Array, "B T"]
    ) -> Float[Array, "B T V"]:
        """Logits of the token after each, float32."""
        return self.logits(self.hidden(tokens, positions, segments))

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        shared: SharedPrompt | None = None,
    ) -> Float[Array, "B T D"]:
        """The last hidden state of each token, normed.

        Args:
            shared: the rows are folded, a prompt and all its answers each (shared_prompt.py).
        """
        c, cut = self.config, WHOLE if shared else zigzag_layout(tokens.shape[1])
        tokens, positions, segments = (to_zigzag(x, cut) for x in (tokens, positions, segments))
        x, angles = self._start(tokens, positions)
        attention = (
            shared_attention_of(c, positions, segments, shared) if shared else attention_of(c, positions, segments)
        )

        def body(x: Array, block: Block) -> tuple[Array, None]:
            q, k, v = block.qkv(x, angles, c.norm_eps)
            return block.output_and_mlp(x, attention(q, k, v), c.norm_eps), None

        if c.remat != "none":
            body = jax.checkpoint(body, policy=REMAT[c.remat], prevent_cse=False)
        x, _ = jax.lax.scan(body, x, self.blocks, unroll=min(c.scan_unroll, c.num_layers))
        return from_zigzag(self.norm(x, c.norm_eps), cut)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Scores of every token of the vocabulary, in `config.logits_dtype` (but float64 where the model is)."""
        dtype = jnp.promote_types(hidden.dtype, jnp.dtype(self.config.logits_dtype))
        weight = self.embed[...].T if self.head is None else self.head[...]
        return project(hidden, weight.astype(hidden.dtype), preferred=dtype)

    def with_whole_tables(self) -> Transformer:
        """This model with embedding and head in the compute dtype and whole along `embed` on every device.

        A training step does it once: a tied table is read twice, and is gathered, and its gradient summed, only once.
        """
        model = jax.tree.map(lambda x: x, self)
        for name in ("embed", "head"):
            param = getattr(self, name)
            if param is not None:
                whole = _whole(param, jnp.dtype(self.config.compute_dtype))
                setattr(model, name, nnx.Param(whole, out_sharding=param.get_metadata("out_sharding")))
        return model

    def first_layers(self, count: int) -> Transformer:
        """This model without what comes after its first `count` layers."""
        model = jax.tree.map(lambda x: x, self)
        if count < self.config.num_layers:
            model.config = dataclasses.replace(self.config, num_layers=count)
            model.blocks = jax.tree.map(lambda x: x[:count], self.blocks)
        return model

    def with_matrices(self, change: Callable[[Array], Array]) -> Transformer:
        """This model with its matrices changed; the weights of its norms stay as they are."""

        def changed(param: nnx.Variable) -> nnx.Variable:
            norm = "norm" in param.get_metadata("out_sharding")
            return param if norm else jax.tree.map(change, param)

        return jax.tree.map(changed, self, is_leaf=lambda x: isinstance(x, nnx.Variable))

    def for_sampling(self) -> Transformer:
        """This model with its matrices in the compute dtype: cast once and not for every token.

        On CPU its blocks are a tuple, which holds the layers as arrays of their own: a loop would copy them out of the
        stack at each of its turns.
        """
        dtype = jnp.dtype(self.config.compute_dtype)
        model = self.with_matrices(lambda x: x.astype(dtype))
        if platform() == "cpu":
            model.blocks = nnx.data(jax.lax.optimization_barrier(self._layers(model.blocks)))
        return model

    def _layers(self, blocks: Block | tuple[Block, ...]) -> tuple[Block, ...]:
        if isinstance(blocks, tuple):
            return blocks
        return tuple(jax.tree.map(lambda p, i=i: p[i], blocks) for i in range(self.config.num_layers))

    def empty_cache(self, batch: int, length: int) -> KVCache:
        """A cache with no token in it, for `length` tokens a row."""
        c = self.config
        shape, dtype = (batch, c.num_kv_heads, length, c.head_dim), jnp.dtype(c.compute_dtype)
        # Arrays of their own, so that a caller may donate the cache.
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
        """Hidden states of new tokens, put into the slots from `start`, given those in the cache.

        Layers are unrolled, so that each layer's cache is updated in place.
        """
        c = self.config
        x, angles = self._start(tokens, positions)

        def put(old: Array, new: Array, axis: int) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis)

        slot_positions, slot_segments = put(cache.positions, positions, 1), put(cache.segments, segments, 1)
        mask: Bool[Array, "B T S"] = attention_mask(positions, slot_positions, segments, slot_segments, c.window)
        keys, values = list(cache.keys), list(cache.values)
        for layer, block in enumerate(self._layers(self.blocks)):
            q, k, v = block.qkv(x, angles, c.norm_eps)
            keys[layer], values[layer] = put(keys[layer], k, 2), put(values[layer], v, 2)
            x = block.output_and_mlp(x, attend(q, keys[layer], values[layer], mask, c.softcap), c.norm_eps)
        cache = KVCache(tuple(keys), tuple(values), slot_positions, slot_segments)
        return self.norm(x, c.norm_eps), cache

    def _start(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> tuple[Array, tuple[Array, Array]]:
        c = self.config
        # Gathered over fsdp first: the rows that are looked up then leave in the layout of the batch.
        table = constrain(self.embed[...].astype(jnp.dtype(c.compute_dtype)), "vocab", "act_embed")
        x = look_up(table, constrain(tokens, "batch", "length"))
        frequencies = rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
        return constrain(x, "batch", "length", "act_embed"), rope_angles(positions, frequencies)


def num_params(tree: Any) -> int:
    """How many numbers a tree of parameters holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
