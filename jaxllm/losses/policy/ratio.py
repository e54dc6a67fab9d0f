"""Token losses of one signature, (logps, logps_old, advantages, mask) -> [b, l]: what a token's advantage is multiplied by.

rho = pi / pi_old. At log pi = log pi_old the gradient of every one of them is the policy gradient -A grad log pi.
`mask` is only read where the ratio is a sequence's (gspo).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def _ratio(logps: jax.Array, logps_old: jax.Array) -> jax.Array:
    """pi / pi_old, capped at exp(20): an overflow would turn the clipped branch's gradient 0 into 0 * inf = nan."""
    return jnp.exp(jnp.minimum(logps - logps_old, 20.0))


def reinforce(logps: jax.Array, logps_old: jax.Array, advantages: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """-A log pi (Williams 1992): no ratio, so only for samples of the current policy."""
    return -advantages * logps


def ppo_policy(
    logps: jax.Array, logps_old: jax.Array, advantages: jax.Array, mask: jax.Array | None = None, *, clip: float
) -> jax.Array:
    """-min(rho A, clip(rho, 1 - clip, 1 + clip) A) with rho = exp(log pi - log pi_old) (arXiv 1707.06347, equation 7).

    Limits: at log pi = log pi_old the gradient is the policy gradient -A grad log pi; clip -> inf never clips.
    """
    return clipped(logps, logps_old, advantages, low=clip, high=clip)


def clipped(
    logps: jax.Array, logps_old: jax.Array, advantages: jax.Array, mask: jax.Array | None = None, *, low: float, high: float
) -> jax.Array:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A): DAPO's clip-higher has high > low (arXiv 2503.14476, equation 8)."""
    return _clipped(_ratio(logps, logps_old), advantages, low, high)


def _clipped(ratio: jax.Array, advantages: jax.Array, low: float, high: float) -> jax.Array:
    return -jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - low, 1 + high) * advantages)


def dual_clip(
    logps: jax.Array, logps_old: jax.Array, advantages: jax.Array, mask: jax.Array | None = None, *, clip: float, dual: float
) -> jax.Array:
    """-max(min(rho A, clip(rho) A), dual A) where A < 0, ppo_policy elsewhere (arXiv 1912.09729, equation 5); dual > 1 + clip.

    A bad token that became much likelier no longer costs more than dual |A|. Limit: dual -> inf is ppo_policy.
    """
    loss = ppo_policy(logps, logps_old, advantages, clip=clip)
    return jnp.where(advantages < 0, jnp.minimum(loss, -dual * advantages), loss)


def gspo(logps: jax.Array, logps_old: jax.Array, advantages: jax.Array, mask: jax.Array, *, low: float, high: float) -> jax.Array:
    """clipped with one ratio a sequence, exp(mean_t (log pi - log pi_old)) (arXiv 2507.18071, equations 5 and 7).

    Every token of a row gets the row's loss; the paper's objective is this under `sequence_mean`.
    """
    change = jnp.sum(jnp.where(mask, logps - logps_old, 0.0), axis=1, keepdims=True)
    mean = change / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    return _clipped(_ratio(mean, jnp.zeros_like(mean)), advantages, low, high)


def cispo(
    logps: jax.Array, logps_old: jax.Array, advantages: jax.Array, mask: jax.Array | None = None, *, cap: float
) -> jax.Array:
    """-stop_gradient(min(rho, cap)) A log pi (arXiv 2506.13585, equations 4 and 5): the weight is clipped, never the gradient.

    cap is the largest weight itself: TRL's epsilon_high of this loss, the paper's 1 + epsilon_high.
    """
    return -jax.lax.stop_gradient(jnp.minimum(_ratio(logps, logps_old), cap)) * advantages * logps


def ppo_value(values: jax.Array, values_old: jax.Array, returns: jax.Array, *, clip: float) -> jax.Array:
    """max((V - R)^2, (clip(V, V_old +- clip) - R)^2) / 2, the clipped value loss of the PPO reference code."""
    clipped = values_old + jnp.clip(values - values_old, -clip, clip)
    return 0.5 * jnp.maximum((values - returns) ** 2, (clipped - returns) ** 2)
