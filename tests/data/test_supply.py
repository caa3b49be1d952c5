"""Rows from the cache are those that the whole text in memory gives."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lm.data import chat, packing
from lm.data.curriculum.draw import mix64
from lm.data.order import permutation, permute
from lm.data.selection import order_key
from lm.data.sources import load_rows, split_rows
from lm.data.supply import Order, conversations, pairs, windows
from lm.data.tokens import store_in_memory

KEY = order_key(3, "here", 0)
SEQ_LEN = 64


@pytest.mark.parametrize("length", [1, 2, 7, 1000, 4096, 4097])
@pytest.mark.parametrize("key", [0, 5, 2**64 - 1, KEY])
def test_the_order_of_all_places_at_once_is_that_of_each(length, key):
    assert permutation(length, key).tolist() == [permute(place, length, key) for place in range(length)]


def write(folder, rows):
    """Two files in a folder, so that the order of files matters too."""
    for number, name in enumerate(("a.jsonl", "b.jsonl")):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows[number::2]))
    return str(folder)


def same(row, expected):
    assert row.desirable is None and expected.desirable is None
    for a, b in zip(row[:4], expected[:4], strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


@pytest.mark.parametrize("count", [1, 120])
def test_windows_are_cut_from_all_documents_end_to_end(tmp_path, tokenizer, count):
    rows = load_rows(write(tmp_path, [{"text": f"text {i} " + "so on " * (i % 40)} for i in range(2 * count)]))
    train, heldout = split_rows(rows, 0.0 if count == 1 else 0.2)
    for indices, order in ((train, Order(KEY)), (heldout, Order(None))):
        if not len(indices):
            continue
        shuffled = [indices[order.place(0, i, len(indices))] for i in range(len(indices))]
        documents = [[tokenizer.pad_id, *tokenizer.encode(rows[i]["text"]), tokenizer.pad_id] for i in shuffled]
        stream, bounds = np.concatenate(documents), np.cumsum([0, *map(len, documents)])
        total = len(stream)
        number = -(-total // SEQ_LEN)
        if order.key is not None:
            stream = np.concatenate([stream, stream[:SEQ_LEN]])
            bounds = np.append(bounds, len(stream))
        supply = windows(rows, indices, SEQ_LEN, tokenizer, order)
        assert supply.rows == number and supply.tally.tokens == total
        for epoch in range(3 if order.key is not None else 1):
            for place in range(number):
                start = order.place(epoch, place, number) * SEQ_LEN
                if order.key is not None:
                    start = (start + mix64(order.key ^ mix64(epoch)) % SEQ_LEN) % total
                expected = packing.window(stream, bounds, start, SEQ_LEN, tokenizer.pad_id)
                same(supply.row(epoch, place)[0], expected)


def talk(number):
    turns = [{"role": "user", "content": f"ask {number} " * (number % 12)}]
    return [*turns, {"role": "assistant", "content": "yes " * (number % 50 + 1)}]


def test_conversations_are_those_that_the_renderer_gives(tmp_path, tokenizer):
    rows = load_rows(write(tmp_path, [{"messages": talk(i)} for i in range(300)]))
    indices, order = split_rows(rows, 0.1)[0], Order(KEY)
    rendered = [chat.render(rows[i]["messages"], tokenizer) for i in indices]
    cut = [packing.Example(np.array(r.tokens)[:SEQ_LEN], np.array(r.mask)[:SEQ_LEN]) for r in rendered]
    kept = [example for example in cut if packing.is_trained(example)]
    plan = packing.pack([len(example.tokens) for example in kept], SEQ_LEN)
    supply = conversations(rows, indices, SEQ_LEN, tokenizer, order)
    assert supply.rows == len(plan)
    assert supply.tally.dropped == len(cut) - len(kept) > 0
    assert supply.tally.trained == sum(int(example.mask[1:].sum()) for example in kept)
    assert supply.tally.truncated == sum(
        packing.is_trained(c) and len(r.tokens) > SEQ_LEN for c, r in zip(cut, rendered, strict=True)
    )
    for epoch, place in ((0, 0), (0, 5), (1, 0), (7, len(plan) - 1)):
        members = [kept[i] for i in plan[order.place(epoch, place, len(plan))]]
        same(supply.row(epoch, place)[0], packing.join(members, SEQ_LEN, tokenizer.pad_id))


def test_pairs_are_kept_whole_and_cached_as_they_are_made(tmp_path, tokenizer):
    written = [
        {"prompt": f"ask {i}", "chosen": "yes " * (i % 15 + 1), "rejected": "no " * (i % 7 + 1)} for i in range(80)
    ]
    rows = load_rows(write(tmp_path, written))
    indices, order = split_rows(rows, 0.1)[0], Order(KEY)
    made = store_in_memory(((rows[i], rows.where(i)) for i in indices), "pairs", tokenizer)
    supply = pairs(rows, indices, SEQ_LEN, tokenizer, order)
    assert supply.rows == len(made) // 2 == len(indices)
    for place in range(supply.rows):
        number = order.place(2, place, supply.rows)
        for side, row in enumerate(supply.row(2, place)):
            example = made.example(2 * number + side, SEQ_LEN)  # all of them fit
            same(row, packing.join([example], SEQ_LEN, tokenizer.pad_id))
