"""The numbers of the summary follow from the choices, whatever the sides, and its page escapes what people wrote."""

import math

import pytest

from lm.label.statistics import wilson
from lm.label.summary import summarise, verdict
from lm.label.summary_page import render_summary
from tests.label.label_rows import chosen


def test_a_verdict_is_about_answers_and_not_about_sides():
    assert verdict(chosen("Ann", "p", "x", "y", "left")) == verdict(chosen("Bob", "p", "y", "x", "right"))
    assert verdict(chosen("Ann", "p", "x", "y", "left")) != verdict(chosen("Bob", "p", "y", "x", "left"))
    assert verdict(chosen("Ann", "p", "x", "y", "tie")) == "tie"
    assert verdict(chosen("Ann", "p", "x", "y", "skip")) is None


def test_agreement_counts_the_pairs_that_two_have_judged():
    """Ann and Bob agree on 3 of 4: x 2 of 4 against 3 of 4, so 0.5 by chance and kappa 0.5; Cy shares nothing."""
    records = []
    for prompt, ann, bob in (
        ("a", "left", "right"),
        ("b", "left", "right"),
        ("c", "right", "left"),
        ("d", "right", "right"),
    ):
        records += [chosen("Ann", prompt, "x", "y", ann), chosen("Bob", prompt, "y", "x", bob)]
    records += [chosen("Cy", "e", "x", "y", "left"), chosen("Cy", "a", "x", "y", "skip")]
    found = summarise(records)
    assert found.agreement.units == 4
    assert found.agreement.two == [("Ann", "Bob", 4, 0.75, pytest.approx(0.5))]
    # Coincidences: 2·2 of (x, x), 1·2 of (y, y), 1 each way of (x, y): 1 - 7 · 2 / (5 · 3).
    assert found.agreement.alpha == pytest.approx(1 - 7 * 2 / (2 * 5 * 3))
    assert found.pairs == 5 and found.people["Cy"] == {"left": 1, "right": 0, "tie": 0, "both bad": 0, "skip": 1}


def test_side_and_length_are_shares_of_what_was_preferred():
    records = [chosen("Ann", f"p{i}", "long one", "short", "left" if i < 8 else "right") for i in range(10)]
    records += [chosen("Ann", "even", "four", "five", "left"), chosen("Ann", "tie", "long one", "short", "tie")]
    found = summarise(records)
    assert found.left == (9 / 11, *map(pytest.approx, wilson(9 / 11, 11)), 11)
    assert found.longer == (0.8, *map(pytest.approx, wilson(0.8, 10)), 10), "equal lengths say nothing of length"


def contest(prompt: str, winner: str, loser: str, choice: str = "left"):
    return chosen("Ann", prompt, f"of {winner}", f"of {loser}", choice, left_source=winner, right_source=loser)


def test_who_wins_with_ties_as_half():
    records = [contest(f"p{i}", "sft", "dpo") for i in range(3)] + [
        contest("q", "dpo", "sft"),
        contest("r", "dpo", "sft", "tie"),
    ]
    best, second = summarise(records).sources
    assert (best.name, best.won, best.lost, best.neither, best.wins.value) == ("sft", 3, 1, 1, 0.7)
    assert (second.name, second.wins.value, second.strength) == ("dpo", pytest.approx(0.3), None)
    assert not summarise([chosen("Ann", "p", "x", "y", "left")]).sources


def test_strengths_order_more_than_two_when_they_are_finite():
    ring = [
        contest(f"{a}{b}{i}", a, b)
        for a, b, n in (("a", "b", 3), ("b", "c", 3), ("c", "a", 1), ("a", "c", 2))
        for i in range(n)
    ]
    found = summarise(ring)
    assert found.finite and [source.name for source in found.sources] == ["a", "b", "c"]
    assert all(source.strength[1] < source.strength[0] < source.strength[2] for source in found.sources)
    assert sum(source.strength[0] for source in found.sources) == pytest.approx(0, abs=1e-9)
    unbeaten = summarise([contest("p", "a", "b"), contest("q", "b", "c")])
    assert not unbeaten.finite and "no Bradley-Terry strengths yet" in render_summary(unbeaten)
    assert "log-odds that the one beats the other" in render_summary(found)


def test_the_page_escapes_names_and_says_when_there_is_nothing():
    evil = "<script>alert(1)</script>"
    page = render_summary(summarise([contest("p", evil, "b"), chosen(evil, "q", "x", "y", "left", seconds=None)]))
    assert evil not in page and "&lt;script&gt;" in page
    empty = summarise([])
    assert "There are no choices yet" in render_summary(empty) and math.isnan(empty.agreement.alpha)
