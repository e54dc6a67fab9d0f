"""From logits to a token: the sets that top-k and top-p keep, and the frequencies of the draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.generate.sampling import draw, first_largest, warp

LOGITS = np.random.default_rng(0).normal(0, 2, (6, 20)).astype(np.float32)


def softmax(x):
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def nucleus(row, p):
    """The smallest set of most likely tokens whose probability reaches p."""
    kept, total = [], 0.0
    for i in np.argsort(-row):
        if total >= p:
            break
        kept.append(i)
        total += softmax(row)[i]
    return set(kept)


@pytest.mark.parametrize("k", [1, 3, 20, 50])
def test_top_k_keeps_the_k_most_likely(k):
    out = np.asarray(warp(jnp.asarray(LOGITS), top_k=k))
    for row, got in zip(LOGITS, out, strict=True):
        assert set(np.flatnonzero(np.isfinite(got))) == set(np.argsort(-row)[:k])
    np.testing.assert_array_equal(out[np.isfinite(out)], LOGITS[np.isfinite(out)])


@pytest.mark.parametrize("p,temperature", [(0.9, 1.0), (0.5, 1.7), (0.01, 1.0)])
def test_top_p_keeps_the_nucleus_after_temperature(p, temperature):
    out = np.asarray(warp(jnp.asarray(LOGITS), top_p=p, temperature=temperature))
    for row, got in zip(LOGITS / temperature, out, strict=True):
        assert set(np.flatnonzero(np.isfinite(got))) == nucleus(row, p)


def test_top_k_comes_before_top_p():
    out = np.asarray(warp(jnp.asarray(LOGITS), top_k=4, top_p=0.8))
    for row, got in zip(LOGITS, out, strict=True):
        cut = np.where(row >= np.sort(row)[-4], row, -1e9)
        assert set(np.flatnonzero(np.isfinite(got))) == nucleus(cut, 0.8)


def test_temperature_scales_and_zero_is_greedy_with_probability_one():
    np.testing.assert_allclose(warp(jnp.asarray(LOGITS), temperature=2.0), LOGITS / 2, rtol=1e-6)
    tied = jnp.asarray([[1.0, 3.0, 3.0, 0.0]])
    out = np.asarray(warp(tied, temperature=0))
    np.testing.assert_array_equal(out, [[-np.inf, 0, -np.inf, -np.inf]])  # the first of equals
    assert draw(jax.random.split(jax.random.key(0), 1), jnp.asarray(out))[0] == 1


def test_frequencies_of_draws_are_the_probabilities():
    n = 4000
    row = warp(jnp.asarray(LOGITS[:1, :8]), temperature=0.8, top_k=6)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(jnp.arange(n))
    drawn = np.bincount(np.asarray(draw(keys, jnp.tile(row, (n, 1)))), minlength=8)
    expected = n * softmax(np.asarray(row, np.float64))[0]
    assert drawn[expected == 0].sum() == 0
    chi2 = ((drawn - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert chi2 < 30, (drawn, expected)  # 5 degrees of freedom: by chance once in 70,000 seeds


def test_draws_are_those_of_categorical_and_ties_go_to_the_first():
    keys = jax.vmap(jax.random.key)(jnp.arange(300))
    logits = warp(jnp.tile(jnp.asarray(LOGITS), (50, 1)), temperature=0.8, top_k=6)
    np.testing.assert_array_equal(draw(keys, logits), jax.vmap(jax.random.categorical)(keys, logits))
    tied = jnp.asarray([[1.0, 3.0, 3.0], [-jnp.inf, -jnp.inf, -jnp.inf], [2.0, 0.0, 2.0]])
    np.testing.assert_array_equal(first_largest(tied), jnp.argmax(tied, axis=-1))
    assert int(first_largest(jnp.asarray([[jnp.nan, jnp.nan]]))[0]) == 1
