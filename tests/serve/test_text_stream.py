"""The text of a stream: whole characters, nothing of a stop string, and all of it what the tokenizer decodes."""

import random

import pytest

from lm.data.tokenizer import SubwordTokenizer
from lm.serve.text_stream import ScoredToken, TextStream


@pytest.fixture(scope="module")
def tokenizer():
    return SubwordTokenizer.train(["hello there, how are you today?", "the answer is 12, or 13."] * 20, 300)


def streamed(tokenizer, ids, stop=()):
    """The pieces, the rest, and the tokens that were reported."""
    text = TextStream(tokenizer, stop, reported=True)
    found = [text.add([ScoredToken(token, 0.0)]) for token in ids]
    rest = text.end()
    return [one.text for one in found], rest.text, [t.token for one in [*found, rest] for t in one.tokens], text.stopped


@pytest.mark.parametrize("said", ["grüße, 你好 👩‍👩‍👧 end", "", "plain", "👍" * 20, "a\u0301\ufffdb"])
def test_pieces_are_whole_characters_and_together_the_text(tokenizer, said):
    ids = tokenizer.encode(said)
    pieces, rest, tokens, _ = streamed(tokenizer, ids)
    assert "".join(pieces) + rest == said
    assert tokens == ids
    assert len(ids) <= len(said) or any(piece == "" for piece in pieces), "bytes of a character wait for its last one"
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in said


def test_the_beginning_of_a_character_is_left_out_at_the_end(tokenizer):
    ids = tokenizer.encode("ok 👍")[:-1]
    pieces, rest, _, _ = streamed(tokenizer, ids)
    assert "".join(pieces) + rest == "ok "


def test_bytes_that_are_no_text_are_not_held_for_ever(tokenizer):
    rng = random.Random(0)
    ids = [rng.randrange(3, 259) for _ in range(400)]  # nearly all are single bytes
    pieces, rest, tokens, _ = streamed(tokenizer, ids)
    whole = tokenizer.decode(ids)
    assert whole.startswith("".join(pieces) + rest) and len("".join(pieces) + rest) >= len(whole) - 12
    assert tokens == ids
    assert all(any(pieces[at : at + 12]) for at in range(0, 380, 12))


@pytest.mark.parametrize("size", [2, 3, 7, 50])
@pytest.mark.parametrize("said", ["grüße, 你好 👩‍👩‍👧 end", "👍" * 20, "ok 👍"])
def test_several_tokens_at_once_give_the_same_text(tokenizer, said, size):
    ids = tokenizer.encode(said)
    for count in range(len(ids) + 1):
        text = TextStream(tokenizer)
        given = [ScoredToken(token, 0.0) for token in ids[:count]]
        found = "".join(text.add(given[at : at + size]).text for at in range(0, count, size)) + text.end().text
        assert found == tokenizer.decode(ids[:count]).rstrip("\ufffd")


@pytest.mark.parametrize("stop", [["stop"], ["xx", "st", "stop"], ["there st"], ["\n", "op "]])
def test_nothing_of_a_stop_string_is_shown(tokenizer, stop):
    said = "hello there stop and more"
    pieces, rest, tokens, stopped = streamed(tokenizer, tokenizer.encode(said), stop)
    at = min(said.find(one) for one in stop if one in said)
    assert stopped and "".join(pieces) + rest == said[:at]
    assert len(tokenizer.decode(tokens)) >= at, "tokens are reported until the stop string begins"
    assert said.startswith(tokenizer.decode(tokens[:-1]))


def test_what_only_begins_like_a_stop_string_is_shown_later(tokenizer):
    pieces, rest, _, stopped = streamed(tokenizer, tokenizer.encode("a sto") + tokenizer.encode("rm, a sto"), ["stop"])
    assert not stopped and "".join(pieces) == "a storm, a " and rest == "sto"
