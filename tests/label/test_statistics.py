"""Agreement, shares and strengths against published examples and numbers worked out by hand."""

import math

import numpy as np
import pytest

from lm.label.statistics import MISSING, bradley_terry, cohen_kappa, krippendorff_alpha, share, wilson


def ratings(*rows: str) -> np.ndarray:
    return np.array([[MISSING if mark == "." else int(mark) for mark in row] for row in rows])


def test_kappa_of_the_textbook_table():
    """20 both yes, 5 only the first, 10 only the second, 15 both no: 0.7 seen, 0.5 by chance."""
    first = np.repeat([1, 1, 0, 0], [20, 5, 10, 15])
    second = np.repeat([1, 0, 1, 0], [20, 5, 10, 15])
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa(first, first) == 1
    assert math.isnan(cohen_kappa(np.ones(3, int), np.ones(3, int))) and math.isnan(cohen_kappa(first[:0], first[:0]))


def test_alpha_of_krippendorffs_examples():
    """Computing Krippendorff's alpha-reliability (2011): binary data of two, and four observers with gaps."""
    assert krippendorff_alpha(ratings("0100000010", "1110010000")) == pytest.approx(0.095, abs=5e-4)
    four = ratings("1233214 12...".replace(" ", ""), "12332241 25.3".replace(" ", ""), ".3332342 251.".replace(" ", ""),
                   "12332441 251.".replace(" ", ""))  # fmt: skip
    assert krippendorff_alpha(four) == pytest.approx(0.743, abs=5e-4)


def test_alpha_without_two_judgements_of_a_unit_is_no_number():
    assert math.isnan(krippendorff_alpha(ratings("12..", "..21")))
    assert math.isnan(krippendorff_alpha(ratings("....")))
    assert math.isnan(krippendorff_alpha(ratings("11", "11")))


def test_wilsons_interval():
    """8 of 10, by hand: middle (0.8 + 0.19207) / 1.38415, half 1.41600 * sqrt(0.016 + 0.0096036)."""
    assert wilson(0.8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)


def test_a_share_of_independent_choices_is_wilsons():
    scores = np.array([1.0] * 8 + [0.0] * 2)
    assert share(scores, range(10)) == (0.8, *map(pytest.approx, wilson(0.8, 10)), 10)
    assert math.isnan(share(scores[:0], []).value)


def test_a_choice_that_is_there_many_times_narrows_no_interval():
    scores = np.array([1.0] * 8 + [0.0] * 2)
    once, often = share(scores, range(10)), share(np.tile(scores, 5), list(range(10)) * 5)
    assert often[:3] == pytest.approx(once[:3]) and often.n == 50
    assert share(np.ones(20), [0, 1] * 10)[1:3] == pytest.approx(wilson(1.0, 2))


def test_ties_make_no_interval_narrower_than_as_many_choices_would():
    assert share(np.full(10, 0.5), range(10))[1:3] == pytest.approx(wilson(0.5, 10))


def test_two_sources_have_the_odds_of_their_wins():
    """12 wins to 4: log 3 apart, standard error sqrt(1/12 + 1/4) of the difference, half of each for a value."""
    n = 16
    found = bradley_terry(np.zeros(n, int), np.ones(n, int), np.repeat([1.0, 0.0], [12, 4]), range(n), 2)
    assert found.values == pytest.approx([math.log(3) / 2, -math.log(3) / 2])
    assert found.high - found.values == pytest.approx(np.full(2, 1.959964 * math.sqrt(1 / 12 + 1 / 4) / 2), rel=1e-6)


WINS = """
    - 7 9 7 7 9 11
    6 - 7 5 11 9 9
    4 6 - 7 7 8 12
    6 8 6 - 6 7 10
    6 2 6 7 - 7 12
    4 4 5 6 6 - 6
    2 4 1 3 1 7 -"""


def test_strengths_of_the_baseball_season():
    """American League, 1987 (Agresti, Categorical Data Analysis, 2002, table 10.10): strengths less Baltimore's."""
    wins = [[0 if cell == "-" else int(cell) for cell in row.split()] for row in WINS.strip().splitlines()]
    games = [(i, j) for i in range(7) for j in range(7) for _ in range(wins[i][j])]
    first, second = np.array(games).T
    found = bradley_terry(first, second, np.ones(len(games)), range(len(games)), 7)
    published = [1.5814, 1.4364, 1.2945, 1.2476, 1.1077, 0.6839, 0.0]
    assert found.values - found.values[-1] == pytest.approx(published, abs=1e-4)
    turned = bradley_terry(second, first, np.zeros(len(games)), range(len(games)), 7)
    assert turned.values == pytest.approx(found.values)


def test_strengths_that_have_no_maximum_are_not_made_up():
    zero, one = np.zeros(4, int), np.ones(4, int)
    assert bradley_terry(zero, one, np.ones(4), range(4), 2) is None
    assert bradley_terry(zero, one, np.array([1.0, 0, 1, 0]), range(4), 3) is None
    assert bradley_terry(zero, one, np.full(4, 0.5), range(4), 2).values == pytest.approx([0, 0])


def test_the_interval_counts_prompts_and_not_choices():
    first, second, scores = np.zeros(16, int), np.ones(16, int), np.repeat([1.0, 0.0], [12, 4])
    once = bradley_terry(first, second, scores, range(16), 2)
    four = bradley_terry(*(np.tile(x, 4) for x in (first, second, scores)), list(range(16)) * 4, 2)
    assert four.high == pytest.approx(once.high) and four.low == pytest.approx(once.low)
