"""lm/objectives/cpo.py: golden numbers, a loop over pairs, pieces of a batch."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_checks import DTYPES, assert_accumulates, assert_close, golden_cases, numeric_gradient, precision
from pair_checks import REWARDS, example_pairs, golden_pairs, interleaved

from lm.experiment import CPO
from lm.objectives.cpo import LOSSES, PER_TOKEN, cpo
from lm.objectives.pairs import likelihood_scale

NAMES = {
    "loss_type": "loss", "beta": "beta", "label_smoothing": "label_smoothing", "simpo_gamma": "gamma", "alpha": "alpha",
    "cpo_alpha": "nll_coef",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_golden(golden, dtype):
    cases = golden_cases(golden, "cpo_simpo", dtype)
    assert {case.params["loss_type"] for case in cases} <= set(LOSSES)
    for case in cases:
        knobs = {NAMES[name]: value for name, value in case.params.items()}
        with precision(dtype) as tolerance:
            logits, logp_of, weights, _ = golden_pairs(case, dtype)

            def scalar(logits, logp_of=logp_of, weights=weights, knobs=knobs):
                mean, metrics = cpo(logp_of(logits), weights, CPO(**knobs))
                return mean.value(), metrics

            (value, metrics), gradient = jax.value_and_grad(scalar, has_aux=True)(logits)
            expected = case.outputs
            assert_close(value, expected["loss"], tolerance, f"{case.name} loss")
            assert_close(gradient, interleaved(expected["grad_logits"]), tolerance, f"{case.name} gradient")
            size = abs(float(expected["rewards_chosen"]))
            for ours, theirs in REWARDS.items():
                assert_close(metrics[ours].value(), expected[theirs], tolerance, f"{case.name} {ours}", size)
            if case.params["cpo_alpha"]:
                assert_close(metrics["nll"].value(), expected["nll_loss"], tolerance, f"{case.name} nll")


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


# Of one pair: rewards c and r, beta b, label smoothing e, gamma g.
BY_HAND = {
    "sigmoid": lambda c, r, b, e, g: -(1 - e) * log_sigmoid(b * (c - r)) - e * log_sigmoid(b * (r - c)),
    "hinge": lambda c, r, b, e, g: max(0.0, 1 - b * (c - r)),
    "ipo": lambda c, r, b, e, g: (c - r - 1 / (2 * b)) ** 2,
    "simpo": lambda c, r, b, e, g: -(1 - e) * log_sigmoid(b * (c - r) - g) - e * log_sigmoid(g - b * (c - r)),
}


def by_hand(logp, weights, loss, beta, label_smoothing, gamma, alpha, nll_coef) -> float:
    rewards = []
    for row in range(len(logp)):
        total = sum(logp[row, t] for t in range(logp.shape[1]) if weights[row, t])
        score = total / weights[row].sum() if loss in PER_TOKEN else total
        rewards.append((1 - math.exp(score) ** -alpha) / alpha if alpha else score)
    pairs = list(zip(rewards[0::2], rewards[1::2], strict=True))
    contrast = sum(BY_HAND[loss](c, r, beta, label_smoothing, gamma) for c, r in pairs) / len(pairs)
    chosen = [logp[row, t] for row in range(0, len(logp), 2) for t in range(logp.shape[1]) if weights[row, t]]
    return contrast - nll_coef * sum(chosen) / len(chosen)


@pytest.mark.parametrize("alpha", [0.0, 0.25])
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_a_loop_over_pairs(loss, alpha):
    x = example_pairs()
    knobs = {"loss": loss, "beta": 0.7, "label_smoothing": 0.1, "gamma": 0.4, "alpha": alpha, "nll_coef": 0.3}
    with precision("float64"):
        value, gradient = jax.value_and_grad(
            lambda logp: cpo(logp, jnp.asarray(x["weights"]), CPO(**knobs))[0].value()
        )(jnp.asarray(x["logp"]))
        assert_close(value, by_hand(x["logp"], x["weights"], **knobs), 1e-12, "value")
        numeric = numeric_gradient(lambda logp: by_hand(logp, x["weights"], **knobs), x["logp"])
        assert_close(gradient, numeric, 1e-7, "gradient")


@pytest.mark.parametrize("loss", LOSSES)
def test_microbatches_add_up(loss):
    """Cross-entropy too, which is a mean over tokens: the scale is the whole batch's."""
    x = example_pairs()
    del x["ref_logp"]
    with precision("float64"):
        scale = likelihood_scale(jnp.asarray(x["weights"]), jnp.asarray(x["weights"]))
        assert_accumulates(lambda **arrays: cpo(**arrays, o=CPO(loss=loss), nll_scale=scale), x, "logp")


@pytest.mark.slow
def test_padding_does_not_matter():
    x = example_pairs()
    logp = np.concatenate([np.where(x["weights"] > 0, x["logp"], -np.inf), np.full((2, 7), np.nan)])
    weights = np.concatenate([x["weights"], np.zeros((2, 7))])
    with precision("float64"):
        loss = jax.value_and_grad(lambda logp, weights: cpo(logp, weights, CPO(loss="simpo", alpha=0.25))[0].value())
        clean, gradient = loss(jnp.asarray(x["logp"]), jnp.asarray(x["weights"]))
        padded, padded_gradient = loss(jnp.asarray(logp), jnp.asarray(weights))
    assert float(padded) == pytest.approx(float(clean), rel=1e-14)
    np.testing.assert_allclose(padded_gradient, np.concatenate([gradient, np.zeros((2, 7))]), rtol=1e-12)
