"""Engines complete prompts: requests in, completions out, as tokens with the log-probabilities at sampling.

`LocalEngine` is the sampler of this process, on the devices of the run. Training, evaluation and `lm sample` call an engine
and never a model, so that another engine (such as an inference server) is another object with the same method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int32, PRNGKeyArray

from lm.data.packing import left_pad
from lm.data.text_tokenizer import TextTokenizer
from lm.experiment import UserError
from lm.model.transformer import Transformer
from lm.parallel.distributed import fetch
from lm.rollout.sampler import encode_prompt, generate


@dataclass(frozen=True)
class Request:
    """Prompts as unpadded tokens, and how to complete them.

    The `group_size` completions of a prompt are adjacent. Prompts are padded to `width` tokens, so that requests of the
    same width compile once (0: the longest prompt). `limits` are the maximum new tokens of single completions, where lower
    than `max_new_tokens`; a limit of 0 leaves the prompt unchanged.
    """

    prompts: Sequence[Any]  # arrays or lists of token ids
    key: PRNGKeyArray
    max_new_tokens: int
    temperature: float = 1.0
    group_size: int = 1
    width: int = 0
    top_k: int = 0
    top_p: float = 1.0
    limits: Sequence[int] | None = None


class Completion(NamedTuple):
    """Sampled tokens after a prompt, up to and including the end token.

    `logp` are the sampler's log-probabilities, `sampled` is true for tokens that the model chose (the engine inserted the
    others), `ended` says whether the last token is the end token, and `version` is the number of training steps of the weights.
    """

    tokens: Int32[np.ndarray, " N"]
    logp: Float32[np.ndarray, " N"]
    sampled: Bool[np.ndarray, " N"]
    ended: bool
    version: int


class Engine(Protocol):
    """Protocol of an engine, which completes prompts."""

    def complete(self, request: Request) -> list[Completion]:
        """The completions of all prompts in order, `group_size` adjacent ones for each; every process gets all of them."""
        ...


@dataclass(frozen=True)
class LocalEngine:
    """The engine of this process; `version` is the number of training steps of its model's weights."""

    model: Transformer
    tokenizer: TextTokenizer
    version: int = 0

    def complete(self, request: Request) -> list[Completion]:
        """See `Engine`; the samples of a row do not depend on the prompts of other rows."""
        width = request.width or max(map(len, request.prompts))
        tokens, lengths = left_pad(request.prompts, width, self.tokenizer.pad_id)
        limits = None if request.limits is None else np.asarray(request.limits, np.int32)
        out = fetch(
            generate(
                self.model, tokens, lengths, request.key, request.temperature, limits, group_size=request.group_size,
                max_new_tokens=request.max_new_tokens, top_k=request.top_k, top_p=request.top_p,
                end_ids=self.tokenizer.end_ids, pad_id=self.tokenizer.pad_id, vocab_size=self.tokenizer.vocab_size,
            )
        )  # fmt: skip
        return [self._completion(*row) for row in zip(out.tokens, out.logp, out.mask.sum(1).tolist(), strict=True)]

    def _completion(self, tokens: np.ndarray, logp: np.ndarray, size: int) -> Completion:
        ended = size > 0 and int(tokens[size - 1]) in self.tokenizer.end_ids
        return Completion(tokens[:size], logp[:size], np.ones(size, bool), ended, self.version)


def completion_text(tokenizer: TextTokenizer, completion: Completion) -> str:
    """The text of a completion, without its end token."""
    return tokenizer.decode(completion.tokens[: len(completion.tokens) - completion.ended].tolist())


@dataclass(frozen=True)
class TextCompletion:
    """A completion as text, and whether the model sampled its end token."""

    text: str
    eos: bool


def generate_text(
    model: Transformer,
    tokenizer: TextTokenizer,
    prompts: list[str] | list[list[dict]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    raw: bool = False,
) -> list[TextCompletion]:
    """Answers to prompts (strings or conversations) as text, sampled in one batch.

    Raises:
        UserError: a prompt does not fit in the model's context with the answer.
    """
    encoded = [encode_prompt(tokenizer, prompt, raw) for prompt in prompts]
    room = model.config.max_len - max_new_tokens
    longest = max(map(len, encoded))
    if longest > room:
        raise UserError(
            f"a prompt has {longest} tokens; model.max_len {model.config.max_len} less {max_new_tokens} new tokens "
            f"leaves {room}: shorten it or ask for fewer new tokens"
        )
    width = min(room, _bucket(longest))
    request = Request(encoded, jax.random.key(seed), max_new_tokens, temperature, width=width, top_k=top_k, top_p=top_p)
    completions = LocalEngine(model, tokenizer).complete(request)
    return [TextCompletion(completion_text(tokenizer, one), one.ended) for one in completions]


def _bucket(length: int) -> int:
    """Round up to a power of two, at least 16, so that few shapes compile."""
    return max(16, 1 << (length - 1).bit_length())
