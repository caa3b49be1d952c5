"""Training with bfloat16 parameters: float32 moments, float32 master weights, gradients summed in float32."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint.experimental.v1 as ocp
import pytest

from lm.algorithms import pretrain_step
from lm.algorithms.state import first_state
from lm.experiment import Experiment, Mesh, Optimizer, Pretrain, Source, Stage, Tokenizer
from lm.model.transformer import num_params
from lm.optimizer import MasterWeights, apply_updates, make_optimizer
from lm.parallel.mesh import make_mesh
from lm.parallel.rules import batch_sharding, shardings
from lm.train.checkpoint import Checkpoints
from lm.train.stages import run
from tests.helpers import OBJECTIVES, TINY, layout, random_batch, tiny_model, tiny_stage
from tests.train.runs import forget_last_checkpoint, metrics

NARROW = {"param_dtype": "bfloat16"}
SLOW = Optimizer(peak_lr=1e-3, warmup_steps=0, schedule="constant", weight_decay=0.1)
KINDS = ("adamw", "muon")
WORDS = ["".join(np.random.default_rng(i).choice(list("abdeghiklmnoprstu"), 4)) for i in range(60)]


def floats(tree):
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


def dtypes(tree):
    return {str(x.dtype) for x in floats(tree)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("master", [True, False])
@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
def test_the_moments_have_the_dtype_that_is_asked_for(kind, master, kept):
    model = jax.eval_shape(lambda: tiny_model(**NARROW))
    optimizer = make_optimizer(Optimizer(kind=kind, state_dtype=kept, master_weights=master), 10)
    state = jax.eval_shape(optimizer.init, model)
    for _ in range(2):
        rule = state.rule if isinstance(state, MasterWeights) else state
        assert isinstance(state, MasterWeights) == master
        assert dtypes(rule) == {kept}
        _, state = jax.eval_shape(optimizer.update, model, state, model)  # gradients have the parameters' dtypes


def test_float32_parameters_have_no_copies_and_the_state_that_they_had():
    model = tiny_model()
    states = [make_optimizer(Optimizer(master_weights=on), 10).init(model) for on in (True, False)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    assert sum(x.size for x in floats(states[0])) == 2 * num_params(model)


@functools.cache
def trained(kind, dtype, steps=8):
    """A tiny model's first state and the one after some pretraining steps at a learning rate of 0.001."""
    stage = tiny_stage(Pretrain(), optimizer=dataclasses.replace(SLOW, kind=kind))
    optimizer = make_optimizer(stage.optimizer, steps)
    # the same numbers in both dtypes
    model = jax.tree.map(lambda x: x.astype(dtype), tiny_model(**NARROW))
    model.config = dataclasses.replace(model.config, param_dtype=dtype)
    before = after = first_state(stage, optimizer, model)
    step = jax.jit(pretrain_step(stage, optimizer))
    for seed in range(steps):
        after, _ = step(after, random_batch(seed=seed))
    return before, after


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_parameters_are_their_masters_rounded_to_the_bit(kind):
    for state in trained(kind, "bfloat16"):
        assert dtypes(state.models) == {"bfloat16"} and dtypes(state.opt_state.master) == {"float32"}
        for param, master in zip(jax.tree.leaves(state.models), jax.tree.leaves(state.opt_state.master), strict=True):
            np.testing.assert_array_equal(param, master.astype(jnp.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
def test_masters_move_as_float32_parameters_do(kind):
    """Norm scales, which begin at 1, move by 0.008: less than bfloat16 has there. Moved as in float32, decay included."""
    (before, narrow), (_, wide) = trained(kind, "bfloat16"), trained(kind, "float32")
    for path, master in jax.tree_util.tree_leaves_with_path(narrow.opt_state.master):
        start, other = (functools.reduce(_child, path, tree) for tree in (before.opt_state.master, wide.models))
        moved, expected = (np.asarray(x - start).ravel() for x in (master, other))
        assert np.abs(expected).max() > 1e-3, path
        cosine = moved @ expected / np.linalg.norm(moved) / np.linalg.norm(expected)
        assert cosine > 0.97, (path, cosine)
        assert np.linalg.norm(moved) == pytest.approx(np.linalg.norm(expected), rel=0.05), path


def _child(tree, key):
    return getattr(tree, key.name) if hasattr(key, "name") else tree[key.key]


@pytest.mark.slow
def test_without_masters_the_same_steps_are_rounded_away():
    """What the default is for."""
    model = tiny_model(**NARROW)
    optimizer = make_optimizer(dataclasses.replace(SLOW, master_weights=False), 8)
    state, params = optimizer.init(model), model
    for _ in range(4):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = apply_updates(params, updates, state)
    np.testing.assert_array_equal(params.norm.scale[...], 1)
    assert dtypes(params) == {"bfloat16"}


def test_a_parameter_that_comes_close_to_zero_is_still_its_master_rounded():
    """There a float32 sum of parameter and update has lost what is left."""
    params, master = {"w": jnp.asarray([1000.0, -3.0], jnp.bfloat16)}, {"w": jnp.asarray([3e-7, 1e-9])}
    updates = {"w": master["w"] - params["w"].astype(jnp.float32)}
    moved = apply_updates(params, updates, MasterWeights(master, ()))
    np.testing.assert_array_equal(moved["w"], master["w"].astype(jnp.bfloat16))


def gradient_of(microbatches, dtype="bfloat16", rows=128):
    """The gradient of a batch, and its norm as it is reported."""
    keep = optax.GradientTransformation(
        lambda params: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params),
        lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
    )
    stage = tiny_stage(Pretrain(), microbatches=microbatches, batch_size=rows)
    model = tiny_model(param_dtype=dtype)
    # few distinct tokens: every row's gradient points nearly the same way, which a narrow sum stops counting
    batch = random_batch(rows)
    batch = dataclasses.replace(batch, tokens=batch.tokens % 4)
    state, numbers = jax.jit(pretrain_step(stage, keep))(first_state(stage, keep, model), batch)
    assert dtypes(state.opt_state) == {"float32"}
    return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(state.opt_state)]), float(
        numbers["grad_norm"]
    )


@pytest.mark.slow
def test_a_gradient_of_many_microbatches_is_that_of_one_batch():
    """Within half a unit in the last place of one bfloat16 pass, where a bfloat16 sum is off by several percent."""
    (one, norm), (many, norm_of_many) = gradient_of(1), gradient_of(128)
    assert np.linalg.norm(many - one) < 2**-8 * np.linalg.norm(one)
    assert norm_of_many == pytest.approx(norm, rel=2**-9)
    assert norm_of_many == pytest.approx(np.linalg.norm(many.astype(np.float64)), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "where"), [("adamw", {"data": 2, "fsdp": 2, "tensor": 2}), ("muon", {"fsdp": 8})])
def test_masters_lie_as_their_parameters_and_are_the_same_in_any_layout(kind, where):
    stage = tiny_stage(OBJECTIVES["pretrain"], optimizer=dataclasses.replace(SLOW, kind=kind))
    optimizer = make_optimizer(stage.optimizer, 4)
    before = jax.jit(lambda: first_state(stage, optimizer, tiny_model(**NARROW)))()

    def step(mesh_sizes):
        mesh, state = make_mesh(layout(**mesh_sizes)), before
        places = shardings(jax.eval_shape(lambda: state), mesh)
        for param, master in zip(jax.tree.leaves(places.models), jax.tree.leaves(places.opt_state.master), strict=True):
            assert param.spec == master.spec
        jitted = jax.jit(
            pretrain_step(stage, optimizer), in_shardings=(places, batch_sharding(mesh)), out_shardings=(places, None)
        )
        with jax.set_mesh(mesh):
            state, _ = jitted(jax.device_put(state, places), jax.device_put(random_batch(), batch_sharding(mesh)))
        return jax.device_get(state)

    got, wanted = step(where), step({})
    for one, other in zip(*(jax.tree.leaves(state.opt_state.master) for state in (got, wanted)), strict=True):
        # A gradient is rounded to bfloat16 after its pass: the first update of Adam is its sign, the same all but everywhere.
        assert (np.abs(one - other) > 1e-5).mean() < 0.02
    for param, master in zip(jax.tree.leaves(got.models), jax.tree.leaves(got.opt_state.master), strict=True):
        np.testing.assert_array_equal(param, master.astype(jnp.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_in_bfloat16_goes_on_to_the_bit(tmp_path, kind):
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, 20)) for _ in range(100)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    optimizer = dataclasses.replace(SLOW, kind=kind)
    stage = Stage(
        "pretrain", Pretrain(), (Source(str(tmp_path / "text.jsonl"), holdout=0.1),), optimizer, steps=6, batch_size=4,
        seq_len=32, microbatches=2, save_every=3,
    )  # fmt: skip
    model = dataclasses.replace(TINY, param_dtype="bfloat16", compute_dtype="bfloat16", num_layers=1)
    value = Experiment(
        "narrow", (stage,), prompts=(), tokenizer=Tokenizer(vocab_size=320), model=model, mesh=Mesh(data=1)
    )
    run(value, tmp_path / "run")
    curve, final = metrics(tmp_path / "run", "pretrain"), saved(tmp_path)
    forget_last_checkpoint(tmp_path / "run", "pretrain", 2)
    run(value, tmp_path / "run")
    assert metrics(tmp_path / "run", "pretrain") == curve
    again = saved(tmp_path)
    assert any(name.startswith("master/") for name in final) and final.keys() == again.keys()
    assert all(final[name] == again[name] for name in final)


def saved(folder):
    """The bytes of every array of the last checkpoint's optimizer state, by name."""
    with Checkpoints(folder / "run" / "stages" / "pretrain" / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [3, 6]
    loaded = ocp.load_checkpointables(folder / "run" / "stages" / "pretrain" / "checkpoints" / "00000006")
    named = jax.tree_util.tree_leaves_with_path(loaded["opt_state"])
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x).tobytes() for path, x in named}
