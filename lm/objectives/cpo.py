"""Losses of the CPO family, on preference pairs without a reference: CPO, SimPO and AlphaPO, functions of the reward margin."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Float

from lm.experiment import CPO
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

# margin: reward of the chosen answer minus reward of the rejected one, before beta.


def _sigmoid(margin: Pairs, k: CPO) -> Pairs:
    """CPO (arXiv:2401.08417, section 3), which is DPO with a uniform reference."""
    return -(1 - k.label_smoothing) * log_sigmoid(k.beta * margin) - k.label_smoothing * log_sigmoid(-k.beta * margin)


def _hinge(margin: Pairs, k: CPO) -> Pairs:
    """SLiC's hinge (arXiv:2305.10425)."""
    return jax.nn.relu(1 - k.beta * margin)


def _ipo(margin: Pairs, k: CPO) -> Pairs:
    """IPO (arXiv:2310.12036, eq. 17) with a uniform reference."""
    return jnp.square(margin - 1 / (2 * k.beta))


def _simpo(margin: Pairs, k: CPO) -> Pairs:
    """SimPO (arXiv:2405.14734, eq. 6), with a target margin of gamma / beta between mean log-probabilities."""
    return _sigmoid(margin - k.gamma / k.beta, k)


LOSSES: dict[str, Callable[[Pairs, CPO], Pairs]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "simpo": _simpo,
}

PER_TOKEN = frozenset({"ipo", "simpo"})
"""Losses that read log-probabilities averaged over an answer's tokens; the others read sums."""


def find_loss(name: str) -> tuple[Callable[[Pairs, CPO], Pairs], bool]:
    """The loss of that name, from LOSSES or the user's FILE:FUNCTION, and whether it reads means over tokens, not sums.

    A user's function reads means if its attribute `per_token` is true.
    """
    if is_function_name(name):
        own = own_loss(name, "loss", CPO.functions["loss"])
        return own, bool(getattr(own, "per_token", False))
    return LOSSES[name], name in PER_TOKEN


def reward(logp: Float[Array, " B"], alpha: float) -> Float[Array, " B"]:
    """AlphaPO's reward (1 - p^-alpha) / alpha (arXiv:2501.03884, section 3); for alpha 0 its limit, log p."""
    return -jnp.expm1(-alpha * logp) / alpha if alpha else logp


def cpo(
    logp: Float[Array, "2n T"],
    weights: Float[Array, "2n T"],
    o: CPO,
    *,
    nll_scale: Float[Array, ""] | None = None,
) -> tuple[Mean, dict[str, Mean]]:
    """CPO-family loss, a mean over pairs plus nll_coef times the mean cross-entropy of the chosen tokens, and its metrics.

    Row 2i of the arrays is the chosen answer of pair i, row 2i + 1 the rejected one.

    Args:
        logp: log-probabilities of the tokens under the policy, in nats.
        weights: 1 on the answers' tokens, 0 elsewhere; a pair without answer tokens is padding and is ignored.
        nll_scale: `likelihood_scale` of the whole batch, if these rows are a microbatch.
    """
    there = present(weights)
    row, per_token = find_loss(o.loss)
    rewards = reward((answer_means if per_token else answer_sums)(logp, weights), o.alpha)
    chosen, rejected = rewards[0::2], rewards[1::2]
    mean = mean_over(row(chosen - rejected, o), there)
    nll = likelihood(logp, weights)
    scale = likelihood_scale(weights, weights) if nll_scale is None else nll_scale
    metrics = reward_metrics(o.beta * chosen, o.beta * rejected, there) | {"nll": nll}
    return Mean(mean.total + o.nll_coef * scale * nll.total, mean.weight), metrics
