"""Distillation: divergence of a student's next-token distributions from a teacher's."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lm.experiment import Distill
from lm.objectives.logprobs import predictions, project_tokens, scaled_logits
from lm.types import Aux, DistillBatch, pytree

ARRAYS = 4  # arrays [B, N, V] that a divergence and its gradient hold at once, where one of logits counts as 1


@pytree
class DistillStats:
    """Student and teacher at each token: 0 where nothing is predicted.

    divergence: of the student's distribution from the teacher's, in nats.
    entropy, teacher_entropy: of the two distributions, in nats.
    agrees: 1 where both have the same most likely token.
    aux: metrics reported by the student's layers.
    """

    divergence: Float[Array, "B T"]
    entropy: Float[Array, "B T"]
    teacher_entropy: Float[Array, "B T"]
    agrees: Float[Array, "B T"]
    aux: Aux = dataclasses.field(default_factory=dict)


def generalised_jsd(
    student_logp: Float[Array, "B T V"], teacher_logp: Float[Array, "B T V"], o: Distill
) -> Float[Array, "B T"]:
    """Generalised Jensen-Shannon divergence of two distributions, in nats (GKD, arXiv:2306.13649, eq. 1).

    β·KL(teacher ‖ m) + (1 - β)·KL(student ‖ m) with m = β·teacher + (1 - β)·student; β = 0 is the forward KL(teacher ‖ student) and
    β = 1 the reverse KL(student ‖ teacher), the limits of the divergence divided by β or 1 - β.
    """
    if o.beta == 0:
        return _kl(teacher_logp, student_logp)
    if o.beta == 1:
        return _kl(student_logp, teacher_logp)
    mixture = jnp.logaddexp(student_logp + math.log1p(-o.beta), teacher_logp + math.log(o.beta))
    return o.beta * _kl(teacher_logp, mixture) + (1 - o.beta) * _kl(student_logp, mixture)


def _kl(p_logp: Float[Array, "B T V"], q_logp: Float[Array, "B T V"]) -> Float[Array, "B T"]:
    return (jnp.exp(p_logp) * (p_logp - q_logp)).sum(-1)


def token_divergence(student: Any, teacher: Any, batch: DistillBatch, o: Distill) -> DistillStats:
    """Statistics of student and teacher at the tokens of `batch`, without a gradient of the teacher.

    The models are as for `token_logprobs`, and the logits are computed in chunks as there. Of embeddings with different numbers of
    rows, the tokens that both have are compared.
    """
    models = student.with_whole_tables(), teacher.with_whole_tables()
    states, _, align, aux = predictions(models[0], batch, None)
    theirs, _, _, _ = predictions(models[1], batch.teacher, None)
    shapes = [jax.eval_shape(model.logits, x).shape[-1] for model, x in zip(models, (states, theirs), strict=True)]
    vocab = min(shapes)

    def project(models, states, theirs):
        logits = models[0].logits(states), jax.lax.stop_gradient(models[1].logits(theirs))
        ours, given = (jax.nn.log_softmax(scaled_logits(x[..., :vocab], o.divergence_temperature)) for x in logits)
        return DistillStats(
            divergence=generalised_jsd(ours, given, o),
            entropy=-(jnp.exp(ours) * ours).sum(-1),
            teacher_entropy=-(jnp.exp(given) * given).sum(-1),
            agrees=(ours.argmax(-1) == given.argmax(-1)).astype(ours.dtype),
        )

    most = student.config.max_logits // ARRAYS
    stats = project_tokens(project, models, (states, jax.lax.stop_gradient(theirs)), max(shapes), most)
    return dataclasses.replace(align(stats), aux=aux)
