"""lm/objectives/distill.py: golden values and gradients of GKD, a loop over the vocabulary, chunks, and whose gradient it is."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_checks import DTYPES, GivenLogits, assert_close, golden_cases, numeric_gradient, precision

from lm.experiment import Distill
from lm.objectives.cross_entropy import weighted
from lm.objectives.distill import generalised_jsd, token_divergence
from lm.types import DistillBatch, TokenBatch
from tests.helpers import random_batch, tiny_model


def distill_batch(rows: int, length: int, vocab: int, weights: np.ndarray | None = None) -> DistillBatch:
    """A batch whose teacher reads other tokens than the student."""
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, vocab, (rows, length)), jnp.int32)
    ones = jnp.ones_like(tokens)
    weights = ones.astype(float) if weights is None else jnp.asarray(weights)
    plain = TokenBatch(tokens, weights, ones, jnp.arange(length) * ones)
    other = dataclasses.replace(plain, tokens=tokens[::-1])
    return DistillBatch(**vars(plain), advantages=weights, old_logp=weights, sampler_logp=weights, teacher=other)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_golden(golden, dtype):
    """Theirs are aligned with the logits; ours predict the next token, so a column is put before them."""
    for case in golden_cases(golden, "distill_gkd", dtype):
        x, p = case.inputs, case.params
        o = Distill(beta=p["beta"], divergence_temperature=p["temperature"])
        with precision(dtype) as tolerance:
            mask = jnp.asarray(np.pad(x["labels"] != -100, ((0, 0), (1, 0))), dtype)
            rows, length = mask.shape
            batch = distill_batch(rows, length, x["student_logits"].shape[-1])
            teacher = jnp.pad(jnp.asarray(x["teacher_logits"]), ((0, 0), (0, 1), (0, 0)))

            def loss(logits, batch=batch, teacher=teacher, mask=mask, o=o):
                student = GivenLogits(jnp.pad(logits, ((0, 0), (0, 1), (0, 0))))
                stats = token_divergence(student, GivenLogits(teacher), batch, o)
                return weighted(stats.divergence, mask).value()

            value, gradient = jax.value_and_grad(loss)(jnp.asarray(x["student_logits"]))
            assert_close(value, case.outputs["loss"], tolerance, f"{case.name} loss")
            assert_close(gradient, case.outputs["grad_logits"], 10 * tolerance, f"{case.name} gradient")


def by_hand(student: np.ndarray, teacher: np.ndarray, beta: float) -> float:
    """The divergence of two vectors of logits, in a loop over the vocabulary."""
    p, q = (np.exp(x) / np.exp(x).sum() for x in (teacher, student))
    if beta == 0:
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    if beta == 1:
        return sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    total = 0.0
    for a, b in zip(p, q, strict=True):
        mixed = beta * a + (1 - beta) * b
        total += beta * a * math.log(a / mixed) + (1 - beta) * b * math.log(b / mixed)
    return total


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 1.0])
def test_equals_a_loop_over_the_vocabulary(beta):
    student, teacher = np.random.default_rng(1).normal(size=(2, 7))
    o = Distill(beta=beta)
    with precision("float64"):

        def ours(logits):
            return generalised_jsd(jax.nn.log_softmax(logits), jax.nn.log_softmax(jnp.asarray(teacher)), o)

        value, gradient = jax.value_and_grad(ours)(jnp.asarray(student))
        assert_close(value, by_hand(student, teacher, beta), 1e-12, "value")
        theirs = numeric_gradient(lambda x: by_hand(x, teacher, beta), student)
        assert_close(gradient, theirs, 1e-8, "gradient")


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_teacher_that_is_the_student_has_divergence_0_and_certain_models_are_finite(beta):
    logits = jnp.asarray([[[0.0, 1e4, -1e4], [1e4, 0.0, 0.0]]])
    o = Distill(beta=beta)
    same = jax.nn.log_softmax(logits)
    other = jax.nn.log_softmax(logits[:, ::-1])
    assert float(jnp.abs(generalised_jsd(same, same, o)).max()) == 0
    value, gradient = jax.value_and_grad(lambda x: generalised_jsd(jax.nn.log_softmax(x), other, o).sum())(logits)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.slow
def test_chunks_of_the_vocabulary_give_the_same_divergence_and_gradient():
    batch = random_batch(rows=4)
    batch = DistillBatch(**{f.name: getattr(batch, f.name) for f in dataclasses.fields(DistillBatch)})
    o, student, teacher = Distill(beta=0.3), tiny_model(), tiny_model(seed=1)

    def loss(model, most):
        model = jax.tree.map(lambda x: x, model)
        model.config = dataclasses.replace(model.config, max_logits=most)
        stats = token_divergence(model, teacher, batch, o)
        return weighted(stats.divergence, batch.weights).value(), (stats.entropy, stats.teacher_entropy, stats.agrees)

    found = [jax.value_and_grad(loss, has_aux=True)(student, most) for most in (2**30, 4 * 64 * 4 * 3)]
    close = [np.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*map(jax.tree.leaves, found), strict=True)]
    assert len(close) > 5 and all(close)
    chunked = str(jax.make_jaxpr(lambda model: loss(model, 4 * 64 * 4 * 3)[0])(student))
    assert "checkpoint" in chunked or "remat" in chunked


def test_the_teacher_has_no_gradient():
    batch, o = distill_batch(2, 5, 11), Distill(beta=0.5)
    student, teacher = (jnp.asarray(np.random.default_rng(n).normal(size=(2, 5, 11))) for n in (0, 1))

    def loss(student, teacher):
        return token_divergence(GivenLogits(student), GivenLogits(teacher), batch, o).divergence.sum()

    ours, theirs = jax.grad(loss, (0, 1))(student, teacher)
    assert float(jnp.abs(ours).max()) > 0
    np.testing.assert_array_equal(theirs, 0)


def test_rows_that_only_one_embedding_has_are_left_out():
    batch, o = distill_batch(2, 5, 11), Distill(beta=0.5)
    student, teacher = (jnp.asarray(np.random.default_rng(n).normal(size=(2, 5, 11))) for n in (0, 1))
    wider = jnp.pad(teacher, ((0, 0), (0, 0), (0, 3)), constant_values=50.0)
    found = [token_divergence(GivenLogits(student), GivenLogits(x), batch, o).divergence for x in (teacher, wider)]
    np.testing.assert_allclose(*found, rtol=1e-6)
