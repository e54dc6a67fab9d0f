"""Losses of a model from the array-level parts: PPO with a value head, group methods without one, and PPO-ptx around either."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core import ops
from jaxllm.core.types import Batch, Key, LossFn, Mean, Model, Params, mean_of
from jaxllm.losses.policy.kl import Estimator, check_loss
from jaxllm.losses.policy.ratio import _ratio, ppo_policy, ppo_value

FLOOR = -1e4  # the square of a difference of log-probs must not overflow
TokenLoss = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
Transform = Callable[[jax.Array], jax.Array]


def loss(
    model: Model, scalars: Callable[[Params, Batch], jax.Array], *, clip: float, value_clip: float, value_coef: float,
    token_loss: TokenLoss | None = None, temperature: float = 1.0, transform: Transform | None = None, chunk: int | None = None,
) -> LossFn:  # fmt: skip
    """token_loss (ppo_policy unless given) + value_coef * ppo_value, averaged over sampled tokens.

    batch: a sequence record with logps_old, values_old, advantages, returns [b, l]; params has the roots `policy` and
    `value`; scalars(params, record) -> [b, l] is the value head. logps_old and this use the same temperature and the same
    transform of the logits.
    """
    token_loss = token_loss or partial(ppo_policy, clip=clip)

    def loss_fn(params: Params, batch: Batch, rng: Key) -> tuple[Mean, dict[str, Mean]]:
        mask = batch["mask"]
        logps, old, out = _logps(model, params, batch, chunk, temperature, transform)
        values = scalars(params["value"], batch)
        policy = token_loss(logps, old, batch["advantages"], mask)
        value = ppo_value(values, batch["values_old"], batch["returns"], clip=value_clip)
        mean = mean_of(policy + value_coef * value, mask)
        return mean, {"loss": mean, **_metrics(logps, old, values, policy, value, batch, out.entropy, clip, value_clip)}

    return loss_fn


def _logps(model: Model, params: Params, batch: Batch, chunk: Any, temperature: Any, transform: Any) -> Any:
    """(log pi, log pi_old, TokenLogp) [b, l]; both 0 outside the mask, so that no exponential there can overflow."""
    mask = batch["mask"]
    out = ops.model_logps(model, params["policy"], batch, chunk, temperature, transform)
    return _floored(out.logp, mask), _floored(batch["logps_old"], mask), out


def _floored(logps: jax.Array, mask: jax.Array) -> jax.Array:
    """0 outside the mask; a token that the transform has left no probability stays finite and has no gradient."""
    return jnp.where(mask, jnp.maximum(logps, FLOOR), 0.0)


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


def group_loss(
    model: Model, token_loss: TokenLoss, *, kl: Estimator | None = None, kl_coef: float = 0.0, temperature: float = 1.0,
    transform: Transform | None = None, chunk: int | None = None,
) -> LossFn:  # fmt: skip
    """sum of weights * (importance * token_loss + kl_coef * kl) over tokens, divided by the number of rows.

    batch: a sequence record with logps_old and weights [b, l] (see `normalise`) and advantages [b] or [b, l]; with kl (k2 or
    k3; UserError on k1) also ref_logps [b, l]; importance [b, l] where the sampler was not the trainer. params has the root
    `policy`. logps_old and ref_logps use the same temperature and transform as this. A mask that is False everywhere gives
    loss 0, gradient 0 and finite metrics; `completions/empty` counts rows without a trained token.
    """
    check_loss(kl)

    def loss_fn(params: Params, batch: Batch, rng: Key) -> tuple[Mean, dict[str, Mean]]:
        mask = batch["mask"]
        logps, old, out = _logps(model, params, batch, chunk, temperature, transform)
        advantages = batch["advantages"]
        advantages = advantages[:, None] if advantages.ndim == 1 else advantages
        advantages = jnp.where(mask, advantages, 0.0)
        tokens = token_loss(logps, old, advantages, mask)
        metrics = _group_metrics(token_loss, logps, old, advantages, mask, out.entropy)
        if "importance" in batch:
            tokens = tokens * jnp.where(mask, batch["importance"], 0.0)
            metrics["sampling/importance_sampling_ratio/mean"] = mean_of(batch["importance"], mask)
        if kl is not None:
            divergence = kl(logps, _floored(batch["ref_logps"], mask))
            metrics["kl"] = mean_of(divergence, mask)
            tokens = tokens + kl_coef * divergence
        # the weights carry the denominator; a row counts whether it has tokens or not
        total = jnp.sum(jnp.where(mask, tokens, 0.0) * jnp.where(mask, batch["weights"], 0.0))
        mean = Mean(total, jnp.float32(mask.shape[0]))
        return mean, {"loss": mean, **metrics}

    return loss_fn


def _group_metrics(token_loss: TokenLoss, logps: Any, old: Any, advantages: Any, mask: Any, entropy: Any) -> dict[str, Mean]:
    """TRL's names. A token is clipped when its advantage has no effect on the gradient; low, high: rho is below, above 1."""
    logps, old, advantages = jax.lax.stop_gradient((logps, old, advantages))
    slope = jax.grad(lambda x: token_loss(x, old, advantages, mask).sum())(logps)
    dead = (slope == 0) & (advantages != 0)
    return {
        "entropy": mean_of(jax.lax.stop_gradient(entropy), mask),
        "clip_ratio/low_mean": mean_of(dead & (logps < old), mask),
        "clip_ratio/high_mean": mean_of(dead & (logps > old), mask),
        "clip_ratio/region_mean": mean_of(dead, mask),
        "policy/approxkl_avg": mean_of(0.5 * (logps - old) ** 2, mask),
        "val/ratio": mean_of(_ratio(logps, old), mask),
        "completions/empty": mean_of(~mask.any(axis=1)),
    }


def with_ptx(loss_fn: LossFn, model: Model, *, ptx_coef: float, chunk: int | None = None) -> LossFn:
    """loss_fn - ptx_coef * E log pi of pretraining text (PPO-ptx, arXiv 2203.02155, equation 2), under loss_fn's denominator.

    batch["ptx"]: a sequence record of as many rows with `weights` [b, l] that sum over the whole batch to the denominator of
    loss_fn: normalise.spread(ptx mask, sampled tokens) beside `loss`, normalise.token_mean(ptx mask) beside `group_loss`.
    """

    def both(params: Params, batch: Batch, rng: Key) -> tuple[Mean, dict[str, Mean]]:
        mean, metrics = loss_fn(params, {k: v for k, v in batch.items() if k != "ptx"}, rng)
        text = batch["ptx"]
        hidden = ops.forward(model, params["policy"], text).hidden
        nll, _ = ops.cross_entropy(model.head(params["policy"]), hidden, text["targets"], text["weights"], chunk)
        mean = Mean(mean.total + ptx_coef * nll, mean.count)
        return mean, {**metrics, "loss": mean, "loss/ptx_avg": Mean(nll, text["weights"].sum())}

    return both
