"""Log-likelihoods of continuations after contexts, packed into rows; each distinct input is read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from lm.between_batches import between_batches
from lm.evals.rows import rounded
from lm.experiment import UserError
from lm.model.transformer import Transformer
from lm.objectives.logprobs import logprobs_at
from lm.parallel.distributed import fetch

TOKENS = 8192  # of one forward pass: bounds memory
SCORED = 256  # the tokens that a forward pass scores are rounded up to a multiple of this, so that few shapes compile


@dataclass(frozen=True)
class Continuation:
    """Tokens to score after the tokens of a context, both at least one."""

    context: Sequence[int]
    tokens: Sequence[int]


class Likelihood(NamedTuple):
    """Log-probability of a continuation in nats, and whether each of its tokens is the most likely one."""

    logp: float
    greedy: bool


@dataclass(frozen=True)
class _Input:
    """Tokens that are read once, and the continuations that end in them: (index of the request, its tokens)."""

    tokens: tuple[int, ...]
    scored: list[tuple[int, tuple[int, ...]]]


def score_continuations(
    model: Transformer,
    requests: Sequence[Continuation],
    done: Callable[[dict[int, Likelihood]], None] = lambda found: None,
) -> list[Likelihood]:
    """The likelihood of each continuation given its context, the longest first.

    Tokens of a context before the last `max_len` + 1 of all are left out, as lm-evaluation-harness does. Continuations whose inputs
    are equal (single tokens after one context, such as the letters of choices) share a forward pass.

    Args:
        done: called after each forward pass with its results by index.

    Raises:
        UserError: a continuation alone is longer than the context of the model.
    """
    longest = model.config.max_len
    inputs: dict[tuple[int, ...], _Input] = {}
    for index, one in enumerate(requests):
        if not one.context or not 0 < len(one.tokens) <= longest:
            raise UserError(
                f"a continuation has {len(one.tokens)} tokens after {len(one.context)}; it should have from 1 to model.max_len "
                f"{longest}, after at least 1"
            )
        tokens = tuple([*one.context, *one.tokens][-(longest + 1) : -1])
        inputs.setdefault(tokens, _Input(tokens, [])).scored.append((index, tuple(one.tokens)))
    found: dict[int, Likelihood] = {}
    for rows in _packed(sorted(inputs.values(), key=lambda one: -len(one.tokens)), longest):
        between_batches()
        new = _score(model, rows, longest)
        done(new)
        found |= new
    return [found[index] for index in range(len(requests))]


def _packed(inputs: Sequence[_Input], longest: int) -> Iterator[list[list[_Input]]]:
    """Rows of inputs for one forward pass after another: each row has as many as fit in the width of the first, the longest."""
    rows: list[list[_Input]] = []
    room: list[int] = []
    width = 0
    for one in inputs:
        size = len(one.tokens)
        place = next((row for row, left in enumerate(room) if size <= left), None)
        if place is None and rows and (len(rows) + 1) * width > TOKENS:
            yield rows
            rows, room = [], []
        if not rows:
            width = _width(size, longest)
        if place is None or not rows:
            place = len(rows)
            rows.append([])
            room.append(width)
        rows[place].append(one)
        room[place] -= size
    if rows:
        yield rows


def _width(size: int, longest: int) -> int:
    """Width of rows whose longest input has `size` tokens: few widths, at most an eighth wider than it."""
    step = max(16, 1 << max(0, (size - 1).bit_length() - 3))
    return min(rounded(-(-size // step) * step, longest), longest)


def _score(model: Transformer, rows: Sequence[Sequence[_Input]], longest: int) -> dict[int, Likelihood]:
    """The likelihoods of the continuations in one batch of rows."""
    width = _width(len(rows[0][0].tokens), longest)
    shape = max(1, TOKENS // width), width
    tokens, segments, positions = np.zeros((3, *shape), np.int32)
    where: list[int] = []
    targets: list[int] = []
    owners: list[tuple[int, int]] = []  # (request, number of its tokens)
    for row, inputs in enumerate(rows):
        start = 0
        for number, one in enumerate(inputs, start=1):
            end = start + len(one.tokens)
            tokens[row, start:end], segments[row, start:end] = one.tokens, number
            positions[row, start:end] = np.arange(end - start)
            for index, said in one.scored:
                where += range(row * width + end - len(said), row * width + end)
                targets += said
                owners.append((index, len(said)))
            start = end
    padding = -len(where) % SCORED
    logp, correct = fetch(
        _logprobs(model, tokens, positions, segments, np.pad(where, (0, padding)), np.pad(targets, (0, padding)))
    )
    starts = np.cumsum([0, *(size for _, size in owners)])[:-1]
    sums = np.add.reduceat(logp.astype(np.float64)[: len(where)], starts)
    least = np.minimum.reduceat(correct[: len(where)], starts)
    return {index: Likelihood(float(sums[i]), bool(least[i])) for i, (index, _) in enumerate(owners)}


@jax.jit
def _logprobs(
    model: Transformer,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    where: Int[Array, " N"],
    targets: Int[Array, " N"],
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Log-probabilities of targets predicted at the flat places `where`, and 1 where they are the most likely."""
    model = model.with_whole_tables()
    hidden, _ = model.hidden(tokens, positions, segments)
    return logprobs_at(model, hidden.reshape(-1, hidden.shape[-1])[where], targets)
