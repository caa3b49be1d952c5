"""lm/objectives/dpo.py: golden numbers, the papers' formulas by hand, accumulation."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_checks import TOLERANCE, assert_accumulates, assert_close, golden_cases, numeric_gradient, precision

from lm.objectives.dpo import LOSSES, PER_TOKEN, dpo

# Golden cases that this table does not offer. The first three mix the pairs of a batch (a running mean, sorting), the
# next is cross-entropy, and the parameters after them ask for another divergence or reweigh tokens or pairs.
NOT_OFFERED = {"bco_pair", "aot", "aot_unpaired", "sft"}
NOT_OFFERED_PARAMS = {"f_divergence_type": "reverse_kl", "ld_alpha": None, "use_weighting": False}


def offered(params: dict) -> bool:
    plain = all(params.get(name, value) == value for name, value in NOT_OFFERED_PARAMS.items())
    return plain and NOT_OFFERED.isdisjoint(params["loss_type"]) and len(params["loss_type"]) == 1


def interleaved(x: np.ndarray) -> np.ndarray:
    """Rows [chosen; rejected] as chosen, rejected, chosen, …"""
    return x.reshape(2, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_golden(golden, dtype):
    cases = [case for case in golden_cases(golden, "dpo", dtype) if offered(case.params)]
    assert cases
    for case in cases:
        p = case.params
        knobs = {"loss": p["loss_type"][0], "beta": p["beta"], "label_smoothing": p["label_smoothing"]}
        knobs["tau"] = p.get("discopop_tau", 0.05)
        with precision(dtype) as tolerance:
            weights = interleaved(case.inputs["completion_mask"][:, 1:]).astype(dtype)
            logp, ref_logp = (jnp.asarray(interleaved(case.inputs[name])) for name in ("logps", "ref_logps"))

            def scalar(logp, ref_logp=ref_logp, weights=weights, knobs=knobs):
                mean, metrics = dpo(logp, ref_logp, jnp.asarray(weights), **knobs)
                return mean.value(), metrics

            (value, metrics), gradient = jax.value_and_grad(scalar, has_aux=True)(logp)
            expected = case.outputs
            assert_close(value, expected["loss"], tolerance, f"{case.name} loss")
            assert_close(gradient, interleaved(expected["grad_logps"]), tolerance, f"{case.name} gradient")
            summed = p["beta"] * np.abs(np.asarray(logp - ref_logp) * weights).sum(1).mean()
            for ours, theirs in (
                ("reward_accuracy", "rewards_accuracies"),
                ("reward_margin", "rewards_margins"),
                ("reward_chosen", "rewards_chosen"),
                ("reward_rejected", "rewards_rejected"),
            ):
                if theirs in expected:
                    assert_close(metrics[ours].value(), expected[theirs], tolerance, f"{case.name} {ours}", summed)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def exo(x: float, eps: float) -> float:
    """KL from (σ(x), σ(-x)) to (1 - ε, ε)."""
    p = np.array([sigmoid(x), sigmoid(-x)])
    return float((p * np.log(p / np.array([1 - eps, eps]))).sum())


def discopop(x: float, tau: float) -> float:
    blend = sigmoid(x / tau)
    return (1 - blend) * math.log(1 + math.exp(-x)) + blend * math.exp(-x)


# Of one pair: log-ratios c and r, beta b, label smoothing e.
BY_HAND = {
    "sigmoid": lambda c, r, b, e: -(1 - e) * log_sigmoid(b * (c - r)) - e * log_sigmoid(b * (r - c)),
    "sigmoid_norm": lambda c, r, b, e: -(1 - e) * log_sigmoid(b * (c - r)) - e * log_sigmoid(b * (r - c)),
    "robust": lambda c, r, b, e: (e * log_sigmoid(b * (r - c)) - (1 - e) * log_sigmoid(b * (c - r))) / (1 - 2 * e),
    "hinge": lambda c, r, b, e: max(0.0, 1 - b * (c - r)),
    "ipo": lambda c, r, b, e: (c - r - 1 / (2 * b)) ** 2,
    "exo_pair": lambda c, r, b, e: exo(b * (c - r), e),
    "nca_pair": lambda c, r, b, e: -log_sigmoid(b * c) - (log_sigmoid(-b * c) + log_sigmoid(-b * r)) / 2,
    "sppo_hard": lambda c, r, b, e: (c - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2,
    "apo_zero": lambda c, r, b, e: 1 - sigmoid(b * c) + sigmoid(b * r),
    "apo_down": lambda c, r, b, e: sigmoid(b * c) + 1 - sigmoid(b * (c - r)),
    "discopop": lambda c, r, b, e: discopop(b * (c - r), 0.05),
}


def by_hand(logp, ref_logp, weights, loss, beta, label_smoothing) -> float:
    """The loss as a loop over pairs and tokens."""
    ratios = []
    for row in range(len(logp)):
        ratio = sum(logp[row, t] - ref_logp[row, t] for t in range(logp.shape[1]) if weights[row, t])
        ratios.append(ratio / weights[row].sum() if loss in PER_TOKEN else ratio)
    pairs = zip(ratios[0::2], ratios[1::2], strict=True)
    losses = [BY_HAND[loss](c, r, beta, label_smoothing) for c, r in pairs]
    return sum(losses) / len(losses)


def example() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    weights = np.zeros((8, 7))
    for row, (start, stop) in enumerate([(1, 4), (2, 7), (3, 4), (1, 6), (2, 5), (1, 3), (4, 7), (2, 6)]):
        weights[row, start:stop] = 1
    return {
        "logp": -rng.exponential(size=(8, 7)),
        "ref_logp": -rng.exponential(size=(8, 7)),
        "weights": weights,
    }


@pytest.mark.parametrize("loss", LOSSES)
def test_equals_a_loop_over_pairs(loss):
    x, knobs = example(), {"loss": loss, "beta": 0.3, "label_smoothing": 0.15}
    with precision("float64"):

        def ours(logp):
            return dpo(logp, jnp.asarray(x["ref_logp"]), jnp.asarray(x["weights"]), **knobs)[0].value()

        def theirs(logp):
            return by_hand(logp, x["ref_logp"], x["weights"], **knobs)

        value, gradient = jax.value_and_grad(ours)(jnp.asarray(x["logp"]))
        assert_close(value, theirs(x["logp"]), 1e-12, "value")
        assert_close(gradient, numeric_gradient(theirs, x["logp"]), 1e-7, "gradient")


def test_rewards_by_hand():
    logp = jnp.asarray([[0.0, -1.0, -2.0], [0.0, -3.0, -1.0], [0.0, -5.0, -1.0], [0.0, -1.0, -9.0]])
    ref_logp = jnp.asarray([[0.0, -2.0, -2.5], [0.0, -2.0, -1.0], [0.0, -1.0, -1.0], [0.0, -2.0, -2.0]])
    weights = jnp.asarray([[0.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    metrics = {name: float(mean.value()) for name, mean in dpo(logp, ref_logp, weights, beta=0.5)[1].items()}
    # log-ratios: chosen 1.5, -4; rejected -1, 1
    assert metrics == {"reward_accuracy": 0.5, "reward_margin": -0.625, "reward_chosen": -0.625, "reward_rejected": 0.0}


@pytest.mark.parametrize("loss", LOSSES)
def test_microbatches_add_up(loss):
    with precision("float64"):
        assert_accumulates(lambda **arrays: dpo(**arrays, loss=loss, label_smoothing=0.1), example(), "logp")


def test_padding_does_not_matter():
    x = example()
    padded = {name: np.concatenate([a, np.full((2, 7), fill)]) for (name, a), fill in zip(x.items(), (np.nan, 3, 0), strict=True)}  # fmt: skip
    with precision("float64"):
        for name in ("logp", "ref_logp"):
            padded[name][:8][x["weights"] == 0] = -np.inf

        def value(logp, y):
            return dpo(logp, jnp.asarray(y["ref_logp"]), jnp.asarray(y["weights"]))[0].value()

        clean, gradient = jax.value_and_grad(value)(jnp.asarray(x["logp"]), x)
        with_padding, padded_gradient = jax.value_and_grad(value)(jnp.asarray(padded["logp"]), padded)
    assert float(with_padding) == pytest.approx(float(clean), rel=1e-14)
    np.testing.assert_allclose(padded_gradient[:8], gradient, rtol=1e-12)
    np.testing.assert_array_equal(padded_gradient[8:], 0)
