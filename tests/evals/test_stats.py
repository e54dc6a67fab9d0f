"""Intervals and tests against tables, simulation and counting."""

import itertools

import numpy as np
import pytest

from jaxllm.evals import stats


@pytest.mark.parametrize(
    "df,p,table",
    [
        (1, 0.975, 12.7062),
        (2, 0.975, 4.30265),
        (3, 0.975, 3.18245),
        (4, 0.95, 2.13185),
        (9, 0.995, 3.24984),
        (30, 0.975, 2.04227),
    ],
)
def test_t_quantiles_are_those_of_the_tables(df, p, table):
    np.testing.assert_allclose(stats.t_quantile(p, df), table, rtol=2e-5)
    assert stats.t_quantile(1 - p, df) == -stats.t_quantile(p, df)
    assert abs(stats.t_quantile(0.5, df)) < 1e-9


def test_mean_interval_by_hand_and_with_too_few_seeds():
    got = stats.mean_interval([1.0, 2.0, 3.0])  # s.d. 1, standard error 1 / sqrt 3
    np.testing.assert_allclose(got, (2, 2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5, 3), rtol=1e-5)
    one = stats.mean_interval([5.0])
    assert one.mean == 5 and np.isnan(one.low) and np.isnan(one.high) and one.n == 1
    assert np.isnan(stats.mean_interval([]).mean)
    assert str(stats.mean_interval([1.0, 1.0])) == "1 [1, 1]"


def test_mean_interval_covers_at_its_level():
    values = np.random.default_rng(0).normal(1.0, 2.0, (2000, 4))
    covered = [i.low <= 1 <= i.high for i in map(stats.mean_interval, values)]
    assert abs(np.mean(covered) - 0.95) < 0.015


def test_paired_removes_what_the_seeds_share():
    rng = np.random.default_rng(1)
    seed = rng.normal(0, 10, 6)
    gap = stats.paired(seed + 1, seed)
    np.testing.assert_allclose(gap[:3], 1, rtol=1e-9)
    with pytest.raises(ValueError):
        stats.paired([1.0, 2.0], [1.0, 2.0, 3.0])


def test_wilson_bounds_solve_their_equation():
    z = 1.959964
    for successes, n in ((0, 10), (3, 10), (10, 10), (7.5, 20)):
        got = stats.proportion(successes, n)
        for bound in (got.low, got.high):  # the p for which the estimate is exactly z standard errors away
            np.testing.assert_allclose((got.mean - bound) ** 2, z**2 * bound * (1 - bound) / n, atol=1e-7)
        assert -1e-12 <= got.low <= got.mean <= got.high <= 1 + 1e-12
    assert np.isnan(stats.proportion(0, 0).mean)


def test_bootstrap_of_a_mean_agrees_with_theory_and_keeps_rows_together():
    x = np.random.default_rng(2).normal(0, 1, 400)
    got = stats.bootstrap(np.mean, x)
    np.testing.assert_allclose([got.mean, got.n], [x.mean(), 400])
    np.testing.assert_allclose(got.high - got.low, 2 * 1.96 * x.std() / 20, rtol=0.1)
    np.testing.assert_allclose(stats.bootstrap(lambda a, b: float((a - b).mean()), x, x)[:3], 0, atol=1e-12)
    assert got == stats.bootstrap(np.mean, x) != stats.bootstrap(np.mean, x, seed=1)


def test_the_sign_test_counts_all_splits():
    for n in (3, 5):
        signs = np.array(list(itertools.product([-1, 1], repeat=n)))
        for row in signs:
            extreme = np.abs(signs.sum(1)) >= abs(row.sum())
            np.testing.assert_allclose(stats.sign_test(row), extreme.mean())
    assert stats.sign_test([1, 1, 1, 0]) == 0.25 and stats.sign_test([0.0]) == 1


def test_the_p_of_student_s_test_is_the_level_whose_interval_ends_at_0():
    d = np.array([0.4, 1.1, -0.2, 0.9])
    p = stats.t_test(d)
    low, high = stats.mean_interval(d, 1 - p)[1:3]
    np.testing.assert_allclose(low, 0, atol=1e-9)
    assert stats.t_test(-d) == p and 0.05 < p < 0.5 and high > 0
    assert all(np.isnan(stats.t_test(x)) for x in ([], [1.0], [0.3 - 0.1, 0.2, 1.2 - 1.0], [0.0] * 3, [1.0, np.nan]))


def test_holm_is_right_by_hand_and_keeps_the_level_of_a_family():
    np.testing.assert_allclose(stats.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0] and stats.holm([]) == []
    rng = np.random.default_rng(0)
    wrong = np.mean([min(stats.holm(rng.uniform(size=20))) < 0.05 for _ in range(2000)])
    assert wrong == pytest.approx(0.05, abs=0.015)


def test_logistic_regression_meets_its_own_conditions():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(300, 3))
    y = (rng.random(300) < stats.sigmoid(x @ [1.0, -2.0, 0.0])).astype(float)
    w = rng.random(300)
    for ridge, weights in ((0.0, None), (2.0, w)):
        c = stats.logistic(x, y, ridge=ridge, weights=weights)
        residual = (np.ones(300) if weights is None else w) * (y - 1 / (1 + np.exp(-x @ c)))
        np.testing.assert_allclose(x.T @ residual, ridge * c, atol=1e-7)  # the gradient vanishes
    # a constant alone gives the log-odds; a column that nothing determines stays 0; separable data with a ridge stay finite
    np.testing.assert_allclose(stats.logistic(np.ones((10, 1)), [1] * 8 + [0] * 2), [np.log(4)], rtol=1e-8)
    np.testing.assert_allclose(stats.logistic(np.eye(10)[:, :2] * [[1, 0]], np.full(10, 0.3))[1], 0)
    assert np.isfinite(stats.logistic([[1.0], [-1.0]], [1, 0], ridge=1e-3)).all()
    np.testing.assert_allclose(stats.sigmoid([-1e4, 0.0, 1e4]), [0, 0.5, 1])
