"""lm/model/flops.py against what the compiler counts, and its table of chips."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lm.algorithms.state import flops_per_token
from lm.experiment import DPO, PPO, SFT, Mesh, Model, RewardModel
from lm.model.attention import attention_mask
from lm.model.flops import forward_flops_per_token, layer_matrices, peak_flops, trains_in_layers
from lm.model.heads import policy_of
from lm.model.transformer import Transformer
from lm.plan.chips import parse_topology
from lm.plan.one_device import analysis_of, gradient_block
from lm.plan.program import Program
from tests.helpers import TINY, tiny_stage

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
    assert flops_per_token(tiny_stage(SFT()), TINY, VOCAB) == 3 * once
    assert flops_per_token(tiny_stage(DPO()), TINY, VOCAB) == 4 * once


def test_a_reward_model_of_the_first_layers_costs_no_more_than_these():
    one = dataclasses.replace(TINY, num_layers=1)
    update = flops_per_token(tiny_stage(RewardModel(layers=1)), TINY, VOCAB)
    assert update == 3 * forward_flops_per_token(one, 0, 16)


HEAD = 2 * TINY.embed_dim * VOCAB
MATRICES = 2 * TINY.num_layers * layer_matrices(TINY)
ATTENTION = forward_flops_per_token(TINY, VOCAB, 16) - HEAD - MATRICES
PARTS = {
    # trains: (forward, gradients of inputs, gradients of matrices) of the matrices of layers, attention, head
    "all": (PPO(critic="head"), (), MATRICES + HEAD, MATRICES + HEAD, 2 * ATTENTION),
    "norms": (SFT(), ("policy/*norm*",), 0, MATRICES + HEAD, 2 * ATTENTION),
    "last norm": (SFT(), ("policy/norm/*",), 0, HEAD, 0),
    "all but the embedding": (SFT(), ("!policy/embed/*",), MATRICES + HEAD, MATRICES + HEAD, 2 * ATTENTION),
    "all but a tied embedding": (SFT(), ("!policy/embed/*",), MATRICES, MATRICES + HEAD, 2 * ATTENTION),
    "the embedding": (SFT(), ("policy/embed/*",), 0, MATRICES + HEAD, 2 * ATTENTION),
    "a tied embedding": (SFT(), ("policy/embed/*",), HEAD, MATRICES + HEAD, 2 * ATTENTION),
    "the head": (SFT(), ("policy/head/*",), HEAD, 0, 0),
    "value head": (PPO(critic="head"), ("critic/*",), 0, 0, 0),
    "a critic of its own": (PPO(), ("critic/*",), MATRICES, 2 * MATRICES, 3 * ATTENTION),
}


@pytest.mark.parametrize("name", PARTS)
def test_what_does_not_train_has_no_gradient_and_passes_one_on(name):
    """Each number of a matrix and token: 2 forward, 2 for the gradient of its input, 2 for its own."""
    objective, trainable, of_matrices, of_inputs, of_attention = PARTS[name]
    model = dataclasses.replace(TINY, tied_head=" tied " in name)
    found = flops_per_token(tiny_stage(objective, trainable=trainable), model, VOCAB)
    once = MATRICES + ATTENTION + HEAD
    assert found == pytest.approx(once + of_matrices + of_inputs + of_attention, rel=1e-12)


HALF = PPO(critic="head", max_new_tokens=8)  # of a row are completions, and no other token meets the head


@pytest.mark.parametrize(
    ("objective", "trainable"),
    [
        (SFT(), ()),
        (SFT(), ("policy/*norm*",)),
        (SFT(), ("!policy/embed/*",)),
        (SFT(), ("policy/norm/*",)),
        (SFT(), ("policy/head/*",)),
        (HALF, ("critic/*",)),
    ],
    ids=str,
)
def test_an_update_has_the_products_of_its_traced_step(objective, trainable):
    """The trace has the half of attention that is masked, too."""
    config = dataclasses.replace(TINY, tied_head=False, compute_dtype="float32", remat="none")
    stage = tiny_stage(objective, trainable=trainable)
    sizes = dict.fromkeys(dataclasses.asdict(Mesh(data=1)), 1)
    program = Program(stage, config, VOCAB, parse_topology("v5e:1x1"), sizes)
    traced = analysis_of(program).usage(*gradient_block(program)).product_flops / program.tokens_per_device
    masked = config.num_layers * 4 * config.num_heads * config.head_dim * (16 - 1) / 2
    masked *= 1 + 2 * trains_in_layers(policy_of(program.trained()))
    prompts = HEAD / 2 if objective is HALF else 0
    assert traced == pytest.approx(flops_per_token(stage, config, VOCAB) + masked - prompts, rel=1e-6)


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
