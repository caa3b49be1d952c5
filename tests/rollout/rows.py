"""Samples as rows of a batch, made column by column: what `trajectory_batch` makes of trajectories, made otherwise."""

import numpy as np

from lm.types import RolloutBatch, SharedPrompt


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
