"""lm/optimizer.py: golden trajectories, AdamW by hand, the shape of the schedules, what decays."""

from __future__ import annotations

import dataclasses
import json
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from lm.experiment import Optimizer
from lm.optimizer import (
    DECAYS,
    adam,
    as_matrices,
    clip_by_global_norm,
    clipped,
    global_norm,
    lr_factor,
    make_optimizer,
    matrices,
    muon,
    schedule,
    with_state_dtype,
)
from tests.helpers import tiny_model


def close(actual, expected, tolerance: float, what: str):
    size = np.max(np.abs(expected))
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance * size, err_msg=what)


@pytest.fixture(scope="module")
def adamw(golden):
    with np.load(golden / "optim" / "adamw.npz") as arrays:
        return json.loads((golden / "optim" / "adamw.json").read_text())["cases"], dict(arrays)


def golden_schedule(case: dict, steps: int):
    """A case's schedule as our arguments: the reference begins at its step 0, with lr 0 (wsd: with the last lr)."""
    params = case["schedule_params"]
    warmup, total = params.get("warmup", 0), params.get("total", steps)
    shape = {
        "decay": 0 if case["schedule"] == "constant" else params.get("decay", total - warmup),
        "shape": params.get("decay_type", "cosine"),
        "first": params.get("min_lr_ratio", 0.0),
        "last": params.get("min_lr_ratio", params.get("min_lr_rate", 0.0)),
    }
    return lambda step: case["lr"] * lr_factor(step, total=total, warmup=warmup, **shape)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
def test_golden_learning_rates(adamw, dtype, tolerance):
    cases, arrays = adamw
    for name, case in cases.items():
        expected = arrays[f"{name}/lr"]
        with jax.enable_x64(dtype == "float64"):
            rates = jax.vmap(golden_schedule(case, len(expected)))(jnp.arange(len(expected)))
            assert rates.dtype == dtype
            close(rates, expected, tolerance, name)


def regression(params, x, y):
    return jnp.mean(jnp.square(jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] - y))


def test_golden_trajectories(adamw):
    """In float64 only: along a trajectory float32 rounding grows as the problem lets it."""
    cases, arrays = adamw
    x, y, *start = (arrays[f"in/{name}"] for name in ("x", "y", "init_w1", "init_b1", "init_w2"))
    for name, case in cases.items():
        steps = len(arrays[f"{name}/lr"])
        everything = lambda params: jax.tree.map(lambda _: True, params)  # noqa: E731
        with jax.enable_x64(True):
            optimizer = clipped(
                adam(b1=case["betas"][0], b2=case["betas"][1], eps=case["eps"]),
                golden_schedule(case, steps),
                weight_decay=case["weight_decay"],
                clip_norm=case["max_grad_norm"],
                decay_mask=matrices if case["bias_excluded_from_decay"] else everything,
            )

            @jax.jit
            def run(params, optimizer=optimizer, steps=steps):
                def step(carry, _):
                    params, state = carry
                    loss, gradient = jax.value_and_grad(regression)(params, x, y)
                    updates, state = optimizer.update(gradient, state, params)
                    params = optax.apply_updates(params, updates)
                    return (params, state), {"loss": loss, "grad_norm": global_norm(gradient), **params}

                return jax.lax.scan(step, (params, optimizer.init(params)), None, steps)[1]

            ours = run(dict(zip(("w1", "b1", "w2"), map(jnp.asarray, start), strict=True)))
            for what, values in ours.items():
                close(values, arrays[f"{name}/{what}"], 1e-9, f"{name} {what}")


def test_golden_clipping(adamw):
    _, arrays = adamw
    gradients = {name: x for name, x in arrays.items() if name.startswith("in/clip_grad")}
    folders = {name.split("/")[0] for name in arrays if name.startswith("clip_")}
    assert folders
    with jax.enable_x64(True):
        for folder in folders:
            clip = clip_by_global_norm(float(folder.removeprefix("clip_")))
            tree = jax.tree.map(jnp.asarray, gradients)
            small, _ = clip.update(tree, clip.init(tree))
            close(global_norm(tree), arrays[f"{folder}/norm"], 1e-12, folder)
            for name, values in small.items():
                close(values, arrays[f"{folder}/out{name.removeprefix('in/clip_grad')}"], 1e-12, f"{folder} {name}")


def test_three_updates_by_hand():
    config = Optimizer(peak_lr=0.1, warmup_steps=2, schedule="constant", b2=0.9, weight_decay=0.3, clip_norm=2.0)
    rng = np.random.default_rng(0)
    start = {"scale": rng.normal(size=(2, 3)), "w": rng.normal(size=(2, 3))}
    gradients = [{name: rng.normal(size=(2, 3)) * size for name in start} for size in (0.1, 3.0, 1.0)]

    expected, mean, square = dict(start), dict.fromkeys(start, 0.0), dict.fromkeys(start, 0.0)
    for i, gradient in enumerate(gradients):
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        for name, g in gradient.items():
            g = g * min(1, 2.0 / (norm + 1e-6))
            mean[name] = 0.9 * mean[name] + 0.1 * g
            square[name] = 0.9 * square[name] + 0.1 * g**2
            debiased = mean[name] / (1 - 0.9 ** (i + 1)), square[name] / (1 - 0.9 ** (i + 1))
            decay = 0.3 * expected[name] if name == "w" else 0
            rate = 0.1 * min((i + 1) / 2, 1)
            expected[name] = expected[name] - rate * (debiased[0] / (np.sqrt(debiased[1]) + 1e-8) + decay)

    with jax.enable_x64(True):
        optimizer = make_optimizer(config, total_updates=10)
        params = jax.tree.map(jnp.asarray, start)
        state = optimizer.init(params)
        for gradient in gradients:
            updates, state = optimizer.update(jax.tree.map(jnp.asarray, gradient), state, params)
            params = optax.apply_updates(params, updates)
    for name in start:
        close(params[name], expected[name], 1e-12, name)


@pytest.mark.parametrize("name", ["constant", "cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_schedule_starts_above_zero_and_ends_where_it_says(name, warmup):
    config = Optimizer(peak_lr=3.0, schedule=name, warmup_steps=warmup, decay_frac=0.25, final_lr_frac=0.1)
    rates = np.asarray(jax.vmap(schedule(config, 40))(jnp.arange(60)))
    np.testing.assert_allclose(rates[:warmup], 3.0 * (1 + np.arange(warmup)) / max(warmup, 1), rtol=1e-6)
    assert (rates[warmup:30] == 3.0).all() == (name != "cosine")
    assert (np.diff(rates[warmup:]) <= 0).all()
    last = 3.0 if name == "constant" else 0.3
    np.testing.assert_allclose(rates[39:], last, rtol=1e-5)


def test_shapes_fall_from_one_to_zero():
    x = jnp.linspace(0, 1, 11)
    for name, shape in DECAYS.items():
        np.testing.assert_allclose(shape(x)[jnp.asarray([0, -1])], [1, 0], atol=1e-6, err_msg=name)
        assert (np.diff(shape(x)) < 0).all(), name


@pytest.mark.parametrize("name", ["constant", "cosine", "wsd"])
def test_schedule_shorter_than_its_warmup_is_finite(name):
    config = Optimizer(schedule=name, warmup_steps=20)
    rates = np.asarray(jax.vmap(schedule(config, 3))(jnp.arange(3)))
    assert np.isfinite(rates).all() and (rates > 0).all() and (rates <= config.peak_lr).all()


class Block(nnx.Module):
    """Parameters as stacked layers have them: every leaf has a leading axis."""

    def __init__(self):
        self.norm = nnx.Dict(scale=nnx.Param(jnp.ones((4, 8))), bias=nnx.Param(jnp.ones((4, 8))))
        self.up = nnx.Param(jnp.ones((4, 8, 16)))
        self.gain = nnx.Param(jnp.ones(4))


def test_only_matrices_decay():
    params = Block()
    config = dataclasses.replace(Optimizer(), peak_lr=1.0, warmup_steps=0, schedule="constant", weight_decay=0.5)
    optimizer = make_optimizer(config, 10)
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(still, optimizer.init(params), params)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(moved.up[...], 0.5)
    for untouched in (moved.norm["scale"], moved.norm["bias"], moved.gain):
        np.testing.assert_array_equal(untouched[...], 1)


def test_another_mask_can_be_given():
    params = {"w": jnp.ones((2, 2)), "frozen": jnp.ones((2, 2))}
    config = Optimizer(peak_lr=1.0, warmup_steps=0, schedule="constant", weight_decay=0.5)
    optimizer = make_optimizer(config, 10, decay_mask=lambda params: {"w": True, "frozen": False})
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_array_equal(updates["w"], -0.5)
    np.testing.assert_array_equal(updates["frozen"], 0)


def test_clipping_keeps_the_dtype_and_counts_in_float32():
    tree = {"a": jnp.full(4096, 0.1, jnp.bfloat16), "b": jnp.full(4, 3.0, jnp.float32)}
    exact = np.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in tree.values()))
    assert global_norm(tree) == pytest.approx(exact, rel=1e-5)
    clip = clip_by_global_norm(1.0)
    clipped, _ = clip.update(tree, clip.init(tree))
    assert {name: x.dtype for name, x in clipped.items()} == {name: x.dtype for name, x in tree.items()}
    assert global_norm(clipped) == pytest.approx(1.0, rel=1e-2)


def test_moments_with_state_dtype_bfloat16_take_half_the_memory_and_nearly_the_same_steps():
    params = {"w": jnp.zeros((4, 8))}
    paths = {}
    for dtype in ("float32", "bfloat16"):
        rule, now = with_state_dtype(dtype, adam(0.95)), params
        state = rule.init(params)
        for seed in range(20):
            direction, state = rule.update({"w": jax.random.normal(jax.random.key(seed), (4, 8)) + 0.5}, state)
            now = jax.tree.map(lambda p, d: p - 0.1 * d, now, direction)
        moments = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert len(moments) == 2 and {x.dtype for x in moments} == {jnp.dtype(dtype)}
        paths[dtype] = now["w"]
    np.testing.assert_allclose(paths["bfloat16"], paths["float32"], atol=0.02)


@pytest.fixture(scope="module")
def hidden():
    """A tiny model and gradients for it."""
    model = tiny_model()
    leaves, structure = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return model, jax.tree.unflatten(
        structure, [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


@pytest.mark.slow
def test_muon_moves_the_matrices_of_the_blocks_along_their_singular_vectors(hidden):
    """The first direction of a matrix U·S·Vᵀ is about U·Vᵀ, whose entries are then as large as Adam's."""
    model, gradients = hidden
    rule = muon(b2=0.95)
    got, _ = rule.update(gradients, rule.init(model), model)
    names = ("attention.q", "attention.k", "attention.v", "attention.o", "mlp.gate", "mlp.up", "mlp.down")
    for name in names:
        rows = 2 if name == "attention.o" else 1
        each = (operator.attrgetter(name)(tree.blocks).weight[...] for tree in (gradients, got))
        for gradient, direction in zip(*each, strict=True):
            gradient, direction = (x.reshape(np.prod(x.shape[:rows]), -1) for x in (gradient, direction))
            u, sizes, v = np.linalg.svd(np.asarray(gradient), full_matrices=False)
            along = u.T @ np.asarray(direction) @ v.T / (0.2 * max(gradient.shape) ** 0.5)
            large = sizes > 0.1 * sizes[0]  # smaller ones take more than five steps to grow
            np.testing.assert_allclose(np.diag(along)[large], 1, atol=0.35)
            np.testing.assert_allclose(along - np.diag(np.diag(along)), 0, atol=1e-3)


def test_muon_leaves_the_embedding_the_head_and_the_norms_to_adam(hidden):
    model, gradients = hidden
    both, alone = (rule.update(gradients, rule.init(model), model)[0] for rule in (muon(b2=0.95), adam(b2=0.95)))
    names = ("embed.weight", "norm.scale", "blocks.attn_norm.scale", "blocks.mlp_norm.scale")
    for path in names:
        ours, expected = (operator.attrgetter(path)(tree) for tree in (both, alone))
        np.testing.assert_array_equal(ours[...], expected[...], err_msg=path)
    sides = jax.tree.leaves(as_matrices(model), is_leaf=lambda x: x is None or isinstance(x, MuonDimensionNumbers))
    assert sum(side is not None for side in sides) == 7
