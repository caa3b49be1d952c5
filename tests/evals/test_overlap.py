"""Contamination: which items share n-grams of words with the training rows, as by Python's sets; in batches, by the split."""

import json
import random
import re

import numpy as np
import pytest

from lm.cli.main import main
from lm.data.sources import NOWHERE, rows_of, split_rows
from lm.evals import overlap
from lm.evals.overlap import item_texts, overlaps
from lm.experiment import Source

SENTENCE = "The quick brown fox jumps over the lazy dog while seven old wizards quietly watch from a distant hill"


def source(tmp_path, texts, name="train.jsonl", **fields) -> Source:
    file = tmp_path / name
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return Source(str(file), **{"holdout": 0.0, **fields})


def by_hand(text: str, n: int) -> set[tuple[str, ...]]:
    words = re.sub(r"[\W_]+", " ", text.lower()).split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


@pytest.mark.parametrize("words", [3, 8, 13])
@pytest.mark.parametrize("size", [50, 1 << 20], ids=["many batches", "one batch"])
def test_the_counts_are_those_of_sets(tmp_path, monkeypatch, words, size):
    monkeypatch.setattr(overlap, "BATCH_BYTES", size)
    monkeypatch.setattr(overlap, "LEAST", 1)
    rng = random.Random(words)
    say = lambda count: " ".join(rng.choices(["a", "Bb", "c-c", "déjà", "don't", "Ω", "x1", "--"], k=count))  # noqa: E731
    train = [say(rng.randrange(0, 9 if size == 50 else 40)) for _ in range(300)]
    items = [say(rng.randrange(words + 2, 30)) for _ in range(60)]
    known = set().union(*(by_hand(text, words) for text in train))
    found = overlaps([[text] for text in items], [source(tmp_path, train)], NOWHERE, words)
    long = [(text, one) for text, one in zip(items, found.items, strict=True) if by_hand(text, words)]
    assert [one.grams for _, one in long] == [len(by_hand(text, words)) for text, _ in long]
    assert [one.found for _, one in long] == [len(by_hand(text, words) & known) for text, _ in long]
    assert found.contaminated > 0 or words == 13


def test_case_and_punctuation_do_not_matter_and_the_place_is_named(tmp_path):
    train = source(
        tmp_path, ["nothing", "So: “THE QUICK—brown fox”, jumps over (the lazy) dog; while seven old wizards: end"]
    )
    found = overlaps([[SENTENCE]], [train], NOWHERE)
    (one,) = found.items
    assert (one.grams, one.found) == (7, 1)
    assert one.text == "the quick brown fox jumps over the lazy dog while seven old wizards"
    assert one.where.endswith("train.jsonl:2") or one.where.endswith("line 2")
    assert "1 of 1 items share 13-grams with the training data, 14.3% of all n-grams" in found.describe()


def test_n_grams_do_not_cross_rows_or_the_texts_of_an_item(tmp_path):
    words = SENTENCE.split()
    halves = [" ".join(words[:9]), " ".join(words[9:])]
    assert overlaps([[SENTENCE]], [source(tmp_path, halves)], NOWHERE).contaminated == 0
    assert (
        overlaps([halves], [source(tmp_path, [SENTENCE])], NOWHERE, 10).items[0].grams == 1
    )  # the second alone is long enough


def test_rows_that_are_held_out_or_not_trained_on_do_not_count(tmp_path):
    texts = [f"{SENTENCE} number {i} of them all" for i in range(40)]
    train = source(tmp_path, texts, holdout=0.5)
    _, held_out = split_rows(rows_of(train), 0.5)
    items = [[f"quietly watch from a distant hill number {i} of them all"] for i in range(40)]
    found = overlaps(items, [train], NOWHERE, 9)
    clean = {i for i, one in enumerate(found.items) if one.share < 1}
    assert clean == set(np.asarray(held_out).tolist()) and 0 < len(clean) < 40
    assert overlaps(items, [source(tmp_path, texts, weight=0.0)], NOWHERE, 9).contaminated == 0


def test_short_items_are_compared_as_a_whole_or_not_at_all(tmp_path):
    train = source(tmp_path, [SENTENCE])
    found = overlaps([[" ".join(SENTENCE.split()[:9])], ["the quick brown fox"]], [train], NOWHERE)
    assert [(one.grams, one.found) for one in found.items] == [(1, 1), (0, 0)]
    assert found.compared == 1 and "1 items are too short to tell" in found.describe()


def test_scripts_without_spaces_are_compared_by_letters(tmp_path):
    found = overlaps(
        [["今日は天気がいいので散歩に行きました"]],
        [source(tmp_path, ["昨日、今日は天気がいいので散歩に行きました。"])],
        NOWHERE,
    )
    assert found.items[0].share == 1


def test_a_document_longer_than_a_batch_takes_no_more_memory_than_one(tmp_path, monkeypatch):
    monkeypatch.setattr(overlap, "BATCH_BYTES", 2000)
    sizes = []
    search = overlap._Index.search
    monkeypatch.setattr(
        overlap._Index, "search", lambda self, data, *rest: (sizes.append(len(data)), search(self, data, *rest))
    )
    overlaps([[SENTENCE]], [source(tmp_path, [f"{SENTENCE} {i}" for i in range(50)] * 20)], NOWHERE)
    assert max(sizes) < 4000 and len(sizes) > 20


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"query": "Why?", "choices": ["no", "yes"], "gold": 1}, ["Why? yes"]),
        ({"context_options": ["Ann", "Bob"], "continuation": "ran", "gold": 0}, ["Ann ran"]),
        ({"good": "I am", "bad": "I is", "uid": "x"}, ["I am"]),
        ({"context": "a b", "continuation": "c"}, ["a b c"]),
        ({"question": "Q", "choices": {"text": ["A", "B"]}, "count": 3, "none": None}, ["Q", "A", "B"]),
    ],
)
def test_the_texts_of_an_item_have_the_right_choice(row, texts):
    assert item_texts(row) == texts


def test_a_file_is_compared_with_the_data_of_an_experiment(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source(tmp_path, [f"{SENTENCE} {i}" for i in range(30)])
    (tmp_path / "items.jsonl").write_text(json.dumps({"query": SENTENCE, "choices": ["a", "b"], "gold": 0}) + "\n")
    words = [
        "data",
        "text_file",
        "--pretrain.sources.0.path",
        "train.jsonl",
        "--stage",
        "pretrain",
        "--against",
        "items.jsonl",
    ]
    assert main(words) == 0
    first, example = capsys.readouterr().out.splitlines()
    assert first.startswith("items.jsonl: 1 of 1 items share 13-grams with the training data, 87.5% of all n-grams")
    assert "train.jsonl" in example
