"""What the tests of preference losses share: rows in our order, golden logits as log-probabilities, pairs to compute with."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from objective_checks import Case, shifted_logprobs

REWARDS = {
    "reward_accuracy": "rewards_accuracies",
    "reward_margin": "rewards_margins",
    "reward_chosen": "rewards_chosen",
    "reward_rejected": "rewards_rejected",
}
"""Our metrics and the names that the golden numbers have for them."""


def interleaved(x: np.ndarray) -> np.ndarray:
    """Rows [chosen; rejected] as chosen, rejected, chosen, …"""
    return x.reshape(2, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)


def golden_pairs(case: Case, dtype: str):
    """(logits, their log-probabilities as a function, weights of the answers, of all tokens) of a case that has logits."""
    tokens = jnp.asarray(interleaved(case.inputs["input_ids"]))
    answers = interleaved((case.inputs["labels"] != -100) & (case.inputs["attention_mask"] > 0)).astype(dtype)
    real = interleaved(case.inputs["attention_mask"]).astype(dtype)
    answers[:, 0] = real[:, 0] = 0
    logits = jnp.asarray(interleaved(case.inputs["logits"]))
    return logits, lambda logits: shifted_logprobs(logits, tokens).logp, jnp.asarray(answers), jnp.asarray(real)


def example_pairs() -> dict[str, np.ndarray]:
    """Four pairs with answers of different lengths."""
    rng = np.random.default_rng(0)
    weights = np.zeros((8, 7))
    for row, (start, stop) in enumerate([(1, 4), (2, 7), (3, 4), (1, 6), (2, 5), (1, 3), (4, 7), (2, 6)]):
        weights[row, start:stop] = 1
    return {
        "logp": -rng.exponential(size=(8, 7)),
        "ref_logp": -rng.exponential(size=(8, 7)),
        "weights": weights,
    }
