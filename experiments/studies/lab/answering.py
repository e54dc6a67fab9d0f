"""Reinforcement learning on answers in the world of facts, with texts read again meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.studies.lab import facts
from jaxllm.core import ops
from jaxllm.core.types import Batch, Key, Model, Params, TrainState, mean_of
from jaxllm.losses import policy
from jaxllm.train.step import make_train_step


def policy_step(
    model: Model, ask: Callable, advantages: Callable, tx: Any, *, batch: int, texts_batch: int = 0, epochs: int = 2, clip=0.2
) -> Callable:
    """A step of online RL, its loss as in `lab.policy_step`: ask(data, key, n) -> (prompts, lengths, context), sample,
    advantages(data, hyper, record, context, key) -> (advantages [n], {name: scalar}), `epochs` clipped updates.

    texts_batch rows of texts are rehearsed beside them (PPO-ptx, arXiv 2203.02155), at the weight hyper["rehearse"].
    """

    def loss_fn(params: Params, record: Batch, rng: Key):
        logps = jnp.where(record["mask"], ops.model_logps(model, params["policy"], record).logp, 0.0)
        losses = policy.ppo_policy(logps, record["logps"], record["advantages"], clip=clip)
        return mean_of(jnp.where(record["weights"] > 0, -record["weights"] * logps, losses), record["mask"]), {}

    def step(state: TrainState, data: Any, hyper: Any, key: Key):
        keys, world = jax.random.split(key, 4), data["ground"].world
        asked, lengths, context = ask(data, keys[0], batch)
        record = facts.sample(model, world, state.params["policy"], asked, lengths, keys[1])
        gain, metrics = advantages(data, hyper, record, context, keys[2])
        record["advantages"] = jnp.where(record["mask"], gain[:, None], 0.0)
        record["weights"] = jnp.zeros_like(record["advantages"])
        if texts_batch:
            read = facts.texts(world, keys[3], texts_batch, asked=0.0)
            nothing = jnp.zeros(read["mask"].shape)
            read |= {"logps": nothing, "advantages": nothing, "weights": nothing + hyper["rehearse"]}
            record = facts.joined(record, read)
        update = make_train_step(loss_fn, tx)
        return jax.lax.scan(lambda s, _: (update(s, {}, record, key)[0], None), state, length=epochs)[0], metrics

    return step


def divergence(model: Model, g: facts.Ground, record: Batch) -> jax.Array:
    """log pi - log reference of sampled answers, summed over tokens: [n]."""
    reference = ops.model_logps(model, g.reference, record).logp
    return jnp.sum(jnp.where(record["mask"], record["logps"] - reference, 0.0), axis=1)


def whitened(x: jax.Array) -> jax.Array:
    """x [n] less its mean, over its standard deviation."""
    return (x - x.mean()) / (x.std() + 1e-6)
