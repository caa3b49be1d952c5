"""The same step, whatever the layout: devices, microbatches, rematerialisation, unrolling."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.optimizer import make_optimizer
from lm.parallel.mesh import make_mesh
from lm.parallel.rules import batch_sharding, shardings
from lm.steps import STEPS, needs_reference
from lm.types import TrainState
from tests.helpers import OBJECTIVES, layout, random_batch, tiny_model, tiny_stage

LAYOUTS = {
    "data8": ({"data": 8}, {}, {}),
    "fsdp8": ({"fsdp": 8}, {}, {}),
    "data2_fsdp2_tensor2": ({"data": 2, "fsdp": 2, "tensor": 2}, {}, {}),
    "microbatches4": ({}, {"microbatches": 4}, {}),
    "microbatches2_on_data2_fsdp2": ({"data": 2, "fsdp": 2}, {"microbatches": 2}, {}),
    "remat_full": ({}, {}, {"remat": "full"}),
    "remat_dots_unrolled": ({}, {}, {"remat": "dots", "scan_unroll": 2}),
}


def two_steps(objective, mesh_sizes=None, stage_changes=None, model_changes=None, compiled=None):
    """Parameters, optimizer moments and metrics after two steps in a layout."""
    stage = tiny_stage(objective, **(stage_changes or {}))
    mesh = make_mesh(layout(**(mesh_sizes or {})))
    optimizer = make_optimizer(stage.optimizer, stage.steps)
    model = tiny_model(**(model_changes or {}))
    frozen = {"reference": tiny_model(seed=1, **(model_changes or {}))} if needs_reference(stage) else {}
    state = TrainState(jnp.int32(0), model, optimizer.init(model), frozen)
    with jax.set_mesh(mesh):
        places = shardings(jax.eval_shape(lambda x: x, state), mesh)
        step = jax.jit(
            STEPS[type(objective)](stage, optimizer), in_shardings=(places, batch_sharding(mesh)), out_shardings=(places, None)
        )  # fmt: skip
        state = jax.device_put(state, places)
        for seed in (0, 1):
            batch = jax.device_put(random_batch(seed=seed), batch_sharding(mesh))
            if compiled is not None:
                compiled.append(step.lower(state, batch).compile())
            state, metrics = step(state, batch)
        assert step._cache_size() == 1
    return jax.device_get((jax.tree.leaves(state.params), jax.tree.leaves(state.opt_state), metrics))


@functools.cache
def plain(name):
    return two_steps(OBJECTIVES[name])


@pytest.mark.parametrize("where", LAYOUTS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_same_result_in_any_layout(name, where):
    params, moments, metrics = two_steps(OBJECTIVES[name], *LAYOUTS[where])
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
    compiled = []
    two_steps(OBJECTIVES[name], {"data": 2}, compiled=compiled)
    text = compiled[0].as_text()
    assert "callback" not in text and "outfeed" not in text


def test_parameters_are_split_as_the_rules_say():
    mesh = make_mesh(layout(fsdp=4, tensor=2))
    model = jax.eval_shape(tiny_model)
    places = shardings(model, mesh)
    assert places.blocks.gate[...].spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    assert places.embed[...].spec == jax.sharding.PartitionSpec("tensor", "fsdp")
    assert places.norm.scale[...].spec == jax.sharding.PartitionSpec(None)


def test_no_gradient_reaches_the_reference():
    objective = dataclasses.replace(OBJECTIVES["dpo"])
    stage = tiny_stage(objective)
    optimizer = make_optimizer(stage.optimizer, stage.steps)
    model, reference = tiny_model(), tiny_model(seed=1)
    state = TrainState(jnp.int32(0), model, optimizer.init(model), {"reference": reference})
    after, _ = jax.jit(STEPS[type(objective)](stage, optimizer))(state, random_batch())
    for old, new in zip(jax.tree.leaves(reference), jax.tree.leaves(after.frozen["reference"]), strict=True):
        np.testing.assert_array_equal(old, new)
