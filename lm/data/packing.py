"""Packing of examples into rows of fixed length: windows over documents, packed conversations, padding.

`weights`, `segments` and `positions` are those of `lm.types.TokenBatch`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float32, Int, Int32


class PackedRow(NamedTuple):
    """One row of a batch; `desirable` is set (1 or 0) for labelled answers, `margins` and `ties` for pairs."""

    tokens: Int32[np.ndarray, " T"]
    weights: Float32[np.ndarray, " T"]
    segments: Int32[np.ndarray, " T"]
    positions: Int32[np.ndarray, " T"]
    desirable: np.float32 | None = None
    margins: np.float32 | None = None
    ties: np.float32 | None = None


class Example(NamedTuple):
    """One tokenised example: token ids and loss mask."""

    tokens: Int[np.ndarray, " N"]
    mask: Int[np.ndarray, " N"]


class Stream(Protocol):
    """A sequence of tokens that can be sliced: an array, or a concatenation of several."""

    def __getitem__(self, where: slice, /) -> Int[np.ndarray, " N"]: ...


def window(stream: Stream, bounds: Int[np.ndarray, " D+1"], start: int, seq_len: int, pad_id: int) -> PackedRow:
    """The row with tokens start … start + seq_len of a stream of documents, padded where the stream ends.

    `bounds[d]` is the start of document d in the stream, `bounds[-1]` the stream's length. Each document has an end-of-text
    token before and after it. Every document in the window is a segment, whose first token in the window has weight 0.
    """
    tokens = np.full(seq_len, pad_id, np.int32)
    segments = np.zeros(seq_len, np.int32)
    positions = np.zeros(seq_len, np.int32)
    piece = stream[start : start + seq_len]
    size = len(piece)
    first, last = np.searchsorted(bounds, [start, start + size - 1], side="right")
    begins = np.maximum(bounds[first - 1 : last] - start, 0)
    lengths = np.diff(begins, append=size)
    tokens[:size] = piece
    segments[:size] = np.repeat(np.arange(1, len(begins) + 1, dtype=np.int32), lengths)
    positions[:size] = np.arange(size) - np.repeat(begins, lengths)
    weights = (positions > 0).astype(np.float32)
    return PackedRow(tokens, weights, segments, positions)


def join(examples: Sequence[Example], seq_len: int, pad_id: int) -> PackedRow:
    """Pack examples into one row, one segment each; they must fit. The first token of each has weight 0."""
    tokens = np.full(seq_len, pad_id, np.int32)
    weights = np.zeros(seq_len, np.float32)
    segments = np.zeros(seq_len, np.int32)
    positions = np.zeros(seq_len, np.int32)
    at = 0
    for number, (ids, mask) in enumerate(examples, start=1):
        here = slice(at, at + len(ids))
        tokens[here], weights[here], segments[here] = ids, mask, number
        positions[here] = np.arange(len(ids))
        weights[at : at + 1] = 0.0
        at += len(ids)
    return PackedRow(tokens, weights, segments, positions)


def mismatch(row: PackedRow, other: PackedRow, pad_id: int) -> PackedRow:
    """The mismatched row for KTO's baseline: this row's prompt with the other row's answer.

    The prompt is all tokens before the first with a weight; a prompt that does not fit is
    left-truncated. If either row has no weight, the row itself is returned.
    """
    if not row.weights.any() or not other.weights.any():
        return row._replace(desirable=None)
    answer = slice(int(np.argmax(other.weights > 0)), int((other.segments > 0).sum()))
    room, end = len(row.tokens) - (answer.stop - answer.start), int(np.argmax(row.weights > 0))
    prompt = slice(max(0, end - room), end)
    tokens = np.concatenate([row.tokens[prompt], other.tokens[answer]])
    mask = np.concatenate([row.weights[prompt], other.weights[answer]])
    return join([Example(tokens, mask)], len(row.tokens), pad_id)


def is_trained(example: Example) -> bool:
    """Whether the loss covers any token (the first is never predicted and does not count)."""
    return bool(np.any(example.mask[1:]))


def pack(lengths: Sequence[int], seq_len: int, open_rows: int = 32) -> list[list[int]]:
    """Pack examples greedily; returns the indices of each row's examples. Every example is in exactly one row, in order.

    Each example goes into the fullest open row that has room, else into a new one. When more than `open_rows` rows are
    open, the fullest is closed. No length may exceed seq_len.
    """
    rows: list[list[int]] = []
    # Open rows as (tokens left, row number) in one integer, sorted: fullest first, then oldest.
    width = len(lengths).bit_length()
    left: list[int] = []
    for example, length in enumerate(lengths):
        if length > seq_len:
            raise ValueError(f"example {example} has {length} tokens, more than a row of {seq_len}")
        place = bisect_left(left, length << width)
        if place < len(left):
            packed = left.pop(place)
            rows[packed & ((1 << width) - 1)].append(example)
            insort(left, packed - (length << width))
        else:
            insort(left, (seq_len - length) << width | len(rows))
            rows.append([example])
        if len(left) > open_rows:
            del left[0]
    return rows


def left_pad(
    prompts: Sequence[Sequence[int]], width: int, pad_id: int
) -> tuple[Int32[np.ndarray, "B P"], Int32[np.ndarray, " B"]]:
    """Prompts right-aligned in [B, width], and their lengths; they must fit."""
    tokens = np.full((len(prompts), width), pad_id, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    return tokens, np.array([len(prompt) for prompt in prompts], np.int32)
