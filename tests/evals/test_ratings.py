"""Ratings: Elo by hand, Bradley-Terry against the MM algorithm of Hunter (2004), the invariants of both."""

import numpy as np
import pytest

from jaxllm.core.types import UserError
from jaxllm.evals import ratings, stats

STRENGTHS = np.array([1.2, 0.7, 0.1, -0.6, -1.4])


def simulated(n=2000, seed=0, ties=0.0, position=0.0, length=0.0):
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 5, n)
    b = (a + rng.integers(1, 5, n)) % 5
    gap = rng.normal(0, 1, n) + 0.8 * (a - b)  # the weak are long
    p = stats.sigmoid(STRENGTHS[a] - STRENGTHS[b] + position + length * gap)
    outcome = (rng.random(n) < p).astype(float)
    outcome[rng.random(n) < ties] = 0.5
    return ratings.battles(a, b, outcome, 5), gap


def test_elo_by_hand_and_zero_sum():
    # equal ratings: the winner gains k/2; then 1016 against 1000
    b = ratings.battles([0, 0], [1, 2], [1.0, 0.0], 3)
    expected = 1 / (1 + 10 ** (-16 / 400))
    np.testing.assert_allclose(ratings.elo(b, k=32)[0], [1016 - 32 * expected, 984, 1000 + 32 * expected])
    many, _ = simulated(ties=0.2)
    got = ratings.elo(many, k=32, orders=ratings.shuffles(2000, 3))
    np.testing.assert_allclose(got.sum(axis=1), 5000, rtol=1e-12)


def test_elo_over_orders_is_each_order_on_its_own():
    b, _ = simulated(200)
    orders = ratings.shuffles(200, 4)
    together = ratings.elo(b, k=16, orders=orders)
    for order, row in zip(orders, together, strict=True):
        shuffled = ratings.Battles(b.a[order], b.b[order], b.outcome[order], 5)
        np.testing.assert_allclose(ratings.elo(shuffled, k=16)[0], row)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(200), (4, 1)))
    assert together.std(axis=0).max() > 1  # the order matters


def minorise_maximise(b):
    """Strengths by Hunter's MM updates on the win counts; half a win each for a tie."""
    wins = np.zeros((5, 5))
    np.add.at(wins, (b.a, b.b), b.outcome)
    np.add.at(wins, (b.b, b.a), 1 - b.outcome)
    met, p = wins + wins.T, np.ones(5)
    for _ in range(5000):
        p = wins.sum(1) / (met / (p[:, None] + p[None])).sum(1)
        p /= np.exp(np.log(p).mean())
    return np.log(p)


def test_bradley_terry_is_the_maximum_that_mm_finds():
    b, _ = simulated(1500, ties=0.1)
    fit = ratings.bradley_terry(b)
    np.testing.assert_allclose(fit.ratings, 1000 + ratings.SCALE * minorise_maximise(b), atol=1e-3)
    assert fit.coefficients.size == 0
    # 400 points are odds of 10 to 1
    np.testing.assert_allclose(stats.sigmoid(400 / ratings.SCALE), 10 / 11)


def test_bradley_terry_knows_no_order_no_side_and_no_repetition():
    b, gap = simulated(800)
    fit = ratings.bradley_terry(b).ratings
    order = ratings.shuffles(800, 1)[0]
    shuffled = ratings.Battles(b.a[order], b.b[order], b.outcome[order], 5)
    np.testing.assert_allclose(ratings.bradley_terry(shuffled).ratings, fit, atol=1e-6)
    np.testing.assert_allclose(ratings.bradley_terry(ratings.Battles(b.b, b.a, 1 - b.outcome, 5)).ratings, fit, atol=1e-6)
    np.testing.assert_allclose(ratings.bradley_terry(b, weights=np.full(800, 3.0)).ratings, fit, atol=1e-4)
    # a covariate that is always 0 takes the path with a row for each battle: the same maximum
    rows = ratings.bradley_terry(b, np.zeros(800))
    np.testing.assert_allclose(rows.ratings, fit, atol=1e-5)
    np.testing.assert_allclose(rows.coefficients, 0)


def test_covariates_recover_what_was_injected():
    b, gap = simulated(20_000, position=0.5, length=0.7)
    fit = ratings.bradley_terry(b, np.column_stack([np.ones(20_000), gap]))
    np.testing.assert_allclose(fit.coefficients, [0.5, 0.7], atol=0.06)
    np.testing.assert_allclose((fit.ratings - 1000) / ratings.SCALE, STRENGTHS, atol=0.08)
    plain = (ratings.bradley_terry(b).ratings - 1000) / ratings.SCALE
    assert np.abs(plain - STRENGTHS).max() > 0.2


def test_a_player_who_never_loses_has_a_finite_rating():
    b = ratings.battles([0] * 10, [1] * 10, [1.0] * 10, 2)
    fit = ratings.bradley_terry(b, ridge=1e-2).ratings
    assert np.isfinite(fit).all() and fit[0] > 1400


def test_bootstrap_bounds_hold_the_estimate_and_shrink():
    wide, narrow = (ratings.bootstrap_ratings(simulated(n)[0], n=60) for n in (300, 4800))
    assert wide.shape == (60, 5)
    np.testing.assert_allclose(narrow.std(0) / wide.std(0), 0.25, atol=0.12)
    low, high = ratings.rating_bounds(narrow)
    fit = ratings.bradley_terry(simulated(4800)[0]).ratings
    assert ((low < fit) & (fit < high)).all()


def test_rank_spread_by_hand():
    low, high = np.array([90, 80, 50.0]), np.array([100, 95, 60.0])  # the first two overlap
    np.testing.assert_array_equal(ratings.rank_spread(low, high), [[1, 2], [1, 2], [3, 3]])
    assert ratings.spread_text(ratings.rank_spread(low, high)) == ["1↔2", "1↔2", "3↔3"]
    np.testing.assert_array_equal(ratings.rank_spread([0, 0.0], [1, 1.0]), [[1, 2], [1, 2]])


def test_relative_gap_is_antisymmetric_and_scaled():
    a, b = np.array([10.0, 20, 0, 5]), np.array([30.0, 20, 0, 0])
    got = ratings.relative_gap(a, b)
    np.testing.assert_allclose(got, -ratings.relative_gap(b, a))
    np.testing.assert_allclose(got[:3] / got[0], [1, 0, 0])
    np.testing.assert_allclose(got.std(), 1)


@pytest.mark.parametrize(
    "a,b,outcome,words",
    [
        ([0], [3], [1.0], r"battle 1 .*outside 0..2"),
        ([0, 1], [1, 1], [1, 1], "battle 2 .*against itself"),
        ([0], [1], [2.0], r"\[0, 1\]"),
    ],
)
def test_bad_battles_are_named(a, b, outcome, words):
    with pytest.raises(UserError, match=words):
        ratings.battles(a, b, outcome, 3)
