"""Parts of the decoder: patterns of layers, where norms stand, biases, plain MLPs, causality, and what layers report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.experiment import Layer
from lm.model.flops import layer_matrices
from lm.model.mlp import MLP
from lm.model.transformer import num_params
from lm.train.named_arrays import named_leaves
from lm.types import Mean
from tests.helpers import VOCAB, tiny_model

PATTERN = (Layer(window=4, softcap=5.0), Layer(softcap=5.0, rope_theta=1e6, rope_scaling=(8.0,)))
VARIANTS = {
    "pattern with a layer left over": {"num_layers": 5, "pattern": PATTERN},
    "sandwich": {"norms": "sandwich", "norm_plus_one": True, "embed_scale": 4.0, "final_softcap": 3.0},
    "post": {"norms": "post", "qk_norm_of": "heads"},
    "biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "qk_norm": False},
    "plain": {"gated_mlp": False, "activation": "relu2", "mlp_bias": True, "query_pre_attn_scalar": 24.0},
}
IDS = jax.random.randint(jax.random.key(1), (2, 14), 0, VOCAB)
POSITIONS, SEGMENTS = jnp.broadcast_to(jnp.arange(14), IDS.shape), jnp.ones_like(IDS)


def moved(model):
    """The model with every parameter off its first value: zeros and ones hide what is not applied."""
    leaves, structure = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return jax.tree.unflatten(
        structure, [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


@pytest.mark.parametrize(
    "changes",
    [pytest.param(v, id=name, marks=[pytest.mark.slow] * ("pattern" in v)) for name, v in VARIANTS.items()],
)
def test_the_cache_gives_what_training_computes_and_sizes_are_counted(changes):
    model = moved(tiny_model(**changes))
    c = model.config
    whole, aux = jax.jit(model.hidden)(IDS, POSITIONS, SEGMENTS)
    cache, found, extend = model.empty_cache(2, 14), [], jax.jit(model.extend)
    for part in (slice(0, 9), slice(9, 10), slice(10, 14)):
        states, cache = extend(cache, jnp.int32(part.start), IDS[:, part], POSITIONS[:, part], SEGMENTS[:, part])
        found.append(states)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), whole, atol=1e-4)
    assert aux == {}
    vectors = [x for path, x in named_leaves(model).items() if "weight" not in path.split("/")]
    tables = VOCAB * c.embed_dim * (1 if c.tied_head else 2)
    assert num_params(model) == c.num_layers * layer_matrices(c) + tables + sum(x.size for x in vectors)


@pytest.mark.slow
def test_layers_that_are_alike_are_the_same_with_and_without_a_pattern():
    alike = Layer(window=4, softcap=5.0)
    one, two = tiny_model(window=4, softcap=5.0), tiny_model(pattern=(alike, alike))
    np.testing.assert_allclose(one(IDS, POSITIONS, SEGMENTS), two(IDS, POSITIONS, SEGMENTS), atol=1e-5)


def test_a_token_sees_those_after_it_only_where_attention_is_not_causal():
    model = tiny_model()
    other = IDS.at[:, -1].add(1) % VOCAB
    for causal in (True, False):
        states, changed = (model.hidden(x, POSITIONS, SEGMENTS, causal=causal)[0][:, 0] for x in (IDS, other))
        assert bool(jnp.all(states == changed)) == causal


@pytest.mark.slow
def test_what_layers_report_is_added_up(monkeypatch):
    plain = MLP.__call__

    def reporting(self, x, segments):
        return plain(self, x, segments)[0], {"tokens": Mean(jnp.float32(3.0), jnp.float32(2.0))}

    monkeypatch.setattr(MLP, "__call__", reporting)
    for changes in ({"num_layers": 3}, VARIANTS["pattern with a layer left over"]):
        model = tiny_model(**changes)
        _, aux = model.hidden(IDS, POSITIONS, SEGMENTS)
        layers = model.config.num_layers
        assert (aux["tokens"].total, aux["tokens"].weight) == (3 * layers, 2 * layers)
