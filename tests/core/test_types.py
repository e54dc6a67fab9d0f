"""Mean: a sum and its weight."""

import jax.numpy as jnp
import numpy as np

from jaxllm.core.types import Mean, mean_of


def test_means_add_without_bias():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 5)), rng.integers(0, 2, (2, 5))
    parts = mean_of(jnp.asarray(x[0]), jnp.asarray(w[0])) + mean_of(jnp.asarray(x[1]), jnp.asarray(w[1]))
    np.testing.assert_allclose(parts.value(), (x * w).sum() / w.sum(), rtol=1e-6)
    assert parts.count == w.sum()


def test_an_empty_mean_is_zero_with_its_count_and_not_nan():
    empty = mean_of(jnp.ones(3), jnp.zeros(3, bool))
    assert empty.value() == 0 and empty.count == 0
    assert (empty + Mean(jnp.float32(6), jnp.float32(2))).value() == 3


def test_masked_infinities_and_nans_do_not_reach_the_sum():
    values = jnp.array([1.0, jnp.inf, jnp.nan, -jnp.inf, 3.0])
    assert mean_of(values, jnp.array([True, False, False, False, True])).value() == 2


def test_no_weights_count_each_value_once_in_float32():
    mean = mean_of(jnp.array([True, False, True, True]))
    assert mean.value() == 0.75 and mean.count == 4 and mean.total.dtype == jnp.float32
