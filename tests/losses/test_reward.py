"""Reward modelling: the Bradley-Terry loss and the place where a reward is read."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.losses import reward
from tests.losses import bigram

RNG = np.random.default_rng(0)


def test_bradley_terry_value_limits_and_swap_identity():
    chosen, rejected = (jnp.asarray(x) for x in RNG.normal(0, 3, (2, 8)).astype(np.float32))
    margin = np.asarray(chosen - rejected)
    np.testing.assert_allclose(reward.bradley_terry(chosen, rejected), np.log1p(np.exp(-margin)), rtol=1e-4)
    np.testing.assert_allclose(reward.bradley_terry(chosen, chosen), np.log(2), rtol=1e-6)
    raised = reward.bradley_terry(rejected, chosen) - reward.bradley_terry(chosen, rejected)
    np.testing.assert_allclose(raised, margin, rtol=1e-4, atol=1e-5)


def test_bradley_terry_is_finite_at_extremes():
    margins = jnp.array([-1e4, -100.0, 100.0, 1e4])
    value, grads = jax.value_and_grad(lambda m: reward.bradley_terry(m, jnp.zeros(4)).sum())(margins)
    assert np.isfinite(value)
    np.testing.assert_allclose(grads, [-1, -1, 0, 0], atol=1e-6)


def record():
    """Two rows of 3 and 5 positions; the second ends with token 0, the id of padding."""
    targets = np.array([[5, 6, 4, 0, 0], [1, 2, 3, 1, 0]], np.int32)
    tokens = np.array([[2, 5, 6, 0, 0], [3, 1, 2, 3, 1]], np.int32)
    segments = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)
    return {"tokens": tokens, "targets": targets, "segments": segments, "mask": segments != 0}


def test_the_reward_is_read_at_the_end_token():
    longer = reward.with_last_token(record())
    np.testing.assert_array_equal(longer["tokens"], [[2, 5, 6, 4, 0, 0], [3, 1, 2, 3, 1, 0]])
    np.testing.assert_array_equal(longer["segments"], [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    values = jnp.arange(12.0).reshape(2, 6)
    np.testing.assert_array_equal(reward.at_last_token(values, longer), [3, 11])
    scores = reward.score(
        lambda params, r: jnp.asarray(10.0 * r["tokens"] + np.arange(6)[None, :]), None, record()
    )
    np.testing.assert_array_equal(scores, [43, 5])


def test_the_builder_equals_numpy_and_centering_fixes_the_constant():
    chosen, rejected = bigram.record(4, 6, seed=1), bigram.record(4, 6, seed=2)
    table = jnp.asarray(RNG.normal(size=bigram.V).astype(np.float32))

    def scalars(params, r):
        return params[r["tokens"]]

    def last(r):
        n = (r["segments"] != 0).sum(1)
        return np.asarray(table)[r["targets"][np.arange(4), n - 1]]

    w, lo = last(chosen), last(rejected)
    batch = {"chosen": chosen, "rejected": rejected}
    mean, metrics = reward.loss(scalars, center=0.1)({"reward": table}, batch, None)
    np.testing.assert_allclose(
        mean.value(), (np.log1p(np.exp(lo - w)) + 0.1 * (w + lo) ** 2).mean(), rtol=1e-5
    )
    assert set(metrics) == {"loss", "accuracy", "margin", "mean_reward"} and mean.count == 4
    np.testing.assert_allclose(metrics["accuracy"].value(), ((w > lo) + 0.5 * (w == lo)).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["margin"].value(), (w - lo).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["mean_reward"].value(), ((w + lo) / 2).mean(), rtol=1e-5)


def test_ties_are_half_right():
    chosen, rejected = bigram.record(4, 6, seed=1), bigram.record(4, 6, seed=2)
    batch = {"chosen": chosen, "rejected": rejected}
    _, metrics = reward.loss(lambda p, r: jnp.zeros(r["tokens"].shape))({"reward": None}, batch, None)
    assert metrics["accuracy"].value() == 0.5
    np.testing.assert_allclose(metrics["loss"].value(), np.log(2), rtol=1e-6)
