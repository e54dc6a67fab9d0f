"""Token losses against numpy, the regions where they are flat, and their extremes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.losses import policy

RNG = np.random.default_rng(1)
B, L = 3, 6
MASK = np.array([[0, 1, 1, 1, 0, 0], [0, 0, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0]], bool)
NEW, OLD = RNG.normal(-2, 0.6, (2, B, L)).astype(np.float32)
ADVANTAGES = (RNG.normal(size=(B, 1)) * np.ones((1, L))).astype(np.float32)

LOSSES = {
    "reinforce": policy.reinforce,
    "ppo": partial(policy.ppo_policy, clip=0.2),
    "clipped": partial(policy.clipped, low=0.2, high=0.28),
    "dual": partial(policy.dual_clip, clip=0.2, dual=3.0),
    "gspo": partial(policy.gspo, low=0.1, high=0.15),
    "cispo": partial(policy.cispo, cap=1.3),
}


def by_hand(name, new, old, a, mask):
    """The loss of one row in float64."""
    rho = np.exp(new - old)
    if name == "gspo":
        s = np.exp((new - old)[mask].mean()) if mask.any() else 1.0
        return -np.minimum(s * a, np.clip(s, 0.9, 1.15) * a)
    low, high = (0.2, 0.28) if name == "clipped" else (0.2, 0.2)
    surrogate = np.minimum(rho * a, np.clip(rho, 1 - low, 1 + high) * a)
    return {
        "reinforce": -a * new,
        "ppo": -surrogate,
        "clipped": -surrogate,
        "dual": -np.where(a < 0, np.maximum(surrogate, 3 * a), surrogate),
        "cispo": -np.minimum(rho, 1.3) * a * new,
    }[name]


@pytest.mark.parametrize("name", LOSSES)
def test_equal_numpy(name):
    got = LOSSES[name](*map(jnp.asarray, (NEW, OLD, ADVANTAGES, MASK)))
    new, old, a = (x.astype(np.float64) for x in (NEW, OLD, ADVANTAGES))
    expected = np.stack([by_hand(name, new[i], old[i], a[i], MASK[i]) for i in range(B)])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_on_policy_the_gradient_is_the_policy_gradient(name):
    """Summed over a row's sampled tokens: gspo divides by their number and then counts the row once a token."""
    fn, logps = LOSSES[name], jnp.asarray(OLD)
    grad = jax.grad(lambda x: jnp.sum(jnp.where(MASK, fn(x, OLD, ADVANTAGES, MASK), 0)))(logps)
    np.testing.assert_allclose(grad, np.where(MASK, -ADVANTAGES, 0), rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("advantage", [1.0, -1.0, 1e4])
def test_gradients_are_finite_at_extreme_ratios(name, advantage):
    new, old = jnp.array([[-1e4, 0.0, -1e4, 0.0, -100.0]]), jnp.array([[0.0, -1e4, -1e4, 0.0, -0.5]])
    mask, advantages = jnp.ones((1, 5), bool), jnp.full((1, 5), advantage)
    for select in (slice(0, 5), slice(0, 1), slice(1, 2)):
        args = old[:, select], advantages[:, select], mask[:, select]
        value, grads = jax.value_and_grad(lambda x, args=args: LOSSES[name](x, *args).sum())(new[:, select])
        assert np.isfinite(value) and np.isfinite(grads).all(), (value, grads)


def slope(fn, ratio, advantage):
    """d loss / d log pi of a single token."""
    at = lambda x: fn(x.reshape(1, 1), jnp.full((1, 1), -1.0), jnp.full((1, 1), advantage), jnp.ones((1, 1), bool)).sum()  # noqa: E731
    return float(jax.grad(at)(jnp.float32(np.log(ratio) - 1)))


@pytest.mark.parametrize(
    "name,ratio,advantage,expected",
    [
        ("clipped", 1.25, 1.0, -1.25),  # inside the higher bound
        ("clipped", 1.3, 1.0, 0.0),
        ("clipped", 0.75, -1.0, 0.0),
        ("dual", 2.9, -1.0, 2.9),  # ppo lets it through
        ("dual", 3.1, -1.0, 0.0),
        ("dual", 3.1, 1.0, 0.0),
        ("dual", 0.7, -1.0, 0.0),
        ("cispo", 2.0, 1.0, -1.3),  # the weight is capped, the gradient is not gone
        ("cispo", 2.0, -1.0, 1.3),
        ("cispo", 0.1, -1.0, 0.1),
        ("gspo", 1.2, 1.0, 0.0),
        ("gspo", 1.1, 1.0, -1.1),
    ],
)
def test_where_a_token_has_a_gradient(name, ratio, advantage, expected):
    assert slope(LOSSES[name], ratio, advantage) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_limits():
    args = tuple(map(jnp.asarray, (NEW, OLD, ADVANTAGES)))
    ppo = policy.ppo_policy(*args, clip=0.2)
    np.testing.assert_array_equal(policy.clipped(*args, low=0.2, high=0.2), ppo)
    np.testing.assert_array_equal(policy.dual_clip(*args, clip=0.2, dual=1e6), ppo)
    one = jnp.asarray(MASK[:, :1] | True)
    first = tuple(x[:, :1] for x in args)
    np.testing.assert_allclose(policy.gspo(*first, one, low=0.1, high=0.2), policy.clipped(*first, low=0.1, high=0.2), rtol=1e-6)
