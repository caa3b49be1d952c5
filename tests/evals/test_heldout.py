"""lm/evals/heldout.py: what a model that knows nothing must score, and one that is its own reference."""

import json
import lzma
import math
import string

import jax
import jax.numpy as jnp
import pytest

from lm.data.tokenizer import SubwordTokenizer
from lm.evals import rows
from lm.evals.examples import windows
from lm.evals.heldout import measure
from lm.evals.rows import Subject
from lm.experiment import Eval, Source, UserError
from lm.model.transformer import Transformer
from tests.helpers import TINY

TALK = [
    {"role": "user", "content": "Say cat."},
    {"role": "assistant", "content": "cat"},
    {"role": "user", "content": "Again."},
    {"role": "assistant", "content": "cat, again"},
]


@pytest.fixture(scope="module")
def tokenizer() -> SubwordTokenizer:
    return SubwordTokenizer.train([json.dumps(TALK) * 3 + string.ascii_letters + " the cat sat on the mat"], 320)


@pytest.fixture(scope="module")
def clueless(tokenizer) -> Transformer:
    """Every token is as likely as any other."""
    model = Transformer(TINY, tokenizer.vocab_size, jax.random.key(0))
    model.embed.weight[...] = jnp.zeros_like(model.embed.weight[...])
    return model


def item(tmp_path, rows, **changes) -> Eval:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Eval("it", Source(str(path), holdout=1.0), **changes)


def test_every_token_of_a_document_and_its_end_is_counted_once(tmp_path, tokenizer, clueless):
    text = "the cat sat on the mat " * 20  # longer than the context
    found = measure(item(tmp_path, [{"text": text}], metric="bits_per_byte"), Subject(clueless, tokenizer)).values
    predicted = len(tokenizer.encode(text)) + 1
    assert found["bits_per_byte"] == pytest.approx(predicted * math.log2(tokenizer.vocab_size) / len(text), rel=1e-5)
    assert found["loss"] == pytest.approx(math.log(tokenizer.vocab_size), rel=1e-5)
    packed = len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    assert found["bytes"] == len(text) and found["xz_bits_per_byte"] == 8 * packed / len(text)


@pytest.mark.parametrize(("count", "shapes"), [(3, [(4, 32)]), (70, [(64, 32), (64, 32)])])
def test_rows_are_no_wider_and_no_more_than_what_is_measured_needs(
    tmp_path, tokenizer, clueless, monkeypatch, count, shapes
):
    seen, row_logp = [], rows._row_logp
    monkeypatch.setattr(
        rows, "_row_logp", lambda model, batch: seen.append(batch.tokens.shape) or row_logp(model, batch)
    )
    talks = [
        [{"role": "user", "content": f"what {i}?"}, {"role": "assistant", "content": "it is"}] for i in range(count)
    ]
    asked = item(tmp_path, [{"messages": talk} for talk in talks], metric="bits_per_byte", count=count)
    found = measure(asked, Subject(clueless, tokenizer))
    assert found.count == count and seen == shapes
    assert found.values["loss"] == pytest.approx(math.log(tokenizer.vocab_size), rel=1e-5)


def test_of_a_conversation_the_answers_and_their_ends_are_counted(tmp_path, tokenizer, clueless):
    found = measure(item(tmp_path, [{"messages": TALK}], metric="bits_per_byte"), Subject(clueless, tokenizer)).values
    answers = [turn["content"] for turn in TALK if turn["role"] == "assistant"]
    predicted = sum(
        len(tokenizer.encode(f"assistant\n{a}")) - len(tokenizer.encode("assistant\n")) + 1 for a in answers
    )
    assert found["bytes"] == len("".join(answers))
    bits = predicted * math.log2(tokenizer.vocab_size) / found["bytes"]
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert "xz_bits_per_byte" not in found


def test_a_conversation_that_does_not_fit_is_not_counted(tmp_path, tokenizer, clueless):
    long = [{"role": "user", "content": "cat " * 200}, {"role": "assistant", "content": "yes"}]
    both = measure(
        item(tmp_path, [{"messages": TALK}, {"messages": long}], metric="bits_per_byte"), Subject(clueless, tokenizer)
    )
    assert both.count == 1
    with pytest.raises(
        UserError,
        match=r"evals\.it: .*: none of the held-out conversations can be measured: 1 longer than the 64 tokens of model\.max_len",
    ):
        measure(item(tmp_path, [{"messages": long}], metric="bits_per_byte"), Subject(clueless, tokenizer))


def test_a_model_that_is_its_own_reference_prefers_neither(tmp_path, tokenizer, clueless):
    model = Transformer(TINY, tokenizer.vocab_size, jax.random.key(1))
    pairs = item(tmp_path, [{"prompt": "Say cat.", "chosen": "cat", "rejected": "the mat"}], metric="pair_accuracy")
    assert measure(pairs, Subject(model, tokenizer, model)).values == {"pair_accuracy": 0.5, "margin": 0.0}
    # Against a model to which every token is the same, the difference is that of the answers' own probabilities.
    margin = measure(pairs, Subject(model, tokenizer, clueless)).values["margin"]
    assert margin != 0 and measure(pairs, Subject(clueless, tokenizer, model)).values["margin"] == pytest.approx(
        -margin
    )


@pytest.mark.parametrize("length", [2, 7, 8, 9, 50])
def test_windows_predict_every_token_but_the_first_once(length):
    ids = list(range(length))
    predicted = [i for row, mask in windows(ids, 8) for i, kept in zip(row, mask, strict=True) if kept]
    assert predicted == ids[1:]
    assert all(len(row) <= 8 and not mask[0] for row, mask in windows(ids, 8))
