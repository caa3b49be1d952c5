"""The same step, whatever the layout: devices, microbatches, rematerialisation, unrolling."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest

from lm.algorithms import algorithm_of
from lm.algorithms.state import first_state
from lm.experiment import LoRA
from lm.model.heads import Scorer
from lm.optimizer import adam, clipped, matrices, muon, schedule
from lm.parallel.mesh import make_mesh
from lm.parallel.rules import batch_sharding, shardings
from lm.types import NOTHING_SHARED
from tests import helpers
from tests.helpers import OBJECTIVES, grouped_batch, layout, random_batch, tiny_model, tiny_stage

pytestmark = pytest.mark.slow

PLAIN = "one"
# What another order of a float32 sum may change in its elements, of the largest of them.
ROUNDING = 32 * np.finfo(np.float32).eps
SPLIT = ("fsdp", "expert", "context")  # the mesh axes that split the width of parameters
LAYOUTS = {
    PLAIN: ({}, {}, {}),
    "data8": ({"data": 8}, {}, {}),
    "fsdp8": ({"fsdp": 8}, {}, {}),
    # Every pair of axes is in one of these.
    **{
        "_".join(f"{axis}2" for axis in axes): (dict.fromkeys(axes, 2), {}, {})
        for axes in (
            ("data", "fsdp", "tensor"),
            ("slices", "data", "expert"),
            ("slices", "fsdp", "context"),
            ("expert", "context", "tensor"),
            ("slices", "data", "tensor"),
            ("data", "context", "fsdp"),
            ("fsdp", "expert", "context"),
        )
    },
    "context2": ({"context": 2}, {}, {}),
    "microbatches4": ({}, {"microbatches": 4}, {}),
    "microbatches8": ({}, {"microbatches": 8}, {}),
    "microbatches2_on_data8": ({"data": 8}, {"microbatches": 2}, {}),
    "microbatches2_on_data2_fsdp2": ({"data": 2, "fsdp": 2}, {"microbatches": 2}, {}),
    "microbatches2_on_data2_fsdp2_tensor2": ({"data": 2, "fsdp": 2, "tensor": 2}, {"microbatches": 2}, {}),
    "remat_full": ({}, {}, {"remat": "full"}),
    "remat_minimal": ({}, {}, {"remat": "minimal"}),
    "remat_dots_unrolled": ({}, {}, {"remat": "dots", "scan_unroll": 2}),
}
# Every axis, each objective that adds something: pairs with a reference, two models that train, a rollout's groups.
EVERY_AXIS = (
    "fsdp8", "data2_fsdp2_tensor2", "slices2_fsdp2_context2", "expert2_context2_tensor2", "microbatches2_on_data2_fsdp2",
)  # fmt: skip
ODD = (PLAIN, "context2", "microbatches8", "microbatches2_on_data8")  # what other tests are about
WHERE = {
    "pretrain": [where for where in LAYOUTS if where not in ODD],  # every pair of axes, and what only the model reads
    **dict.fromkeys(("dpo", "ppo", "grpo_token"), EVERY_AXIS),
    "dpo_ranked": ("data2_fsdp2_tensor2",),  # it ranks the pairs of a batch, which microbatches would part
}
OTHERS = ("microbatches2_on_data2_fsdp2_tensor2",)  # other sums over the rows of the same model
CASES = [(name, where) for name in OBJECTIVES for where in WHERE.get(name, OTHERS)]


def made(objective, model_changes, **changes):
    """The optimizer of a tiny stage, and the state that it begins with."""
    stage = tiny_stage(objective, **changes)
    # The chain of every run, but for an eps as large as the gradient: with the usual one an element's first updates
    # are its gradient's sign, which rounding decides where the gradient is nearly 0.
    o = stage.optimizer
    optimizer = clipped(
        adam(o.b2, eps=1e-2), schedule(o, stage.steps), weight_decay=o.weight_decay, clip_norm=o.clip_norm,
        decay_mask=matrices,
    )  # fmt: skip
    scorers = (Scorer(tiny_model(seed=2, **model_changes), jax.random.key(2)),)
    state = first_state(stage, optimizer, tiny_model(**model_changes), scorers)
    if "reference" in state.frozen:
        state.frozen["reference"] = tiny_model(seed=1, **model_changes)
    return optimizer, state


@functools.cache
def made_plain(objective, lora):
    optimizer, state = made(objective, {}, lora=lora)
    return optimizer, jax.device_get(state)


def prepared(objective, mesh_sizes, stage_changes, model_changes):
    """The mesh, the jitted step and its first arguments, on the devices, in a layout."""
    stage = tiny_stage(objective, **stage_changes)
    mesh = make_mesh(layout(**mesh_sizes))
    optimizer, state = made(objective, model_changes) if model_changes else made_plain(objective, stage.lora)
    places = shardings(jax.eval_shape(lambda x: x, state), mesh)
    step = jax.jit(
        algorithm_of(stage).step(stage, optimizer),
        in_shardings=(places, batch_sharding(mesh)),
        out_shardings=(places, None),
    )
    return mesh, step, jax.device_put(state, places)


class Steps(NamedTuple):
    """What is left after two steps, and the program that made them."""

    parameters: list
    opt_state: list
    metrics: dict
    frozen: dict
    flops: float
    gathers: bool


def two_steps(objective, mesh_sizes, stage_changes, model_changes, make_batch=random_batch):
    """Two steps in a layout, of one program that calls no host."""
    mesh, step, state = prepared(objective, mesh_sizes, stage_changes, model_changes)
    with jax.set_mesh(mesh):
        batches = [jax.device_put(make_batch(seed=seed), batch_sharding(mesh)) for seed in (0, 1)]
        program = step.lower(state, batches[0]).compile()
        text = program.as_text()
        assert "callback" not in text and "outfeed" not in text
        for batch in batches:
            state, metrics = program(state, batch)  # which takes no arguments of another shape or layout
    found = jax.device_get((jax.tree.leaves(state.models), jax.tree.leaves(state.opt_state), metrics, state.frozen))
    return Steps(*found, program.cost_analysis()["flops"], "all-gather" in text)


@functools.cache  # several tests look at the same program
def stepped(name, where, make_batch=random_batch, lora=None):
    sizes, stage_changes, model_changes = LAYOUTS[where]
    return two_steps(
        OBJECTIVES[name], sizes, stage_changes | ({"lora": lora} if lora else {}), model_changes, make_batch
    )


@pytest.mark.parametrize(("name", "where"), CASES)
def test_same_result_in_any_layout(name, where):
    assert_same(stepped(name, where), stepped(name, PLAIN))


@pytest.mark.parametrize("where", ["data2_fsdp2_tensor2", "microbatches2_on_data2_fsdp2"])
def test_an_adapter_gives_the_same_result_in_any_layout(where):
    lora = LoRA(rank=4, alpha=4.0, dora=True)
    assert_same(stepped("dpo", where, lora=lora), stepped("dpo", PLAIN, lora=lora))


def assert_same(got, wanted):
    """Parameters, optimizer state and metrics."""
    for one, other in zip(got.opt_state, wanted.opt_state, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=ROUNDING * np.abs(other).max())
    for one, other in zip(got.parameters, wanted.parameters, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    assert got.metrics.keys() == wanted.metrics.keys()
    for key, value in got.metrics.items():
        np.testing.assert_allclose(value, wanted.metrics[key], rtol=1e-5, atol=1e-6, err_msg=key)


def test_a_vocabulary_that_the_mesh_does_not_divide_changes_nothing(monkeypatch):
    monkeypatch.setattr(helpers, "VOCAB", 67)
    changes = {"max_len": 63, "tied_head": False}  # of a model that no other test has made with the usual vocabulary
    *_, state = prepared(OBJECTIVES["grpo_token"], {"tensor": 2, "fsdp": 2}, {}, changes)
    head = state.models["policy"].head.weight[...]
    assert head.shape == (32, 67) and head.sharding.shard_shape(head.shape) == (16, 67)
    split = two_steps(OBJECTIVES["grpo_token"], {"tensor": 2, "fsdp": 2}, {}, changes)
    assert_same(split, two_steps(OBJECTIVES["grpo_token"], {}, {}, changes))


def repeating_batch(seed=0):
    """A rollout's batch whose prompts are computed once a row."""
    return dataclasses.replace(grouped_batch(seed=seed), shared=NOTHING_SHARED)


SHARED = (
    PLAIN,
    "data2_fsdp2_tensor2",  # each device has whole groups
    "fsdp8",  # each device has half a group
    "context2",  # each device has half of every row
    "microbatches2_on_data2_fsdp2",
    "microbatches8",  # each has half a group
    "remat_dots_unrolled",
)


@pytest.mark.parametrize(
    ("name", "where"),
    [*(("grpo_sequence", where) for where in SHARED), ("grpo_token", PLAIN), ("grpo_token", "context2")],
)
def test_a_prompt_computed_once_for_its_group_gives_the_same_result_in_any_layout(name, where):
    assert_same(stepped(name, where, grouped_batch), stepped(name, PLAIN, repeating_batch))


@pytest.mark.parametrize(
    ("where", "tokens"), [(PLAIN, 43 / 64), ("fsdp8", 25 / 32), ("microbatches2_on_data2_fsdp2", 25 / 32)]
)
def test_a_shared_prompt_is_computed_once(where, tokens):
    """7 tokens of 16, for four rows or two: 43 tokens instead of 64, or 25 instead of 32; the head on 9 of 16."""
    once, often = (stepped("grpo_sequence", where, batch).flops for batch in (grouped_batch, repeating_batch))
    assert once < tokens * often


def test_devices_share_the_rows_of_every_microbatch():
    """No device computes or fetches another's rows: one turn of the loop costs a part of the whole."""
    whole, half = (stepped("pretrain", where) for where in ("data8", "microbatches2_on_data8"))
    assert not half.gathers
    assert half.flops < 0.6 * whole.flops  # the loop's body is counted once


def test_parameters_are_split_as_the_rules_say():
    mesh = make_mesh(layout(fsdp=4, tensor=2))
    model = jax.eval_shape(tiny_model)
    places = shardings(model, mesh)
    assert places.blocks.mlp.gate.weight.get_value().spec == jax.sharding.PartitionSpec(None, SPLIT, "tensor")
    assert places.embed.weight.get_value().spec == jax.sharding.PartitionSpec("tensor", SPLIT)
    assert places.norm.scale.get_value().spec == jax.sharding.PartitionSpec(None)


def test_no_gradient_reaches_the_reference():
    before, after = tiny_model(seed=1), stepped("dpo", PLAIN).frozen["reference"]
    for old, new in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("where", ["fsdp8", "data2_fsdp2_tensor2"])
def test_muon_takes_the_same_direction_in_any_layout(where):
    """Its matrices are made orthogonal as wholes, wherever their parts lie."""
    model = tiny_model()
    gradients = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), model)
    rule = muon(b2=0.95)

    def direction(mesh_sizes):
        mesh = make_mesh(layout(**mesh_sizes))
        places = shardings(jax.eval_shape(rule.init, model), mesh)
        state = jax.jit(rule.init, out_shardings=places)(model)
        grads = jax.device_put(gradients, shardings(jax.eval_shape(lambda: gradients), mesh))
        with jax.set_mesh(mesh):
            return jax.tree.leaves(jax.device_get(jax.jit(rule.update)(grads, state)))

    for got, wanted in zip(direction(LAYOUTS[where][0]), direction({}), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * max(np.abs(wanted).max(), 1e-30))
