"""Losses on pairs without a reference: siblings of those in pairs.py; the reference columns are not read.

a and r are the log-probabilities per token, log pi(y)/|y|, of the chosen and of the rejected completion.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

from jaxllm.losses.preference.divergence import power_score
from jaxllm.losses.preference.pairs import PairLogps, per_token

CERTAIN = -1e-6  # the largest log-probability for which 1 - p is taken: log(1 - p) stays finite, beyond it no gradient flows


def _means(logps: PairLogps) -> tuple[jax.Array, jax.Array]:
    return per_token(logps, logps.chosen, logps.rejected)


def log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - exp(x)) for x < 0, stable at both ends; x above CERTAIN counts as CERTAIN."""
    x = jnp.minimum(x, CERTAIN)
    near = x > -0.6931472
    # each branch sees only arguments that suit it, so that neither puts a nan into the other's gradient
    small, large = jnp.where(near, x, -1.0), jnp.where(near, -1.0, x)
    return jnp.where(near, jnp.log(-jnp.expm1(small)), jnp.log1p(-jnp.exp(large)))


def reference_free(logps: PairLogps, *, beta: float) -> jax.Array:
    """dpo with a uniform reference: -log sigmoid(beta (log pi(y_w) - log pi(y_l))) (arXiv 2305.18290, its ablation)."""
    return -log_sigmoid(beta * (logps.chosen - logps.rejected))


def cpo(logps: PairLogps, *, beta: float) -> jax.Array:
    """-log sigmoid(beta (log pi(y_w) - log pi(y_l))): contrastive PO's preference term (arXiv 2401.08417, equation 3).

    The loss of the paper adds the NLL of the chosen: `loss(model, cpo, beta=..., nll_weight=1)`. Limits: reference_free's.
    """
    return reference_free(logps, beta=beta)


def simpo(logps: PairLogps, *, beta: float, gamma: float) -> jax.Array:
    """-log sigmoid(beta (a - r) - gamma): simple PO, gamma is the target margin (arXiv 2405.14734, equation 6).

    Limits: at lengths of 1 and gamma = 0 it is reference_free; half its weight is left where beta (a - r) = gamma.
    """
    chosen, rejected = _means(logps)
    return -log_sigmoid(beta * (chosen - rejected) - gamma)


def alphapo(logps: PairLogps, *, beta: float, gamma: float, alpha: float) -> jax.Array:
    """-log sigmoid(beta (s(a) - s(r)) - gamma) with s(x) = (1 - exp(-alpha x)) / alpha: AlphaPO (arXiv 2501.03884).

    Limits: alpha = 0 is simpo; exponents are clamped at 40, beyond which no gradient flows (`divergence.power_score`).
    """
    chosen, rejected = (power_score(x, alpha) for x in _means(logps))
    return -log_sigmoid(beta * (chosen - rejected) - gamma)


def orpo(logps: PairLogps, *, beta: float) -> jax.Array:
    """-beta log sigmoid(log odds(a) - log odds(r)), odds(x) = e^x / (1 - e^x) (arXiv 2403.07691, equation 7).

    The odds ratio term; beta is the paper's lambda. The paper adds the NLL of the chosen: `loss(model, orpo, nll_weight=1, ...)`.
    Limits: probabilities per token above 1 - 1e-6 count as that (also an empty completion's, 1), with no gradient.
    """
    chosen, rejected = (jnp.minimum(x, CERTAIN) for x in _means(logps))
    return -beta * log_sigmoid(chosen - log1mexp(chosen) - (rejected - log1mexp(rejected)))


def preferred_ft(logps: PairLogps, *, beta: float = 0.0) -> jax.Array:
    """-a: fine-tuning on the chosen completion, NLL per token (the Preferred-FT of arXiv 2305.18290). beta is not used.

    Limits: each pair weighs 1 whatever its length; the rejected completion does not enter.
    """
    return -_means(logps)[0]


def unlikelihood(logps: PairLogps, *, alpha: float, beta: float = 0.0) -> jax.Array:
    """-a - alpha log(1 - exp(r)): NLL of the chosen and unlikelihood of the rejected (arXiv 1908.04319). beta is not used.

    On the geometric mean of the rejected tokens' probabilities; `tokens.unlikelihood` has the paper's sum over tokens. Limits:
    alpha = 0 is preferred_ft; a mean probability above 1 - 1e-6 counts as that, with no gradient.
    """
    chosen, rejected = _means(logps)
    return -chosen - alpha * log1mexp(rejected)
