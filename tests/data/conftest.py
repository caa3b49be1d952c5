"""A tokenizer learnt once for all tests of the data floor."""

from __future__ import annotations

import pytest

from lm.data.curriculum import arithmetic_row, instruct_row
from lm.data.python_docs import documents
from lm.data.tokenizer import SubwordTokenizer


@pytest.fixture(scope="session")
def tokenizer() -> SubwordTokenizer:
    texts = [row["text"] for row in documents()[:60]]
    for make in (instruct_row, arithmetic_row):
        texts += [turn["content"] for index in range(500) for turn in make(index)["messages"]]
    return SubwordTokenizer.train(texts, 1024)
