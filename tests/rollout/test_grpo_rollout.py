"""A rollout asks until its batch is full of groups that teach something; a sampler of its own is known to the trainer."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.algorithms import ALGORITHMS
from lm.algorithms.grpo import fill, grpo_rollout, grpo_sample, has_preference
from lm.algorithms.state import first_state
from lm.data.curriculum import arithmetic_row
from lm.data.tokenizer import SubwordTokenizer
from lm.experiment import GRPO, Experiment, LoRA, Source, UserError
from lm.model.transformer import Transformer
from lm.objectives.advantages import group_advantages
from lm.objectives.logprobs import token_logprobs
from lm.optimizer import make_optimizer
from lm.parallel.mesh import make_mesh
from lm.rollout import verifiers
from lm.rollout.engine import LocalEngine
from lm.rollout.episodes import make_tasks
from lm.rollout.rounding import rounded
from lm.rollout.trajectory import rewards_of
from lm.train.rollouts import RolloutBatches
from tests.helpers import TINY, layout, tiny_stage, with_moved_adapter

GROUP = 4
MODEL = dataclasses.replace(TINY, max_len=80)
FLAT, MIXED = [1.0] * GROUP, [1.0, 0.0] * (GROUP // 2)


@pytest.fixture(scope="module")
def tokenizer():
    texts = [turn["content"] for index in range(200) for turn in arithmetic_row(index)["messages"]]
    return SubwordTokenizer.train(texts, 320)


@pytest.fixture(scope="module")
def model(tokenizer):
    return Transformer(MODEL, tokenizer.vocab_size, jax.random.key(0))


def stage(**changes):
    objective = GRPO("style", group_size=GROUP, max_new_tokens=6, **changes)
    return tiny_stage(objective, sources=(Source("gen:arithmetic"),), batch_size=4, seq_len=80)


def test_a_batch_is_filled_with_groups_that_have_a_preference_first():
    rewards = np.array([0, 0, 1, 0, 1, 1, 0, 1, 0, 0], np.float32)  # groups of 2: flat, mixed, flat, mixed, flat
    assert has_preference(rewards, 2).tolist() == [False, True, False, True, False]
    assert fill(rewards, 2, 2).tolist() == [2, 3, 6, 7]
    assert fill(rewards, 2, 3).tolist() == [0, 1, 2, 3, 6, 7]
    assert fill(rewards, 2, 5).tolist() == list(range(10))


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_has_a_preference_where_it_has_advantages(scale):
    """Missing rewards, whole numbers, and differences that float32 does not hold."""
    nan = np.nan
    rows = [[nan, 0, 1, 1], [nan, nan, 1, 1], [nan] * 4, [nan, nan, nan, 1], [0, 0, 0, 1], [5, 5, 5, 5]]
    close = [[1.0, 1.0 + 1e-12, 1.0, 1.0], [2.0**24, 2.0**24 + 1, 2.0**24, 2.0**24]]
    whole = np.array([[0, 0, 0, 1], [7, 7, 7, 7], [2**24, 2**24 + 1, 2**24, 2**24]])
    for rewards in (np.array(rows + close), np.array(rows, np.float32), whole, whole.astype(np.int8)):
        advantages, _ = group_advantages(jnp.asarray(rewards.reshape(-1)), 4, scale=scale)
        assert advantages.dtype == jnp.float32 and np.isfinite(advantages).all()
        moved = (np.asarray(advantages).reshape(-1, 4) != 0).any(1)
        np.testing.assert_array_equal(has_preference(rewards.reshape(-1), 4), moved)
    assert has_preference(np.array([nan, 0, 1, 1]), 4).tolist() == [True]


@pytest.mark.slow
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
    monkeypatch.setitem(verifiers.VERIFIERS, "style", lambda row, text: next(given))
    one = stage(rollouts=3)
    tasks = make_tasks(one, tokenizer, seed=0)
    sampled = grpo_sample(LocalEngine(model, tokenizer), {}, tasks, one, 2, jax.random.key(0), None)
    found = grpo_rollout(sampled, None, tasks, one, 2, jax.random.key(0), None)
    assert found.metrics["rollouts"] == turns and next(given, None) is None
    assert found.metrics["reward"] == pytest.approx(np.mean(groups))
    assert len(found.batches[0].tokens) == len(found.chosen) == 4 * GROUP
    assert len(found.trajectories) == len(found.advantages) == turns * 4 * GROUP  # all that were sampled
    chosen = [found.trajectories[i] for i in found.chosen]
    assert has_preference(rewards_of(chosen), GROUP).sum() == useful
    moved = found.batches[0].advantages.reshape(4, GROUP, -1)
    assert (np.abs(moved).sum((1, 2)) > 0).sum() == useful
    # Every answer is to the prompt of its row, whichever turn asked it.
    rows = [row for turn in range(turns) for row in tasks.feed.batch(2 * 3 + turn).rows]
    prompts = [one.prompt for one in chosen]
    assert set(prompts) <= {row["question"] for row in rows}
    assert prompts == [prompt for prompt in prompts[::GROUP] for _ in range(GROUP)]


@pytest.mark.slow
def test_a_sampler_of_its_own_is_weighed_by_what_the_trainer_thinks(tokenizer, model):
    one = stage(sampler="int4", tis_clip=2.0)
    experiment = Experiment("tiny", (one,), model=MODEL)
    mesh = make_mesh(layout())
    with jax.set_mesh(mesh):
        rollouts = RolloutBatches(experiment, 0, tokenizer, mesh)
        state = first_state(one, make_optimizer(one.optimizer, 10), model)
        (batch,), _ = jax.device_get(rollouts(0, state))
    logprobs = jax.jit(lambda policy, batch: token_logprobs(policy, batch).logp * batch.weights)
    for policy, said in ((model, batch.old_logp), (rounded(model, "int4"), batch.sampler_logp)):
        np.testing.assert_allclose(said, logprobs(policy, batch), atol=1e-4)
    assert np.abs(batch.old_logp - batch.sampler_logp).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("merge", [False, True])
def test_a_sampler_with_an_adapter_agrees_with_the_trainer(tokenizer, model, merge):
    one = dataclasses.replace(stage(), lora=LoRA(rank=2, dora=True, merge_for_sampling=merge))
    mesh = make_mesh(layout())
    with jax.set_mesh(mesh):
        rollouts = RolloutBatches(Experiment("tiny", (one,), model=MODEL), 0, tokenizer, mesh)
        state = first_state(one, make_optimizer(one.optimizer, 10), model)
        moved = with_moved_adapter(model, one.lora, 1)
        _, metrics = rollouts(0, dataclasses.replace(state, models={"policy": moved}))
    assert metrics["sampler_gap_max"] < 1e-4


def rollouts_of(tokenizer, mesh, **changes):
    one = stage(**changes)
    value = Experiment("tiny", (one,), model=dataclasses.replace(MODEL, compute_dtype="bfloat16"))
    return RolloutBatches(value, 0, tokenizer, mesh)


def state_of(rollouts, tokenizer):
    narrow = Transformer(dataclasses.replace(MODEL, compute_dtype="bfloat16"), tokenizer.vocab_size, jax.random.key(0))
    return first_state(rollouts.stage, make_optimizer(rollouts.stage.optimizer, 10), narrow)


def wrong_sampler(monkeypatch):
    """RolloutBatches whose log-probabilities are another policy's."""

    def rollout(*args):
        found = grpo_rollout(*args)
        noise = np.random.default_rng(0).normal(size=found.batches[0].weights.shape).astype(np.float32)
        off = [batch.sampler_logp + 0.1 * noise * batch.weights for batch in found.batches]
        batches = [dataclasses.replace(b, sampler_logp=x, old_logp=x) for b, x in zip(found.batches, off, strict=True)]
        return dataclasses.replace(found, batches=batches)

    monkeypatch.setitem(ALGORITHMS, GRPO, dataclasses.replace(ALGORITHMS[GRPO], rollout=rollout))


@pytest.mark.parametrize("temperature", [pytest.param(0.1, marks=pytest.mark.slow), 1.0])
def test_a_right_sampler_in_bfloat16_is_reported_and_passes(tokenizer, temperature):
    mesh = make_mesh(layout())
    with jax.set_mesh(mesh):
        rollouts = rollouts_of(tokenizer, mesh, temperature=temperature, updates_per_rollout=2)
        (one, two), metrics = rollouts(0, state_of(rollouts, tokenizer))
    assert 0 < metrics["sampler_gap_mean"] <= metrics["sampler_gap_p99"] <= metrics["sampler_gap_max"]
    np.testing.assert_array_equal(one.sampler_logp, one.old_logp)
    assert len(one.tokens) == len(two.tokens)
    assert rollouts.notes == {} and rollouts.agreement.holds


@pytest.mark.slow
def test_a_sampler_of_another_policy_is_refused_and_told_how_to_correct_for_it(tokenizer, monkeypatch):
    mesh = make_mesh(layout())
    with jax.set_mesh(mesh):
        rollouts = rollouts_of(tokenizer, mesh)
        state = state_of(rollouts, tokenizer)
        rollouts(0, state)
        wrong_sampler(monkeypatch)
        with pytest.raises(
            UserError, match=r"tiny: the sampler's log-probabilities .* in bfloat16 .*\.tis_clip 2"
        ) as told:
            rollouts(1, state)  # at any step, not at the first alone
        assert "\n" not in str(told.value)
        corrected = rollouts_of(tokenizer, mesh, tis_clip=2.0)
        (batch,), _ = corrected(0, state_of(corrected, tokenizer))
    assert "importance weights up to 2" in corrected.notes["sampler_gap"]
    assert jnp.abs(batch.old_logp - batch.sampler_logp).max() > 0.1
