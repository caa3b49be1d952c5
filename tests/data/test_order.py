"""Shuffles are permutations, mixtures are exact, and both need no state."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.data.order import mixture, mixture_shares, permute


@given(length=st.integers(1, 500), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(length, key):
    assert sorted(permute(i, length, key) for i in range(length)) == list(range(length))


def test_permutations_look_random_and_differ_by_key():
    length = 1000
    one, two = (np.array([permute(i, length, key) for i in range(length)]) for key in (1, 2))
    for order in (one, two):
        assert abs(np.corrcoef(order, np.arange(length))[0, 1]) < 0.1
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.1
    assert (one == two).mean() < 0.01


def test_permute_of_a_very_long_range_stays_inside():
    length = (1 << 36) + 12345
    places = [permute(i, length, 5) for i in range(2000)]
    assert max(places) < length and len(set(places)) == 2000
    assert 0.4 < np.mean(places) / length < 0.6


WEIGHTS = st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(any)


@given(weights=WEIGHTS)
def test_mixtures_are_exact_gapless_and_evenly_spread(weights):
    shares = mixture_shares(weights)
    period = sum(weights)
    drawn = [mixture(index, shares) for index in range(3 * period)]
    for source, weight in enumerate(weights):
        assert [place for s, place in drawn if s == source] == list(range(3 * weight))
        for stop in range(3 * period):
            given_ = sum(s == source for s, _ in drawn[:stop])
            assert abs(given_ - Fraction(stop * weight, period)) <= source + 1


def test_decimal_weights_are_taken_exactly():
    assert mixture_shares([0.3, 0.7]) == [Fraction(3, 10), 1]
    drawn = [mixture(index, mixture_shares([1e-3, 0.999]))[0] for index in range(1000)]
    assert drawn.count(0) == 1


def test_a_far_index_is_as_cheap_as_a_near_one():
    source, place = mixture(10**18, mixture_shares([1, 2]))
    assert source in (0, 1) and abs(place - 10**18 * (source + 1) / 3) < 10**4


def test_no_shares_are_an_error():
    with pytest.raises(ValueError, match="last share"):
        mixture(0, [])
