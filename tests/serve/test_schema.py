"""Schemas as masks: whatever is sampled of the allowed tokens is valid, with each kind of tokenizer."""

import json
import random

import jsonschema
import numpy as np
import pytest

from lm.data.tokenizer import SubwordTokenizer
from lm.serve.schema import Tokens
from tests.data.hub import small

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["a", "größer", "b c"]},
        "count": {"type": "integer", "minimum": 3, "maximum": 1200},
        "parts": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "count", "parts"],
    "additionalProperties": False,
}


def own():
    return SubwordTokenizer.train(["hello there, how are you today?", "the answer is 12, or 13."] * 20, 300)


@pytest.mark.parametrize("make", [own, small.tokenizer], ids=["trained by lm", "tokenizer.json"])
def test_any_allowed_tokens_make_a_valid_answer(make):
    tokenizer = make()
    tokens = Tokens(tokenizer)
    rng = random.Random(0)
    for _ in range(5):
        matcher, ids = tokens.matcher(tokens.grammar(SCHEMA)), []
        while not matcher.is_stopped() and len(ids) < 300:
            row = np.zeros(-(-tokenizer.vocab_size // 32), np.int32)
            matcher.fill(row)
            bits = np.unpackbits(row.view(np.uint8), bitorder="little")[: tokenizer.vocab_size]
            ids.append(rng.choice(np.flatnonzero(bits).tolist()))
            matcher.consume_tokens(ids[-1:])
        assert matcher.error() == ""
        jsonschema.validate(json.loads(tokenizer.decode([one for one in ids if one not in tokenizer.end_ids])), SCHEMA)


def test_the_bytes_of_tokens_are_those_of_their_text():
    tokenizer = own()
    tokens = Tokens(tokenizer)
    said = "how are größe 👍"
    assert b"".join(map(tokens.bytes_of, tokenizer.encode(said))) == said.encode()
    assert tokens.bytes_of(tokenizer.eos_id) == b"<|im_end|>"
