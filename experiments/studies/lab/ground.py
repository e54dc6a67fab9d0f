"""What a seed stands on: its world, the reference policy, its strings and their worth."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from experiments.studies.lab.models import Lab, fresh, optimizer, train
from jaxllm.core.ops import model_logps
from jaxllm.core.types import Batch, Key, Params
from jaxllm.generate import decode
from jaxllm.losses import lm
from jaxllm.worlds import pref


@struct.dataclass
class Ground:
    """What a seed stands on: its world, the reference policy, and mean and s.d. of gold over the reference's strings."""

    world: pref.World
    reference: Params
    mean: jax.Array
    std: jax.Array


def pretrain(lab: Lab, world: pref.World, key: Key, *, steps: int = 300, batch: int = 128, lr: float = 2e-3) -> Params:
    """A policy trained on the world's source by next-token prediction."""

    def batch_of(k: Key) -> Batch:
        a, b = jax.random.split(k)
        return pref.to_record(world, pref.prompts(world, a, batch), *pref.strings(world, b, batch))

    first, second = jax.random.split(key)
    params = {"policy": fresh(lab.model, first)}
    return train(lm.loss(lab.model), optimizer(lr, steps), params, batch_of, second, steps)["policy"]


def sample(lab: Lab, world: pref.World, params: Params, key: Key, n: int, begun: jax.Array | None = None) -> Batch:
    """A sequence record of n sampled strings with `logps` [n, l]; begun: prompts to continue, or fresh ones."""
    first, second = jax.random.split(key)
    begun = pref.prompts(world, first, n) if begun is None else begun
    lengths = jnp.full((n,), begun.shape[1], jnp.int32)
    stop = (world.end,) if world.stop else ()
    s = decode.generate(lab.model, params, begun, lengths, second, max_new_tokens=world.length + bool(stop), stop=stop)
    record = decode.to_record(s)
    # an end token as the only way to stop: without one, position `length` of the record is never used
    return {k: v[:, : world.prompt + world.length + bool(stop)] for k, v in record.items() if k != "model_logps"}


def ground(lab: Lab, key: Key, *, steps: int = 300, n: int = 2048, **world: Any) -> Ground:
    """A seed's world, reference policy and scale of gold. world: settings of `pref.make`."""
    keys = jax.random.split(key, 3)
    made = pref.make(keys[0], **world)
    reference = pretrain(lab, made, keys[1], steps=steps)
    worth = pref.gold(made, sample(lab, made, reference, keys[2], n))
    return Ground(made, reference, worth.mean(), worth.std())


def gold(g: Ground, record: Batch) -> jax.Array:
    """The true reward in standard deviations of the reference's strings: [n]."""
    return (pref.gold(g.world, record) - g.mean) / g.std


def kl(lab: Lab, reference: Params, record: Batch) -> jax.Array:
    """log pi - log reference of sampled strings, summed over tokens: [n]; its mean estimates KL(pi, reference) in nats."""
    return jnp.sum(jnp.where(record["mask"], record["logps"] - model_logps(lab.model, reference, record).logp, 0.0), axis=1)
