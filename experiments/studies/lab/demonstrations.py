"""Demonstrators of varying care, reward models on true and on shuffled labels, and policies tuned on demonstrations."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from experiments.studies.lab.ground import Ground, gold, kl, sample
from experiments.studies.lab.models import Lab, fresh, optimizer, rows, train
from experiments.studies.lab.preferences import Judge, compare, raw_score, train_judge
from jaxllm.core.types import Batch, Key, Params
from jaxllm.losses import lm
from jaxllm.worlds import pref

CHUNKS = 8  # of strings that are judged at a time


def strings(world: pref.World, key: Key, begun: jax.Array) -> Batch:
    """A record of one string of the source for each prompt."""
    return pref.to_record(world, begun, *pref.strings(world, key, len(begun)))


def best_of(world: pref.World, key: Key, begun: jax.Array, n: int) -> Batch:
    """A record of the best by gold of n strings of the source, for each prompt."""

    def best(args):
        k, some = args
        record = strings(world, k, jnp.repeat(some, n, axis=0))
        top = jnp.argmax(pref.gold(world, record).reshape(-1, n), axis=1) + n * jnp.arange(len(some))
        return jax.tree.map(lambda x: x[top], record)

    record = jax.lax.map(best, (jax.random.split(key, CHUNKS), begun.reshape(CHUNKS, -1, begun.shape[1])))
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), record)


def prepare(lab: Lab, c: Any, key: Key) -> dict[str, Any]:
    """What a seed has: its world, careful and careless demonstrations, and two reward models, one on shuffled labels."""
    keys = jax.random.split(key, 8)
    world = pref.make(keys[0], length=c.length, prompt=c.prompt)
    begun = pref.prompts(world, keys[1], c.demonstrations)
    careless, careful = strings(world, keys[2], begun), best_of(world, keys[3], begun, c.best_of)
    worth = pref.gold(world, careless)
    g = Ground(world, {}, worth.mean(), worth.std())
    asked = pref.prompts(world, keys[4], c.pairs + c.looks)
    both = compare(g, keys[5], *(strings(world, k, asked) for k in jax.random.split(keys[6])))
    known, test = (jax.tree.map(lambda x, p=p: x[p], both) for p in (slice(c.pairs), slice(c.pairs, None)))
    swap, other = jax.random.bernoulli(keys[7], 0.5, (c.pairs, 1)), {"chosen": "rejected", "rejected": "chosen"}
    mixed = {a: jax.tree.map(lambda x, y: jnp.where(swap, x, y), known[a], known[b]) for a, b in other.items()}

    def judge(pairs):
        params = train_judge(lab, pairs, keys[7], steps=c.judge_steps)
        scores = raw_score(lab, params, test["chosen"]), raw_score(lab, params, test["rejected"])
        everything = jnp.concatenate(scores)
        return Judge(params, everything.mean(), everything.std()), scores[0] - scores[1]

    judges, margins = jax.lax.map(judge, jax.tree.map(lambda *x: jnp.stack(x), known, mixed))
    gap = gold(g, test["chosen"]) - gold(g, test["rejected"])
    gap = gap[None, :]
    right = jnp.sum((margins * gap > 0) & (gap != 0), axis=1) / jnp.sum(gap != 0)
    return {"ground": g, "careful": careful, "careless": careless, "judges": judges, "right": right}


def tuned(lab: Lab, c: Any, data: Any, hyper: Any, key: Key) -> Params:
    """The policy of a run after supervised tuning on its mixture of demonstrations."""
    first, second, third = jax.random.split(key, 3)
    lazy = jax.random.bernoulli(first, hyper["noise"], (c.demonstrations, 1))
    mixture = jax.tree.map(lambda x, y: jnp.where(lazy, x, y), data["careless"], data["careful"])
    params, tx = {"policy": fresh(lab.model, second)}, optimizer(c.lr, c.sft_steps)
    return train(lm.loss(lab.model), tx, params, lambda k: rows(mixture, k, c.sft_batch), third, c.sft_steps)["policy"]


def look(lab: Lab, c: Any, state: Any, data: Any, hyper: Any, key: Key) -> dict[str, jax.Array]:
    """Gold of one string for each of the seed's prompts [looks], and the KL to the tuned policy."""
    g = data["ground"]
    begun = pref.prompts(g.world, jax.random.key(7), c.looks)
    record = sample(lab, g.world, state.params["policy"], key, c.looks, begun)
    return {"gold": gold(g, record), "kl": kl(lab, g.reference, record).mean()}
