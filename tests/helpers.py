"""Tiny models, stages and batches that several tests share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lm.experiment import (
    CPO,
    DPO,
    GRPO,
    KTO,
    ORPO,
    PPO,
    SFT,
    Distill,
    LoRA,
    Mesh,
    Model,
    Optimizer,
    Pretrain,
    RewardModel,
    Source,
    Stage,
)
from lm.model.lora import adapted
from lm.model.transformer import Transformer
from lm.types import CriticBatch, RolloutBatch, SharedPrompt, TokenBatch, pytree

VOCAB = 64
TINY = Model(num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, max_len=64)

OBJECTIVES = {
    "pretrain": Pretrain(z_loss=1e-3),
    "sft": SFT(),
    "dpo": DPO(beta=0.5),
    "dpo_mixed": DPO(losses=("sigmoid", "ipo", "sft"), loss_weights=(1.0, 0.1, 0.5), weighting=True, ld_alpha=0.5),
    "dpo_ranked": DPO(losses=("aot", "aot_unpaired")),
    "cpo": CPO(loss="simpo", beta=2.0, label_smoothing=0.1, nll_coef=0.5),
    "orpo": ORPO(beta=0.5),
    "kto": KTO(beta=0.5, undesirable_weight=1.5),
    "reward_model": RewardModel(margins=True, center_coef=0.1),
    "reward_model_ties": RewardModel(ties="rao_kupper"),
    "ppo": PPO(max_new_tokens=8, kl_target=1.0, kl_horizon=100),
    "ppo_head": PPO(max_new_tokens=8, temperature=0.7, critic="head", value_after_end=True, entropy_coef=0.01),
    "grpo_token": GRPO(max_new_tokens=8, group_size=4, kl_coef=0.1, aggregation="token"),
    "grpo_sequence": GRPO(
        max_new_tokens=8,
        group_size=4,
        temperature=0.7,
        aggregation="sequence",
        sampler="int8",
        tis_clip=1.1,
        ratio_level="sequence",
        tis_level="sequence",
        entropy_coef=0.01,
        off_policy_kl=0.5,
    ),
    "grpo_constant": GRPO(
        max_new_tokens=8,
        group_size=4,
        aggregation="constant",
        clip_high=0.3,
        delta=1.5,
        kl_coef=0.1,
        kl_correction=True,
    ),
    "distill": Distill(max_new_tokens=8, teacher_prompt="{prompt} {answer}", beta=0.3, divergence_temperature=0.7),
}


def tiny_model(seed: int = 0, **changes) -> Transformer:
    return _init(dataclasses.replace(TINY, **changes))(seed)


@functools.cache
def _init(config: Model):
    return jax.jit(lambda seed: Transformer(config, VOCAB, jax.random.key(seed)))


def tiny_stage(objective, **changes) -> Stage:
    base = Stage(
        name="tiny", objective=objective, sources=(Source("gen:instruct"),), steps=10, batch_size=16, seq_len=16,
        optimizer=Optimizer(peak_lr=1e-2, warmup_steps=2),
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


@pytree
class EveryBatch(CriticBatch):
    """A batch for any objective."""

    margins: jax.Array
    ties: jax.Array
    desirable: jax.Array
    mismatched: TokenBatch
    teacher: TokenBatch


def with_moved_adapter(model: Transformer, lora: LoRA, seed: int, by=0.1) -> Transformer:
    """The model with a new adapter whose factors are no longer 0."""
    new = adapted(model, tiny_stage(SFT(), lora=lora), jax.random.key(seed), "policy")
    rng = np.random.default_rng(seed)

    def change(path, x):
        own = "lora" in jax.tree_util.keystr(path)
        return x + by * jnp.asarray(rng.standard_normal(x.shape), x.dtype) if own else x

    return jax.tree_util.tree_map_with_path(change, new)


def random_batch(rows: int = 16, length: int = 16, seed: int = 0) -> EveryBatch:
    """Two packed segments and some padding in each row; every field filled, so that any objective can use it."""
    rng = np.random.default_rng(seed)
    cut, end = length // 2 - 1, length - 2
    column = np.arange(length)
    segments = np.where(column < cut, 1, np.where(column < end, 2, 0))
    positions = np.where(column < cut, column, column - cut)
    segments, positions = (np.broadcast_to(x, (rows, length)).astype(np.int32) for x in (segments, positions))
    weights = ((positions > 0) & (segments > 0) & (rng.random((rows, length)) < 0.7)).astype(np.float32)
    plain = TokenBatch(
        tokens=jnp.asarray(rng.integers(0, VOCAB, (rows, length)), jnp.int32),
        weights=jnp.asarray(weights),
        segments=jnp.asarray(segments),
        positions=jnp.asarray(positions),
    )
    return EveryBatch(
        **vars(plain),
        advantages=jnp.asarray(rng.standard_normal((rows, 1)) * weights, jnp.float32),
        old_logp=jnp.asarray(-4 + 0.3 * rng.standard_normal((rows, length)), jnp.float32),
        sampler_logp=jnp.asarray(-4 + 0.3 * rng.standard_normal((rows, length)), jnp.float32),
        desirable=jnp.asarray(rng.random(rows) < 0.5, jnp.float32),
        margins=jnp.repeat(jnp.asarray(rng.random(rows // 2), jnp.float32), 2),
        ties=jnp.repeat(jnp.asarray(rng.random(rows // 2) < 0.3, jnp.float32), 2),
        ref_logp=jnp.asarray(-4 + 0.3 * rng.standard_normal((rows, length)), jnp.float32),
        values=jnp.asarray(rng.standard_normal((rows, length)) * weights, jnp.float32),
        returns=jnp.asarray(rng.standard_normal((rows, length)) * weights, jnp.float32),
        mismatched=dataclasses.replace(plain, tokens=jnp.roll(plain.tokens, 1, axis=0)),
        teacher=dataclasses.replace(plain, tokens=jnp.roll(plain.tokens, 1, axis=0)),
    )


def grouped_batch(prompts: int = 4, group: int = 4, before: int = 7, after: int = 9, seed: int = 0) -> RolloutBatch:
    """Answers of several lengths, `group` neighbours to the same prompt, left padded, as rollouts are."""
    rng = np.random.default_rng(seed)
    rows, column = prompts * group, np.arange(before + after)
    starts = np.repeat(rng.integers(0, before, prompts), group)
    ends = before + rng.integers(1, after + 1, rows)
    real = (column >= starts[:, None]) & (column < ends[:, None])
    tokens = rng.integers(0, VOCAB, (rows, before + after))
    tokens[:, :before] = np.repeat(tokens[::group, :before], group, axis=0)
    weights = (real & (column >= before)).astype(np.float32)
    return RolloutBatch(
        tokens=jnp.asarray(tokens, jnp.int32),
        weights=jnp.asarray(weights),
        segments=jnp.asarray(real, jnp.int32),
        positions=jnp.asarray(np.maximum(np.cumsum(real, axis=1) - 1, 0), jnp.int32),
        advantages=jnp.asarray(rng.standard_normal((rows, 1)) * weights, jnp.float32),
        old_logp=jnp.asarray(-4 + 0.3 * rng.standard_normal(weights.shape), jnp.float32),
        sampler_logp=jnp.asarray(-4 + 0.3 * rng.standard_normal(weights.shape), jnp.float32),
        shared=SharedPrompt(group, before),
    )


def layout(**sizes) -> Mesh:
    return Mesh(**({"data": 1} | sizes))
