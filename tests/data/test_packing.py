"""Rows of fixed length keep every token, number their segments and predict no first token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.data.packing import Example, is_trained, join, left_pad, mismatch, pack, window

PAD = 0
LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=20)


@given(lengths=LENGTHS, seq_len=st.integers(2, 16))
def test_windows_give_back_the_stream_with_segments_by_document(lengths, seq_len):
    bounds = np.cumsum([0, *lengths])
    stream = np.arange(1, bounds[-1] + 1)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    seen = []
    for start in range(0, len(stream), seq_len):
        row = window(stream, bounds, start, seq_len, PAD)
        real = row.segments > 0
        seen += row.tokens[real].tolist()
        mine = owner[start : start + seq_len]
        assert row.segments[real].tolist() == (mine - mine[0] + 1).tolist()
        first = np.r_[True, mine[1:] != mine[:-1]]
        assert (row.weights[real] == ~first).all() and (row.positions[real] == 0).tolist() == first.tolist()
        steps = np.diff(row.positions[real])
        assert (steps[~first[1:]] == 1).all()
        assert (row.tokens[~real] == PAD).all() and not row.weights[~real].any() and not row.positions[~real].any()
    assert seen == stream.tolist()


def test_a_mismatch_is_the_end_of_one_prompt_with_the_other_answer():
    row = join([Example(np.array([5, 6, 7, 8]), np.array([0, 0, 1, 1]))], 7, PAD)
    other = join([Example(np.arange(11, 18), np.array([0, 1, 1, 1, 1, 1, 0]))], 7, PAD)
    mixed = mismatch(row, other, PAD)
    assert mixed.tokens.tolist() == [6, 12, 13, 14, 15, 16, 17]
    assert mixed.weights.tolist() == [0, 1, 1, 1, 1, 1, 0]
    assert mixed.positions.tolist() == list(range(7)) and mixed.segments.tolist() == [1] * 7
    back = mismatch(other, row, PAD)
    assert back.tokens.tolist() == [11, 7, 8, PAD, PAD, PAD, PAD] and back.weights.tolist() == [0, 1, 1, 0, 0, 0, 0]
    empty = join([], 7, PAD)
    assert (
        not mismatch(empty, row, PAD).weights.any() and mismatch(row, empty, PAD).tokens.tolist() == row.tokens.tolist()
    )


def test_join_numbers_segments_and_never_weighs_a_first_token():
    examples = [Example(np.array([5, 6, 7]), np.array([1, 1, 0])), Example(np.array([8, 9]), np.array([1, 1]))]
    row = join(examples, 7, PAD)
    assert row.tokens.tolist() == [5, 6, 7, 8, 9, PAD, PAD]
    assert row.weights.tolist() == [0, 1, 0, 0, 1, 0, 0]
    assert row.segments.tolist() == [1, 1, 1, 2, 2, 0, 0]
    assert row.positions.tolist() == [0, 1, 2, 0, 1, 0, 0]
    assert [a.dtype.name for a in row[:4]] == ["int32", "float32", "int32", "int32"]


@given(lengths=st.lists(st.integers(1, 20), max_size=80), open_rows=st.integers(1, 8))
def test_packing_places_each_example_once_within_the_row(lengths, open_rows):
    rows = pack(lengths, 20, open_rows)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 20 and row == sorted(row) for row in rows)


def test_packing_fills_the_rows():
    lengths = np.random.default_rng(0).integers(5, 120, 2000).tolist()
    rows = pack(lengths, 256)
    assert sum(lengths) / (len(rows) * 256) > 0.95


def test_packing_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="example 1 has 9 tokens"):
        pack([3, 9], 8)


def test_a_first_token_alone_is_nothing_to_train_on():
    tokens, mask = np.arange(6), np.array([1, 0, 0, 0, 1, 1])
    assert is_trained(Example(tokens[:5], mask[:5])) and not is_trained(Example(tokens[:4], mask[:4]))


def test_left_padding():
    tokens, lengths = left_pad([[1, 2, 3], [4]], 4, PAD)
    assert tokens.tolist() == [[0, 1, 2, 3], [0, 0, 0, 4]] and lengths.tolist() == [3, 1]
