"""lm/objectives/dpo.py: golden numbers, the papers' formulas by hand, accumulation."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_checks import (
    DTYPES,
    TOLERANCE,
    assert_accumulates,
    assert_close,
    golden_cases,
    numeric_gradient,
    precision,
)
from pair_checks import REWARDS, example_pairs, interleaved

from lm.config import dpo as config
from lm.experiment import DPO
from lm.objectives.dpo import DIVERGENCES, LOSSES, PER_TOKEN, SFT, WHOLE_BATCH, dpo
from lm.objectives.pairs import likelihood_scale


def knobs_of(params: dict) -> dict:
    """The parameters of a golden case as dpo names them."""
    names = {
        "beta": "beta", "label_smoothing": "label_smoothing", "discopop_tau": "tau", "f_divergence_type": "divergence",
        "f_alpha_divergence_coef": "alpha", "ld_alpha": "ld_alpha", "loss_weights": "loss_weights",
    }  # fmt: skip
    told = {ours: params[theirs] for theirs, ours in names.items() if params.get(theirs) is not None}
    return {"losses": params["loss_type"], **told}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_golden(golden, dtype):
    cases = golden_cases(golden, "dpo", dtype)
    assert {name for case in cases for name in case.params["loss_type"]} <= {*LOSSES, *WHOLE_BATCH, SFT}
    for case in cases:
        p = case.params
        with precision(dtype) as tolerance:
            tolerance = max(tolerance, TOLERANCE[p.get("dtype", dtype)])  # of the numbers themselves
            weights = interleaved(case.inputs["completion_mask"][:, 1:]).astype(dtype)
            names = ("logps", "ref_logps", "log_sum_sq_probs")
            logp, ref_logp, log_sum_sq = (jnp.asarray(interleaved(case.inputs[name])) for name in names)
            rest = {"o": DPO(**knobs_of(p)), "log_sum_sq": log_sum_sq if p.get("use_weighting") else None}

            def scalar(logp, ref_logp=ref_logp, weights=weights, rest=rest):
                mean, metrics = dpo(logp, ref_logp, jnp.asarray(weights), **rest)
                return mean.value(), metrics

            (value, metrics), gradient = jax.value_and_grad(scalar, has_aux=True)(logp)
            expected = case.outputs
            assert_close(value, expected["loss"], tolerance, f"{case.name} loss")
            assert_close(gradient, interleaved(expected["grad_logps"]), tolerance, f"{case.name} gradient")
            summed = p["beta"] * np.abs(np.asarray(logp - ref_logp) * weights).sum(1).mean()
            for ours, theirs in REWARDS.items():
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
    "bco_pair": lambda c, r, b, e: -log_sigmoid(b * c) - log_sigmoid(-b * r),
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


@pytest.mark.parametrize("loss", LOSSES)
def test_equals_a_loop_over_pairs(loss):
    x, knobs = example_pairs(), {"losses": (loss,), "beta": 0.3, "label_smoothing": 0.15}
    with precision("float64"):

        def ours(logp):
            return dpo(logp, jnp.asarray(x["ref_logp"]), jnp.asarray(x["weights"]), DPO(**knobs))[0].value()

        def theirs(logp):
            return by_hand(logp, x["ref_logp"], x["weights"], loss, beta=0.3, label_smoothing=0.15)

        value, gradient = jax.value_and_grad(ours)(jnp.asarray(x["logp"]))
        assert_close(value, theirs(x["logp"]), 1e-12, "value")
        assert_close(gradient, numeric_gradient(theirs, x["logp"]), 1e-7, "gradient")


def test_rewards_by_hand():
    logp = jnp.asarray([[0.0, -1.0, -2.0], [0.0, -3.0, -1.0], [0.0, -5.0, -1.0], [0.0, -1.0, -9.0]])
    ref_logp = jnp.asarray([[0.0, -2.0, -2.5], [0.0, -2.0, -1.0], [0.0, -1.0, -1.0], [0.0, -2.0, -2.0]])
    weights = jnp.asarray([[0.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    metrics = {name: float(mean.value()) for name, mean in dpo(logp, ref_logp, weights, DPO(beta=0.5))[1].items()}
    # log-ratios: chosen 1.5, -4; rejected -1, 1
    assert metrics == {"reward_accuracy": 0.5, "reward_margin": -0.625, "reward_chosen": -0.625, "reward_rejected": 0.0}


def value_and_gradient(x: dict[str, np.ndarray], **knobs):
    rest = {name: jnp.asarray(a) for name, a in x.items() if name != "logp"}
    return jax.value_and_grad(lambda logp: dpo(logp, **rest, o=DPO(**knobs))[0].value())(jnp.asarray(x["logp"]))


def ranked_by_hand(logp, ref_logp, weights, loss, beta) -> float:
    """AOT: both lists sorted, and the k-th of the one held against the k-th of the other."""
    policy, reference = (logp * weights).sum(1), (ref_logp * weights).sum(1)
    if loss == "aot":
        first, second = policy[0::2] - policy[1::2], reference[0::2] - reference[1::2]
    else:
        first, second = (policy - reference)[0::2], (policy - reference)[1::2]
    pairs = zip(sorted(first), sorted(second), strict=True)
    return sum(-log_sigmoid(beta * (a - b)) for a, b in pairs) / len(first)


@pytest.mark.parametrize("loss", WHOLE_BATCH)
def test_ranks_the_pairs_of_a_batch(loss):
    x = example_pairs()
    with precision("float64"):
        value, gradient = value_and_gradient(x, losses=(loss,), beta=0.3)

        def theirs(logp):
            return ranked_by_hand(logp, x["ref_logp"], x["weights"], loss, 0.3)

        assert_close(value, theirs(x["logp"]), 1e-12, "value")
        assert_close(gradient, numeric_gradient(theirs, x["logp"]), 1e-7, "gradient")


# f'(u) of each divergence in u = π / π_ref, up to a constant.
DERIVATIVES = {
    "reverse_kl": lambda u, a: np.log(u),
    "forward_kl": lambda u, a: -1 / u,
    "js_divergence": lambda u, a: np.log(u / (1 + u)),
    "alpha_divergence": lambda u, a: u ** (a - 1) / (a - 1),
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_divergence_changes_the_scores_of_answers(divergence):
    x = example_pairs()
    u = np.exp(((x["logp"] - x["ref_logp"]) * x["weights"]).sum(1))
    scores = DERIVATIVES[divergence](u, 0.3)
    expected = np.mean([-log_sigmoid(0.2 * (c - r)) for c, r in zip(scores[0::2], scores[1::2], strict=True)])
    with precision("float64"):
        value = value_and_gradient(x, beta=0.2, divergence=divergence, alpha=0.3)[0]
        assert_close(value, expected, 1e-12, "value")
    far = x | {"logp": x["logp"] * 200}
    assert np.isfinite(value_and_gradient(far, divergence=divergence)[1]).all()


def test_an_alpha_of_1_is_reverse_kl():
    x = example_pairs()
    plain, same = value_and_gradient(x), value_and_gradient(x, divergence="alpha_divergence", alpha=1.0)
    np.testing.assert_array_equal(plain[1], same[1])


def test_tokens_beyond_the_partner_weigh_less():
    """LD-DPO: what the longer answer has more counts for a part."""
    x = example_pairs()
    lighter = x["weights"].copy()
    for chosen in range(0, 8, 2):
        shared = int(min(x["weights"][chosen].sum(), x["weights"][chosen + 1].sum()))
        for row in (chosen, chosen + 1):
            lighter[row, np.flatnonzero(x["weights"][row])[shared:]] = 0.25
    ratio = ((x["logp"] - x["ref_logp"]) * lighter).sum(1)
    expected = np.mean([-log_sigmoid(0.3 * (c - r)) for c, r in zip(ratio[0::2], ratio[1::2], strict=True)])
    with precision("float64"):
        assert_close(value_and_gradient(x, beta=0.3, ld_alpha=0.25)[0], expected, 1e-12, "value")


def test_pairs_weigh_what_the_policy_makes_of_them():
    """WPO: the weight is a number, through which no gradient flows."""
    x = example_pairs()
    log_sum_sq = -np.random.default_rng(1).exponential(size=(8, 7))
    means = ((x["logp"] - log_sum_sq) * x["weights"]).sum(1) / x["weights"].sum(1)
    of_pair = np.exp(means[0::2] + means[1::2])
    with precision("float64"):
        plain = value_and_gradient(x)[1]
        gradient = value_and_gradient(x | {"log_sum_sq": log_sum_sq})[1]
        assert_close(gradient, plain * np.repeat(of_pair, 2)[:, None], 1e-12, "gradient")


def test_a_mixture_is_a_weighted_sum():
    x = example_pairs()
    parts = {"sigmoid": 0.8, "ipo": 0.3, "aot": 0.2, "sft": 0.5}
    with precision("float64"):
        alone = [value_and_gradient(x, losses=(name,)) for name in parts]
        value, gradient = value_and_gradient(x, losses=tuple(parts), loss_weights=tuple(parts.values()))
        assert_close(value, sum(w * v for w, (v, _) in zip(parts.values(), alone, strict=True)), 1e-12, "value")
        assert_close(gradient, sum(w * g for w, (_, g) in zip(parts.values(), alone, strict=True)), 1e-12, "gradient")


def test_what_is_refused_with_microbatches_is_what_looks_at_the_whole_batch():
    assert set(WHOLE_BATCH) == config.RANKS_BATCH
    x = example_pairs()
    with precision("float64"):
        for name in [*LOSSES, *WHOLE_BATCH]:
            plain, smooth = (value_and_gradient(x, losses=(name,), label_smoothing=e)[0] for e in (0.1, 0.2))
            assert (plain != smooth) == (name in config.READS_LABEL_SMOOTHING), name


@pytest.mark.parametrize("losses", [*((loss,) for loss in LOSSES), ("sigmoid", "sft")])
def test_microbatches_add_up(losses):
    x = example_pairs()
    with precision("float64"):
        scale = likelihood_scale(jnp.asarray(x["weights"]), jnp.asarray(x["weights"]))
        assert_accumulates(
            lambda **arrays: dpo(**arrays, o=DPO(losses, label_smoothing=0.1), sft_scale=scale), x, "logp"
        )


@pytest.mark.parametrize("losses", [("sigmoid",), ("sft",), *((loss,) for loss in WHOLE_BATCH)])
def test_padding_does_not_matter(losses):
    x = example_pairs()
    padded = {name: np.concatenate([a, np.full((2, 7), fill)]) for (name, a), fill in zip(x.items(), (np.nan, 3, 0), strict=True)}  # fmt: skip
    with precision("float64"):
        for name in ("logp", "ref_logp"):
            padded[name][:8][x["weights"] == 0] = -np.inf

        def value(logp, y):
            return dpo(logp, jnp.asarray(y["ref_logp"]), jnp.asarray(y["weights"]), DPO(losses))[0].value()

        clean, gradient = jax.value_and_grad(value)(jnp.asarray(x["logp"]), x)
        with_padding, padded_gradient = jax.value_and_grad(value)(jnp.asarray(padded["logp"]), padded)
    assert float(with_padding) == pytest.approx(float(clean), rel=1e-14)
    np.testing.assert_allclose(padded_gradient[:8], gradient, rtol=1e-12)
    np.testing.assert_array_equal(padded_gradient[8:], 0)
