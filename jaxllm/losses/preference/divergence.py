"""DPO under other divergences from the reference: -log sigmoid(beta (f'(t_w) - f'(t_l))), t = pi/ref (arXiv 2309.16240).

Siblings of those in pairs.py. f' is taken up to a constant, which cancels, as a function of the log-ratio x = log t.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

from jaxllm.losses.preference.pairs import PairLogps, dpo, log_ratios

CLAMP = 40.0  # the largest exponent: exp(40) = 2e17, whose square a gradient norm in float32 still holds


def power_score(x: jax.Array, alpha: float) -> jax.Array:
    """(1 - exp(-alpha x)) / alpha, and x where |alpha| < 1e-6; the exponent is at most CLAMP, with no gradient beyond."""
    tiny = jnp.abs(alpha) < 1e-6
    grown = -jnp.expm1(jnp.minimum(-alpha * x, CLAMP)) / jnp.where(tiny, 1.0, alpha)
    return jnp.where(tiny, x, grown)


def _dpo_of(score: Callable[[jax.Array], jax.Array], logps: PairLogps, beta: float) -> jax.Array:
    chosen, rejected = (score(x) for x in log_ratios(logps))
    return -log_sigmoid(beta * (chosen - rejected))


def reverse_kl(logps: PairLogps, *, beta: float) -> jax.Array:
    """f'(t) = log t: dpo itself. Limits: dpo's."""
    return dpo(logps, beta=beta)


def forward_kl(logps: PairLogps, *, beta: float) -> jax.Array:
    """f'(t) = -1/t: DPO under the forward KL divergence (arXiv 2309.16240, table 1).

    Limits: dpo to first order at the reference; exp(-x) is clamped at log-ratios x below -40, where no gradient flows.
    """
    return _dpo_of(lambda x: power_score(x, 1.0), logps, beta)


def jensen_shannon(logps: PairLogps, *, beta: float) -> jax.Array:
    """f'(t) = log(2t / (1 + t)): DPO under the Jensen-Shannon divergence (arXiv 2309.16240, table 1).

    Limits: f' is bounded above by log 2, so no chosen log-ratio makes up for a rejected one that is not lowered; half of dpo's
    beta to first order at the reference.
    """
    return _dpo_of(log_sigmoid, logps, beta)


def alpha_divergence(logps: PairLogps, *, beta: float, alpha: float) -> jax.Array:
    """f'(t) = (1 - t^-alpha) / alpha: DPO under an alpha divergence, 0 < alpha < 1 (arXiv 2309.16240, table 1).

    Limits: alpha = 0 is dpo, alpha = 1 is forward_kl; t^-alpha is clamped at log-ratios x below -40/alpha, as there.
    """
    return _dpo_of(lambda x: power_score(x, alpha), logps, beta)
