"""Next-token prediction: pretraining and supervised fine-tuning differ only in the mask of the batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core import ops
from jaxllm.core.types import Batch, Key, LossFn, Mean, Model, Params


def loss(
    model: Model, *, root: str = "policy", chunk: int | None = None, router: Mapping[str, float] | None = None, mtp: float = 0.0
) -> LossFn:
    """L = -sum_t m_t log p(y_t | x_<=t) / sum_t m_t over a sequence record's tokens, targets, segments and mask.

    For pretraining every target is in the mask; for supervised fine-tuning (InstructGPT's first step, arXiv 2203.02155)
    only the assistant's tokens and its end token. Metrics: loss, mean_token_accuracy.

    router: weights of a mixture of experts' losses (load_balance, router_z, bias_step), averaged over its layers; they depend
    on the whole micro-batch, so accumulation and packing change them. mtp: weight of multi-token prediction
    (DeepSeek-V3, arXiv 2412.19437): the mean over depths of the cross-entropy further ahead.
    """
    options = {"taps": ("mtp",)} if mtp else {}

    def loss_fn(params: Params, batch: Batch, rng: Key) -> tuple[Mean, dict[str, Mean]]:
        out = ops.forward(model, params[root], batch, rng=rng, **options)
        head = model.head(params[root])
        total, correct = ops.cross_entropy(head, out.hidden, batch["targets"], batch["mask"], chunk)
        count = batch["mask"].sum().astype("float32")
        metrics = {"loss": Mean(total, count), "mean_token_accuracy": Mean(correct, count)}
        if mtp:
            ahead = _ahead(head, out.aux["mtp"], batch, chunk)
            # the weights of all terms are per trained token of the first, so that one denominator serves them
            total = total + mtp * ahead.value() * count
            metrics["mtp_loss"] = ahead
        if "router" in out.aux:
            added, more = _router(out.aux["router"], router or {}, count)
            total, metrics = total + added, metrics | more
        return Mean(total, count), metrics

    return loss_fn


def _ahead(head: Any, hidden: jax.Array, batch: Batch, chunk: int | None) -> Mean:
    """Cross-entropy of hidden [m, b, l, d], number k = 1.. predicting targets k places on in the same segment."""
    mean = Mean(jnp.float32(0), jnp.float32(0))
    for k in range(1, hidden.shape[0] + 1):
        later = {n: jnp.pad(batch[n][:, k:], ((0, 0), (0, k))) for n in ("targets", "segments", "mask")}
        mask = later["mask"] & (later["segments"] == batch["segments"])
        total, _ = ops.cross_entropy(head, hidden[k - 1], later["targets"], mask, chunk)
        mean = mean + Mean(total, mask.sum().astype(jnp.float32))
    return mean


def _router(aux: Mapping[str, jax.Array], weights: Mapping[str, float], count: jax.Array) -> tuple[jax.Array, dict[str, Mean]]:
    """What the routers add to the total, and their metrics; aux has a leading axis of layers."""
    added = sum((weight * aux[name].mean() for name, weight in weights.items()), jnp.float32(0)) * count
    load = aux["load"]
    named = {
        "load_balance_loss": aux["load_balance"].mean(), "router_z_loss": aux["router_z"].mean(), "drops": aux["drops"].mean(),
        "router_entropy": aux["router_entropy"].mean(),
        # of the busiest expert, over an even share; the mean over layers
        "load_max": (load.max(axis=-1) * load.shape[-1]).mean(), "load_min": (load.min(axis=-1) * load.shape[-1]).mean(),
    }  # fmt: skip
    return added, {f"moe/{name}": Mean(jax.lax.stop_gradient(value) * count, count) for name, value in named.items()}
