"""Sampler and trainer: what rounding makes them differ by passes at any temperature, a sampler of another policy does not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm.data.packing import left_pad
from lm.rollout.sampler_gap import (
    GapBound,
    agreement,
    is_suspicious,
    precision,
    sampler_gap,
    trainer_view,
)
from tests.helpers import VOCAB, tiny_model
from tests.rollout.rows import as_batch, generate

SEEDS = 20
TEMPERATURES = (0.1, 0.5, 1.0)
WIDTH, NEW = 12, 16
DTYPES = (pytest.param("float32", marks=pytest.mark.slow), "bfloat16")


@functools.cache
def model_of(seed, dtype):
    """A model that is surer of its tokens than a random one, but not sure."""
    model = tiny_model(seed, compute_dtype=dtype)
    model.norm.scale = jax.tree.map(lambda x: 2 * x, model.norm.scale)
    return model


def rollout(model, temperature, seed):
    rng = np.random.default_rng(seed)
    tokens, lengths = left_pad(
        [rng.integers(2, VOCAB, rng.integers(1, WIDTH + 1)).tolist() for _ in range(16)], WIDTH, 0
    )
    out = generate(
        model, tokens, lengths, jax.random.key(seed), temperature, max_new_tokens=NEW, end_ids=(1,), pad_id=0
    )
    return jax.tree.map(jnp.asarray, as_batch(tokens, lengths, jax.device_get(out), np.ones(16)))


def compared(model, batch, temperature):
    views = [trainer_view(model, batch, temperature)]
    gap = sampler_gap(views, [batch], precision(model.config))
    return gap, agreement(model, views, [batch], gap, temperature)


def with_layer(model, change):
    """The model with the matrices of its first layer changed; `change` gets all layers of one."""

    def changed(param):
        norm = "norm" in param.get_metadata("out_sharding")
        return param if norm else jax.tree.map(lambda x: x.at[0].set(change(x)), param)

    wrong = jax.tree.map(lambda x: x, model)
    wrong.blocks = jax.tree.map(changed, model.blocks, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return wrong


def cast_layer(model, temperature, seed):
    """A sampler whose first layer is rounded: to bfloat16 in float32, to float8 in bfloat16."""
    to = jnp.bfloat16 if model.config.compute_dtype == "float32" else jnp.float8_e4m3fn
    return rollout(with_layer(model, lambda x: x[0].astype(to).astype(x.dtype)), temperature, seed)


def other_layer(model, temperature, seed):
    return rollout(with_layer(model, lambda x: x[1]), temperature, seed)


def shifted_position(model, temperature, seed):
    """A sampler that gives every new token the position after its own."""
    batch = rollout(model, temperature, seed)
    new = jnp.arange(WIDTH + NEW) >= WIDTH
    said = trainer_view(model, dataclasses.replace(batch, positions=batch.positions + new), temperature)
    return dataclasses.replace(batch, sampler_logp=said.logp)


def neighbours(model, temperature, seed):
    """Log-probabilities that stand a token too late."""
    batch = rollout(model, temperature, seed)
    return dataclasses.replace(batch, sampler_logp=jnp.roll(batch.sampler_logp, 1, axis=1) * batch.weights)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_right_sampler_passes(dtype, temperature):
    for seed in range(SEEDS):
        model = model_of(seed % 4, dtype)
        gap, found = compared(model, rollout(model, temperature, seed), temperature)
        assert found.holds, (seed, gap, found)
        assert not is_suspicious(gap, found)
        assert 0 <= gap.mean <= gap.p99 <= gap.largest < np.inf


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", [cast_layer, other_layer, shifted_position, neighbours])
def test_a_sampler_of_another_policy_is_found(dtype, wrong):
    for seed in range(SEEDS):
        model, temperature = model_of(seed % 4, dtype), TEMPERATURES[seed % 3]
        gap, found = compared(model, wrong(model, temperature, seed), temperature)
        assert not found.holds, (seed, temperature, gap, found)
        right = compared(model, rollout(model, temperature, seed), temperature)[1]
        assert is_suspicious(gap, right)  # so that it is found later in a stage too


def test_what_is_reported_is_of_the_sampled_tokens_alone():
    model = model_of(0, "float32")
    batch = rollout(model, 1.0, 0)
    off = jnp.asarray(np.random.default_rng(0).random(batch.weights.shape), jnp.float32)
    said = trainer_view(model, batch, 1.0).logp + off
    batch = dataclasses.replace(batch, sampler_logp=jnp.where(batch.weights > 0, said, 99.0))
    gap = compared(model, batch, 1.0)[0]
    gaps = np.sort(np.asarray(off)[np.asarray(batch.weights) > 0])
    assert gap.mean == pytest.approx(gaps.mean(), abs=1e-5)
    assert gap.p99 == pytest.approx(gaps[int(np.ceil(0.99 * len(gaps))) - 1], abs=1e-5)
    assert gap.largest == pytest.approx(gaps[-1], abs=1e-5)


def test_pieces_and_several_batches_give_the_same():
    model = model_of(0, "bfloat16")
    batch = rollout(model, 0.5, 0)
    halves = [jax.tree.map(lambda x, i=i: x[i::2], batch) for i in range(2)]
    whole, pieces = trainer_view(model, batch, 0.5), trainer_view(model, batch, 0.5, 4)
    np.testing.assert_allclose(pieces.logp, whole.logp, atol=1e-2)
    parts = [trainer_view(model, half, 0.5) for half in halves]
    one, two = (sampler_gap(views, batches, "bfloat16") for views, batches in (([whole], [batch]), (parts, halves)))
    assert two.mean == pytest.approx(one.mean, rel=0.05) and two.largest == pytest.approx(one.largest, rel=0.05)


def test_a_gap_that_is_no_number_is_found():
    model = model_of(0, "bfloat16")
    batch = rollout(model, 1.0, 0)
    batch = dataclasses.replace(batch, sampler_logp=batch.sampler_logp.at[0, WIDTH].set(jnp.nan))
    gap, found = compared(model, batch, 1.0)
    assert not found.holds and is_suspicious(gap, GapBound(0.1, 1e9))
