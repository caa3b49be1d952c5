"""Attention on one CPU: blocks of queries against the keys that lie before their end, by matrix products it is fast at.

What the future hides is not computed beyond the block on the diagonal, and the exponentials are kept as they are: the
division by their sum is left to arrays as narrow as a head. XLA's fast matrix product on CPU wants the left operand to
contract on its last dimension, so the backward pass transposes the narrow arrays. Source of the gradients:
FlashAttention, arXiv 2205.14135, appendix B.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lm.model.linear import contract, transposed
from lm.parallel.rules import one_device

BLOCK = 128  # fewest queries of a block
BLOCKS = 16  # most blocks of a row: the program grows with them


def fits() -> bool:
    """Whether one device has it all; the partitioner makes a worse program of the blocks than of the plain form."""
    return one_device()


def attend_in_blocks(
    q: Float[Array, "B H T K"], k: Float[Array, "B N T K"], v: Float[Array, "B N T K"], segments: Int[Array, "B T"]
) -> Float[Array, "B H T K"]:
    """softmax(q·kᵀ/√K)·v of each token over the tokens of its segment that are not after it."""
    b, h, t, d = q.shape
    grouped = (q * (1 / math.sqrt(d))).astype(q.dtype).reshape(b, k.shape[1], h // k.shape[1], t, d)
    return _attend(grouped, k, v, segments).reshape(q.shape)


def _blocks(length: int) -> list[tuple[int, int]]:
    """First query and end of each block."""
    size = max(BLOCK, -(-length // BLOCKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _visible(segments: Int[Array, "B T"], start: int, end: int) -> Bool[Array, "B 1 1 C S"]:
    """Whom the queries of a block may look at: keys of their segment up to their own place."""
    same = segments[:, start:end, None] == segments[:, None, :end]
    causal = np.arange(start, end)[:, None] >= np.arange(end)
    return (same & causal)[:, None, None]


def _rows(x: Float[Array, "B N G T K"], start: int, end: int) -> Float[Array, "B N GC K"]:
    """A block of queries, those of a group one under another."""
    b, n, g, _, d = x.shape
    return x[:, :, :, start:end].reshape(b, n, g * (end - start), d)


@jax.custom_vjp
def _attend(q: Array, k: Array, v: Array, segments: Array) -> Float[Array, "B N G T K"]:
    return _forward(q, k, v, segments)[0]


def _forward(q: Array, k: Array, v: Array, segments: Array) -> tuple[Array, tuple]:
    b, n, g, t, d = q.shape
    heads, exponentials, inverses = [], [], []
    for start, end in _blocks(t):
        size = end - start
        scores = contract(_rows(q, start, end), k[:, :, :end], 3).reshape(b, n, g, size, end)
        scores = jnp.where(_visible(segments, start, end), scores, -1e30)
        raised = jnp.exp(scores - scores.max(-1, keepdims=True))
        inverse = (1 / raised.sum(-1, keepdims=True)).reshape(b, n, g * size, 1)
        raised = raised.astype(v.dtype).reshape(b, n, g * size, end)
        block = (contract(raised, v[:, :, :end], 2) * inverse).astype(v.dtype)
        heads.append(block.reshape(b, n, g, size, d))
        exponentials.append(raised)
        inverses.append(inverse)
    out = jnp.concatenate(heads, axis=3)
    return out, (q, k, v, out, exponentials, inverses)


def _backward(kept: tuple, d_out: Float[Array, "B N G T K"]) -> tuple[Array, Array, Array, np.ndarray]:
    q, k, v, out, exponentials, inverses = kept
    b, n, g, t, d = q.shape
    # What the softmax takes off each row: the sum of weight · gradient, which is that of output · gradient.
    off = (d_out.astype(inverses[0].dtype) * out.astype(inverses[0].dtype)).sum(-1, keepdims=True)
    d_q, d_k, d_v = [], [], []
    for (start, end), raised, inverse in zip(_blocks(t), exponentials, inverses, strict=True):
        d_block = (_rows(d_out, start, end) * inverse).astype(v.dtype)
        d_weights = contract(d_block, v[:, :, :end], 3) - _rows(off, start, end) * inverse
        d_scores = (raised.astype(d_weights.dtype) * d_weights).astype(v.dtype)
        d_q.append(contract(d_scores, k[:, :, :end], 2).reshape(b, n, g, end - start, d))
        d_k.append(contract(transposed(_rows(q, start, end)), d_scores, 2))
        d_v.append(contract(transposed(d_block), raised, 2))
    sides = (jnp.swapaxes(_sum(parts, t), 2, 3) for parts in (d_k, d_v))
    d_k_sum, d_v_sum = (side.astype(v.dtype) for side in sides)
    d_segments = np.zeros((b, t), jax.dtypes.float0)
    return jnp.concatenate(d_q, axis=3).astype(q.dtype), d_k_sum, d_v_sum, d_segments


def _sum(parts: list[Float[Array, "B N K S"]], length: int) -> Float[Array, "B N K T"]:
    """The blocks' gradients of the keys they saw, added up piece by piece."""
    bounds = _blocks(length)
    pieces = [
        functools.reduce(jnp.add, (part[..., start:end] for part in parts[i:])) for i, (start, end) in enumerate(bounds)
    ]
    return jnp.concatenate(pieces, axis=3)


_attend.defvjp(_forward, _backward)
