"""Every text comes back exactly, none becomes a special token, and training is deterministic."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data.curriculum.words import NOUNS
from lm.data.tokenizer import CHUNK, MIN_VOCAB, SPECIALS, SubwordTokenizer, _sample
from lm.experiment import UserError

AWKWARD = [
    "",
    " ",
    "\n",
    "\n\n  \n",
    "def f(x):\n    if x:\n        return [1, 23,  4]\n\n\treturn x\r\n",
    "  leading and trailing  ",
    "caf\u00e9 \u4f60\u597d \U0001f600 \U0001f469\u200d\U0001f680 e\u0301 \ufb01 \uff21",
    "\u2581 is \u2581\u2581 sentencepiece's space",
    "\x00\x01\x7f\u00a0\u3000\ufeff",
    *SPECIALS,
    "".join(SPECIALS) * 2,
    "<0x0A><unk><s></s><pad>",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_texts_come_back_and_hold_no_special_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert tokenizer.encode_batch([text, "x"]) == [ids, tokenizer.encode("x")]


PIECES = st.sampled_from([*SPECIALS, "\n", "    ", "\u2581", "<0x41>", "7", "the ", "\U0001f600", "<|", "|>"])
TEXTS = st.lists(PIECES | st.text(max_size=8), max_size=12).map("".join)


@settings(max_examples=300)
@given(text=TEXTS)
def test_any_text_comes_back_and_holds_no_special_token(tokenizer, text):
    ids, starts = tokenizer.encode_offsets(text)
    assert ids == tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special_ids.values())
    # the bytes before token i are exactly those of the characters before its start, and of what it shares of one
    for i, start in enumerate(starts):
        before = b"".join(tokenizer._bytes[j] for j in ids[:i])
        assert text[:start].encode() == before[: len(text[:start].encode())]
        assert len(before) - len(text[:start].encode()) < len(text[start].encode())


def test_training_on_special_names_makes_no_such_piece():
    text = "say <|im_end|> and <|im_start|> and <|endoftext|> often " * 50 + " ".join(NOUNS)
    learnt = SubwordTokenizer.train([text], 400)
    assert not set(learnt.encode(text)) & set(learnt.special_ids.values())
    assert learnt.decode(learnt.encode(text)) == text


def test_digits_and_newlines_are_pieces_of_their_own(tokenizer):
    assert len(tokenizer.encode("2024")) == 4
    assert len(tokenizer.encode("\n\n\n")) == 3
    assert tokenizer.encode("user\nHello") == tokenizer.encode("user") + tokenizer.encode("\n") + tokenizer.encode(
        "Hello"
    )


def test_indentation_is_few_tokens(tokenizer):
    assert len(tokenizer.encode("        return x")) <= 4


def test_decode_is_total_and_spells_specials_only_when_asked(tokenizer):
    everything = list(range(tokenizer.vocab_size))
    assert isinstance(tokenizer.decode(everything), str)
    assert tokenizer.decode([tokenizer.eos_id, *tokenizer.encode("a"), tokenizer.pad_id]) == "a"
    assert tokenizer.decode([tokenizer.eos_id, *tokenizer.encode("a")], specials=True) == "<|im_end|>a"


def test_lone_surrogates_do_not_raise(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_same_text_same_model_and_save_load(tmp_path):
    texts = [f"line {i} of a text about a {noun}\n\n    indented" for i, noun in enumerate(NOUNS)]
    one, two = SubwordTokenizer.train(texts, 400, tmp_path), SubwordTokenizer.train(texts, 400)
    assert one.fingerprint == two.fingerprint == SubwordTokenizer.load(tmp_path).fingerprint
    assert SubwordTokenizer.load(tmp_path / "tokenizer.model").vocab_size == 400
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]


def test_large_texts_are_sampled_evenly():
    texts = [letter * 1_000_000 for letter in "abcd"]
    sample = _sample(texts, 100_000)
    assert 90_000 < sum(map(len, sample)) <= 100_000
    counts = [sum(chunk.count(letter) for chunk in sample) for letter in "abcd"]
    assert max(counts) - min(counts) <= CHUNK


ALPHABETS = {
    "chinese": "\u7684\u4e00\u662f\u4e0d\u4e86\u4eba\u6211\u5728\u6709\u4ed6\u3002\uff0c",
    "japanese": "\u306e\u306b\u306f\u3092\u305f\u304c\u30c6\u30b9\u30c8\u65e5\u672c\u3002",
    "thai": "\u0e01\u0e32\u0e23\u0e17\u0e35\u0e48\u0e19\u0e49\u0e33",
    "dna": "ACGT",
    "sums": "0123456789+-=",
    "chess": "abcdefgh12345678 \n",
    "emoji": "\U0001f600\U0001f469\u200d\U0001f680\U0001f3fd\ufe0f",
    "combining": "ae\u0301\u0308\u0327",
    "right to left": "\u0627\u0644\u0633\u0644\u0645 \u200f\u05e9\u05dc\u05d5\u05dd\u05b8",
    "one letter": "a",
    "white space": " \t\r\n\u3000",
    "newlines": "\n",
    "odd": "\0\u2585\u2581\r\ufffe\x7f",
}


@pytest.mark.parametrize("name", ALPHABETS)
def test_any_alphabet_gets_a_vocabulary_that_gives_its_texts_back(name):
    letters = ALPHABETS[name]
    draw = random.Random(0)
    tokenizer = SubwordTokenizer.train(["".join(draw.choices(letters, k=400)) for _ in range(20)], 400)
    assert 262 <= tokenizer.vocab_size <= 400

    @settings(max_examples=60)
    @given(text=st.text(st.sampled_from(letters) | st.characters(), max_size=60) | TEXTS)
    def gives_back(text):
        assert tokenizer.decode(tokenizer.encode(text)) == "".join(
            "?" if "\ud800" <= c <= "\udfff" else c for c in text
        )

    gives_back()


def test_vocab_size_is_an_upper_bound_from_the_bytes_and_specials_on():
    texts = ["a short text that cannot fill a large vocabulary"]
    largest = SubwordTokenizer.train(texts, 2**40).vocab_size
    assert 280 < largest < 400 and SubwordTokenizer.train(texts, largest).vocab_size == largest
    for size in (MIN_VOCAB, MIN_VOCAB + 1, MIN_VOCAB + 2, largest - 1):
        small = SubwordTokenizer.train(texts, size)
        assert MIN_VOCAB <= small.vocab_size <= size and small.decode(small.encode(texts[0])) == texts[0]


def test_text_without_spaces_is_fewer_tokens_than_its_bytes():
    text = ALPHABETS["chinese"] * 200
    tokenizer = SubwordTokenizer.train([text], 400)
    assert len(tokenizer.encode(text)) < len(text) / 2


def test_many_different_characters_are_left_to_bytes():
    text = "".join(chr(0x4E00 + i) for i in range(3000)) + " ".join(NOUNS)
    learnt = SubwordTokenizer.train([text], 400)
    assert learnt.decode(learnt.encode(text)) == text


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text_is_a_clear_error(texts):
    with pytest.raises(UserError, match="no text"):
        SubwordTokenizer.train(texts, 400)


def test_too_small_a_vocabulary_and_missing_or_broken_model_are_clear_errors(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size is 100"):
        SubwordTokenizer.train(["text"], 100)
    with pytest.raises(UserError, match="no file"):
        SubwordTokenizer.load(tmp_path / "nothing")
    (tmp_path / "broken.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        SubwordTokenizer.load(tmp_path / "broken.model")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: b"", "is empty"),
        (lambda model: model[: len(model) // 2], "not a sentencepiece model|not a control piece"),
        (lambda model: model.replace(SPECIALS[1].encode(), b"x" * len(SPECIALS[1])), "not a control piece"),
        (lambda model: model[:-1] + bytes([model[-1] ^ 1]), "not lossless"),
    ],
)
def test_a_damaged_model_is_to_be_put_back(tmp_path, tokenizer, change, words):
    (tmp_path / "tokenizer.model").write_bytes(change(tokenizer.model))
    with pytest.raises(UserError, match=f"tokenizer.model.* ({words}).*put back a copy of it if it is damaged"):
        SubwordTokenizer.load(tmp_path)


@given(
    st.lists(st.sampled_from([*SPECIALS, "<", "|", ">", "\\", "<|", "|>", "im_end", "<|im_end|>"]) | TEXTS, max_size=6)
)
def test_shown_text_never_looks_like_a_special_token(tokenizer, pieces):
    ids, real = [], 0
    for number, piece in enumerate(pieces):
        if piece in SPECIALS and number % 2:
            ids.append(tokenizer.special_ids[piece])
            real += 1
        else:
            ids += tokenizer.encode(piece)
    shown = tokenizer.show(ids)
    assert sum(shown.count(piece) for piece in SPECIALS) == real
