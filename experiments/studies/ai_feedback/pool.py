"""From a rubric to preferences: models that write and rate, a pool of them, and pairs by what a judge says (arXiv 2310.16944)."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.studies.ai_feedback import rubric
from experiments.studies.lab.ground import Ground, gold, sample
from experiments.studies.lab.models import Lab, fresh, make, only, optimizer, rows, train
from experiments.studies.lab.preferences import with_reference
from jaxllm.core.types import Batch, Key, Params
from jaxllm.losses import lm
from jaxllm.worlds import pref

SMALL = ("plain", "dSFT", "rater")  # what the small models are trained on; the rater is the weak supervisor
LARGE = ("dSFT", "judge", "shuffled", "student")  # the student has the weak supervisor's ratings
POOL = ("small plain", "small", "large", "judge")  # the two dSFT models are "small" and "large"
ARMS = ("AI feedback", "gold labels", "best against worst", "constitutional", "shuffled judge", "random choice")


class Sizes(NamedTuple):
    """Decoders of two widths that read the same vocabulary."""

    small: Lab
    large: Lab


def sizes(c: Any) -> Sizes:
    """Decoders of widths c.width and 2 c.width, with room for the aspects' and ratings' tokens."""
    room = {"vocab": 24 + rubric.EXTRA, "prompt": c.prompt, "layers": c.layers}
    return Sizes(*(make(c.length + 2, width=width, **room) for width in (c.width, 2 * c.width)))


def part(tree: Any, index: Any) -> Any:
    """tree[index] of every leaf."""
    return jax.tree.map(lambda x: x[index], tree)


def stacked(*trees: Any) -> Any:
    """Trees of one shape as one with a new leading axis."""
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def mixed(demonstrations: Batch, ratings: Batch) -> Batch:
    """As many rows: a quarter demonstrations, so that a judge stays a writer, and the rest ratings."""
    n = demonstrations["tokens"].shape[0] // 4
    return jax.tree.map(lambda a, b: jnp.concatenate([a[:n], b[n:]]), demonstrations, ratings)


def lessons(c: Any, key: Key) -> dict[str, Any]:
    """A seed's world, and what its models learn from; c has length, prompt, rows, bias and noise.

    Half of the demonstrations are by writers who care for the good words (bias, in log-odds); the teacher rates strings of
    writers of every kind, one half for the weak supervisor and the other for the judge.
    """
    keys, n = jax.random.split(key, 8), c.rows
    world = pref.make(keys[0], length=c.length, prompt=c.prompt)
    half = c.bias * jax.random.bernoulli(keys[1], 0.5, (n,))
    every = jax.random.uniform(keys[2], (2 * n,), maxval=3 * c.bias)
    begun = pref.prompts(world, keys[3], 4 * n)
    wrote = rubric.writers(world, begun, keys[4], jnp.concatenate([jnp.zeros(n), half, every]))
    plain, demos, first, second = (part(wrote, slice(i * n, (i + 1) * n)) for i in range(4))
    worth = pref.gold(world, plain)
    g, tell = Ground(world, None, worth.mean(), worth.std()), partial(rubric.sheet, world)
    a, b = rubric.teach(g, first, keys[5], c.noise), rubric.teach(g, second, keys[6], c.noise)
    shown = {
        "plain": tell(plain), "dSFT": tell(demos), "rater": mixed(tell(demos), tell(first, a)),
        "judge": mixed(tell(demos), tell(second, b)),
        "shuffled": mixed(tell(demos), tell(second, jax.random.permutation(keys[7], b))),
    }  # fmt: skip
    return {"ground": g, "shown": shown, "strings": second}


def fit(one: Lab, c: Any, shown: Batch, key: Key) -> Params:
    """A model trained on rows of what it is shown."""
    first, second = jax.random.split(key)
    params = {"policy": fresh(one.model, first)}
    batch_of = lambda k: rows(shown, k, c.batch_size)  # noqa: E731
    return train(lm.loss(one.model), optimizer(c.lr, c.steps), params, batch_of, second, c.steps)["policy"]


def relabelled(one: Lab, s: dict[str, Any], rater: Params) -> Batch:
    """What the judge is shown, with another rater's ratings in place of the teacher's."""
    said = jnp.round(rubric.rate(one, s["ground"].world, rater, s["strings"])).astype(jnp.int32)
    return mixed(s["shown"]["dSFT"], rubric.sheet(s["ground"].world, s["strings"], said))


def feedback(labs: Sizes, c: Any, s: dict[str, Any], key: Key) -> dict[str, Any]:
    """What a seed has for its arms: pairs [arms, n] from a pool of four models, held-out prompts with the models' worth there.

    s has ground, small and large: parameters in the order of SMALL and LARGE. The pool: the small models without and with
    demonstrations, the large one with, and the judge. `facts` are numbers of the seed.
    """
    world, keys, n = s["ground"].world, jax.random.split(key, 12), c.pairs + c.test
    begun = pref.prompts(world, keys[0], n)
    g = s["ground"].replace(reference=part(s["small"], SMALL.index("dSFT")))
    drawn = [
        jax.vmap(lambda p, k, one=one: only(sample(one, world, p, k, n, begun)))(part(models, slice(2)), jax.random.split(k, 2))
        for one, models, k in ((labs.small, s["small"], keys[1]), (labs.large, s["large"], keys[2]))
    ]
    pool = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *drawn)
    flat = jax.tree.map(lambda x: x.reshape(4 * n, *x.shape[2:]), pool)
    by_large = jax.vmap(lambda p: rubric.rate(labs.large, world, p, flat))(part(s["large"], slice(1, None)))
    true, said = rubric.worth(g, flat), rubric.rate(labs.small, world, part(s["small"], SMALL.index("rater")), flat)
    ratings = dict(zip((*LARGE[1:], "weak", "rubric"), (*by_large, said, true), strict=True))
    scores = {name: x.mean(axis=1).reshape(4, n) for name, x in ratings.items()} | {"gold": gold(g, flat).reshape(4, n)}
    facts = {f"{x}/{truth}": rubric.agreement(scores[x], scores[truth]) for x in ratings for truth in ("gold", "rubric")}
    facts |= {"least rating": by_large.min(), "greatest rating": by_large.max()}
    revised, about = revisions(labs, g, s, part(pool, 1), by_large[0].reshape(4, n, -1)[1], keys[3], c.pairs)
    choices = [(scores["judge"], False), (scores["gold"], False), (scores["judge"], True), None,
               (scores["shuffled"], False), (jax.random.uniform(keys[4], (4, n)), False)]  # fmt: skip
    pairs, train_pool = [], part(pool, (slice(None), slice(c.pairs)))
    for k, choice in zip(jax.random.split(keys[5], len(ARMS)), choices, strict=True):
        if choice is None:
            pairs.append(revised)
            continue
        best, other = rubric.choose(k, choice[0][:, : c.pairs], worst=choice[1])
        pairs.append({"chosen": rubric.gather(train_pool, best), "rejected": rubric.gather(train_pool, other)})
    margins = jax.vmap(lambda p: gold(g, p["chosen"]) - gold(g, p["rejected"]))(stacked(*pairs)).mean(axis=1)
    facts |= about | {f"gold margin/{arm}": x for arm, x in zip(ARMS, margins, strict=True)}
    facts |= {
        f"gold/{name}": x.mean() for name, x in zip(("small plain", "small", "large", "judge"), scores["gold"], strict=True)
    }
    return {
        "ground": g, "pairs": jax.vmap(partial(with_reference, labs.small, g.reference))(stacked(*pairs)), "facts": facts,
        "begun": begun[c.pairs :], "base": scores["gold"][1:, c.pairs :], "pool": pool, "gold": scores["gold"],
    }  # fmt: skip


def revisions(labs: Sizes, g: Ground, s: dict[str, Any], record: Batch, ratings: jax.Array, key: Key, n: int):
    """(n pairs of a revision that the judge rates higher and its original, {name: number}): critique, then revise.

    The critique is the aspect rated lowest; the small dSFT model revises its own strings (arXiv 2212.08073).
    """
    first, second = jax.random.split(key)
    new = rubric.revise(labs.small, g.world, g.reference, record, ratings.argmin(axis=1), first)
    gain = rubric.rate(labs.large, g.world, part(s["large"], LARGE.index("judge")), new).mean(axis=1) - ratings.mean(axis=1)
    taken, better = gain > 0, gold(g, new) - gold(g, record)
    index = jax.random.categorical(second, jnp.where(taken, 0.0, -1e9), shape=(n,))
    facts = {"revisions/accepted": taken.mean(), "revisions/gold gain, all": better.mean(),
             "revisions/gold gain, accepted": better.mean(where=taken), "revisions/least gain": gain[index].min()}  # fmt: skip
    return {"chosen": part(only(new), index), "rejected": part(only(record), index)}, facts
