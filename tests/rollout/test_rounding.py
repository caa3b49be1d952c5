"""A rounded model is the model but for what the bits cannot hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm.rollout.rounding import ROUNDINGS, rounded, to_integers
from tests.helpers import tiny_model


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_within_half_a_step_of_each_row(bits):
    weights = jnp.asarray(np.random.default_rng(0).standard_normal((5, 64)), jnp.float32).at[2].set(0)
    found = to_integers(weights, bits)
    step = jnp.abs(weights).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
    assert jnp.all(jnp.abs(found - weights) <= step / 2 + 1e-6)
    assert jnp.all(found[2] == 0)
    assert len(np.unique(np.round(np.asarray(found[0] / step[0])))) <= 2**bits - 1
    np.testing.assert_allclose(to_integers(found, bits), found, rtol=1e-6)


@pytest.mark.parametrize("precision", ROUNDINGS)
def test_matrices_are_rounded_and_norms_stay(precision):
    model = tiny_model()
    changed = {"norm": 0, "matrix": 0}
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    for old, new in zip(
        jax.tree.leaves(model, is_leaf=is_variable),
        jax.tree.leaves(rounded(model, precision), is_leaf=is_variable),
        strict=True,
    ):
        kind = "norm" if "norm" in old.get_metadata("out_sharding") else "matrix"
        changed[kind] += bool(jnp.any(old[...] != new[...]))
        assert old.dtype == new.dtype
    assert changed["norm"] == 0 and changed["matrix"] > 3


def test_fewer_bits_are_further_away():
    model = tiny_model()
    tokens = jnp.arange(16)[None] % 7
    ones = jnp.ones_like(tokens)

    def logits(of):
        return of.logits(of.hidden(tokens, jnp.arange(16)[None], ones)[0])

    gaps = [float(jnp.abs(logits(rounded(model, name)) - logits(model)).max()) for name in ("int8", "int4")]
    assert 0 < 4 * gaps[0] < gaps[1]
