"""Gap between the sampler's and the trainer's log-probabilities, and whether rounding explains it.

Sampler and trainer compute the same numbers in a different order, so they differ by rounding: in proportion to the spread
of the logits, to 1 / temperature, and to the uncertainty of a token (1 - p). In float32 each token must be within a few of these
rounding units. In bfloat16 the rounding error of a model is measured, not assumed: a float32 pass over a rollout gives the reference
values. The trainer's mean distance from these is rounding; a sampler that is much further away has another policy.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lm.experiment import Model
from lm.objectives.logprobs import token_logprobs
from lm.parallel.rules import constrain, platform
from lm.types import RolloutBatch, pytree

LARGEST_RATIO = 1.7
"""bfloat16: largest allowed ratio of the sampler's mean distance from float32 to the trainer's, over many tokens; correct
samplers have about 1."""
LEAST_DISTANCE = 0.06
"""bfloat16: lower limit on the trainer's distance, in rounding units: if all tokens are certain, a smaller one is chance."""
LARGEST_UNITS = 8.0
"""float32: largest allowed gap of a token, in its rounding units; correct samplers have up to 0.8."""
FLOAT32 = 2.0**-24  # half a unit in the last place of 1


@pytree
class TrainerView:
    """The trainer's log-probabilities of a batch's tokens, and the rounding unit of each, in nats."""

    logp: Float[Array, "B T"]
    unit: Float[Array, "B T"]  # rounding unit of each token


@dataclass(frozen=True)
class SamplerGap:
    """Statistics of |log p(sampler) - log p(trainer)| over the sampled tokens of a rollout, in nats.

    `relative` is the gap in rounding units: for float32 the largest over tokens, else the mean, which no single token decides.
    """

    mean: float
    p99: float
    largest: float
    relative: float

    def metrics(self, name: str = "sampler_gap") -> dict[str, float]:
        """Metrics of the gap, reported at every rollout."""
        return {f"{name}_mean": self.mean, f"{name}_p99": self.p99, f"{name}_max": self.largest}


@dataclass(frozen=True)
class GapBound:
    """The sampler's distance from the expected log-probabilities, and the distance that rounding allows, in rounding units."""

    found: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether rounding explains the sampler's distance; false for NaN."""
        return self.found <= self.allowed


def precision(config: Model) -> str:
    """The precision of the logits: the narrowest dtype of the model, or bfloat16 if float32 products are narrower."""
    narrow = "bfloat16" in (config.compute_dtype, config.logits_dtype)
    return "bfloat16" if narrow or platform() != "cpu" else "float32"


@functools.partial(jax.jit, static_argnames=("temperature", "pieces"))
def trainer_view(model: Any, batch: RolloutBatch, temperature: float, pieces: int = 1) -> TrainerView:
    """The trainer's log-probabilities of a batch (0 where the weight is 0), computed in the stage's microbatches."""
    unit = 2.0**-9 if precision(model.config) == "bfloat16" else FLOAT32

    def view(piece: RolloutBatch) -> TrainerView:
        stats = token_logprobs(model, piece, temperature, want_mean_logp=True)
        assert stats.mean_logp is not None
        # An error of the logit counts in proportion to 1 - p; the rest is float32 rounding in the log-softmax.
        moved = unit * (1 - jnp.exp(stats.logp)) * -stats.mean_logp
        return TrainerView(stats.logp * piece.weights, moved + 16 * FLOAT32 * (1 + jnp.abs(stats.lse)))

    if pieces == 1:
        return view(batch)
    cut = jax.tree.map(lambda x: constrain(x.reshape(pieces, -1, *x.shape[1:]), None, "batch"), batch)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(view, cut))


def sampler_gap(views: list[TrainerView], batches: list[RolloutBatch], dtype: str) -> SamplerGap:
    """The gap over all tokens of a rollout's batches, for a model of this precision."""
    mean, p99, largest, mean_units, largest_units = map(float, _gap(views, batches))
    return SamplerGap(mean, p99, largest, largest_units if dtype == "float32" else mean_units)


@jax.jit
def _gap(views: list[TrainerView], batches: list[RolloutBatch]) -> tuple[Array, ...]:
    on = _flat([batch.weights for batch in batches]) > 0
    gap = jnp.abs(_flat([batch.sampler_logp for batch in batches]) - _flat([view.logp for view in views]))
    units = gap / _flat([view.unit for view in views])
    ordered = jnp.sort(jnp.where(on, gap, -1.0))  # sampled tokens come last
    count = jnp.maximum(on.sum(), 1)
    rank = jnp.ceil(0.99 * count).astype(jnp.int32)
    p99, largest = (jnp.maximum(ordered[len(ordered) - count - 1 + place], 0.0) for place in (rank, count))
    return _mean(gap, on), p99, largest, _mean(units, on), jnp.where(on, units, 0.0).max()


def is_suspicious(gap: SamplerGap, known: GapBound | None) -> bool:
    """Whether a rollout's gap must be checked: that of the first rollout, and any larger than all accepted ones."""
    return known is None or not gap.relative <= known.allowed


def agreement(
    model: Any,
    views: list[TrainerView],
    batches: list[RolloutBatch],
    gap: SamplerGap,
    temperature: float,
    pieces: int = 1,
) -> GapBound:
    """Whether rounding explains a rollout's gap; for bfloat16 found by a float32 forward pass."""
    if precision(model.config) == "float32":
        return GapBound(gap.relative, LARGEST_UNITS)
    with jax.default_matmul_precision("highest"):
        exact = [_float32_logp(model, batch, temperature, pieces) for batch in batches]
    sampler, trainer, effective = map(float, _distances(views, batches, exact))
    # With few tokens a larger ratio may be chance; if most tokens are certain, few remain.
    return GapBound(sampler, LARGEST_RATIO * (1 + 2 / max(effective, 1.0) ** 0.5) * max(trainer, LEAST_DISTANCE))


@functools.partial(jax.jit, static_argnames=("temperature", "pieces"))
def _float32_logp(model: Any, batch: RolloutBatch, temperature: float, pieces: int) -> Float[Array, "B T"]:
    exact = jax.tree.map(lambda x: x, model)
    exact.config = dataclasses.replace(model.config, compute_dtype="float32", logits_dtype="float32")
    return trainer_view(exact, batch, temperature, pieces).logp


@jax.jit
def _distances(views: list[TrainerView], batches: list[RolloutBatch], exact: list[Array]) -> tuple[Array, Array, Array]:
    """Mean distance of the sampler and of the trainer, and the effective number of tokens of the latter: (Σx)² / Σx² (Kish)."""
    on, unit = _flat([batch.weights for batch in batches]) > 0, _flat([view.unit for view in views])
    sampler, trainer = (
        jnp.where(on, jnp.abs(_flat(logp) - _flat(exact)) / unit, 0.0)
        for logp in ([batch.sampler_logp for batch in batches], [view.logp for view in views])
    )
    effective = jnp.square(trainer.sum()) / jnp.maximum(jnp.square(trainer).sum(), 1e-30)
    return _mean(sampler, on), _mean(trainer, on), effective


def _flat(arrays: list[Array]) -> Float[Array, " N"]:
    return jnp.concatenate([x.reshape(-1) for x in arrays])


def _mean(x: Array, on: Array) -> Float[Array, ""]:
    return jnp.where(on, x, 0.0).sum() / jnp.maximum(on.sum(), 1)
