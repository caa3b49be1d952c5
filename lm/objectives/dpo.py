"""Losses of the DPO family, one per paper: functions of the log-ratios of the chosen and the rejected answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid
from jaxtyping import Array, Float

from lm.experiment import DPO
from lm.objectives.own_loss import own_loss
from lm.objectives.pairs import (
    Pairs,
    answer_means,
    answer_sums,
    likelihood,
    likelihood_scale,
    mean_over,
    present,
    reward_metrics,
)
from lm.types import Mean
from lm.user_functions import is_function_name

# ---- losses of one pair --------------------------------------------------------------------------------------------
# c and r: log π(y|x) - log π_ref(y|x) of the chosen and of the rejected answer, or its equivalent for another divergence.


def _sigmoid(c: Pairs, r: Pairs, k: DPO) -> Pairs:
    """DPO (arXiv:2305.18290, eq. 7), or with label smoothing conservative DPO (Mitchell 2023, eq. 3)."""
    margin = k.beta * (c - r)
    return -(1 - k.label_smoothing) * log_sigmoid(margin) - k.label_smoothing * log_sigmoid(-margin)


def _robust(c: Pairs, r: Pairs, k: DPO) -> Pairs:
    """Provably robust DPO (arXiv:2403.00409), unbiased if a fraction label_smoothing of the labels is flipped."""
    margin = k.beta * (c - r)
    noisy = -(1 - k.label_smoothing) * log_sigmoid(margin) + k.label_smoothing * log_sigmoid(-margin)
    return noisy / (1 - 2 * k.label_smoothing)


def _hinge(c: Pairs, r: Pairs, k: DPO) -> Pairs:
    """SLiC's hinge on the DPO margin (arXiv:2305.10425; RSO, arXiv:2309.06657)."""
    return jax.nn.relu(1 - k.beta * (c - r))


def _ipo(c: Pairs, r: Pairs, k: DPO) -> Pairs:
    """IPO (arXiv:2310.12036, eq. 17), on log-ratios per token."""
    return jnp.square(c - r - 1 / (2 * k.beta))


def _exo_pair(c: Pairs, r: Pairs, k: DPO) -> Pairs:
    """EXO (arXiv:2402.00856, eq. 16): reverse KL to the smoothed label; the smoothing is at least 1e-3."""
    margin, flipped = k.beta * (c - r), max(k.label_smoothing, 1e-3)
    right = sigmoid(margin) * (log_sigmoid(margin) - jnp.log1p(-flipped))
    return right + sigmoid(-margin) * (log_sigmoid(-margin) - jnp.log(flipped))


def _nca_pair(c: Pairs, r: Pairs, k: DPO) -> Pairs:
    """NCA with two answers (arXiv:2402.05369), which keeps up the likelihood of the chosen answer."""
    return -log_sigmoid(k.beta * c) - 0.5 * log_sigmoid(-k.beta * c) - 0.5 * log_sigmoid(-k.beta * r)


def _bco_pair(c: Pairs, r: Pairs, k: DPO) -> Pairs:
    """BCO on pairs (arXiv:2404.04656, section 4): binary classification of each answer as chosen or rejected.

    Simplified: the paper's reward shift, a moving average over steps, is 0 here.
    """
    return -log_sigmoid(k.beta * c) - log_sigmoid(-k.beta * r)


def _sppo_hard(c: Pairs, r: Pairs, k: DPO) -> Pairs:
    """SPPO with hard labels (arXiv:2405.00675, eq. 4.7); its η is 1/beta."""
    return jnp.square(c - 0.5 / k.beta) + jnp.square(r + 0.5 / k.beta)


def _apo_zero(c: Pairs, r: Pairs, k: DPO) -> Pairs:
    """APO-zero (arXiv:2408.06266, eq. 7): raises the chosen answer's likelihood and lowers the rejected one's."""
    return sigmoid(-k.beta * c) + sigmoid(k.beta * r)


def _apo_down(c: Pairs, r: Pairs, k: DPO) -> Pairs:
    """APO-down (arXiv:2408.06266, eq. 8): lowers both answers' likelihood, the rejected one's more."""
    return sigmoid(k.beta * c) + sigmoid(-k.beta * (c - r))


def _discopop(c: Pairs, r: Pairs, k: DPO) -> Pairs:
    """DiscoPOP (arXiv:2406.08414, eq. 5): a blend of logistic and exponential loss, weighted by the margin."""
    margin = k.beta * (c - r)
    blend = sigmoid(margin / k.tau)
    return -(1 - blend) * log_sigmoid(margin) + blend * jnp.exp(-margin)


LOSSES: dict[str, Callable[[Pairs, Pairs, DPO], Pairs]] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid,
    "robust": _robust,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
}

PER_TOKEN = frozenset({"ipo", "sigmoid_norm"})
"""Losses that read log-ratios averaged over an answer's tokens; the others read sums."""


def find_loss(name: str) -> tuple[Callable[[Pairs, Pairs, DPO], Pairs], bool]:
    """The loss of that name, from LOSSES or the user's FILE:FUNCTION, and whether it reads means over tokens, not sums.

    A user's function reads means if its attribute `per_token` is true.
    """
    if is_function_name(name):
        own = own_loss(name, "losses", DPO.functions["losses"])
        return own, bool(getattr(own, "per_token", False))
    return LOSSES[name], name in PER_TOKEN


# ---- losses that rank all pairs of a batch -------------------------------------------------------------------------


class PairBatchStats(NamedTuple):
    """Inputs of a loss that ranks all pairs of a batch."""

    chosen: Pairs  # c
    rejected: Pairs  # r
    margin: Pairs  # log π(chosen) - log π(rejected)
    ref_margin: Pairs  # the same of the reference
    there: Pairs  # 0 for padding


def _aot(p: PairBatchStats, k: DPO) -> Pairs:
    """Paired AOT (arXiv:2406.05882, section 3): margins of the policy against margins of the reference of the same rank."""
    return _sigmoid(p.margin, _of_equal_rank(p.margin, p.ref_margin, p.there), k)


def _aot_unpaired(p: PairBatchStats, k: DPO) -> Pairs:
    """Unpaired AOT (arXiv:2406.05882, section 3): chosen log-ratios against rejected log-ratios of the same rank."""
    return _sigmoid(p.chosen, _of_equal_rank(p.chosen, p.rejected, p.there), k)


def _of_equal_rank(x: Pairs, y: Pairs, there: Pairs) -> Pairs:
    """For each x the y of the same rank among the pairs that are `there`: the k-th smallest for the k-th smallest."""
    ranks = jnp.argsort(jnp.argsort(jnp.where(there > 0, x, jnp.inf)))
    matched = jnp.sort(jnp.where(there > 0, y, jnp.inf))[ranks]
    return jnp.where(there > 0, matched, 0.0)


WHOLE_BATCH: dict[str, Callable[[PairBatchStats, DPO], Pairs]] = {
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
}
"""Losses of a pair that depend on the other pairs of the batch, and therefore exclude microbatches."""

SFT = "sft"
"""Name of the loss that is the mean cross-entropy of the chosen answers' tokens (MPO, arXiv:2411.10442, eq. 6)."""


# ---- divergences ---------------------------------------------------------------------------------------------------

LARGEST_EXPONENT = 80.0  # e^88 is the end of float32


def _forward_kl(ratio: Pairs, alpha: float) -> Pairs:
    return -jnp.exp(jnp.minimum(-ratio, LARGEST_EXPONENT))


def _alpha_divergence(ratio: Pairs, alpha: float) -> Pairs:
    if alpha == 1:
        return ratio
    return jnp.exp(jnp.minimum((alpha - 1) * ratio, LARGEST_EXPONENT)) / (alpha - 1)


DIVERGENCES: dict[str, Callable[[Pairs, float], Pairs]] = {
    "reverse_kl": lambda ratio, alpha: ratio,
    "forward_kl": _forward_kl,
    "js_divergence": lambda ratio, alpha: log_sigmoid(ratio),
    "alpha_divergence": _alpha_divergence,
}
"""DPO.divergence -> f'(π / π_ref) as a function of the log-ratio and alpha, up to a constant that cancels within a pair.

Source: f-DPO (arXiv:2309.16240, section 4). alpha_divergence with alpha 1 is the reverse KL."""


def dpo(
    logp: Float[Array, "2n T"],
    ref_logp: Float[Array, "2n T"],
    weights: Float[Array, "2n T"],
    o: DPO,
    *,
    log_sum_sq: Float[Array, "2n T"] | None = None,
    sft_scale: Float[Array, ""] | None = None,
) -> tuple[Mean, dict[str, Mean]]:
    """DPO-family loss, a mean over pairs of the weighted sum of `o.losses`, and its metrics.

    Row 2i of the arrays is the chosen answer of pair i, row 2i + 1 the rejected one. Several losses are mixed as in MPO
    (arXiv:2411.10442, eq. 1). With ld_alpha below 1 the tokens of an answer beyond the length of its partner have that weight
    (LD-DPO, arXiv:2409.06411). Rewards in the metrics are beta times the log-ratio summed over the answer.

    Args:
        logp: log-probabilities of the tokens under the policy, in nats.
        ref_logp: the same under the reference.
        weights: 1 on the answers' tokens, 0 elsewhere; a pair without answer tokens is padding and is ignored.
        log_sum_sq: log Σ p² of the policy at each token; if given, pairs are weighted by their likelihood under the policy
            (WPO, arXiv:2406.11827), in all losses but SFT.
        sft_scale: `likelihood_scale` of the whole batch, if these rows are a microbatch.
    """
    lengths = weights.sum(-1)
    there = present(weights)
    tail = jnp.cumsum(weights, -1) > jnp.repeat(jnp.minimum(lengths[0::2], lengths[1::2]), 2)[:, None]
    counted = weights if o.ld_alpha == 1 else jnp.where(tail, o.ld_alpha, 1.0) * weights
    log_ratio = answer_sums(logp - ref_logp, counted)  # token by token: two long sums would leave fewer digits
    scores = DIVERGENCES[o.divergence](log_ratio, o.alpha)

    def row(name: str) -> Pairs:
        if name in WHOLE_BATCH:
            policy, reference = answer_sums(logp, counted), answer_sums(ref_logp, counted)
            margin, ref_margin = policy[0::2] - policy[1::2], reference[0::2] - reference[1::2]
            return WHOLE_BATCH[name](PairBatchStats(scores[0::2], scores[1::2], margin, ref_margin, there), o)
        loss, per_token = find_loss(name)
        read = scores / jnp.maximum(lengths, 1) if per_token else scores
        return loss(read[0::2], read[1::2], o)

    mixture = dict(zip(o.losses, o.loss_weights or [1.0] * len(o.losses), strict=True))
    per_pair = sum((weight * row(name) for name, weight in mixture.items() if name != SFT), jnp.zeros_like(there))
    if log_sum_sq is not None:
        likely = jax.lax.stop_gradient(jnp.exp(answer_means(logp - log_sum_sq, weights)))
        per_pair = per_pair * likely[0::2] * likely[1::2]
    loss = mean_over(per_pair, there)
    metrics = reward_metrics(o.beta * log_ratio[0::2], o.beta * log_ratio[1::2], there)
    if SFT in mixture:
        metrics["nll"] = likelihood(logp, weights)
        scale = likelihood_scale(weights, weights) if sft_scale is None else sft_scale
        loss = Mean(loss.total + mixture[SFT] * scale * metrics["nll"].total, loss.weight)
    return loss, metrics
