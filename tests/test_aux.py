"""What a layer reports reaches the loss and the metrics of every algorithm, whatever the layout of the step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.algorithms import ALGORITHMS, algorithm_of
from lm.algorithms.state import first_state
from lm.model.heads import Scorer
from lm.model.mlp import MLP
from lm.types import NOTHING_SHARED, Mean, Penalty
from tests.helpers import OBJECTIVES, grouped_batch, random_batch, tiny_model, tiny_stage

COEF = 0.3
PLAIN_MLP = MLP.__call__
# the first of each algorithm, and a critic with a body of its own
NAMES = (*{type(o): name for name, o in reversed(OBJECTIVES.items())}.values(), "ppo_head")


def report(monkeypatch, coef):
    """Make every MLP report the mean square of its output over real tokens, minimised times `coef`, and how many rows it saw."""

    def reporting(self, x, segments):
        y, _ = PLAIN_MLP(self, x, segments)
        square = Penalty(
            (jnp.square(y).mean(-1) * (segments > 0)).sum(), (segments > 0).sum().astype(jnp.float32), coef
        )
        return y, {"mlp_square": square} | ({} if coef else {"mlp_rows": Mean(jnp.float32(len(y)), jnp.ones(()))})

    monkeypatch.setattr(MLP, "__call__", reporting)


def prepared(name, model_changes=None, **stage_changes):
    """A step of plain gradient descent, not compiled, and the state that it begins with."""
    stage, changes = tiny_stage(OBJECTIVES[name], **stage_changes), model_changes or {}
    optimizer = optax.sgd(1.0)
    scorers = (Scorer(tiny_model(seed=2, **changes), jax.random.key(2)),)
    before = first_state(stage, optimizer, tiny_model(**changes), scorers, jax.random.key(3))
    return algorithm_of(stage).step(stage, optimizer), before


def one_step(name, batch=None, model_changes=None, **stage_changes):
    """The state before and after a step, and its metrics."""
    step, before = prepared(name, model_changes, **stage_changes)
    after, metrics = jax.jit(step)(before, batch or random_batch())
    return before, after, metrics


def loss_alone(name):
    """The loss of a step, and the names of its metrics: the compiler leaves out the gradient."""
    names, (step, before) = set(), prepared(name)

    def loss(state, batch):
        metrics = step(state, batch)[1]
        names.update(metrics)
        return metrics["loss"]

    return jax.jit(loss)(before, random_batch()), names


@functools.cache  # several tests compare with the same step
def penalised(name):
    with pytest.MonkeyPatch.context() as patch:
        report(patch, COEF)
        return one_step(name)


def assert_same_step(one, other):
    for x, y in zip(jax.tree.leaves(one[1].models), jax.tree.leaves(other[1].models), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5)
    assert one[2].keys() == other[2].keys()
    for key, value in one[2].items():
        np.testing.assert_allclose(value, other[2][key], atol=1e-5, rtol=1e-4, err_msg=key)


def test_every_algorithm_is_tried():
    assert {type(OBJECTIVES[name]) for name in NAMES} == ALGORITHMS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_minimises_and_reports_a_penalty_in_any_pieces(name, monkeypatch):
    loss, without = loss_alone(name)
    whole = penalised(name)
    report(monkeypatch, COEF)
    found = {key for key in whole[2] if key.endswith("mlp_square")}
    assert len(found) == 1 + (name == "ppo")
    assert found <= whole[2].keys() - without and all(float(whole[2][key]) > 0 for key in found)
    added = COEF * sum(whole[2][key] for key in found)
    np.testing.assert_allclose(whole[2]["loss"] - loss, added, rtol=1e-3, atol=1e-5)
    # Rows of the batch have unequal weights: a mean of the pieces' means would be another number.
    assert_same_step(one_step(name, microbatches=4), whole)


def test_what_is_only_reported_moves_no_gradient(monkeypatch):
    without = one_step("pretrain")[2]
    report(monkeypatch, 0.0)
    metrics = one_step("pretrain")[2]
    assert (metrics["grad_norm"], metrics["loss"]) == (without["grad_norm"], without["loss"])
    assert metrics["mlp_rows"] == 16


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"remat": "full"}, {"scan_unroll": 2}, {"max_logits": 64}], ids=str)
def test_rematerialisation_unrolling_and_pieces_of_logits_change_no_penalty(changes, monkeypatch):
    report(monkeypatch, COEF)
    assert_same_step(one_step("pretrain", model_changes=changes), penalised("pretrain"))


@pytest.mark.slow
def test_a_shared_prompt_counts_as_often_as_it_stands_in_rows(monkeypatch):
    report(monkeypatch, COEF)
    shared = grouped_batch()
    alone = dataclasses.replace(shared, shared=NOTHING_SHARED)
    assert_same_step(one_step("grpo_token", batch=shared), one_step("grpo_token", batch=alone))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", "reward_model"])
def test_the_gradient_of_loss_and_penalty_equals_finite_differences(name, monkeypatch):
    report(monkeypatch, COEF)
    step, before = prepared(name, microbatches=2)
    update = jax.jit(step)
    after, _ = update(before, random_batch())
    gradient = jax.tree.map(lambda x, y: x - y, before.models, after.models)
    length = float(optax.global_norm(gradient))
    size = 1e-2 / length

    def loss(way):
        models = jax.tree.map(lambda x, g: x + way * size * g / length, before.models, gradient)
        state = type(before)(before.step, models, before.opt_state, before.carry, before.frozen)
        return float(update(state, random_batch())[1]["loss"])

    np.testing.assert_allclose((loss(1) - loss(-1)) / (2 * size), length, rtol=2e-3)


@pytest.mark.slow
def test_padding_changes_no_penalty(monkeypatch):
    report(monkeypatch, COEF)
    batch = random_batch()
    wide = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 8))) if x.shape == batch.tokens.shape else x, batch)
    wide = dataclasses.replace(wide, tokens=jnp.where(wide.segments > 0, wide.tokens, 7))
    assert_same_step(one_step("pretrain", batch=wide), penalised("pretrain"))
