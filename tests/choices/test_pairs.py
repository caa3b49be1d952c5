"""Which pairs rows become, and what is said of rows that are none."""

import pytest

from lm.choices.pairs import on_the_left, shuffled
from lm.experiment import UserError
from tests.label.label_rows import questions, task_of

NEEDED = "needs the columns prompt and answers; the columns found are"
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Who?"},
]


def compared(task) -> list[tuple]:
    return [(pair.first.answer, pair.second.answer) for pair in task.pairs]


def test_all_answers_of_a_row_are_compared_with_each_other(tmp_path):
    task = task_of(
        tmp_path, [{"prompt": "a", "answers": ["1", "2", "3"], "more": 1}, {"prompt": TURNS, "answers": ["4", "5"]}]
    )
    assert compared(task) == [("1", "2"), ("1", "3"), ("2", "3"), ("4", "5")]
    assert task.pairs[3].prompt == TURNS and not task.remarks


def test_answers_of_several_sources_are_compared_across_them_only(tmp_path):
    row = {"prompt": "a", "answers": ["1", "2", "3", "4"], "sources": ["sft", "sft", "dpo", "dpo"]}
    task = task_of(tmp_path, [row, {"prompt": "b", "answers": ["1", "2"], "sources": ["sft", "sft"]}])
    assert compared(task) == [("1", "3"), ("1", "4"), ("2", "3"), ("2", "4"), ("1", "2")]
    assert (task.pairs[0].first.source, task.pairs[0].second.source) == ("sft", "dpo")


def test_equal_answers_make_no_pair_and_an_empty_one_does(tmp_path):
    task = task_of(tmp_path, [{"prompt": "a", "answers": ["1", "1 ", ""]}, {"prompt": "a", "answers": ["", "1"]}])
    assert compared(task) == [("1", ""), ("1 ", "")]
    words = " / ".join(task.remarks)
    assert "1 pair of equal answers left out" in words and "2 answers without text, shown as empty" in words
    assert "1 pair repeated, taken once" in words


def test_only_equal_answers_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"answers.jsonl has no pair to compare: all 1 have two equal answers"):
        task_of(tmp_path, [{"prompt": "a", "answers": ["1", "1"]}])


@pytest.mark.parametrize(
    "row, words",
    [
        ({"question": "a", "answers": ["1", "2"]}, f"line 2: {NEEDED} question, answers"),
        ({"prompt": "a", "chosen": "b"}, f"line 2: {NEEDED} prompt, chosen"),
        ({"prompt": "a", "answers": ["1"]}, "line 2: answers must be a list of two or more"),
        ({"prompt": "a", "answers": "12"}, "line 2: answers must be a list of two or more"),
        ({"prompt": "a", "answers": ["1", True]}, "line 2, answers: chosen must be a string, a number or a list"),
        ({"prompt": TURNS[:2], "answers": ["1", "2"]}, "the last turn must be the user's"),
        ({"prompt": [3], "answers": ["1", "2"]}, "prompt must be a string, a number or a list of turns, found [3]"),
        ({"prompt": "a", "answers": ["1", "2"], "sources": ["x"]}, "line 2: 1 sources for 2 answers"),
        ({"prompt": "a", "answers": ["1", "2"], "sources": "xy"}, "line 2: sources must be a list of names"),
    ],
)  # fmt: skip
def test_a_row_that_is_none_is_named(tmp_path, row, words):
    with pytest.raises(UserError) as raised:
        task_of(tmp_path, [*questions(1), row])
    assert words in str(raised.value) and "answers.jsonl" in str(raised.value)


def test_a_pair_is_known_by_its_content(tmp_path):
    rows = questions(6)
    turned = [{"prompt": row["prompt"], "answers": row["answers"][::-1]} for row in rows[::-1]]
    one, other = task_of(tmp_path, rows), task_of(tmp_path, turned)
    assert {pair.key for pair in one.pairs} == {pair.key for pair in other.pairs} and len(
        {p.key for p in one.pairs}
    ) == 6
    assert [p.key for p in shuffled(one.pairs, 1)] == [p.key for p in shuffled(other.pairs, 1)]
    assert [p.key for p in shuffled(one.pairs, 1)] != [p.key for p in shuffled(one.pairs, 2)]


def test_sides_are_a_fair_coin_for_every_person(tmp_path):
    pairs = task_of(tmp_path, questions(400)).pairs
    ann, bob = ([on_the_left(pair, name, 0) for pair in pairs] for name in ("Ann", "Bob"))
    assert 160 < sum(ann) < 240 and 160 < sum(a == b for a, b in zip(ann, bob, strict=True)) < 240
    assert ann == [on_the_left(pair, "Ann", 0) for pair in pairs]
