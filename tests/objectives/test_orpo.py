"""lm/objectives/orpo.py: golden numbers, a loop over pairs, pieces of a batch."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_checks import DTYPES, assert_accumulates, assert_close, golden_cases, numeric_gradient, precision
from pair_checks import REWARDS, example_pairs, golden_pairs, interleaved

from lm.experiment import ORPO
from lm.objectives.orpo import orpo
from lm.objectives.pairs import likelihood_scale


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden(golden, dtype):
    cases = golden_cases(golden, "orpo", dtype)
    assert cases
    for case in cases:
        with precision(dtype) as tolerance:
            logits, logp_of, weights, predicted = golden_pairs(case, dtype)

            def scalar(logits, logp_of=logp_of, weights=weights, predicted=predicted, params=case.params):
                mean, metrics = orpo(logp_of(logits), weights, predicted, ORPO(**params))
                return mean.value(), metrics

            (value, metrics), gradient = jax.value_and_grad(scalar, has_aux=True)(logits)
            expected = case.outputs
            assert_close(value, expected["loss"], tolerance, f"{case.name} loss")
            assert_close(gradient, interleaved(expected["grad_logits"]), tolerance, f"{case.name} gradient")
            size = abs(float(expected["rewards_chosen"]))
            for ours, theirs in REWARDS.items():
                assert_close(metrics[ours].value(), expected[theirs], tolerance, f"{case.name} {ours}", size)
            assert_close(metrics["nll"].value(), expected["nll_loss"], tolerance, f"{case.name} nll")
            summed = abs(float(expected["logps_chosen"].mean()))
            assert_close(metrics["log_odds"].value(), expected["log_odds_chosen"], tolerance, case.name, summed)


def example() -> dict[str, np.ndarray]:
    x = example_pairs()
    del x["ref_logp"]
    predicted = np.cumsum(x["weights"][:, ::-1], 1)[:, ::-1] > 0  # up to the answer's end
    predicted[:, 0] = False
    return x | {"predicted": predicted.astype(np.float64)}


def by_hand(logp, weights, predicted, beta) -> float:
    odds = []
    for row in range(len(logp)):
        p = math.exp(sum(logp[row] * weights[row]) / sum(weights[row]))
        odds.append(p / (1 - p))
    ratios = [math.log(c / r) for c, r in zip(odds[0::2], odds[1::2], strict=True)]
    contrast = sum(math.log1p(math.exp(-ratio)) for ratio in ratios) / len(ratios)
    return beta * contrast - (logp * predicted)[0::2].sum() / predicted[0::2].sum()


def test_equals_a_loop_over_pairs():
    x = example()
    with precision("float64"):
        weights, predicted = jnp.asarray(x["weights"]), jnp.asarray(x["predicted"])
        value, gradient = jax.value_and_grad(lambda logp: orpo(logp, weights, predicted, ORPO(beta=0.7))[0].value())(
            jnp.asarray(x["logp"])
        )
        assert_close(value, by_hand(**x, beta=0.7), 1e-12, "value")
        numeric = numeric_gradient(lambda logp: by_hand(logp, x["weights"], x["predicted"], 0.7), x["logp"])
        assert_close(gradient, numeric, 1e-7, "gradient")


def test_microbatches_add_up():
    x = example()
    with precision("float64"):
        scale = likelihood_scale(jnp.asarray(x["weights"]), jnp.asarray(x["predicted"]))
        assert_accumulates(lambda **arrays: orpo(**arrays, o=ORPO(), nll_scale=scale), x, "logp")


def test_padding_does_not_matter():
    x = example()
    padded = {name: np.concatenate([a, np.zeros((2, 7))]) for name, a in x.items()}
    padded["logp"][:8][x["predicted"] == 0] = -np.inf
    padded["logp"][8:] = np.nan
    with precision("float64"):
        loss = jax.value_and_grad(lambda logp, y: orpo(logp, y["weights"], y["predicted"], ORPO())[0].value())
        clean, gradient = loss(jnp.asarray(x["logp"]), jax.tree.map(jnp.asarray, x))
        with_padding, padded_gradient = loss(jnp.asarray(padded["logp"]), jax.tree.map(jnp.asarray, padded))
    assert float(with_padding) == pytest.approx(float(clean), rel=1e-14)
    np.testing.assert_allclose(padded_gradient, np.concatenate([gradient, np.zeros((2, 7))]), rtol=1e-12, atol=1e-300)
