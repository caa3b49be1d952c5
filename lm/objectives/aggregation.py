"""Aggregations of token losses in the GRPO family: functions (token losses, mask, max_new_tokens) -> Mean."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from lm.types import Mean

Tokens = Float[Array, "B T"]


def token_mean(per_token: Tokens, mask: Tokens, max_len: int) -> Mean:
    """Mean over all tokens of the batch: DAPO (arXiv:2503.14476, section 3.3)."""
    return Mean((per_token * mask).sum(), mask.sum())


def sequence_mean(per_token: Tokens, mask: Tokens, max_len: int) -> Mean:
    """Mean over completions of the mean over their tokens: GRPO (arXiv:2402.03300, eq. 3)."""
    per_row = (per_token * mask).sum(1) / jnp.maximum(mask.sum(1), 1)
    return Mean(per_row.sum(), jnp.asarray(len(mask), per_row.dtype))


def sequence_sum(per_token: Tokens, mask: Tokens, max_len: int) -> Mean:
    """Mean over completions of the sum over their tokens: LUSPO (arXiv:2602.05261)."""
    return Mean((per_token * mask).sum(), jnp.asarray(len(mask), per_token.dtype))


def constant_mean(per_token: Tokens, mask: Tokens, max_len: int) -> Mean:
    """Mean over completions of the sum over their tokens divided by max_new_tokens: Dr. GRPO (arXiv:2503.20783)."""
    return Mean((per_token * mask).sum(), jnp.asarray(len(mask) * max_len, per_token.dtype))


AGGREGATIONS: dict[str, Callable[[Tokens, Tokens, int], Mean]] = {
    "token": token_mean,
    "sequence": sequence_mean,
    "sequence_sum": sequence_sum,
    "constant": constant_mean,
}
