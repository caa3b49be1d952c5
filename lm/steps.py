"""Training steps: pure functions `step(state, batch) -> (state, metrics)`, side by side."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lm.experiment import CPO, DPO, GRPO, KTO, ORPO, PPO, SFT, Pretrain, RewardModel, Stage, corrects_sampler
from lm.model.scorer import ScoreHead, Scorer
from lm.objectives.cpo import cpo
from lm.objectives.cross_entropy import cross_entropy, weighted
from lm.objectives.dpo import dpo
from lm.objectives.grpo import entropy_scale, grpo
from lm.objectives.importance import sampler_correction
from lm.objectives.kl import k3
from lm.objectives.kto import kto, log_ratio_mean, reads_baseline
from lm.objectives.logprobs import last_scores, token_logprobs, token_values
from lm.objectives.orpo import orpo
from lm.objectives.pairs import likelihood_scale
from lm.objectives.ppo import adaptive_kl_coef, mask_share, ppo, with_end
from lm.objectives.reward_model import reward_model
from lm.train_step import Loss, Metrics, Models, Step, TrainState, cut, make_step
from lm.types import Batch, Mean


def pretrain_step(stage: Stage, optimizer: optax.GradientTransformation) -> Step:
    """Next-token cross-entropy on every token of the text."""
    return make_step(_cross_entropy_loss(stage), stage, optimizer)


def sft_step(stage: Stage, optimizer: optax.GradientTransformation) -> Step:
    """Next-token cross-entropy on what the assistant says; the mask is in the batch's weights."""
    return make_step(_cross_entropy_loss(stage), stage, optimizer)


def preference_step(stage: Stage, optimizer: optax.GradientTransformation) -> Step:
    """The DPO family on (chosen, rejected) pairs, against the frozen reference."""
    o = stage.objective
    assert isinstance(o, DPO)

    def loss(models: Models, frozen: Any, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
        stats = token_logprobs(models["policy"], batch, want_log_sum_sq=o.weighting)
        if o.reference == "cached":
            assert batch.ref_logp is not None
            ref_logp = batch.ref_logp
        else:
            ref_logp = jax.lax.stop_gradient(token_logprobs(frozen["reference"], batch).logp)
        scale = frozen["sft_scale"]
        return dpo(stats.logp, ref_logp, batch.weights, o, log_sum_sq=stats.log_sum_sq, sft_scale=scale)

    def batch_stats(models: Models, frozen: Any, batch: Batch) -> dict[str, Array]:
        return {"sft_scale": likelihood_scale(batch.weights, batch.weights)}

    return make_step(loss, stage, optimizer, batch_stats)


def cpo_step(stage: Stage, optimizer: optax.GradientTransformation) -> Step:
    """CPO, SimPO and AlphaPO on (chosen, rejected) pairs; no reference."""
    o = stage.objective
    assert isinstance(o, CPO)

    def loss(models: Models, frozen: Any, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
        return cpo(token_logprobs(models["policy"], batch).logp, batch.weights, o, nll_scale=frozen["nll_scale"])

    def batch_stats(models: Models, frozen: Any, batch: Batch) -> dict[str, Array]:
        return {"nll_scale": likelihood_scale(batch.weights, batch.weights)}

    return make_step(loss, stage, optimizer, batch_stats)


def orpo_step(stage: Stage, optimizer: optax.GradientTransformation) -> Step:
    """ORPO on (chosen, rejected) pairs; no reference."""
    o = stage.objective
    assert isinstance(o, ORPO)

    def predicted(batch: Batch) -> Float[Array, "B T"]:
        """1 on every token that something of its segment stands before."""
        return ((batch.segments > 0) & (batch.positions > 0)).astype(batch.weights.dtype)

    def loss(models: Models, frozen: Any, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
        logp = token_logprobs(models["policy"], batch).logp
        return orpo(logp, batch.weights, predicted(batch), o, nll_scale=frozen["nll_scale"])

    def batch_stats(models: Models, frozen: Any, batch: Batch) -> dict[str, Array]:
        return {"nll_scale": likelihood_scale(batch.weights, predicted(batch))}

    return make_step(loss, stage, optimizer, batch_stats)


def kto_step(stage: Stage, optimizer: optax.GradientTransformation) -> Step:
    """KTO on answers by themselves, against the frozen reference; first, where it is read, the whole batch's baseline."""
    o = stage.objective
    assert isinstance(o, KTO)

    def loss(models: Models, frozen: Any, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
        assert batch.desirable is not None
        logp = token_logprobs(models["policy"], batch).logp
        ref_logp = jax.lax.stop_gradient(token_logprobs(frozen["reference"], batch).logp)
        return kto(logp, ref_logp, batch.weights, batch.desirable, o, frozen.get("kl"))

    def batch_stats(models: Models, frozen: Any, batch: Batch) -> dict[str, Array]:
        assert batch.mismatched is not None

        def estimate(piece: Batch) -> Mean:
            policy, reference = (token_logprobs(model, piece).logp for model in (models["policy"], frozen["reference"]))
            return log_ratio_mean(policy, reference, piece.weights)

        if stage.microbatches == 1:
            found = estimate(batch.mismatched)
        else:
            found = jax.tree.map(jnp.sum, jax.lax.map(estimate, cut(batch.mismatched, stage.microbatches)))
        return {"kl": jnp.maximum(found.value(), 0.0)}

    return make_step(loss, stage, optimizer, batch_stats if reads_baseline(o.loss) else None)


def grpo_step(stage: Stage, optimizer: optax.GradientTransformation) -> Step:
    """The GRPO family on completions that carry their advantages."""
    o = stage.objective
    assert isinstance(o, GRPO)

    def loss(models: Models, frozen: Any, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
        assert batch.advantages is not None
        stats = token_logprobs(models["policy"], batch, o.temperature, want_entropy=True)
        ref_logp = None
        if o.kl_coef and o.kl_in == "loss":
            ref_logp = jax.lax.stop_gradient(token_logprobs(frozen["reference"], batch, o.temperature).logp)
        correction, gap = None, {}
        if corrects_sampler(o):
            assert batch.old_logp is not None and batch.sampler_logp is not None
            gap = {"sampler_kl": weighted(k3(batch.old_logp - batch.sampler_logp), batch.weights)}
            if o.tis_clip:
                correction = sampler_correction(batch.old_logp, batch.sampler_logp, batch.weights, o)
        mean, metrics = grpo(
            stats.logp, batch.weights, batch.advantages, o, old_logp=batch.old_logp, ref_logp=ref_logp,
            sampler_logp=batch.sampler_logp, correction=correction, entropy=stats.entropy,
            entropy_scale=frozen.get("entropy_scale"),
        )  # fmt: skip
        return mean, metrics | gap

    def batch_stats(models: Models, frozen: Any, batch: Batch) -> dict[str, Array]:
        return {"entropy_scale": entropy_scale(batch.weights, o)}

    return make_step(loss, stage, optimizer, batch_stats if o.entropy_coef and o.top_entropy == 1 else None)


def reward_step(stage: Stage, optimizer: optax.GradientTransformation) -> Step:
    """Bradley-Terry on (chosen, rejected) pairs; what is trained is a scorer."""
    o = stage.objective
    assert isinstance(o, RewardModel)

    def loss(models: Models, frozen: Any, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
        margins, is_tie = (None if x is None else x[0::2] for x in (batch.margins if o.margins else None, batch.ties))
        return reward_model(last_scores(models["reward"], batch), batch.weights, o, margins=margins, is_tie=is_tie)

    return make_step(loss, stage, optimizer)


def ppo_step(stage: Stage, optimizer: optax.GradientTransformation) -> Step:
    """PPO on answers that carry advantages and returns; policy and critic move together.

    The weight of the KL in later rewards is carried from step to step, and follows what the batch's KL is.
    """
    o = stage.objective
    assert isinstance(o, PPO)

    def loss(models: Models, frozen: Any, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
        assert batch.advantages is not None and batch.returns is not None
        assert batch.old_logp is not None and batch.values is not None
        correction = None
        if corrects_sampler(o):
            assert batch.sampler_logp is not None
            correction = sampler_correction(batch.old_logp, batch.sampler_logp, batch.weights, o)
        policy = models["policy"].with_whole_tables()
        hidden, _ = policy.hidden(batch.tokens, batch.positions, batch.segments)
        stats = token_logprobs(policy, batch, o.temperature, want_entropy=True, hidden=hidden)
        return ppo(
            stats.logp, critic_values(models["critic"], batch, hidden), batch.weights, batch.advantages, batch.returns,
            batch.old_logp, batch.values, o, correction=correction, entropy=stats.entropy,
            value_mask=with_end(batch.weights) if o.value_after_end else None, share=frozen.get("share"),
        )  # fmt: skip

    def batch_stats(models: Models, frozen: Any, batch: Batch) -> dict[str, Array]:
        return {"share": mask_share(batch.weights, with_end(batch.weights))}

    update = make_step(loss, stage, optimizer, batch_stats if o.value_after_end else None)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        moved, metrics = update(state, batch)
        if not o.kl_target:
            return moved, metrics
        assert batch.old_logp is not None and batch.ref_logp is not None
        kl = (jnp.where(batch.weights > 0, batch.old_logp - batch.ref_logp, 0.0)).sum() / len(batch.tokens)
        # An answer counts once, however often it is gone through.
        answers = len(batch.tokens) / o.epochs
        kl_coef = adaptive_kl_coef(
            state.carry["kl_coef"], kl, target=o.kl_target, answers=answers, horizon=o.kl_horizon
        )
        return replace(moved, carry={"kl_coef": kl_coef}), metrics

    return step


def critic_values(
    critic: Scorer | ScoreHead, batch: Batch, hidden: Float[Array, "B T D"] | None
) -> Float[Array, "B T"]:
    """What the critic says of the state before each token. `hidden` is the policy's, for a critic that is a head on it."""
    if isinstance(critic, ScoreHead):
        assert hidden is not None
        return token_values(hidden, critic)
    return token_values(critic.body.hidden(batch.tokens, batch.positions, batch.segments)[0], critic.score)


def _cross_entropy_loss(stage: Stage) -> Loss:
    o = stage.objective
    assert isinstance(o, Pretrain | SFT)

    def loss(models: Models, frozen: Any, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
        stats = token_logprobs(models["policy"], batch, want_mean_logp=o.label_smoothing > 0)
        return cross_entropy(stats, batch.weights, o)

    return loss
