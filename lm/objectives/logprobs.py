"""Log-probabilities of the tokens of a batch; the shift between logits and the tokens they predict is made here only."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lm.model import shared_prompt
from lm.parallel.rules import constrain, one_device, platform, split_ways
from lm.types import Aux, TokenBatch, pytree


@pytree
class TokenStats:
    """Statistics of the model's prediction of each token, in nats; 0 at t = 0, which has no prediction.

    logp: log p(tokens[b, t] | earlier tokens).
    lse: log-normaliser of the logits that predict the token.
    correct: 1 where the token is the most likely one.
    entropy: entropy of the predicted distribution, or None.
    mean_logp: log-probability averaged over the vocabulary, or None.
    log_sum_sq: log Σ p² over the vocabulary, without a gradient, or None.
    aux: metrics reported by the layers, which a loss returns among its own.
    """

    logp: Float[Array, "B T"]
    lse: Float[Array, "B T"]
    correct: Float[Array, "B T"]
    entropy: Float[Array, "B T"] | None = None
    mean_logp: Float[Array, "B T"] | None = None
    log_sum_sq: Float[Array, "B T"] | None = None
    aux: Aux = dataclasses.field(default_factory=dict)


def token_logprobs(
    model: Any,
    batch: TokenBatch,
    temperature: float = 1.0,
    *,
    max_logits: int | None = None,
    want_entropy: bool = False,
    want_mean_logp: bool = False,
    want_log_sum_sq: bool = False,
    hidden: tuple[Float[Array, "B T D"], Aux] | None = None,
) -> TokenStats:
    """Statistics of `batch.tokens` [B, T] under `model`, never holding more than about `max_logits` logits.

    The model has the methods hidden(tokens, positions, segments) -> ([B, T, D], aux), logits(hidden) -> [..., V] (with its
    weights in the dtype of `hidden`), and with_whole_tables(). If a device's share of B·T·V exceeds max_logits
    (None: the model's own setting), the projection to the vocabulary runs over chunks of time, one after another, and is
    computed again in the backward pass; each chunk has all rows and a part of every device's tokens, so that all devices share
    the work. If all rows begin with prompts of the same width, the statistics of prompt tokens, which have no weight, are 0 and
    not computed; if rows share prompts, the hidden states of a prompt are computed once.

    Args:
        hidden: result of `model.hidden` for the batch (states and aux), if the caller has computed it already.
    """
    model = model.with_whole_tables()
    max_logits = model.config.max_logits if max_logits is None else max_logits
    states, targets, align, aux = predictions(model, batch, hidden)

    def project(model, hidden, targets):
        return _measure(model.logits(hidden), targets, temperature, want_entropy, want_mean_logp, want_log_sum_sq)

    vocab = jax.eval_shape(model.logits, states).shape[-1]
    stats = project_tokens(project, model, (states, targets), vocab, max_logits)
    return dataclasses.replace(align(stats), aux=aux)


def logprobs_at(
    model: Any, states: Float[Array, "N D"], targets: Int[Array, " N"]
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Log-probability, in nats, of the target of each hidden state, and 1 where it is the most likely token.

    Only these states are projected to the vocabulary, in chunks as in `token_logprobs`.
    """

    def project(model, states, targets):
        return _measure(model.logits(states), targets, 1.0, False, False, False)

    vocab = jax.eval_shape(model.logits, states[None]).shape[-1]
    stats = project_tokens(project, model, (states[None], targets[None]), vocab, model.config.max_logits)
    return stats.logp[0], stats.correct[0]


def project_tokens(
    project: Callable[..., Any], models: Any, inputs: tuple[Array, ...], vocab: int, max_logits: int
) -> Any:
    """`project(models, *inputs)`, statistics [B, N] from inputs [B, N, ...]; over chunks of N where B·N·vocab exceeds max_logits."""
    rows, time = inputs[0].shape[:2]
    row_parts, time_parts, vocab_parts = (
        split_ways(n, name) for n, name in zip((rows, time, vocab), AXES, strict=True)
    )
    row, time_here = rows // row_parts * (vocab // vocab_parts), time // time_parts
    if row * time_here <= max_logits:
        return project(models, *inputs)
    chunks = -(-time_here // max(1, max_logits // row))
    split = functools.partial(_split_time, parts=time_parts, chunks=chunks)
    # The gradients of the chunks are summed in the dtype of the weights that the chunks share: float32 or wider.
    shared = jax.tree.map(_in_float32, models)
    remat = jax.checkpoint(functools.partial(project, shared), prevent_cse=False)
    stats = jax.lax.map(lambda chunk: remat(*chunk), tuple(map(split, inputs)))
    return jax.tree.map(lambda x: _join_time(x, time_parts, time_here), stats)


AXES = ("batch", "length", "vocab")


def predictions(
    model: Any, batch: TokenBatch, hidden: tuple[Array, Aux] | None
) -> tuple[Array, Array, Callable[[Any], Any], Aux]:
    """Hidden states [B, N, D], the tokens [B, N] that they predict, a function that aligns statistics to [B, T], and aux."""
    shared = shared_prompt.usable(batch, model.config) if hidden is None else None
    prompt = shared_prompt.common_width(batch)
    states, aux = None, {}
    if shared is not None:
        folded = (shared_prompt.fold(x, shared) for x in (batch.tokens, batch.positions, batch.segments))
        whole, aux = model.hidden(*folded, shared)
        # Metrics of the layers cover all rows: a shared prompt counts once per row, however rows are placed on devices.
        states = None if aux else shared_prompt.predicting(whole, shared)
    if states is None:
        whole, aux = hidden or model.hidden(batch.tokens, batch.positions, batch.segments)
        if not prompt:
            return whole, _next(batch.tokens), _align, aux
        states = whole[:, prompt - 1 : -1]
    behind = ((0, 0), (prompt, 0))
    return states, batch.tokens[:, prompt:], lambda stats: jax.tree.map(lambda x: jnp.pad(x, behind), stats), aux


def token_values(hidden: Float[Array, "B T D"], head: Any) -> Float[Array, "B T"]:
    """Value of the state before each token: the head's output at the preceding token; 0 at t = 0."""
    return _align(head(hidden))


def last_scores(scorer: Any, batch: TokenBatch) -> tuple[Float[Array, " B"], Aux]:
    """(scores, aux): score of each row at its last token with a weight, the end of the answer; 0 for a row without weights."""
    place = jnp.arange(batch.tokens.shape[1])
    last = jnp.max(jnp.where(batch.weights > 0, place, -1), axis=1, keepdims=True)
    scores, aux = scorer(batch.tokens, batch.positions, batch.segments)
    # A masked sum instead of a gather, since a row may be split over devices.
    return jnp.where(place == last, scores, 0.0).sum(1), aux


def _next(tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The token after each token; `_align` drops the last column, which wraps around."""
    return jnp.roll(tokens, -1, axis=1)


def _align(stats: Any) -> Any:
    """Shift statistics from the position that predicts a token to the position of the token."""
    return jax.tree.map(lambda x: jnp.pad(x[:, :-1], ((0, 0), (1, 0))), stats)


def _in_float32(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _split_time(x: Array, parts: int, chunks: int) -> Array:
    """Split [B, T, ...] into [chunks, B, P·C, ...], where a chunk has C positions of each of P parts, zero-padded."""
    rows, time, *rest = x.shape
    length = -(-time // parts // chunks)
    x = x.reshape(rows, parts, time // parts, *rest)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, chunks * length - time // parts)] + [(0, 0)] * len(rest))
    pieces = jnp.moveaxis(x.reshape(rows, parts, chunks, length, *rest), 2, 0)
    return constrain(pieces.reshape(chunks, rows, parts * length, *rest), None, "batch", "length")


def _join_time(x: Array, parts: int, time: int) -> Array:
    """The inverse of `_split_time`: [chunks, B, P·C] to [B, T] without padding; `time` is the length of a part."""
    chunks, rows, _ = x.shape
    pieces = jnp.moveaxis(x.reshape(chunks, rows, parts, -1), 0, 2)
    return pieces.reshape(rows, parts, -1)[:, :, :time].reshape(rows, parts * time)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _measure(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    temperature: float,
    want_entropy: bool,
    want_mean_logp: bool,
    want_log_sum_sq: bool,
) -> TokenStats:
    """Statistics of `targets` under the logits at the same position.

    The gradient is written by hand, so that the logits are the only [B, T, V] array kept for the backward pass.
    """
    return _measure_forward(logits, targets, temperature, want_entropy, want_mean_logp, want_log_sum_sq)[0]


def _measure_forward(logits, targets, temperature, want_entropy, want_mean_logp, want_log_sum_sq):
    z = scaled_logits(logits, temperature)
    best = z.max(-1)
    weights = jnp.exp(z - best[..., None])
    total = weights.sum(-1)
    lse = best + jnp.log(total)
    target = _at(z, targets)
    stats = TokenStats(
        logp=target - lse,
        lse=lse,
        correct=(target >= best).astype(z.dtype),
        entropy=lse - (weights * z).sum(-1) / total if want_entropy else None,
        mean_logp=z.mean(-1) - lse if want_mean_logp else None,
        # The largest logit has weight 1, so the sum of squares is at least 1 and does not underflow.
        log_sum_sq=jnp.log(jnp.square(weights).sum(-1)) - 2 * jnp.log(total) if want_log_sum_sq else None,
    )
    return stats, (logits, targets, best, total, stats.entropy)


def _measure_backward(temperature, want_entropy, want_mean_logp, want_log_sum_sq, saved, g: TokenStats):
    """Gradient of `_measure`. With p = softmax(z): d logp = 1[y] - p, d lse = p, d entropy = -p·(log p + entropy),
    d mean_logp = 1/V - p."""
    logits, targets, best, total, entropy = saved
    z = scaled_logits(logits, temperature) - best[..., None]
    p = jnp.exp(z) / total[..., None]
    gradient = jnp.where(_chosen(targets, z), g.logp[..., None], 0.0) + p * (g.lse - g.logp)[..., None]
    if g.mean_logp is not None:
        gradient += g.mean_logp[..., None] * (1 / z.shape[-1] - p)
    if g.entropy is not None:
        gradient -= g.entropy[..., None] * p * (z - jnp.log(total)[..., None] + entropy[..., None])
    return (gradient / temperature).astype(logits.dtype), None


_measure.defvjp(_measure_forward, _measure_backward)


def scaled_logits(logits: Float[Array, "B T V"], temperature: float) -> Float[Array, "B T V"]:
    """The logits divided by the temperature, in float32 or wider."""
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature


def _at(z: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """z at the targets, by a gather on one CPU device, else by a masked sum, which works on a sharded vocabulary."""
    if platform() == "cpu" and one_device():
        return jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0]
    return jnp.where(_chosen(targets, z), z, 0.0).sum(-1)


def _chosen(targets: Int[Array, "B T"], z: Float[Array, "B T V"]) -> Bool[Array, "B T V"]:
    return jnp.arange(z.shape[-1]) == targets[..., None]
