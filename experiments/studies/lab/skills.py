"""Two skills of one policy: strings of the source, and copying."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from experiments.studies.lab.models import Lab
from jaxllm.core import ops
from jaxllm.core.types import Batch, Key, Params
from jaxllm.worlds import pref


def copies(world: pref.World, key: Key, n: int) -> Batch:
    """n records of the second skill: the marker (the unused end token), a pattern, and the pattern until the string is full."""
    size = world.length // 4
    pattern = jax.random.randint(key, (n, size), 0, world.vocab)
    words = jnp.tile(pattern, (1, -(-world.length // size)))[:, : world.length]
    record = pref.to_record(world, jnp.full((n, 1), world.end, jnp.int32), words, jnp.full((n,), world.length))
    return record | {"mask": record["mask"] & (jnp.arange(world.length) >= size)[None, :]}


def strings(world: pref.World, key: Key, n: int) -> Batch:
    """n records of the first skill: strings of the source."""
    return pref.to_record(world, pref.prompts(world, key, n), *pref.strings(world, key, n))


def text(world: pref.World, key: Key, n: int) -> Batch:
    """n records of pretraining text: half strings of the source, half copies."""
    a, b = jax.random.split(key)
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), strings(world, a, n // 2), copies(world, b, n - n // 2))


def skills(lab: Lab, params: Params, fresh: dict[str, Batch]) -> dict[str, jax.Array]:
    """Nats a token on both kinds of text, and the share of patterns that are copied without a fault (greedily)."""
    found = {}
    for name, record in fresh.items():
        nll = -ops.model_logps(lab.model, params, record).logp
        found[f"nll/{name}"] = jnp.mean(nll, where=record["mask"])
    record = fresh["copies"]
    logits = ops.logits(lab.model.head(params), ops.forward(lab.model, params, record).hidden)
    right = jnp.where(record["mask"], logits.argmax(axis=-1) == record["targets"], True)
    return found | {"copied": right.all(axis=1).mean(), "copied/words": jnp.mean(right, where=record["mask"])}
