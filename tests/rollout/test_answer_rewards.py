"""Rewards by simple rules: right on what they are made for, total, and strict about their parameters."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.data.bad_rows import names_of_needs
from lm.experiment import UserError
from lm.rollout.answer_rewards import LANGUAGES
from lm.rollout.rewards import compute_rewards
from lm.rollout.verifiers import RULES, VERIFIERS, find_verifier, needed_columns

CAPITALS = {"choices": ["Rome", "Paris", "Bonn"], "answer": "Paris"}
SCHEMA = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}, "additionalProperties": False}
TAGGED = "<think>\n1 + 1\n</think>\n<answer>2</answer>\n"


@pytest.mark.parametrize(
    ("name", "row", "completion", "reward"),
    [
        ("exact", {"answer": "a b"}, " a b\n", 1),
        ("exact", {"answer": "a b"}, "a  b", 0),
        ("exact", {"answer": "95"}, "The answer is 95.", 0),
        ("choice", {"answer": "B"}, "B", 1),
        ("choice", {"answer": "B"}, "(B)", 1),
        ("choice", {"answer": "B"}, "B) Paris", 1),
        ("choice", {"answer": "B"}, "The answer is B.", 1),
        ("choice", {"answer": "B"}, r"Not A, so \boxed{B}", 1),
        ("choice", {"answer": "B"}, "The answer is (C).", 0),
        ("choice", {"answer": "B"}, "A or B", 0),
        ("choice", {"answer": "B"}, "A) or B)", 0),
        ("choice", {"answer": "B"}, "A, B, C, D: all of them", 0),
        ("choice", {"answer": "B"}, "", 0),
        ("choice", CAPITALS, "B", 1),
        ("choice", CAPITALS, "Paris", 1),
        ("choice", CAPITALS, "The answer is Paris.", 1),
        ("choice", CAPITALS, "The answer is Rome.", 0),
        ("choice", CAPITALS, "A", 0),
        (r"regex:^\d+ (a|b):c$", {}, "12 b:c", 1),
        (r"regex:^\d+ (a|b):c$", {}, "12 d:c", 0),
        ("json_schema", {"schema": SCHEMA}, '{"n": 1}', 1),
        ("json_schema", {"schema": json.dumps(SCHEMA)}, 'So:\n```json\n{"n": 1}\n```', 1),
        ("json_schema", {"schema": SCHEMA}, '{"n": "1"}', 0),
        ("json_schema", {"schema": SCHEMA}, '{"n": 1', 0),
        ("json_schema", {"schema": SCHEMA}, "[" * 100_000, 0),
        ("json_schema", {"schema": True}, "NaN", 0),
        ("format", {}, TAGGED, 1),
        ("format", {}, f"Hello {TAGGED}", 0),
        ("format", {}, f"{TAGGED} bye", 0),
        ("format", {}, TAGGED + TAGGED, 0),
        ("format", {}, "<think>1</think><answer>2", 0),
        ("format", {}, "<answer>2</answer><think>1</think>", 0),
        ("format", {}, "<think>a<think>b</think><answer>2</answer>", 0),
        ("format:plan,code", {}, "<plan>x</plan> <code>y</code>", 1),
        ("language:en", {}, "First I add the two numbers, then I divide the sum by the third one.", 1),
        ("language:en", {}, "Zuerst addiere ich die beiden Zahlen, dann teile ich die Summe durch die dritte.", 0),
        ("language:de", {}, "Zuerst addiere ich die beiden Zahlen, dann teile ich die Summe durch die dritte.", 1),
        ("language:en", {}, "1 + 2 = 3", 0),
        ("overlong:384-512", {"completion_tokens": 384}, "", 0),
        ("overlong:384-512", {"completion_tokens": 448}, "", -0.5),
        ("overlong:384-512", {"completion_tokens": 512}, "", -1),
        ("overlong:384-512", {"completion_tokens": 600}, "", -1),
    ],
)  # fmt: skip
def test_a_rule_gives_its_reward(name, row, completion, reward):
    assert find_verifier(name)(row, completion) == reward


def test_the_share_of_a_language_is_that_of_its_letters():
    english = "First I add the two numbers, then I divide the sum by the third one."
    found = find_verifier("language:en")(
        {}, f"{english}\n首先把这两个数相加,然后把和除以第三个数,最后写下答案并检查每一步是否正确。\n{english}"
    )
    assert 0.6 < found < 1


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("regex:(", "is no regular expression: missing"),
        ("regex:a{9999999999}", "is no regular expression: the repetition number is too large"),
        ("format:a b", "it should be names of tags, for instance format:think,answer"),
        ("language:xx", "it should be one of ar, bg"),
        ("language", "it should be one of ar, bg"),
        ("overlong:512-384", "it should be two numbers of tokens, for instance overlong:384-512"),
        ("overlong", "it should be two numbers of tokens"),
        ("json_schema:no/such.json", "there is no such file"),
        ("answer:x", "cannot find|no file|there is"),
        ("exakt", f"there are {', '.join([*VERIFIERS, *RULES])}, and FILE:FUNCTION of your own"),
    ],
)
def test_a_parameter_that_makes_no_sense_is_refused_in_one_line(name, problem):
    with pytest.raises(UserError, match=problem) as caught:
        find_verifier(name, "reason.objective.verifier")
    assert str(caught.value).startswith(f"reason.objective.verifier is {name!r}")
    assert "\n" not in str(caught.value)


def test_a_schema_of_a_file_needs_no_column(tmp_path):
    (tmp_path / "s.json").write_text(json.dumps(SCHEMA))
    name = f"json_schema:{tmp_path}/s.json"
    assert needed_columns(name) == ()
    assert names_of_needs(needed_columns("json_schema")) == ["schema"]
    assert find_verifier(name)({}, '{"n": 2}') == 1


@pytest.mark.parametrize(
    "schema",
    ['{"type": 5}', "{", '{"$schema": "no"}', "5", "null", '{"$schema": []}', '{"$schema": 1e9}', "[" * 100_000],
)
def test_a_column_that_holds_no_schema_is_named(schema):
    if "no" in schema:
        assert find_verifier("json_schema")({"schema": schema}, "1") == 1  # an unknown dialect is read as the newest
        return
    with pytest.raises(UserError, match="the column schema is no JSON schema"):
        find_verifier("json_schema")({"schema": schema}, "1")


def test_a_file_that_holds_no_schema_is_refused(tmp_path):
    for content in (b"", b"{", b'{"a": "\xed\xa0"}'):
        (tmp_path / "s.json").write_bytes(content)
        with pytest.raises(UserError, match=r"s\.json (is no JSON schema|cannot be read)") as caught:
            find_verifier(f"json_schema:{tmp_path}/s.json")
        assert "\n" not in str(caught.value)


def test_a_schema_fetches_nothing():
    row = {"schema": {"$ref": "http://127.0.0.1:9/none.json"}}
    with pytest.raises(UserError, match="refers to what it does not hold"):
        find_verifier("json_schema")(row, "1")


def test_a_pattern_that_never_ends_costs_its_limit_and_is_counted():
    found = compute_rewards("regex:^(a+)+$", [{}] * 3, ["aaa", "a" * 64 + "b", "b"], "reason", seconds=2.0)
    assert found.values.tolist() == [1, 0, 0]
    assert found.late.tolist() == [False, True, False]


NAMES = ["exact", "choice", "regex:a.c", "json_schema", "format", "overlong:1-2"]
TEXTS = st.text(max_size=60) | st.sampled_from(["A", "(B)", "```json\n{}\n```", TAGGED, "\ud800", "\0"])


@given(name=st.sampled_from(NAMES), completion=TEXTS, expected=TEXTS)
def test_every_rule_is_total(name, completion, expected):
    row = {"answer": expected, "choices": [expected, "A"], "schema": {}, "completion_tokens": 1}
    assert -1 <= find_verifier(name)(row, completion) <= 1


def test_every_rule_is_tested():
    elsewhere = {"answer", "style", "helpful", "python_tests", "language", "endpoint"}
    assert {name.partition(":")[0] for name in NAMES} | elsewhere == VERIFIERS.keys() | RULES.keys()


def test_every_language_is_one_that_the_library_knows():
    import py3langid

    assert set(LANGUAGES) <= set(
        py3langid.langid.LanguageIdentifier.from_model_file(py3langid.langid.MODEL_FILE).labels
    )
