"""A transformer block: attention and an MLP, each added to the residual stream, with norms before and/or after."""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name as named
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lm.experiment import Model
from lm.model.attention import Attention
from lm.model.mlp import MLP
from lm.model.norm import Norm
from lm.parallel.rules import constrain, row_major
from lm.types import Aux


class Block(nnx.Module):
    """A block, x + attention(norm(x)), then x + mlp(norm(x)); stacked, it holds the parameters of all layers.

    `config.norms` is the place of the norms: `pre`: before a part; `post`: after it (OLMo 2, arXiv 2501.00656 sec. 3.2);
    `sandwich`: before and after (Gemma 2, arXiv 2408.00118 sec. 2). A norm that a block lacks is None.
    """

    def __init__(self, config: Model, key: PRNGKeyArray, out_std: float):
        keys, before, after = jax.random.split(key, 7), config.norms != "post", config.norms != "pre"
        self.attn_norm = Norm(config, config.embed_dim) if before else None
        self.attention = Attention(config, keys[:4], out_std)
        self.attn_post_norm = Norm(config, config.embed_dim) if after else None
        self.mlp_norm = Norm(config, config.embed_dim) if before else None
        self.mlp = MLP(config, keys[4:], out_std)
        self.mlp_post_norm = Norm(config, config.embed_dim) if after else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: tuple[Array, Array],
        attend: Callable[[Array, Array, Array], Array],
        segments: Int[Array, "B T"],
    ) -> tuple[Float[Array, "B T D"], Aux]:
        """The residual stream after the block, and the metrics that its parts report.

        Args:
            angles: cos and sin of the rotary positions.
            attend: (queries, keys, values) -> heads, head-major.
            segments: 0 at padding, which a metric of a part leaves out of its mean.
        """
        heads = self.attention(_normed(self.attn_norm, x), angles, attend)
        x = residual(x + _normed(self.attn_post_norm, heads), "mid")
        y, aux = self.mlp(_normed(self.mlp_norm, x), segments)
        return residual(x + _normed(self.mlp_post_norm, y), "out"), aux


def _normed(norm: Norm | None, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return x if norm is None else norm(x)


def residual(x: Float[Array, "B T D"], name: str) -> Float[Array, "B T D"]:
    """The residual stream, sharded on the mesh and named for rematerialisation.

    Of a single token, row-major layout would have tiles that are mostly padding.
    """
    places = ("batch", "length", "act_embed")
    x = row_major(x, *places) if x.shape[1] > 1 else x
    return named(constrain(x, *places), name)
