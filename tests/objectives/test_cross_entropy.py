"""lm/objectives/cross_entropy.py: golden numbers, an independent version, accumulation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_checks import (
    DTYPES,
    assert_accumulates,
    assert_close,
    golden_cases,
    numeric_gradient,
    precision,
    shifted_logprobs,
)

from lm.experiment import SFT
from lm.objectives.cross_entropy import LOSSES, cross_entropy


def loss(logits, tokens, weights, **knobs):
    stats = shifted_logprobs(logits, tokens, want_mean_logp=True)
    return cross_entropy(stats, weights, SFT(**knobs))


def trained_on(labels: np.ndarray, ignored: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    """(tokens, weights) of labels in which `ignored` marks what is not trained on."""
    weights = (labels != ignored).astype(dtype)
    weights[:, 0] = 0
    return jnp.asarray(np.where(labels == ignored, 0, labels)), jnp.asarray(weights)


def rounding(reference: np.ndarray, tolerance: float) -> float:
    """The reference takes some gradients in float32, whatever its inputs: no number is then exact beyond 1e-7."""
    rounded = (reference == reference.astype(np.float32)).all()
    return max(tolerance, 5e-7) if rounded else tolerance


def check_golden(case, tokens, weights, number, tolerance, **knobs):
    """Loss and gradient of a golden case that divides by `number` (None: by the tokens trained on)."""

    def scalar(logits):
        mean, metrics = loss(logits, tokens, weights, **knobs)
        return mean.value() if number is None else mean.total / number, metrics

    (value, metrics), gradient = jax.value_and_grad(scalar, has_aux=True)(jnp.asarray(case.inputs["logits"]))
    assert_close(value, case.outputs["loss"], tolerance, f"{case.name} loss")
    expected = case.outputs["grad_logits"]
    assert_close(gradient, expected, rounding(expected, tolerance), f"{case.name} gradient")
    return metrics


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_causal_lm(golden, dtype):
    for case in golden_cases(golden, "causal_lm_ce", dtype):
        p, labels = case.params, case.inputs["labels"]
        ignored = p.get("ignore_index", -100)
        tokens, weights = trained_on(np.where(labels == -100, ignored, labels), ignored, dtype)
        knobs = {"label_smoothing": p.get("epsilon", 0.0), "z_loss": p.get("z_loss_coef", 0.0)}
        with precision(dtype) as tolerance:
            check_golden(case, tokens, weights, p.get("num_items_in_batch"), tolerance, **knobs)
            if "token_nll" in case.outputs:
                stats = shifted_logprobs(jnp.asarray(case.inputs["logits"]), tokens)
                for ours, theirs in ((-stats.logp, "token_nll"), (stats.lse, "token_lse")):
                    valid = case.outputs["valid"][:, :-1]
                    assert_close(ours[:, 1:] * valid, case.outputs[theirs][:, :-1] * valid, tolerance, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_sft(golden, dtype):
    for case in golden_cases(golden, "sft", dtype):
        tokens, weights = trained_on(case.inputs["labels"], -100, dtype)
        weights = jnp.zeros_like(weights) if case.name == "all_masked" else weights
        with precision(dtype) as tolerance:
            p = case.params
            metrics = check_golden(case, tokens, weights, p["num_items_in_batch"], tolerance, loss=p["loss_type"])
            accuracy, entropy = metrics["token_accuracy"].value(), metrics["entropy"].value()
            assert_close(accuracy, case.outputs["mean_token_accuracy"], tolerance, f"{case.name} accuracy")
            assert_close(entropy, case.outputs["entropy"], tolerance, f"{case.name} entropy")


def example() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    weights = (rng.random((4, 6)) < 0.6) * rng.random((4, 6))
    weights[:, 0] = 0
    return {"logits": 2 * rng.normal(size=(4, 6, 7)), "tokens": rng.integers(0, 7, (4, 6)), "weights": weights}


def by_hand(logits, tokens, weights, kind, z_loss, label_smoothing, likelihoods) -> float:
    """The loss as a loop over tokens. `likelihoods` are those that dft holds fixed."""
    total = 0.0
    for b, t in np.ndindex(*tokens.shape):
        if t > 0:
            lse = np.log(np.exp(logits[b, t - 1]).sum())
            logp = logits[b, t - 1] - lse
            target = logp[tokens[b, t]] * (likelihoods[b, t] if kind == "dft" else 1.0)
            smooth = (1 - label_smoothing) * target + label_smoothing * logp.mean()
            total += weights[b, t] * (z_loss * lse**2 - smooth)
    return total / weights.sum()


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(("z_loss", "label_smoothing"), [(0.0, 0.0), (0.03, 0.0), (0.01, 0.2)])
def test_equals_a_loop_over_tokens(kind, z_loss, label_smoothing):
    x = example()
    with precision("float64"):
        likelihoods = np.exp(shifted_logprobs(jnp.asarray(x["logits"]), jnp.asarray(x["tokens"])).logp)

        def ours(logits):
            return loss(logits, x["tokens"], x["weights"], loss=kind, z_loss=z_loss, label_smoothing=label_smoothing)[
                0
            ].value()

        def theirs(logits):
            return by_hand(logits, x["tokens"], x["weights"], kind, z_loss, label_smoothing, likelihoods)

        value, gradient = jax.value_and_grad(ours)(jnp.asarray(x["logits"]))
        assert_close(value, theirs(x["logits"]), 1e-12, "value")
        assert_close(gradient, numeric_gradient(theirs, x["logits"]), 1e-8, "gradient")


@pytest.mark.parametrize("kind", LOSSES)
def test_microbatches_add_up(kind):
    with precision("float64"):
        assert_accumulates(lambda **arrays: loss(**arrays, loss=kind, z_loss=0.1), example(), "logits")


def test_what_has_no_weight_does_not_matter():
    x = example()
    spoilt = x["logits"].copy()
    spoilt[:, :-1][x["weights"][:, 1:] == 0] = np.nan
    with precision("float64"):
        clean, broken = (loss(jnp.asarray(y), x["tokens"], x["weights"])[0] for y in (x["logits"], spoilt))
    assert float(broken.total) == float(clean.total)


def test_nothing_to_train_on_is_zero_and_not_nan():
    x = example()
    mean, metrics = loss(jnp.asarray(x["logits"]), jnp.asarray(x["tokens"]), jnp.zeros(x["weights"].shape))
    assert float(mean.value()) == 0 and float(metrics["token_accuracy"].value()) == 0
