"""PPO: advantages, clipped losses and the per-token KL penalty. Array-level functions first, the builder last.

All arrays are [b, l] aligned with a sequence record's targets; `mask` is True on the tokens the policy sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core import ops
from jaxllm.core.types import Batch, Key, LossFn, Mean, Model, Params, mean_of


def kl_penalised_rewards(
    scores: jax.Array, logps: jax.Array, ref_logps: jax.Array, mask: jax.Array, *, kl_coef: float
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
    """Mean 0 and variance 1 over the mask (0 outside). Uses batch statistics: call it once, before any split."""
    mean = mean_of(values, mask).value()
    variance = mean_of((values - mean) ** 2, mask).value()
    return jnp.where(mask, (values - mean) * jax.lax.rsqrt(variance + 1e-8), 0.0)


def _ratio(logps: jax.Array, logps_old: jax.Array) -> jax.Array:
    """pi / pi_old, capped at exp(20): an overflow would turn the clipped branch's gradient 0 into 0 * inf = nan."""
    return jnp.exp(jnp.minimum(logps - logps_old, 20.0))


def ppo_policy(logps: jax.Array, logps_old: jax.Array, advantages: jax.Array, *, clip: float) -> jax.Array:
    """-min(rho A, clip(rho, 1 - clip, 1 + clip) A) with rho = exp(log pi - log pi_old) (arXiv 1707.06347, equation 7).

    Limits: at log pi = log pi_old the gradient is the policy gradient -A grad log pi; clip -> inf never clips.
    """
    ratio = _ratio(logps, logps_old)
    return -jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages)


def ppo_value(values: jax.Array, values_old: jax.Array, returns: jax.Array, *, clip: float) -> jax.Array:
    """max((V - R)^2, (clip(V, V_old +- clip) - R)^2) / 2, the clipped value loss of the PPO reference code."""
    clipped = values_old + jnp.clip(values - values_old, -clip, clip)
    return 0.5 * jnp.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def loss(
    model: Model, scalars: Callable[[Params, Batch], jax.Array], *, clip: float, value_clip: float, value_coef: float,
    temperature: float = 1.0, chunk: int | None = None,
) -> LossFn:  # fmt: skip
    """ppo_policy + value_coef * ppo_value, averaged over sampled tokens.

    batch: a sequence record with logps_old, values_old, advantages, returns [b, l]; params has the roots `policy` and
    `value`; scalars(params, record) -> [b, l] is the value head. logps_old and this use the same temperature.
    """

    def loss_fn(params: Params, batch: Batch, rng: Key) -> tuple[Mean, dict[str, Mean]]:
        mask = batch["mask"]
        out = ops.model_logps(model, params["policy"], batch, chunk, temperature)
        # outside the mask both sides are set equal before the exponential, so that nothing there can overflow
        logps = jnp.where(mask, out.logp, 0.0)
        old = jnp.where(mask, batch["logps_old"], 0.0)
        values = scalars(params["value"], batch)
        policy = ppo_policy(logps, old, batch["advantages"], clip=clip)
        value = ppo_value(values, batch["values_old"], batch["returns"], clip=value_clip)
        mean = mean_of(policy + value_coef * value, mask)
        return mean, {"loss": mean, **_metrics(logps, old, values, policy, value, batch, out.entropy, clip, value_clip)}

    return loss_fn


def _metrics(
    logps: Any, old: Any, values: Any, policy: Any, value: Any, batch: Batch, entropy: Any, clip: float, value_clip: float
):
    """TRL's names for what happened inside an update."""
    mask, ratio = batch["mask"], _ratio(logps, old)
    return {
        "loss/policy_avg": mean_of(policy, mask),
        "loss/value_avg": mean_of(value, mask),
        "policy/approxkl_avg": mean_of(0.5 * (logps - old) ** 2, mask),
        "policy/clipfrac_avg": mean_of(jnp.abs(ratio - 1) > clip, mask),
        "policy/entropy_avg": mean_of(jax.lax.stop_gradient(entropy), mask),
        "val/ratio": mean_of(ratio, mask),
        "val/clipfrac_avg": mean_of(jnp.abs(values - batch["values_old"]) > value_clip, mask),
    }
