"""pass@k and best-of-n against the enumeration of all subsets, the KL bound against exact policies."""

import itertools

import numpy as np
import pytest

from jaxllm.core.types import UserError
from jaxllm.evals import passk


@pytest.mark.parametrize("n,k", [(1, 1), (6, 1), (6, 3), (6, 6)])
def test_pass_at_k_counts_subsets(n, k):
    for c in range(n + 1):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        np.testing.assert_allclose(passk.pass_at_k(n, c, k), [np.mean([any(s) for s in subsets])])


def test_pass_at_k_is_unbiased():
    rng, p = np.random.default_rng(0), 0.2
    correct = rng.binomial(10, p, 40_000)
    np.testing.assert_allclose(passk.pass_at_k(10, correct, 4).mean(), 1 - (1 - p) ** 4, atol=0.005)
    np.testing.assert_allclose(passk.pass_at_k([10, 20], [5, 10], 1), 0.5)


def test_best_of_n_counts_subsets_with_ties():
    rng = np.random.default_rng(1)
    proxy, gold = rng.integers(0, 3, (4, 6)).astype(float), rng.normal(size=(4, 6))
    for n in (1, 2, 4, 6):
        expected = []
        for p, g in zip(proxy, gold, strict=True):
            best = []
            for subset in itertools.combinations(range(6), n):
                top = max(p[i] for i in subset)
                best.append(np.mean([g[i] for i in subset if p[i] == top]))
            expected.append(np.mean(best))
        got = passk.best_of_n(proxy, gold, n)
        # sharing a tie's chances over all tied samples is the mean of picking one of the drawn ones at random
        np.testing.assert_allclose(got, expected, atol=1e-12)
    np.testing.assert_allclose(passk.best_of_n(proxy, gold, 1), gold.mean(axis=1))


def test_best_of_n_kl_is_exact_without_ties_and_a_bound_with_them():
    base = np.full(2000, 1 / 2000)
    for n in (1, 2, 8):
        above = (np.arange(1, 2001) / 2000) ** n
        best = np.diff(np.concatenate([[0], above]))
        kl = (best * np.log(best / base)).sum()
        bound = passk.best_of_n_kl(n)
        assert kl <= bound + 1e-9
        np.testing.assert_allclose(kl, bound, atol=0.01)
    coin = np.array([0.5, 1.0]) ** 8
    best = np.diff(np.concatenate([[0], coin]))
    assert (best * np.log(best / 0.5)).sum() < passk.best_of_n_kl(8)
    np.testing.assert_allclose(passk.best_of_n_kl([1, 2]), [0, np.log(2) - 0.5])


def test_too_few_samples_are_named():
    with pytest.raises(UserError, match="pass@5 needs at least 5 samples"):
        passk.pass_at_k(4, 2, 5)
    with pytest.raises(UserError, match="7 correct of 4"):
        passk.pass_at_k(4, 7, 2)
    with pytest.raises(UserError, match="best-of-3 needs"):
        passk.best_of_n(np.zeros((1, 2)), np.zeros((1, 2)), 3)
