"""Metrics of given continuations: the layouts of rows, what a model that knows nothing scores, and rows that are wrong."""

import dataclasses
import json
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.check import check
from lm.data.tokenizer import SubwordTokenizer
from lm.evals.choices import read_choices
from lm.evals.heldout import measure
from lm.evals.rows import Subject
from lm.experiment import Eval, Source, UserError
from lm.model.transformer import Transformer
from tests.helpers import TINY
from tests.train.runs import experiment

ROWS = {
    "choices": {"query": "the cat", "choices": ["sat", "mat on the", "on"], "gold": 1},
    "contexts": {"context_options": ["the cat", "on the mat"], "continuation": "sat", "gold": 0},
    "sentences": {"good": "the cat sat", "bad": "cat the sat"},
    "next words": {"context": "the cat sat on the", "continuation": "mat"},
}
TEXTS = {
    "choices": ["the cat sat", "the cat mat on the", "the cat on"],
    "contexts": ["the cat sat", "on the mat sat"],
    "sentences": ["the cat sat", "cat the sat"],
    "next words": ["the cat sat on the mat"],
}


@pytest.fixture(scope="module")
def tokenizer() -> SubwordTokenizer:
    return SubwordTokenizer.train([f"{string.printable} the cat sat on the mat {chr(10)} user assistant " * 3], 330)


@pytest.fixture(scope="module")
def model(tokenizer) -> Transformer:
    return jax.jit(lambda: Transformer(TINY, tokenizer.vocab_size, jax.random.key(0)))()


def item(tmp_path, rows, metric="choice_accuracy", **changes) -> Eval:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Eval("it", Source(str(path), holdout=1.0), metric, **changes)


@pytest.mark.parametrize("layout", ROWS)
def test_context_and_choice_are_the_tokens_of_the_joined_text(tmp_path, tokenizer, layout):
    found = read_choices(ROWS[layout], "row", item(tmp_path, [ROWS[layout]]), tokenizer)
    for one, text in zip(found.tokens, TEXTS[layout], strict=True):
        assert [*one.context, *one.tokens] == [tokenizer.document_ids[0], *tokenizer.encode(text)]
    assert found.gold == ROWS[layout].get("gold", 0)


def test_as_chat_the_choice_begins_the_answer(tmp_path, tokenizer):
    one = read_choices(ROWS["choices"], "row", item(tmp_path, [ROWS["choices"]], asked_as="chat"), tokenizer).tokens[0]
    text = tokenizer.decode([*one.context, *one.tokens], specials=True)
    assert text == "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\nsat"


@pytest.mark.slow
def test_the_right_choice_is_that_of_the_largest_log_likelihood(tmp_path, tokenizer, model):
    rows = [
        {"query": f"the {word}", "choices": ["cat", "mat on", "sat"], "gold": 2} for word in ("a", "b", "c", "d", "e")
    ]
    one = item(tmp_path, rows)
    found = measure(one, Subject(model, tokenizer))
    right = []
    for row in rows:
        sums = []
        for choice in read_choices(row, "row", one, tokenizer).tokens:
            tokens = np.array([[*choice.context, *choice.tokens]])
            hidden, _ = model.hidden(tokens, np.arange(tokens.shape[1])[None], np.ones_like(tokens))
            logp = jax.nn.log_softmax(model.logits(hidden)[0].astype(jnp.float32))
            first = len(choice.context)
            sums.append(sum(float(logp[place - 1, tokens[0, place]]) for place in range(first, tokens.shape[1])))
        right.append(np.argmax(sums) == 2)
    assert found.values["choice_accuracy"] == pytest.approx(np.mean(right)) and found.count == len(rows)
    assert found.values["chance"] == pytest.approx(1 / 3) and 0 <= found.values["choice_accuracy_bytes"] <= 1


def test_next_words_are_right_where_greedy_decoding_gives_them(tmp_path, tokenizer, model):
    context = "the cat sat on"
    tokens = np.array([[tokenizer.document_ids[0], *tokenizer.encode(context)]])
    hidden, _ = model.hidden(tokens, np.arange(tokens.shape[1])[None], np.ones_like(tokens))
    logp = jax.nn.log_softmax(model.logits(hidden)[0, -1].astype(jnp.float32))
    words = ["the", "mat", "cat"]
    rows = [{"context": context, "continuation": word} for word in words]
    firsts = [tokenizer.encode(f"{context} {word}")[tokens.shape[1] - 1] for word in words]
    found = measure(item(tmp_path, rows, "continuation_accuracy"), Subject(model, tokenizer)).values
    assert found["continuation_accuracy"] <= np.mean([first == int(logp.argmax()) for first in firsts])
    assert found["loss"] > 0


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"question": "x", "answer": "y"}, "choices need the columns query, choices and gold"),
        ({"query": "x", "choices": ["a", "b"], "gold": 2}, "gold is 2; it should be the index of the right one of 2"),
        ({"query": "x", "choices": ["a", "b"], "gold": "1"}, "gold is '1'"),
        ({"query": ["x"], "choices": ["a", "b"], "gold": 1}, "query is ['x']; it should be a text"),
        ({"context": "x", "continuation": {"a": 1}}, "continuation is {'a': 1}; it should be a text"),
        ({"query": "x", "choices": "ab", "gold": 0}, "choices is 'ab'; it should be a list of texts"),
        ({"query": "x", "choices": ["a", ""], "gold": 0}, "a choice is empty"),
    ],
)
def test_a_row_that_is_wrong_is_told_with_its_line(tmp_path, tokenizer, model, row, told):
    with pytest.raises(UserError, match=r"rows\.jsonl line 1") as raised:
        measure(item(tmp_path, [row]), Subject(model, tokenizer))
    assert told in str(raised.value)


def test_rows_that_do_not_fit_are_counted(tmp_path, tokenizer, model):
    rows = [ROWS["choices"], ROWS["choices"] | {"query": "the cat " * 60}]
    assert measure(item(tmp_path, rows), Subject(model, tokenizer)).count == 1


def test_a_field_that_the_metric_does_not_use_is_refused(tmp_path):
    one = item(tmp_path, [ROWS["choices"]], "reward", asked_as="chat", max_new_tokens=4)
    with pytest.raises(UserError, match=r"evals\.it\.asked_as is chat and metric is reward"):
        check(dataclasses.replace(experiment(tmp_path), evals=(one,)))
