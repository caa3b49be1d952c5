"""Scalar heads: a reward model or critic with its own transformer (`Scorer`), and a head on the policy (`ScoreHead`)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lm.experiment import Model
from lm.model.parameter import parameter
from lm.model.transformer import Transformer
from lm.types import Aux


class ScoreHead(nnx.Module):
    """A linear head that maps a hidden state to a number; without a random key it is initialised to 0."""

    def __init__(self, config: Model, key: PRNGKeyArray | None):
        dtype, width = jnp.dtype(config.param_dtype), config.embed_dim
        # On normed hidden states the initial scores have a standard deviation of about 1.
        std = 0.0 if key is None else (width + 1) ** -0.5
        value = jnp.zeros(width) if key is None else jax.random.normal(key, (width,)) * std
        self.weight = parameter(value.astype(dtype), ("norm",))

    def __call__(self, hidden: Float[Array, "... D"]) -> Float[Array, "..."]:
        """Scores, in float32 or wider."""
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        return (hidden.astype(wide) * self.weight[...].astype(wide)).sum(-1)


class Scorer(nnx.Module):
    """A reward model or critic: the first `layers` layers of a language model (0: all), with a score at every token."""

    def __init__(self, model: Transformer, key: PRNGKeyArray | None, layers: int = 0):
        self.body = model.first_layers(layers or model.config.num_layers)
        self.body.head = None
        self.score = ScoreHead(model.config, key)

    @property
    def config(self) -> Model:
        return self.body.config

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segments: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T"], Aux]:
        """Scores: that of each token covers it and all tokens before it; and the metrics of the layers."""
        hidden, aux = self.body.hidden(tokens, positions, segments)
        return self.score(hidden), aux


def policy_of(models: dict[str, Any]) -> Any:
    """The language model among the models of a training state; in a reward-model stage the scorer."""
    return models["policy"] if "policy" in models else models["reward"]
