"""Rows of every layout that people have become the same canonical row."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data.layouts import canonical, flag


def turns(*texts, system=None):
    """A conversation of these texts, the user's first."""
    led = [] if system is None else [{"role": "system", "content": system}]
    return led + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


ASK, SAY, BAD = "Why is it so?", "It is 3.", "No."
HH = "\n\nHuman: {}\n\nAssistant: {}"
ASKED = {"prompt": turns(ASK), "completion": SAY}
PAIR = {"prompt": turns(ASK), "chosen": SAY, "rejected": BAD}

SAME = {
    "question and answer": ({"question": ASK, "answer": SAY}, ASKED | {"answer": SAY}),
    "prompt and completion": ({"prompt": ASK, "completion": SAY}, ASKED),
    "turns": ({"prompt": turns(ASK), "completion": SAY}, ASKED),
    "Alpaca": ({"instruction": ASK, "input": "", "output": SAY}, ASKED),
    "Alpaca, input": (
        {"instruction": ASK, "input": "A sky.", "output": SAY},
        {"prompt": turns(f"{ASK}\n\nA sky."), "completion": SAY},
    ),
    "Alpaca, history": (
        {"instruction": ASK, "history": [["a", "b"]], "output": SAY},
        {"prompt": turns("a", "b", ASK), "completion": SAY},
    ),
    "Dolly": (
        {"instruction": ASK, "context": "A sky.", "response": SAY},
        {"prompt": turns(f"{ASK}\n\nA sky."), "completion": SAY},
    ),
    "Orca": (
        {"system_prompt": "Be brief.", "question": ASK, "response": SAY},
        {"prompt": turns(ASK, system="Be brief."), "completion": SAY},
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": SAY}]},
        {"messages": turns(ASK, SAY)},
    ),
    "conversations of roles": ({"conversations": turns(ASK, SAY)}, {"messages": turns(ASK, SAY)}),
    "messages as JSON": ({"messages": json.dumps(turns(ASK, SAY))}, {"messages": turns(ASK, SAY)}),
    "nulls": (
        {"messages": None, "prompt": None, "question": ASK, "answer": SAY, "key": None},
        ASKED | {"answer": SAY},
    ),
    "nulls in turns": (
        {"messages": [None, {"role": "user", "content": ASK, "name": None}, {**turns("", SAY)[1], "tool_calls": []}]},
        {"messages": turns(ASK, SAY)},
    ),
    "text parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ASK}]}, turns("", SAY)[1]]},
        {"messages": turns(ASK, SAY)},
    ),
    "HH": (
        {"chosen": HH.format(ASK, SAY), "rejected": HH.format(ASK, BAD)},
        {"chosen": turns(ASK, SAY), "rejected": turns(ASK, BAD)},
    ),
    "HH with a prompt": ({"prompt": HH.format(ASK, ""), "chosen": SAY, "rejected": BAD}, PAIR),
    "Orca pairs": (
        {"system": "Be brief.", "question": ASK, "chosen": SAY, "rejected": BAD},
        PAIR | {"prompt": turns(ASK, system="Be brief.")},
    ),
    "ShareGPT pairs": (
        {
            "conversations": [{"from": "human", "value": ASK}],
            "chosen": {"from": "gpt", "value": SAY},
            "rejected": {"from": "gpt", "value": BAD},
        },
        {"prompt": turns(ASK), "chosen": turns("", SAY)[1:], "rejected": turns("", BAD)[1:]},
    ),
    "a system column": (
        {"system": "Be brief.", "messages": turns(ASK, SAY)},
        {"messages": turns(ASK, SAY, system="Be brief.")},
    ),
    "the same system": (
        {"system": "Be brief.", "messages": turns(ASK, SAY, system="Be brief.")},
        {"messages": turns(ASK, SAY, system="Be brief.")},
    ),
    "an empty system": ({"system": " ", "messages": turns(ASK, SAY)}, {"messages": turns(ASK, SAY)}),
    "a number": ({"question": ASK, "answer": 3}, {"prompt": turns(ASK), "completion": "3", "answer": 3}),
    "a judged answer": (
        {"instruction": ASK, "output": SAY, "label": 1},
        {"prompt": turns(ASK), "completion": SAY, "label": 1},
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_a_row_of_a_layout_becomes_the_canonical_one(name):
    row, expected = SAME[name]
    assert canonical(row) == expected


def test_what_cannot_be_honoured_stays_for_the_reader_to_refuse():
    kept = {"system": "One.", "messages": turns(ASK, SAY, system="Another.")}
    assert canonical(kept) == kept
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, turns("", SAY)[1]]
    assert canonical({"messages": picture}) == {"messages": picture}


NAMES = st.sampled_from(
    "text messages conversations prompt chosen rejected completion question query instruction input context output response "
    "answer history system system_prompt label key tools id".split()
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=3)
LEAVES |= st.sampled_from([HH.format(ASK, SAY), json.dumps(turns(ASK, SAY)), '[{"role"', "Human: a\n\nAssistant:", " "])
KEYS = st.sampled_from(["role", "content", "from", "value", "type", "text", "weight", "tool_calls", "name"])
WORDS = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", "text"])
VALUES = st.recursive(
    LEAVES | WORDS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)
JUNK = st.dictionaries(NAMES, VALUES, max_size=5)


@settings(max_examples=400)
@given(JUNK)
def test_any_row_has_a_canonical_form_which_is_its_own(row):
    once = canonical(row)
    assert repr(sorted(canonical(once).items())) == repr(sorted(once.items()))
    assert None not in once.values()


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        (True, True),
        (1, True),
        (1.0, True),
        ("1", True),
        ("1.0", True),
        ("True", True),
        (0, False),
        ("false", False),
        (0.0, False),
    ]
    + [(value, None) for value in (2, -1, 0.5, float("nan"), "yes", "", [], None)],
)
def test_flags(value, meant):
    assert flag(value) is meant
