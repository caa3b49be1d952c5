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
from lm.data.supply import Order, answers, conversations, pairs, windows, with_ends
from lm.data.tokens import store_in_memory
from lm.experiment import UserError

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
    return [*turns, {"role": "assistant", "content": "yes " * (number % 50)}]


def test_conversations_are_those_that_the_renderer_gives(tmp_path, tokenizer):
    rows = load_rows(write(tmp_path, [{"messages": talk(i)} for i in range(300)]))
    indices, order = split_rows(rows, 0.1)[0], Order(KEY)
    rendered = [chat.render(rows[i]["messages"], tokenizer) for i in indices]
    cut = [packing.truncate(packing.Example(np.array(r.tokens), np.array(r.mask)), SEQ_LEN) for r in rendered]
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
        {"prompt": f"ask {i}", "chosen": "yes " * (1 + i % 60), "rejected": "no " * (1 + i % 7)} for i in range(80)
    ]
    rows = load_rows(write(tmp_path, written))
    indices, order = split_rows(rows, 0.1)[0], Order(KEY)
    made = store_in_memory(((rows[i], rows.where(i)) for i in indices), "pairs", tokenizer)
    supply = pairs(rows, indices, SEQ_LEN, tokenizer, order)
    assert supply.rows == len(made) // 2 == len(indices)
    for place in range(supply.rows):
        number = order.place(2, place, supply.rows)
        for side, row in enumerate(supply.row(2, place)):
            example = with_ends(made, 2 * number + np.arange(2), SEQ_LEN)[side]
            same(row, packing.join([example], SEQ_LEN, tokenizer.pad_id))


ODD = [
    {"prompt": "p0", "chosen": "good", "rejected": "bad", "margin": 1.5},
    {"prompt": "p1", "chosen": "same", "rejected": "same "},
    {"prompt": "p2", "chosen": "good", "rejected": "  "},
    {"prompt": "p3", "chosen": "this", "rejected": "that", "tie": True},
    {"prompt": "p4", "chosen": "like", "rejected": "like", "tie": True},
]


def supply_of(tmp_path, tokenizer, written, seq_len=SEQ_LEN, make=pairs, **changes):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in written))
    rows = load_rows(str(file))
    return make(rows, range(len(rows)), seq_len, tokenizer, Order(None), **changes)


def test_pairs_that_teach_nothing_are_left_out_and_counted(tmp_path, tokenizer):
    supply = supply_of(tmp_path, tokenizer, ODD)
    assert supply.rows == 1 and supply.tally.dropped == 4
    assert supply.tally.describe("pairs").endswith("4 dropped (1 of equal answers, 1 with an empty answer, 2 ties)")
    assert [(row.margins, row.ties) for row in supply.row(0, 0)] == [(1.5, 0.0)] * 2


def test_ties_are_kept_for_those_who_learn_from_them(tmp_path, tokenizer):
    supply = supply_of(tmp_path, tokenizer, ODD, ties=True)
    marks = [tuple((row.margins, row.ties) for row in supply.row(0, place)) for place in range(supply.rows)]
    assert marks == [((1.5, 0.0),) * 2, ((0.0, 1.0),) * 2, ((0.0, 1.0),) * 2]


def test_judged_answers_without_words_are_left_out(tmp_path, tokenizer):
    written = [{"prompt": "p", "completion": "", "label": True}, {"prompt": "q", "completion": "yes", "label": False}]
    supply = supply_of(tmp_path, tokenizer, written, make=answers)
    assert supply.rows == 1 and supply.tally.reasons == ("1 with an empty answer",)
    assert supply.row(0, 0)[0].desirable == 0


@pytest.mark.parametrize("row", ODD[1:])
def test_a_file_of_pairs_that_teach_nothing_is_refused(tmp_path, tokenizer, row):
    with pytest.raises(UserError, match=r"rows.jsonl: none of 1 pairs teaches anything \(1 "):
        supply_of(tmp_path, tokenizer, [row])


def test_a_pair_that_is_too_long_keeps_the_ends_of_its_answers_and_one_prompt(tmp_path, tokenizer):
    long = {"prompt": "begin " + "filler " * 40 + "ask", "chosen": "short answer", "rejected": "a longer answer " * 4}
    whole = supply_of(tmp_path, tokenizer, [long], seq_len=512)
    cut = supply_of(tmp_path, tokenizer, [long])
    assert whole.tally.truncated == 0 and cut.tally.truncated == 1
    full, kept = ([row.tokens[row.segments > 0].tolist() for row in supply.row(0, 0)] for supply in (whole, cut))
    lost = {len(a) - len(b) for a, b in zip(full, kept, strict=True)}
    assert len(lost) == 1 and all(a[-len(b) :] == b for a, b in zip(full, kept, strict=True))
    assert max(map(len, kept)) == SEQ_LEN
    for before, after in zip(whole.row(0, 0), cut.row(0, 0), strict=True):
        assert before.weights.sum() == after.weights.sum()  # no token of an answer is lost


def test_an_answer_longer_than_a_row_keeps_its_end(tmp_path, tokenizer):
    long = {"prompt": "ask", "chosen": "words " * 100, "rejected": "no"}
    whole, cut = (supply_of(tmp_path, tokenizer, [long], seq_len=size) for size in (512, SEQ_LEN))
    chosen, rejected = cut.row(0, 0)
    full = whole.row(0, 0)[0]
    assert chosen.tokens.tolist() == full.tokens[full.segments > 0][-SEQ_LEN:].tolist()
    assert rejected.weights.sum() > 0  # it has lost the prompt, as its partner has
