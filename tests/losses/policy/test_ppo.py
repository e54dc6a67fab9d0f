"""PPO's parts against loops and numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.losses import policy
from tests.losses import bigram

RNG = np.random.default_rng(0)
B, L = 3, 8
# sampled tokens are contiguous; the last row has a single one
MASK = np.array([[0, 0, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0, 0, 0]], bool)
REWARDS, VALUES = RNG.normal(size=(2, B, L)).astype(np.float32)


def gae_loop(rewards, values, mask, gamma, lam):
    advantages = np.zeros(mask.shape)
    for i, row in enumerate(mask):
        following, running = 0.0, 0.0
        for t in reversed(np.flatnonzero(row)):
            delta = rewards[i, t] + gamma * following - values[i, t]
            running = delta + gamma * lam * running
            advantages[i, t], following = running, values[i, t]
    return advantages, np.where(mask, advantages + values, 0)


@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.9, 0.5), (0.97, 0.0), (0.9, 1.0)])
def test_gae_equals_a_plain_loop(gamma, lam):
    got = policy.gae(*map(jnp.asarray, (REWARDS, VALUES, MASK)), gamma=gamma, lam=lam)
    for a, b in zip(got, gae_loop(REWARDS, VALUES, MASK, gamma, lam), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_gae_limits():
    args = tuple(map(jnp.asarray, (REWARDS, VALUES, MASK)))
    one_step, _ = policy.gae(*args, gamma=0.9, lam=0.0)
    np.testing.assert_allclose(one_step[0, 2], REWARDS[0, 2] + 0.9 * VALUES[0, 3] - VALUES[0, 2], rtol=1e-5)
    _, returns = policy.gae(*args, gamma=0.9, lam=1.0)
    discounted = sum(0.9**k * REWARDS[0, 2 + k] for k in range(4))
    np.testing.assert_allclose(returns[0, 2], discounted, rtol=1e-5)


def test_gae_does_not_see_what_is_outside_the_mask():
    got = policy.gae(*map(jnp.asarray, (REWARDS, VALUES, MASK)), gamma=0.9, lam=0.9)
    loud = [np.where(MASK, x, np.nan).astype(np.float32) for x in (REWARDS, VALUES)]
    again = policy.gae(*map(jnp.asarray, (*loud, MASK)), gamma=0.9, lam=0.9)
    for a, b in zip(got, again, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.asarray(a)[~MASK].any()


def test_the_score_comes_at_the_last_sampled_token_and_kl_at_each():
    logps, ref = RNG.normal(-2, 1, (2, B, L)).astype(np.float32)
    scores = jnp.array([10.0, 20.0, 30.0])
    got = policy.kl_penalised_rewards(scores, jnp.asarray(logps), jnp.asarray(ref), jnp.asarray(MASK), kl_coef=0.2)
    expected = np.where(MASK, -0.2 * (logps - ref), 0)
    expected[[0, 1, 2], [5, 7, 3]] += [10, 20, 30]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    empty = policy.last_of(jnp.zeros((1, 3), bool))
    assert not np.asarray(empty).any()


def test_whiten_over_the_mask():
    got = np.asarray(policy.whiten(jnp.asarray(VALUES * 5 + 2), jnp.asarray(MASK)))
    assert abs(got[MASK].mean()) < 1e-5 and abs(got[MASK].std() - 1) < 1e-4
    assert not got[~MASK].any()
    x = (VALUES * 5 + 2)[MASK]
    np.testing.assert_allclose(got[MASK], (x - x.mean()) / x.std(), rtol=1e-3, atol=1e-4)
    constant = policy.whiten(jnp.full((2, 2), 3.0), jnp.ones((2, 2), bool))
    np.testing.assert_array_equal(constant, np.zeros((2, 2)))


@pytest.mark.parametrize(
    "ratio,advantage,loss,slope",
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.0, -2.0, 2.0, 2.0),
        (1.5, 2.0, -2.4, 0.0),  # already likelier than allowed: no more gain
        (1.5, -2.0, 3.0, 3.0),  # a bad token that became likelier is never clipped
        (0.5, 2.0, -1.0, -1.0),
        (0.5, -2.0, 1.6, 0.0),
    ],
)
def test_the_regions_of_the_clipped_loss(ratio, advantage, loss, slope):
    """slope: d loss / d log pi, which at ratio 1 is the policy gradient."""

    def at(logp):
        return policy.ppo_policy(logp, jnp.float32(-1.0), jnp.float32(advantage), clip=0.2)

    value, grad = jax.value_and_grad(at)(jnp.float32(np.log(ratio) - 1))
    assert value == pytest.approx(loss, rel=1e-5) and grad == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_an_infinite_clip_never_clips():
    logps = jnp.array([-5.0, -1.0, 1.0])
    got = policy.ppo_policy(logps, jnp.zeros(3), jnp.ones(3), clip=jnp.inf)
    np.testing.assert_allclose(got, -np.exp([-5.0, -1.0, 1.0]), rtol=1e-5)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_policy_gradients_are_finite_at_extremes(advantage):
    new, old = jnp.array([-1e4, 0.0, -1e4, 0.0, -100.0]), jnp.array([0.0, -1e4, -1e4, 0.0, -0.5])

    def at(logps):
        return policy.ppo_policy(logps, old, jnp.full(5, advantage), clip=0.2).sum()

    value, grads = jax.value_and_grad(at)(new)
    assert np.isfinite(value) and np.isfinite(grads).all(), (value, grads)


def test_the_value_loss_and_its_clip():
    values, old, returns = jnp.array([1.0, 3.0, -1.0, 0.1]), jnp.zeros(4), jnp.array([2.0, 2.0, 2.0, 0.0])
    got = policy.ppo_value(values, old, returns, clip=0.5)
    clipped = np.clip([1.0, 3.0, -1.0, 0.1], -0.5, 0.5)
    expected = 0.5 * np.maximum((np.asarray(values) - returns) ** 2, (clipped - returns) ** 2)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    grad = jax.grad(lambda v: policy.ppo_value(v, old, returns, clip=0.5).sum())(values)
    assert grad[0] == 0, "beyond the clip, towards the return: no gradient"
    assert grad[3] != 0


def ppo_batch(seed=0):
    record = bigram.record(B, L, seed=seed, prompt=2)
    rng = np.random.default_rng(seed)
    columns = rng.normal(size=(3, B, L)).astype(np.float32)
    old = (bigram.logps(bigram.params(1), record)).astype(np.float32)
    return record | {
        "logps_old": old,
        "values_old": columns[0],
        "advantages": columns[1],
        "returns": columns[2],
    }


def scalars(params, record):
    return params[record["tokens"]]


LOSS = policy.loss(bigram.MODEL, scalars, clip=0.2, value_clip=0.3, value_coef=0.5)
PARAMS = {"policy": bigram.params(0), "value": jnp.asarray(RNG.normal(size=bigram.V).astype(np.float32))}


def test_the_builder_equals_numpy_and_has_the_names_of_trl():
    batch = ppo_batch()
    mask = batch["mask"]
    mean, metrics = jax.jit(LOSS)(PARAMS, batch, None)
    logps = bigram.logps(PARAMS["policy"], batch)
    ratio = np.exp(logps - batch["logps_old"])
    a, v, old, r = (
        batch["advantages"],
        np.asarray(PARAMS["value"])[batch["tokens"]],
        batch["values_old"],
        batch["returns"],
    )
    pg = -np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a)
    vf = 0.5 * np.maximum((v - r) ** 2, (old + np.clip(v - old, -0.3, 0.3) - r) ** 2)
    table = bigram.table(PARAMS["policy"])
    expected = {
        "loss": pg + 0.5 * vf, "loss/policy_avg": pg, "loss/value_avg": vf,
        "policy/approxkl_avg": 0.5 * (logps - batch["logps_old"]) ** 2,
        "policy/clipfrac_avg": abs(ratio - 1) > 0.2,
        "policy/entropy_avg": -(np.exp(table) * table).sum(-1)[batch["tokens"]],
        "val/ratio": ratio, "val/clipfrac_avg": abs(v - old) > 0.3,
    }  # fmt: skip
    assert set(metrics) == set(expected) and mean.count == mask.sum()
    for name, values in expected.items():
        np.testing.assert_allclose(metrics[name].value(), values[mask].mean(), rtol=1e-4, atol=1e-5, err_msg=name)


def test_what_is_outside_the_mask_changes_no_gradient():
    batch = ppo_batch()
    loud = {**batch, "logps_old": np.where(batch["mask"], batch["logps_old"], -1e4).astype(np.float32)}
    grad = jax.jit(jax.grad(lambda p, b: LOSS(p, b, None)[0].value()))
    one, two = grad(PARAMS, batch), grad(PARAMS, loud)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(one))


def test_the_first_update_has_ratio_one():
    batch = ppo_batch()
    temperature = 0.7
    loss_fn = policy.loss(bigram.MODEL, scalars, clip=0.2, value_clip=0.3, value_coef=0.5, temperature=temperature)
    out = bigram.table(PARAMS["policy"]) / temperature
    out = out - np.log(np.exp(out).sum(-1, keepdims=True))
    batch["logps_old"] = out[batch["tokens"], batch["targets"]].astype(np.float32)
    _, metrics = jax.jit(loss_fn)(PARAMS, batch, None)
    assert abs(metrics["val/ratio"].value() - 1) < 1e-5
    assert metrics["policy/approxkl_avg"].value() < 1e-10 and metrics["policy/clipfrac_avg"].value() == 0


def test_one_update_from_scores_to_loss_equals_a_numpy_ppo():
    """Score and KL to rewards, GAE, whitening, clipped policy and value losses: all of it in float64 loops."""
    record = bigram.record(B, L, seed=4, prompt=2)
    mask = record["mask"]
    old, ref = (bigram.logps(bigram.params(i), record) for i in (1, 2))
    scores, values_old = np.array([1.0, -0.5, 2.0]), RNG.normal(size=(B, L))
    rewards = np.where(mask, -0.2 * (old - ref), 0)
    for i, row in enumerate(mask):
        rewards[i, np.flatnonzero(row)[-1]] += scores[i]
    raw, returns = gae_loop(rewards, values_old, mask, 0.97, 0.9)
    advantages = np.where(mask, (raw - raw[mask].mean()) / raw[mask].std(), 0)
    ratio = np.exp(bigram.logps(PARAMS["policy"], record) - old)
    v = np.asarray(PARAMS["value"], np.float64)[record["tokens"]]
    pg = -np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages)
    vf = 0.5 * np.maximum((v - returns) ** 2, (values_old + np.clip(v - values_old, -0.3, 0.3) - returns) ** 2)

    @jax.jit
    def ours(params, old, ref, values_old, scores):
        rewards = policy.kl_penalised_rewards(scores, old, ref, mask, kl_coef=0.2)
        advantages, returns = policy.gae(rewards, values_old, mask, gamma=0.97, lam=0.9)
        batch = record | {"logps_old": old, "values_old": values_old, "returns": returns}
        return LOSS(params, batch | {"advantages": policy.whiten(advantages, mask)}, None)[0].value()

    got = ours(PARAMS, *(x.astype(np.float32) for x in (old, ref, values_old, scores)))
    np.testing.assert_allclose(got, (pg + 0.5 * vf)[mask].mean(), rtol=1e-4)


def test_another_token_loss_in_the_builder():
    batch = ppo_batch()
    dual = policy.loss(
        bigram.MODEL, scalars, clip=0.2, value_clip=0.3, value_coef=0.5, token_loss=partial(policy.dual_clip, clip=0.2, dual=1.3)
    )
    mask = batch["mask"]
    ratio = np.exp(bigram.logps(PARAMS["policy"], batch) - batch["logps_old"])
    a = batch["advantages"]
    surrogate = np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a)
    expected = -np.where(a < 0, np.maximum(surrogate, 1.3 * a), surrogate)
    _, metrics = jax.jit(dual)(PARAMS, batch, None)
    np.testing.assert_allclose(metrics["loss/policy_avg"].value(), expected[mask].mean(), rtol=1e-4)
    assert (surrogate < 1.3 * a)[mask & (a < 0)].any(), "nothing reached the second clip"
