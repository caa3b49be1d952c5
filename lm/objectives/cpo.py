"""Preference pairs without a reference: CPO, SimPO, AlphaPO and their mixtures, one function of the two rewards."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Float

from lm.experiment import CPO
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
from lm.user_functions import is_function_name, load_function

# margin: the chosen answer's reward less the rejected one's, before beta.


def _sigmoid(margin: Pairs, k: CPO) -> Pairs:
    """CPO (arXiv:2401.08417, section 3): DPO with a uniform reference."""
    return -(1 - k.label_smoothing) * log_sigmoid(k.beta * margin) - k.label_smoothing * log_sigmoid(-k.beta * margin)


def _hinge(margin: Pairs, k: CPO) -> Pairs:
    """SLiC's hinge (arXiv:2305.10425)."""
    return jax.nn.relu(1 - k.beta * margin)


def _ipo(margin: Pairs, k: CPO) -> Pairs:
    """IPO (arXiv:2310.12036, eq. 17) with a uniform reference."""
    return jnp.square(margin - 1 / (2 * k.beta))


def _simpo(margin: Pairs, k: CPO) -> Pairs:
    """SimPO (arXiv:2405.14734, eq. 6): the mean log-probability should be higher by gamma / beta."""
    return _sigmoid(margin - k.gamma / k.beta, k)


LOSSES: dict[str, Callable[[Pairs, CPO], Pairs]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "simpo": _simpo,
}

PER_TOKEN = frozenset({"ipo", "simpo"})
"""Rows that read the mean over an answer's tokens; the others read the sum."""


def find_loss(name: str) -> tuple[Callable[[Pairs, CPO], Pairs], bool]:
    """A row of the table, or the user's own FILE:FUNCTION; and whether it reads means over tokens, not sums.

    The user's own reads means where it has an attribute `per_token` that is true.
    """
    if is_function_name(name):
        own = load_function(name, "loss", CPO.functions["loss"])
        return own, bool(getattr(own, "per_token", False))
    return LOSSES[name], name in PER_TOKEN


def reward(logp: Float[Array, " B"], alpha: float) -> Float[Array, " B"]:
    """AlphaPO's reward (arXiv:2501.03884, section 3), (1 - p^-alpha) / alpha; at alpha 0 its limit, log p."""
    return -jnp.expm1(-alpha * logp) / alpha if alpha else logp


def cpo(
    logp: Float[Array, "2n T"],
    weights: Float[Array, "2n T"],
    o: CPO,
    *,
    nll_scale: Float[Array, ""] | None = None,
) -> tuple[Mean, dict[str, Mean]]:
    """Mean over pairs of a row of LOSSES, and nll_coef times the cross-entropy of all chosen tokens.

    Row 2i of the arrays is pair i's chosen answer, row 2i + 1 its rejected; `weights` are 1 on the answers' tokens and
    0 elsewhere. A pair without any answer token is padding and counts for nothing.

    Args:
        nll_scale: `likelihood_scale` of the whole batch where these are a piece of it.
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
