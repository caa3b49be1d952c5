"""Shared parts of held-out metrics: the measured model, results, and log-probabilities of token rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Float

from lm.between_batches import between_batches
from lm.data.text_tokenizer import TextTokenizer
from lm.experiment import RolloutMesh
from lm.model.heads import Scorer
from lm.model.transformer import Transformer
from lm.objectives.logprobs import last_scores, token_logprobs
from lm.parallel.distributed import fetch
from lm.types import TokenBatch

ROWS = 64  # most rows in one forward pass or one batch of samples: bounds memory
SHOWN = 12  # examples kept for the report

Measurable = TypeVar("Measurable", Transformer, Scorer, Transformer | Scorer)
Row = tuple[list[int], list[int]]  # token ids and loss mask


@dataclass(frozen=True)
class Measured:
    """The numbers of one evaluation, and a few examples to read."""

    values: dict[str, Any]
    count: int
    examples: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Subject(Generic[Measurable]):
    """The measured model (language model or scorer); `reference` is the reference of implicit rewards and KL.

    `scorers` are reward models whose mean score is reported, if any; `seed` is the sampling seed; `talks` are the paths of
    sources that are trained on as conversations; `layout` is how sampling uses the devices.
    """

    model: Measurable
    tokenizer: TextTokenizer
    reference: Transformer | None = None
    scorers: tuple[Scorer, ...] = ()
    seed: int = 0
    talks: frozenset[str] = frozenset()
    layout: RolloutMesh = RolloutMesh()


@jax.jit
def _row_logp(model: Transformer, batch: TokenBatch) -> Float[Array, " B"]:
    """Weighted sum of the log-probabilities of each row, in nats."""
    return (token_logprobs(model, batch).logp * batch.weights).sum(axis=1)


_row_score = jax.jit(lambda scorer, batch: last_scores(scorer, batch)[0])


def row_logp(model: Transformer, rows: Sequence[Row], width: int) -> Float[np.ndarray, " N"]:
    """Log-probability of the masked tokens of each (tokens, mask) row, in nats; rows are right padded to `width`."""
    return np.concatenate([fetch(_row_logp(model, batch))[:size] for size, batch in _batches(rows, width)])


def row_scores(scorer: Scorer, rows: Sequence[Row], width: int) -> Float[np.ndarray, " N"]:
    """A scorer's number at the last masked token of each row."""
    return np.concatenate([fetch(_row_score(scorer, batch))[:size] for size, batch in _batches(rows, width)])


def _batches(rows: Sequence[Row], width: int) -> Iterator[tuple[int, TokenBatch]]:
    """Batches of one shape, each with the number of rows that are not padding."""
    size = rows_at_once(len(rows))
    for start in range(0, len(rows), size):
        between_batches()
        part = rows[start : start + size]
        tokens, weights, segments = (np.zeros((size, width), kind) for kind in (np.int32, np.float32, np.int32))
        for i, (ids, mask) in enumerate(part):
            tokens[i, : len(ids)], weights[i, : len(ids)], segments[i, : len(ids)] = ids, mask, 1
        positions = np.broadcast_to(np.arange(width, dtype=np.int32), (size, width))
        yield len(part), TokenBatch(tokens, weights, segments, positions)


def rows_at_once(count: int) -> int:
    """Rows of each batch where `count` are measured: ROWS, or of fewer the next power of two, so that few shapes compile."""
    return min(ROWS, 1 << max(0, count - 1).bit_length())


def rounded(length: int, most: int) -> int:
    """Round a length up to a multiple of 16, so that few shapes compile, but to at most `most`."""
    return min(most, -(-length // 16) * 16)


def mean_of(name: str, values: Sequence[float] | Float[np.ndarray, " N"]) -> dict[str, float]:
    """A mean and its standard error, as NAME and NAME_stderr."""
    return {name: float(np.mean(values)), f"{name}_stderr": float(np.std(values) / np.sqrt(len(values)))}
