"""Strings of many lengths: what a string is worth by its first words, and annotators and rewards that look at length."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxllm.core.types import Batch, Key
from jaxllm.worlds import pref

SPARE = 2  # words by which a trained policy may end before the source would


@struct.dataclass
class LengthScale:
    """Mean and s.d. of what the source's strings are worth by their first words, and of their length."""

    worth_mean: jax.Array
    worth_std: jax.Array
    mean: jax.Array
    std: jax.Array


def first_words(world: pref.World, record: Batch) -> Batch:
    """The record without what follows the first `shortest` - SPARE words of its strings: nearly all strings have those."""
    there = jnp.arange(record["mask"].shape[1])[None, :] < world.prompt + world.shortest - SPARE
    return {**record, "mask": record["mask"] & there}


def length_scale(world: pref.World, key: Key, n: int = 16384) -> LengthScale:
    """Measured on n strings of the world's source."""
    first, second = jax.random.split(key)
    record = pref.to_record(world, pref.prompts(world, first, n), *pref.strings(world, second, n))
    words, worth = pref.lengths(world, record), pref.gold(world, first_words(world, record))
    return LengthScale(worth.mean(), worth.std(), words.mean(), words.std())


def quality(world: pref.World, scale: LengthScale, record: Batch) -> jax.Array:
    """Gold of the first words in s.d. of the source's strings, [n]: length neither helps nor hurts."""
    return (pref.gold(world, first_words(world, record)) - scale.worth_mean) / scale.worth_std


def standard_length(world: pref.World, scale: LengthScale, record: Batch) -> jax.Array:
    """The number of words in s.d. of the source's strings, [n]."""
    return (pref.lengths(world, record) - scale.mean) / scale.std


def balanced(world: pref.World, pairs: Batch, key: Key, width: int) -> Batch:
    """As many pairs, drawn so that at every gap in length (bins of `width`) the longer side is chosen as often as not."""
    gap = pref.lengths(world, pairs["chosen"]) - pref.lengths(world, pairs["rejected"])
    kind = jax.nn.one_hot((jnp.abs(gap) // width).astype(jnp.int32), world.length // width + 1)
    sides = [kind * yes.reshape(-1, 1) for yes in (gap > 0, gap < 0)]
    counts = [side.sum(axis=0) for side in sides]
    shares = [jnp.minimum(*counts) / jnp.maximum(n, 1) for n in counts]
    weight = sides[0] @ shares[0] + sides[1] @ shares[1] + (gap == 0)
    index = jax.random.categorical(key, jnp.log(weight), shape=gap.shape)
    return jax.tree.map(lambda x: x[index], pairs)


def within_bins(score: np.ndarray, words: np.ndarray, width: int) -> float:
    """The gain in score [points, n] from first to last inside bins of length, weighted by what both have in common.

    The non-length reward gain of arXiv 2310.03716; nan where no bin has strings of both.
    """
    bins = words // width
    gains, weights = [], []
    for b in np.unique(bins):
        before, after = score[0][bins[0] == b], score[-1][bins[-1] == b]
        if len(before) and len(after):
            gains.append(after.mean() - before.mean())
            weights.append(min(len(before), len(after)))
    return float(np.average(gains, weights=weights)) if gains else float("nan")
