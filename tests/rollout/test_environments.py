"""A rollout asks until its batch is full of groups that teach something; a sampler of its own is known to the trainer."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from lm.data.curriculum import arithmetic_row
from lm.data.tokenizer import Tokenizer
from lm.experiment import GRPO, Experiment, Source
from lm.model.transformer import Transformer
from lm.objectives.logprobs import token_logprobs
from lm.optimizer import make_optimizer
from lm.parallel.mesh import make_mesh
from lm.rollout import verifiers
from lm.rollout.environments import fill, has_preference, make_environment, roll_out
from lm.rollout.rounding import rounded
from lm.steps import first_state
from lm.train.rollouts import Rollouts
from tests.helpers import TINY, layout, tiny_stage

GROUP = 4
MODEL = dataclasses.replace(TINY, max_len=80)
FLAT, MIXED = [1.0] * GROUP, [1.0, 0.0] * (GROUP // 2)


@pytest.fixture(scope="module")
def tokenizer():
    texts = [turn["content"] for index in range(200) for turn in arithmetic_row(index)["messages"]]
    return Tokenizer.train(texts, 320)


@pytest.fixture(scope="module")
def model(tokenizer):
    return Transformer(MODEL, tokenizer.vocab_size, jax.random.key(0))


def stage(**changes):
    objective = GRPO("manners", group_size=GROUP, max_new_tokens=6, **changes)
    return tiny_stage(objective, sources=(Source("gen:arithmetic"),), batch_size=4, seq_len=80)


def test_a_batch_is_filled_with_groups_that_have_a_preference_first():
    rewards = np.array([0, 0, 1, 0, 1, 1, 0, 1, 0, 0], np.float32)  # groups of 2: flat, mixed, flat, mixed, flat
    assert has_preference(rewards, 2).tolist() == [False, True, False, True, False]
    assert fill(rewards, 2, 2).tolist() == [2, 3, 6, 7]
    assert fill(rewards, 2, 3).tolist() == [0, 1, 2, 3, 6, 7]
    assert fill(rewards, 2, 5).tolist() == list(range(10))


@pytest.mark.parametrize(
    ("groups", "turns", "useful"),
    [
        ([MIXED] * 4, 1, 4),
        ([FLAT, MIXED] * 2 + [FLAT, FLAT, MIXED, MIXED], 2, 4),
        ([FLAT] * 4 + [MIXED] + [FLAT] * 7, 3, 1),  # as many turns as there may be
    ],
)
def test_prompts_are_asked_until_the_batch_is_full(tokenizer, model, monkeypatch, groups, turns, useful):
    given = itertools.chain(*groups)
    monkeypatch.setitem(verifiers.VERIFIERS, "manners", lambda row, text: next(given))
    one = stage(rollouts=3)
    environment = make_environment(one, tokenizer, seed=0)
    found = roll_out(model, environment, one, tokenizer, 2, jax.random.key(0))
    assert found.metrics["rollouts"] == turns and next(given, None) is None
    assert found.metrics["reward"] == pytest.approx(np.mean(groups))
    assert len(found.batches[0].tokens) == len(found.answers) == len(found.prompts) == 4 * GROUP
    assert has_preference(found.rewards, GROUP).sum() == useful
    moved = found.batches[0].advantages.reshape(4, GROUP, -1)
    assert (np.abs(moved).sum((1, 2)) > 0).sum() == useful
    # Every answer is to the prompt of its row, whichever turn asked it.
    rows = [row for turn in range(turns) for row in environment.prompts(2 * 3 + turn).rows]
    assert set(found.prompts) <= {row["question"] for row in rows}
    assert found.prompts == [prompt for prompt in found.prompts[::GROUP] for _ in range(GROUP)]


def test_a_sampler_of_its_own_is_weighed_by_what_the_trainer_thinks(tokenizer, model):
    one = stage(sampler="int4", sampler_cap=2.0)
    experiment = Experiment("tiny", (one,), model=MODEL)
    mesh = make_mesh(layout())
    with jax.set_mesh(mesh):
        rollouts = Rollouts(experiment, 0, tokenizer, mesh)
        state = first_state(one, make_optimizer(one.optimizer, 10), model)
        (batch,), _ = jax.device_get(rollouts(0, state))
    logprobs = jax.jit(lambda policy, batch: token_logprobs(policy, batch).logp * batch.weights)
    for policy, said in ((model, batch.old_logp), (rounded(model, "int4"), batch.sampler_logp)):
        np.testing.assert_allclose(said, logprobs(policy, batch), atol=1e-4)
    assert np.abs(batch.old_logp - batch.sampler_logp).max() > 1e-3
