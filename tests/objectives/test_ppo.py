"""lm/objectives/ppo.py: golden numbers, a loop over tokens, pieces of a batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_checks import DTYPES, assert_accumulates, assert_close, golden_cases, numeric_gradient, precision

from lm.experiment import PPO
from lm.objectives.kl import KL_ESTIMATORS
from lm.objectives.ppo import (
    adaptive_kl_coef,
    experience,
    explained_variance,
    gae,
    ppo,
    token_rewards,
    with_end,
)


def golden_logp(logits, responses):
    return jnp.take_along_axis(jax.nn.log_softmax(logits), responses[..., None], -1)[..., 0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_golden(golden, dtype):
    """The golden rollouts judge one state more, after the end, and give the score there."""
    for case in golden_cases(golden, "ppo", dtype):
        p, x, expected = case.params, case.inputs, case.outputs
        with precision(dtype) as tolerance:
            mask = jnp.asarray((~expected["padding_mask"].astype(bool)).astype(dtype))
            judged = jnp.asarray((~expected["padding_mask_p1"].astype(bool)).astype(dtype))
            responses = jnp.asarray(x["responses"])
            old_logp, ref_logp = (golden_logp(jnp.asarray(x[name]), responses) for name in ("logits_old", "logits_ref"))
            ended = (x["responses"] == 2).any(1)
            scores = jnp.asarray(x["scores"]) - (p["missing_eos_penalty"] or 0.0) * jnp.asarray(~ended)
            assert_close(scores, expected["scores"], tolerance, f"{case.name} scores")
            assert_close(with_end(mask), judged, 0, f"{case.name} places judged")
            kl = (p["kl_coef"], p["kl_estimator"])
            rewards = token_rewards(scores, old_logp, ref_logp, mask, *kl, value_mask=judged)
            old_values = jnp.where(judged > 0, jnp.asarray(x["values_old"]), 0.0)
            knobs = {"gamma": p["gamma"], "lam": p["lam"], "whiten_rewards": p["whiten_rewards"]}
            advantages, returns = experience(rewards, old_values, mask, **knobs, value_mask=judged)
            assert_close(advantages, expected["advantages"], tolerance, f"{case.name} advantages")
            assert_close(returns * judged, expected["returns"] * np.asarray(judged), tolerance, f"{case.name} returns")

            def scalar(
                logits, values, p=p, mask=mask, judged=judged, responses=responses, advantages=advantages,
                returns=returns, old_logp=old_logp, old_values=old_values,
            ):  # fmt: skip
                mean, metrics = ppo(
                    golden_logp(logits, responses), values, mask, advantages, returns, old_logp, old_values,
                    PPO(clip=p["cliprange"], value_clip=p["cliprange_value"], value_coef=p["vf_coef"]), value_mask=judged,
                )  # fmt: skip
                return mean.value(), metrics

            logits, values = jnp.asarray(x["logits_new"]), jnp.asarray(x["values_new"])
            (value, metrics), gradients = jax.value_and_grad(scalar, (0, 1), has_aux=True)(logits, values)
            assert_close(value, expected["loss"], tolerance, f"{case.name} loss", 1.0)
            assert_close(metrics["policy_loss"].value(), expected["pg_loss"], tolerance, f"{case.name} policy", 1.0)
            assert_close(metrics["value_loss"].value(), expected["vf_loss"], tolerance, f"{case.name} values")
            assert_close(gradients[0], expected["grad_logits_new"], tolerance, f"{case.name} policy's gradient")
            assert_close(gradients[1], expected["grad_values_new"], tolerance, f"{case.name} values' gradient")
            clipped = metrics["value_clip_frac"].value()
            assert_close(clipped, expected["vf_clipfrac"], tolerance, f"{case.name} values clipped")


def example() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = np.zeros((4, 6))
    for row, (start, stop) in enumerate([(1, 4), (2, 6), (3, 4), (1, 6)]):
        mask[row, start:stop] = 1
    drawn = rng.standard_normal((6, 4, 6)) * mask
    names = ("logp", "values", "advantages", "returns", "old_logp", "old_values")
    return dict(zip(names, drawn, strict=True)) | {"mask": mask}


def by_hand(logp, values, mask, advantages, returns, old_logp, old_values, clip, value_clip, value_coef) -> float:
    total = count = 0.0
    for b, t in zip(*np.nonzero(mask), strict=True):
        ratio = np.exp(logp[b, t] - old_logp[b, t])
        a = advantages[b, t]
        held = np.clip(values[b, t], old_values[b, t] - value_clip, old_values[b, t] + value_clip)
        of_value = max((values[b, t] - returns[b, t]) ** 2, (held - returns[b, t]) ** 2)
        total += -min(ratio * a, np.clip(ratio, 1 - clip, 1 + clip) * a) + value_coef * 0.5 * of_value
        count += 1
    return total / count


@pytest.mark.parametrize("moved", ["logp", "values"])
def test_equals_a_loop_over_tokens(moved):
    x, knobs = example(), {"clip": 0.3, "value_clip": 0.4, "value_coef": 0.7}
    with precision("float64"):
        arrays = {name: jnp.asarray(a) for name, a in x.items()}
        value, gradient = jax.value_and_grad(lambda y: ppo(**arrays | {moved: y}, o=PPO(**knobs))[0].value())(
            arrays[moved]
        )

        def theirs(y):
            return by_hand(**x | {moved: y}, **knobs)

        assert_close(value, theirs(x[moved]), 1e-12, "value")
        assert_close(gradient, numeric_gradient(theirs, x[moved]), 1e-7, "gradient")


@pytest.mark.parametrize("moved", ["logp", "values"])
def test_microbatches_add_up(moved):
    with precision("float64"):
        assert_accumulates(lambda **arrays: ppo(**arrays, o=PPO()), example(), moved)


def test_advantages_are_sums_of_discounted_errors():
    rng = np.random.default_rng(1)
    rewards, values = rng.standard_normal((2, 3, 5))
    gamma, lam = 0.9, 0.8
    wanted = np.zeros((3, 5))
    following = np.concatenate([values[:, 1:], np.zeros((3, 1))], axis=1)
    delta = rewards + gamma * following - values
    for t in range(5):
        wanted[:, t] = sum((gamma * lam) ** k * delta[:, t + k] for k in range(5 - t))
    with precision("float64"):
        np.testing.assert_allclose(gae(jnp.asarray(rewards), jnp.asarray(values), gamma, lam), wanted, rtol=1e-12)


def test_with_lambda_1_returns_are_the_rewards_to_come():
    x = example()
    with precision("float64"):
        mask = jnp.asarray(x["mask"])
        rewards = jnp.asarray(x["advantages"])
        advantages, returns = experience(rewards, jnp.asarray(x["values"]), mask, gamma=1.0, lam=1.0)
        to_come = np.cumsum(np.asarray(rewards)[:, ::-1], axis=1)[:, ::-1]
        np.testing.assert_allclose(returns * mask, to_come * x["mask"], atol=1e-12)
        assert float((advantages * mask).sum()) == pytest.approx(0, abs=1e-9)
        assert float(jnp.square(advantages).sum() / (mask.sum() - 1)) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_estimates_of_the_kl_are_right_on_average(name):
    """Over all tokens of a small vocabulary: k1 and k3 are unbiased, k2 nearly so for policies that are near."""
    with precision("float64"):
        policy, reference = jax.nn.log_softmax(jnp.array([[0.3, -0.2, 0.1], [0.25, -0.1, 0.05]]))
        exact = (jnp.exp(policy) * (policy - reference)).sum()
        found = (jnp.exp(policy) * KL_ESTIMATORS[name](policy - reference)).sum()
        assert float(found) == pytest.approx(float(exact), rel=0.05 if name == "k2" else 1e-10)


def test_the_score_stands_at_the_last_token_and_the_kl_at_each():
    x = example()
    with precision("float64"):
        scores, mask = jnp.arange(1.0, 5.0), jnp.asarray(x["mask"])
        logp, ref_logp = jnp.asarray(x["logp"]), jnp.asarray(x["old_logp"])
        rewards = token_rewards(scores, logp, ref_logp, mask, 0.3)
        sums = scores - 0.3 * ((logp - ref_logp) * mask).sum(1)
        np.testing.assert_allclose(rewards.sum(1), sums, rtol=1e-12)
        assert np.all(np.asarray(rewards)[x["mask"] == 0] == 0)
        only = token_rewards(scores, logp, logp, mask, 0.3)
        assert [int(np.flatnonzero(row)[0]) for row in np.asarray(only)] == [3, 5, 3, 5]


def test_the_coefficient_follows_the_kl():
    high, low, even = (
        float(adaptive_kl_coef(jnp.asarray(0.1), jnp.asarray(kl), target=2.0, answers=100, horizon=1000))
        for kl in (9, 1.9, 2)
    )
    assert (
        high == pytest.approx(0.1 * 1.02)
        and low == pytest.approx(0.1 * (1 - 0.05 * 0.1))
        and even == pytest.approx(0.1)
    )


def test_a_critic_that_knows_the_returns_explains_all():
    x = example()
    mask, returns = jnp.asarray(x["mask"]), jnp.asarray(x["returns"])
    assert float(explained_variance(returns, returns, mask)) == pytest.approx(1)
    assert float(explained_variance(jnp.zeros_like(returns), returns, mask)) == pytest.approx(0, abs=1e-6)


def test_a_ratio_that_overflows_has_no_gradient_where_the_clip_holds():
    mask, logp = jnp.ones((2, 3)), jnp.full((2, 3), -1.0)
    advantages, rest = jnp.asarray([[1.0], [0.0]]) * mask, jnp.zeros((2, 3))

    def loss(logp):
        return ppo(logp, rest, mask, advantages, rest, jnp.full((2, 3), -200.0), rest, PPO())[0].value()

    value, gradient = jax.value_and_grad(loss)(logp)
    assert float(value) == pytest.approx(-0.5 * (1 + PPO().clip))
    np.testing.assert_array_equal(gradient, 0)
