"""Prompt feeds are pure, left padded, end with the assistant's header, and never cut a prompt."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from lm.data.prompts import encode_prompts, make_prompt_feed
from lm.data.selection import heldout_rows
from lm.experiment import Source, UserError
from lm.rollout.verifiers import NEEDS, expected_answer

HEADER = "<|im_start|>assistant\n"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_prompts_are_pure_functions_of_the_step_and_left_padded(tokenizer):
    sources = (Source("gen:arithmetic"), Source("gen:instruct"), Source("gen:preferences"))
    one, two = (make_prompt_feed(sources, 6, 64, tokenizer, 1) for _ in range(2))
    for step in (5, 0, 5):
        a, b = one.batch(step), two.batch(step)
        assert np.array_equal(a.tokens, b.tokens) and a.rows == b.rows
    assert a.tokens.shape == (6, 64) and a.tokens.dtype == a.lengths.dtype == np.int32
    for tokens, length, row in zip(*a, strict=True):
        assert (tokens[: 64 - length] == tokenizer.pad_id).all()
        text = tokenizer.decode(tokens[64 - length :], specials=True)
        assert text.startswith("<|im_start|>user\n") and text.endswith("<|im_end|>\n" + HEADER)
        asked = row.get("question") or row.get("prompt") or row["messages"][0]["content"]
        assert asked in text
    assert not np.array_equal(one.batch(0).tokens, one.batch(1).tokens)


def test_every_prompt_of_a_file_comes_once_an_epoch(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": f"{i}?", "answer": str(i)} for i in range(30)])
    feed = make_prompt_feed((Source(path, holdout=0.0),), 10, 32, tokenizer, 0)
    for epoch in range(2):
        rows = [row["answer"] for step in range(3) for row in feed.batch(3 * epoch + step).rows]
        assert sorted(rows, key=int) == [str(i) for i in range(30)] and rows != sorted(rows, key=int)


def test_held_out_prompts_are_in_fixed_order_and_disjoint(tokenizer):
    source = Source("gen:arithmetic", holdout=0.1)
    feed = make_prompt_feed((source,), 50, 64, tokenizer, 0, split="heldout")
    assert feed.batch(0).rows == [row for row, _ in itertools.islice(heldout_rows(source), 50)]
    assert feed.rows is not None and feed.rows >= 300
    held = {row["key"] for row, _ in heldout_rows(source)}
    train = make_prompt_feed((source,), 50, 64, tokenizer, 0)
    assert not held & {row["key"] for step in range(20) for row in train.batch(step).rows}


def test_prompts_too_long_are_an_error_that_counts_them(tokenizer, tmp_path):
    rows = [
        {"question": "short?", "answer": "1"},
        {"question": "long " * 50, "answer": "1"},
        {"question": "longer " * 60, "answer": "1"},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(
        UserError, match=r"2 of 3 prompts are longer than the 32 tokens.*a\.jsonl line 3.*raise seq_len by \d+"
    ) as error:
        make_prompt_feed((Source(path, holdout=0.0),), 2, 32, tokenizer, 0)
    missing = int(str(error.value).split("raise seq_len by ")[1].split(";")[0])
    feed = make_prompt_feed((Source(path, holdout=0.0),), 3, 32 + missing, tokenizer, 0)
    assert feed.batch(0).lengths.max() == 32 + missing and f"the longest {32 + missing}" in feed.report()
    with pytest.raises(UserError, match="1 of 1 prompts"):
        encode_prompts([{"prompt": "long " * 50}], 32, tokenizer)


def test_columns_that_the_verifier_needs_are_checked(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "x?", "answer": "1"}, {"question": "y?", "solution": "1"}])
    with pytest.raises(
        UserError, match=r"a\.jsonl line 2: the verifier needs the column answer; .* question, solution"
    ):
        make_prompt_feed((Source(path, holdout=0.0),), 2, 32, tokenizer, 0, columns=("answer",))


def test_the_column_final_alone_is_enough_for_the_answer_verifier(tokenizer, tmp_path):
    rows = [{"question": "x?", "final": "1"}, {"question": "y?", "answer": "1"}, {"question": "z?", "final": 2}]
    path = write(tmp_path / "a.jsonl", rows)
    feed = make_prompt_feed((Source(path, holdout=0.0),), 3, 32, tokenizer, 0, columns=NEEDS["answer"])
    assert "3 prompts" in feed.report() and "\n" not in feed.report()
    assert sorted(expected_answer(row) for row in feed.batch(0).rows) == ["1", "1", "2"]


def test_the_prompt_of_a_conversation_stops_before_the_last_answer(tokenizer):
    turns = [{"role": role, "content": role[0] * 3} for role in ("user", "assistant", "user", "assistant")]
    prompts = encode_prompts([{"messages": turns}, {"messages": turns[:3]}], 64, tokenizer)
    assert np.array_equal(prompts.tokens[0], prompts.tokens[1])
    text = tokenizer.decode(prompts.tokens[0], specials=True)
    assert text.endswith("<|im_start|>user\nuuu<|im_end|>\n" + HEADER) and text.count("aaa") == 1


def test_tools_are_refused_in_a_prompt_of_ones_own_chat_format_and_are_an_environments_own(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "x?", "tools": [{"name": "hammer"}]}])
    with pytest.raises(
        UserError, match=r"a\.jsonl line 1: the conversation has tools, and the chat format of lm has none"
    ):
        make_prompt_feed((Source(path, holdout=0.0),), 1, 64, tokenizer, 0)
    asked = [{"role": "user", "content": "own"}]
    feed = make_prompt_feed((Source(path, holdout=0.0),), 1, 64, tokenizer, 0, messages=lambda row, where: asked)
    assert "own" in tokenizer.decode(feed.batch(0).tokens[0])
