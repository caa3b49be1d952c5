"""lm/evals/preferences.py: intervals that cover, a calibrated model, and what length alone knows."""

import numpy as np
import pytest

from lm.evals.preferences import bootstrap, calibration, length_bins, prefers_shorter, worth


def own(count: int) -> list[str]:
    """A prompt of its own for each pair."""
    return [str(i) for i in range(count)]


def calibrated(rng, count: int) -> np.ndarray:
    """Gaps of a model whose σ(gap) is the chance that the first answer is chosen, turned so that the chosen one is first."""
    gaps = rng.normal(0, 1.5, count)
    return np.where(rng.random(count) < 1 / (1 + np.exp(-gaps)), gaps, -gaps)


@pytest.mark.slow
def test_a_calibrated_model_has_no_calibration_error():
    rng = np.random.default_rng(0)
    gaps = calibrated(rng, 200_000)
    found = worth(gaps[:20_000], np.ones(20_000), False, own(20_000))
    assert found.calibration_error < 0.02
    over_sure = worth(3 * gaps[:20_000], np.ones(20_000), False, own(20_000))
    assert over_sure.calibration_error > 0.1 and over_sure.accuracy == found.accuracy
    assert over_sure.log_loss > found.log_loss
    assert all(abs(one.mean - one.right) < 0.02 for one in calibration(gaps))


@pytest.mark.slow
def test_the_interval_covers_the_truth():
    """400 pairs, right with a chance of 0.6: about 95 of 100 intervals hold 0.6."""
    rng = np.random.default_rng(1)
    held = 0
    for seed in range(100):
        found = bootstrap((rng.random(400) < 0.6).astype(float), own(400), seed)
        held += found.low <= 0.6 <= found.high
    assert 88 <= held <= 99


def test_the_lead_over_length_is_paired():
    """A model that does what length does has a lead of exactly 0, however few the pairs."""
    longer = np.array([3.0, -2.0, 5.0, -1.0, 4.0])
    found = worth(longer / 10, longer, False, own(5))
    assert found.lead == (0.0, 0.0, 0.0) and found.baseline.mean == pytest.approx(0.6)
    assert worth(longer / 10, longer, True, own(5)).baseline.mean == pytest.approx(0.4)
    assert not prefers_shorter(longer) and prefers_shorter(-longer)


def test_bins_of_length_hold_all_pairs_in_order():
    rng = np.random.default_rng(2)
    longer = rng.normal(0, 10, 103)
    bins = length_bins(np.sign(longer), longer)
    assert sum(one.pairs for one in bins) == 103 and len(bins) == 5
    assert [one.mean for one in bins] == sorted(one.mean for one in bins)
    assert bins[0].right == 0 and bins[-1].right == 1


def test_pairs_of_one_prompt_are_no_news_of_each_other():
    """40 prompts of 10 pairs that are all right or all wrong: the interval is that of 40 pairs, and holds the truth."""
    rng, groups = np.random.default_rng(3), [str(i // 10) for i in range(400)]
    held, widths = 0, []
    for seed in range(100):
        values = np.repeat((rng.random(40) < 0.6).astype(float), 10)
        found = bootstrap(values, groups, seed)
        held += found.low <= 0.6 <= found.high
        widths.append(found.high - found.low)
    assert 88 <= held <= 99
    assert np.mean(widths) == pytest.approx(2 * 1.96 * (0.24 / 40) ** 0.5, rel=0.1)
