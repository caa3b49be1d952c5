"""Every pair to so many people, none twice to one; undo; a desk over the same file goes on where the last one was."""

from collections import Counter

import pytest

from lm.choices.desk import LEASE, clean_name, standing
from lm.experiment import UserError
from tests.label.label_rows import desk_of, questions


def judge_all(desk, *names: str) -> None:
    """These people take turns until there is nothing for any of them."""
    left = list(names)
    while left:
        for name in list(left):
            view = desk.show(name)
            if view.pair is None:
                left.remove(name)
            else:
                desk.choose(name, view.pair.key, "left")


@pytest.mark.parametrize("per_pair", [1, 2, 3])
def test_every_pair_goes_to_so_many_people_and_none_twice_to_one(tmp_path, per_pair):
    with desk_of(tmp_path, questions(12), per_pair=per_pair) as desk:
        judge_all(desk, "Ann", "Bob", "Cy")
        records = desk.records()
        assert len(records) == 12 * per_pair
        assert set(Counter(record["pair"] for record in records).values()) == {per_pair}
        assert set(Counter((r["pair"], r["annotator"]) for r in records).values()) == {1}
        assert desk.show("Dan").pair is None
        assert desk.show("Ann").progress.done == desk.show("Ann").progress.total == 12 * per_pair


def test_too_few_people_leave_pairs_open_and_are_told_that_they_are_done(tmp_path):
    with desk_of(tmp_path, questions(3), per_pair=2) as desk:
        judge_all(desk, "Ann")
        view = desk.show("Ann")
        assert view.pair is None and view.busy == 0 and view.progress.done == 3 and view.progress.total == 6


def test_a_pair_that_somebody_is_at_goes_to_nobody_else_until_it_was_kept_for_too_long(tmp_path):
    now = [0.0]
    with desk_of(tmp_path, questions(1), clock=lambda: now[0]) as desk:
        pair = desk.show("Ann").pair
        assert desk.show("Ann").pair == pair, "a reload shows the same"
        assert desk.show("Bob").pair is None and desk.show("Bob").busy == 1
        now[0] = LEASE + 1
        assert desk.show("Bob").pair == pair
        assert desk.show("Ann").pair is None, "it is Bob's now"
        desk.choose("Ann", pair.key, "left")
        desk.choose("Bob", pair.key, "right")
        assert [record["annotator"] for record in desk.records()] == ["Ann", "Bob"], "but no choice is lost"


def test_a_record_says_what_was_seen(tmp_path):
    now = [5.0]
    rows = [{"prompt": "Q", "answers": ["x", "y"], "sources": ["sft", "dpo"]}]
    with desk_of(tmp_path, rows, clock=lambda: now[0]) as desk:
        view = desk.show("Ann")
        now[0] += 2.5
        desk.choose("Ann", view.pair.key, "right", 2, "why not")
        (record,) = desk.records()
    assert record["left"] == {"answer": view.left.answer, "source": view.left.source}
    assert {record["left"]["source"], record["right"]["source"]} == {"sft", "dpo"}
    assert {key: record[key] for key in ("annotator", "prompt", "choice", "strength", "comment", "seconds")} == {
        "annotator": "Ann", "prompt": "Q", "choice": "right", "strength": 2, "comment": "why not", "seconds": 2.5,
    }  # fmt: skip


def test_skipped_pairs_go_to_somebody_else_and_not_again_to_the_same(tmp_path):
    with desk_of(tmp_path, questions(1)) as desk:
        pair = desk.show("Ann").pair
        assert desk.choose("Ann", pair.key, "skip").pair is None
        assert desk.show("Bob").pair == pair


def test_undo_brings_the_pair_back_as_it_was_and_only_adds_to_the_file(tmp_path):
    with desk_of(tmp_path, questions(4)) as desk:
        first = desk.show("Ann")
        second = desk.choose("Ann", first.pair.key, "left")
        third = desk.choose("Ann", second.pair.key, "tie")
        back = desk.undo("Ann", third.last["id"])
        assert (back.pair, back.left, back.right) == (second.pair, second.left, second.right)
        again = desk.undo("Ann", back.last["id"])
        assert again.pair == first.pair and again.last is None
        desk.choose("Ann", first.pair.key, "right")
        assert [record["kind"] for record in desk.records()] == ["choice", "choice", "undo", "undo", "choice"]
        assert [record["choice"] for record in standing(desk.records())] == ["right"]


def test_what_is_sent_twice_is_done_once(tmp_path):
    with desk_of(tmp_path, questions(3)) as desk:
        pair = desk.show("Ann").pair
        one, two = (desk.choose("Ann", pair.key, "left", 1, "x") for _ in range(2))
        assert one == two and len(desk.records()) == 1
        with pytest.raises(UserError, match=r"Ann has already judged this pair \(left\)"):
            desk.choose("Ann", pair.key, "right", 1, "x")
        one, two = (desk.undo("Ann", one.last["id"]) for _ in range(2))
        assert one == two and len(desk.records()) == 2


def test_nobody_takes_back_what_is_not_their_last_choice(tmp_path):
    with desk_of(tmp_path, questions(3)) as desk:
        last = desk.choose("Ann", desk.show("Ann").pair.key, "left").last
        with pytest.raises(UserError, match="not the last one of Bob"):
            desk.undo("Bob", last["id"])
        with pytest.raises(UserError, match="not the last one of Ann"):
            desk.undo("Ann", 17)


def test_another_desk_over_the_same_file_goes_on(tmp_path):
    with desk_of(tmp_path, questions(8), per_pair=2) as desk:
        for name in ("Ann", "Ann", "Bob"):
            view = desk.choose(name, desk.show(name).pair.key, "left")
        desk.undo("Bob", view.last["id"])
        before = [(desk.show(n).progress, desk.show(n).pair.key, desk.show(n).last) for n in ("Ann", "Bob")]
    with desk_of(tmp_path, questions(8)[::-1], per_pair=2) as desk:
        assert [(desk.show(n).progress, desk.show(n).pair.key, desk.show(n).last) for n in ("Ann", "Bob")] == before
        judge_all(desk, "Ann", "Bob")
        assert set(Counter(record["pair"] for record in standing(desk.records())).values()) == {2}


def test_choices_of_another_task_stay_and_are_counted(tmp_path):
    with desk_of(tmp_path, questions(2)) as desk:
        judge_all(desk, "Ann")
    with desk_of(tmp_path, [*questions(1), {"prompt": "new", "answers": ["a", "b"]}]) as desk:
        assert "1 choices of pairs that are not in this task" in desk.strangers()
        view = desk.show("Ann")
        assert view.pair.prompt == "new" and desk.undo("Ann", view.last["id"]).last["id"] == 1


@pytest.mark.parametrize(
    "choice, strength, comment, words",
    [
        ("lefty", None, "", "the choice is 'lefty'"),
        (None, None, "", "the choice is None"),
        ("left", 4, "", "the strength is 4"),
        ("left", True, "", "the strength is True"),
        ("left", None, "x" * 5000, "the comment must be a text of at most 4000"),
        ("left", None, None, "the comment must be a text"),
    ],
)
def test_a_choice_that_is_none_is_refused_and_nothing_is_written(tmp_path, choice, strength, comment, words):
    with desk_of(tmp_path, questions(1)) as desk:
        with pytest.raises(UserError) as raised:
            desk.choose("Ann", desk.show("Ann").pair.key, choice, strength, comment)
        assert words in str(raised.value) and desk.records() == []
        with pytest.raises(UserError, match="there is no pair 'nothing'"):
            desk.choose("Ann", "nothing", "left")


def test_a_name_is_one_whatever_its_spaces_and_accents():
    assert clean_name("  Zoe\u0308  B ") == "Zoë B"
    for wrong in ("", "  ", None, 3, "x" * 61, "a\x00b"):
        with pytest.raises(UserError, match="it must have 1 to 60 letters"):
            clean_name(wrong)


def test_a_program_chooses_in_every_pair_once_and_goes_on_where_it_stopped(tmp_path):
    rows, asked = questions(6), []

    def longer(pair, left, right):
        asked.append(pair.key)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return "left" if len(left.answer) > len(right.answer) else "right"

    with desk_of(tmp_path, rows) as desk, pytest.raises(KeyboardInterrupt):
        desk.decide("a program", longer)
    with desk_of(tmp_path, rows) as desk:
        desk.decide("a program", longer)
        records = desk.records()
    assert len(records) == len({record["pair"] for record in records}) == 6
    assert all(len(record[record["choice"]]["answer"]) > 8 for record in records)
