"""Advantages: per token (GAE, REINFORCE++) and per row (groups and baselines).

Row advantages take scores [b] whose rows of one prompt are neighbours, and `valid` bool [b] (None: all): a row whose reward was
excluded gets advantage 0 and is in no statistic, whatever stands in its score. A group without spread gives exactly 0.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.core.types import Mean, mean_of


def kl_penalised_rewards(
    scores: jax.Array, logps: jax.Array, ref_logps: jax.Array, mask: jax.Array, *, kl_coef: float | jax.Array
) -> jax.Array:
    """r_t = -kl_coef (log pi - log ref)_t, plus the sequence's score at its last sampled token (arXiv 1909.08593).

    scores [b]; the rest [b, l] -> [b, l], 0 outside the mask.
    """
    rewards = -kl_coef * jnp.where(mask, logps - ref_logps, 0.0)
    return rewards + scores[:, None] * last_of(mask)


def last_of(mask: jax.Array) -> jax.Array:
    """True at the last True of each row: [b, l] -> bool [b, l]."""
    index = jnp.arange(mask.shape[1])[None, :]
    return mask & (index == jnp.max(jnp.where(mask, index, -1), axis=1, keepdims=True))


def gae(rewards: jax.Array, values: jax.Array, mask: jax.Array, *, gamma: float, lam: float) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation (arXiv 1506.02438): A_t = sum_k (gamma lam)^k delta_{t+k}, returns = A + V.

    delta_t = r_t + gamma V_{t+1} - V_t; the value after the last token of the mask is 0. Limits: lam = 0 is the one-step
    error, lam = 1 the discounted return minus the value. [b, l] each; sampled tokens are contiguous. Outside the mask: 0.
    """
    values = jnp.where(mask, values, 0.0)
    rewards = jnp.where(mask, rewards, 0.0)
    following = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    delta = rewards + gamma * following - values

    def back(carry, xs):
        delta, use = xs
        carry = jnp.where(use, delta + gamma * lam * carry, 0.0)
        return carry, carry

    _, advantages = jax.lax.scan(back, jnp.zeros(values.shape[0]), (delta.T, mask.T), reverse=True)
    return advantages.T, jnp.where(mask, advantages.T + values, 0.0)


def whiten(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean 0 and variance 1 over the mask (0 outside, and everywhere when the values are all alike).

    Uses batch statistics: call it once, before any split.
    """
    mean = mean_of(values, mask).value()
    variance = mean_of((values - mean) ** 2, mask).value()
    varied = jnp.max(values, where=mask, initial=-jnp.inf) > jnp.min(values, where=mask, initial=jnp.inf)
    return jnp.where(mask & varied, (values - mean) * jax.lax.rsqrt(variance + 1e-8), 0.0)


def reinforce_pp(
    scores: jax.Array, logps: jax.Array, ref_logps: jax.Array, mask: jax.Array, valid: jax.Array | None = None, *,
    kl_coef: float | jax.Array,
) -> jax.Array:  # fmt: skip
    """REINFORCE++ (arXiv 2501.03262): A_t = score - kl_coef sum_{s >= t} (log pi - log ref)_s, whitened over the whole batch.

    scores [b]; the rest [b, l] -> [b, l]. Tool observations inside the mask's span take part in no sum.
    """
    valid = _all_valid(scores, valid)
    use = mask & valid[:, None]
    rewards = kl_penalised_rewards(jnp.where(valid, scores, 0.0), logps, ref_logps, use, kl_coef=kl_coef)
    returns = jnp.flip(jnp.cumsum(jnp.flip(rewards, 1), axis=1), 1)
    return whiten(returns, use)


def grpo(scores: jax.Array, group: int, valid: jax.Array | None = None) -> jax.Array:
    """(r - mean) / (std + 1e-4) within each group, std unbiased as in TRL (arXiv 2402.03300, equation 2.1.2). [b] -> [b]."""
    g = _groups(scores, group, valid)
    return (g.centred / (g.std + 1e-4)).reshape(-1)


def dr_grpo(scores: jax.Array, group: int, valid: jax.Array | None = None) -> jax.Array:
    """r - mean within each group: no division by the std, which favours too easy and too hard prompts (arXiv 2503.20783)."""
    return _groups(scores, group, valid).centred.reshape(-1)


def rloo(scores: jax.Array, group: int, valid: jax.Array | None = None) -> jax.Array:
    """r_i - mean of the group's other rewards (arXiv 2402.14740): n / (n - 1) times dr_grpo's. Unbiased. [b] -> [b]."""
    g = _groups(scores, group, valid)
    return (g.centred * g.count / jnp.maximum(g.count - 1, 1)).reshape(-1)


def baseline(scores: jax.Array, value: jax.Array | float, valid: jax.Array | None = None) -> jax.Array:
    """r - value: REINFORCE with a baseline, a scalar or [b]. [b] -> [b].

    The gradient is unbiased when the value does not depend on the row's own sample: a running mean before its update
    (`running_mean`). The batch's own mean, mean_of(scores, valid).value(), shrinks the expected gradient by (b - 1) / b.
    """
    return jnp.where(_all_valid(scores, valid), scores - value, 0.0)


def running_mean(mean: Mean, scores: jax.Array, valid: jax.Array | None = None, *, decay: float) -> Mean:
    """The mean of all scores so far, older batches weighted by `decay` each; it starts from Mean(0., 0.)."""
    return jax.tree.map(lambda old, new: decay * old + new, mean, mean_of(scores, _all_valid(scores, valid)))


def remax(scores: jax.Array, greedy_scores: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """r - reward of the greedy answer to the same prompt (arXiv 2310.10505). [b], [b] -> [b].

    valid is False where either reward was excluded.
    """
    return baseline(scores, greedy_scores, valid)


def group_metrics(scores: jax.Array, group: int, valid: jax.Array | None = None) -> dict[str, Mean]:
    """TRL's reward, reward_std and frac_reward_zero_std, and excluded rewards: rewards/excluded.total is their number.

    Groups whose rewards were all excluded are in neither of the two means over groups.
    """
    valid = _all_valid(scores, valid)
    g = _groups(scores, group, valid)
    some = g.count > 0
    return {
        "reward": mean_of(scores, valid),
        "reward_std": mean_of(g.std, some),
        "frac_reward_zero_std": mean_of(~g.varied, some),
        "rewards/excluded": mean_of(~valid),
    }


class Groups(NamedTuple):
    """Statistics over the valid rows of each group; count, std, varied [p, 1]; centred [p, group], 0 where not valid."""

    centred: jax.Array
    std: jax.Array
    count: jax.Array
    varied: jax.Array


def _groups(scores: jax.Array, group: int, valid: jax.Array | None) -> Groups:
    x = scores.astype(jnp.float32).reshape(-1, group)
    use = _all_valid(scores, valid).reshape(-1, group)
    count = use.sum(axis=1, keepdims=True)
    low = jnp.min(x, axis=1, keepdims=True, where=use, initial=jnp.inf)
    high = jnp.max(x, axis=1, keepdims=True, where=use, initial=-jnp.inf)
    # a mean of equal numbers is not always that number in floating point: alike is decided on the numbers themselves
    varied = high > low
    mean = jnp.sum(x, axis=1, keepdims=True, where=use) / jnp.maximum(count, 1)
    centred = jnp.where(use & varied, x - mean, 0.0)
    std = jnp.sqrt(jnp.sum(centred**2, axis=1, keepdims=True) / jnp.maximum(count - 1, 1))
    return Groups(centred, std, count, varied)


def _all_valid(scores: jax.Array, valid: jax.Array | None) -> jax.Array:
    return jnp.ones(scores.shape, bool) if valid is None else valid
