"""KTO: single answers labelled good or bad, relative to a frozen reference, the model before the stage."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lm.algorithms.algorithm import Algorithm, reference_of
from lm.experiment import KTO, Stage
from lm.objectives.kto import kto, log_ratio_mean, reads_baseline
from lm.objectives.logprobs import token_logprobs
from lm.train_step import Models, Step, cut, make_step
from lm.types import LabelledBatch, Mean, TokenBatch


def extra_forward_passes(o: KTO) -> int:
    """Forward passes without gradient: the reference's, and for the baseline both models' on mismatched rows."""
    return 3 if reads_baseline(o.loss) else 1


def kto_step(stage: Stage[KTO], optimizer: optax.GradientTransformation) -> Step:
    """Training step of KTO on single answers, relative to the frozen reference; the baseline covers the whole batch."""
    o = stage.objective

    def loss(models: Models, frozen: Any, batch: LabelledBatch) -> tuple[Mean, dict[str, Mean]]:
        stats = token_logprobs(models["policy"], batch)
        ref_logp = jax.lax.stop_gradient(token_logprobs(reference_of(models, frozen), batch).logp)
        mean, metrics = kto(stats.logp, ref_logp, batch.weights, batch.desirable, o, frozen.get("kl"))
        return mean, metrics | stats.aux

    def batch_stats(models: Models, frozen: Any, batch: LabelledBatch) -> dict[str, Array]:
        def estimate(piece: TokenBatch) -> Mean:
            policy, reference = (
                token_logprobs(model, piece).logp for model in (models["policy"], reference_of(models, frozen))
            )
            return log_ratio_mean(policy, reference, piece.weights)

        if stage.microbatches == 1:
            found = estimate(batch.mismatched)
        else:
            found = jax.tree.map(jnp.sum, jax.lax.map(estimate, cut(batch.mismatched, stage.microbatches)))
        return {"kl": jnp.maximum(found.value(), 0.0)}

    return make_step(loss, stage, optimizer, batch_stats if reads_baseline(o.loss) else None)


ALGORITHM = Algorithm(
    kto_step, batch=lambda o: LabelledBatch, reads_reference=lambda o: True, extra_forward_passes=extra_forward_passes
)
