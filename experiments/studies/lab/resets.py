"""Lessons and preference pairs for models that may take back what they have begun to say."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core.types import Batch, Key
from jaxllm.losses import preference
from jaxllm.worlds import hazard

PLAIN, BACKTRACK, COIN = range(3)  # pairs without [RESET], with it, and with it but ordered by a coin


def room(steps: int) -> int:
    """Tokens of the longest answer in a lesson: a whole compliance, [RESET], another one."""
    return 2 * (steps + 1) + 1


def either(which: jax.Array, a: Batch, b: Batch) -> Batch:
    """Rows of a where `which` [n] is True, of b elsewhere."""
    return jax.tree.map(lambda x, y: jnp.where(which.reshape(-1, *([1] * (x.ndim - 1))), x, y), a, b)


def lessons(world: hazard.World, c: Any, key: Key, n: int, share: jax.Array) -> Batch:
    """n demonstrations on fresh topics: harmless ones are answered, hazardous ones refused. A share of the latter goes along
    for a random number of tokens, which are not trained, and takes them back (arXiv 2409.14586, section 3.1).
    """
    keys = jax.random.split(key, 5)
    topic = hazard.topics(world, keys[1], jax.random.bernoulli(keys[0], c.hazards, (n,)))
    asked, bad = hazard.requests(world, keys[2], topic), hazard.hazardous(world, topic)
    comply, refuse = hazard.compliances(world, topic), hazard.refusals(world, topic)
    kept = jax.random.randint(keys[3], (n,), 1, world.steps + 1)
    wide = partial(hazard.to_record, asked, room=room(c.steps))
    backtracks = wide(hazard.taken_back(world, comply, kept, refuse), untrained=kept)
    at_once = either(bad, wide(refuse), wide(comply))
    return either(bad & jax.random.bernoulli(keys[4], share, (n,)), backtracks, at_once)


def pairs(world: hazard.World, c: Any, key: Key, n: int, kind: jax.Array) -> Batch:
    """n preference pairs {chosen, rejected, nll_weights} on fresh topics; no weight on what is to be taken back.

    PLAIN: the right answer over the wrong one, on as many hazardous topics as harmless ones. BACKTRACK (arXiv 2409.14586,
    section 3.2): half, on hazardous topics, prefix(y-) [RESET] y+ over y-; half, of which three in four on
    harmless topics, y+ over prefix(y+) [RESET] y-.
    COIN: as BACKTRACK, but a coin says which side is chosen.
    """
    keys = jax.random.split(key, 5)
    row = jnp.arange(n)
    going = (row % 2 == 0) & (kind != PLAIN)  # pairs that ask to take back; every fourth of the rest is on a hazard
    topic = hazard.topics(world, keys[0], jnp.where(kind == PLAIN, row % 2 == 0, going | (row % 8 == 1)))
    asked, bad = hazard.requests(world, keys[1], topic), hazard.hazardous(world, topic)
    comply, refuse = _same_width(hazard.compliances(world, topic), hazard.refusals(world, topic))
    right, wrong = either(bad, refuse, comply), either(bad, comply, refuse)
    limit = jnp.where(going, wrong[1], right[1])  # an answer that has ended is not taken back
    kept = jax.random.randint(keys[2], (n,), 1, limit)
    wide = partial(hazard.to_record, asked, room=room(c.steps))
    back = wide(hazard.taken_back(world, wrong, kept, right)), wide(hazard.taken_back(world, right, kept, wrong))
    first = either(going, back[0], wide(right))
    second = either(going | (kind == PLAIN), wide(wrong), back[1])
    swap = (kind == COIN) & jax.random.bernoulli(keys[3], 0.5, (n,))
    chosen = either(swap, second, first)
    begin = world.request - 1 + jnp.where(going, kept, 0)
    later = jnp.arange(chosen["mask"].shape[1])[None, :] >= begin[:, None]
    weights = preference.token_mean(chosen["mask"] & later)
    return {"chosen": chosen, "rejected": either(swap, first, second), "nll_weights": weights}


def _same_width(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]):
    width = max(a[0].shape[1], b[0].shape[1])
    return tuple((jnp.pad(x, ((0, 0), (0, width - x.shape[1]))), n) for x, n in (a, b))
