"""Fields of GRPO that a rollout reads: several rewards, their combination, truncated completions, KL in the reward."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.algorithms.grpo import grpo_rollout, grpo_sample
from lm.data.curriculum import arithmetic_row
from lm.data.tokenizer import SubwordTokenizer
from lm.experiment import GRPO, Source
from lm.model.transformer import Transformer
from lm.objectives.advantages import completion_advantages
from lm.parallel.mesh import make_mesh
from lm.parallel.rules import batch_sharding
from lm.rollout import verifiers
from lm.rollout.engine import LocalEngine
from lm.rollout.episodes import make_tasks
from tests.helpers import TINY, layout, tiny_stage

GROUP, PROMPTS = 4, 4


@pytest.fixture(scope="module")
def tokenizer():
    texts = [turn["content"] for index in range(200) for turn in arithmetic_row(index)["messages"]]
    return SubwordTokenizer.train(texts, 320)


@pytest.fixture(scope="module")
def model(tokenizer):
    return Transformer(dataclasses.replace(TINY, max_len=80), tokenizer.vocab_size, jax.random.key(0))


@pytest.fixture
def roll(tokenizer, model, monkeypatch):
    """Two verifiers of the completion's letters, and a rollout with changed fields."""
    monkeypatch.setitem(verifiers.VERIFIERS, "style", lambda row, text: float(len(text) % 5))
    monkeypatch.setitem(verifiers.VERIFIERS, "helpful", lambda row, text: float(text.count("e")))

    def run(reference: Transformer | None = None, **changes):
        o = GRPO("style", group_size=GROUP, max_new_tokens=6, **changes)
        stage = tiny_stage(o, sources=(Source("gen:arithmetic"),), batch_size=PROMPTS, seq_len=80)
        mesh = make_mesh(layout())
        with jax.set_mesh(mesh):
            state = types.SimpleNamespace(models={"policy": model}, frozen={"reference": reference})
            tasks = make_tasks(stage, tokenizer, seed=0)
            place = batch_sharding(mesh)
            sampled = grpo_sample(LocalEngine(model, tokenizer), {}, tasks, stage, 0, jax.random.key(0), place)
            return grpo_rollout(sampled, state, tasks, stage, 0, jax.random.key(0), place), o

    return run


def columns(rollout) -> np.ndarray:
    texts = [one.text for one in rollout.trajectories]
    return np.array([[len(text) % 5, text.count("e")] for text in texts], np.float32)


CHOICES = {
    "sum": {"verifiers": ("style", "helpful")},
    "weights": {"verifiers": ("style", "helpful"), "reward_weights": (0.5, 2.0)},
    "decoupled": {"verifiers": ("style", "helpful"), "reward_combination": "decoupled", "whiten_advantages": True},
    "clip": {"verifiers": ("style", "helpful"), "reward_clip": (1.0, 3.0)},
    "leave_one_out": {"baseline": "leave_one_out", "advantage_scale": "none"},
    "batch": {"advantage_scale": "batch"},
    "whiten": {"baseline": "none", "advantage_scale": "none", "whiten_advantages": True},
}


@pytest.mark.slow
def test_advantages_are_those_of_the_fields(roll):
    found = {}
    for name, changes in CHOICES.items():
        rollout, o = roll(**changes)
        rewards = columns(rollout)[:, : len(o.verifiers) or 1]
        wanted, _ = completion_advantages(jnp.asarray(rewards), o)
        np.testing.assert_array_equal(rollout.advantages, wanted, err_msg=name)
        weighted = (rewards * (o.reward_weights or 1.0)).sum(1)
        assert [one.reward for one in rollout.trajectories] == weighted.tolist()
        for place, verifier in enumerate(o.verifiers):
            assert rollout.metrics[f"reward_{verifier}"] == pytest.approx(rewards[:, place].mean())
            assert [one.rewards[verifier] for one in rollout.trajectories] == rewards[:, place].tolist()
        found[name] = rollout.advantages
    assert len({advantages.tobytes() for advantages in found.values()}) == len(CHOICES)  # each is another


@pytest.mark.slow
def test_truncated_completions_are_not_trained_on(roll):
    plain, dropped = (roll(drop_truncated=drop)[0] for drop in (False, True))
    ended = np.array([one.ended for one in plain.trajectories])
    assert not ended.all()
    np.testing.assert_array_equal(dropped.batches[0].weights, plain.batches[0].weights * ended[:, None])


def test_the_kl_is_taken_off_the_reward(roll, model, tokenizer):
    other = Transformer(dataclasses.replace(TINY, max_len=80), tokenizer.vocab_size, jax.random.key(1))
    fields = {"kl_coef": 0.5, "kl_in": "reward", "kl_estimator": "k1", "baseline": "none", "advantage_scale": "none"}
    same, _ = roll(model, **fields)
    np.testing.assert_allclose(same.advantages, columns(same)[:, 0], atol=1e-4)
    away, o = roll(other, **fields)
    penalty = columns(away)[:, 0] - away.advantages
    assert np.abs(penalty).max() > 0.01
    assert penalty.mean() == pytest.approx(o.kl_coef * away.metrics["kl"], rel=1e-4)
