"""A prompt computed once for its group gives the log-probabilities and gradients of a prompt computed in every row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.experiment import Model
from lm.model.shared_prompt import usable
from lm.objectives.logprobs import token_logprobs
from lm.parallel.mesh import make_mesh
from lm.types import NOTHING_SHARED, SharedPrompt
from tests.helpers import grouped_batch, layout, tiny_model

MODELS = {
    "blocks": {},
    "plain": {"attention": "plain"},
    "window_and_softcap": {"window": 3, "softcap": 5.0},
    "qk_norm_off_untied": {"qk_norm": False, "tied_head": False},
}


def with_dtype(model, dtype: str):
    """The model with all that it has and computes in a dtype."""
    model = jax.tree.map(lambda x: x.astype(dtype), model)
    model.config = dataclasses.replace(model.config, param_dtype=dtype, compute_dtype=dtype, logits_dtype=dtype)
    return model


def measured(model, batch, **options):
    """Log-probabilities and entropies of the answers, and the gradient of a function of both."""

    def loss(model):
        stats = token_logprobs(model, batch, 0.7, want_entropy=True, **options)
        logp, entropy = (jnp.where(batch.weights > 0, x, 0.0) for x in (stats.logp, stats.entropy))
        return jnp.sum(logp * jnp.cos(entropy)), (logp, entropy)

    gradient, found = jax.jit(jax.grad(loss, has_aux=True))(model)
    return found, jax.tree.leaves(gradient)


def both_ways(model, batch, **options):
    return measured(model, batch, **options), measured(
        model, dataclasses.replace(batch, shared=NOTHING_SHARED), **options
    )


@pytest.mark.parametrize(
    "name", ["blocks", *(pytest.param(n, marks=pytest.mark.slow) for n in MODELS if n != "blocks")]
)
@pytest.mark.parametrize(
    ("dtype", "close"), [pytest.param("float32", 2e-6, marks=pytest.mark.slow), ("float64", 1e-12)]
)
def test_same_logprobs_and_gradients(name, dtype, close):
    with jax.enable_x64(dtype == "float64"):
        model = with_dtype(tiny_model(**MODELS[name]), dtype)
        (once, gradient), (often, wanted) = both_ways(model, grouped_batch())
        for got, want in zip(once, often, strict=True):
            np.testing.assert_allclose(got, want, atol=close)
        for got, want in zip(gradient, wanted, strict=True):
            # Angles, and the gradients of what they turn, are float32 at any dtype. Where the sums are too, processors
            # add in orders of their own.
            close = 2e-6 if dtype == "float64" else 32 * np.finfo(np.float32).eps
            np.testing.assert_allclose(got, want, rtol=0, atol=close * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [{"prompts": 1}, {"before": 1}, {"after": 1}, {"after": 140, "prompts": 2, "group": 2}]
)
def test_any_shape(shape):
    model = tiny_model(max_len=256)
    ((once, _), gradient), ((often, _), wanted) = both_ways(model, grouped_batch(**shape))
    np.testing.assert_allclose(once, often, atol=5e-6)
    for got, want in zip(gradient, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=5e-6 * np.abs(want).max())


def test_the_vocabulary_in_chunks_is_the_same():
    model, batch = tiny_model(), grouped_batch()
    whole, pieces = measured(model, batch), measured(model, batch, max_logits=2_500)
    for got, want in zip(jax.tree.leaves(pieces), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6 * max(1, np.abs(want).max()))


@pytest.mark.slow
def test_bfloat16_is_as_near_to_float32_as_row_by_row():
    batch = grouped_batch()
    exact = measured(tiny_model(), batch)[0][0]
    (once, _), (often, _) = both_ways(tiny_model(compute_dtype="bfloat16"), batch)
    error = np.abs(often[0] - exact).max()
    assert 0 < error < 0.1
    assert np.abs(once[0] - exact).max() < 1.5 * error


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [({}, 4), ({"data": 4}, 4), ({"data": 2, "tensor": 2}, 4), ({"data": 8}, 2), ({"context": 2}, None)],
)
def test_used_for_the_rows_of_a_device(sizes, rows):
    with jax.set_mesh(make_mesh(layout(**sizes))):
        shared = usable(grouped_batch(), Model())
    assert (shared and shared.rows) == rows


def test_a_part_of_a_batch_has_parts_of_groups():
    batch = grouped_batch(prompts=3, group=8)
    for rows, group in ((12, 4), (8, 8), (6, 2), (3, None)):
        shared = usable(jax.tree.map(lambda x, rows=rows: x[:rows], batch), Model())
        assert shared == (group and SharedPrompt(group, 7))


def test_not_used_beside_the_kernel_that_takes_whole_rows():
    assert usable(grouped_batch(), Model(attention="splash")) is None
