"""Scores of completions by reward models, and the check that rewards are finite."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lm.experiment import UserError
from lm.model.heads import Scorer
from lm.objectives.logprobs import last_scores
from lm.types import TokenBatch

ENSEMBLES: dict[str, Callable[..., Array]] = {"mean": jnp.mean, "min": jnp.min}


@functools.partial(jax.jit, static_argnames="ensemble")
def score_rows(scorers: tuple[Scorer, ...], batch: TokenBatch, ensemble: str = "mean") -> Float[Array, " B"]:
    """The score of each row's answer, combined over all reward models."""
    return ENSEMBLES[ensemble](jnp.stack([last_scores(scorer, batch)[0] for scorer in scorers]), axis=0)


def check_finite(scores: Float[np.ndarray, " B"], prompts: Sequence[str], where: str) -> None:
    """Raise a UserError that names the prompt if a score is not finite."""
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise UserError(
            f"{where}: the reward of {len(bad)} of {len(scores)} answers is {scores[bad[0]]}, the first to "
            f"{prompts[bad[0]]!r:.60}; what was saved is kept. A reward has to be finite: look at the reward model, or the verifier"
        )
