"""Direct preference optimisation: one function of (policy log-ratio, reference log-ratio), a paper a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid
from jaxtyping import Array, Float

from lm.types import Mean


class Knobs(NamedTuple):
    """Numbers that the rows of the table share."""

    beta: float  # strength of the pull to the reference
    label_smoothing: float  # believed part of the labels that is flipped
    tau: float  # temperature of discopop's blend


Pairs = Float[Array, " n"]
"""One number a pair: log π(y|x) - log π_ref(y|x) of the chosen (c) or of the rejected answer (r)."""


def _sigmoid(c: Pairs, r: Pairs, k: Knobs) -> Pairs:
    """DPO (arXiv:2305.18290, eq. 7); with label smoothing conservative DPO (Mitchell 2023, eq. 3)."""
    margin = k.beta * (c - r)
    return -(1 - k.label_smoothing) * log_sigmoid(margin) - k.label_smoothing * log_sigmoid(-margin)


def _robust(c: Pairs, r: Pairs, k: Knobs) -> Pairs:
    """Provably robust DPO (arXiv:2403.00409): unbiased when that part of the labels is flipped."""
    margin = k.beta * (c - r)
    noisy = -(1 - k.label_smoothing) * log_sigmoid(margin) + k.label_smoothing * log_sigmoid(-margin)
    return noisy / (1 - 2 * k.label_smoothing)


def _hinge(c: Pairs, r: Pairs, k: Knobs) -> Pairs:
    """SLiC's hinge on the DPO margin (arXiv:2305.10425; RSO, arXiv:2309.06657)."""
    return jax.nn.relu(1 - k.beta * (c - r))


def _ipo(c: Pairs, r: Pairs, k: Knobs) -> Pairs:
    """IPO (arXiv:2310.12036, eq. 17), on log-ratios per token."""
    return jnp.square(c - r - 1 / (2 * k.beta))


def _exo_pair(c: Pairs, r: Pairs, k: Knobs) -> Pairs:
    """EXO (arXiv:2402.00856, eq. 16): reverse KL to the smoothed label, which must not be 0."""
    margin, flipped = k.beta * (c - r), max(k.label_smoothing, 1e-3)
    right = sigmoid(margin) * (log_sigmoid(margin) - jnp.log1p(-flipped))
    return right + sigmoid(-margin) * (log_sigmoid(-margin) - jnp.log(flipped))


def _nca_pair(c: Pairs, r: Pairs, k: Knobs) -> Pairs:
    """NCA with two answers (arXiv:2402.05369): the chosen answer's own likelihood is kept up."""
    return -log_sigmoid(k.beta * c) - 0.5 * log_sigmoid(-k.beta * c) - 0.5 * log_sigmoid(-k.beta * r)


def _sppo_hard(c: Pairs, r: Pairs, k: Knobs) -> Pairs:
    """SPPO with hard labels (arXiv:2405.00675, eq. 4.7); its η is 1/beta."""
    return jnp.square(c - 0.5 / k.beta) + jnp.square(r + 0.5 / k.beta)


def _apo_zero(c: Pairs, r: Pairs, k: Knobs) -> Pairs:
    """APO-zero (arXiv:2408.06266, eq. 7): chosen up, rejected down."""
    return sigmoid(-k.beta * c) + sigmoid(k.beta * r)


def _apo_down(c: Pairs, r: Pairs, k: Knobs) -> Pairs:
    """APO-down (arXiv:2408.06266, eq. 8): both down, the rejected one further."""
    return sigmoid(k.beta * c) + sigmoid(-k.beta * (c - r))


def _discopop(c: Pairs, r: Pairs, k: Knobs) -> Pairs:
    """DiscoPOP (arXiv:2406.08414, eq. 5): logistic and exponential loss, blended by the margin."""
    margin = k.beta * (c - r)
    blend = sigmoid(margin / k.tau)
    return -(1 - blend) * log_sigmoid(margin) + blend * jnp.exp(-margin)


LOSSES: dict[str, Callable[[Pairs, Pairs, Knobs], Pairs]] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid,
    "robust": _robust,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
}

PER_TOKEN = frozenset({"ipo", "sigmoid_norm"})
"""Rows that read the mean over an answer's tokens; the others read the sum."""


def dpo(
    logp: Float[Array, "2n T"],
    ref_logp: Float[Array, "2n T"],
    weights: Float[Array, "2n T"],
    *,
    loss: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    tau: float = 0.05,
) -> tuple[Mean, dict[str, Mean]]:
    """Mean over pairs of a row of LOSSES; row 2i of the arrays is pair i's chosen answer, row 2i + 1 its rejected.

    `weights` are 1 on the answers' tokens and 0 elsewhere. A pair without any answer token is padding and counts
    for nothing. Rewards in the metrics are beta times the log-ratio summed over the answer.
    """
    log_ratio = jnp.where(weights == 0, 0.0, (logp - ref_logp) * weights).sum(-1)
    lengths = weights.sum(-1)
    scores = log_ratio / jnp.maximum(lengths, 1) if loss in PER_TOKEN else log_ratio
    per_pair = LOSSES[loss](scores[0::2], scores[1::2], Knobs(beta, label_smoothing, tau))
    present = (lengths[0::2] + lengths[1::2] > 0).astype(per_pair.dtype)

    def mean(values: Pairs) -> Mean:
        return Mean((values * present).sum(), present.sum())

    chosen, rejected = beta * log_ratio[0::2], beta * log_ratio[1::2]
    metrics = {
        "reward_accuracy": mean((chosen > rejected).astype(per_pair.dtype)),
        "reward_margin": mean(chosen - rejected),
        "reward_chosen": mean(chosen),
        "reward_rejected": mean(rejected),
    }
    return mean(per_pair), metrics
