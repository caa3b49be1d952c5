"""Accuracy on held-out preference pairs: of a language model's implicit reward, or of a reward model's score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from lm.data.chat import is_tie, preference_messages, render
from lm.data.pipeline import heldout_rows
from lm.evals.rows import SHOWN, Measured, Row, Subject, last_turn, rounded, row_logp, row_scores
from lm.experiment import Eval, UserError
from lm.model.scorer import Scorer


class Scored(NamedTuple):
    """Pairs that fit in the context: their rows, by how much the chosen answer is liked better and is longer (tokens).

    `left_out`: how many did not fit; `ties`: in how many nobody chose.
    """

    rows: list[dict[str, Any]]
    gaps: Float[np.ndarray, " N"]
    longer: Float[np.ndarray, " N"]
    left_out: int
    ties: int


def score_pairs(rows: Sequence[dict[str, Any]], wheres: Sequence[str], subject: Subject) -> Scored:
    """The gap of rewards in each pair.

    Of a language model the reward is implicit, log π(y) - log π_ref(y) (DPO, arXiv 2305.18290, eq. 5); a reward model says
    it.
    """
    most = subject.model.config.max_len
    kept, sides, ties = [], [], 0
    for row, where in zip(rows, wheres, strict=True):
        if is_tie(row, where):
            ties += 1
            continue
        rendered = [render(side, subject.tokenizer) for side in preference_messages(row, where)]
        pair = [(tokens, last_span(mask)) for tokens, mask in rendered]
        if max(len(ids) for ids, _ in pair) <= most:
            kept.append(row)
            sides += pair
    if not kept:
        return Scored([], np.zeros(0), np.zeros(0), len(rows) - ties, ties)
    rewards = _rewards(subject, sides, rounded(max(len(ids) for ids, _ in sides), most))
    lengths = np.array([sum(mask) for _, mask in sides], np.float64)
    return Scored(
        kept, rewards[0::2] - rewards[1::2], lengths[0::2] - lengths[1::2], len(rows) - ties - len(kept), ties
    )


def pair_accuracy(item: Eval, subject: Subject) -> Measured:
    """How often the chosen answer has the higher reward; a tie counts half.

    A reward model is held against taking the longer answer. Pairs that do not fit in the context are left out, and not
    counted.
    """
    rows = heldout_rows(item.source, item.count)
    found = score_pairs(rows, [item.source.path] * len(rows), subject)
    if not found.rows:
        raise UserError(f"evals.{item.name}: no held-out pair fits in model.max_len {subject.model.config.max_len}")
    examples = [
        {
            "prompt": last_turn(row),
            "chosen": text(row["chosen"]),
            "rejected": text(row["rejected"]),
            "margin": float(gap),
        }
        for row, gap in zip(found.rows[:SHOWN], found.gaps, strict=False)
    ]
    values = {"pair_accuracy": share_right(found.gaps), "margin": float(found.gaps.mean())}
    if isinstance(subject.model, Scorer):
        values["longer_accuracy"] = share_right(found.longer)
    return Measured(values, len(found.rows), examples)


def share_right(margin: Float[np.ndarray, " N"]) -> float:
    """How often a margin is positive; 0 counts half."""
    return float(np.mean((margin > 0) + 0.5 * (margin == 0)))


def _rewards(subject: Subject, sides: list[Row], width: int) -> Float[np.ndarray, " N"]:
    if isinstance(subject.model, Scorer):
        return row_scores(subject.model, sides, width)
    logp = row_logp(subject.model, sides, width)
    return logp - (row_logp(subject.reference, sides, width) if subject.reference is not None else 0.0)


def text(answer: str | list[dict]) -> str:
    """An answer's words."""
    return answer if isinstance(answer, str) else answer[-1]["content"]


def last_span(mask: list[int]) -> list[int]:
    """The last run of ones: of a long conversation, the answer that is compared."""
    end = len(mask) - mask[::-1].index(1)
    start = end
    while start and mask[start - 1]:
        start -= 1
    return [0] * start + [1] * (end - start) + [0] * (len(mask) - end)
