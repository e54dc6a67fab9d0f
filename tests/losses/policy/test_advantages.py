"""Group and baseline advantages against numpy, row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.types import Mean
from jaxllm.losses import policy

RNG = np.random.default_rng(0)
GROUP = 4
SCORES = RNG.normal(size=12).astype(np.float32)
VALID = np.array([1, 1, 1, 1, 1, 0, 1, 1, 0, 1, 0, 0], bool)
LOUD = np.where(VALID, SCORES, np.nan).astype(np.float32)


def per_group(fn, scores, valid):
    """fn(the valid rewards of a group) -> their advantages; 0 for the other rows."""
    out = np.zeros(len(scores))
    for start in range(0, len(scores), GROUP):
        rows = start + np.flatnonzero(valid[start : start + GROUP])
        if len(rows) > 1:
            out[rows] = fn(scores[rows].astype(np.float64))
    return out


RULES = {
    "grpo": (policy.grpo, lambda r: (r - r.mean()) / (r.std(ddof=1) + 1e-4)),
    "dr_grpo": (policy.dr_grpo, lambda r: r - r.mean()),
    "rloo": (policy.rloo, lambda r: np.array([x - np.delete(r, i).mean() for i, x in enumerate(r)])),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("valid", [np.ones(12, bool), VALID], ids=["all", "excluded"])
def test_group_advantages_equal_numpy_and_do_not_see_excluded_rewards(name, valid):
    fn, rule = RULES[name]
    scores = np.where(valid, SCORES, np.nan).astype(np.float32)
    got = jax.jit(lambda s, v: fn(s, GROUP, v))(scores, valid)
    np.testing.assert_allclose(got, per_group(rule, SCORES, valid), rtol=1e-4, atol=1e-6)
    assert not np.asarray(got)[~valid].any()
    if valid.all():
        np.testing.assert_allclose(got, jax.jit(lambda s: fn(s, GROUP))(scores), rtol=1e-5)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -7.3e5])
def test_a_group_without_spread_gives_exactly_zero(name, value):
    scores = jnp.array([value] * 3 + [1.0, 2.0, 4.0], jnp.float32)
    got = np.asarray(RULES[name][0](scores, 3))
    assert not got[:3].any() and got[3:].all()


@pytest.mark.parametrize("name", RULES)
def test_a_group_with_one_valid_reward_gives_zero(name):
    got = RULES[name][0](jnp.array([5.0, jnp.nan, jnp.nan, jnp.nan]), 2, jnp.array([True, False, False, False]))
    np.testing.assert_array_equal(got, np.zeros(4))


def test_group_metrics_count_what_was_excluded_and_what_has_no_signal():
    scores = np.array([1, 1, 0, 1, np.nan, 3, np.nan, np.nan], np.float32)
    valid = ~np.isnan(scores)
    got = policy.group_metrics(jnp.asarray(scores), 2, jnp.asarray(valid))
    assert got["reward"].value() == pytest.approx(np.nanmean(scores))
    # groups: (1, 1) alike; (0, 1); one valid row: alike; none valid: not counted
    assert got["frac_reward_zero_std"] == Mean(2, 3)
    assert got["reward_std"].value() == pytest.approx(np.std([0, 1], ddof=1) / 3, rel=1e-5)
    assert got["rewards/excluded"] == Mean(3, 8)
    np.testing.assert_array_equal(policy.keep_informative(jnp.asarray(scores), 2, jnp.asarray(valid)), [0, 1, 0, 0])


def test_baseline_and_remax():
    greedy = RNG.normal(size=12).astype(np.float32)
    np.testing.assert_allclose(policy.baseline(SCORES, 0.5), SCORES - 0.5, rtol=1e-6)
    got = policy.remax(LOUD, greedy, VALID)
    np.testing.assert_allclose(got, np.where(VALID, SCORES - greedy, 0), rtol=1e-6)


def test_a_running_mean_weighs_older_batches_down_and_skips_excluded_rewards():
    mean = Mean(jnp.float32(0), jnp.float32(0))
    assert mean.value() == 0
    total = count = 0.0
    for k in range(3):
        scores = SCORES + k
        mean = policy.running_mean(mean, jnp.where(VALID, scores, jnp.nan), VALID, decay=0.9)
        total, count = 0.9 * total + scores[VALID].sum(), 0.9 * count + VALID.sum()
        assert mean.value() == pytest.approx(total / count, rel=1e-5)


def test_reinforce_pp_is_the_whitened_reward_to_go():
    b, length = 3, 6
    mask = np.array([[0, 1, 1, 1, 0, 0], [0, 0, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1]], bool)
    logps, ref = RNG.normal(-2, 1, (2, b, length)).astype(np.float32)
    scores, valid = np.array([1.0, -2.0, np.nan], np.float32), np.array([True, True, False])
    got = policy.reinforce_pp(*map(jnp.asarray, (scores, logps, ref, mask, valid)), kl_coef=0.3)
    use = mask & valid[:, None]
    raw = np.zeros((b, length))
    for i, t in np.argwhere(use):
        raw[i, t] = scores[i] - 0.3 * sum(logps[i, s] - ref[i, s] for s in range(t, length) if mask[i, s])
    expected = np.where(use, (raw - raw[use].mean()) / raw[use].std(), 0)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_reinforce_pp_without_spread_is_zero():
    same = jnp.full((2, 3), -1.0)
    got = policy.reinforce_pp(jnp.full(2, 0.1), same, same, jnp.ones((2, 3), bool), kl_coef=0.1)
    np.testing.assert_array_equal(got, np.zeros((2, 3)))
