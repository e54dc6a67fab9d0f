"""Estimators of KL(pi, ref) from a token sampled from pi (http://joschu.net/blog/kl-approx.html), and the adaptive coefficient.

x = log ref - log pi. In a reward (`kl_penalised_rewards`) k1 gives the exact gradient of the sequence's KL. As a loss an
estimator is differentiated, and what its gradient is on samples of pi is another question than what its value is:
k1: 0; k2: the gradient of KL(pi, ref); k3: the gradient of KL(ref, pi).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from jaxllm.core.types import UserError

Estimator = Callable[[jax.Array, jax.Array], jax.Array]


def k1(logps: jax.Array, ref_logps: jax.Array) -> jax.Array:
    """-x: unbiased, either sign. For rewards and metrics, not a loss."""
    return logps - ref_logps


def k2(logps: jax.Array, ref_logps: jax.Array) -> jax.Array:
    """x^2 / 2: never negative, biased; its gradient on samples of pi is that of KL(pi, ref)."""
    return 0.5 * (logps - ref_logps) ** 2


def k3(logps: jax.Array, ref_logps: jax.Array) -> jax.Array:
    """exp(x) - x - 1: unbiased, never negative (GRPO's); its gradient on samples of pi is that of KL(ref, pi).

    x is capped at 20 in the exponential, so that a token that the reference finds far likelier gives a finite gradient.
    """
    x = ref_logps - logps
    return jnp.exp(jnp.minimum(x, 20.0)) - x - 1.0


def check_loss(estimator: Estimator | None) -> None:
    """UserError when the estimator cannot be a loss."""
    if estimator is k1:
        raise UserError(
            "kl=k1 cannot be a loss: its expected gradient on the policy's own samples is zero, so it would only add noise; "
            "use k2 or k3, or put the KL into the reward (kl_penalised_rewards)"
        )


@struct.dataclass
class AdaptiveKL:
    """coef float32 []: the coefficient of the KL that is in force."""

    coef: jax.Array


def adapt(controller: AdaptiveKL, kl: jax.Array, *, target: float, rate: float = 0.1) -> AdaptiveKL:
    """coef (1 + rate clip(kl / target - 1, -0.2, 0.2)): the coefficient follows a KL of `target` (arXiv 1909.08593, section 2.2).

    kl []: the mean of the sequences' KL in nats over an iteration's samples. A kl that is not finite changes nothing.
    """
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return AdaptiveKL(controller.coef * (1.0 + rate * jnp.where(jnp.isfinite(kl), error, 0.0)))
