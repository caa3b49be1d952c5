"""lm/objectives/grpo.py: golden numbers, an independent version, accumulation."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_checks import (
    TOLERANCE,
    Case,
    assert_accumulates,
    assert_close,
    golden_cases,
    numeric_gradient,
    precision,
)

from lm.objectives.grpo import (
    AGGREGATIONS,
    RATIO_LEVELS,
    SURROGATES,
    combine_rewards,
    decoupled_advantages,
    drop_truncated,
    group_advantages,
    grpo,
    sampler_correction,
)

# Golden cases that these tables do not offer, by the loss or by a parameter that is not neutral.
NOT_OFFERED = {"sapo", "luspo", "vespo", "gmpo"}
NOT_OFFERED_PARAMS = {
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "use_bias_correction_kl": False,
    "entropy_coef": 0.0,
}

# bnpo is the token mean of one microbatch alone, dapo that of the whole batch.
GOLDEN_AGGREGATION = {"grpo": "sequence", "bnpo": "token", "dapo": "token", "dr_grpo": "constant", "cispo": "token"}
OVER_ALL_TOKENS = {"dapo", "cispo"}


def offered(params: dict) -> bool:
    plain = all(params.get(name, value) == value for name, value in NOT_OFFERED_PARAMS.items())
    return plain and params["loss_type"] not in NOT_OFFERED


def golden_mask(case: Case) -> np.ndarray:
    mask = case.inputs["completion_mask"]
    return mask * case.inputs["tool_mask"] if case.params["use_tool_mask"] else mask


def golden_arguments(case: Case, dtype: str) -> dict:
    """A golden case's parameters and arrays as our arguments."""
    p, x = case.params, case.inputs
    high = p["epsilon"] if p["epsilon_high"] is None else p["epsilon_high"]
    return {
        "mask": jnp.asarray(golden_mask(case), dtype),
        "advantages": jnp.asarray(np.broadcast_to(x["advantages"][:, None], x["logps"].shape)),
        "old_logp": jnp.asarray(x["old_logps"]) if p["use_old_logps"] else None,
        "ref_logp": jnp.asarray(x["ref_logps"]) if p["beta"] else None,
        "correction": jnp.asarray(x["importance_sampling_ratio"]) if p["use_importance_sampling_ratio"] else None,
        "entropy": jnp.asarray(x["entropy"]),
        "ratio_level": p["importance_sampling_level"],
        "surrogate": "cispo" if p["loss_type"] == "cispo" else "clipped",
        "aggregation": GOLDEN_AGGREGATION[p["loss_type"]],
        "clip_low": p["epsilon"],
        "clip_high": high,
        "delta": p["delta"],
        "kl_coef": p["beta"],
        "max_len": p["max_completion_length"],
    }


def golden_scalar(mean, params: dict):
    """The number that the reference differentiates: a microbatch's part of the loss of an update."""
    accumulated = params["gradient_accumulation_steps"]
    if params["loss_type"] in OVER_ALL_TOKENS:
        return mean.total / (params["num_items_in_batch"] * accumulated / params["steps_per_generation"])
    return mean.value() / accumulated


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_golden(golden, dtype):
    cases = [case for case in golden_cases(golden, "grpo", dtype) if offered(case.params)]
    assert cases
    for case in cases:
        with precision(dtype) as tolerance:
            arguments = golden_arguments(case, dtype)

            def scalar(logp, arguments=arguments, params=case.params):
                mean, metrics = grpo(logp, **arguments)
                return golden_scalar(mean, params), metrics

            (value, metrics), gradient = jax.value_and_grad(scalar, has_aux=True)(jnp.asarray(case.inputs["logps"]))
            size = float(np.abs(case.inputs["advantages"]).max())
            assert_close(value, case.outputs["loss"], tolerance, f"{case.name} loss", scale=size)
            assert_close(gradient, case.outputs["grad_logps"], tolerance, f"{case.name} gradient")
            for ours, theirs in golden_metrics(case).items():
                assert_close(metrics[ours].value(), case.outputs[theirs], tolerance, f"{case.name} {ours}")


def golden_metrics(case: Case) -> dict[str, str]:
    """Our metrics, and theirs that mean the same: at sequence level theirs count sequences, ours count tokens."""
    names = {"entropy": "entropy", "kl": "kl", "clip_high_frac": "cispo_clip_ratio"}
    if case.params["importance_sampling_level"] == "token":
        names |= {"clip_low_frac": "clip_ratio_low_mean"}
        names |= {} if case.params["loss_type"] == "cispo" else {"clip_high_frac": "clip_ratio_high_mean"}
    return {ours: theirs for ours, theirs in names.items() if theirs in case.outputs}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_golden_advantages(golden, dtype):
    for case in golden_cases(golden, "grpo_advantages", dtype):
        p, expected = case.params, case.outputs
        with precision(dtype) as tolerance:
            rewards, weights = jnp.asarray(case.inputs[p["rewards"]]), jnp.asarray(case.inputs["reward_weights"])
            combined = combine_rewards(rewards, weights)
            scale = p.get("scale_rewards", "group")
            advantages, metrics = group_advantages(combined, p["num_generations"], scale=scale)
            if p.get("multi_objective_aggregation") == "normalize_then_sum":
                advantages = decoupled_advantages(rewards, weights, p["num_generations"])
            # The reference rounds where a group's rewards are all equal; ours are exactly 0.
            assert_close(advantages, expected["advantages"], tolerance, f"{case.name} advantages")
            if "reward" in expected:
                assert_close(metrics["reward"].value(), expected["reward"], tolerance, f"{case.name} reward")
            # Only here does the reference count groups: in the other cases it looks at the batch's deviation.
            if scale != "batch" and "scale_rewards" in p:
                frac = metrics["frac_zero_std"].value()
                assert_close(frac, expected["frac_reward_zero_std"], tolerance, f"{case.name} frac_zero_std")


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_golden_masks_and_sampler_corrections(golden, dtype):
    checked = set()
    for case in golden_cases(golden, "grpo_advantages", dtype):
        p, x = case.params, case.inputs
        with precision(dtype) as tolerance:
            mask = jnp.asarray(x["completion_mask_raw"], dtype)
            if p.get("mask_truncated_completions"):
                mask = drop_truncated(mask, jnp.asarray(x["completion_ids"]), eos_id=2)
                checked.add("truncated")
            if "completion_mask" in case.outputs:
                assert_close(mask, case.outputs["completion_mask"], tolerance, f"{case.name} mask")
            if "importance_sampling_ratio" in case.outputs:
                level, mode = p["vllm_importance_sampling_mode"].split("_")
                bounds = {"low": p.get("vllm_importance_sampling_clip_min"), "high": p["vllm_importance_sampling_clip_max"]}  # fmt: skip
                bounds = {name: bound for name, bound in bounds.items() if bound is not None}
                logps = (jnp.asarray(x[name]) for name in ("old_logps", "sampling_logps"))
                ours = sampler_correction(*logps, mask, level=level, mode=mode, **bounds)
                expected = np.broadcast_to(case.outputs["importance_sampling_ratio"], ours.shape)
                assert_close(ours, expected, tolerance, f"{case.name} correction")
                checked.add((level, mode))
    assert checked


def example() -> dict[str, np.ndarray]:
    """Ragged completions whose ratios lie on both sides of every bound; the last row is empty."""
    rng = np.random.default_rng(0)
    logp = -rng.exponential(size=(6, 5))
    mask = (np.arange(5) < np.array([5, 2, 4, 1, 3, 0])[:, None]).astype(float)
    return {
        "logp": logp,
        "mask": mask,
        "advantages": np.broadcast_to(rng.normal(size=(6, 1)), logp.shape).copy(),
        "old_logp": logp + 0.4 * rng.normal(size=logp.shape),
        "ref_logp": logp + 0.3 * rng.normal(size=logp.shape),
        "correction": rng.uniform(0.5, 1.5, size=logp.shape),
    }


KNOBS = {"clip_low": 0.15, "clip_high": 0.3, "delta": 1.5, "kl_coef": 0.07, "max_len": 9}


def by_hand(x: dict[str, np.ndarray], level: str, surrogate: str, aggregation: str, fixed: np.ndarray) -> float:
    """The loss as a loop over tokens. `fixed` are the policy's log-probs where they are held fixed (cispo)."""
    rows = []
    for b in range(len(x["logp"])):
        length = int(x["mask"][b].sum())
        losses = []
        for t in range(length):
            logp, advantage = x["logp"][b, t], x["advantages"][b, t]
            policy = fixed if surrogate == "cispo" else x["logp"]
            ratios = np.exp(policy[b, :length] - x["old_logp"][b, :length])
            ratio = ratios[t] if level == "token" else math.exp(np.log(ratios).mean())
            if surrogate == "cispo":
                gain = min(ratio, KNOBS["clip_high"]) * advantage * logp
            else:
                bounded = min(max(ratio, 1 - KNOBS["clip_low"]), 1 + KNOBS["clip_high"])
                gain = min(min(ratio, KNOBS["delta"]) * advantage, bounded * advantage)
            log_ratio = x["ref_logp"][b, t] - logp
            kl = math.exp(log_ratio) - 1 - log_ratio
            losses.append(KNOBS["kl_coef"] * kl - gain * x["correction"][b, t])
        rows.append(losses)
    if aggregation == "sequence":
        return sum(sum(losses) / max(len(losses), 1) for losses in rows) / len(rows)
    number = sum(map(len, rows)) if aggregation == "token" else len(rows) * KNOBS["max_len"]
    return sum(map(sum, rows)) / number


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("level", RATIO_LEVELS)
def test_equals_a_loop_over_tokens(level, surrogate, aggregation):
    x = example()
    choice = {"ratio_level": level, "surrogate": surrogate, "aggregation": aggregation}
    with precision("float64"):
        rest = {name: jnp.asarray(a) for name, a in x.items() if name != "logp"}

        def ours(logp):
            return grpo(logp, **rest, **choice, **KNOBS)[0].value()

        def theirs(logp):
            return by_hand(x | {"logp": logp}, level, surrogate, aggregation, fixed=x["logp"])

        value, gradient = jax.value_and_grad(ours)(jnp.asarray(x["logp"]))
        assert_close(value, theirs(x["logp"]), 1e-12, "value")
        assert_close(gradient, numeric_gradient(theirs, x["logp"]), 1e-7, "gradient")


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_microbatches_add_up(aggregation):
    with precision("float64"):
        assert_accumulates(lambda **arrays: grpo(**arrays, **KNOBS, aggregation=aggregation), example(), "logp")


def test_on_policy_has_the_policy_gradient():
    x = example()
    with precision("float64"):
        mask, advantages = jnp.asarray(x["mask"]), jnp.asarray(x["advantages"])
        mean, gradient = jax.value_and_grad(lambda logp: grpo(logp, mask, advantages, max_len=5)[0].total)(
            jnp.asarray(x["logp"])
        )
    assert_close(mean, -(x["advantages"] * x["mask"]).sum(), 1e-12, "value")
    assert_close(gradient, -x["advantages"] * x["mask"], 1e-12, "gradient")


@pytest.mark.parametrize("level", RATIO_LEVELS)
def test_what_is_off_the_mask_does_not_matter(level):
    x = example()
    spoilt = {name: np.where(x["mask"] > 0, a, np.nan) for name, a in x.items() if name != "mask"} | {"mask": x["mask"]}

    def run(arrays):
        def scalar(logp):
            mean, metrics = grpo(logp, **rest, **KNOBS, ratio_level=level, entropy=-logp)
            return mean.value(), metrics

        rest = {name: jnp.asarray(a) for name, a in arrays.items() if name != "logp"}
        return jax.value_and_grad(scalar, has_aux=True)(jnp.asarray(arrays["logp"]))

    with precision("float64"):
        jax.tree.map(np.testing.assert_array_equal, run(spoilt), run(x))


def test_clip_fractions_by_hand():
    ratio = jnp.asarray([[0.5, 0.5, 1.5, 1.5, 1.0, 9.0]])
    advantages = jnp.asarray([[-1.0, 1.0, -1.0, 1.0, 1.0, 1.0]])
    mask = jnp.asarray([[1.0, 1.0, 1.0, 1.0, 1.0, 0.0]])
    _, metrics = grpo(jnp.log(ratio), mask, advantages, old_logp=jnp.zeros_like(ratio), max_len=6)
    assert float(metrics["clip_low_frac"].value()) == pytest.approx(0.2)
    assert float(metrics["clip_high_frac"].value()) == pytest.approx(0.2)


def advantages_by_hand(rewards: np.ndarray, size: int, scale: str) -> np.ndarray:
    out = np.zeros(len(rewards))
    for start in range(0, len(rewards), size):
        group = rewards[start : start + size]
        known = group[~np.isnan(group)]
        deviation = {
            "group": np.std(known, ddof=1) + 1e-4,
            "batch": np.std(rewards[~np.isnan(rewards)], ddof=1) + 1e-4,
            "none": 1.0,
        }[scale]
        out[start : start + size] = np.nan_to_num((group - known.mean()) / deviation)
    return out


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_by_hand(scale):
    rewards = np.array([1.0, 0.0, 0.25, np.nan, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 1.0])
    with precision("float64"):
        advantages, metrics = group_advantages(jnp.asarray(rewards), 4, scale=scale)
        values = {name: float(mean.value()) for name, mean in metrics.items()}
    np.testing.assert_allclose(advantages, advantages_by_hand(rewards, 4, scale), rtol=1e-12, atol=1e-14)
    deviations = [np.std([1, 0, 0.25], ddof=1), 0, np.std([0, 0, 0, 1], ddof=1)]
    expected = {"reward": np.nanmean(rewards), "reward_std": np.mean(deviations), "frac_zero_std": 1 / 3}
    assert values == pytest.approx(expected)


def test_integer_rewards_give_real_advantages():
    advantages, _ = group_advantages(jnp.asarray([1, 0, 0, 0], jnp.int32), 4)
    assert advantages.dtype == jnp.float32
    np.testing.assert_allclose(advantages, [1.5 - 3e-4, -0.5 + 1e-4, -0.5 + 1e-4, -0.5 + 1e-4], atol=1e-6)


def test_equal_rewards_have_no_gradient_at_all():
    advantages, metrics = group_advantages(jnp.full(7, 0.1, jnp.float32), 7)
    np.testing.assert_array_equal(advantages, 0)
    assert float(metrics["frac_zero_std"].value()) == 1


def test_a_group_without_any_reward_has_no_gradient():
    advantages, metrics = group_advantages(jnp.asarray([jnp.nan, jnp.nan, 1.0, 0.0]), 2)
    np.testing.assert_array_equal(advantages[:2], 0)
    assert float(metrics["frac_zero_std"].value()) == 0.5
    assert float(metrics["reward"].value()) == 0.5


def test_sampler_that_agrees_needs_no_correction():
    x = example()
    old_logp, mask = jnp.asarray(x["old_logp"]), jnp.asarray(x["mask"])
    np.testing.assert_array_equal(sampler_correction(old_logp, old_logp, mask), 1)
