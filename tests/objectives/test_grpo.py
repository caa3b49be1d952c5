"""lm/objectives/grpo.py: golden numbers and gradients of every member, loops over tokens, accumulation."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_checks import (
    DTYPES,
    Case,
    assert_accumulates,
    assert_close,
    golden_cases,
    numeric_gradient,
    precision,
)

from lm.experiment import GRPO
from lm.objectives.aggregation import AGGREGATIONS
from lm.objectives.grpo import entropy_scale, grpo
from lm.objectives.importance import RATIO_LEVELS, top_entropy_mask
from lm.objectives.surrogates import SURROGATES

# bnpo is the token mean of one microbatch alone, dapo that of the whole batch.
GOLDEN_AGGREGATION = {
    "grpo": "sequence", "sapo": "sequence", "gmpo": "sequence", "luspo": "sequence_sum", "dr_grpo": "constant",
    "bnpo": "token", "dapo": "token", "cispo": "token", "vespo": "token",
}  # fmt: skip
OVER_ALL_TOKENS = {"dapo", "cispo", "vespo"}
NAMES = {"sapo_temperature_pos": "sapo_tau_pos", "sapo_temperature_neg": "sapo_tau_neg"}


def golden_config(p: dict) -> GRPO:
    """A golden case's parameters as the fields of an experiment."""
    named = {NAMES.get(name, name): value for name, value in p.items() if name.startswith(("sapo_", "vespo_"))}
    return GRPO(
        ratio_level=p["importance_sampling_level"],
        surrogate=p["loss_type"] if p["loss_type"] in SURROGATES else "clipped",
        aggregation=GOLDEN_AGGREGATION[p["loss_type"]],
        clip_low=p["epsilon"],
        clip_high=p["epsilon"] if p["epsilon_high"] is None else p["epsilon_high"],
        delta=p["delta"] or 0.0,
        kl_coef=p["beta"],
        kl_correction=p["use_bias_correction_kl"],
        top_entropy=p["top_entropy_quantile"],
        off_policy_kl=p["off_policy_mask_threshold"] or 0.0,
        entropy_coef=p["entropy_coef"],
        max_new_tokens=p["max_completion_length"],
        **named,
    )


def golden_arrays(case: Case, dtype: str) -> dict:
    p, x = case.params, case.inputs
    mask = x["completion_mask"] * x["tool_mask"] if p["use_tool_mask"] else x["completion_mask"]
    corrected = p["use_importance_sampling_ratio"]
    return {
        "mask": jnp.asarray(mask, dtype),
        "advantages": jnp.asarray(np.broadcast_to(x["advantages"][:, None], x["logps"].shape)),
        "old_logp": jnp.asarray(x["old_logps"]) if p["use_old_logps"] else None,
        "ref_logp": jnp.asarray(x["ref_logps"]) if p["beta"] else None,
        "sampler_logp": jnp.asarray(x["sampling_logps"]) if corrected else None,
        "correction": jnp.asarray(x["importance_sampling_ratio"]) if corrected else None,
    }


def golden_scalar(mean, params: dict):
    """The number that the reference differentiates: a microbatch's part of the loss of an update."""
    accumulated = params["gradient_accumulation_steps"]
    if params["loss_type"] in OVER_ALL_TOKENS:
        return mean.total / (params["num_items_in_batch"] * accumulated / params["steps_per_generation"])
    return mean.value() / accumulated


def golden_metrics(case: Case) -> dict[str, str]:
    """Our metrics, and theirs that mean the same: at sequence level theirs count sequences, ours count tokens."""
    names = {"entropy": "entropy", "kl": "kl", "clip_high_frac": "cispo_clip_ratio"}
    if case.params["importance_sampling_level"] == "token" and case.params["loss_type"] != "gmpo":
        names |= {"clip_low_frac": "clip_ratio_low_mean"}
        names |= {} if case.params["loss_type"] == "cispo" else {"clip_high_frac": "clip_ratio_high_mean"}
    return {ours: theirs for ours, theirs in names.items() if theirs in case.outputs}


def golden_tokens_of_bonus(case: Case) -> float:
    """Number of tokens that the entropy bonus is a mean of."""
    mask = jnp.asarray(golden_arrays(case, "float64")["mask"])
    return float(top_entropy_mask(jnp.asarray(case.inputs["entropy"]), mask, case.params["top_entropy_quantile"]).sum())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_golden(golden, dtype):
    cases = golden_cases(golden, "grpo", dtype)
    assert {case.params["loss_type"] for case in cases} == set(GOLDEN_AGGREGATION)
    for case in cases:
        with precision(dtype) as tolerance:
            o, arrays = golden_config(case.params), golden_arrays(case, dtype)
            scale = None
            if case.params["loss_type"] in OVER_ALL_TOKENS and case.params["entropy_coef"]:
                # Theirs divides the bonus by the tokens it is of, the loss by those of the whole batch.
                scale = case.params["num_items_in_batch"] / golden_tokens_of_bonus(case)

            def scalar(logp, entropy, o=o, arrays=arrays, params=case.params, scale=scale):
                mean, metrics = grpo(logp, o=o, entropy=entropy, entropy_scale=scale, **arrays)
                return golden_scalar(mean, params), metrics

            inputs = (jnp.asarray(case.inputs[name]) for name in ("logps", "entropy"))
            (value, metrics), gradients = jax.value_and_grad(scalar, (0, 1), has_aux=True)(*inputs)
            size = float(np.abs(case.inputs["advantages"]).max())
            assert_close(value, case.outputs["loss"], tolerance, f"{case.name} loss", scale=size)
            assert_close(gradients[0], case.outputs["grad_logps"], tolerance, f"{case.name} gradient")
            if "grad_entropy" in case.outputs:
                assert_close(gradients[1], case.outputs["grad_entropy"], tolerance, f"{case.name} gradient of entropy")
            for ours, theirs in golden_metrics(case).items():
                assert_close(metrics[ours].value(), case.outputs[theirs], tolerance, f"{case.name} {ours}")
            if {"clip_low_frac", "clip_high_frac"} <= golden_metrics(
                case
            ).keys() and "clip_ratio_region_mean" in case.outputs:
                region = metrics["clip_low_frac"].value() + metrics["clip_high_frac"].value()
                assert_close(region, case.outputs["clip_ratio_region_mean"], tolerance, f"{case.name} clipped")


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_rloo(golden, dtype):
    cases = [case for case in golden_cases(golden, "rloo", dtype) if "grad_logps" in case.outputs]
    assert cases
    for case in cases:
        p, x = case.params, case.inputs
        o = GRPO(ratio_level="product", aggregation="sequence", clip_low=p["epsilon"], clip_high=p["epsilon_high"])
        with precision(dtype) as tolerance:
            mask = jnp.asarray(x["completion_mask"], dtype)
            # Only the sum of the old policy's log-probabilities is known: any that add up to it give the same.
            old_logp = jnp.asarray(x["old_logps_sum"])[:, None] * mask / mask.sum(1, keepdims=True)
            advantages = jnp.asarray(x["advantages"])[:, None] * mask

            def scalar(logp, mask=mask, advantages=advantages, old_logp=old_logp, o=o):
                return grpo(logp, mask, advantages, o, old_logp=old_logp)[0].value()

            value, gradient = jax.value_and_grad(scalar)(jnp.asarray(x["logps"]))
            assert_close(value, case.outputs["loss"], tolerance, f"{case.name} loss", scale=1.0)
            assert_close(gradient, case.outputs["grad_logps"], 10 * tolerance, f"{case.name} gradient")


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


KNOBS = GRPO(
    clip_low=0.15, clip_high=0.3, delta=1.5, kl_coef=0.07, max_new_tokens=9, sapo_tau_pos=0.8, sapo_tau_neg=1.4,
    vespo_k_pos=1.5, vespo_lambda_pos=2.5, vespo_k_neg=3.5, vespo_lambda_neg=1.5,
)  # fmt: skip


def gain_by_hand(
    surrogate: str, logs: np.ndarray, t: int, ratio: float, advantage: float, logp: float, weights
) -> float:
    """What is maximised at token t of a completion, where `logs` are the logs of its tokens' ratios."""
    if surrogate == "cispo":
        return min(ratio, KNOBS.clip_high) * advantage * logp * weights[t]
    if surrogate == "sapo":
        tau = KNOBS.sapo_tau_pos if advantage > 0 else KNOBS.sapo_tau_neg
        return 4 / tau / (1 + math.exp(-tau * (ratio - 1))) * advantage * weights[t]
    if surrogate == "gmpo":
        product = 1.0
        for log in logs:
            bounded = min(max(log, -KNOBS.clip_low), KNOBS.clip_high)
            product *= math.exp(min(log, bounded) if advantage > 0 else max(log, bounded))
        return product ** (1 / len(logs)) * advantage * weights[t]
    if surrogate == "vespo":
        w = math.exp(logs.sum()) * np.prod(weights)
        k, decay = (1.5, 2.5) if advantage >= 0 else (3.5, 1.5)
        return math.exp(decay) * w**k * math.exp(-decay * w) * advantage * logp
    bounded = min(max(ratio, 1 - KNOBS.clip_low), 1 + KNOBS.clip_high)
    return min(min(ratio, KNOBS.delta) * advantage, bounded * advantage) * weights[t]


HELD = {"cispo", "vespo"}  # their weight of log π has no gradient


def by_hand(x: dict[str, np.ndarray], level: str, surrogate: str, aggregation: str, fixed: np.ndarray) -> float:
    """The loss as a loop over tokens. `fixed` are the policy's log-probs where they are held fixed."""
    rows = []
    for b in range(len(x["logp"])):
        length = int(x["mask"][b].sum())
        losses = []
        for t in range(length):
            logp, advantage = x["logp"][b, t], x["advantages"][b, t]
            policy = fixed if surrogate in HELD else x["logp"]
            logs = policy[b, :length] - x["old_logp"][b, :length]
            ratio = math.exp({"token": logs[t], "sequence": logs.mean(), "product": logs.sum()}[level])
            gain = gain_by_hand(surrogate, logs, t, ratio, advantage, logp, x["correction"][b, :length])
            log_ratio = x["ref_logp"][b, t] - logp
            losses.append(KNOBS.kl_coef * (math.exp(log_ratio) - 1 - log_ratio) - gain)
        rows.append(losses)
    if aggregation == "sequence":
        return sum(sum(losses) / max(len(losses), 1) for losses in rows) / len(rows)
    number = {"token": sum(map(len, rows)), "sequence_sum": len(rows), "constant": len(rows) * 9}[aggregation]
    return sum(map(sum, rows)) / number


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("level", RATIO_LEVELS)
def test_equals_a_loop_over_tokens(level, surrogate, aggregation):
    x = example()
    o = dataclasses.replace(KNOBS, ratio_level=level, surrogate=surrogate, aggregation=aggregation)
    with precision("float64"):
        rest = {name: jnp.asarray(a) for name, a in x.items() if name != "logp"}

        def ours(logp):
            return grpo(logp, o=o, **rest)[0].value()

        def theirs(logp):
            return by_hand(x | {"logp": logp}, level, surrogate, aggregation, fixed=x["logp"])

        value, gradient = jax.value_and_grad(ours)(jnp.asarray(x["logp"]))
        assert_close(value, theirs(x["logp"]), 1e-12, "value")
        assert_close(gradient, numeric_gradient(theirs, x["logp"]), 1e-7, "gradient")


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_microbatches_add_up(aggregation):
    o = dataclasses.replace(KNOBS, aggregation=aggregation, entropy_coef=0.3, off_policy_kl=0.1)
    x = example()
    with precision("float64"):
        scale = entropy_scale(jnp.asarray(x["mask"]), o)

        def loss(logp, **arrays):
            return grpo(logp, o=o, entropy=-jnp.square(logp), entropy_scale=scale, **arrays)

        assert_accumulates(loss, x, "logp")


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_entropy_bonus_is_a_mean_over_tokens_however_losses_are_aggregated(aggregation):
    x, plain = example(), dataclasses.replace(KNOBS, aggregation=aggregation)
    entropy = np.where(x["mask"] > 0, 2 + x["logp"], np.nan)
    with precision("float64"):
        arrays = {name: jnp.asarray(a) for name, a in x.items()} | {"entropy": jnp.asarray(entropy)}
        found = [grpo(**arrays, o=dataclasses.replace(plain, entropy_coef=c))[0].value() for c in (0.0, 0.3)]
        assert float(found[0] - found[1]) == pytest.approx(0.3 * np.nanmean(entropy), rel=1e-12)


@pytest.mark.parametrize("kl_estimator, wanted", [("k1", 0.5), ("k2", 0.125), ("k3", math.expm1(-0.5) + 0.5)])
def test_the_penalty_is_of_the_estimator_asked_for_and_weighed_by_the_ratio_if_asked(kl_estimator, wanted):
    one, o = jnp.ones((1, 1)), GRPO(kl_coef=1.0, kl_estimator=kl_estimator)
    arrays = {"mask": one, "advantages": 0 * one, "old_logp": -2 * one, "ref_logp": -1.5 * one}
    for changes, factor in (({}, 1.0), ({"kl_correction": True}, math.e)):
        mean, metrics = grpo(-one, o=dataclasses.replace(o, **changes), **arrays)
        assert float(mean.value()) == pytest.approx(factor * wanted) == float(metrics["kl"].value())


def test_on_policy_has_the_policy_gradient():
    x = example()
    with precision("float64"):
        mask, advantages = jnp.asarray(x["mask"]), jnp.asarray(x["advantages"])
        mean, gradient = jax.value_and_grad(lambda logp: grpo(logp, mask, advantages, GRPO())[0].total)(
            jnp.asarray(x["logp"])
        )
    assert_close(mean, -(x["advantages"] * x["mask"]).sum(), 1e-12, "value")
    assert_close(gradient, -x["advantages"] * x["mask"], 1e-12, "gradient")


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("level", RATIO_LEVELS)
def test_what_is_off_the_mask_does_not_matter(level, surrogate):
    x = example()
    spoilt = {name: np.where(x["mask"] > 0, a, np.nan) for name, a in x.items() if name != "mask"} | {"mask": x["mask"]}
    o = dataclasses.replace(
        KNOBS, ratio_level=level, surrogate=surrogate, top_entropy=0.5, off_policy_kl=0.1, entropy_coef=0.1
    )

    def run(arrays):
        def scalar(logp):
            mean, metrics = grpo(logp, o=o, entropy=-logp, **rest)
            return mean.value(), metrics

        rest = {name: jnp.asarray(a) for name, a in arrays.items() if name != "logp"}
        return jax.value_and_grad(scalar, has_aux=True)(jnp.asarray(arrays["logp"]))

    with precision("float64"):
        jax.tree.map(np.testing.assert_array_equal, run(spoilt), run(x))


def test_clip_fractions_by_hand():
    ratio = jnp.asarray([[0.5, 0.5, 1.5, 1.5, 1.0, 9.0]])
    advantages = jnp.asarray([[-1.0, 1.0, -1.0, 1.0, 1.0, 1.0]])
    mask = jnp.asarray([[1.0, 1.0, 1.0, 1.0, 1.0, 0.0]])
    _, metrics = grpo(jnp.log(ratio), mask, advantages, GRPO(), old_logp=jnp.zeros_like(ratio))
    assert float(metrics["clip_low_frac"].value()) == pytest.approx(0.2)
    assert float(metrics["clip_high_frac"].value()) == pytest.approx(0.2)


@pytest.mark.parametrize("level", RATIO_LEVELS)
@pytest.mark.parametrize(
    "fields", [{}, {"delta": 4.0}, {"surrogate": "sapo"}, {"surrogate": "cispo"}, {"surrogate": "vespo"}], ids=str
)
def test_a_ratio_that_overflows_has_the_loss_and_the_gradient_of_a_large_one(fields, level):
    o = GRPO(ratio_level=level, **fields)
    mask = jnp.asarray([[1.0, 1.0, 1.0, 0.0]] * 3)
    bounded = fields != {}  # also where the advantage is negative
    advantages = jnp.asarray([[1.0], [0.0], [-1.0 if bounded else 1.0]]) * mask

    def loss(logp, drift):
        return grpo(logp, mask, advantages, o, old_logp=logp_of - drift * mask)[0].value()

    logp_of = jnp.full_like(mask, -1.0)
    large, very_large = (jax.value_and_grad(loss)(logp_of, drift) for drift in (19.0, 200.0))
    assert float(very_large[0]) == pytest.approx(float(large[0]), rel=1e-6)
    np.testing.assert_allclose(very_large[1], large[1], atol=1e-6)
