"""The tokens of a trajectory with everything that is known of each, as the page of `lm rollouts` shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from lm.data.text_tokenizer import TextTokenizer
from lm.experiment import ObjectiveConfig
from lm.web.text import visible

LONGEST_CHARACTER = 4  # bytes, and so tokens, of a character in UTF-8
BROKEN = "\N{REPLACEMENT CHARACTER}"
MODEL = 1  # in AUTHORS of `lm/rollout/trajectory.py`, which needs jax
Line = dict[str, Any]
Tokens = Float[np.ndarray, " T"]


def describe_tokens(row: Line, o: ObjectiveConfig, tokenizer: TextTokenizer) -> Line:
    """The columns of a trajectory by token; None where a column is unknown, or does not apply to a token.

    `gap` is log π_trainer - log π_sampler before the step's first update, `ratio` the importance ratio that follows at the
    level of the objective, and `clip` -1 or 1 where the ratio is below or above the bounds within which the token has a gradient. `kl`
    estimates KL(π ‖ π_ref) by k3.
    """
    ids = row["tokens"]
    own = np.array(row["authors"]) == MODEL
    logp, trainer, reference = (_floats(row[name]) for name in ("logp", "trainer_logp", "ref_logp"))
    advantages = _floats(row["token_advantages"])
    if advantages is None:
        advantages = np.full(len(ids), row["advantage"])
    gap = ratio = kl = clip = None
    if logp is not None and trainer is not None:
        gap = trainer - logp
        ratio = _ratio(gap, own, getattr(o, "ratio_level", "token"))
        clip = _clipped(ratio, advantages, o)
        if reference is not None:
            kl = np.expm1(reference - trainer) - (reference - trainer)
    names = set(tokenizer.special_ids.values())
    numbers = {
        "logp": logp,
        "trainer": trainer,
        "gap": gap,
        "ratio": ratio,
        "clip": clip,
        "kl": kl,
        "advantage": advantages,
    }
    return {
        "ids": ids,
        "pieces": pieces(ids, tokenizer),
        "special": [token in names for token in ids],
        "authors": row["authors"],
        "version": row["version"],
        **{name: _listed(values, own) for name, values in numbers.items()},
    }


def pieces(ids: Sequence[int], tokenizer: TextTokenizer) -> list[str]:
    """The text that each token adds to those before it; tokens of one character have its text at the last of them."""
    found: list[str] = []
    context = begin = 0  # the token before, or all tokens of the character before; the first token not shown yet
    before = ""
    for place in range(len(ids)):
        text = tokenizer.decode(ids[context : place + 1], specials=True)
        if text.endswith(BROKEN) and place - begin < LONGEST_CHARACTER and place + 1 < len(ids):
            found.append("")
            continue
        found.append(visible(text[len(before) :]))
        context, begin, before = begin, place + 1, tokenizer.decode(ids[begin : place + 1], specials=True)
    return found


def _ratio(gap: Tokens, own: Bool[np.ndarray, " T"], level: str) -> Tokens:
    """The importance ratio of each token, that of the completion at the levels sequence and product."""
    total = gap[own].sum()
    logs = {"sequence": total / max(own.sum(), 1), "product": total}
    return np.exp(np.clip(np.full(len(gap), logs[level]) if level in logs else gap, -80, 80))


def _clipped(ratio: Tokens, advantages: Tokens, o: ObjectiveConfig) -> Tokens:
    """-1 and 1 where the ratio is outside its bounds: those of the importance correction, or of the surrogate where it stops."""
    if o.corrects_sampler:
        low, high = getattr(o, "tis_low", 0.0), getattr(o, "tis_clip", 0.0) or np.inf
        return (ratio > high).astype(float) - (ratio < low)
    low, high = o.ratio_bounds
    return ((ratio > high) & (advantages > 0)).astype(float) - ((ratio < low) & (advantages < 0))


def _floats(values: Sequence[float] | None) -> Tokens | None:
    return None if values is None else np.asarray(values, float)


def _listed(values: Tokens | None, own: Bool[np.ndarray, " T"]) -> list[float | None] | None:
    """Rounded numbers of the tokens that the model sampled, None for other tokens and for what is not finite."""
    if values is None:
        return None
    kept = own & np.isfinite(values)
    return [float(f"{value:.6g}") if keep else None for value, keep in zip(values.tolist(), kept, strict=True)]
