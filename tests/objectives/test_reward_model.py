"""lm/objectives/reward_model.py: golden numbers, outcomes that are a distribution, pieces of a batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_checks import DTYPES, assert_accumulates, assert_close, golden_cases, numeric_gradient, precision
from pair_checks import interleaved

from lm.experiment import RewardModel
from lm.objectives.reward_model import TIES, reward_model


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden(golden, dtype):
    for case in golden_cases(golden, "reward_model", dtype):
        p, expected = case.params, case.outputs
        with precision(dtype) as tolerance:
            scores = jnp.asarray(interleaved(case.inputs["rewards"])[:, 0])
            margins = jnp.asarray(case.inputs["margin"]) if p["use_margin"] else None
            weights = jnp.ones((len(scores), 1), dtype)

            def scalar(scores, weights=weights, margins=margins, center=p["center_rewards_coefficient"] or 0.0):
                mean, metrics = reward_model(scores, weights, RewardModel(center_coef=center), margins=margins)
                return mean.value(), metrics

            (value, metrics), gradient = jax.value_and_grad(scalar, has_aux=True)(scores)
            assert_close(value, expected["loss"], tolerance, f"{case.name} loss")
            assert_close(gradient, interleaved(expected["grad_rewards"])[:, 0], tolerance, f"{case.name} gradient")
            assert_close(metrics["reward_accuracy"].value(), expected["accuracy"], tolerance, f"{case.name} accuracy")
            assert_close(metrics["reward_margin"].value(), expected["margin"], tolerance, f"{case.name} margin")


def example() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "scores": rng.standard_normal(8),
        "weights": np.ones((8, 3)),
        "margins": np.array([0.0, 0.5, 1.0, 0.0]),
        "is_tie": np.array([0.0, 1.0, 0.0, 1.0]),
    }


@pytest.mark.parametrize("ties", ["drop", *TIES])
def test_the_gradient_is_that_of_finite_differences(ties):
    x = example()
    with precision("float64"):
        rest = {name: jnp.asarray(a) for name, a in x.items() if name != "scores"}

        def loss(scores):
            return reward_model(jnp.asarray(scores), **rest, o=RewardModel(ties=ties, tie_width=0.4, center_coef=0.1))[
                0
            ].value()

        assert_close(jax.grad(loss)(jnp.asarray(x["scores"])), numeric_gradient(loss, x["scores"]), 1e-8, ties)


def test_the_three_outcomes_of_rao_and_kupper_are_a_distribution():
    """First wins, second wins, a tie: whatever the scores, the probabilities add up to 1."""
    with precision("float64"):
        for first, second in [(0.0, 0.0), (1.3, -0.4), (-2.0, 5.0)]:

            def probability(a, b, tie):
                loss, _ = reward_model(
                    jnp.asarray([a, b]),
                    jnp.ones((2, 1)),
                    RewardModel(ties="rao_kupper", tie_width=0.7),
                    is_tie=jnp.asarray([tie]),
                )
                return float(jnp.exp(-loss.value()))

            total = probability(first, second, 0.0) + probability(second, first, 0.0) + probability(first, second, 1.0)
            assert total == pytest.approx(1.0, abs=1e-12)


def test_a_dropped_tie_is_as_if_it_were_not_there():
    x = example()
    kept = np.repeat(x["is_tie"] == 0, 2)
    with precision("float64"):
        whole = reward_model(**{name: jnp.asarray(a) for name, a in x.items()}, o=RewardModel(center_coef=0.1))
        alone = reward_model(
            jnp.asarray(x["scores"][kept]), jnp.ones((4, 3)), RewardModel(center_coef=0.1),
            margins=jnp.asarray(x["margins"][x["is_tie"] == 0]),
        )  # fmt: skip
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), whole, alone)


@pytest.mark.parametrize("ties", ["drop", *TIES])
def test_microbatches_add_up(ties):
    with precision("float64"):
        assert_accumulates(
            lambda **arrays: reward_model(**arrays, o=RewardModel(ties=ties, center_coef=0.1)), example(), "scores"
        )


def test_padding_does_not_matter():
    x = example()
    padded = {name: np.concatenate([a, np.zeros((2 if len(a) == 8 else 1, *a.shape[1:]))]) for name, a in x.items()}
    with precision("float64"):
        one, other = (
            reward_model(**{name: jnp.asarray(a) for name, a in arrays.items()}, o=RewardModel(ties="split"))
            for arrays in (x, padded)
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), one, other)
