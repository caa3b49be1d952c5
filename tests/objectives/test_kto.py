"""lm/objectives/kto.py: golden numbers, a loop over answers, pieces of a batch."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_checks import DTYPES, assert_accumulates, assert_close, golden_cases, numeric_gradient, precision
from pair_checks import example_pairs

from lm.experiment import KTO
from lm.objectives.kto import LOSSES, READS_BASELINE, kto, log_ratio_mean


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden(golden, dtype):
    cases = golden_cases(golden, "kto", dtype)
    assert {case.params["loss_type"] for case in cases} <= set(LOSSES)
    for case in cases:
        p, x, expected = case.params, case.inputs, case.outputs
        with precision(dtype) as tolerance:
            logp, ref_logp = jnp.asarray(x["logps"]), jnp.asarray(x["ref_logps"])
            weights = jnp.asarray(x["completion_mask"][:, 1:].astype(dtype))
            desirable = jnp.asarray(x[p["label"]].astype(dtype))
            mismatched = [jnp.asarray(x[name]) for name in ("kl_logps", "kl_ref_logps")]
            if p["swap_kl_policy_and_ref"]:
                mismatched.reverse()
            estimate = log_ratio_mean(*mismatched, jnp.asarray(x["kl_completion_mask"][:, 1:].astype(dtype)))
            kl = jnp.maximum(estimate.value(), 0) if p["loss_type"] in READS_BASELINE else None
            names = ("beta", "desirable_weight", "undesirable_weight")
            knobs = {name: p[name] for name in names} | {"loss": p["loss_type"]}

            def scalar(logp, rest=(ref_logp, weights, desirable), kl=kl, knobs=knobs):
                mean, metrics = kto(logp, *rest, KTO(**knobs), kl)
                return mean.value(), metrics

            (value, metrics), gradient = jax.value_and_grad(scalar, has_aux=True)(logp)
            assert_close(value, expected["loss"], tolerance, f"{case.name} loss")
            assert_close(gradient, expected["grad_logps"], tolerance, f"{case.name} gradient")
            if kl is not None:
                assert_close(metrics["kl"].value(), expected["kl"], tolerance, f"{case.name} kl", 1.0)
            summed = p["beta"] * np.abs(np.asarray((logp - ref_logp) * weights)).sum(1).mean()
            chosen, rejected = (metrics[name].value() for name in ("reward_chosen", "reward_rejected"))
            found = {"rewards_chosen": chosen, "rewards_rejected": rejected, "rewards_margins": chosen - rejected}
            for name in found.keys() & expected.keys():
                assert_close(found[name], expected[name], tolerance, f"{case.name} {name}", summed)


def example() -> dict[str, np.ndarray]:
    return example_pairs() | {"desirable": np.array([1.0, 1, 0, 1, 0, 0, 0, 1])}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# Of one answer: reward r, sign s (1 desirable, -1 not), the baseline.
BY_HAND = {
    "kto": lambda r, s, baseline: 1 - sigmoid(s * (r - baseline)),
    "apo_zero_unpaired": lambda r, s, baseline: 1 - sigmoid(s * r),
}


def by_hand(logp, ref_logp, weights, desirable, loss, kl, beta, good, bad) -> float:
    losses = []
    for row in range(len(logp)):
        ratio = sum((logp[row] - ref_logp[row]) * weights[row])
        sign, weight = (1, good) if desirable[row] else (-1, bad)
        losses.append(weight * BY_HAND[loss](beta * ratio, sign, beta * kl))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("loss", LOSSES)
def test_equals_a_loop_over_answers(loss):
    x = example()
    with precision("float64"):
        rest = {name: jnp.asarray(a) for name, a in x.items() if name != "logp"}
        knobs = {"loss": loss, "beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}
        value, gradient = jax.value_and_grad(
            lambda logp: kto(logp, **rest, kl=jnp.asarray(0.4), o=KTO(**knobs))[0].value()
        )(jnp.asarray(x["logp"]))

        def theirs(logp):
            return by_hand(**x | {"logp": logp}, loss=loss, kl=0.4, beta=0.3, good=1.2, bad=0.7)

        assert_close(value, theirs(x["logp"]), 1e-12, "value")
        assert_close(gradient, numeric_gradient(theirs, x["logp"]), 1e-7, "gradient")


@pytest.mark.parametrize("loss", LOSSES)
def test_microbatches_add_up(loss):
    with precision("float64"):
        assert_accumulates(lambda **arrays: kto(**arrays, kl=jnp.asarray(0.2), o=KTO(loss)), example(), "logp")


def test_padding_does_not_matter():
    x = example()
    padded = {name: np.concatenate([a, np.zeros((2, *a.shape[1:]))]) for name, a in x.items()}
    padded["logp"][:8][x["weights"] == 0] = -np.inf
    padded["logp"][8:] = np.nan
    with precision("float64"):

        def loss(logp, y):
            rest = {name: jnp.asarray(a) for name, a in y.items() if name != "logp"}
            kl = log_ratio_mean(logp, rest["ref_logp"], rest["weights"]).value()
            return kto(logp, **rest, o=KTO(), kl=jax.lax.stop_gradient(kl))[0].value()

        clean, gradient = jax.value_and_grad(loss)(jnp.asarray(x["logp"]), x)
        with_padding, padded_gradient = jax.value_and_grad(loss)(jnp.asarray(padded["logp"]), padded)
    assert float(with_padding) == pytest.approx(float(clean), rel=1e-14)
    np.testing.assert_allclose(padded_gradient, np.concatenate([gradient, np.zeros((2, 7))]), rtol=1e-12)
