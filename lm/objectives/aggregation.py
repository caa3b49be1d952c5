"""Aggregations of the GRPO family: (losses of tokens, mask, longest completion) -> mean; weights add over microbatches."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from lm.types import Mean

Tokens = Float[Array, "B T"]


def token_mean(per_token: Tokens, mask: Tokens, max_len: int) -> Mean:
    """DAPO (arXiv:2503.14476, section 3.3): every token of the whole batch counts the same."""
    return Mean((per_token * mask).sum(), mask.sum())


def sequence_mean(per_token: Tokens, mask: Tokens, max_len: int) -> Mean:
    """GRPO (arXiv:2402.03300, eq. 3): every completion counts the same, its tokens share."""
    per_row = (per_token * mask).sum(1) / jnp.maximum(mask.sum(1), 1)
    return Mean(per_row.sum(), jnp.asarray(len(mask), per_row.dtype))


def sequence_sum(per_token: Tokens, mask: Tokens, max_len: int) -> Mean:
    """LUSPO (arXiv:2602.05261): a completion's mean times its length, so that long ones are not held back; mean over them."""
    return Mean((per_token * mask).sum(), jnp.asarray(len(mask), per_token.dtype))


def constant_mean(per_token: Tokens, mask: Tokens, max_len: int) -> Mean:
    """Dr. GRPO (arXiv:2503.20783): sums over completions, divided by a constant length."""
    return Mean((per_token * mask).sum(), jnp.asarray(len(mask) * max_len, per_token.dtype))


AGGREGATIONS: dict[str, Callable[[Tokens, Tokens, int], Mean]] = {
    "token": token_mean,
    "sequence": sequence_mean,
    "sequence_sum": sequence_sum,
    "constant": constant_mean,
}
