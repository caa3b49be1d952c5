"""The documents of this Python are many, short enough, in a fixed order, and read without importing what they tell of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.data import sources
from lm.data.python_docs import LONGEST, documents, module_paragraphs, split_paragraphs
from lm.data.sources import load_rows
from lm.stored import cache_at


def test_there_is_enough_text_in_documents_of_bounded_length():
    rows = documents()
    assert sum(len(row["text"].encode()) for row in rows) > 2_000_000
    assert max(len(row["text"]) for row in rows) <= LONGEST
    assert all(row["text"].strip() and row["key"].startswith("docs:") for row in rows)
    assert {"docs:json.decoder", "docs:builtins", "docs:topic compound", "docs:argparse"} <= {
        row["key"] for row in rows
    }


def read_anew():
    """What a process that has not read them yet gets."""
    sources._documents.cache_clear()
    sources._generated.cache_clear()
    return load_rows("gen:docs")


def test_they_are_read_once_and_kept(tmp_path, monkeypatch):
    with cache_at(tmp_path):
        first = read_anew()
        monkeypatch.setattr(sources.python_docs, "documents", lambda: pytest.fail("read again"))
        again = read_anew()
    assert [again[i] for i in range(len(again))] == list(documents())
    assert first.fingerprint == again.fingerprint


@pytest.mark.slow
def test_a_hook_that_was_replaced_changes_nothing(monkeypatch):
    before = documents()
    monkeypatch.setattr("sys.unraisablehook", print)
    monkeypatch.setattr("sys.excepthook", lambda *_: None)
    documents.cache_clear()
    assert documents() == before


def test_long_paragraphs_occur_once():
    seen = [
        part
        for row in documents()
        for part in row["text"].split("\n\n")
        if part.startswith(("def ", "class ")) and len(part) > 300
    ]
    assert len(seen) - len(set(seen)) < 0.01 * len(seen)


SOURCE = '''"""Module words."""
import os

# This comment block speaks of the class that follows it and is long
# enough to be read as a paragraph of documentation.
class A(B):
    """Class words."""
    def f(self, x=1, *args):
        """Method words."""
    def silent(self): pass

def g() -> int:
    """Function words."""
'''


def test_a_module_becomes_signatures_docstrings_and_comments_in_file_order():
    assert module_paragraphs("m", SOURCE) == [
        "Module m\n\nModule words.",
        "This comment block speaks of the class that follows it and is long\n"
        "enough to be read as a paragraph of documentation.",
        "class A(B)\n    Class words.",
        "def A.f(self, x=1, *args)\n    Method words.",
        "def g()\n    Function words.",
    ]
    assert module_paragraphs("m", "x = 1\n") == []


@given(st.lists(st.text(alphabet="ab \n", min_size=1, max_size=60), max_size=10))
def test_splitting_keeps_every_letter_and_the_limit(paragraphs):
    texts = split_paragraphs(paragraphs, 25)
    assert all(len(text) <= 25 for text in texts)
    assert "".join(texts).replace("\n", "") == "".join(paragraphs).replace("\n", "")
