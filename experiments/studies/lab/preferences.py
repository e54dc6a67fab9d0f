"""Preferences of simulated annotators, and reward models trained on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from experiments.studies.lab.ground import Ground, gold, sample
from experiments.studies.lab.models import Lab, fresh, only, optimizer, rows, train
from jaxllm.core.types import Batch, Key, Params
from jaxllm.losses import preference, reward
from jaxllm.models import heads
from jaxllm.worlds import pref


def compare(g: Ground, key: Key, a: Batch, b: Batch, worth: Callable | None = None, sharpness: float = 2.0) -> Batch:
    """{chosen, rejected}: records a and b as the simulated annotator orders them. worth(record) [n]: gold unless given."""
    worth = worth or partial(gold, g)
    first = pref.prefer(key, worth(a), worth(b), sharpness=sharpness)
    pick = lambda yes, x, y: jnp.where(yes.reshape(-1, *([1] * (x.ndim - 1))), x, y)  # noqa: E731
    a, b = only(a), only(b)
    return {"chosen": jax.tree.map(partial(pick, first), a, b), "rejected": jax.tree.map(partial(pick, ~first), a, b)}


def pairs(
    lab: Lab, g: Ground, params: Params, key: Key, n: int, worth: Callable | None = None, sharpness: float = 2.0
) -> Batch:  # fmt: skip
    """n preference pairs of a policy's strings for the same prompts, with the reference's log-probabilities as columns."""
    keys = jax.random.split(key, 4)
    begun = pref.prompts(g.world, keys[0], n)
    a, b = (sample(lab, g.world, params, k, n, begun) for k in keys[1:3])
    return with_reference(lab, g.reference, compare(g, keys[3], a, b, worth, sharpness))


def with_reference(lab: Lab, reference: Params, columns: Batch) -> Batch:
    """Pairs with ref_chosen_logps and ref_rejected_logps [n]."""
    a, b = (preference.sequence_logps(lab.model, reference, columns[side]) for side in ("chosen", "rejected"))
    return {**columns, "ref_chosen_logps": a, "ref_rejected_logps": b}


def train_judge(
    lab: Lab, columns: Batch, key: Key, *, trunk: Params | None = None, steps: int = 150, batch: int = 64, lr: float = 1e-3
) -> Params:  # fmt: skip
    """A reward model on pairs (Bradley-Terry), from a policy's weights `trunk` (of the same width) or from scratch."""
    first, second = jax.random.split(key)
    params = fresh(lab.judge, first)
    params = {"reward": params if trunk is None else heads.graft(params, trunk)}
    loss_fn = reward.loss(partial(heads.scalars, lab.judge))
    return train(loss_fn, optimizer(lr, steps), params, lambda k: rows(columns, k, batch), second, steps)["reward"]


def raw_score(lab: Lab, judge: Params, record: Batch) -> jax.Array:
    """The reward model's score at each string's last token: [n]."""
    return reward.score(partial(heads.scalars, lab.judge), judge, only(record))


@struct.dataclass
class Judge:
    """A reward model and the scale that makes its scores mean 0 and s.d. 1 on the reference's strings."""

    params: Params
    mean: jax.Array
    std: jax.Array


def standardised(lab: Lab, g: Ground, judge: Params, key: Key, n: int = 1024) -> Judge:
    score = raw_score(lab, judge, sample(lab, g.world, g.reference, key, n))
    return Judge(judge, score.mean(), score.std())


def proxy(lab: Lab, judge: Judge, record: Batch) -> jax.Array:
    """The reward model's score in standard deviations of the reference's strings: [n]."""
    return (raw_score(lab, judge.params, record) - judge.mean) / judge.std


def shuffled(columns: Batch, key: Key) -> Batch:
    """Pairs whose labels are a coin's: the sides, and what the reference says of them, are swapped at random."""
    other = {"chosen": "rejected", "rejected": "chosen"}
    other |= {f"ref_{a}_logps": f"ref_{b}_logps" for a, b in other.items()}
    coin = jax.random.bernoulli(key, 0.5, jax.tree.leaves(columns)[0].shape[:1])
    swap = lambda a, b: jnp.where(coin.reshape(-1, *([1] * (a.ndim - 1))), b, a)  # noqa: E731
    return {name: jax.tree.map(swap, columns[name], columns[other[name]]) for name in columns}


def scores(lab: Lab, judge: Params, record: Batch, chunk: int = 1024) -> jax.Array:
    """raw_score of many strings, a chunk (a divisor of n) at a time: [n]."""
    n = record["tokens"].shape[0]
    parts = jax.tree.map(lambda x: x.reshape(-1, math.gcd(chunk, n), *x.shape[1:]), only(record))
    return jax.lax.map(partial(raw_score, lab, judge), parts).reshape(n)


def stock(lab: Lab, world: pref.World, reference: Params, key: Key, pairs: int, n: int, chunk: int = 1024) -> dict[str, Any]:
    """What a study takes from a reference: {ground, pairs, strings}, n strings (which set gold's scale) and others in pairs.

    One program draws all of them, a chunk at a time: each call of `sample` costs a compilation of its own.
    """
    draw, label = jax.random.split(key)
    keys = jax.random.split(draw, -(-(n + 2 * pairs) // chunk))
    drawn = jax.lax.map(lambda k: sample(lab, world, reference, k, chunk), keys)
    drawn = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), drawn)
    strings, a, b = (jax.tree.map(lambda x, i=i, k=k: x[i : i + k], drawn) for i, k in ((0, n), (n, pairs), (n + pairs, pairs)))
    worth = pref.gold(world, strings)
    g = Ground(world, reference, worth.mean(), worth.std())
    return {"ground": g, "pairs": compare(g, label, a, b), "strings": strings}
