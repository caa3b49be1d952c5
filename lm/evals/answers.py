"""Metrics of sampled answers to held-out prompts: reward, KL to the reference, best-of-n and pass@k."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lm.evals.examples import Examples, read_examples, spec_of
from lm.evals.rows import SHOWN, Measured, Subject, mean_of, rounded, rows_at_once
from lm.evals.votes import answer_key, majority_at_k
from lm.experiment import Eval, UserError
from lm.model.transformer import Transformer
from lm.objectives.logprobs import token_logprobs
from lm.parallel.distributed import fetch
from lm.rollout.engine import LocalEngine, Request
from lm.rollout.episodes import Episode, conclude, run_episodes
from lm.rollout.rewards import timeout_metric
from lm.rollout.scores import score_rows
from lm.rollout.trajectory import Trajectory, rewards_of, trajectory_batch
from lm.rollout.verifiers import expected_answer
from lm.types import RolloutBatch


@dataclass(frozen=True)
class Answered:
    """An answer to a held-out row, its reward, and further numbers by name."""

    trajectory: Trajectory
    numbers: dict[str, float]


def reward(item: Eval, subject: Subject) -> Measured:
    """Metric `reward`: mean reward, fraction that ended with the end token, and mean length of answers.

    For answers sampled at temperature 1 also the entropy (nats per token) and, with a reference, the KL (nats per answer, the
    mean of log π - log π_ref over the samples); with reward models their mean score.
    """
    found, timeouts = answers_of(item, subject)
    rewards = [one.trajectory.reward for one in found]
    values = (
        mean_of("reward", rewards)
        | timeout_metric(timeouts)
        | {
            "eos_rate": float(np.mean([one.trajectory.ended for one in found])),
            "length": float(np.mean([one.numbers["length"] for one in found])),
            "distinct_2": distinct_bigrams([one.trajectory.text for one in found]),
        }
    )
    wrong = [one.numbers["length"] for one, score in zip(found, rewards, strict=True) if score < 1]
    if wrong:
        values["length_wrong"] = float(np.mean(wrong))
    tokens = sum(one.numbers["length"] for one in found)
    if "entropy" in found[0].numbers:
        values["entropy"] = sum(one.numbers["entropy"] for one in found) / max(tokens, 1)
    for name in ("kl", "score"):
        if name in found[0].numbers:
            values |= mean_of(name, [one.numbers[name] for one in found])
    return Measured(values, len(found), [_example(one) for one in found[:SHOWN]])


def best_of_n(item: Eval, subject: Subject) -> Measured:
    """Metric `best_of_n`: mean verifier reward of the answer that the reward models score highest, for n = 1, 2, 4, … best_of.

    Averaged over all choices of n of a prompt's answers (as in WebGPT, arXiv:2112.09332). Its KL from the model
    that samples is at most log n - (n - 1)/n (arXiv:2401.01879).
    """
    if not subject.scorers:
        raise UserError(f"evals.{item.name}: best_of_n needs a reward model, and the run has none")
    found, timeouts = answers_of(item, subject, item.best_of)
    count = len(found) // item.best_of

    def table(numbers: list[float]) -> Float[np.ndarray, "P N"]:
        return np.array(numbers).reshape(count, item.best_of)

    scores = table([one.numbers["score"] for one in found])
    rewards = table([one.trajectory.reward for one in found])
    lengths = table([one.numbers["length"] for one in found])
    sizes = [2**k for k in range(item.best_of.bit_length()) if 2**k <= item.best_of]
    values: dict[str, Any] = {"best_of": sizes, "kl_bound": [math.log(n) - (n - 1) / n for n in sizes]}
    values |= timeout_metric(timeouts)
    for name, numbers in (("reward", rewards), ("score", scores), ("length", lengths)):
        means = [mean_of(name, best_of(scores, numbers, n)) for n in sizes]
        values |= {key: [mean[key] for mean in means] for key in means[0]}
    return Measured(values, count)


def pass_at_k(item: Eval, subject: Subject) -> Measured:
    """Metric `pass_at_k`: fraction of prompts with at least one answer of full reward in k, for k = 1, 2, 4, … best_of.

    The unbiased estimate 1 - C(n - c, k) / C(n, k) from c right answers in n (arXiv:2107.03374, eq. 1). Also `best_at_k`, the
    mean of the highest reward among k, and `maj_at_k`, of the most frequent answer among k, for rows with an expected answer. Each
    with its standard error over prompts.
    """
    found, timeouts = answers_of(item, subject, item.best_of)
    rewards = rewards_of([one.trajectory for one in found]).reshape(-1, item.best_of)
    votes = not item.environment and all(expected_answer(one.trajectory.task) for one in found)
    keys = np.array([answer_key(one.trajectory.text) for one in found] if votes else []).reshape(-1, item.best_of)
    sizes = [2**k for k in range(item.best_of.bit_length()) if 2**k <= item.best_of]
    values: dict[str, Any] = timeout_metric(timeouts)
    for k in sizes:
        values |= mean_of(f"pass_at_{k}", chances_of_full_reward(rewards, k))
        values |= mean_of(f"best_at_{k}", best_of(rewards, rewards, k))
        if votes:
            voted = [majority_at_k(given.tolist(), own, k) for given, own in zip(keys, rewards, strict=True)]
            values |= mean_of(f"maj_at_{k}", voted)
    last = {name: f"_{sizes[-1]}".join(name.rsplit("_k", 1)) for name in _AT_K}
    values |= {"k": sizes[-1]} | {name: values[key] for name, key in last.items() if key in values}
    return Measured(values, len(rewards))


def chances_of_full_reward(rewards: Float[np.ndarray, "P N"], k: int) -> list[float]:
    """For each prompt, the chance that at least one of k of its N answers has full reward, over all choices of k."""
    answers = rewards.shape[1]
    right = (rewards >= 1).sum(1).tolist()
    return [1 - math.comb(answers - count, k) / math.comb(answers, k) for count in right]


_AT_K = tuple(f"{kind}_at_k{end}" for kind in ("pass", "best", "maj") for end in ("", "_stderr"))


def best_of(scores: Float[np.ndarray, "P N"], numbers: Float[np.ndarray, "P N"], n: int) -> Float[np.ndarray, " P"]:
    """Expected number of the highest-scored answer among n of each prompt's N, averaged over all choices of n."""
    total = scores.shape[1]
    order = np.argsort(scores, axis=1, kind="stable")
    # The answer of rank i (from 0, by score) is the best of those chosen in C(i, n - 1) of C(N, n) choices.
    chances = np.array([math.comb(i, n - 1) for i in range(total)]) / math.comb(total, n)
    return (np.take_along_axis(numbers, order, axis=1) * chances).sum(axis=1)


def distinct_bigrams(texts: list[str]) -> float:
    """Distinct-2: the fraction of distinct word bigrams over all texts together; 0 where there are none."""
    pairs = [pair for words in map(str.split, texts) for pair in itertools.pairwise(words)]
    return len(set(pairs)) / max(len(pairs), 1)


def answers_of(item: Eval, subject: Subject[Transformer], each: int = 1) -> tuple[list[Answered], int]:
    """Sample `each` answers to every held-out prompt (adjacent), with rewards, and the number of reward timeouts."""
    model, tokenizer = subject.model, subject.tokenizer
    asked = read_examples(item, tokenizer, model.config.max_len)
    engine = LocalEngine(model, tokenizer, layout=subject.layout)
    episodes: list[Episode] = []
    numbers: list[dict[str, float]] = []
    for request, rows, kept in requests_of(item, asked, model.config.max_len, each, subject.seed):
        found = run_episodes(engine, spec_of(item), rows, request, tokenizer)
        episodes += found[:kept]
        numbers += _numbers(item, subject, [one.trajectory({}) for one in found], request.width)[:kept]
    trajectories, timeouts = conclude(spec_of(item), episodes)
    return [Answered(*pair) for pair in zip(trajectories, numbers, strict=True)], timeouts


def requests_of(
    item: Eval, asked: Examples, max_len: int, each: int, seed: int
) -> Iterator[tuple[Request, list[dict[str, Any]], int]]:
    """Requests for `each` answers to all prompts, their rows, and how many of the answers were asked for."""
    width = rounded(max(map(len, asked.encoded)), max_len - item.max_new_tokens)
    at_once = max(1, rows_at_once(len(asked.encoded) * each) // each)
    for start in range(0, len(asked.encoded), at_once):
        part = range(start, min(start + at_once, len(asked.encoded)))
        filled = [*part, *[part[-1]] * (at_once - len(part))]  # a fixed shape compiles once
        key, prompts = jax.random.fold_in(jax.random.key(seed), start), [asked.encoded[i] for i in filled]
        request = Request(prompts, key, item.max_new_tokens, item.temperature, each, width)
        yield request, [asked.rows[i] for i in filled], len(part) * each


def _numbers(item: Eval, subject: Subject, found: list[Trajectory], width: int) -> list[dict[str, float]]:
    """Numbers of each answer: length in tokens and, at temperature 1, entropy, KL and score."""
    numbers = {"length": np.array([one.length for one in found], float)}
    if item.temperature == 1:
        numbers |= _looked_at(subject, trajectory_batch(found, width, item.max_new_tokens, subject.tokenizer.pad_id))
    return [dict(zip(numbers, own, strict=True)) for own in zip(*(x.tolist() for x in numbers.values()), strict=True)]


def _looked_at(subject: Subject, batch: RolloutBatch) -> dict[str, Float[np.ndarray, " B"]]:
    """For each answer: summed entropy, KL to the reference, and the reward models' score."""
    found = _entropy_and_kl(subject.model, subject.reference, batch)
    if subject.scorers:
        found["score"] = score_rows(subject.scorers, batch)
    return fetch(found)


@jax.jit
def _entropy_and_kl(model: Any, reference: Any, batch: RolloutBatch) -> dict[str, Float[Array, " B"]]:
    entropy = token_logprobs(model, batch, want_entropy=True).entropy
    assert entropy is not None
    found = {"entropy": (jnp.where(batch.weights > 0, entropy, 0.0)).sum(1)}
    if reference is not None:
        ref_logp = token_logprobs(reference, batch).logp
        found["kl"] = (jnp.where(batch.weights > 0, batch.old_logp - ref_logp, 0.0)).sum(1)
    return found


def _example(one: Answered) -> dict[str, Any]:
    found = one.trajectory
    said = {"prompt": found.prompt, "answer": found.text, "expected": expected_answer(found.task)}
    proxy = {"score": one.numbers["score"]} if "score" in one.numbers else {}
    return said | {"reward": found.reward} | proxy
