"""Log-probabilities of the tokens of a batch: the one place with the shift by one."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lm.types import Batch, pytree

MAX_LOGITS = 2**27  # 512 MiB of float32


@pytree
class TokenStats:
    """What the model thought of each token before it saw it, in nats; 0 at t = 0, which nothing predicts.

    `logp[b, t]` is log p(tokens[b, t] | tokens before it). `lse` is the log-normaliser of the logits that
    predicted it, `correct` is 1 where no token was likelier. `entropy` of the distribution and `mean_logp`, its
    log-probability averaged over the vocabulary, are None where not asked for.
    """

    logp: Float[Array, "B T"]
    lse: Float[Array, "B T"]
    correct: Float[Array, "B T"]
    entropy: Float[Array, "B T"] | None = None
    mean_logp: Float[Array, "B T"] | None = None


def shifted_logprobs(
    logits: Float[Array, "B T V"],
    tokens: Int[Array, "B T"],
    temperature: float = 1.0,
    *,
    want_entropy: bool = True,
    want_mean_logp: bool = False,
) -> TokenStats:
    """Statistics of `tokens` under `logits`, where logits[:, t] predict tokens[:, t + 1].

    The log-softmax is taken of logits / temperature, in float32 (float64 stays float64).
    """
    return _align(_measure(logits, _next(tokens), temperature, want_entropy, want_mean_logp))


def token_logprobs(
    model: Any,
    batch: Batch,
    temperature: float = 1.0,
    *,
    max_logits: int = MAX_LOGITS,
    want_entropy: bool = False,
    want_mean_logp: bool = False,
) -> TokenStats:
    """Statistics of `batch.tokens` [B, T] under `model`, never holding more than about `max_logits` logits.

    The model gives hidden(tokens, positions, segments) -> [B, T, D] and logits(hidden) -> [..., V]. Where
    B·T·V is more than max_logits (counted over all devices), the projection to the vocabulary runs over chunks of
    time, one after another, and is computed again in the backward pass; the batch axis stays whole, so that
    devices which split it go on sharing every chunk.
    """
    hidden = model.hidden(batch.tokens, batch.positions, batch.segments)

    def project(hidden, targets):
        return _measure(model.logits(hidden), targets, temperature, want_entropy, want_mean_logp)

    targets = _next(batch.tokens)
    rows, time = targets.shape
    vocab = jax.eval_shape(model.logits, hidden).shape[-1]
    if rows * time * vocab <= max_logits:
        return _align(project(hidden, targets))
    chunks = -(-time // max(1, max_logits // (rows * vocab)))
    split = functools.partial(_split_time, chunks=chunks)
    remat = jax.checkpoint(project, prevent_cse=False)
    stats = jax.lax.map(lambda chunk: remat(*chunk), (split(hidden), split(targets)))
    return _align(jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(rows, -1)[:, :time], stats))


def _next(tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The token after each token; what the last column gets is dropped by _align."""
    return jnp.roll(tokens, -1, axis=1)


def _align(stats: TokenStats) -> TokenStats:
    """From the place that predicts a token to the place of the token."""
    return jax.tree.map(lambda x: jnp.pad(x[:, :-1], ((0, 0), (1, 0))), stats)


def _split_time(x: Array, chunks: int) -> Array:
    """[B, T, ...] to [chunks, B, C, ...], padded with zeros at the end of time."""
    length = -(-x.shape[1] // chunks)
    x = jnp.pad(x, [(0, 0), (0, chunks * length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], chunks, length, *x.shape[2:]), 1, 0)


def _measure(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    temperature: float,
    want_entropy: bool,
    want_mean_logp: bool,
) -> TokenStats:
    """Statistics of `targets` under the logits at the same place."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature
    best = jax.lax.stop_gradient(logits.max(-1))
    weights = jnp.exp(logits - best[..., None])
    lse = best + jnp.log(weights.sum(-1))
    # A masked sum rather than a gather: it splits over a sharded vocabulary, and its gradient needs no scatter.
    chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
    target = jnp.where(chosen, logits, 0.0).sum(-1)
    return TokenStats(
        logp=target - lse,
        lse=lse,
        correct=(target >= best).astype(logits.dtype),
        entropy=lse - (weights * logits).sum(-1) / weights.sum(-1) if want_entropy else None,
        mean_logp=logits.mean(-1) - lse if want_mean_logp else None,
    )
