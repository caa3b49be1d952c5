"""Attention on a single CPU device: blocks of queries against the keys up to their end, as fast matrix products.

Masked scores are computed only in the block on the diagonal. The exponentials are not normalised: instead the outputs,
which are only as wide as a head, are divided by their sum. XLA's fast matrix product on CPU needs a left operand that
contracts on its last dimension, so the backward pass transposes the narrow arrays. Source of the gradients:
FlashAttention, arXiv 2205.14135, appendix B.
"""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lm.model.linear import contract, transposed
from lm.parallel.rules import one_device

BLOCK = 128  # minimum queries of a block
BLOCKS = 16  # maximum blocks of a row, since the size of the program grows with them


def fits() -> bool:
    """Whether the code is for one device; on several, the partitioner handles plain attention better."""
    return one_device()


def attend_in_blocks(
    q: Float[Array, "B H C K"], k: Float[Array, "B N T K"], v: Float[Array, "B N T K"], segments: Int[Array, "B T"]
) -> Float[Array, "B H C K"]:
    """softmax(q·kᵀ/√K)·v of the last C tokens over the tokens of their segment that are not after them."""
    b, h, t, d = q.shape
    grouped = (q * (1 / math.sqrt(d))).astype(q.dtype).reshape(b, k.shape[1], h // k.shape[1], t, d)
    return _attend(grouped, k, v, segments).reshape(q.shape)


def _blocks(queries: int, keys: int) -> list[tuple[int, int, int]]:
    """(first query, end, number of keys up to the end) of each block; the last query is at the last key."""
    size = max(BLOCK, -(-queries // BLOCKS))
    bounds = ((start, min(start + size, queries)) for start in range(0, queries, size))
    return [(start, end, keys - queries + end) for start, end in bounds]


def _visible(segments: Int[Array, "B T"], size: int, seen: int) -> Bool[Array, "B 1 1 C S"]:
    """Attention mask of the `size` queries that end at key `seen`: keys of their segment up to their own position."""
    same = segments[:, seen - size : seen, None] == segments[:, None, :seen]
    causal = np.arange(seen - size, seen)[:, None] >= np.arange(seen)
    return (same & causal)[:, None, None]


def _rows(x: Float[Array, "B N G T K"], start: int, end: int) -> Float[Array, "B N GC K"]:
    """A block of queries with the heads of a group stacked as rows."""
    b, n, g, _, d = x.shape
    return x[:, :, :, start:end].reshape(b, n, g * (end - start), d)


@jax.custom_vjp
def _attend(q: Array, k: Array, v: Array, segments: Array) -> Float[Array, "B N G T K"]:
    return _forward(q, k, v, segments)[0]


def _forward(q: Array, k: Array, v: Array, segments: Array) -> tuple[Array, tuple]:
    b, n, g, t, d = q.shape
    heads, exponentials, inverses = [], [], []
    for start, end, seen in _blocks(t, k.shape[2]):
        size = end - start
        scores = contract(_rows(q, start, end), k[:, :, :seen], 3).reshape(b, n, g, size, seen)
        scores = jnp.where(_visible(segments, size, seen), scores, -1e30)
        raised = jnp.exp(scores - scores.max(-1, keepdims=True))
        inverse = (1 / raised.sum(-1, keepdims=True)).reshape(b, n, g * size, 1)
        raised = raised.astype(v.dtype).reshape(b, n, g * size, seen)
        block = (contract(raised, v[:, :, :seen], 2) * inverse).astype(v.dtype)
        heads.append(block.reshape(b, n, g, size, d))
        exponentials.append(raised)
        inverses.append(inverse)
    out = jnp.concatenate(heads, axis=3)
    return out, (q, k, v, out, exponentials, inverses)


def _backward(kept: tuple, d_out: Float[Array, "B N G T K"]) -> tuple[Array, Array, Array, np.ndarray]:
    q, k, v, out, exponentials, inverses = kept
    b, n, g, t, d = q.shape
    # The term that the gradient of softmax subtracts in each row: Σ weight · gradient, which equals Σ output · gradient.
    off = (d_out.astype(inverses[0].dtype) * out.astype(inverses[0].dtype)).sum(-1, keepdims=True)
    d_q, d_k, d_v = [], [], []
    blocks = _blocks(t, k.shape[2])
    for (start, end, seen), raised, inverse in zip(blocks, exponentials, inverses, strict=True):
        d_block = (_rows(d_out, start, end) * inverse).astype(v.dtype)
        d_weights = contract(d_block, v[:, :, :seen], 3) - _rows(off, start, end) * inverse
        d_scores = (raised.astype(d_weights.dtype) * d_weights).astype(v.dtype)
        d_q.append(contract(d_scores, k[:, :, :seen], 2).reshape(b, n, g, end - start, d))
        d_k.append(contract(transposed(_rows(q, start, end)), d_scores, 2))
        d_v.append(contract(transposed(d_block), raised, 2))
    sides = (jnp.swapaxes(_sum(parts), 2, 3) for parts in (d_k, d_v))
    d_k_sum, d_v_sum = (side.astype(v.dtype) for side in sides)
    d_segments = np.zeros((b, k.shape[2]), jax.dtypes.float0)
    return jnp.concatenate(d_q, axis=3).astype(q.dtype), d_k_sum, d_v_sum, d_segments


def _sum(parts: list[Float[Array, "B N K S"]]) -> Float[Array, "B N K T"]:
    """The sum of the blocks' gradients of keys, piece by piece, since each block covers more keys than the one before."""
    seen = [0, *(part.shape[-1] for part in parts)]
    pieces = [
        functools.reduce(jnp.add, (part[..., start:end] for part in parts[i:]))
        for i, (start, end) in enumerate(itertools.pairwise(seen))
    ]
    return jnp.concatenate(pieces, axis=3)


_attend.defvjp(_forward, _backward)
