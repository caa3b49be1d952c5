"""RoPE scaling: frequencies and attention factors are those of transformers."""

import dataclasses

import jax
import numpy as np
import pytest

from lm.config.rope import longest_sequence
from lm.experiment import DynamicRope, LongRope, UserError, YarnRope
from lm.interop.config import read_config
from lm.model.attention import rope_angles, rope_attention_factor, rope_frequencies, rotate
from lm.model.transformer import Transformer
from tests.helpers import tiny_model

CONFIG = {
    "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "head_dim": 16,
    "intermediate_size": 32, "vocab_size": 64, "rope_theta": 10000.0,
}  # fmt: skip
# rope_scaling of config.json, max_position_embeddings, model.max_len; frequencies for head_dim 16 and attention factor,
# computed with transformers 5.24.0 for a sequence of model.max_len tokens
GOLDEN = {
    "linear": (
        {"rope_type": "linear", "factor": 4.0}, 32, 32,
        [0.25, 0.07905694, 0.025, 0.007905695, 0.0025, 0.0007905695, 0.00025, 7.905695e-05], 1,
    ),
    "dynamic NTK, within the original length": (
        {"rope_type": "dynamic", "factor": 4.0}, 32, 32,
        [1, 0.3162278, 0.1, 0.03162278, 0.01, 0.003162278, 0.001, 0.0003162278], 1,
    ),
    "dynamic NTK, beyond the original length": (
        {"type": "dynamic", "factor": 4.0}, 32, 80,
        [1, 0.2394813, 0.05735132, 0.01373457, 0.003289174, 0.0007876958, 0.0001886385, 4.517539e-05], 1,
    ),
    "llama3": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}, 256, 256,
        [1, 0.2443846, 0.01304226, 0.003952847, 0.00125, 0.0003952847, 0.000125, 3.952847e-05], 1,
    ),
    "yarn": (
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256, 256,
        [1, 0.2371708, 0.05, 0.007905695, 0.0025, 0.0007905695, 0.00025, 7.905695e-05], 1.138629,
    ),
    "YaRN, not truncated": (
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "truncate": False, "beta_fast": 16, "beta_slow": 2}, 256, 256,
        [1, 0.120534, 0.0125, 0.003952847, 0.00125, 0.0003952847, 0.000125, 3.952847e-05], 1.207944,
    ),
    "YaRN, attention factor given": (
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.9}, 256, 256,
        [1, 0.2569351, 0.0625, 0.01383497, 0.0025, 0.0007905695, 0.00025, 7.905695e-05], 0.9,
    ),
    "YaRN, mscale": (
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64, "mscale": 0.707, "mscale_all_dim": 1.0}, 256, 256,
        [1, 0.2134537, 0.035, 0.0007905695, 0.00025, 7.905695e-05, 2.5e-05, 7.905694e-06], 0.9210424,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GOLDEN)
def test_frequencies_and_attention_factor(case):
    rope, original, longest, frequencies, factor = GOLDEN[case]
    model, _ = read_config(CONFIG | {"rope_scaling": rope, "max_position_embeddings": original})
    model = dataclasses.replace(model, max_len=longest)
    found = rope_frequencies(model.head_dim, model.rope_theta, model.rope_scaling, model.max_len)
    np.testing.assert_allclose(found, frequencies, rtol=1e-6)
    assert rope_attention_factor(model.rope_scaling) == pytest.approx(factor, rel=1e-6)


def test_dynamic_scaling_gives_a_token_the_same_logits_packed_cached_and_alone():
    """Beyond the original length, too: the frequencies follow from model.max_len and not from the row."""
    model = tiny_model(max_len=48, rope_scaling=DynamicRope(4.0, 16.0))
    ids = jax.random.randint(jax.random.key(1), (1, 40), 0, model.vocab_size)
    places, one = np.arange(40)[None], np.ones((1, 40), np.int32)
    forward, extend = jax.jit(Transformer.__call__), jax.jit(Transformer.extend)
    packed = forward(model, ids, np.where(places < 12, places, places - 12), np.where(places < 12, 1, 2))[:, 12:]
    alone = forward(model, ids[:, 12:], places[:, :28], one[:, :28])
    np.testing.assert_allclose(packed, alone, atol=1e-5)
    cache, whole = model.empty_cache(1, 40), forward(model, ids, places, one)
    for start, end in ((0, 20), (20, 40)):
        hidden, cache = extend(model, cache, start, ids[:, start:end], places[:, start:end], one[:, start:end])
        np.testing.assert_allclose(model.logits(hidden), whole[:, start:end], atol=1e-5)


def test_scaled_models_are_longer_than_the_text_that_they_were_trained_on():
    assert longest_sequence(64, [(), (8.0,), (8.0, 1.0, 4.0, 64.0)]) == 64
    assert longest_sequence(64, [DynamicRope(4.0, 64.0)]) == 256
    assert longest_sequence(128, [YarnRope(4.0, 64.0), ()]) == 256
    assert longest_sequence(64, [LongRope(32.0, 4096.0, 1.2, (1.0,), (2.0,)).numbers]) == 131072


PHI3 = CONFIG | {
    "model_type": "phi3", "partial_rotary_factor": 0.75, "max_position_embeddings": 256, "original_max_position_embeddings": 64,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.5, 2.0, 3.0], "long_factor": [1.0, 2.0, 4.0, 8.0, 9.0, 11.0]},
}  # fmt: skip


@pytest.mark.parametrize("longest", [64, 256])
def test_longrope_divides_each_frequency_of_the_rotated_part_by_its_own_factor(longest):
    """By the equations in float64: 12 of 16 dimensions, the long factors beyond the original length, larger scores in both cases."""
    model, _ = read_config(PHI3)
    assert model.rope_dim == 12 and model.max_len == 64
    model = dataclasses.replace(model, max_len=longest)
    scaling = PHI3["rope_scaling"]
    divisors = np.array(scaling["long_factor" if longest > 64 else "short_factor"], np.float64)
    frequencies = 1 / (divisors * 10_000.0 ** (np.arange(0, 12, 2) / 12))
    found = rope_frequencies(model.rotated, model.rope_theta, model.rope_scaling, model.max_len)
    np.testing.assert_allclose(found, frequencies, rtol=1e-6)
    factor = rope_attention_factor(model.rope_scaling)
    assert factor == pytest.approx(np.sqrt(1 + np.log(256 / 64) / np.log(64)), rel=1e-12)
    x, places = np.random.default_rng(0).standard_normal((1, 2, 9, 16)), np.arange(20, 29)
    turned = factor * np.exp(1j * places[:, None] * frequencies) * (x[..., :6] + 1j * x[..., 6:12])
    expected = np.concatenate([turned.real, turned.imag, x[..., 12:]], -1)
    ours = rotate(x.astype(np.float32), rope_angles(places[None], found, factor))
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_a_longrope_config_is_that_of_its_original_length_and_may_be_lengthened():
    """Its former names (Phi 3 said yarn too) and a value of attention_factor are read; a wrong count of factors names both."""
    model, _ = read_config(PHI3 | {"rope_scaling": PHI3["rope_scaling"] | {"type": "su", "attention_factor": 1.5}})
    assert rope_attention_factor(model.rope_scaling) == 1.5
    assert read_config(PHI3 | {"rope_scaling": PHI3["rope_scaling"] | {"type": "yarn"}}) == read_config(PHI3)
    assert longest_sequence(model.max_len, [model.rope_scaling]) == 256
    with pytest.raises(UserError, match="it should have 8 short and 8 long factors, found 6 and 6"):
        read_config(PHI3 | {"partial_rotary_factor": 1.0})
