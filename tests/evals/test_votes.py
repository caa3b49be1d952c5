"""pass@k, best@k and maj@k against the average over every subset."""

import itertools
import math

import numpy as np
import pytest

from lm.evals import answers
from lm.evals.answers import best_of
from lm.evals.votes import answer_key, majority_at_k
from lm.experiment import Eval, Source
from lm.rollout.trajectory import Trajectory


def majority(keys, rewards, subset):
    """The reward of the most frequent answer of a subset, by hand."""
    given = [keys[i] for i in subset if keys[i]] or [""]
    most = max(map(given.count, given))
    winners = {key for key in given if given.count(key) == most}
    value = {w: np.mean([r for key, r in zip(keys, rewards, strict=True) if key == w]) for w in winners}
    return np.mean(list(value.values()))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 2, 4, 8, 10, 12])
def test_majority_is_the_mean_over_all_subsets(seed, k):
    rng = np.random.default_rng(seed)
    keys = [("", "7", "8", "9", "10")[i] for i in rng.integers(0, 5, 16)]
    rewards = np.array([float(key == "7") for key in keys])
    every = [majority(keys, rewards, subset) for subset in itertools.combinations(range(16), k)]
    exact = math.comb(16, k) <= 1024
    error = 1e-12 if exact else 5 * np.std(every) / math.sqrt(1024) + 1e-12
    assert majority_at_k(keys, rewards, k) == pytest.approx(np.mean(every), abs=error)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_best_is_the_mean_of_the_largest_over_all_subsets(k):
    rewards = np.random.default_rng(k).integers(0, 4, (5, 6)) / 4.0
    every = [[max(row[i] for i in subset) for subset in itertools.combinations(range(6), k)] for row in rewards]
    np.testing.assert_allclose(best_of(rewards, rewards, k), np.mean(every, axis=1), rtol=1e-12)


def test_the_vote_finds_the_answer_that_most_give():
    keys = ["42", "42", "42", "7", "8", "9"]
    rewards = np.array([1.0, 1, 1, 0, 0, 0])
    values = [majority_at_k(keys, rewards, k) for k in (1, 2, 4, 6)]
    assert values[0] == 0.5 and values[-1] == 1.0 and values == sorted(values)


@pytest.mark.parametrize(
    "same",
    [
        ("The answer is 1,200.", "so\n#### 1200", r"thus \boxed{1200}"),
        (r"Hence \boxed{\frac{1}{2}}", "#### 0.5", "The answer is 1/2"),
        ("#### Paris", "The answer is paris."),
    ],
)
def test_equal_answers_have_the_same_key(same):
    assert len({answer_key(text) for text in same}) == 1


def test_other_answers_and_none_have_other_keys():
    texts = ["#### 12", "#### 13", "#### -12", "#### Paris", ""]
    assert len({answer_key(text) for text in texts}) == len(texts) and answer_key("") == ""


def test_an_eval_has_all_three_by_k_with_their_errors(monkeypatch):
    def answered(reward, text):
        turns = (
            {"role": "user", "content": "?", "author": "prompt"},
            {"role": "assistant", "content": text, "author": "model"},
        )
        none = np.zeros(0, np.int32)
        return answers.Answered(
            Trajectory({"answer": "7"}, turns, none, none, none, "stop", 0, {}, reward), {"length": 1.0}
        )

    found = [answered(1.0, "#### 7")] * 3 + [answered(0.0, "#### 8")] + [answered(0.0, f"#### {n}") for n in range(4)]
    monkeypatch.setattr(answers, "answers_of", lambda item, subject, each: (found, 0))
    item = Eval("it", Source("gen:arithmetic"), metric="pass_at_k", best_of=4, temperature=1.0)
    values = answers.pass_at_k(item, None).values
    assert [values[f"pass_at_{k}"] for k in (1, 2, 4)] == [0.375, 0.5, 0.5]
    assert [values[f"best_at_{k}"] for k in (1, 2, 4)] == [0.375, 0.5, 0.5]
    assert values["maj_at_1"] == 0.375 and values["maj_at_4"] == 0.5 and values["maj_at_2"] == 0.375
    assert all(f"{name}_at_{k}_stderr" in values for name in ("pass", "best", "maj") for k in (1, 2, 4))
    assert values["pass_at_1_stderr"] == pytest.approx(0.375 / math.sqrt(2))
