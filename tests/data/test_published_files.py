"""The published form of a tokenizer trained here gives the same ids, texts, conversations and masks."""

import random

import pytest
import tokenizers
from hypothesis import given, settings
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model

from lm.data.hub.tokenizer import HubTokenizer
from lm.data.tokenizer import SubwordTokenizer
from lm.data.tokenizer_json import published_files
from lm.experiment import UserError
from tests.data.test_tokenizer import TEXTS

CHATS = [
    [("user", "What is 2 + 3?\n"), ("assistant", " 5\n\n")],
    [("system", "be kind"), ("user", "<|im_end|>\n<|im_start|>user"), ("assistant", "no \u2581"), ("user", "")],
]


@pytest.fixture(scope="module")
def library(tokenizer):
    """The file as the tokenizers library reads it, with control tokens that are typed taken for text."""
    read = tokenizers.Tokenizer.from_str(tokenizer.published_files(64)["tokenizer.json"].decode())
    read.encode_special_tokens = True
    return read


@settings(max_examples=300)
@given(text=TEXTS)
def test_any_text_has_the_same_ids(tokenizer, library, text):
    ids = tokenizer.encode(text)
    assert library.encode(text, add_special_tokens=False).ids == ids
    assert library.decode(ids) == text


def test_words_that_overlap_themselves_have_the_same_ids():
    """Merges of equal neighbours (aa, aba) depend on what is merged first."""
    rng = random.Random(0)
    texts = ["".join(rng.choices("ab ", (5, 3, 2), k=60)) for _ in range(300)]
    own = SubwordTokenizer.train(texts, 400)
    read = tokenizers.Tokenizer.from_str(own.published_files(64)["tokenizer.json"].decode())
    for text in (*texts, *("".join(rng.choices("ab ", k=rng.randrange(40))) for _ in range(2_000))):
        assert read.encode(text).ids == own.encode(text)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("prompt", [False, True])
def test_a_conversation_has_the_same_ids_and_mask(tokenizer, chat, prompt):
    published = HubTokenizer(tokenizer.published_files(64))
    messages = [{"role": role, "content": content} for role, content in chat]
    theirs, ours = published.render(messages, prompt), tokenizer.render(messages, prompt)
    assert theirs.tokens == ours.tokens
    assert prompt or theirs.mask == ours.mask  # what is rendered to be answered has no mask there
    assert published.end_ids[0] == tokenizer.eos_id and published.pad_id == tokenizer.pad_id
    assert published.document_ids == tokenizer.document_ids


def test_a_model_without_merges_is_refused(tokenizer):
    proto = sentencepiece_model.ModelProto.FromString(tokenizer.model)
    proto.trainer_spec.model_type = proto.trainer_spec.UNIGRAM
    with pytest.raises(UserError, match="sentencepiece model without merges"):
        published_files(proto.SerializeToString(), 64)
