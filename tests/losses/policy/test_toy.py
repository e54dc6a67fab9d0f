"""On a toy where every sequence is enumerated, estimators are compared with the exact gradient, not with samples of it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.types import mean_of
from jaxllm.losses import policy
from tests.losses.policy import toy as enumerable
from tests.losses.policy.toy import MODEL, T, exact, expected, gradient, groups, logps, make, probabilities, values

TOY = make()
SMALL = make(v=2, seed=3)
OLD = logps(TOY, TOY.theta)
MASK = jnp.asarray(TOY.record["mask"])
RATIOS = {
    "reinforce": policy.reinforce,
    "ppo": partial(policy.ppo_policy, clip=0.2),
    "dapo": partial(policy.clipped, low=0.2, high=0.28),
    "dual_clip": partial(policy.dual_clip, clip=0.2, dual=3.0),
    "gspo": partial(policy.gspo, low=3e-4, high=4e-4),
    "cispo": partial(policy.cispo, cap=5.0),
}


def close(got, want, tolerance=2e-6):
    np.testing.assert_allclose(got, want, atol=tolerance)
    assert np.abs(want).max() > 0.02, "nothing was compared"


def test_the_toy_is_a_distribution_and_its_gradient_is_that_of_finite_differences():
    assert probabilities(TOY, TOY.theta).sum() == pytest.approx(1, abs=1e-5)
    table = np.asarray(TOY.theta, np.float64)

    def reward(table):
        out = table - np.log(np.exp(table).sum(-1, keepdims=True))
        return (np.exp(out[TOY.record["tokens"], TOY.record["targets"]].sum(1)) * np.asarray(TOY.rewards)).sum()

    for i, j in [(0, 1), (2, 3)]:
        up, down = table.copy(), table.copy()
        up[i, j] += 1e-5
        down[i, j] -= 1e-5
        assert exact(TOY)[i, j] == pytest.approx((reward(up) - reward(down)) / 2e-5, abs=1e-5)


@pytest.mark.parametrize("name", RATIOS)
@pytest.mark.parametrize("value", [0.0, 0.7])
def test_on_policy_every_token_loss_gives_the_exact_gradient_whatever_the_baseline(name, value):
    advantages = policy.baseline(TOY.rewards, value)[:, None] * jnp.ones((1, T))
    close(expected(TOY, lambda x: RATIOS[name](x, OLD, advantages, MASK)), exact(TOY))


@pytest.mark.parametrize("name", ["ppo", "dual_clip", "dapo", "gspo"])
def test_the_builder_gives_the_exact_gradient(name):
    """group_loss with the sequences' probabilities as weights."""
    p = probabilities(TOY, TOY.theta)
    weights = p[:, None] * len(p) * TOY.record["mask"]
    batch = TOY.record | {"logps_old": OLD, "advantages": TOY.rewards, "weights": weights}
    loss_fn = policy.group_loss(MODEL, RATIOS[name])
    grad = gradient(lambda theta: loss_fn({"policy": {"table": theta}}, batch, None)[0].value(), TOY.theta)
    close(-grad, exact(TOY))


@pytest.mark.parametrize("toy,n", [(TOY, 2), (SMALL, 3)], ids=["groups of 2", "groups of 3"])
@pytest.mark.parametrize("rule,factor", [(policy.rloo, lambda n: 1.0), (policy.dr_grpo, lambda n: (n - 1) / n)])
def test_group_advantages_in_expectation(toy, n, rule, factor):
    """rloo is unbiased; a baseline that contains the sample itself shrinks the gradient by (n - 1) / n, and does not turn it."""
    index, p = groups(toy, n)
    advantages = rule(toy.rewards[index].reshape(-1), n).reshape(-1, n)
    # the weight of each sequence's log-probability, over all groups that it is in
    weight = jnp.zeros(len(toy.rewards)).at[index].add(p[:, None] * advantages / n)
    got = gradient(lambda theta: jnp.sum(weight * logps(toy, theta).sum(axis=1)), toy.theta)
    close(got, factor(n) * exact(toy))


def test_dividing_by_the_std_turns_the_gradient():
    """GRPO's is the gradient of another objective: not a multiple of the exact one."""
    index, p = groups(TOY, 2)
    advantages = policy.grpo(TOY.rewards[index].reshape(-1), 2).reshape(-1, 2)
    weight = jnp.zeros(len(TOY.rewards)).at[index].add(p[:, None] * advantages)
    got = gradient(lambda theta: jnp.sum(weight * logps(TOY, theta).sum(axis=1)), TOY.theta).reshape(-1)
    want = exact(TOY).reshape(-1)
    cosine = got @ want / jnp.linalg.norm(got) / jnp.linalg.norm(want)
    assert 0.5 < cosine < 0.999


def test_remax_is_unbiased():
    greedy = [0] * T
    for t in range(T):
        greedy[t] = int(jnp.argmax(TOY.theta[greedy[t - 1] if t else 0]))
    mine = TOY.rewards[int((TOY.sequences == np.array(greedy)).all(1).argmax())]
    advantages = policy.remax(TOY.rewards, jnp.full_like(TOY.rewards, mine))
    close(expected(TOY, lambda x: policy.reinforce(x, OLD, advantages[:, None])), exact(TOY))


@pytest.mark.parametrize("lam", [1.0, 0.95, 0.0])
def test_ppo_with_gae_and_the_true_value_is_exact_for_every_lambda(lam):
    rewards = policy.kl_penalised_rewards(TOY.rewards, OLD, OLD, MASK, kl_coef=0.0)
    advantages, _ = policy.gae(rewards, values(TOY), MASK, gamma=1.0, lam=lam)
    close(expected(TOY, lambda x: policy.ppo_policy(x, OLD, advantages, clip=0.2)), exact(TOY))


def test_with_a_wrong_value_only_lambda_one_is_exact():
    rewards = policy.kl_penalised_rewards(TOY.rewards, OLD, OLD, MASK, kl_coef=0.0)
    wrong = values(TOY) + jnp.asarray(TOY.record["tokens"], jnp.float32)
    whole, _ = policy.gae(rewards, wrong, MASK, gamma=1.0, lam=1.0)
    part, _ = policy.gae(rewards, wrong, MASK, gamma=1.0, lam=0.5)
    close(expected(TOY, lambda x: policy.ppo_policy(x, OLD, whole, clip=0.2)), exact(TOY))
    assert np.abs(expected(TOY, lambda x: policy.ppo_policy(x, OLD, part, clip=0.2)) - exact(TOY)).max() > 1e-2


def reverse_kl(theta):
    """KL(pi, ref) of whole sequences."""
    p = probabilities(TOY, theta)
    return jnp.sum(p * (jnp.log(p) - jnp.log(probabilities(TOY, TOY.ref))))


def forward_kl(theta):
    q = probabilities(TOY, TOY.ref)
    return jnp.sum(q * (jnp.log(q) - jnp.log(probabilities(TOY, theta))))


def sequence_expectation(estimator):
    """(E of the estimator, the expected gradient of it as a loss) with a whole sequence as one action."""
    ref = logps(TOY, TOY.ref).sum(axis=1)
    value = jnp.sum(probabilities(TOY, TOY.theta) * estimator(OLD.sum(axis=1), ref))
    return value, -expected(TOY, lambda x: estimator(x.sum(axis=1), ref))


def test_values_of_the_kl_estimators():
    """k1 and k3 are unbiased, k2 is not; k2 and k3 are never negative, k1 is."""
    kl = float(reverse_kl(TOY.theta))
    assert sequence_expectation(policy.k1)[0] == pytest.approx(kl, rel=1e-4)
    assert sequence_expectation(policy.k3)[0] == pytest.approx(kl, rel=1e-4)
    assert abs(sequence_expectation(policy.k2)[0] / kl - 1) > 0.05
    ref = logps(TOY, TOY.ref)
    assert policy.k1(OLD, ref).min() < 0 <= min(policy.k2(OLD, ref).min(), policy.k3(OLD, ref).min())


def test_expected_gradients_of_the_kl_estimators_as_losses():
    np.testing.assert_allclose(sequence_expectation(policy.k1)[1], np.zeros_like(TOY.theta), atol=1e-6)
    close(sequence_expectation(policy.k2)[1], gradient(reverse_kl, TOY.theta))
    close(sequence_expectation(policy.k3)[1], gradient(forward_kl, TOY.theta))


def test_kl_in_the_reward_gives_the_gradient_of_the_sequences_kl():
    rewards = policy.kl_penalised_rewards(TOY.rewards, OLD, logps(TOY, TOY.ref), MASK, kl_coef=0.3)
    advantages, _ = policy.gae(rewards, jnp.zeros_like(OLD), MASK, gamma=1.0, lam=1.0)
    close(expected(TOY, lambda x: policy.reinforce(x, OLD, advantages)), exact(TOY) - 0.3 * gradient(reverse_kl, TOY.theta))


def test_a_token_loss_sees_only_the_token_it_stands_at():
    """Token by token, k2's gradient is that of the next-token KLs at fixed prefixes: not the gradient of the sequences' KL."""
    ref = logps(TOY, TOY.ref)
    got = -expected(TOY, lambda x: policy.k2(x, ref))
    p = probabilities(TOY, TOY.theta)

    def next_token_kls(theta):
        a, b = jax.nn.log_softmax(theta)[TOY.record["tokens"]], jax.nn.log_softmax(TOY.ref)[TOY.record["tokens"]]
        return jnp.sum(p[:, None] * jnp.sum(jnp.exp(a) * (a - b), axis=-1))

    close(got, gradient(next_token_kls, TOY.theta))
    assert np.abs(got - gradient(reverse_kl, TOY.theta)).max() > 1e-2


def test_reinforce_pp_is_the_gradient_with_kl_up_to_its_scale():
    """Whitened over a batch that holds every sequence as often as the policy draws it."""
    toy = make(v=2, seed=5)
    counts = np.round(np.asarray(probabilities(toy, toy.theta)) * 4000).astype(int)
    rows = np.repeat(np.arange(len(counts)), counts)
    old, ref, mask = logps(toy, toy.theta)[rows], logps(toy, toy.ref)[rows], jnp.ones((len(rows), T), bool)
    advantages = policy.reinforce_pp(toy.rewards[rows], old, ref, mask, kl_coef=0.2)
    rewards = policy.kl_penalised_rewards(toy.rewards[rows], old, ref, mask, kl_coef=0.2)
    returns, _ = policy.gae(rewards, jnp.zeros_like(rewards), mask, gamma=1.0, lam=1.0)
    scale = jnp.sqrt(mean_of((returns - returns.mean()) ** 2).value())
    np.testing.assert_allclose(advantages * scale, returns - returns.mean(), atol=1e-3)
    got = gradient(lambda theta: jnp.sum(advantages * logps(toy, theta)[rows]) / len(rows), toy.theta)
    kl = lambda theta: jnp.sum((p := probabilities(toy, theta)) * (jnp.log(p) - jnp.log(probabilities(toy, toy.ref))))  # noqa: E731
    close(got * scale, exact(toy) - 0.2 * gradient(kl, toy.theta), 2e-3)


def test_a_sampler_that_is_not_the_trainer_is_corrected_by_importance():
    """Samples of the reference, weighted by pi / ref a sequence of one token: the policy's own gradient."""
    first = make()
    p, q = jax.nn.softmax(first.theta)[0], jax.nn.softmax(first.ref)[0]
    rewards = jnp.arange(4.0)
    weight = policy.truncated_importance(jnp.log(p), jnp.log(q), 1e9)

    def loss(theta):
        return jnp.sum(q * weight * policy.reinforce(jax.nn.log_softmax(theta)[0], jnp.log(p), rewards))

    close(-gradient(loss, first.theta), gradient(lambda t: jax.nn.softmax(t)[0] @ rewards, first.theta))


def test_enumeration_covers_everything():
    assert len({tuple(s) for s in enumerable.make(v=4).sequences}) == 64
