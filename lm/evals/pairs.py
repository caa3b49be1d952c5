"""Accuracy on held-out preference pairs: of a language model's implicit reward, or of a reward model's score."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from lm.data.chat import preference_messages, render
from lm.data.pipeline import heldout_rows
from lm.evals.rows import SHOWN, Measured, Row, Subject, last_turn, rounded, row_logp, row_scores
from lm.experiment import Eval, UserError
from lm.model.scorer import Scorer


def pair_accuracy(item: Eval, subject: Subject) -> Measured:
    """How often the chosen answer has the higher reward; a tie counts half.

    Of a language model the reward is implicit, log π(y) - log π_ref(y) (DPO, arXiv 2305.18290, eq. 5); a reward model says
    it, and is held against taking the longer answer. Pairs that do not fit in the context are left out, and not counted.
    """
    most = subject.model.config.max_len
    rows, sides = [], []
    for row in heldout_rows(item.source, item.count):
        if row.get("tie"):
            continue  # nobody chose
        turns = preference_messages(row, item.source.path)
        rendered = [render(side, subject.tokenizer) for side in turns]
        pair = [(tokens, last_span(mask)) for tokens, mask in rendered]
        if max(len(ids) for ids, _ in pair) <= most:
            rows.append(row)
            sides += pair
    if not rows:
        raise UserError(f"evals.{item.name}: no held-out pair fits in model.max_len {most}")
    width = rounded(max(len(ids) for ids, _ in sides), most)
    rewards = _rewards(subject, sides, width)
    margin = rewards[0::2] - rewards[1::2]
    examples = [
        {"prompt": last_turn(row), "chosen": text(row["chosen"]), "rejected": text(row["rejected"]), "margin": float(m)}
        for row, m in zip(rows[:SHOWN], margin, strict=False)
    ]
    values = {"pair_accuracy": share_right(margin), "margin": float(margin.mean())}
    if isinstance(subject.model, Scorer):
        lengths = np.array([sum(mask) for _, mask in sides], np.float64)
        values["longer_accuracy"] = share_right(lengths[0::2] - lengths[1::2])
    return Measured(values, len(rows), examples)


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
