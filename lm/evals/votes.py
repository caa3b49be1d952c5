"""Majority vote over sampled answers: which answers are the same, and how often the vote is right."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from lm.rollout.answer_match import marked_answers, plain, readings
from lm.rollout.quantities import quantity

DRAWS = 1 << 14  # random numbers for one prompt and one k: subsets times answers
LEAST_SUBSETS = 32


def answer_key(text: str) -> str:
    """The given answer of a completion, equal for equal numbers and texts: its last marked answer, else its last line."""
    text = plain(text)
    marked = marked_answers(text)
    lines = [line for line in text.splitlines() if line.strip()]
    found = readings(marked[0] if marked else lines[-1] if lines else "", marked=bool(marked))
    if not found:
        return ""
    number = next(filter(None, map(quantity, found)), None)
    return found[-1].casefold() if number is None else f"{number.value} {number.unit.casefold()}"


def majority_at_k(keys: Sequence[str], rewards: Float[np.ndarray, " N"], k: int) -> float:
    """Expected reward of the most frequent answer among k of a prompt's N, averaged over subsets (maj@k).

    Of answers that are equally frequent each wins with the same probability. Answers without a key never win against
    others. An answer's reward is the mean over the completions that give it. Over all subsets where they are few, else over random ones of a fixed seed, which is unbiased too.
    """
    names = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    member = np.array([names[key] for key in keys])
    if k == 1:
        return float(np.mean(rewards))
    value = np.bincount(member, rewards) / np.bincount(member)
    votes = _votes(member, len(names), k)
    if "" in names:
        votes[(votes.sum(1) > votes[:, names[""]]), names[""]] = 0
    wins = votes == votes.max(1, keepdims=True)
    return float(((wins * value).sum(1) / wins.sum(1)).mean())


def _votes(member: Int[np.ndarray, " N"], classes: int, k: int) -> Int[np.ndarray, "S C"]:
    """For each subset of k answers the number of votes of each class."""
    size = len(member)
    subsets = max(LEAST_SUBSETS, DRAWS // size)
    if math.comb(size, k) <= subsets:
        order = np.array(list(itertools.combinations(range(size), k)))
    else:
        order = np.argsort(np.random.default_rng(0).random((subsets, size)), axis=1)[:, :k]
    subsets = len(order)
    drawn = member[order] + classes * np.arange(subsets)[:, None]
    return np.bincount(drawn.ravel(), minlength=classes * subsets).reshape(subsets, classes)
