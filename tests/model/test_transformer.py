"""Packing, caching, padding and precision leave the model's answers as they are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.model.attention import rope_frequencies
from lm.model.norm import rms_norm
from lm.model.transformer import num_params
from tests.helpers import TINY, VOCAB, tiny_model


def tokens(rows=3, length=24, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (rows, length)), jnp.int32)


def plain(ids):
    rows, length = ids.shape
    return jnp.broadcast_to(jnp.arange(length), (rows, length)), jnp.ones_like(ids)


@pytest.mark.slow
def test_a_packed_segment_gets_the_logits_that_it_gets_alone():
    model, ids = tiny_model(), tokens()
    cuts = [0, 5, 14, 24]
    positions = jnp.concatenate([jnp.arange(b - a) for a, b in itertools.pairwise(cuts)])
    segments = jnp.repeat(jnp.arange(1, 4), jnp.diff(jnp.array(cuts)), total_repeat_length=24)
    packed = model(ids, jnp.broadcast_to(positions, ids.shape), jnp.broadcast_to(segments, ids.shape))
    for a, b in itertools.pairwise(cuts):
        alone = model(ids[:, a:b], *plain(ids[:, a:b]))
        np.testing.assert_allclose(packed[:, a:b], alone, atol=2e-6)


def test_the_future_is_not_seen():
    model, ids = tiny_model(), tokens()
    changed = ids.at[:, 12:].set((ids[:, 12:] + 1) % VOCAB)
    before, after = model(ids, *plain(ids)), model(changed, *plain(changed))
    np.testing.assert_array_equal(before[:, :12], after[:, :12])
    assert not np.allclose(before[:, 12:], after[:, 12:])


@pytest.mark.parametrize(
    "pieces",
    [pytest.param([24], marks=pytest.mark.slow), [10, 14], pytest.param([7] + [1] * 17, marks=pytest.mark.slow)],
)
def test_the_cache_gives_the_same_hidden_states(pieces):
    model, ids = tiny_model(), tokens()
    positions, segments = plain(ids)
    cache, start, found, extend = model.empty_cache(3, 30), 0, [], jax.jit(model.extend)
    for size in pieces:
        part = slice(start, start + size)
        hidden, cache = extend(cache, jnp.int32(start), ids[:, part], positions[:, part], segments[:, part])
        found.append(hidden)
        start += size
    whole, _ = model.hidden(ids, positions, segments)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), whole, atol=2e-5)


def test_rope_sees_differences_of_positions_only():
    model, ids = tiny_model(), tokens()
    positions, segments = plain(ids)
    np.testing.assert_allclose(model(ids, positions, segments), model(ids, positions + 17, segments), atol=2e-5)


def test_first_layers_are_the_model_whose_others_add_nothing():
    model, ids = tiny_model(), tokens()
    for part in (model.blocks.attention.o, model.blocks.mlp.down):
        part.weight[...] = part.weight[...].at[1:].set(0)
    few = model.first_layers(1)
    assert few.config.num_layers == 1 and model.config.num_layers == 2
    np.testing.assert_array_equal(few.hidden(ids, *plain(ids))[0], model.hidden(ids, *plain(ids))[0])


def test_llama3_scaling_slows_long_waves_only():
    plain_waves = rope_frequencies(64, 10_000.0)
    scaled = rope_frequencies(64, 10_000.0, (8.0, 1.0, 4.0, 64.0))
    np.testing.assert_array_equal(plain_waves[:4], scaled[:4])
    np.testing.assert_allclose(plain_waves[-4:] / 8, scaled[-4:], rtol=1e-6)


def test_norms_and_logits_are_float32_in_bfloat16():
    model, ids = tiny_model(compute_dtype="bfloat16"), tokens()
    logits = model(ids, *plain(ids))
    assert logits.dtype == jnp.float32
    wide = tiny_model()(ids, *plain(ids))
    assert np.abs(logits - wide).max() < 0.05 * np.abs(wide).max()
    x = jnp.full((4, 4096), 300.0, jnp.bfloat16)  # whose squares overflow nothing, but sum badly in bfloat16
    np.testing.assert_array_equal(rms_norm(x, jnp.ones(4096), 0.0), jnp.ones((4, 4096), jnp.bfloat16))


def test_the_number_of_parameters_is_what_the_shapes_say():
    c = TINY
    attention = c.embed_dim * c.head_dim * 2 * (c.num_heads + c.num_kv_heads) + 2 * c.head_dim
    block = attention + 3 * c.embed_dim * c.mlp_dim + 2 * c.embed_dim
    assert num_params(tiny_model()) == VOCAB * c.embed_dim + c.num_layers * block + c.embed_dim
    untied = VOCAB * c.embed_dim
    assert num_params(tiny_model(tied_head=False)) == num_params(tiny_model()) + untied
    assert num_params(jax.eval_shape(tiny_model)) == num_params(tiny_model())


@pytest.mark.slow
def test_with_a_window_a_token_sees_its_neighbours_only_and_sampling_agrees():
    """One layer: what is further back changes nothing; and the cache's slots are masked as training's are."""
    model = tiny_model(num_layers=1, window=3, softcap=5.0)
    tokens = jax.random.randint(jax.random.key(0), (1, 12), 0, VOCAB)
    positions, segments = jnp.arange(12)[None], jnp.ones((1, 12), jnp.int32)
    logits = model(tokens, positions, segments)
    far = model(tokens.at[0, 5].add(1), positions, segments) - logits
    assert jnp.abs(far[0, 5:8]).max(-1).min() > 0 and not jnp.abs(far[0, 8:]).any()
    hidden, _ = model.extend(model.empty_cache(1, 12), jnp.int32(0), tokens, positions, segments)
    np.testing.assert_allclose(model.logits(hidden), logits, atol=1e-5)
