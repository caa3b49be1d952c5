"""Engines complete prompts: requests in, completions out, as tokens with the log-probabilities at sampling.

`LocalEngine` is the sampler of this process, on the devices of the run. Training, evaluation and `lm sample` call an engine
and never a model, so that another engine (such as an inference server) is another object with the same method.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int32, PRNGKeyArray

from lm.between_batches import between_batches
from lm.data.text_tokenizer import TextTokenizer
from lm.experiment import RolloutMesh, UserError
from lm.model.transformer import Transformer
from lm.parallel.distributed import fetch
from lm.parallel.mesh import rollout_mesh
from lm.rollout.batching import Batching, Occupant, Sizes, sizes_of
from lm.rollout.sampler import encode_prompt
from lm.rollout.slots import (
    Slots,
    decoding_model,
    empty_reader,
    empty_slots,
    fill_lanes,
    read_chunk,
    sample_tokens,
    sampling_model,
)

LOOK = 64  # tokens between two looks at what has ended, and for a signal
STOP_LOOK = 16  # the same where strings end completions


@dataclass(frozen=True)
class Request:
    """Prompts as unpadded tokens, and how to complete them.

    The `group_size` completions of a prompt are adjacent. Prompts are padded to `width` tokens, so that requests of the
    same width compile once (0: the longest prompt). `limits` are the maximum new tokens of single completions, where lower
    than `max_new_tokens`; a limit of 0 leaves the prompt unchanged. A completion ends with the token after which its text has one
    of the strings of `stop`.
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
    stop: Sequence[str] = ()


class Completion(NamedTuple):
    """Sampled tokens after a prompt, up to and including the end token.

    `logp` are the sampler's log-probabilities, `sampled` is true for tokens that the model chose (the engine inserted the
    others), `ended` says whether the last token is the end token, `version` is the number of training steps of the weights, and
    `stopped` is the stop string that ended the completion, if one did.
    """

    tokens: Int32[np.ndarray, " N"]
    logp: Float32[np.ndarray, " N"]
    sampled: Bool[np.ndarray, " N"]
    ended: bool
    version: int
    stopped: str = ""


class Engine(Protocol):
    """Protocol of an engine, which completes prompts."""

    def complete(self, request: Request) -> list[Completion]:
        """The completions of all prompts in order, `group_size` adjacent ones for each; every process gets all of them."""
        ...


@dataclass(frozen=True)
class LocalEngine:
    """The engine of this process; `version` is the number of training steps of its model's weights.

    Completions are sampled in `slots` slots (0: the number that suits the device); a slot whose completion has ended goes on
    with another. A completion depends on the request's key, its prompt, the number of the prompt and its number in the group, not
    on its slot nor on other completions: it is equal to the bit beside any others, for one number of slots, kind of device and mesh.
    `cache` "int8" keeps keys and values in int8, "same" as they are computed. `layout` arranges the devices of the current mesh for sampling; the first program of a request reshards the weights.
    """

    model: Transformer
    tokenizer: TextTokenizer
    version: int = 0
    slots: int = 0
    layout: RolloutMesh = RolloutMesh()
    cache: str = "same"

    def complete(self, request: Request) -> list[Completion]:
        """See `Engine`."""
        mesh = jax.sharding.get_mesh()
        with contextlib.nullcontext() if mesh.empty else jax.set_mesh(rollout_mesh(self.layout, mesh)):
            return self._completions(request)

    def _completions(self, request: Request) -> list[Completion]:
        count, group = len(request.prompts), request.group_size
        limits = np.full((count, group), request.max_new_tokens)
        if request.limits is not None:
            limits = np.minimum(limits, np.reshape(request.limits, limits.shape))
        width = request.width or max(map(len, request.prompts))
        batching = Batching(sizes_of(count, group, width, request.max_new_tokens, self.slots), limits.tolist())
        nothing = self._completion(np.zeros(0, np.int32), np.zeros(0, np.float32), request.stop)
        found = [nothing] * (count * group)
        for place, tokens, logp in self._ended(request, batching):
            found[place.prompt * group + place.sample] = self._completion(tokens, logp, request.stop)
        return found

    def _ended(self, request: Request, batching: Batching) -> Iterator[tuple[Occupant, np.ndarray, np.ndarray]]:
        """Each completion's tokens and log-probabilities, as soon as it has ended."""
        s, model = batching.sizes, sampling_model(self.model)
        decoder = decoding_model(model)
        slots = empty_slots(model, s.slots, s.lanes, s.prompt, s.new, self.cache)
        reader = empty_reader(model, s.reading, s.prompt)
        while batching.waits or batching.running:
            between_batches()
            while chosen := batching.next_prompts():
                slots, reader = _read(model, slots, reader, s, request.prompts, chosen)
            slots = sample_tokens(
                decoder, slots, batching.assign(), request.key, request.temperature, STOP_LOOK if request.stop else LOOK,
                s.refill if batching.waits else s.slots + 1, end_ids=tuple(self.tokenizer.end_ids),
                top_k=request.top_k, top_p=request.top_p, vocab_size=self.tokenizer.vocab_size,
            )  # fmt: skip
            done, steps, tokens, logp = fetch((slots.done, slots.steps, slots.tokens, slots.logp))
            if request.stop:
                cut = zip(tokens, steps, strict=True)
                done = done | [bool(self._stopped(own[:size], request.stop)[1]) for own, size in cut]
            for slot, place in batching.end(done):
                yield place, tokens[slot, : steps[slot]], logp[slot, : steps[slot]]

    def _completion(self, tokens: np.ndarray, logp: np.ndarray, stop: Sequence[str]) -> Completion:
        size, stopped = self._stopped(tokens, stop)
        ended = size > 0 and int(tokens[size - 1]) in self.tokenizer.end_ids
        # Copies: a view would keep the arrays of all slots.
        return Completion(tokens[:size].copy(), logp[:size].copy(), np.ones(size, bool), ended, self.version, stopped)

    def _stopped(self, tokens: np.ndarray, stop: Sequence[str]) -> tuple[int, str]:
        """The number of tokens until one of the strings is in the text, and this string; else all tokens, and no string."""

        def first(size: int) -> str:
            text = self.tokenizer.decode(tokens[:size].tolist()) if stop else ""
            return next((one for one in stop if one in text), "")

        if not first(len(tokens)):
            return len(tokens), ""
        size = bisect.bisect_left(range(len(tokens)), True, key=lambda size: bool(first(size)))
        return size, first(size)


def _read(
    model: Transformer,
    slots: Slots,
    reader: tuple[Any, Any],
    sizes: Sizes,
    prompts: Sequence[Any],
    chosen: Sequence[tuple[int, int, int]],
) -> tuple[Slots, tuple[Any, Any]]:
    """Read the chosen (row of the reader, lane, prompt) in chunks, and put them into their lanes."""
    tokens, lengths = np.zeros((sizes.reading, sizes.prompt), np.int32), np.zeros(sizes.reading, np.int32)
    lanes = np.full(sizes.reading, sizes.lanes, np.int32)  # no lane has this number
    for row, lane, prompt in chosen:
        lengths[row], lanes[row] = len(prompts[prompt]), lane % (sizes.lanes // sizes.shards)
        tokens[row, : lengths[row]] = prompts[prompt]
    for start in range(0, lengths.max(), sizes.chunk):
        reader = read_chunk(model, *reader, np.int32(start), tokens[:, start : start + sizes.chunk], lengths)
    return fill_lanes(slots, *reader, lengths, lanes), reader


def completion_text(tokenizer: TextTokenizer, completion: Completion) -> str:
    """The text of a completion, without its end token; up to its stop string, if one ended it."""
    text = tokenizer.decode(completion.tokens[: len(completion.tokens) - completion.ended].tolist())
    return text[: text.index(completion.stopped)] if completion.stopped else text


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
