"""Linear probes find what is linear, and nothing that is not there."""

import numpy as np
import pytest

from jaxllm.evals.probe import fit, probe


def test_the_probe_finds_what_is_linear_and_not_what_is_not_there():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(700, 6)).astype(np.float32)
    y = (x[:, :3] + 0.05 * rng.normal(size=(700, 3))).argmax(axis=1)
    right = probe(x[:500], y[:500], x[500:], y[500:], 3, 2)
    wrong = probe(x[:500, 3:], y[:500], x[500:, 3:], y[500:], 3, 2)
    assert len(right) == 2 and min(right) > 0.9 and max(wrong) < 0.45


def test_the_fit_is_where_the_penalised_gradient_vanishes():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 4)).astype(np.float32)
    y = (x[:, 0] + rng.normal(size=200) > 0).astype(int)
    weights, biases = map(np.asarray, fit(x, y, 0.01, 2))
    logits = x @ weights + biases[None]
    p = np.exp(logits - logits.max(-1, keepdims=True))
    error = p / p.sum(-1, keepdims=True) - np.eye(2)[y]
    np.testing.assert_allclose(x.T @ error / 200 + 2 * 0.01 * weights, 0, atol=2e-3)
    np.testing.assert_allclose(error.mean(axis=0), 0, atol=2e-3)
    assert weights[0, 1] > 0.3 and np.abs(weights[1:]).max() < weights[0, 1]


@pytest.mark.parametrize("seeds", [1, 3])
def test_every_seed_gives_one_accuracy_and_the_same_one_again(seeds):
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(120, 3)).astype(np.float32), rng.integers(0, 2, 120)
    first = probe(x[:80], y[:80], x[80:], y[80:], 2, seeds)
    assert len(first) == seeds and first == probe(x[:80], y[:80], x[80:], y[80:], 2, seeds)
