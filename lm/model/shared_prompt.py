"""Shared prompts: the hidden states of a prompt are computed once for all adjacent rows that start with it.

No token of a prompt attends to an answer, so its hidden states are the same in all rows of its group, and the gradients of
the rows add up. A folded row is a prompt and all its answers, [prompt | answer 1 | … | answer G]; only attention
has to know that the answers do not attend to each other.

Shapes: B rows = P prompts · G answers of each; T = S tokens of the prompt + A of the answer; L = S + G·A.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lm.experiment import Layer, Model
from lm.model.attention import attention_of
from lm.parallel.rules import platform, split_ways
from lm.types import SharedPrompt, TokenBatch


def usable(batch: TokenBatch, config: Model) -> SharedPrompt | None:
    """The shared prompt of a batch, if computing it once is possible and faster, else None.

    It applies to the rows of one device, which may have only a part of a group, as may a microbatch. It is not used on TPUs,
    whose kernel needs plain rows, nor if rows are split over devices.
    """
    if platform() == "tpu" or config.attention == "splash":
        return None
    rows, length = batch.tokens.shape
    group = math.gcd(rows // split_ways(rows, "batch"), batch.shared.rows)
    whole = split_ways(length, "length") == 1
    return SharedPrompt(group, batch.shared.tokens) if group > 1 and whole else None


def common_width(batch: TokenBatch) -> int:
    """Number of prompt columns without weight at the start of every row; 0 if rows are split over devices."""
    return 0 if split_ways(batch.tokens.shape[1], "length") > 1 else batch.shared.tokens


def fold(x: Int[Array, "B T"], shared: SharedPrompt) -> Int[Array, "P L"]:
    """Fold rows: each prompt once, followed by all its answers."""
    groups = x.reshape(-1, shared.rows, x.shape[1])
    answers = groups[:, :, shared.tokens :].reshape(len(groups), -1)
    return jnp.concatenate([groups[:, 0, : shared.tokens], answers], axis=1)


def predicting(hidden: Float[Array, "P L D"], shared: SharedPrompt) -> Float[Array, "B A D"]:
    """Hidden states that predict the answer tokens: each one's predecessor, for the first the prompt's last token."""
    prompts, _, width = hidden.shape
    answers = hidden[:, shared.tokens :].reshape(prompts, shared.rows, -1, width)
    last = jnp.broadcast_to(hidden[:, None, shared.tokens - 1 : shared.tokens], (prompts, shared.rows, 1, width))
    return jnp.concatenate([last, answers[:, :, :-1]], axis=2).reshape(prompts * shared.rows, -1, width)


def shared_attention_of(
    config: Model, layer: Layer, positions: Int[Array, "P L"], segments: Int[Array, "P L"], shared: SharedPrompt
) -> Callable[[Array, Array, Array], Array]:
    """Attention function for folded rows: prompts attend to themselves, answers to their prompt and themselves."""
    size = shared.tokens
    of_prompts = attention_of(config, layer, positions[:, :size], segments[:, :size])
    row_positions, row_segments = (_rows(x[:, None, :, None], shared)[:, 0, :, 0] for x in (positions, segments))
    of_answers = attention_of(config, layer, row_positions, row_segments, first=size)

    def attention(q: Array, k: Array, v: Array) -> Float[Array, "P H L K"]:
        prompts = of_prompts(*(x[:, :, :size] for x in (q, k, v)))
        answers = of_answers(_answers(q, shared), _rows(k, shared), _rows(v, shared))
        prompts_by_heads, width = prompts.shape[:2], prompts.shape[-1]
        folded = jnp.moveaxis(answers.reshape(len(q), shared.rows, *answers.shape[1:]), 1, 2)
        return jnp.concatenate([prompts, folded.reshape(*prompts_by_heads, -1, width)], axis=2)

    return attention


def _answers(x: Float[Array, "P N L K"], shared: SharedPrompt) -> Float[Array, "B N A K"]:
    """The answers of folded rows, one row each."""
    prompts, heads, _, width = x.shape
    groups = x[:, :, shared.tokens :].reshape(prompts, heads, shared.rows, -1, width)
    return jnp.moveaxis(groups, 2, 1).reshape(prompts * shared.rows, heads, -1, width)


def _rows(x: Float[Array, "P N L K"], shared: SharedPrompt) -> Float[Array, "B N T K"]:
    """Unfolded rows: the prompt repeated before every answer."""
    return jnp.concatenate([jnp.repeat(x[:, :, : shared.tokens], shared.rows, axis=0), _answers(x, shared)], axis=2)
