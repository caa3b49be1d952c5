"""Training steps: pure functions `step(state, batch) -> (state, metrics)`, side by side.

A step knows no file, mesh, clock or objective's name: `make_step` turns any objective into one, and
`jax.jit` with shardings compiles it for one device or thousands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lm.experiment import DPO, GRPO, SFT, Pretrain, Stage
from lm.objectives.cross_entropy import cross_entropy
from lm.objectives.dpo import dpo
from lm.objectives.grpo import grpo
from lm.objectives.logprobs import token_logprobs
from lm.optimizer import global_norm
from lm.parallel.rules import constrain
from lm.types import Batch, Mean, TrainState

Metrics = dict[str, Float[Array, ""]]
# (params, frozen, batch) -> what is minimised and what is reported, neither divided yet
Loss = Callable[[Any, Any, Batch], tuple[Mean, dict[str, Mean]]]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def pretrain_step(stage: Stage, optimizer: optax.GradientTransformation) -> Step:
    """Next-token cross-entropy on every token of the text."""
    return make_step(_cross_entropy_loss(stage), optimizer, stage.microbatches)


def sft_step(stage: Stage, optimizer: optax.GradientTransformation) -> Step:
    """Next-token cross-entropy on what the assistant says; the mask is in the batch's weights."""
    return make_step(_cross_entropy_loss(stage), optimizer, stage.microbatches)


def preference_step(stage: Stage, optimizer: optax.GradientTransformation) -> Step:
    """The DPO family on (chosen, rejected) pairs, against the frozen reference."""
    o = stage.objective
    assert isinstance(o, DPO)

    def loss(params: Any, frozen: Any, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
        logp = token_logprobs(params, batch).logp
        ref_logp = jax.lax.stop_gradient(token_logprobs(frozen["reference"], batch).logp)
        return dpo(logp, ref_logp, batch.weights, loss=o.loss, beta=o.beta, label_smoothing=o.label_smoothing)

    return make_step(loss, optimizer, stage.microbatches)


def grpo_step(stage: Stage, optimizer: optax.GradientTransformation) -> Step:
    """The GRPO family on completions that carry their advantages."""
    o = stage.objective
    assert isinstance(o, GRPO)

    def loss(params: Any, frozen: Any, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
        assert batch.advantages is not None
        stats = token_logprobs(params, batch, o.temperature, want_entropy=True)
        ref_logp = None
        if o.kl_coef:
            ref_logp = jax.lax.stop_gradient(token_logprobs(frozen["reference"], batch, o.temperature).logp)
        return grpo(
            stats.logp, batch.weights, batch.advantages, max_len=o.max_new_tokens,
            old_logp=batch.old_logp, ref_logp=ref_logp, entropy=stats.entropy, aggregation=o.aggregation,
            clip_low=o.clip_low, clip_high=o.clip_high, kl_coef=o.kl_coef,
        )  # fmt: skip

    return make_step(loss, optimizer, stage.microbatches)


def needs_reference(stage: Stage) -> bool:
    """Whether the step reads the model as it was before the stage, `frozen["reference"]`."""
    o = stage.objective
    return isinstance(o, DPO) or (isinstance(o, GRPO) and o.kl_coef > 0)


def _cross_entropy_loss(stage: Stage) -> Loss:
    o = stage.objective
    assert isinstance(o, Pretrain | SFT)

    def loss(params: Any, frozen: Any, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
        return cross_entropy(token_logprobs(params, batch), batch.weights, z_loss=o.z_loss)

    return loss


STEPS: dict[type, Callable[[Stage, optax.GradientTransformation], Step]] = {
    Pretrain: pretrain_step,
    SFT: sft_step,
    DPO: preference_step,
    GRPO: grpo_step,
}


def make_step(loss: Loss, optimizer: optax.GradientTransformation, microbatches: int = 1) -> Step:
    """Gradient (summed over microbatches), one division by the summed weight, clip and update."""

    def total(params: Any, frozen: Any, batch: Batch) -> tuple[Float[Array, ""], tuple[Mean, dict[str, Mean]]]:
        mean, metrics = loss(params, frozen, batch)
        return mean.total, (mean, metrics)

    def gradient(params: Any, frozen: Any, batch: Batch) -> tuple[Any, dict[str, Mean]]:
        grads, (mean, metrics) = jax.grad(total, has_aux=True)(params, frozen, batch)
        return grads, {"loss": mean, **metrics}

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if microbatches == 1:
            grads, sums = gradient(state.params, state.frozen, batch)
        else:
            # Each piece over all devices: without the constraint rows are fetched again in every turn of the loop.
            pieces = jax.tree.map(lambda x: constrain(x.reshape(microbatches, -1, *x.shape[1:]), None, "batch"), batch)
            start = jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype),
                jax.eval_shape(gradient, state.params, state.frozen, jax.tree.map(lambda x: x[0], pieces)),
            )

            def accumulate(carry: Any, piece: Batch) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, carry, gradient(state.params, state.frozen, piece)), None

            (grads, sums), _ = jax.lax.scan(accumulate, start, pieces)
        weight = jnp.maximum(sums["loss"].weight, 1e-30)
        grads = jax.tree.map(lambda g: (g / weight).astype(g.dtype), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {name: mean.value() for name, mean in sums.items()}
        metrics["grad_norm"] = global_norm(grads)
        return TrainState(state.step + 1, params, opt_state, state.frozen), metrics

    return step
