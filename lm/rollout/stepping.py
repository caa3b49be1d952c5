"""One token for every slot, each slot with its own temperature, top-k, top-p, seed and allowed tokens: the engine of the server.

Shapes: R slots, B tokens of a step, V vocabulary, W words of 32 tokens, T alternatives.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from lm.model.transformer import Transformer
from lm.rollout.sampler import choose, completion_keys
from lm.rollout.slots import Assignment, Slots, append, begin, whole_rows
from lm.types import Anywhere, pytree

BURST = 16  # most tokens of a step
ALTERNATIVES = 20  # likeliest tokens that are reported beside a sampled one


@pytree
class SlotSettings:
    """How the next token of each slot is chosen. `allowed` has a bit for each token; `constrained` says whether it is read.

    `filtered` and `scored` say whether any slot has top-k or top-p, and whether any reports log-probabilities.
    """

    seeds: Shaped[Anywhere, " R"]  # uint32
    temperature: Float[Anywhere, " R"]  # 0 is greedy
    top_k: Int[Anywhere, " R"]  # 0: all tokens
    top_p: Float[Anywhere, " R"]
    allowed: Int[Anywhere, "R W"]
    constrained: Bool[Anywhere, ""]
    filtered: Bool[Anywhere, ""]
    scored: Bool[Anywhere, ""]


@pytree
class Stepped:
    """The tokens of a step with their log-probabilities at temperature 1, the likeliest alternatives, and the state of the slots.

    `count` is the number of tokens that the step had. A slot that was done before a token has -1 in its place.
    """

    tokens: Int[Array, "R B"]
    logp: Float[Array, "R B"]
    others: Int[Array, "R B T"]
    others_logp: Float[Array, "R B T"]
    done: Bool[Array, " R"]
    count: Int[Array, ""]


@functools.partial(jax.jit, static_argnames=("end_ids", "vocab_size"), donate_argnames=("slots",))
def step(
    model: Transformer,
    slots: Slots,
    assigned: Assignment,
    choices: SlotSettings,
    most: int | Int[Array, ""],
    *,
    end_ids: tuple[int, ...],
    vocab_size: int,
) -> tuple[Slots, Stepped]:
    """Sample `most` tokens of every slot, at most BURST; fewer if a completion ends with one.

    A slot's tokens are those that `sample_tokens` gives with the key of its seed, whatever the other slots do.
    """
    rows, alternatives = len(slots.done), min(ALTERNATIVES, vocab_size)
    keys = jax.vmap(lambda *one: completion_keys(jax.random.key(one[0]), *(x[None] for x in one[1:]))[0])(
        jnp.asarray(choices.seeds), assigned.prompts, assigned.samples
    )
    slots, lengths = begin(slots, assigned)
    nothing = Stepped(
        jnp.full((rows, BURST), -1), jnp.zeros((rows, BURST)), jnp.zeros((rows, BURST, alternatives), jnp.int32),
        jnp.zeros((rows, BURST, alternatives)), slots.done, jnp.int32(0),
    )  # fmt: skip
    before = slots.done.sum()

    def going_on(carry: tuple[Slots, Stepped]) -> Bool[Array, ""]:
        _, found = carry
        return (found.count < jnp.minimum(most, BURST)) & (found.done.sum() == before)

    def one_more(carry: tuple[Slots, Stepped]) -> tuple[Slots, Stepped]:
        slots, found = carry
        number = found.count
        logits = whole_rows(model.logits(slots.hidden)).astype(jnp.float32)
        token = _chosen(logits, keys, slots.steps, choices, vocab_size)

        def scored() -> tuple[Array, Array, Array]:
            scores = jax.nn.log_softmax(logits, axis=-1)
            logp = jnp.take_along_axis(scores, token[:, None], axis=-1)[:, 0]
            return logp, *jax.lax.top_k(scores[:, :vocab_size], alternatives)

        def unscored() -> tuple[Array, Array, Array]:
            return jnp.zeros(rows), jnp.zeros((rows, alternatives)), jnp.zeros((rows, alternatives), jnp.int32)

        logp, others_logp, others = jax.lax.cond(choices.scored, scored, unscored)
        after = append(model, slots, assigned, lengths, token, logp, end_ids)
        return after, Stepped(
            found.tokens.at[:, number].set(jnp.where(slots.done, -1, token)),
            found.logp.at[:, number].set(logp),
            found.others.at[:, number].set(others),
            found.others_logp.at[:, number].set(others_logp),
            after.done,
            number + 1,
        )

    return jax.lax.while_loop(going_on, one_more, (slots, nothing))


def _chosen(
    logits: Float[Array, "R V"], keys: Array, steps: Int[Array, " R"], choices: SlotSettings, vocab_size: int
) -> Int[Array, " R"]:
    """The next token of each row, of those that its row allows."""
    size = logits.shape[-1]
    temperature = jnp.asarray(choices.temperature, jnp.float32)[:, None]
    greedy = temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, temperature)

    def of_allowed() -> Array:
        bits = (choices.allowed[:, :, None] >> jnp.arange(32)) & 1
        mask = bits.reshape(len(logits), -1)[:, :size] > 0
        return jnp.where(jnp.pad(mask, ((0, 0), (0, size - mask.shape[1]))), scaled, -jnp.inf)

    scaled = jax.lax.cond(choices.constrained, of_allowed, lambda: scaled)
    real = jnp.where(jnp.arange(size) < vocab_size, scaled, -jnp.inf)
    kept = jax.lax.cond(choices.filtered, lambda: _filtered(real, choices), lambda: real)

    def sampled() -> Array:
        return choose(kept, keys, steps, jnp.float32(1))[0]

    likeliest = choose(kept, keys, steps, jnp.float32(0))[0]
    return jax.lax.cond(greedy.all(), lambda: likeliest, lambda: jnp.where(greedy[:, 0], likeliest, sampled()))


def _filtered(logits: Float[Array, "R V"], choices: SlotSettings) -> Float[Array, "R V"]:
    """`filter_logits` with the top-k and top-p of each row; a row with neither is unchanged."""
    top_k, top_p = jnp.asarray(choices.top_k)[:, None], jnp.asarray(choices.top_p, jnp.float32)[:, None]
    ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    last = jnp.where(top_k > 0, jnp.clip(top_k, 1, logits.shape[-1]), logits.shape[-1]) - 1
    kth = jnp.take_along_axis(ordered, last, axis=-1)
    ordered, logits = (jnp.where(x < kth, -jnp.inf, x) for x in (ordered, logits))
    probs = jax.nn.softmax(ordered, axis=-1)
    inside = (jnp.cumsum(probs, axis=-1) - probs < top_p) | (jnp.arange(logits.shape[-1]) == 0)
    lowest = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where((top_p < 1) & (logits < lowest), -jnp.inf, logits)
