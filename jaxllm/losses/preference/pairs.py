"""Losses on pairs against a reference: siblings with one first argument.

Every function maps sequence log-probabilities [b] to losses [b]. Throughout, w is the chosen completion's log-ratio
log pi(y_w)/ref(y_w), l the rejected one's, and h = w - l; DPO's implicit reward margin is beta h.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax.nn import log_sigmoid, sigmoid


@struct.dataclass
class PairLogps:
    """Summed log-probabilities of completions under policy and reference, and completion lengths in tokens: all [b]."""

    chosen: jax.Array
    rejected: jax.Array
    ref_chosen: jax.Array
    ref_rejected: jax.Array
    chosen_length: jax.Array
    rejected_length: jax.Array


def log_ratios(logps: PairLogps) -> tuple[jax.Array, jax.Array]:
    """(w, l): log pi/ref of the chosen and of the rejected completion, each [b]."""
    return logps.chosen - logps.ref_chosen, logps.rejected - logps.ref_rejected


def log_ratio_margin(logps: PairLogps) -> jax.Array:
    """h = log pi(y_w)/ref(y_w) - log pi(y_l)/ref(y_l), [b]."""
    chosen, rejected = log_ratios(logps)
    return chosen - rejected


def per_token(logps: PairLogps, chosen: jax.Array, rejected: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums over the two completions divided by their lengths; an empty completion's sum (0) by 1."""
    return chosen / jnp.maximum(logps.chosen_length, 1), rejected / jnp.maximum(logps.rejected_length, 1)


def dpo(logps: PairLogps, *, beta: float) -> jax.Array:
    """-log sigmoid(beta h): direct preference optimisation (arXiv 2305.18290, equation 7).

    Limits: beta -> 0 gives log 2 and no gradient; the gradient with respect to h is -beta sigmoid(-beta h).
    """
    return -log_sigmoid(beta * log_ratio_margin(logps))


def dpo_norm(logps: PairLogps, *, beta: float) -> jax.Array:
    """-log sigmoid(beta (w/|y_w| - l/|y_l|)): DPO with log-ratios per token (arXiv 2411.15124, Tulu 3).

    Limits: equal to dpo at lengths of 1; beta is larger than dpo's by about the length of a completion.
    """
    chosen, rejected = per_token(logps, *log_ratios(logps))
    return -log_sigmoid(beta * (chosen - rejected))


def cdpo(logps: PairLogps, *, beta: float, label_smoothing: float) -> jax.Array:
    """(1 - e) dpo + e dpo of the swapped pair: conservative DPO for labels flipped with probability e (Mitchell, 2023).

    Limits: e = 0 is dpo; e = 1/2 is symmetric in the pair; for 0 < e < 1/2 the minimum lies at beta h = log((1 - e) / e).
    """
    margin = beta * log_ratio_margin(logps)
    return -(1 - label_smoothing) * log_sigmoid(margin) - label_smoothing * log_sigmoid(-margin)


def robust(logps: PairLogps, *, beta: float, label_smoothing: float) -> jax.Array:
    """((1 - e) dpo - e dpo of the swapped pair) / (1 - 2e): unbiased under labels flipped with probability e < 1/2.

    arXiv 2403.00409, equation 12. Limits: e = 0 is dpo; the mean over clean and flipped labels, weighted 1 - e and e, is
    dpo on clean labels; unbounded below as h grows, where its gradient tends to -beta e / (1 - 2e).
    """
    margin = beta * log_ratio_margin(logps)
    kept, flipped = -log_sigmoid(margin), -log_sigmoid(-margin)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge(logps: PairLogps, *, beta: float) -> jax.Array:
    """max(0, 1 - beta h): SLiC-HF's calibration loss (arXiv 2305.10425) on log-ratios (as in arXiv 2309.06657).

    Limits: the gradient with respect to h is -beta below beta h = 1 and 0 above; with a uniform reference it is SLiC's.
    """
    return jax.nn.relu(1 - beta * log_ratio_margin(logps))


def ipo(logps: PairLogps, *, beta: float) -> jax.Array:
    """(w/|y_w| - l/|y_l| - 1/(2 beta))^2: identity preference optimisation (arXiv 2310.12036, equation 17); beta is its tau.

    Each log-ratio is divided by its length, as the paper's authors do. Limits: the minimum lies at a per-token margin of
    1/(2 beta), however certain the preference; beta = 0 is undefined.
    """
    chosen, rejected = per_token(logps, *log_ratios(logps))
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def exo_pair(logps: PairLogps, *, beta: float, label_smoothing: float) -> jax.Array:
    """KL(q, p) of q = (sigmoid(beta h), sigmoid(-beta h)) from p = (1 - e, e): EXO on pairs (arXiv 2402.00856, equation 16).

    Limits: needs 0 < e < 1; the minimum, 0, lies at beta h = log((1 - e) / e); unlike DPO's the gradient vanishes at both ends.
    """
    margin = beta * log_ratio_margin(logps)
    log_q, log_not_q = log_sigmoid(margin), log_sigmoid(-margin)
    kept = sigmoid(margin) * (log_q - jnp.log1p(-label_smoothing))
    return kept + sigmoid(-margin) * (log_not_q - jnp.log(label_smoothing))


def nca_pair(logps: PairLogps, *, beta: float) -> jax.Array:
    """-log sigmoid(beta w) - (log sigmoid(-beta w) + log sigmoid(-beta l)) / 2: noise contrastive alignment (arXiv 2402.05369).

    Limits: w has its minimum at sigmoid(beta w) = 2/3, so the chosen completion's likelihood rises; l falls without bound.
    """
    chosen, rejected = (beta * x for x in log_ratios(logps))
    return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


def bco_pair(logps: PairLogps, *, beta: float) -> jax.Array:
    """-log sigmoid(beta w) - log sigmoid(-beta l): binary classifier optimisation on pairs (arXiv 2404.04656).

    Without the running reward shift of the paper (`unpaired.bco` has it). Limits: an upper bound of dpo, tight as w and -l grow.
    """
    chosen, rejected = (beta * x for x in log_ratios(logps))
    return -log_sigmoid(chosen) - log_sigmoid(-rejected)


def sppo_hard(logps: PairLogps, *, beta: float) -> jax.Array:
    """(w - 1/(2 beta))^2 + (l + 1/(2 beta))^2: self-play PO with win probabilities of 1 and 0 (arXiv 2405.00675, equation 4.7).

    Limits: the minimum lies at w = 1/(2 beta) = -l; beta = 0 is undefined.
    """
    chosen, rejected = log_ratios(logps)
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def aot(logps: PairLogps, *, beta: float) -> jax.Array:
    """-log sigmoid(beta (sorted(policy margins) - sorted(reference margins))): alignment via optimal transport, paired.

    arXiv 2406.05882. The sort is over the batch: a batch statistic, so micro-batches give another loss than the whole batch.
    Limits: dpo where policy and reference order the batch alike, in particular at b = 1.
    """
    policy, reference = logps.chosen - logps.rejected, logps.ref_chosen - logps.ref_rejected
    return -log_sigmoid(beta * (jnp.sort(policy) - jnp.sort(reference)))


def aot_unpaired(logps: PairLogps, *, beta: float) -> jax.Array:
    """-log sigmoid(beta (sorted(w) - sorted(l))): alignment via optimal transport, unpaired (arXiv 2406.05882).

    The sorts are over the batch: a batch statistic, see `aot`. Limits: dpo at b = 1; which l belongs to which w does not matter.
    """
    chosen, rejected = log_ratios(logps)
    return -log_sigmoid(beta * (jnp.sort(chosen) - jnp.sort(rejected)))


def apo_zero(logps: PairLogps, *, beta: float) -> jax.Array:
    """1 - sigmoid(beta w) + sigmoid(beta l): anchored PO, chosen up and rejected down (arXiv 2408.06266, equation 7).

    Limits: between 0 and 2, 1 at the reference; both gradients are largest at log-ratios of 0 and vanish far from it.
    """
    chosen, rejected = log_ratios(logps)
    return sigmoid(-beta * chosen) + sigmoid(beta * rejected)


def apo_down(logps: PairLogps, *, beta: float) -> jax.Array:
    """sigmoid(beta w) + 1 - sigmoid(beta h): anchored PO, both down, rejected further (arXiv 2408.06266, equation 8).

    Limits: between 0 and 2, 1 at the reference; for chosen completions worse than the policy's own.
    """
    chosen, rejected = log_ratios(logps)
    return sigmoid(beta * chosen) + sigmoid(-beta * (chosen - rejected))


def discopop(logps: PairLogps, *, beta: float, tau: float) -> jax.Array:
    """s(-x/tau) softplus(-x) + s(x/tau) exp(-x) with x = beta h, s the sigmoid: DiscoPOP (arXiv 2406.08414, equation 5).

    The second term is taken as exp(log s(x/tau) - x), which has no inf * 0. Limits: needs 0 < tau < 1 (the paper has 0.05);
    dpo as x -> -inf, exp(-x) as x -> inf; not convex: between them lies a short stretch with the gradient's sign reversed.
    """
    x = beta * log_ratio_margin(logps)
    return -log_sigmoid(x) * sigmoid(-x / tau) + jnp.exp(log_sigmoid(x / tau) - x)
