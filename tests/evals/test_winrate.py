"""Win rates by counting; length control against judges whose length bias is known."""

import numpy as np
import pytest

from jaxllm.core.types import UserError
from jaxllm.evals import stats, winrate

RNG = np.random.default_rng(0)


def judged(n, edge, bias, longer, seed=0, noise=0.0):
    """Preferences of a judge with a known edge for the model and a known taste for length."""
    rng = np.random.default_rng(seed)
    length = rng.normal(100 + longer, 30, n)
    baseline = rng.normal(100, 30, n)
    p = stats.sigmoid(edge + bias * winrate.length_term(length, baseline))
    return (rng.random(n) < p).astype(float), length, baseline


def test_preferences_count_ties_as_halves():
    np.testing.assert_array_equal(winrate.preferences([1.0, 2.0, 3.0], [2.0, 2.0, 1.0]), [0, 0.5, 1])
    np.testing.assert_array_equal(winrate.preferences([1.0, 2.0, 3.0], [2.0, 2.0, 1.0], tie=1.0), [0.5, 0.5, 1])
    rate = winrate.win_rate([0, 0.5, 1, 1])
    assert (rate.mean, rate.n) == (0.625, 4) and rate.low < 0.625 < rate.high
    assert winrate.win_rate([1.0] * 8).low < 1  # eight wins do not prove that there is no loss


def test_paired_differences_are_narrower_than_separate_ones():
    hard = RNG.random(500)
    a, b = (RNG.random((2, 500)) < np.stack([hard, hard**1.2])).astype(float)
    together = winrate.win_rate_difference(a, b)
    np.testing.assert_allclose(together.mean, a.mean() - b.mean())
    apart = np.sqrt(a.var(ddof=1) / 500 + b.var(ddof=1) / 500) * 1.96
    assert (together.high - together.low) / 2 < apart


def test_a_preference_outside_its_range_is_named():
    with pytest.raises(UserError, match=r"-1.0 is outside \[0, 1\]"):
        winrate.win_rate([1, -1])


def test_length_control_removes_a_known_bias():
    # no edge: everything that the plain win rate shows is length
    preference, length, baseline = judged(6000, 0.0, 1.5, 40)
    plain = winrate.win_rate(preference)
    controlled = winrate.length_controlled(preference, length, baseline, resamples=50)
    assert plain.low > 0.6 and controlled.low < 0.5 < controlled.high
    preference, length, baseline = judged(6000, 0.8, 1.5, 40, seed=1)
    np.testing.assert_allclose(
        winrate.length_controlled(preference, length, baseline, resamples=2).mean, stats.sigmoid(0.8), atol=0.03
    )


def test_length_control_of_swapped_sides_is_the_complement_and_of_oneself_is_a_half():
    preference, length, baseline = judged(400, 0.4, 1.0, 20, seed=2)
    one = winrate.length_controlled(preference, length, baseline, resamples=5)
    other = winrate.length_controlled(1 - preference, baseline, length, resamples=5)
    np.testing.assert_allclose(one.mean + other.mean, 1, atol=1e-9)
    itself = winrate.length_controlled(np.full(50, 0.5), length[:50], length[:50], resamples=5)
    np.testing.assert_allclose(itself.mean, 0.5, atol=1e-12)


def test_without_length_differences_control_changes_nothing():
    preference = np.array([1.0] * 30 + [0.0] * 10)
    same = np.full(40, 7.0)
    got = winrate.length_controlled(preference, same, same, resamples=5, ridge=1e-9)
    np.testing.assert_allclose(got.mean, 0.75, atol=1e-6)
    hard = np.linspace(-1, 1, 40)
    with_difficulty = winrate.length_controlled(preference, same, same, hard, resamples=5, ridge=1e-6)
    np.testing.assert_allclose(with_difficulty.mean, 0.75, atol=1e-4)  # a logistic fit keeps the mean
