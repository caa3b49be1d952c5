"""The DPO family: preference pairs, relative to a frozen reference, the model before the stage."""

from __future__ import annotations

from typing import Any

import jax
import optax
from jaxtyping import Array

from lm.algorithms.algorithm import Algorithm, reference_of
from lm.experiment import DPO, Stage
from lm.objectives.dpo import dpo
from lm.objectives.logprobs import token_logprobs
from lm.objectives.pairs import likelihood_scale
from lm.train_step import Models, Step, make_step
from lm.types import Mean, PairBatch, ReferencedPairBatch


def reads_reference(o: DPO) -> bool:
    """Whether the step runs the reference; not if its log-probabilities are cached in the batches."""
    return not o.caches_reference


def preference_step(stage: Stage[DPO], optimizer: optax.GradientTransformation) -> Step:
    """Training step of the DPO family on preference pairs, relative to the frozen reference."""
    o = stage.objective

    def loss(models: Models, frozen: Any, batch: ReferencedPairBatch) -> tuple[Mean, dict[str, Mean]]:
        stats = token_logprobs(models["policy"], batch, want_log_sum_sq=o.weighting)
        if o.caches_reference:
            ref_logp = batch.ref_logp
        else:
            ref_logp = jax.lax.stop_gradient(token_logprobs(reference_of(models, frozen), batch).logp)
        scale = frozen["sft_scale"]
        mean, metrics = dpo(stats.logp, ref_logp, batch.weights, o, log_sum_sq=stats.log_sum_sq, sft_scale=scale)
        return mean, metrics | stats.aux

    def batch_stats(models: Models, frozen: Any, batch: PairBatch) -> dict[str, Array]:
        return {"sft_scale": likelihood_scale(batch.weights, batch.weights)}

    return make_step(loss, stage, optimizer, batch_stats)


ALGORITHM = Algorithm(
    preference_step,
    reads_reference=reads_reference,
    batch=lambda o: ReferencedPairBatch if o.caches_reference else PairBatch,
    extra_forward_passes=reads_reference,
)
