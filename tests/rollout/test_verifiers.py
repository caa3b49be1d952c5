"""Verifiers are right on what they are made for, and total."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.data.bad_rows import COLUMNS, VALUE, BadRow, check_columns
from lm.data.curriculum.style import CLOSERS, OPENERS
from lm.experiment import UserError
from lm.rollout import code_tests
from lm.rollout.environments.table import ENVIRONMENTS
from lm.rollout.episodes import environment_spec
from lm.rollout.verifiers import NEEDS, RULES, VERIFIERS, expected_answer, needed_columns

answer, style = VERIFIERS["answer"], VERIFIERS["style"]


@pytest.mark.parametrize(
    ("row", "completion", "reward"),
    [
        ({"answer": "95"}, "95", 1),
        ({"answer": "95"}, " 95. ", 1),
        ({"answer": "95"}, "95.0", 1),
        ({"answer": "95"}, "96", 0),
        ({"answer": "95"}, "950", 0),
        ({"answer": "95"}, "-95", 0),
        ({"answer": "95"}, "94 or 95", 0),
        ({"answer": "95"}, "Let me work it out: 7 + 8 = 15. The answer is 95.", 1),
        ({"answer": "95"}, "The answer is 94. No, the answer is 95.", 1),
        ({"answer": "95"}, "The answer is 95. No, the answer is 94.", 0),
        ({"answer": "95"}, "Sure! The answer is 95. I hope that helps, but I may be wrong.", 1),
        ({"answer": "95"}, "Answer is: 95\nThat was easy.", 1),
        ({"answer": "95"}, r"So \boxed{95}.", 1),
        ({"answer": r"\frac{1}{2}"}, r"So \boxed{\frac{1}{2}} it is", 1),
        ({"answer": "1200"}, "#### $1,200.00", 1),
        ({"answer": "He has 3 + 4\n#### 1,200"}, "1200", 1),
        ({"answer": "nonsense #### 1", "final": "7"}, "The answer is 7", 1),
        ({"answer": "nonsense #### 1", "final": "7"}, "1", 0),
        ({"final": "7"}, "The answer is 7", 1),
        ({"final": 7, "answer": None}, "8", 0),
        ({"final": " ", "answer": "5"}, "5", 1),
        ({"answer": "Paris"}, "Paris.", 1),
        ({"answer": "Paris"}, "Of course. Paris", 1),
        ({"answer": "Paris"}, "paris", 0),
        ({"answer": "Paris"}, "", 0),
        ({"answer": ""}, "", 0),
        ({}, "Paris", 0),
        ({"answer": 7}, "7", 1),
        ({"answer": "inf"}, "nan", 0),
    ],
)
def test_answer(row, completion, reward):
    assert answer(row, completion) == reward


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (f"{OPENERS[0]} 4", 1.0),
        ("4", 0.5),
        (f"{OPENERS[1]} 4. {CLOSERS[0]}", 0.5),
        (f"4. {CLOSERS[1]}", 0.0),
        (f"{OPENERS[1]} {CLOSERS[0]} 4", 0.5),
        (OPENERS[0], 0.0),
        (f"{OPENERS[0]} {CLOSERS[0]}", 0.0),
        (f"{OPENERS[0]}\ndef f():\n    return 1", 1.0),
        ("", 0.0),
    ],
)
def test_style(completion, reward):
    assert style({}, completion) == reward


PIECES = st.sampled_from(
    [*OPENERS, *CLOSERS, "The answer is", "####", "\\boxed{", "}", "{", "$", ",", ".", "-", "1e9", "٣"]
)
COMPLETIONS = st.lists(PIECES | st.text(max_size=10), max_size=8).map("".join)
VALUES = st.none() | st.integers() | st.floats() | st.lists(st.integers(), max_size=2) | COMPLETIONS
ROWS = st.dictionaries(st.sampled_from(["answer", "final", "question"]), VALUES)


@given(row=ROWS, completion=COMPLETIONS)
def test_every_verifier_is_total(row, completion):
    for verifier in VERIFIERS.values():
        assert 0.0 <= verifier(row, completion) <= 1.0


@given(value=st.integers(), others=st.lists(st.integers(), min_size=1, max_size=3))
def test_listing_several_numbers_is_never_right(value, others):
    assert answer({"answer": str(value)}, str(value)) == 1.0
    assert answer({"answer": str(value)}, " ".join(map(str, [*others, value]))) == 0.0


def test_needs_cover_the_tables():
    assert NEEDS.keys() == {**VERIFIERS, **RULES}.keys()


@given(row=ROWS)
def test_a_row_with_the_needed_columns_has_an_expected_answer_and_no_other_has(row):
    try:
        check_columns(row, NEEDS["answer"], "row 1")
    except BadRow as error:
        assert (expected_answer(row) == "") == (error.reason == COLUMNS)
    else:
        assert expected_answer(row)


WRONG_VALUES = {
    "answer": [{"answer": ["7"]}, {"answer": {"value": 7}}, {"answer": float("nan")}, {"answer": "7", "final": [7]}],
    "choice": [{"answer": 1, "choices": ["a", "b"]}, {"answer": "c", "choices": ["a", "b"]}, {"answer": "b"}],
    "json_schema": [{"schema": "{"}, {"schema": 5}, {"schema": {"type": "objekt"}},
        {"schema": {"properties": {"a": {"$ref": "#/$defs/b"}}}},
    ],
    "python_tests": [
        {"tests": 5}, {"test_list": [1]}, {"test": []}, {"inputs": "1", "outputs": "2"}, {"inputs": ["1"], "outputs": []},
        {"inputs": [], "outputs": []},
    ],
    "countdown": [
        {"numbers": "1 2", "target": 3}, {"numbers": [1, "2"], "target": 3}, {"numbers": [1, 2], "target": "3"},
        {"numbers": [True], "target": 1}, {"numbers": [1.5], "target": 1}, {"numbers": [1], "target": [1]},
    ],
    "calculator": [{"answer": [7]}],
}  # fmt: skip
RIGHT_VALUES = {
    "answer": [{"answer": 7}, {"answer": True}, {"answer": ["7"], "final": 7.5}],
    "choice": [{"answer": "b", "choices": ["a", "b"]}, {"answer": "(C)"}, {"answer": "A", "choices": {"text": ["x"]}}],
    "json_schema": [
        {"schema": "{}"},
        {"schema": {"type": "object"}},
        {"schema": {"items": {"$ref": "#/$defs/b"}, "$defs": {"b": {}}}},
    ],
    "python_tests": [{"tests": "assert 1"}, {"inputs": [1], "outputs": [2]}, {"inputs": [], "test_list": ["assert 1"]}],
    "countdown": [{"numbers": [1, 2], "target": 3}, {"numbers": [1.0, 2.0], "target": 3.0}],
    "calculator": [{"answer": "7"}],
}


def needs_of(name):
    return environment_spec([name], name * (name in ENVIRONMENTS), "here", "here", 1.0).columns


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, rows in WRONG_VALUES.items() for row in rows])
def test_a_row_that_cannot_be_judged_is_told_when_it_is_read(name, row):
    with pytest.raises(BadRow, match=r"row 1: the verifier (cannot read a column|needs the column)") as caught:
        check_columns(row, needs_of(name), "row 1")
    assert caught.value.reason == VALUE and "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, rows in RIGHT_VALUES.items() for row in rows])
def test_a_row_that_can_be_judged_is_taken(name, row):
    check_columns(row, needs_of(name), "row 1")


def test_columns_of_a_verifier_of_ones_own_may_have_types(tmp_path):
    own = "def score(row, completion):\n    return 1\nscore.columns = {'low': int, ('hint', 'tip'): str | list[str]}\n"
    (tmp_path / "own.py").write_text(own)
    needs = needed_columns(f"{tmp_path}/own.py:score")
    check_columns({"low": 1, "tip": ["x"]}, needs, "row 1")
    for row in ({"low": "1", "tip": "x"}, {"low": 1, "hint": 5}):
        with pytest.raises(BadRow, match=r"(low is '1'|hint is 5); it should be of type"):
            check_columns(row, needs, "row 1")


def test_programs_without_tests_have_no_reward():
    with pytest.raises(UserError, match="should be Python code"):
        code_tests.python_tests(code_tests.UNJAILED)({"inputs": [], "outputs": []}, "pass")


@pytest.mark.parametrize("columns", ["5", "(1,)", "None", "((),)", "{'a': 1}.values()", "{'a': 1}"])
def test_columns_that_are_no_names_are_refused(tmp_path, monkeypatch, columns):
    (tmp_path / "own.py").write_text(f"def score(row, completion):\n    return 1\nscore.columns = {columns}\n")
    with pytest.raises(UserError, match=r"own\.py:score: its columns are .*; they should be a tuple of the names"):
        needed_columns(f"{tmp_path}/own.py:score")


@pytest.mark.parametrize("columns", ['"hint"', '["hint"]', '{"hint"}', '(("hint", "tip"),)'])
def test_columns_of_a_verifier_of_ones_own_may_be_one_name_or_several(tmp_path, columns):
    (tmp_path / "own.py").write_text(f"def score(row, completion):\n    return 1\nscore.columns = {columns}\n")
    needs = needed_columns(f"{tmp_path}/own.py:score")
    check_columns({"hint": "x"}, needs, "row 1")
    with pytest.raises(BadRow, match="row 1: the verifier needs the column hint"):
        check_columns({"h": "x"}, needs, "row 1")
