"""Data types shared by all training steps: batches, undivided means and penalties."""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# An array on the host or on the devices: batches are made on the host, and steps get them on the devices.
Anywhere = Any


@typing.dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def pytree(cls):
    """Class decorator: a frozen dataclass whose fields are pytree children."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    return jax.tree_util.register_dataclass(cls, data_fields=names, meta_fields=[])


@pytree
class Mean:
    """An undivided mean: total and weight, which are summed over microbatches and devices before the division."""

    total: Float[Array, ""]
    weight: Float[Array, ""]

    def __add__(self, other: Mean) -> Mean:
        return dataclasses.replace(self, total=self.total + other.total, weight=self.weight + other.weight)

    def value(self) -> Float[Array, ""]:
        """total / weight, or 0 if the weight is 0."""
        empty = self.weight == 0
        return jnp.where(empty, 0.0, self.total / jnp.where(empty, 1.0, self.weight))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["total", "weight"], meta_fields=["coef"])
@dataclasses.dataclass(frozen=True)
class Penalty(Mean):
    """A mean that is logged and also minimised: `make_step` adds `coef` times the mean to the loss of every objective."""

    coef: float = 1.0


Aux = dict[str, Mean]
"""Metrics of a model's layers for a batch, by name: means to log, and penalties such as a router's loss."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class SharedPrompt:
    """Every `rows` adjacent rows of a batch start with the same `tokens` prompt tokens, which have no weight."""

    rows: int
    tokens: int


NOTHING_SHARED = SharedPrompt(rows=1, tokens=0)


@pytree
class TokenBatch:
    """Rows of tokens; entry [b, t] of every per-token array belongs to tokens[b, t].

    `weights[b, t]` weights the loss of *predicting* `tokens[b, t]`: 0 on the first token of a segment, on prompts if only
    answers are trained on, and on padding. `segments` number the packed examples from 1; 0 is padding. `positions` restart
    at 0 in each segment. `shared` tells a step what it may compute once for several rows; it changes no result.
    """

    tokens: Int[Anywhere, "B T"]
    weights: Float[Anywhere, "B T"]
    segments: Int[Anywhere, "B T"]
    positions: Int[Anywhere, "B T"]
    shared: SharedPrompt = dataclasses.field(default=NOTHING_SHARED, kw_only=True)


def array_fields(kind: type[TokenBatch]) -> list[str]:
    """Names of the array fields of a batch type."""
    return [field.name for field in dataclasses.fields(kind) if field.name != "shared"]


@pytree
class PairBatch(TokenBatch):
    """Preference pairs: the chosen answer of pair i in row 2i, the rejected one in row 2i + 1.

    Both rows of a pair have its `margins`, by how much the chosen answer is better, and `ties`, 1 if neither is better.
    """

    margins: Float[Anywhere, " B"]
    ties: Float[Anywhere, " B"]


@pytree
class ReferencedPairBatch(PairBatch):
    """Preference pairs with the reference's log-probabilities, computed before the first step."""

    ref_logp: Float[Anywhere, "B T"]


@pytree
class LabelledBatch(TokenBatch):
    """Single labelled answers: `desirable` is 1 for a good answer and 0 for a bad one.

    Row b of `mismatched` is row b's prompt with the answer of another row.
    """

    desirable: Float[Anywhere, " B"]
    mismatched: TokenBatch


@pytree
class RolloutBatch(TokenBatch):
    """Sampled completions with advantages and with log-probabilities under the old policy and under the sampler.

    Without importance correction these are the same arrays; with it, `old_logp` is the trainer's.
    """

    advantages: Float[Anywhere, "B T"]
    old_logp: Float[Anywhere, "B T"]
    sampler_logp: Float[Anywhere, "B T"]


@pytree
class CriticBatch(RolloutBatch):
    """Sampled completions with values, returns and reference log-probabilities, for policy and critic.

    `values` are the critic's values of the state before each token at sampling time, `returns` their targets;
    `ref_logp` is under the model that entered the stage.
    """

    ref_logp: Float[Anywhere, "B T"]
    values: Float[Anywhere, "B T"]
    returns: Float[Anywhere, "B T"]


@pytree
class DistillBatch(RolloutBatch):
    """Completions that the student sampled or that the data has, with the rows that the teacher reads.

    A teacher's row has the student's completion in the same columns; its prompt may differ.
    """

    teacher: TokenBatch
