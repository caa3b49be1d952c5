"""Choice of the next token, and a token stream for chat."""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lm.data.chat import render
from lm.data.text_tokenizer import TextTokenizer
from lm.experiment import UserError
from lm.model.transformer import KVCache, Transformer, num_params
from lm.parallel.rules import platform


def filter_logits(logits: Float[Array, "B V"], top_k: int, top_p: float) -> Float[Array, "B V"]:
    """Logits after top-k (0: off) and top-p filtering; all other tokens get -inf.

    Source: nucleus sampling, arXiv 1904.09751. The likeliest token always stays.
    """
    if top_k:
        kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p < 1.0:
        ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        probs = jax.nn.softmax(ordered, axis=-1)
        inside = (
            jnp.cumsum(probs, axis=-1) - probs < top_p
        )  # the mass before a token decides, so the first always stays
        lowest = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return logits


def completion_keys(key: PRNGKeyArray, prompts: Int[Array, " B"], samples: Int[Array, " B"]) -> PRNGKeyArray:
    """A key for each completion, by the number of its prompt and its number among the completions of the prompt."""
    fold = jax.random.fold_in
    return jax.vmap(lambda prompt, sample: fold(fold(key, prompt), sample))(prompts, samples)


def choose(
    logits: Float[Array, "B V"],
    keys: PRNGKeyArray,
    steps: Int[Array, " B"],
    temperature: Float[Array, ""],
    top_k: int = 0,
    top_p: float = 1.0,
    vocab_size: int | None = None,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Sample one token per row; its log-probability is at this temperature, before top-k and top-p (greedy: at 1).

    Uses the inverse CDF: one uniform number per row, without noise or a sort over the vocabulary.

    Args:
        keys, steps: key of each row's completion and number of its token, which together give the row's uniform number.
        vocab_size: number of tokens where the model has more rows, as published models do; None: as many. Rows without a
            token are never sampled. They stay in the normaliser of the log-probability, as they do in training.
    """
    greedy = temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, temperature)
    best = scaled.max(-1, keepdims=True)
    total = jnp.exp(scaled - best).sum(-1)
    place = jnp.arange(logits.shape[-1])
    real = scaled if vocab_size in (None, len(place)) else jnp.where(place < vocab_size, scaled, -jnp.inf)
    top = real.max(-1, keepdims=True)

    def likeliest() -> Int[Array, " B"]:
        return jnp.min(jnp.where(real == top, place, place[-1]), axis=-1)

    def sampled() -> Int[Array, " B"]:
        odds = jnp.exp(real - top)  # not normalised
        kept = filter_logits(real, top_k, top_p)
        uniform = jax.vmap(lambda key, step: jax.random.uniform(jax.random.fold_in(key, step)))(keys, steps)
        return inverse_cdf(jnp.where(kept == -jnp.inf, 0.0, odds), uniform)

    # An accelerator is faster without a branch.
    token = (
        jax.lax.cond(greedy, likeliest, sampled) if platform() == "cpu" else jnp.where(greedy, likeliest(), sampled())
    )
    logp = jnp.take_along_axis(scaled - best, token[:, None], axis=-1)[:, 0] - jnp.log(total)
    return token, logp


def inverse_cdf(odds: Float[Array, "B V"], uniform: Float[Array, " B"]) -> Int[Array, " B"]:
    """The index at which the cumulative sum of each row passes its uniform number, as a part of the row's total.

    Sums over pieces of the row come first, so that the cumulative sums are over one piece only.
    """
    rows, size = odds.shape
    pieces = jnp.pad(odds, ((0, 0), (0, -size % PIECE))).reshape(rows, -1, PIECE)
    sums = pieces.sum(-1)
    mass = jnp.cumsum(sums, axis=-1)
    u = uniform * mass[:, -1]
    piece = _passed(mass, sums, u)[:, None]
    before = jnp.take_along_axis(mass - sums, piece, axis=-1)[:, 0]
    inside = jnp.take_along_axis(pieces, piece[:, :, None], axis=1)[:, 0]
    return piece[:, 0] * PIECE + _passed(jnp.cumsum(inside, axis=-1), inside, u - before)


PIECE = 128  # tokens


def _passed(mass: Float[Array, "B N"], odds: Float[Array, "B N"], u: Float[Array, " B"]) -> Int[Array, " B"]:
    """The first index with odds whose cumulative `mass` is above u; the last one with odds if rounding leaves none."""
    place = jnp.where(odds > 0, jnp.arange(odds.shape[-1]), -1)
    first = jnp.min(jnp.where((mass > u[:, None]) & (place >= 0), place, odds.shape[-1]), axis=-1)
    return jnp.minimum(first, place.max(-1))


def encode_prompt(tokenizer: TextTokenizer, prompt: str | list[dict], raw: bool = False) -> list[int]:
    """Tokens of a chat (or a single user turn) up to the start of the assistant's turn; raw: of the start of a document.

    A prompt for a model without a chat template is raw too.
    """
    if raw or (isinstance(prompt, str) and not tokenizer.chats):
        return [tokenizer.document_ids[0], *tokenizer.encode(str(prompt))]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return render(messages, tokenizer, generation_prompt=True).tokens


SMALL = 10_000_000  # parameters
QUICK: dict[str, bool | int] = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
"""Compiler options for a small model on a CPU: compilation takes a fifth of the time, and the model runs as fast."""


def _stream_program(model: Transformer) -> Callable[..., tuple[Int[Array, ""], KVCache]]:
    return _compiled_stream(jax.default_backend() == "cpu" and num_params(model) < SMALL)


@functools.cache
def _compiled_stream(quick: bool) -> Callable[..., tuple[Int[Array, ""], KVCache]]:
    options = QUICK if quick else None
    return jax.jit(
        _stream_step,
        static_argnames=("top_k", "top_p", "vocab_size"),
        donate_argnames=("cache",),
        compiler_options=options,
    )


def _stream_step(
    model: Transformer,
    cache: KVCache,
    start: Int[Array, ""],
    tokens: Int[Array, "1 T"],
    length: Int[Array, ""],
    key: PRNGKeyArray,
    number: Int[Array, ""],
    temperature: Float[Array, ""],
    top_k: int,
    top_p: float,
    vocab_size: int,
) -> tuple[Int[Array, ""], KVCache]:
    """Add `length` real tokens (the rest is right padding) from slot `start`; the next token, sampled."""
    column = jnp.arange(tokens.shape[1])[None, :]
    hidden, cache = model.extend(cache, start, tokens, start + column, (column < length).astype(jnp.int32))
    token, _ = choose(model.logits(hidden[:, length - 1]), key, number[None], temperature, top_k, top_p, vocab_size)
    return token[0], cache


def stream(
    model: Transformer,
    tokenizer: TextTokenizer,
    messages: list[dict],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Yield the assistant's next turn piece by piece as it is sampled.

    Raises:
        UserError: the conversation fills the model's context.
    """
    prompt = encode_prompt(tokenizer, messages)
    room = model.config.max_len - len(prompt)
    if room < 1:
        raise UserError(f"the conversation has {len(prompt)} tokens; model.max_len is {model.config.max_len}")
    width = _chunk(model.config.max_len, len(prompt))
    cache, program = _stream_cache(model), _stream_program(model)
    first = jnp.zeros(1, jnp.int32)
    key = completion_keys(jax.random.key(seed), first, first)

    def step(start: int, tokens: np.ndarray, length: int, number: int, cache: KVCache) -> tuple[int, KVCache]:
        token, cache = program(
            model, cache, jnp.int32(start), tokens, jnp.int32(length), key, jnp.int32(number),
            jnp.float32(temperature), top_k, top_p, tokenizer.vocab_size,
        )  # fmt: skip
        return int(token), cache

    for start in range(0, len(prompt), width):
        part = prompt[start : start + width]
        tokens = np.full((1, width), tokenizer.pad_id, np.int32)
        tokens[0, : len(part)] = part
        token, cache = step(start, tokens, len(part), 0, cache)
    ids: list[int] = []
    shown = ""
    for number in range(1, min(max_new_tokens, room) + 1):
        if token in tokenizer.end_ids:
            return
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # the middle of a character
            yield text[len(shown) :]
            shown = text
        if number < min(max_new_tokens, room):
            token, cache = step(len(prompt) + number - 1, np.array([[token]], np.int32), 1, number, cache)


def compile_stream(model: Transformer, tokenizer: TextTokenizer, top_k: int = 0, top_p: float = 1.0) -> None:
    """Compile the two functions that `stream` runs, for a short prompt and for one more token, in parallel."""

    def one(width: int) -> None:
        tokens, key = np.zeros((1, width), np.int32), jax.random.key(0)[None]
        arguments = (jnp.int32(0), tokens, jnp.int32(1), key, jnp.int32(0), jnp.float32(1.0))
        options = top_k, top_p, tokenizer.vocab_size
        jax.block_until_ready(_stream_program(model)(model, _stream_cache(model), *arguments, *options))

    with concurrent.futures.ThreadPoolExecutor(2) as both:
        list(both.map(one, (_chunk(model.config.max_len, 1), 1)))


SHORT, LONG = 32, 512  # tokens of a prompt that `stream` reads at a time: of a short prompt, of one beyond MOST_SHORT
MOST_SHORT = 256


def _chunk(max_len: int, length: int) -> int:
    """Width of the pieces in which a prompt is computed, the last padded on the right; few widths mean few compilations."""
    return LONG if max_len > MOST_SHORT and length > MOST_SHORT else SHORT


def _stream_cache(model: Transformer) -> KVCache:
    """A cache for one row of the longest context, rounded up so that the padded last piece of any prompt fits."""
    width = _chunk(model.config.max_len, model.config.max_len)
    return model.empty_cache(1, -(-model.config.max_len // width) * width)
