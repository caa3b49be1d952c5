"""The same step, whatever the layout: devices, microbatches, rematerialisation, unrolling."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.model.transformer import Transformer
from lm.optimizer import make_optimizer
from lm.parallel.mesh import make_mesh
from lm.parallel.rules import batch_sharding, shardings
from lm.steps import STEPS, needs_reference
from lm.types import TrainState
from tests.helpers import OBJECTIVES, TINY, layout, random_batch, tiny_model, tiny_stage

LAYOUTS = {
    "data8": ({"data": 8}, {}, {}),
    "fsdp8": ({"fsdp": 8}, {}, {}),
    "data2_fsdp2_tensor2": ({"data": 2, "fsdp": 2, "tensor": 2}, {}, {}),
    "microbatches4": ({}, {"microbatches": 4}, {}),
    "microbatches2_on_data2_fsdp2": ({"data": 2, "fsdp": 2}, {"microbatches": 2}, {}),
    "remat_full": ({}, {}, {"remat": "full"}),
    "remat_dots_unrolled": ({}, {}, {"remat": "dots", "scan_unroll": 2}),
}


@functools.cache
def start(name):
    """Model, optimizer state and reference at step 0, on the host; the same numbers for every layout."""
    stage = tiny_stage(OBJECTIVES[name])
    optimizer = make_optimizer(stage.optimizer, stage.steps)
    model = tiny_model()
    frozen = {"reference": tiny_model(seed=1)} if needs_reference(stage) else {}
    return jax.device_get(TrainState(jnp.int32(0), model, jax.jit(optimizer.init)(model), frozen))


def with_config(state, **changes):
    """The same numbers in a model of another configuration that has the same parameters."""
    config = dataclasses.replace(TINY, **changes)
    other = jax.eval_shape(lambda: tiny_model(**changes))
    assert other.config == config

    def swap(tree):
        return jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(tree))

    is_model = lambda x: isinstance(x, Transformer)  # noqa: E731
    return jax.tree.map(lambda x: swap(x) if is_model(x) else x, state, is_leaf=is_model)


def compiled_step(name, mesh, state, stage_changes=None):
    stage = tiny_stage(OBJECTIVES[name], **(stage_changes or {}))
    optimizer = make_optimizer(stage.optimizer, stage.steps)
    places = shardings(jax.eval_shape(lambda x: x, state), mesh)
    step = STEPS[type(stage.objective)](stage, optimizer)
    return places, jax.jit(step, in_shardings=(places, batch_sharding(mesh)), out_shardings=(places, None))


def two_steps(name, mesh_sizes=None, stage_changes=None, model_changes=None):
    """Parameters, optimizer moments and metrics after two steps in a layout; it compiles once."""
    mesh = make_mesh(layout(**(mesh_sizes or {})))
    state = with_config(start(name), **(model_changes or {}))
    with jax.set_mesh(mesh):
        places, step = compiled_step(name, mesh, state, stage_changes)
        state = jax.device_put(state, places)
        for seed in (0, 1):
            state, metrics = step(state, jax.device_put(random_batch(seed=seed), batch_sharding(mesh)))
        assert step._cache_size() == 1
    return jax.device_get((jax.tree.leaves(state.params), jax.tree.leaves(state.opt_state), metrics))


@functools.cache
def plain(name):
    return two_steps(name)


@pytest.mark.parametrize("where", LAYOUTS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_same_result_in_any_layout(name, where):
    params, moments, metrics = two_steps(name, *LAYOUTS[where])
    for got, wanted in zip(moments, plain(name)[1], strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=1e-6)
    for got, wanted in zip(params, plain(name)[0], strict=True):
        # AdamW's first updates have the size of the learning rate whatever the gradient's: a sign is all that counts.
        close = np.isclose(got, wanted, rtol=1e-4, atol=1e-4)
        assert close.mean() > 0.999
    assert metrics.keys() == plain(name)[2].keys()
    for key, value in metrics.items():
        np.testing.assert_allclose(value, plain(name)[2][key], rtol=1e-4, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", ["pretrain", "dpo", "grpo_token"])
def test_a_compiled_step_calls_no_host(name):
    mesh, state = make_mesh(layout(data=2)), start(name)
    with jax.set_mesh(mesh):
        text = compiled_step(name, mesh, state)[1].lower(state, random_batch()).compile().as_text()
    assert "callback" not in text and "outfeed" not in text


def test_parameters_are_split_as_the_rules_say():
    mesh = make_mesh(layout(fsdp=4, tensor=2))
    model = jax.eval_shape(tiny_model)
    places = shardings(model, mesh)
    assert places.blocks.gate[...].spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    assert places.embed[...].spec == jax.sharding.PartitionSpec("tensor", "fsdp")
    assert places.norm.scale[...].spec == jax.sharding.PartitionSpec(None)


def test_no_gradient_reaches_the_reference():
    stage, state = tiny_stage(OBJECTIVES["dpo"]), start("dpo")
    step = STEPS[type(stage.objective)](stage, make_optimizer(stage.optimizer, stage.steps))
    after, _ = jax.jit(step)(state, random_batch())
    for old, new in zip(jax.tree.leaves(state.frozen), jax.tree.leaves(after.frozen), strict=True):
        np.testing.assert_array_equal(old, new)
