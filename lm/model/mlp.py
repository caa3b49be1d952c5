"""The MLP of a block, gated or plain, and its activation functions."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name as named
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lm.experiment import Model
from lm.model.linear import Linear
from lm.types import Aux

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # Primer, arXiv 2109.08668
}
"""Model.activation -> function."""


class MLP(nnx.Module):
    """down(activation(gate(x)) · up(x)), which is SwiGLU with silu (arXiv 2002.05202); ungated: down(activation(up(x)))."""

    def __init__(self, config: Model, keys: PRNGKeyArray, out_std: float):
        c, wide, narrow = config, {"mlp": config.mlp_dim}, {"embed": config.embed_dim}
        std = c.embed_dim**-0.5
        self.gate = Linear(keys[0], std, c.param_dtype, narrow, wide, c.mlp_bias) if c.gated_mlp else None
        self.up = Linear(keys[1], std, c.param_dtype, narrow, wide, c.mlp_bias)
        self.down = Linear(keys[2], c.mlp_dim**-0.5 * out_std, c.param_dtype, wide, narrow, c.mlp_bias)
        self.activation = c.activation

    def __call__(self, x: Float[Array, "B T D"], segments: Int[Array, "B T"]) -> tuple[Float[Array, "B T D"], Aux]:
        """Output of the MLP, to be added by the block, and the metrics that it reports (none)."""
        act = ACTIVATIONS[self.activation]
        if self.gate is None:
            return self.down(act(named(self.up(x), "mlp"))), {}
        gate, up = named(self.gate(x), "mlp"), named(self.up(x), "mlp")
        return self.down(act(gate) * up), {}
