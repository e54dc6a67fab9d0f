"""Normalisation, corrections of the samples, and the KL's coefficient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.types import UserError
from jaxllm.losses import policy
from tests.losses import bigram

MASK = np.array([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
LOSSES = np.random.default_rng(0).normal(size=MASK.shape)


def reduced(weights):
    return (np.asarray(weights) * LOSSES).sum() / len(MASK)


def test_normalisations_equal_their_definitions():
    rows = [LOSSES[i][m].mean() if m.any() else 0 for i, m in enumerate(MASK)]
    assert reduced(policy.sequence_mean(MASK)) == pytest.approx(np.mean(rows), rel=1e-6)
    assert reduced(policy.token_mean(MASK)) == pytest.approx(LOSSES[MASK].mean(), rel=1e-6)
    assert reduced(policy.constant(8)(MASK)) == pytest.approx(LOSSES[MASK].sum() / (4 * 8), rel=1e-6)
    assert policy.spread(MASK, 5.0).sum() == pytest.approx(5)


@pytest.mark.parametrize("fn", [policy.sequence_mean, policy.token_mean, policy.constant(8)])
def test_a_mask_that_is_false_everywhere_weighs_nothing(fn):
    got = np.asarray(fn(jnp.zeros((3, 4), bool)))
    assert got.dtype == np.float32 and not got.any()
    assert not np.asarray(fn(MASK))[~MASK].any()


def test_truncated_importance():
    old, rollout = jnp.array([[-1.0, -1.0, -2.0, -1.0, 0.0]]), jnp.array([[-1.0, -3.0, -1.0, jnp.nan, -1e5]])
    got = policy.truncated_importance(old, rollout, 2.0)
    np.testing.assert_allclose(got, [[1, 2, np.exp(-1), 1, 2]], rtol=1e-6)
    assert not np.asarray(jax.grad(lambda x: policy.truncated_importance(x, rollout[:, :3], 2.0).sum())(old[:, :3])).any()


def test_masks():
    stopped = np.array([True, False, True, True])
    got = np.asarray(policy.without_truncated(MASK, stopped))
    np.testing.assert_array_equal(got, MASK * stopped[:, None])
    observation = np.zeros_like(MASK)
    observation[3, 1:3] = observation[0, 4] = True
    np.testing.assert_array_equal(policy.sampled_only(MASK, observation)[3], [1, 0, 0, 1, 1])
    np.testing.assert_array_equal(policy.sampled_only(MASK, observation)[0], MASK[0])


def test_overlong_shaping_is_the_three_pieces_of_the_paper():
    lengths = np.arange(0, 25)
    expected = [0 if n <= 12 else (12 - n) / 8 if n <= 20 else -1 for n in lengths]
    np.testing.assert_allclose(policy.overlong_shaping(jnp.asarray(lengths), 20, 8), expected, rtol=1e-6)


def test_k1_as_a_loss_is_refused_and_says_why():
    with pytest.raises(UserError, match="expected gradient.*zero.*k2 or k3"):
        policy.group_loss(bigram.MODEL, policy.reinforce, kl=policy.k1, kl_coef=0.1)


def test_the_controller_is_the_papers():
    state, coef = policy.AdaptiveKL(jnp.float32(0.2)), 0.2
    for kl in (12.0, 6.6, 6.0, 5.0, 0.0, -1.0):
        state = policy.adapt(state, jnp.float32(kl), target=6.0)
        coef *= 1 + 0.1 * np.clip((kl - 6) / 6, -0.2, 0.2)
        assert state.coef == pytest.approx(coef, rel=1e-6)
    same = policy.adapt(state, jnp.float32(np.nan), target=6.0)
    assert same.coef == state.coef


def test_the_controller_brings_a_kl_that_answers_to_it_to_the_target():
    """KL = 3 / coef, say: the fixed point is coef = 3 / target."""
    state = policy.AdaptiveKL(jnp.float32(5.0))
    step = jax.jit(lambda s: policy.adapt(s, 3.0 / s.coef, target=6.0))
    for _ in range(400):
        state = step(state)
    assert state.coef == pytest.approx(0.5, rel=1e-2)
