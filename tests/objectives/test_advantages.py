"""lm/objectives/advantages.py: golden advantages of GRPO, GDPO and RLOO, loops over groups, missing rewards."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from objective_checks import DTYPES, assert_close, golden_cases, precision

from lm.experiment import GRPO
from lm.objectives.advantages import (
    BASELINES,
    combine_rewards,
    completion_advantages,
    drop_truncated,
    group_advantages,
)
from lm.objectives.aggregation import token_mean
from lm.objectives.importance import product_ratio
from lm.objectives.kl import completion_kl


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden(golden, dtype):
    for case in golden_cases(golden, "grpo_advantages", dtype):
        p, expected = case.params, case.outputs
        scale = p.get("scale_rewards", "group")
        decoupled = p.get("multi_objective_aggregation") == "normalize_then_sum"
        o = GRPO(
            group_size=p["num_generations"],
            advantage_scale=scale,
            reward_weights=tuple(map(float, case.inputs["reward_weights"])),
            reward_combination="decoupled" if decoupled else "sum",
            whiten_advantages=decoupled,
        )
        with precision(dtype) as tolerance:
            advantages, metrics = completion_advantages(jnp.asarray(case.inputs[p["rewards"]]), o)
            # The reference rounds where a group's rewards are all equal; ours are exactly 0.
            assert_close(advantages, expected["advantages"], tolerance, f"{case.name} advantages")
            if "reward" in expected:
                assert_close(metrics["reward"].value(), expected["reward"], tolerance, f"{case.name} reward")
            # Only here does the reference count groups: in the other cases it looks at the batch's deviation.
            if scale != "batch" and "scale_rewards" in p:
                frac = metrics["frac_zero_std"].value()
                assert_close(frac, expected["frac_reward_zero_std"], tolerance, f"{case.name} frac_zero_std")


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_rloo(golden, dtype):
    """The penalty is k1, summed over a completion and taken off its reward before the baseline."""
    for case in golden_cases(golden, "rloo", dtype):
        p, x = case.params, case.inputs
        if "rewards" not in p:
            continue
        o = GRPO(
            group_size=p["num_generations"],
            baseline="leave_one_out",
            advantage_scale="none",
            whiten_advantages=p.get("normalize_advantages", False),
            reward_clip=tuple(p.get("reward_clip_range", ())),
            kl_coef=p.get("beta", 0.0),
            kl_in="reward",
            kl_estimator="k1",
        )
        with precision(dtype) as tolerance:
            old_logp, ref_logp = (jnp.asarray(x[name]) for name in ("gen_old_logps", "gen_ref_logps"))
            mask = jnp.asarray(x["gen_completion_mask"], dtype)
            kl = completion_kl(old_logp, ref_logp, mask, o.kl_estimator)
            advantages, _ = completion_advantages(jnp.asarray(x[p["rewards"]]), o, kl)
            assert_close(advantages, case.outputs["advantages"], tolerance, case.name)
            assert_close(product_ratio(old_logp, mask)[:, 0], case.outputs["old_logps_sum"], tolerance, case.name)
            if "kl" in case.outputs:  # theirs is reported per token
                assert_close(kl.sum() / mask.sum(), case.outputs["kl"], tolerance, f"{case.name} kl")


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_mask_of_truncated_completions(golden, dtype):
    cases = [case for case in golden_cases(golden, "grpo_advantages", dtype) if "completion_mask" in case.outputs]
    assert any(case.params.get("mask_truncated_completions") for case in cases)
    for case in cases:
        with precision(dtype) as tolerance:
            mask = jnp.asarray(case.inputs["completion_mask_raw"], dtype)
            if case.params.get("mask_truncated_completions"):
                ended = ((case.inputs["completion_ids"] == 2) & (case.inputs["completion_mask_raw"] > 0)).any(1)
                mask = drop_truncated(mask, jnp.asarray(ended))
            assert_close(mask, case.outputs["completion_mask"], tolerance, case.name)
            assert token_mean(mask, mask, 0).weight == case.outputs["num_items_in_batch"]


def advantages_by_hand(rewards: np.ndarray, size: int, baseline: str, scale: str) -> np.ndarray:
    out = np.zeros(len(rewards))
    for start in range(0, len(rewards), size):
        group = rewards[start : start + size]
        known = group[~np.isnan(group)]
        others = [np.mean(np.delete(known, i)) for i in range(len(known))]
        expected = np.full(size, np.nan)
        expected[~np.isnan(group)] = {"group": known.mean(), "leave_one_out": others, "none": 0.0}[baseline]
        deviation = {
            "group": np.std(known, ddof=1) + 1e-4,
            "batch": np.std(rewards[~np.isnan(rewards)], ddof=1) + 1e-4,
            "none": 1.0,
        }[scale]
        out[start : start + size] = np.nan_to_num((group - expected) / deviation)
    return out


REWARDS = np.array([1.0, 0.0, 0.25, np.nan, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 1.0])


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_by_hand(baseline, scale):
    with precision("float64"):
        advantages, metrics = group_advantages(jnp.asarray(REWARDS), 4, baseline=baseline, scale=scale)
        values = {name: float(mean.value()) for name, mean in metrics.items()}
    np.testing.assert_allclose(advantages, advantages_by_hand(REWARDS, 4, baseline, scale), rtol=1e-12, atol=1e-14)
    deviations = [np.std([1, 0, 0.25], ddof=1), 0, np.std([0, 0, 0, 1], ddof=1)]
    expected = {"reward": np.nanmean(REWARDS), "reward_std": np.mean(deviations), "frac_zero_std": 1 / 3}
    assert values == pytest.approx(expected)


def test_decoupled_rewards_are_normalised_one_by_one():
    rng = np.random.default_rng(0)
    rewards, weights = rng.normal(size=(12, 3)) * [1, 10, 100], np.array([1.0, 0.5, 2.0])
    o = GRPO(group_size=4, reward_combination="decoupled", reward_weights=tuple(weights), advantage_scale="group")
    with precision("float64"):
        advantages, metrics = completion_advantages(jnp.asarray(rewards), o)
        mean = float(metrics["reward"].value())
    each = [advantages_by_hand(column, 4, "group", "group") for column in rewards.T]
    np.testing.assert_allclose(advantages, weights @ each, rtol=1e-12)
    assert mean == pytest.approx((rewards @ weights).mean())


def test_whitened_advantages_have_mean_0_and_deviation_1_over_the_batch():
    o = GRPO(group_size=1, baseline="none", advantage_scale="none", whiten_advantages=True)
    with precision("float64"):
        advantages = np.asarray(completion_advantages(jnp.asarray(REWARDS)[:, None], o)[0])
    known = REWARDS[~np.isnan(REWARDS)]
    np.testing.assert_allclose(advantages[~np.isnan(REWARDS)], (known - known.mean()) / (known.std(ddof=1) + 1e-4))
    assert advantages[3] == 0  # a missing reward teaches nothing


def test_rewards_are_weighed_added_and_clipped():
    rewards = jnp.asarray([[1.0, 2.0], [jnp.nan, 3.0], [jnp.nan, jnp.nan]])
    found = combine_rewards(rewards, jnp.asarray([1.0, 0.5]), (-1.0, 1.75))
    np.testing.assert_array_equal(found, [1.75, 1.5, np.nan])


def test_integer_rewards_give_real_advantages():
    advantages, _ = group_advantages(jnp.asarray([1, 0, 0, 0], jnp.int32), 4)
    assert advantages.dtype == jnp.float32
    np.testing.assert_allclose(advantages, [1.5 - 3e-4, -0.5 + 1e-4, -0.5 + 1e-4, -0.5 + 1e-4], atol=1e-6)


@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
def test_equal_rewards_have_no_gradient_at_all(baseline):
    advantages, metrics = group_advantages(jnp.full(7, 0.1, jnp.float32), 7, baseline=baseline)
    np.testing.assert_array_equal(advantages, 0)
    assert float(metrics["frac_zero_std"].value()) == 1


def test_a_group_without_any_reward_has_no_gradient():
    advantages, metrics = group_advantages(jnp.asarray([jnp.nan, jnp.nan, 1.0, 0.0]), 2)
    np.testing.assert_array_equal(advantages[:2], 0)
    assert float(metrics["frac_zero_std"].value()) == 0.5
    assert float(metrics["reward"].value()) == 0.5
