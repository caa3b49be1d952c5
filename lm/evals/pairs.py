"""Accuracy on held-out preference pairs: of a language model's implicit reward, or of a reward model's score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from lm.data.chat import is_tie
from lm.data.pipeline import heldout_rows
from lm.data.tokens import store_in_memory
from lm.evals.rows import SHOWN, Measured, Row, Subject, last_turn, rounded, row_logp, row_scores
from lm.experiment import Eval, UserError
from lm.model.scorer import Scorer


class Scored(NamedTuple):
    """Pairs that were scored: their rows, by how much the chosen answer is liked better and is longer (tokens).

    `cut`: how many lost the beginning of their prompt, as in training; `left_out`: how many had equal or empty answers, or no
    room for one; `ties`: in how many nobody chose.
    """

    rows: list[dict[str, Any]]
    gaps: Float[np.ndarray, " N"]
    longer: Float[np.ndarray, " N"]
    cut: int
    left_out: int
    ties: int


def score_pairs(rows: Sequence[dict[str, Any]], wheres: Sequence[str], subject: Subject) -> Scored:
    """The gap of rewards in each pair; one that is longer than the context is cut as a preference stage cuts it.

    Of a language model the reward is implicit, log π(y) - log π_ref(y) (DPO, arXiv 2305.18290, eq. 5); a reward model says
    it.
    """
    most, both = subject.model.config.max_len, np.arange(2)
    kept, sides, ties, cut = [], [], 0, 0
    for row, where in zip(rows, wheres, strict=True):
        if is_tie(row, where):
            ties += 1
            continue
        store = store_in_memory([(row, where)], "pairs", subject.tokenizer)
        assert store.flaws is not None
        pair = [(side.tokens.tolist(), side.mask.tolist()) for side in store.ends(both, most)]
        if store.flaws.any() or not all(any(mask[1:]) for _, mask in pair):
            continue
        kept.append(row)
        sides += pair
        cut += int(store.lengths.max() > most)
    left_out = len(rows) - ties - len(kept)
    if not kept:
        return Scored([], np.zeros(0), np.zeros(0), cut, left_out, ties)
    rewards = _rewards(subject, sides, rounded(max(len(ids) for ids, _ in sides), most))
    lengths = np.array([sum(mask) for _, mask in sides], np.float64)
    return Scored(kept, rewards[0::2] - rewards[1::2], lengths[0::2] - lengths[1::2], cut, left_out, ties)


def pair_accuracy(item: Eval, subject: Subject) -> Measured:
    """How often the chosen answer has the higher reward; a tie counts half.

    A reward model is held against taking the longer answer.
    """
    rows = heldout_rows(item.source, item.count)
    found = score_pairs(rows, [item.source.path] * len(rows), subject)
    if not found.rows:
        raise UserError(
            f"evals.{item.name}: none of {len(rows)} held-out pairs can be compared in model.max_len "
            f"{subject.model.config.max_len}"
        )
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
