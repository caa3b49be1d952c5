"""Held-out prompts answered: mean reward, how far the answers are from a reference's, and best of n by a reward model."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lm.data.packing import left_pad
from lm.evals.examples import read_examples
from lm.evals.rows import ROWS, SHOWN, Measured, Subject, between_batches, last_turn, mean_of, rounded
from lm.experiment import Eval, UserError
from lm.model.transformer import Transformer
from lm.objectives.logprobs import token_logprobs
from lm.parallel.distributed import fetch
from lm.rollout.environments import as_batch
from lm.rollout.experience import score_rows
from lm.rollout.rewards import Rewards, compute_rewards, timeouts_of
from lm.rollout.sampler import Answer, decode_rows, generate
from lm.types import Batch


@dataclass(frozen=True)
class Answered:
    """A held-out row, an answer to it, and numbers of the answer by name."""

    row: dict[str, Any]
    answer: Answer
    numbers: dict[str, float]


def reward(item: Eval, subject: Subject) -> Measured:
    """Mean reward of answers to held-out prompts, how many end by themselves, and how long they are.

    Of answers sampled at temperature 1 also their entropy (nats a token) and, with a reference, its KL (nats an answer, the
    mean of log π - log π_ref over what was sampled); with reward models their mean score.
    """
    found = answers_of(item, subject)
    judged = _rewards(item, found)
    rewards = judged.values.tolist()
    values = (
        mean_of("reward", rewards)
        | timeouts_of(judged)
        | {
            "eos_rate": float(np.mean([one.answer.eos for one in found])),
            "length": float(np.mean([one.numbers["length"] for one in found])),
            "distinct_2": distinct_bigrams([one.answer.text for one in found]),
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
    examples = [_example(one, score) for one, score in zip(found[:SHOWN], rewards, strict=False)]
    return Measured(values, len(found), examples)


def best_of_n(item: Eval, subject: Subject) -> Measured:
    """Mean reward, by the verifier, of the answer that the reward models like best among n, for n = 1, 2, 4, … best_of.

    All ways to take n of a prompt's answers count the same (as in WebGPT, arXiv:2112.09332). Its KL from the model
    that samples is at most log n - (n - 1)/n (arXiv:2401.01879).
    """
    if not subject.scorers:
        raise UserError(f"evals.{item.name}: best_of_n needs a reward model to choose by, and there is none")
    found = answers_of(item, subject, item.best_of)
    count = len(found) // item.best_of

    def table(numbers: list[float]) -> Float[np.ndarray, "P N"]:
        return np.array(numbers).reshape(count, item.best_of)

    scores = table([one.numbers["score"] for one in found])
    judged = _rewards(item, found)
    rewards = table(judged.values.tolist())
    lengths = table([one.numbers["length"] for one in found])
    sizes = [2**k for k in range(item.best_of.bit_length()) if 2**k <= item.best_of]
    values: dict[str, Any] = {"best_of": sizes, "kl_bound": [math.log(n) - (n - 1) / n for n in sizes]}
    values |= timeouts_of(judged)
    for name, numbers in (("reward", rewards), ("score", scores), ("length", lengths)):
        means = [mean_of(name, best_of(scores, numbers, n)) for n in sizes]
        values |= {key: [mean[key] for mean in means] for key in means[0]}
    return Measured(values, count)


def pass_at_k(item: Eval, subject: Subject) -> Measured:
    """The part of the prompts of which at least one answer in k gets the whole reward, for k = 1, 2, 4, … best_of.

    The unbiased estimate 1 - C(n - c, k) / C(n, k) from c right answers in n (arXiv:2107.03374, eq. 1).
    """
    found = answers_of(item, subject, item.best_of)
    judged = _rewards(item, found)
    counts = (judged.values >= 1).reshape(-1, item.best_of).sum(1)
    sizes = [2**k for k in range(item.best_of.bit_length()) if 2**k <= item.best_of]
    values: dict[str, Any] = timeouts_of(judged)
    for k in sizes:
        values |= mean_of(
            f"pass_at_{k}", [1 - math.comb(item.best_of - c, k) / math.comb(item.best_of, k) for c in counts.tolist()]
        )
    last = f"pass_at_{sizes[-1]}"
    values |= {"k": sizes[-1], "pass_at_k": values[last], "pass_at_k_stderr": values[f"{last}_stderr"]}
    return Measured(values, len(counts))


def best_of(scores: Float[np.ndarray, "P N"], numbers: Float[np.ndarray, "P N"], n: int) -> Float[np.ndarray, " P"]:
    """Expected number of the answer with the highest score among n of each prompt's N, all choices of n alike."""
    total = scores.shape[1]
    order = np.argsort(scores, axis=1, kind="stable")
    # The answer of rank i (from 0, by score) is the best of those chosen in C(i, n - 1) of C(N, n) choices.
    chances = np.array([math.comb(i, n - 1) for i in range(total)]) / math.comb(total, n)
    return (np.take_along_axis(numbers, order, axis=1) * chances).sum(axis=1)


def distinct_bigrams(texts: list[str]) -> float:
    """Different pairs of neighbouring words as a part of all, over all texts together; 0 where there are none."""
    pairs = [pair for words in map(str.split, texts) for pair in itertools.pairwise(words)]
    return len(set(pairs)) / max(len(pairs), 1)


def answers_of(item: Eval, subject: Subject, each: int = 1) -> list[Answered]:
    """`each` answers to every held-out prompt, neighbours."""
    model, tokenizer = subject.model, subject.tokenizer
    assert isinstance(model, Transformer)
    room = model.config.max_len - item.max_new_tokens
    asked = read_examples(item, tokenizer, model.config.max_len)
    rows, prompts = asked.rows, asked.encoded
    kept = list(range(len(prompts)))
    width = rounded(max(map(len, prompts)), room)
    at_once = max(1, ROWS // each)
    found = []
    for start in range(0, len(kept), at_once):
        between_batches()
        part = kept[start : start + at_once]
        filled = part + part[-1:] * (at_once - len(part))
        tokens, sizes = left_pad([prompts[i] for i in filled], width, tokenizer.pad_id)
        out = fetch(
            generate(
                model, tokens, sizes, jax.random.fold_in(jax.random.key(subject.seed), start), item.temperature,
                group_size=each, max_new_tokens=item.max_new_tokens, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id,
            )
        )  # fmt: skip
        many, lengths = (np.repeat(x, each, axis=0) for x in (tokens, sizes))
        numbers = {"length": out.mask.sum(1).astype(float)}
        if item.temperature == 1:
            numbers |= _looked_at(subject, as_batch(many, lengths, out, np.zeros(len(out.mask), np.float32)))
        answered = decode_rows(tokenizer, out.tokens, out.mask)
        for place in range(len(part) * each):
            own = {name: float(values[place]) for name, values in numbers.items()}
            found.append(Answered(rows[part[place // each]], answered[place], own))
    return found


def _rewards(item: Eval, found: list[Answered]) -> Rewards:
    """The reward of each answer by the verifier of the evaluation."""
    rows, texts = [one.row for one in found], [one.answer.text for one in found]
    return compute_rewards(item.verifier, rows, texts, f"evals.{item.name}", item.reward_seconds)


def _looked_at(subject: Subject, batch: Batch) -> dict[str, Float[np.ndarray, " B"]]:
    """Sums over each answer: entropy and, against the reference, KL; and the reward models' score."""
    found = _entropy_and_kl(subject.model, subject.reference, batch)
    if subject.scorers:
        found["score"] = score_rows(subject.scorers, batch)
    return fetch(found)


@jax.jit
def _entropy_and_kl(model: Any, reference: Any, batch: Batch) -> dict[str, Float[Array, " B"]]:
    assert batch.old_logp is not None
    entropy = token_logprobs(model, batch, want_entropy=True).entropy
    assert entropy is not None
    found = {"entropy": (jnp.where(batch.weights > 0, entropy, 0.0)).sum(1)}
    if reference is not None:
        ref_logp = token_logprobs(reference, batch).logp
        found["kl"] = (jnp.where(batch.weights > 0, batch.old_logp - ref_logp, 0.0)).sum(1)
    return found


def _example(one: Answered, score: float) -> dict[str, Any]:
    said = {"prompt": last_turn(one.row), "answer": one.answer.text, "expected": str(one.row.get("answer", ""))}
    proxy = {"score": one.numbers["score"]} if "score" in one.numbers else {}
    return said | {"reward": score} | proxy
