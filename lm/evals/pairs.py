"""Accuracy on held-out preference pairs: of a language model's implicit reward, or of a reward model's score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from lm.data.chat import preference_messages, said_by
from lm.evals.examples import TIED, encode_pair, read_examples
from lm.evals.rows import SHOWN, Measured, Row, Subject, rounded, row_logp, row_scores
from lm.experiment import Eval
from lm.model.heads import Scorer


class Scored(NamedTuple):
    """Scored pairs: rows, reward gap (chosen less rejected), and length gap in tokens.

    `cut`: number left-truncated, as in training; `left_out`: number with equal or empty answers, or no
    room for one; `ties`: number of ties.
    """

    rows: list[dict[str, Any]]
    gaps: Float[np.ndarray, " N"]
    longer: Float[np.ndarray, " N"]
    cut: int
    left_out: int
    ties: int


def score_pairs(rows: Sequence[dict[str, Any]], wheres: Sequence[str], subject: Subject) -> Scored:
    """Score pairs: the reward gap of each; pairs longer than the context are left-truncated as in preference stages.

    A language model's reward is implicit, log π(y) - log π_ref(y) (DPO, arXiv 2305.18290, eq. 5); a reward model
    gives its score.
    """
    most = subject.model.config.max_len
    kept: list[dict[str, Any]] = []
    sides: list[Row] = []
    ties, cut = 0, 0
    for row, where in zip(rows, wheres, strict=True):
        pair = encode_pair(row, where, subject.tokenizer, most)
        if isinstance(pair, str):
            ties += pair == TIED
            continue
        kept.append(row)
        sides += pair[0]
        cut += pair[1]
    left_out = len(rows) - ties - len(kept)
    if not kept:
        return Scored([], np.zeros(0), np.zeros(0), cut, left_out, ties)
    return Scored(kept, *_gaps(subject, sides), cut, left_out, ties)


def _gaps(subject: Subject, sides: list[Row]) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Reward gap and length gap of every two rows, first less second."""
    most = subject.model.config.max_len
    rewards = _rewards(subject, sides, rounded(max(len(ids) for ids, _ in sides), most))
    lengths = np.array([sum(mask) for _, mask in sides], np.float64)
    return rewards[0::2] - rewards[1::2], lengths[0::2] - lengths[1::2]


def pair_accuracy(item: Eval, subject: Subject) -> Measured:
    """Metric `pair_accuracy`: how often the chosen answer has the higher reward; a tie counts half.

    For a reward model also the baseline that prefers the longer answer.
    """
    found = read_examples(item, subject.tokenizer, subject.model.config.max_len)
    gaps, longer = _gaps(subject, [side for pair in found.encoded for side in pair])
    shown = [
        dict(zip(("prompt", "chosen", "rejected"), texts_of_pair(row), strict=True)) | {"margin": float(gap)}
        for row, gap in zip(found.rows[:SHOWN], gaps, strict=False)
    ]
    values = {"pair_accuracy": share_right(gaps), "margin": float(gaps.mean())}
    if isinstance(subject.model, Scorer):
        values["longer_accuracy"] = share_right(longer)
    return Measured(values, len(found.rows), shown)


def share_right(margin: Float[np.ndarray, " N"]) -> float:
    """Fraction of positive margins; 0 counts half."""
    return float(np.mean((margin > 0) + 0.5 * (margin == 0)))


def _rewards(subject: Subject, sides: list[Row], width: int) -> Float[np.ndarray, " N"]:
    if isinstance(subject.model, Scorer):
        return row_scores(subject.model, sides, width)
    logp = row_logp(subject.model, sides, width)
    return logp - (row_logp(subject.reference, sides, width) if subject.reference is not None else 0.0)


def texts_of_pair(row: dict[str, Any], where: str = "row") -> tuple[str, str, str]:
    """A pair's last prompt turn and the texts of its two answers."""
    chosen, rejected = preference_messages(row, where)
    return said_by(chosen[-2]), said_by(chosen[-1]), said_by(rejected[-1])


def last_span(mask: list[int]) -> list[int]:
    """Keep only the mask's last run of ones: the answer that is compared."""
    end = len(mask) - mask[::-1].index(1)
    start = end
    while start and mask[start - 1]:
        start -= 1
    return [0] * start + [1] * (end - start) + [0] * (len(mask) - end)
