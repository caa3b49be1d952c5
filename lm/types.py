"""The values that travel through every training step: batches and means."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# On the host before it is sent, on the devices after; a step sees the latter.
Anywhere = Any


@typing.dataclass_transform(frozen_default=True)
def pytree(cls):
    """Make a class a frozen dataclass whose fields are all pytree children."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    return jax.tree_util.register_dataclass(cls, data_fields=names, meta_fields=[])


@pytree
class Mean:
    """A mean that has not been divided yet: totals and weights add over microbatches and devices."""

    total: Float[Array, ""]
    weight: Float[Array, ""]

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> Float[Array, ""]:
        """total / weight, and 0 where nothing was weighed."""
        empty = self.weight == 0
        return jnp.where(empty, 0.0, self.total / jnp.where(empty, 1.0, self.weight))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class SharedPrompt:
    """Each `rows` neighbouring rows of a batch, from its first on, have the same first `tokens` tokens, unweighted."""

    rows: int
    tokens: int


@pytree
class Batch:
    """One batch for any objective. Every per-token array speaks of the token at the same place.

    `weights[b, t]` weighs the *prediction of* `tokens[b, t]`: 0 on the first token of a segment, on
    prompts where only answers are trained on, and on padding. `segments` number the packed examples
    from 1; 0 is padding. `positions` restart at 0 in each segment. A preference batch has the chosen
    answer in rows 0, 2, 4, … and its rejected partner in the row after; both rows of a pair have its `margins`, by how
    much the chosen answer is better, and `ties`, 1 where neither is. In a batch of answers that are judged by themselves `desirable[b]` is 1 for a good one and 0 for a bad one, and row b of `mismatched`
    is row b's prompt with the answer of another row. `values` are a critic's, of the state before each token, when the
    row was sampled, and `returns` what it should have said. What an objective has no use for is None. `shared` is what a step may compute once for several rows; it changes no result.
    """

    tokens: Int[Anywhere, "B T"]
    weights: Float[Anywhere, "B T"]
    segments: Int[Anywhere, "B T"]
    positions: Int[Anywhere, "B T"]
    advantages: Float[Anywhere, "B T"] | None = None
    old_logp: Float[Anywhere, "B T"] | None = None
    ref_logp: Float[Anywhere, "B T"] | None = None
    sampler_logp: Float[Anywhere, "B T"] | None = None
    shared: SharedPrompt | None = None
    desirable: Float[Anywhere, " B"] | None = None
    margins: Float[Anywhere, " B"] | None = None
    ties: Float[Anywhere, " B"] | None = None
    values: Float[Anywhere, "B T"] | None = None
    returns: Float[Anywhere, "B T"] | None = None
    mismatched: Batch | None = None
