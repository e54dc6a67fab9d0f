"""Ratings of strings by a rubric: four aspects, a simulated teacher, language models that rate, and revision under a rule.

The vocabulary of these models is the world's, then a token for each aspect, then the five ratings. A model reads a string and
the four aspect tokens, and says a rating after each: all four come from one pass, and no rating is read by the next.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from experiments.studies.lab.ground import Ground, gold
from experiments.studies.lab.models import Lab, only
from jaxllm.core import ops
from jaxllm.core.types import Batch, Key, Params
from jaxllm.worlds import pref

ASPECTS = ("instruction following", "truthfulness", "honesty", "helpfulness")  # UltraFeedback's, arXiv 2310.01377
LEVELS = 5
EXTRA = len(ASPECTS) + LEVELS  # tokens beyond the world's


def writers(world: pref.World, begun: jax.Array, key: Key, bias: jax.Array) -> Batch:
    """Strings of simulated writers: the source, drawn by bias [n] (log-odds) to the good words that are not yet there."""
    n = begun.shape[0]
    named = pref.good_words(world, {"tokens": begun}).astype(jnp.float32)
    first, rest = jax.random.split(key)
    start = (jax.random.randint(first, (n,), 0, world.vocab), named)

    def draw(carry: tuple[jax.Array, jax.Array], k: Key) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        word, left = carry
        word = jax.random.categorical(k, jnp.log(world.transition[word]) + bias[:, None] * left)
        return (word, left * (1 - jax.nn.one_hot(word, world.vocab))), word

    _, words = jax.lax.scan(draw, start, jax.random.split(rest, world.length))
    return pref.to_record(world, begun, words.T, jnp.full((n,), world.length))


def counts(world: pref.World, record: Batch) -> jax.Array:
    """How often each word is in each string: [n, v]."""
    words, real = pref.content(world, record)
    return jnp.sum(jax.nn.one_hot(words, world.vocab) * real[..., None], axis=1)


def worth(g: Ground, record: Batch) -> jax.Array:
    """What the rubric's aspects are, before noise and rounding: [n, 4], 1 to 5.

    Instruction following: the share used of the good words asked for: all that a prompt names, without prompts the five
    that pay. Truthfulness: one less for each ungrammatical pair.
    Honesty: one less for each repeat of a word beyond its second use. Helpfulness: gold in standard deviations, 3 the mean.
    """
    used, named = counts(g.world, record), pref.good_words(g.world, record)
    most = g.world.prompt or pref.MOST_GOOD
    share = jnp.minimum(jnp.sum((used > 0) & named, axis=1), most) / most
    padding = jnp.maximum(used - 2, 0).sum(axis=1)
    aspects = [1 + (LEVELS - 1) * share, LEVELS - pref.slips(g.world, record), LEVELS - padding, 3 + gold(g, record)]
    return jnp.clip(jnp.stack(aspects, axis=1), 1, LEVELS)


def teach(g: Ground, record: Batch, key: Key, noise: float) -> jax.Array:
    """The simulated teacher's ratings: int [n, 4], 1 to 5."""
    true = worth(g, record)
    return jnp.clip(jnp.round(true + noise * jax.random.normal(key, true.shape)), 1, LEVELS).astype(jnp.int32)


def sheet(world: pref.World, record: Batch, ratings: jax.Array | None = None) -> Batch:
    """A record [n, l + 5] of strings and the aspect tokens: trained on the words, or with ratings int [n, 4] on those alone."""
    n, aspects = record["tokens"].shape[0], len(ASPECTS)
    asked = jnp.tile(world.vocab + 2 + jnp.arange(aspects), (n, 1))
    level = jnp.ones((n, aspects), jnp.int32) if ratings is None else ratings
    said = world.vocab + 1 + aspects + level
    empty, rated = jnp.zeros((n, 1), jnp.int32), ratings is not None
    return {
        "tokens": jnp.concatenate([record["tokens"], record["targets"][:, -1:], asked], axis=1),
        "targets": jnp.concatenate([record["targets"], empty, said], axis=1),
        "segments": jnp.ones((n, record["tokens"].shape[1] + 1 + aspects), jnp.int32),
        "mask": jnp.concatenate([record["mask"] & (not rated), empty != 0, jnp.full((n, aspects), rated)], axis=1),
    }  # fmt: skip


def rate(lab: Lab, world: pref.World, params: Params, record: Batch) -> jax.Array:
    """Expected ratings under a model's probabilities of the five rating tokens, renormalised over them: [n, 4]."""
    asked = sheet(world, only(record))
    hidden = lab.model.apply(params, asked["tokens"], segments=asked["segments"]).hidden[:, -len(ASPECTS) :]
    first = world.vocab + 2 + len(ASPECTS)
    return expected(ops.logits(lab.model.head(params), hidden)[..., first : first + LEVELS])


def expected(logits: jax.Array) -> jax.Array:
    """sum over levels of level * p(level): [..., 5] -> [...]."""
    return jax.nn.softmax(logits.astype(jnp.float32), axis=-1) @ jnp.arange(1.0, LEVELS + 1)


def agreement(score: jax.Array, truth: jax.Array) -> jax.Array:
    """How often scores [k, n] of k strings for each prompt order neighbours as the truth does, where it differs; ties half."""
    a, b = (x - jnp.roll(x, 1, axis=0) for x in (score, truth))
    return jnp.mean(jnp.where(a == 0, 0.5, a * b > 0), where=jnp.abs(b) > 1e-3)


def choose(key: Key, scores: jax.Array, worst: bool = False) -> tuple[jax.Array, jax.Array]:
    """(the best of k [n], a random other or the worst [n]) by scores [k, n]; ties are broken by chance."""
    tie, other = jax.random.split(key)
    k, n = scores.shape
    scores = scores + 1e-4 * jax.random.uniform(tie, scores.shape)
    best = scores.argmax(axis=0)
    return best, scores.argmin(axis=0) if worst else (best + jax.random.randint(other, (n,), 1, k)) % k


def gather(records: Batch, index: jax.Array) -> Batch:
    """Rows of records [k, n, ...]: for each of n prompts the one numbered index [n]."""
    return jax.tree.map(lambda x: x[index, jnp.arange(index.shape[0])], only(records))


def offence(world: pref.World, record: Batch, aspect: jax.Array) -> jax.Array:
    """The first word that breaks the rule of aspect int [n]: int [n]; the middle word where none does."""
    words, _ = pref.content(world, record)
    slip = jnp.pad(~world.likely[words[:, :-1], words[:, 1:]], ((0, 0), (1, 0)))
    seen = jnp.cumsum(jax.nn.one_hot(words, world.vocab), axis=1)
    padding = jnp.take_along_axis(seen, words[..., None], axis=2)[..., 0] > 2
    broken = jnp.where((aspect == 1)[:, None], slip, (aspect == 2)[:, None] & padding)
    return jnp.where(broken.any(axis=1), broken.argmax(axis=1), world.length // 2)


def revise(lab: Lab, world: pref.World, params: Params, record: Batch, aspect: jax.Array, key: Key) -> Batch:
    """Strings resampled from the word that breaks the rule of aspect int [n] on, with the rule in force.

    The rules: truthfulness, a word must be grammatical after the last; honesty, no word a third time; the others, the word at
    that place must be a good one that is not there yet.
    """
    words, _ = pref.content(world, record)
    words, at = jnp.clip(words, 0, world.vocab - 1), offence(world, record, aspect)
    begun, named = record["tokens"][:, : 1 + world.prompt], pref.good_words(world, record)

    def body(words: jax.Array, step: tuple[jax.Array, Key]) -> tuple[jax.Array, None]:
        t, k = step
        read = jnp.concatenate([begun, words[:, :-1]], axis=1)
        hidden = lab.model.apply(params, read, segments=jnp.ones_like(read)).hidden[:, world.prompt + t]
        used = jnp.sum(jax.nn.one_hot(words, world.vocab) * (jnp.arange(world.length) < t).reshape(1, -1, 1), axis=1)
        new = named & (used == 0)
        asked = jnp.where(((t == at) & new.any(axis=1))[:, None], new, True)
        rules = [asked, world.likely[words[:, jnp.maximum(t - 1, 0)]] | (t == 0), used < 2, asked]
        allowed = jnp.take_along_axis(jnp.stack(rules, axis=1), aspect[:, None, None], axis=1)[:, 0]
        logits = ops.logits(lab.model.head(params), hidden)[:, : world.vocab]
        drawn = jax.random.categorical(k, jnp.where(allowed, logits, -1e9))
        return words.at[:, t].set(jnp.where(t >= at, drawn, words[:, t])), None

    steps = (jnp.arange(world.length), jax.random.split(key, world.length))
    words = jax.lax.scan(body, words.astype(jnp.int32), steps)[0]
    return pref.to_record(world, begun, words, jnp.full((words.shape[0],), world.length))
