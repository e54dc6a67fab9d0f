"""Mixture of experts: a router chooses top_k of n_experts feed-forward networks for every token."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.core.spec import Spec, SpecTree
from jaxllm.core.types import UserError
from jaxllm.models import ffn, moe_parallel
from jaxllm.models.layers import normal, zeros


@dataclass(frozen=True)
class MoEConfig:
    """How tokens find experts, and how wide those are."""

    n_experts: int
    top_k: int
    d_ff: int  # of one expert
    n_shared: int = 0  # experts that every token passes, as one network of n_shared * d_ff
    scoring: str = "softmax"  # softmax | sigmoid
    normalise: bool = True  # the chosen experts' weights sum to 1 (before `scale`)
    scale: float = 1.0  # routed scaling factor
    n_groups: int = 1
    topk_groups: int = 1  # experts are chosen inside the best topk_groups of n_groups
    group_score: str = "max"  # max (DeepSeek-V2) | top2: sum of the best two (DeepSeek-V3)
    bias: bool = False  # a correction that enters the choice, not the weight (arXiv 2408.15664)
    capacity_factor: float | None = None  # None: dropless; else ceil(factor * tokens * top_k / n_experts) slots per expert


class Routing(NamedTuple):
    """experts int [t, k], weights [t, k], probabilities [t, e] (each sums to 1) and logits [t, e], all float32."""

    experts: jax.Array
    weights: jax.Array
    probabilities: jax.Array
    logits: jax.Array


def validate(c: MoEConfig) -> None:
    """Raises UserError on the first thing that cannot be built."""
    for name, allowed in (("scoring", ("softmax", "sigmoid")), ("group_score", ("max", "top2"))):
        if (value := getattr(c, name)) not in allowed:
            raise UserError(f"model.moe.{name}={value!r}: choose one of {', '.join(allowed)}")
    for name in ("n_experts", "top_k", "d_ff", "n_groups", "topk_groups"):
        if getattr(c, name) < 1:
            raise UserError(f"model.moe.{name}={getattr(c, name)}: must be at least 1")
    if c.n_experts % c.n_groups:
        raise UserError(f"model.moe.n_groups={c.n_groups} does not divide model.moe.n_experts={c.n_experts}")
    if c.topk_groups > c.n_groups:
        raise UserError(f"model.moe.topk_groups={c.topk_groups} is more than model.moe.n_groups={c.n_groups}")
    reach = c.n_experts // c.n_groups * c.topk_groups
    if c.top_k > reach:
        raise UserError(f"model.moe.top_k={c.top_k} is more than the {reach} experts that a token can choose from: lower it")
    if c.group_score == "top2" and c.n_groups > 1 and c.n_experts // c.n_groups < 2:
        raise UserError(f"model.moe.group_score='top2' needs 2 experts in a group: lower model.moe.n_groups={c.n_groups}")
    if c.capacity_factor is not None and c.capacity_factor <= 0:
        raise UserError(f"model.moe.capacity_factor={c.capacity_factor}: use a positive number, or None to drop nothing")


def specs(c: MoEConfig, kind: str, d: int, residual_scale: float) -> SpecTree:
    """Router, experts (stacked on a leading axis) and the shared experts."""
    e, f = c.n_experts, c.d_ff
    names = ("gate", "up") if ffn.KINDS[kind][1] else ("up",)
    experts = {n: {"kernel": Spec((e, d, f), ("experts", "embed", "mlp"), normal(d))} for n in names}
    experts["down"] = {"kernel": Spec((e, f, d), ("experts", "mlp", "embed"), normal(f, residual_scale))}
    tree: dict[str, Any] = {"router": {"kernel": Spec((d, e), ("embed", None), normal(d))}, "experts": experts}
    if c.bias:
        tree["router"]["bias"] = Spec((e,), (None,), zeros)
    if c.n_shared:
        tree["shared"] = ffn.specs(kind, d, c.n_shared * f, False, residual_scale)
    return tree


def capacity(c: MoEConfig, tokens: int) -> int | None:
    """Slots per expert for `tokens` tokens (arXiv 2101.03961, equation 3); None when nothing is dropped."""
    if c.capacity_factor is None:
        return None
    return min(tokens, math.ceil(round(c.capacity_factor * tokens * c.top_k / c.n_experts, 6)))


def route(c: MoEConfig, params: Any, x: jax.Array) -> Routing:
    """Experts and weights for x [t, d], computed in float32.

    Mixtral (arXiv 2401.04088): softmax, the top k, renormalised. DeepSeek-V2 (2405.04434): inside the groups with the best
    expert. DeepSeek-V3 (2412.19437): sigmoid scores plus a bias choose, the scores alone weigh.
    """
    logits = jnp.einsum("td,de->te", x.astype(jnp.float32), params["kernel"].astype(jnp.float32))
    if c.scoring == "sigmoid":
        scores = jax.nn.sigmoid(logits)
        probabilities = scores / (scores.sum(axis=-1, keepdims=True) + 1e-20)
    else:
        scores = probabilities = jax.nn.softmax(logits, axis=-1)
    choice = jax.lax.stop_gradient(scores)
    if "bias" in params:
        choice = choice + jax.lax.stop_gradient(params["bias"].astype(jnp.float32))[None, :]
    _, experts = jax.lax.top_k(_in_groups(c, choice), c.top_k)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if c.normalise:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return Routing(experts, weights * c.scale, probabilities, logits)


def _in_groups(c: MoEConfig, choice: jax.Array) -> jax.Array:
    """choice [t, e] with -inf outside the best topk_groups groups."""
    if c.n_groups == 1:
        return choice
    grouped = choice.reshape(-1, c.n_groups, c.n_experts // c.n_groups)
    best = grouped.max(axis=-1) if c.group_score == "max" else jax.lax.top_k(grouped, 2)[0].sum(axis=-1)
    chosen = jax.nn.one_hot(jax.lax.top_k(best, c.topk_groups)[1], c.n_groups, dtype=bool).any(axis=1)
    return jnp.where(chosen[:, :, None], grouped, -jnp.inf).reshape(choice.shape)


def apply(params: Any, c: MoEConfig, kind: str, x: jax.Array, used: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """x [b, l, d], used bool [b, l] (padding takes no expert and is not counted) -> (y [b, l, d], aux).

    aux, over the used tokens: load_balance and router_z (losses), load [e] and drops (shares of slots), router_entropy (mean,
    nats), bias_step (value 0). Balance and capacity are statistics of the batch at hand: they are exempt from the equality of
    accumulated and whole batches, and on a mesh a capacity holds for the tokens of each device.
    """
    local = functools.partial(_local, c, kind)
    y, sums = moe_parallel.run(local, params, x, used, c.n_experts)
    if "shared" in params:
        y = y + ffn.apply(params["shared"], x, kind)
    return y, _aux(c, params["router"], sums)


def _local(c: MoEConfig, kind: str, params: Any, x: jax.Array, used: jax.Array, experts: Any):
    """One device's tokens x [t, d], used [t] -> (y [t, d], sums over its used tokens). experts: see `moe_parallel.run`."""
    routing = route(c, params["router"], x)
    slots = jnp.where(used[:, None], routing.experts, c.n_experts).reshape(-1)
    y, kept = experts(params["experts"], kind, x, slots, n=c.n_experts, k=c.top_k, capacity=capacity(c, x.shape[0]))
    y = y.reshape(*routing.weights.shape, -1)
    y = jnp.einsum("tkd,tk->td", y, routing.weights.astype(y.dtype))
    mask = used.astype(jnp.float32)
    entropy = -jax.scipy.special.xlogy(routing.probabilities, routing.probabilities).sum(axis=-1)
    sums = {
        "tokens": mask.sum(),
        "counts": jnp.bincount(slots, length=c.n_experts).astype(jnp.float32),
        "kept": kept.sum().astype(jnp.float32),
        "probabilities": jnp.einsum("te,t->e", routing.probabilities, mask),
        "z": jnp.sum(mask * jax.nn.logsumexp(routing.logits, axis=-1) ** 2),
        "entropy": jnp.sum(mask * jax.lax.stop_gradient(entropy)),
    }
    return y, sums


def _aux(c: MoEConfig, router: Any, sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The losses and the statistics, from sums over all used tokens."""
    tokens = jnp.maximum(sums["tokens"], 1.0)
    slots = tokens * c.top_k
    load = sums["counts"] / slots
    aux = {
        # e * sum_i f_i P_i, arXiv 2101.03961, equations 4 to 6; 1 when balanced, for any top_k
        "load_balance": c.n_experts * jnp.sum(load * sums["probabilities"] / tokens),
        "router_z": sums["z"] / tokens,  # mean of logsumexp(logits)^2, arXiv 2202.08906, equation 5
        "load": load,
        "drops": (sums["counts"].sum() - sums["kept"]) / slots,
        "router_entropy": sums["entropy"] / tokens,
        "bias_step": jnp.float32(0),
    }
    if "bias" in router:
        # arXiv 2408.15664, algorithm 1: the value is 0, the gradient is the sign of an expert's surplus
        bias = router["bias"].astype(jnp.float32)
        surplus = jnp.sign(sums["counts"] * c.n_experts - sums["counts"].sum())
        aux["bias_step"] = jnp.sum(surplus * (bias - jax.lax.stop_gradient(bias)))
    return aux
