"""The engine's completions as arrays, and as rows of a batch, made column by column: what `trajectory_batch` makes of trajectories, made otherwise."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from lm.rollout.engine import LocalEngine, Request
from lm.types import RolloutBatch, SharedPrompt


class Samples(NamedTuple):
    """Completions, right padded; `mask` is 1 up to and including the end token."""

    tokens: np.ndarray
    logp: np.ndarray
    mask: np.ndarray


def generate(
    model, tokens, lengths, key, temperature=1.0, limits=None, *, max_new_tokens, end_ids, pad_id, group_size=1,
    top_k=0, top_p=1.0, vocab_size=None, slots=0,
):  # fmt: skip
    """The engine's completions of left-padded prompts."""
    tokenizer = SimpleNamespace(end_ids=end_ids, pad_id=pad_id, vocab_size=vocab_size)
    prompts = [row[len(row) - length :] for row, length in zip(np.asarray(tokens), np.asarray(lengths), strict=True)]
    request = Request(
        prompts, key, max_new_tokens, temperature, group_size, tokens.shape[1], top_k, top_p, limits
    )  # fmt: skip
    found = LocalEngine(model, tokenizer, slots=slots).complete(request)
    mask = np.arange(max_new_tokens) < np.array([len(one.tokens) for one in found])[:, None]
    tokens, logp = np.full(mask.shape, pad_id, np.int32), np.zeros(mask.shape, np.float32)
    tokens[mask], logp[mask] = (np.concatenate([getattr(one, name) for one in found]) for name in ("tokens", "logp"))
    return Samples(tokens, logp, mask)


def as_batch(tokens, lengths, samples, advantages, group_size=1):
    """Left-padded prompts with their completions behind them, one row each; only completions have weight."""
    rows, width = tokens.shape
    mask = np.asarray(samples.mask)
    real = np.concatenate([np.arange(width)[None] >= width - lengths[:, None], mask], axis=1)
    weights = np.concatenate([np.zeros((rows, width)), mask], axis=1).astype(np.float32)
    logp = np.concatenate([np.zeros((rows, width)), samples.logp], axis=1).astype(np.float32)
    return RolloutBatch(
        tokens=np.concatenate([tokens, samples.tokens], axis=1).astype(np.int32),
        weights=weights,
        segments=real.astype(np.int32),
        positions=np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32),
        advantages=weights * advantages[:, None].astype(np.float32),
        old_logp=logp,
        sampler_logp=logp,
        shared=SharedPrompt(group_size, width),
    )
