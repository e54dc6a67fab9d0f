"""Losses on pairs that need the log-probability of each token: builders, which return LossFns as `builders.loss` does."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.core import ops
from jaxllm.core.types import Batch, Key, LossFn, Mean, Model, Params
from jaxllm.losses.preference.builders import (
    SIDES,
    PairLoss,
    chosen_nll,
    identical,
    joined,
    lengths,
    side_logps,
    sums,
    with_metrics,
)
from jaxllm.losses.preference.free import log1mexp
from jaxllm.losses.preference.pairs import PairLogps, dpo


def shared_weights(chosen: jax.Array, rejected: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
    """LD-DPO's token weights from the masks [b, l] of the two sides: 1 up to the shorter length, alpha beyond, 0 outside."""
    shared = jnp.minimum(chosen.sum(axis=1), rejected.sum(axis=1))[:, None]
    return tuple(jnp.where(jnp.cumsum(mask, axis=1) <= shared, 1.0, alpha) * mask for mask in (chosen, rejected))


def ld_dpo(model: Model, *, beta: float, alpha: float, nll_weight: float = 0.0, chunk: int | None = None) -> LossFn:
    """dpo on sums in which the longer side's tokens beyond the shorter's length weigh alpha (arXiv 2409.06411, equation 11).

    Batch: that of `loss`, but with the reference's log-probabilities per token, ref_chosen_logps and ref_rejected_logps
    [b, l] (`token_logps`). Limits: alpha = 1 is dpo; alpha = 0 leaves the longer side's tail out. Metrics are of these sums.
    """

    def loss_fn(params: Params, batch: Batch, rng: Key) -> tuple[Mean, dict[str, Mean]]:
        weights = shared_weights(*(batch[side]["mask"] for side in SIDES), alpha)
        tokens = side_logps(model, params["policy"], batch, chunk)
        references = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
        weighted = [sums(batch, tuple(x * w for x, w in zip(pair, weights, strict=True))) for pair in (tokens, references)]
        logps = PairLogps(*weighted[0], *weighted[1], *lengths(batch))
        nll = chosen_nll(batch, tokens[0])
        return with_metrics(batch, logps, dpo(logps, beta=beta) + nll_weight * nll, nll, beta)

    return loss_fn


def wpo(model: Model, fn: PairLoss, *, beta: float, nll_weight: float = 0.0, chunk: int | None = None, **hyper: float) -> LossFn:
    """fn's loss times w(y_w) w(y_l), w(y) = exp(mean over tokens of log pi(y_t) - log sum_v pi(v)^2) (arXiv 2406.11827).

    The weights (equation 2, weight alignment) carry no gradient: pairs as the policy itself would sample them count more.
    They take a second product with the head, in the forward pass. Limits: a policy sure of all its tokens has w = 1.
    """

    def loss_fn(params: Params, batch: Batch, rng: Key) -> tuple[Mean, dict[str, Mean]]:
        both, policy = joined(batch), params["policy"]
        hidden = ops.forward(model, policy, both).hidden
        plain = ops.token_logp(model.head(policy), hidden, both["targets"], chunk)
        frozen = jax.lax.stop_gradient((model.head(policy), hidden))
        # log sum_v pi(v)^2 = lse(2 logits) - 2 lse(logits)
        collision = ops.token_logp(*frozen, both["targets"], chunk, temperature=0.5).lse - 2 * plain.lse
        same = jnp.concatenate([identical(batch)] * 2)[:, None]
        logp = jnp.where(same, jax.lax.stop_gradient(plain.logp), plain.logp)
        tokens, aligned = jnp.split(logp, 2), jnp.split(jax.lax.stop_gradient(plain.logp - collision), 2)
        references = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
        logps = PairLogps(*sums(batch, tokens), *references, *lengths(batch))
        means = [x / jnp.maximum(n, 1) for x, n in zip(sums(batch, aligned), lengths(batch), strict=True)]
        nll = chosen_nll(batch, tokens[0])
        losses = fn(logps, beta=beta, **hyper) * jnp.exp(means[0] + means[1])
        return with_metrics(batch, logps, losses + nll_weight * nll, nll, beta)

    return loss_fn


def token_unlikelihood(model: Model, *, alpha: float, beta: float = 0.0, chunk: int | None = None) -> LossFn:
    """NLL of the chosen + alpha mean over the rejected tokens of -log(1 - p): token unlikelihood (arXiv 1908.04319, equation 4).

    beta only scales the metrics rewards/*. Limits: alpha = 0 is preferred_ft; token probabilities above 1 - 1e-6 count as that.
    """

    def loss_fn(params: Params, batch: Batch, rng: Key) -> tuple[Mean, dict[str, Mean]]:
        tokens = side_logps(model, params["policy"], batch, chunk)
        logps = PairLogps(*sums(batch, tokens), batch["ref_chosen_logps"], batch["ref_rejected_logps"], *lengths(batch))
        unlikely = -sums(batch, (tokens[0], log1mexp(tokens[1])))[1] / jnp.maximum(logps.rejected_length, 1)
        nll = chosen_nll(batch, tokens[0])
        return with_metrics(batch, logps, nll + alpha * unlikely, nll, beta)

    return loss_fn
