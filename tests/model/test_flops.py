"""lm/model/flops.py against what the compiler counts, and its table of chips."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lm.experiment import Model
from lm.model.attention import attention_mask
from lm.model.flops import forward_flops_per_token, peak_flops, update_flops_per_token
from lm.model.transformer import Transformer
from tests.helpers import TINY

VOCAB = 512
WIDE = Model(
    num_layers=2, embed_dim=128, num_heads=4, num_kv_heads=2, head_dim=32, mlp_dim=384, max_len=64, scan_unroll=2,
    tied_head=False,
)  # fmt: skip


@pytest.mark.parametrize("length", [16, 64])
def test_a_forward_pass_costs_what_the_compiler_counts(length):
    """The compiler counts the masked half of attention, and everything between the products, which is little."""
    model = jax.eval_shape(lambda: Transformer(WIDE, VOCAB, jax.random.key(0)))
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    counted = jax.jit(lambda m, *a: m(*a)).lower(model, ids, ids, ids).compile().cost_analysis()["flops"] / length
    masked = WIDE.num_layers * 4 * WIDE.num_heads * WIDE.head_dim * (length - 1) / 2
    assert forward_flops_per_token(WIDE, VOCAB, length) + masked == pytest.approx(counted, rel=0.04)


def test_an_update_is_three_passes_and_one_of_the_reference():
    once = forward_flops_per_token(TINY, VOCAB, 16)
    assert update_flops_per_token(TINY, VOCAB, 16, others=0) == 3 * once
    assert update_flops_per_token(TINY, VOCAB, 16, others=1) == 4 * once


@pytest.mark.parametrize("window", [0, 1, 5, 16, 40])
def test_a_query_is_counted_with_the_keys_that_the_mask_shows_it(window):
    length = 16
    places = jnp.arange(length)[None]
    pairs = int(attention_mask(places, places, places * 0, places * 0, window).sum())
    without = forward_flops_per_token(
        dataclasses.replace(TINY, num_heads=0, num_kv_heads=TINY.num_kv_heads), VOCAB, length
    )
    weights = TINY.num_layers * 2 * 2 * TINY.embed_dim * TINY.num_heads * TINY.head_dim
    found = forward_flops_per_token(dataclasses.replace(TINY, window=window), VOCAB, length) - without - weights
    assert found == pytest.approx(TINY.num_layers * 4 * TINY.num_heads * TINY.head_dim * pairs / length)


def test_more_of_anything_costs_more():
    for field in ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"):
        more = dataclasses.replace(TINY, **{field: 2 * getattr(TINY, field)})
        assert forward_flops_per_token(more, VOCAB, 64) > forward_flops_per_token(TINY, VOCAB, 64)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_device_by_the_longest_name_that_fits(kind, peak):
    assert peak_flops(kind) == peak
