"""Accuracy, calibration, rank correlation and what length alone gets."""

import numpy as np

from jaxllm.evals import reward_checks as checks

RNG = np.random.default_rng(0)


def test_accuracy_counts_ties_as_halves_and_length_is_read_either_way():
    assert checks.accuracy([1, 2, 3, 0], [0, 2, 4, -1]).mean == 2.5 / 4
    assert checks.length_only([1, 2, 3], [2, 3, 1]).mean == 2 / 3
    assert checks.length_only([2, 3, 1], [1, 2, 3]).mean == 2 / 3


def test_calibration_of_a_perfect_and_of_an_overconfident_model():
    size = np.abs(RNG.normal(size=20_000)) * 2
    agree = RNG.random(20_000) < 1 / (1 + np.exp(-size))
    margin = np.where(agree, size, -size)
    predicted, observed, counts = checks.calibration(margin)
    assert counts.sum() == 20_000 and np.abs(predicted - observed)[counts > 300].max() < 0.05
    assert checks.calibration_error(margin) < 0.02 < 0.08 < checks.calibration_error(4 * margin)


def test_calibration_bins_by_hand():
    logit = np.log(0.7 / 0.3)
    predicted, observed, counts = checks.calibration(np.array([logit, logit, -logit, 9.0]))
    np.testing.assert_allclose(predicted, [0.7, 1 / (1 + np.exp(-9))])
    np.testing.assert_allclose(observed, [2 / 3, 1])
    np.testing.assert_array_equal(counts, [3, 1])
    np.testing.assert_allclose(checks.calibration_error(np.array([logit, logit, -logit])), abs(0.7 - 2 / 3))


def test_spearman_is_pearson_of_ranks_and_the_classic_formula():
    x, y = RNG.normal(size=(2, 30))
    d = x.argsort().argsort() - y.argsort().argsort()
    np.testing.assert_allclose(checks.spearman(x, y), 1 - 6 * (d**2).sum() / (30 * (900 - 1)))
    np.testing.assert_allclose(checks.spearman(x, np.exp(x)), 1)
    np.testing.assert_allclose(checks.spearman(x, -(x**3)), -1)
    np.testing.assert_array_equal(checks.ranks([10, 20, 20, 5]), [2, 3.5, 3.5, 1])
    assert np.isnan(checks.spearman(x, np.ones(30)))


def test_no_model_beats_the_noise_ceiling():
    gap = RNG.normal(0, 2, 40_000)
    label = RNG.random(40_000) < 1 / (1 + np.exp(-gap))
    best = checks.accuracy(np.where(label, gap, -gap), np.zeros(40_000)).mean  # the truth itself as the model
    np.testing.assert_allclose(checks.noise_ceiling(gap), best, atol=0.01)
