"""Choices become rows that a preference stage trains on as they are."""

import json

import numpy as np
import pytest

from lm.choices.desk import Desk
from lm.choices.export import preferences
from lm.choices.export import write_rows as write_exported
from lm.choices.log import open_log
from lm.cli.main import main
from lm.data.chat import preference_messages
from lm.data.curriculum import instruct_row
from lm.data.pipeline import make_feed
from lm.data.sources import load_rows
from lm.data.tokenizer import SubwordTokenizer
from lm.experiment import DPO, RewardModel, Source, Stage
from tests.label.label_rows import chosen, desk_of, questions, task_of, write_rows

TURNS = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]


def test_what_was_chosen_is_trained_on(tmp_path):
    """From the page's file to a batch of the preference stage: the longer answer was chosen, whatever its side."""
    rows = [*questions(10), {"prompt": TURNS, "answers": ["", "a longer answer"]}]
    with desk_of(tmp_path, rows, seed=3) as desk:
        while (view := desk.show("Ann")).pair is not None:
            longer = "left" if len(view.left.answer) > len(view.right.answer) else "right"
            desk.choose("Ann", view.pair.key, longer)
        exported = preferences(desk.records())
    assert {record["choice"] for record in desk.records()} == {"left", "right"}
    write_exported(tmp_path / "preferences.jsonl", exported.rows)
    loaded = load_rows(str(tmp_path / "preferences.jsonl"))
    assert len(loaded) == 11 and exported[1:] == (0, 0)
    for row in loaded:
        good, bad = preference_messages(row, "here")
        assert good[-1]["content"].startswith("a longer answer") and not bad[-1]["content"].startswith("a longer")
    assert TURNS in [row["prompt"] for row in loaded]

    texts = [turn["content"] for index in range(200) for turn in instruct_row(index)["messages"]]
    tokenizer = SubwordTokenizer.train([*texts, "a longer answer"], 400)
    stage = Stage("here", DPO(), (Source(str(tmp_path / "preferences.jsonl")),), batch_size=11, seq_len=96)
    batch = make_feed(stage, tokenizer, 0).batch(0)
    assert batch.tokens.shape == (22, 96) and (np.asarray(batch.weights).sum(1) > 0).all()
    texts = [
        tokenizer.decode(row[weights > 0].tolist()) for row, weights in zip(batch.tokens, batch.weights, strict=True)
    ]
    assert all("longer" in good and "longer" not in bad for good, bad in zip(texts[::2], texts[1::2], strict=True))


def votes(name, *choices):
    """Choices of different people about one pair, x on the left."""
    return [chosen(f"{name}{place}", name, "x", "y", choice) for place, choice in enumerate(choices)]


VOTES = {
    # votes: (the row without ties, the row with ties); L and R are decided, T a tie, "" none
    ("left",): ("L", "L"),
    ("left", "left", "right"): ("L", "L"),
    ("right", "right", "tie"): ("R", "R"),
    ("left", "left", "tie", "both bad", "left"): ("L", "L"),
    ("left", "skip", "skip"): ("L", "L"),
    ("left", "tie"): ("", ""),
    ("left", "both bad"): ("", ""),
    ("left", "left", "right", "both bad"): ("", ""),
    ("left", "left", "right", "tie"): ("", ""),
    ("left", "tie", "tie"): ("", "T"),
    ("left", "tie", "both bad"): ("", "T"),
    ("left", "both bad", "both bad"): ("", ""),
    ("left", "right", "tie"): ("", "T"),
    ("left", "right"): ("", ""),
    ("tie",): ("", "T"),
    ("tie", "both bad"): ("", "T"),
    ("both bad",): ("", ""),
    ("skip", "skip"): ("", ""),
    ("tie", "skip"): ("", "T"),
}


@pytest.mark.parametrize("choices", VOTES, ids=" ".join)
def test_more_than_half_of_the_votes_decide_and_ties_are_votes(choices):
    for ties, want in zip((False, True), VOTES[choices], strict=True):
        exported = preferences(votes("q", *choices), ties)
        assert len(exported.rows) + exported.undecided + exported.even == 1
        got = ["T" if row.get("tie") else "L" if row["chosen"] == "x" else "R" for row in exported.rows]
        assert got == [want][: len(want)]
        for row in exported.rows:
            counted = [choices.count(kind) for kind in ("left", "right", "tie", "both bad", "skip")]
            assert list(row["votes"].values()) == (counted if row["chosen"] == "x" else [*counted[1::-1], *counted[2:]])


def test_a_row_has_strength_and_sources_of_those_who_chose_it():
    records = [
        chosen("Ann", "majority", "x", "y", "left", strength=3, left_source="sft", right_source="dpo"),
        chosen("Bob", "majority", "y", "x", "right", strength=2, left_source="dpo", right_source="sft"),
        chosen("Cy", "majority", "x", "y", "right", strength=1, left_source="sft", right_source="dpo"),
        chosen("Ann", "even", "x", "y", "left"),
        chosen("Bob", "even", "x", "y", "right"),
        chosen("Ann", "bad", "x", "y", "both bad"),
    ]
    rows, undecided, even = preferences(records)
    assert (undecided, even) == (1, 1)
    (row,) = rows
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("majority", "x", "y")
    assert row["votes"] == {"chosen": 2, "rejected": 1, "tie": 0, "both_bad": 0, "skip": 0}
    assert row["strength"] == row["margin"] == 2.5 and row["sources"] == ["sft", "dpo"]


def test_a_margin_is_written_only_where_a_strength_was_given_and_a_tie_has_none():
    records = [
        chosen("Ann", "a", "x", "y", "left"),
        chosen("Ann", "b", "x", "y", "left", strength=2),
        chosen("Bob", "b", "y", "x", "left", strength=1),
        chosen("Cy", "b", "y", "x", "tie", left_source="sft", right_source="dpo"),
    ]
    decided, tied = preferences(records, ties=True).rows
    assert "margin" not in decided and decided["strength"] is None and "tie" not in decided
    assert (tied["chosen"], tied["rejected"], tied["sources"]) == ("y", "x", ["sft", "dpo"])
    assert tied["votes"]["chosen"] == tied["votes"]["rejected"] == tied["votes"]["tie"] == 1
    assert "margin" not in tied and tied["strength"] is None
    assert preferences(records).rows == [decided]


def test_strengths_and_ties_become_margins_and_ties_of_a_batch(tmp_path, capsys):
    answers = write_rows(tmp_path / "answers.jsonl", questions(4))
    with open_log(tmp_path / "answers.labels.jsonl") as log:
        desk = Desk(task_of(tmp_path, questions(4)).pairs, log)
        for choice, strength in (("left", 3), ("tie", None), ("right", None), ("both bad", None)):
            desk.choose("Ann", desk.show("Ann").pair.key, choice, strength)
    assert main(["label", str(answers), "--export", "--ties"]) == 0
    said = capsys.readouterr().out
    assert "3 preferences, 1 of them ties" in said and "1 pairs of which most say both bad, or all skipped" in said
    texts = [turn["content"] for index in range(200) for turn in instruct_row(index)["messages"]]
    tokenizer = SubwordTokenizer.train([*texts, answers.read_text("utf-8")], 400)
    source = Source(str(tmp_path / "answers.preferences.jsonl"), holdout=0.0)
    stage = Stage("here", RewardModel(margins=True, ties="rao_kupper"), (source,), batch_size=3, seq_len=96)
    batch = make_feed(stage, tokenizer, 0).batch(0)
    assert sorted(batch.margins.tolist()) == [0, 0, 0, 0, 3, 3] and sorted(batch.ties.tolist()) == [0, 0, 0, 0, 1, 1]
    assert main(["label", str(answers), "--ties"]) == 2
    assert "--ties is about what --export writes" in capsys.readouterr().err


def test_what_was_taken_back_is_not_exported():
    first, second = chosen("Ann", "a", "x", "y", "left"), chosen("Ann", "b", "x", "y", "left")
    undo = {"id": 10**6, "kind": "undo", "annotator": "Ann", "of": first["id"]}
    assert [row["prompt"] for row in preferences([first, second, undo]).rows] == ["b"]
    again = chosen("Ann", "a", "x", "y", "right")
    assert [row["chosen"] for row in preferences([first, undo, again]).rows] == ["y"]


def test_the_command_writes_the_rows_while_a_page_is_open_and_passes_over_a_cut_line(tmp_path, capsys):
    answers = write_rows(tmp_path / "answers.jsonl", questions(5))
    task = task_of(tmp_path, questions(5))
    labels = tmp_path / "answers.labels.jsonl"
    with open_log(labels) as log:
        desk = Desk(task.pairs, log)
        for choice in ("left", "right", "tie", "left"):
            desk.choose("Ann", desk.show("Ann").pair.key, choice)
        assert main(["label", str(answers), "--export"]) == 0
        assert "answers.preferences.jsonl: 3 preferences" in capsys.readouterr().out
    labels.write_bytes(labels.read_bytes()[:-30])
    assert main(["label", str(answers), "--export", str(tmp_path / "mine.jsonl")]) == 0
    said = capsys.readouterr().out
    assert (
        "line 4 was cut" in said
        and "mine.jsonl: 2 preferences" in said
        and "1 pairs of which most say tie or both bad" in said
    )
    lines = (tmp_path / "mine.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 2 and {"prompt", "chosen", "rejected"} <= json.loads(lines[0]).keys()


@pytest.mark.parametrize("choice, words", [(None, "there is no file of choices"), ("tie", "nothing to export")])
def test_nothing_to_export_is_one_line(tmp_path, capsys, choice, words):
    answers = write_rows(tmp_path / "answers.jsonl", questions(1))
    if choice:
        with open_log(tmp_path / "answers.labels.jsonl") as log:
            desk = Desk(task_of(tmp_path, questions(1)).pairs, log)
            desk.choose("Ann", desk.show("Ann").pair.key, choice)
    assert main(["label", str(answers), "--export"]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not (tmp_path / "answers.preferences.jsonl").exists()
