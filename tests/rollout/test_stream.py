"""The stream of `lm chat` says what the batch sampler says, whatever the length of the conversation."""

import dataclasses

import jax
import pytest

from lm.data.curriculum import arithmetic_row
from lm.data.tokenizer import SubwordTokenizer
from lm.experiment import UserError
from lm.model.transformer import Transformer
from lm.rollout import sampler
from lm.rollout.engine import generate_text
from lm.rollout.sampler import compile_stream, encode_prompt, stream
from tests.helpers import TINY

NEW = 12


@pytest.fixture(scope="module")
def tokenizer():
    texts = [turn["content"] for index in range(200) for turn in arithmetic_row(index)["messages"]]
    return SubwordTokenizer.train(texts, 320)


@pytest.fixture(scope="module")
def model(tokenizer):
    return Transformer(dataclasses.replace(TINY, max_len=100), tokenizer.vocab_size, jax.random.key(3))


def conversation(words: int) -> list[dict]:
    return [{"role": "user", "content": "What is " + "3 + 4 " * words}]


@pytest.mark.slow
@pytest.mark.parametrize("words", [1, 5, 12])
def test_a_stream_in_pieces_is_the_answer_in_one_batch(tokenizer, model, words):
    messages = conversation(words)
    length = len(encode_prompt(tokenizer, messages))
    (answer,) = generate_text(model, tokenizer, [messages], max_new_tokens=NEW)
    assert "".join(stream(model, tokenizer, messages, max_new_tokens=NEW, temperature=0.0)) == answer.text.rstrip(
        "\ufffd"
    )
    assert length <= 88 and (words == 1 or length > sampler.SHORT), "one piece, and several"


def test_two_programs_serve_every_length_and_the_context_can_be_filled(tokenizer, model):
    compile_stream(model, tokenizer)
    program = sampler._stream_program(model)
    before = program._cache_size()
    messages = conversation(1)
    said = "".join(stream(model, tokenizer, messages, max_new_tokens=1000, temperature=1.0, seed=2))
    assert said and program._cache_size() == before
    with pytest.raises(UserError, match="max_len is 100"):
        next(stream(model, tokenizer, conversation(60)))
