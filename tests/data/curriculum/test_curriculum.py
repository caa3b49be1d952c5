"""Every generated row is a pure function of its index, right by its own verifier, and what it promises to be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict

import pytest

from lm.data.chat import check_conversation
from lm.data.curriculum import (
    LENGTH,
    arithmetic,
    arithmetic_row,
    drill_row,
    drills,
    instruct_row,
    knowledge,
    preference_row,
    short_answer_row,
    words,
)
from lm.data.curriculum.countdown import countdown_row
from lm.data.curriculum.draw import Draw
from lm.data.curriculum.style import CLOSERS, OPENERS, dress, undress
from lm.data.curriculum.tasks import WEIGHTS, draw_task
from lm.data.split import ALWAYS_TRAINED
from lm.rollout.verifiers import VERIFIERS

ROWS = 3000
answer, style = VERIFIERS["answer"], VERIFIERS["style"]


@pytest.mark.parametrize("make", [instruct_row, arithmetic_row, preference_row, short_answer_row])
def test_rows_are_pure_functions_of_the_index(make):
    assert [make(i) for i in (5, LENGTH - 1, 5)] == [make(5), make(LENGTH - 1), make(5)]
    assert len({str(make(i)) for i in range(200)}) > 150
    code = f"from lm.data.curriculum import {make.__name__} as f; print([f(i) for i in range(20)])"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    assert ast.literal_eval(other.stdout) == [make(i) for i in range(20)]


@pytest.mark.parametrize("family", WEIGHTS, ids=lambda family: family.__name__)
def test_every_family_is_right_dressed_or_not(family):
    for index in range(200):
        task = family(Draw(99, index))
        assert task.prompt[0].isupper() or task.prompt[0].isdigit()
        assert "  " not in task.prompt
        for opener in ("", OPENERS[index % len(OPENERS)]):
            for closer in ("", CLOSERS[index % len(CLOSERS)]):
                text = dress(task.core, opener, closer)
                assert answer({"answer": task.core}, text) == 1.0
                assert style({}, text) == 0.5 * bool(opener) + 0.5 * (not closer)
                assert undress(text)[0] == bool(opener) and undress(text)[2] == bool(closer)


@pytest.mark.parametrize("make", [instruct_row, arithmetic_row, short_answer_row])
def test_demonstrations_are_valid_and_right(make):
    for row in map(make, range(ROWS)):
        check_conversation(row["messages"], "row")
        assert answer(row, row["messages"][1]["content"]) == 1.0


def test_short_answers_share_a_key_in_all_wordings():
    asked = defaultdict(set)
    for row in map(short_answer_row, range(ROWS)):
        asked[row["key"]].add(row["question"])
        assert row["question"].endswith(' End your reply with "The answer is" and the answer.')
    keys = {
        word: {key for key, questions in asked.items() if any(word in q for q in questions)}
        for word in ("Rome", '"cup"', "7 + 8")
    }
    assert keys == {"Rome": {"capital:Italy"}, '"cup"': {"plural:cup"}, "7 + 8": {"small_sum:7+8"}}
    assert sum(map(len, asked.values())) > 2 * len(asked)


def test_python_is_right_about_the_python_answers():
    pattern = re.compile(r"(?:What does (.+) give in Python\?|What is (.+) in Python\?|Evaluate (.+))$")
    seen = 0
    for row in map(instruct_row, range(ROWS)):
        match = pattern.match(row["messages"][0]["content"])
        if match:
            assert str(eval(next(filter(None, match.groups())))) == row["answer"]
            seen += 1
    assert seen > 100


def test_python_is_right_about_the_arithmetic():
    pattern = re.compile(r"(?:What is (.+)\?|Calculate (.+)|What does (.+) evaluate to\?|How much is (.+)\?)$")
    spoken = ((" plus ", "+"), (" minus ", "-"), (" times ", "*"))
    seen = 0
    for row in map(arithmetic_row, range(ROWS)):
        match = pattern.match(row["question"])
        if match:
            expression = next(filter(None, match.groups()))
            for word, sign in spoken:
                expression = expression.replace(word, sign)
            assert str(eval(expression)) == row["answer"]
            assert int(row["answer"]) >= 0
            seen += 1
    assert seen > ROWS // 2


def test_every_step_of_a_worked_demonstration_is_true():
    seen = 0
    for row in map(arithmetic_row, range(ROWS)):
        text = row["messages"][1]["content"]
        if text.startswith(arithmetic.WORKED_MARKER):
            seen += 1
            for left, right in re.findall(r"(\d+(?: [-+*] \d+)+) = (\d+)", text):
                assert eval(left) == int(right)
        else:
            assert text == f"The answer is {row['answer']}."
    assert seen / ROWS == pytest.approx(arithmetic.WORKED_PERCENT / 100, abs=0.03)


def test_no_worked_step_is_itself_a_problem():
    problems = {row["key"] for row in map(arithmetic_row, range(40_000))}
    for row in map(arithmetic_row, range(ROWS)):
        for left, sign, right in re.findall(r"(?<![-+*] )\b(\d+) ([-+*]) (\d+) =", row["messages"][1]["content"]):
            key = {"+": "+".join(sorted((left, right), key=int)), "-": f"{left}-{right}"}.get(sign, f"{left}*{right}")
            assert key not in problems, row


def test_symmetric_problems_share_a_key_and_wordings_too():
    by_key = defaultdict(set)
    for row in map(arithmetic_row, range(40_000)):
        by_key[row["key"]].add((row["answer"], row["question"]))
    assert all(len({value for value, _ in group}) == 1 for group in by_key.values())
    asked = {question: key for key, group in by_key.items() for _, question in group}
    pairs = [(q, m) for q in asked if (m := re.fullmatch(r"What is (\d+) plus (\d+)\?", q))]
    swapped = [(q, f"What is {m[2]} plus {m[1]}?") for q, m in pairs]
    both = [(a, b) for a, b in swapped if b in asked and a != b]
    assert len(both) > 20
    assert all(asked[a] == asked[b] for a, b in both)


def test_the_problem_space_is_large():
    assert len({arithmetic_row(i)["key"] for i in range(120_000)}) > 17_000


def test_explanations_are_one_sentence_of_8_to_18_words():
    assert len(knowledge.EXPLANATIONS) >= 40
    for term, sentence in knowledge.EXPLANATIONS.items():
        assert 8 <= len(sentence.split()) <= 18, sentence
        assert sentence[0].isupper() and sentence.endswith(".")
        assert sentence.lower().startswith(term.lower() + " is ")


def test_what_is_an_llm_is_taught_and_never_held_out():
    keys = {row["messages"][0]["content"]: row["key"] for row in map(instruct_row, range(20_000))}
    assert keys["What is an LLM?"] == ALWAYS_TRAINED
    assert keys["Define an LLM."] == "explain:an LLM:2"


def test_families_come_by_weight():
    counts = defaultdict(int)
    for index in range(10_000):
        counts[draw_task(Draw(7, index))[0]] += 1
    for family, weight in WEIGHTS.items():
        assert abs(counts[family.__name__] / 10_000 - weight / sum(WEIGHTS.values())) < 0.015
    assert 0.17 < counts["explain"] / 10_000 < 0.23


def test_openers_and_closers_come_independently():
    dressed = [undress(row["messages"][1]["content"]) for row in map(instruct_row, range(ROWS))]
    opened, closed, both = (
        sum(map(kind, dressed)) / ROWS for kind in (lambda d: d[0], lambda d: d[2], lambda d: d[0] and d[2])
    )
    assert opened == pytest.approx(1 / 2, abs=0.03) and closed == pytest.approx(1 / 3, abs=0.03)
    assert both == pytest.approx(opened * closed, abs=0.02)


def test_the_functions_run_and_do_what_they_say():
    scope: dict = {}
    for source in knowledge.FUNCTIONS.values():
        exec(source, scope)
    assert scope["add"](2, 3) == 5 and scope["subtract"](5, 3) == 2 and scope["multiply"](2, 3) == 6
    assert scope["square"](3) == 9 and scope["double"](4) == 8
    assert scope["is_even"](4) and not scope["is_even"](3) and scope["is_odd"](3)
    assert scope["larger"](2, 3) == 3 and scope["smaller"](2, 3) == 2
    assert scope["reverse"]("abc") == "cba" and scope["first"]([1, 2]) == 1 and scope["last"]([1, 2]) == 2
    assert scope["count"]([1, 2]) == 2 and scope["total"]([1, 2]) == 3


def test_word_lists_have_no_doubles():
    for listed in (words.NOUNS, words.COUNTABLE, words.ADJECTIVES, [w for pair in words.OPPOSITES for w in pair]):
        assert len(set(listed)) == len(listed)
    assert len({city for _, city in words.CAPITALS}) == len({country for country, _ in words.CAPITALS}) == 50


def test_preferences_differ_in_style_and_not_in_content():
    rejected_style = set()
    for row in map(preference_row, range(ROWS)):
        assert style(row, row["chosen"]) == 1.0 > style(row, row["rejected"])
        assert answer(row, row["chosen"]) == answer(row, row["rejected"]) == 1.0
        rejected_style.add(style(row, row["rejected"]))
    assert rejected_style == {0.0, 0.5}


def test_preferences_ask_under_the_keys_of_the_instructions():
    asked = {row["messages"][0]["content"]: row["key"] for row in map(instruct_row, range(20_000))}
    shared = [row for row in map(preference_row, range(ROWS)) if row["prompt"] in asked]
    assert len(shared) > ROWS // 4
    assert all(row["key"] == asked[row["prompt"]] for row in shared)


def test_drills_are_right_and_are_no_problem_of_the_other_generators():
    """Facts are true, and their second number has one digit; lists are longer than any that a question is asked about."""
    facts = 0
    for index in range(400):
        text = drill_row(index)["text"]
        assert text == drill_row(index)["text"]
        for a, sign, b, value in re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", text):
            assert eval(f"{a} {sign} {b}") == int(value) and int(b) < 10
            assert sign != "*" or int(a) < 10
            facts += 1
    assert facts > 500
    asked = {arithmetic_row(index)["key"] for index in range(2000)}
    assert not asked & {f"{a}{sign}{b}" for a in range(100) for b in range(10) for sign in "+-"}
    assert not asked & {f"{a}*{b}" for a in range(10) for b in range(10)}
    questions = " ".join(instruct_row(index)["messages"][0]["content"] for index in range(2000))
    lists = re.findall(r"\w+(?:, \w+)+", questions)
    assert max(one.count(",") for one in lists) + 1 < drills.SHORTEST
    for index in range(200):
        draw = Draw(4, index)
        assert drills.words(draw).split(".")[0].count(",") + 1 == drills.WORDS
        assert drills.SHORTEST <= drills.numbers(draw).split(".")[0].count(",") + 1 <= drills.LONGEST


def test_a_countdown_search_is_true_and_ends_at_the_target():
    rows = [countdown_row(index) for index in range(1500)]
    searches = [row for row in rows if "=" in row["messages"][1]["content"]]
    assert 0.15 < len(searches) / len(rows) < 0.25
    for row in searches:
        steps, answer = row["messages"][1]["content"].removesuffix(".").split(". The answer is ")
        found = [step.split("=") for step in re.split("[,;] ", steps)]
        assert all(eval(calculation) == int(result) for calculation, result in found)
        after_two = [int(result) for number, (_, result) in enumerate(found) if number % 3]
        assert after_two.index(row["target"]) == len(after_two) - 1
        assert answer == row["answer"] and eval(answer) == row["target"]
        assert sorted(map(int, re.findall(r"\d+", answer))) == sorted(row["numbers"])
