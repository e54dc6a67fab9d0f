"""Losses on pairs of completions: siblings with one first argument, and the builder that turns one into a LossFn.

Every function here maps sequence log-probabilities [b] to losses [b]. With h = (chosen - ref_chosen) - (rejected - ref_rejected),
DPO's implicit reward margin is beta * h.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.nn import log_sigmoid

from jaxllm.core import ops
from jaxllm.core.types import Batch, Key, LossFn, Mean, Model, Params, mean_of


@struct.dataclass
class PairLogps:
    """Summed log-probabilities of completions under policy and reference, and completion lengths in tokens: all [b]."""

    chosen: jax.Array
    rejected: jax.Array
    ref_chosen: jax.Array
    ref_rejected: jax.Array
    chosen_length: jax.Array
    rejected_length: jax.Array


def log_ratio_margin(logps: PairLogps) -> jax.Array:
    """h = log pi(y_w)/ref(y_w) - log pi(y_l)/ref(y_l), [b]."""
    return (logps.chosen - logps.ref_chosen) - (logps.rejected - logps.ref_rejected)


def dpo(logps: PairLogps, *, beta: float) -> jax.Array:
    """-log sigmoid(beta h): direct preference optimisation (arXiv 2305.18290, equation 7).

    Limits: beta -> 0 gives log 2 and no gradient; the gradient with respect to h is -beta sigmoid(-beta h).
    """
    return -log_sigmoid(beta * log_ratio_margin(logps))


def cdpo(logps: PairLogps, *, beta: float, label_smoothing: float) -> jax.Array:
    """(1 - e) dpo + e dpo of the swapped pair: conservative DPO for labels flipped with probability e (Mitchell, 2023).

    Limits: e = 0 is dpo; e = 1/2 is symmetric in the pair; for 0 < e < 1/2 the minimum lies at beta h = log((1 - e) / e).
    """
    margin = beta * log_ratio_margin(logps)
    return -(1 - label_smoothing) * log_sigmoid(margin) - label_smoothing * log_sigmoid(-margin)


def reference_free(logps: PairLogps, *, beta: float) -> jax.Array:
    """dpo with a uniform reference: -log sigmoid(beta (log pi(y_w) - log pi(y_l))) (arXiv 2305.18290, its ablation)."""
    return -log_sigmoid(beta * (logps.chosen - logps.rejected))


def sequence_logps(model: Model, params: Params, record: Batch, chunk: int | None = None) -> jax.Array:
    """Sum of log p(target) over the mask of a sequence record: [b]."""
    logp = ops.model_logps(model, params, record, chunk).logp
    return jnp.sum(jnp.where(record["mask"], logp, 0.0), axis=1)


def pair_logps(model: Model, params: Params, batch: Batch, chunk: int | None = None) -> PairLogps:
    """PairLogps of a batch {chosen, rejected: sequence records; ref_chosen_logps, ref_rejected_logps [b]}.

    Both sides go through the model as one batch of 2b rows.
    """
    sides = batch["chosen"], batch["rejected"]
    both = jax.tree.map(lambda c, r: jnp.concatenate([c, r]), *sides)
    chosen, rejected = jnp.split(sequence_logps(model, params, both, chunk), 2)
    lengths = [side["mask"].sum(axis=1).astype(jnp.float32) for side in sides]
    return PairLogps(chosen, rejected, batch["ref_chosen_logps"], batch["ref_rejected_logps"], *lengths)


def loss(
    model: Model, fn: Callable[..., jax.Array], *, beta: float, nll_weight: float = 0.0, chunk: int | None = None, **hyper: float
) -> LossFn:
    """A LossFn from a sibling: mean over pairs of fn(logps, beta=beta, **hyper) + nll_weight * NLL of the chosen per token.

    The NLL term (RPO, arXiv 2404.19733) keeps the chosen completion likely; each pair weighs 1 whatever its length.
    Metrics have TRL's names: rewards/* are beta * (log pi - log ref).
    """

    def loss_fn(params: Params, batch: Batch, rng: Key) -> tuple[Mean, dict[str, Mean]]:
        logps = pair_logps(model, params["policy"], batch, chunk)
        nll = -logps.chosen / jnp.maximum(logps.chosen_length, 1.0)
        losses = fn(logps, beta=beta, **hyper)
        mean = mean_of(losses + nll_weight * nll)
        chosen = beta * (logps.chosen - logps.ref_chosen)
        rejected = beta * (logps.rejected - logps.ref_rejected)
        return mean, {
            "loss": mean,
            "rewards/chosen": mean_of(chosen),
            "rewards/rejected": mean_of(rejected),
            "rewards/margins": mean_of(chosen - rejected),
            "rewards/accuracies": mean_of(chosen > rejected),
            "logps/chosen": mean_of(logps.chosen),
            "logps/rejected": mean_of(logps.rejected),
            "nll_loss": mean_of(nll),
        }

    return loss_fn
