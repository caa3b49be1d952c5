"""The expected gradient of every preset, over all rollouts of a small policy, is the policy gradient that its paper claims.

The policy is a table of logits: vocabulary 4, of which one token ends a completion, and at most 3 tokens. It has 40 completions, and
a rollout of two has 1,600 values, so that expectations are exact sums. The gradient of each rollout is that of `grpo_step` as it trains,
in float64. The claims are written in NumPy, with the biases that the papers name: division by the standard deviation, by lengths, and
a baseline that contains the completion's own reward, which leaves (G - 1) / G of the gradient.

Notation: o a completion and o' the other one of its rollout, R the rewards, |o| a length in tokens, L = max_new_tokens, G = 2.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.algorithms.grpo import grpo_step, has_preference
from lm.config.presets import PRESETS
from lm.experiment import GRPO, Model
from lm.objectives.advantages import EPS, completion_advantages, drop_truncated
from lm.objectives.kl import completion_kl
from lm.objectives.logprobs import token_logprobs
from lm.train_step import TrainState
from lm.types import RolloutBatch, pytree
from tests.helpers import tiny_stage

VOCAB, LENGTH, END = 4, 3, 3
CONTEXTS = 1 + VOCAB + VOCAB**2
"""Contexts of a token: nothing, one token, two tokens; those after END are never reached."""


def completions() -> Iterator[tuple[int, ...]]:
    for length in range(1, LENGTH + 1):
        for body in itertools.product(range(END), repeat=length - 1):
            yield (*body, END)
    yield from itertools.product(range(END), repeat=LENGTH)


ALL = list(completions())
COUNT = len(ALL)
MASK = np.array([[t < len(one) for t in range(LENGTH)] for one in ALL], float)
TOKENS = np.array([[*one, *[0] * (LENGTH - len(one))] for one in ALL])
LENGTHS = MASK.sum(1)
ENDED = np.array([one[-1] == END for one in ALL])
CONTEXT = np.stack([np.zeros(COUNT, int), 1 + TOKENS[:, 0], 1 + VOCAB + VOCAB * TOKENS[:, 0] + TOKENS[:, 1]], axis=1)

RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(CONTEXTS, VOCAB))
REFERENCE = TABLE + 0.5 * RNG.normal(size=(CONTEXTS, VOCAB))
REWARDS = RNG.choice([-0.5, 0.0, 0.25, 1.0], size=(COUNT, 2))  # some are equal; only GDPO has both


# ---- what the code does --------------------------------------------------------------------------------------------


@pytree
class Table:
    """As much of a language model as a step needs: its hidden states are the logits of the context of each token."""

    logits_of: jax.Array
    config = Model()

    def with_whole_tables(self):
        return self

    def hidden(self, tokens, positions, segments):
        first, second = tokens[:, 1], tokens[:, 2]
        context = jnp.stack([0 * first, 1 + first, 1 + VOCAB + VOCAB * first + second, 0 * first], axis=1)
        return self.logits_of[context], {}

    def logits(self, hidden):
        return hidden


def rollout_batch(o: GRPO, rows: jax.Array) -> RolloutBatch:
    """The batch of a rollout with these completions, as `grpo_rollout` makes it."""
    mask = jnp.pad(jnp.asarray(MASK)[rows], ((0, 0), (1, 0)))  # a prompt of one token
    tokens = jnp.pad(jnp.asarray(TOKENS)[rows], ((0, 0), (1, 0)))
    ones = jnp.ones_like(tokens)
    batch = RolloutBatch(tokens, mask, ones, jnp.arange(LENGTH + 1) * ones, mask, mask, mask)
    logp, ref_logp = (token_logprobs(Table(jnp.asarray(table)), batch).logp for table in (TABLE, REFERENCE))
    kl = completion_kl(logp, ref_logp, mask, o.kl_estimator) if o.kl_coef and o.kl_in == "reward" else None
    rewards = jnp.asarray(REWARDS)[rows][:, : max(len(o.verifiers), 1)]
    advantages, _ = completion_advantages(rewards, o, kl)
    weights = drop_truncated(mask, jnp.asarray(ENDED)[rows]) if o.drop_truncated else mask
    return dataclasses.replace(
        batch, weights=weights, advantages=mask * advantages[:, None], old_logp=logp, sampler_logp=logp
    )


def expected_gradient(o: GRPO, size: int) -> np.ndarray:
    """The mean of a step's gradient over all rollouts of `size` completions, by their probability."""
    optimizer = optax.sgd(1.0)
    stage = tiny_stage(o)
    table = Table(jnp.asarray(TABLE))
    state = TrainState(
        jnp.int32(0), {"policy": table}, optimizer.init(table), {}, {"reference": Table(jnp.asarray(REFERENCE))}
    )

    @jax.jit
    @jax.vmap
    def gradient(rows):
        moved, _ = grpo_step(stage, optimizer)(state, rollout_batch(o, rows))
        return moved.models["policy"].logits_of - TABLE  # what is maximised

    rows = np.array(list(itertools.product(range(COUNT), repeat=size)))
    probability = PI[rows].prod(1)
    if o.rollouts > 1:  # the first rollout with unequal rewards, of at most o.rollouts
        unequal = np.array([has_preference(REWARDS[one][:, 0], size)[0] for one in rows])
        equal = probability[~unequal].sum()
        probability = probability * unequal * sum(equal**k for k in range(o.rollouts))
    return np.einsum("n,nsv->sv", probability, np.asarray(gradient(jnp.asarray(rows))))


# ---- what the papers claim -----------------------------------------------------------------------------------------


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


LOGP, REF_LOGP = (log_softmax(table)[CONTEXT, TOKENS] * MASK for table in (TABLE, REFERENCE))
PI = np.exp(LOGP.sum(1))
ENTROPY = -(np.exp(log_softmax(TABLE)) * log_softmax(TABLE)).sum(-1)[CONTEXT]
SCORE = np.zeros((COUNT, LENGTH, CONTEXTS, VOCAB))
"""∇ log π of each token of each completion with respect to the table."""
for n, t in itertools.product(range(COUNT), range(LENGTH)):
    SCORE[n, t, CONTEXT[n, t]] = (np.eye(VOCAB)[TOKENS[n, t]] - np.exp(log_softmax(TABLE))[CONTEXT[n, t]]) * MASK[n, t]

R, R2 = REWARDS.T
PAIR = PI[:, None] * PI
"""Probability of a completion (rows) and the other one of its rollout (columns)."""
UNEQUAL = R[:, None] != R
OVER_TOKENS = 2 / (LENGTHS[:, None] + LENGTHS)
"""Weight of a completion's tokens in a mean over the tokens of the rollout, where that over completions has 1."""
KL = (LOGP - REF_LOGP).sum(1)  # of the whole completion, k1


def policy_gradient(advantage: np.ndarray, weight: np.ndarray | float = 1.0) -> np.ndarray:
    """E[weight · A · ∇ log π(o)], for advantages and weights of each completion and its partner."""
    return np.einsum("np,ntsv->sv", PAIR * advantage * weight, SCORE)


def token_gradient(values: np.ndarray, weight: np.ndarray | float = 1.0) -> np.ndarray:
    """E[weight · Σ_t values_t · ∇ log π(o_t)]."""
    return np.einsum("n,nt,ntsv->sv", (PAIR * weight).sum(1), values, SCORE)


def scaled(rewards: np.ndarray) -> np.ndarray:
    """(R - mean) / std of a pair: the mean contains R itself, and the deviation of two numbers is |R - R'| / √2."""
    difference = rewards[:, None] - rewards
    return difference / 2 / (np.abs(difference) / np.sqrt(2) + EPS)


def dynamic_sampling(gradient: np.ndarray, rollouts: int) -> np.ndarray:
    """E[gradient | R ≠ R'] times the probability that one of `rollouts` pairs has unequal rewards."""
    equal = PAIR[~UNEQUAL].sum()
    return gradient / (1 - equal) * (1 - equal**rollouts)


def clip_higher_gradient(kept: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """DAPO: truncated completions have no tokens; `kept` chooses among the tokens that are left of a pair."""
    total = np.zeros((CONTEXTS, VOCAB))
    mask = MASK * ENDED[:, None]
    for n, other in zip(*np.nonzero(UNEQUAL), strict=True):
        tokens = mask[n].sum() + mask[other].sum()
        if mask[n].any():
            weight = 2 / tokens * PAIR[n, other] * scaled(R)[n, other]
            total += weight * np.einsum("t,tsv->sv", mask[n] * kept(n, other), SCORE[n])
    return dynamic_sampling(total, 4)


def highest_entropy(n: int, other: int) -> np.ndarray:
    """Which tokens of completion n are among the 20 % of the pair's with the highest entropy."""
    mask = (MASK * ENDED[:, None])[[n, other]] > 0
    return ENTROPY[n] >= np.quantile(ENTROPY[[n, other]][mask], 0.8)


K3 = np.exp(REF_LOGP - LOGP) - (REF_LOGP - LOGP) - 1
TO_REFERENCE = 1 - np.exp(REF_LOGP - LOGP)
"""∇ k3 of a sampled token is (1 - π_ref / π) ∇ log π: in expectation ∇ KL(π_ref ‖ π) of the contexts that π reaches."""
BY_LENGTH = 1 / LENGTHS[:, None]
GDPO_SUM = scaled(R) + scaled(R2)

CLAIMS: dict[str, Callable[[], np.ndarray]] = {
    # E[(R - mean) / std · 1/|o| ∇ log π(o)] - β E[1/|o| Σ ∇ k3]
    "grpo": lambda: policy_gradient(scaled(R), BY_LENGTH) - 0.04 * token_gradient(TO_REFERENCE, BY_LENGTH),
    # (G - 1) / G · 1/L · ∇ E[R]: the policy gradient without division by a deviation or a completion's length
    "dr_grpo": lambda: objective_gradient(R) / 2 / GRPO().max_new_tokens,
    # (1 - P(R = R')⁴) E[(R - mean) / std · ∇ log π(o) over the tokens of completions that ended | R ≠ R']
    "dapo": lambda: clip_higher_gradient(lambda n, other: np.ones(LENGTH)),
    # ∇ s = 1/|o| ∇ log π(o): GRPO's without KL
    "gspo": lambda: policy_gradient(scaled(R), BY_LENGTH),
    # ∇ (E[R] - β KL(π ‖ π_ref)), without bias
    "rloo": lambda: objective_gradient(R, 0.05),
    # R - β KL(o), whitened over the rollout (here two completions), mean over the tokens of the rollout
    "reinforce_pp": lambda: policy_gradient(scaled(R - 0.01 * KL), OVER_TOKENS),
    # (R - mean) whitened; ∇ k2 = (log π - log π_ref) ∇ log π, in expectation ∇ KL(π ‖ π_ref) of the contexts that π reaches
    "reinforce_pp_baseline": lambda: (
        policy_gradient(scaled(R), OVER_TOKENS) - 0.01 * token_gradient(LOGP - REF_LOGP, OVER_TOKENS)
    ),
    "cispo": lambda: policy_gradient(scaled(R), OVER_TOKENS),
    # the slope of 4/τ·σ(τ·(r - 1)) at r = 1 is 1, whatever τ
    "sapo": lambda: policy_gradient(scaled(R), BY_LENGTH),
    "gmpo": lambda: policy_gradient(scaled(R), BY_LENGTH),
    # |o| · ∇ s = ∇ log π(o): no bias by length
    "luspo": lambda: policy_gradient(scaled(R)),
    # e^λ·w^k·e^(-λ·w) = 1 at w = 1
    "vespo": lambda: policy_gradient(scaled(R), OVER_TOKENS),
    # each reward normalised, their sum A whitened over the rollout, where its mean is 0: A and -A have the deviation √2·|A|
    "gdpo": lambda: policy_gradient(GDPO_SUM / (np.sqrt(2) * np.abs(GDPO_SUM) + EPS), BY_LENGTH),
    "two_sided": lambda: policy_gradient(scaled(R), OVER_TOKENS) - 0.001 * token_gradient(TO_REFERENCE, OVER_TOKENS),
    "high_entropy": lambda: clip_higher_gradient(highest_entropy),
    # ∇ (r·k3) = (k3 + 1 - π_ref / π) ∇ log π, in expectation ∇ KL(π ‖ π_ref) of each context
    "deepseek_v3_2": lambda: (
        policy_gradient(scaled(R), BY_LENGTH) - 0.04 * token_gradient(K3 + TO_REFERENCE, BY_LENGTH)
    ),
    # π_old / π_sampler is 1 where they are the same
    "tis": lambda: policy_gradient(scaled(R), OVER_TOKENS),
    "icepop": lambda: policy_gradient(scaled(R), OVER_TOKENS),
    "decoupled": lambda: policy_gradient(scaled(R), OVER_TOKENS),
}


def objective_gradient(rewards: np.ndarray, beta: float = 0.0) -> np.ndarray:
    """∇ (E[R] - β KL(π ‖ π_ref)) by differentiating the exact expectation over all completions."""

    def objective(table):
        logp = (jax.nn.log_softmax(table)[CONTEXT, TOKENS] * MASK).sum(1)
        return (jnp.exp(logp) * (rewards - beta * (logp - REF_LOGP.sum(1)))).sum()

    return np.asarray(jax.grad(objective)(jnp.asarray(TABLE)))


def assert_claimed(found: np.ndarray, claimed: np.ndarray) -> None:
    assert np.abs(claimed).max() > 1e-4
    np.testing.assert_allclose(found, claimed, rtol=0, atol=1e-12)


def test_the_completions_are_all_there_are():
    assert COUNT == 40
    assert PI.sum() == pytest.approx(1, abs=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_the_expected_gradient_of_a_preset_is_the_one_that_it_claims(name):
    o = PRESETS[name].config
    o = dataclasses.replace(o, group_size=min(o.group_size, 2))
    with jax.enable_x64(True):
        assert_claimed(expected_gradient(o, size=2), CLAIMS[name]())


@pytest.mark.slow
@pytest.mark.parametrize("name, factor", [("dr_grpo", 2 / 3 / GRPO().max_new_tokens), ("rloo", 1.0)])
def test_a_baseline_with_the_own_reward_leaves_a_fraction_of_the_gradient(name, factor):
    """(G - 1) / G for the mean of the group, 1 for the mean of the others."""
    o = dataclasses.replace(PRESETS[name].config, group_size=3)
    with jax.enable_x64(True):
        assert_claimed(expected_gradient(o, size=3), factor * objective_gradient(R, o.kl_coef))
