"""Losses on single completions that are labelled good or bad, and the builder that turns one into a LossFn.

Every function maps RowLogps to losses [b]. x = log pi(y)/ref(y) is a row's log-ratio, beta x its implicit reward.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.nn import log_sigmoid, sigmoid

from jaxllm.core.types import Batch, Key, LossFn, Mean, Model, Params, mean_of
from jaxllm.losses.preference.builders import sequence_logps


@struct.dataclass
class RowLogps:
    """Summed log-probabilities of completions under policy and reference [b], bool labels [b], True = good, and kl.

    kl [] is an estimate of KL(policy, reference) in nats from completions of other prompts, at least 0, without gradient.
    """

    policy: jax.Array
    reference: jax.Array
    label: jax.Array
    kl: jax.Array


def kto(logps: RowLogps, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> jax.Array:
    """Good: d (1 - sigmoid(beta (x - kl))); bad: u (1 - sigmoid(beta (kl - x))) (arXiv 2402.01306, equation 8).

    d and u weigh the two kinds; the paper balances d n_good and u n_bad. kl is a batch statistic, so micro-batches give another
    loss than the whole batch. Limits: between 0 and the weight; 1/2 of it at the reference; vanishing gradients at both ends.
    """
    sign = jnp.where(logps.label, 1.0, -1.0)
    weight = jnp.where(logps.label, desirable_weight, undesirable_weight)
    return weight * sigmoid(-beta * sign * (logps.policy - logps.reference - logps.kl))


def bco(logps: RowLogps, *, beta: float) -> jax.Array:
    """Good: -log sigmoid(beta x - s); bad: -log sigmoid(s - beta x), s the mean reward of both kinds (arXiv 2404.04656).

    s = (mean of good + mean of bad) / 2 of beta x, without gradient, over the batch (the paper has a running mean): a batch
    statistic, as kto's kl. Limits: beta -> 0 gives log 2; with one kind only s is its mean.
    """
    reward = beta * (logps.policy - logps.reference)
    good, bad = mean_of(reward, logps.label), mean_of(reward, ~logps.label)
    kinds = (good.count > 0) + (bad.count > 0).astype(jnp.float32)
    shift = jax.lax.stop_gradient((good.value() + bad.value()) / jnp.maximum(kinds, 1))
    return -log_sigmoid(jnp.where(logps.label, 1.0, -1.0) * (reward - shift))


def apo_zero_unpaired(logps: RowLogps, *, beta: float) -> jax.Array:
    """Good: 1 - sigmoid(beta x); bad: sigmoid(beta x): anchored PO on rows (arXiv 2408.06266, equation 7). kto with kl = 0."""
    return sigmoid(-beta * jnp.where(logps.label, 1.0, -1.0) * (logps.policy - logps.reference))


def batch_kl(policy: jax.Array, reference: jax.Array, lengths: jax.Array) -> jax.Array:
    """max(0, mean of log pi/ref over mismatched completions [b] that are not empty): kto's kl [], without gradient."""
    return jax.lax.stop_gradient(jnp.maximum(mean_of(policy - reference, lengths > 0).value(), 0.0))


def row_loss(model: Model, fn: Callable[..., jax.Array], *, beta: float, chunk: int | None = None, **hyper: float) -> LossFn:
    """A LossFn from a sibling of this file: mean over rows of fn(logps, beta=beta, **hyper).

    Batch: {completion, mismatched: sequence records; label bool [b]; ref_logps, ref_mismatched_logps [b]}, where mismatched is
    each prompt with another prompt's completion. Metrics have TRL's names, chosen for the good rows and rejected for the bad.
    """

    def loss_fn(params: Params, batch: Batch, rng: Key) -> tuple[Mean, dict[str, Mean]]:
        policy, label = params["policy"], batch["label"]
        other = sequence_logps(model, jax.lax.stop_gradient(policy), batch["mismatched"], chunk)
        kl = batch_kl(other, batch["ref_mismatched_logps"], batch["mismatched"]["mask"].sum(axis=1))
        logps = RowLogps(sequence_logps(model, policy, batch["completion"], chunk), batch["ref_logps"], label, kl)
        mean = mean_of(fn(logps, beta=beta, **hyper))
        rewards = beta * (logps.policy - logps.reference)
        good, bad = mean_of(rewards, label), mean_of(rewards, ~label)
        both = ((good.count > 0) & (bad.count > 0)).astype(jnp.float32)
        return mean, {
            "loss": mean,
            "rewards/chosen": good,
            "rewards/rejected": bad,
            "rewards/margins": Mean((good.value() - bad.value()) * both, both),
            "logps/chosen": mean_of(logps.policy, label),
            "logps/rejected": mean_of(logps.policy, ~label),
            "kl": Mean(kl, jnp.float32(1)),
            "rows/empty": mean_of(~batch["completion"]["mask"].any(axis=1)),
        }

    return loss_fn
