"""A transformer that gives numbers instead of tokens: a reward model, a critic; and a head that does so on a policy."""

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
    """One number of a hidden state. `zero` starts it at 0 everywhere."""

    def __init__(self, config: Model, key: PRNGKeyArray | None):
        dtype, width = jnp.dtype(config.param_dtype), config.embed_dim
        # Of normed hidden states the first scores have a deviation of about 1.
        std = 0.0 if key is None else (width + 1) ** -0.5
        value = jnp.zeros(width) if key is None else jax.random.normal(key, (width,)) * std
        self.weight = parameter(value.astype(dtype), ("norm",))

    def __call__(self, hidden: Float[Array, "... D"]) -> Float[Array, "..."]:
        """Scores, in float32 at least."""
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        return (hidden.astype(wide) * self.weight[...].astype(wide)).sum(-1)


class Scorer(nnx.Module):
    """A language model's body, or its first `layers` if not 0, without its head, and a score of every token's hidden state."""

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
        """The score of each token and what stands before it; and what the layers report."""
        hidden, aux = self.body.hidden(tokens, positions, segments)
        return self.score(hidden), aux


def policy_of(models: dict[str, Any]) -> Any:
    """The language model among those of a training state; a reward model's stage has none: its scorer."""
    return models["policy"] if "policy" in models else models["reward"]
