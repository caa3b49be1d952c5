"""What a layer reports reaches the loss and the metrics of every algorithm, whatever the layout of the step."""

import dataclasses

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


def one_step(name, batch=None, model_changes=None, **stage_changes):
    """The state before and after a step of plain gradient descent, and its metrics."""
    stage, changes = tiny_stage(OBJECTIVES[name], **stage_changes), model_changes or {}
    optimizer = optax.sgd(1.0)
    scorers = (Scorer(tiny_model(seed=2, **changes), jax.random.key(2)),)
    before = first_state(stage, optimizer, tiny_model(**changes), scorers, jax.random.key(3))
    after, metrics = jax.jit(algorithm_of(stage).step(stage, optimizer))(before, batch or random_batch())
    return before, after, metrics


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
    without = one_step(name)[2]
    report(monkeypatch, COEF)
    whole = one_step(name)
    found = {key for key in whole[2] if key.endswith("mlp_square")}
    assert len(found) == 1 + (name == "ppo")
    assert found <= whole[2].keys() - without.keys() and all(float(whole[2][key]) > 0 for key in found)
    added = COEF * sum(whole[2][key] for key in found)
    np.testing.assert_allclose(whole[2]["loss"] - without["loss"], added, rtol=1e-3, atol=1e-5)
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
    assert_same_step(one_step("pretrain", model_changes=changes), one_step("pretrain"))


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
    before, after, _ = one_step(name, microbatches=2)
    gradient = jax.tree.map(lambda x, y: x - y, before.models, after.models)
    length = float(optax.global_norm(gradient))
    stage, optimizer, step = tiny_stage(OBJECTIVES[name], microbatches=2), optax.sgd(1.0), 1e-2 / length
    update = jax.jit(algorithm_of(stage).step(stage, optimizer))

    def loss(way):
        models = jax.tree.map(lambda x, g: x + way * step * g / length, before.models, gradient)
        state = type(before)(before.step, models, before.opt_state, before.carry, before.frozen)
        return float(update(state, random_batch())[1]["loss"])

    np.testing.assert_allclose((loss(1) - loss(-1)) / (2 * step), length, rtol=2e-3)


@pytest.mark.slow
def test_padding_changes_no_penalty(monkeypatch):
    report(monkeypatch, COEF)
    batch = random_batch()
    wide = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 8))) if x.shape == batch.tokens.shape else x, batch)
    wide = dataclasses.replace(wide, tokens=jnp.where(wide.segments > 0, wide.tokens, 7))
    assert_same_step(one_step("pretrain", batch=wide), one_step("pretrain", batch=batch))
