"""The reward models of the study: what a seed has, and curves of every number of pairs, start and way to read rankings."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.studies import lab
from jaxllm.losses import reward
from jaxllm.models import heads
from jaxllm.train import sweep
from jaxllm.train.step import make_train_step

VALID, CHUNK, LOOKS = 256, 1024, 5  # labelled pairs that choose the step; strings sampled at a time; looks at rankings
STARTS = ("from scratch", "from the language model")


def prepare(labs, c, key):
    """What a seed has: its language model, pairs to train on, to choose a step by and to test on, and rankings."""
    keys = jax.random.split(key, 4)
    g = lab.ground(labs, keys[0], steps=c.pretrain_steps, n=CHUNK, length=c.length)
    ends = np.cumsum([0, *(2 * n for n in (max(c.pairs), VALID, c.test_pairs)), c.rankings * c.k])
    draws = jax.random.split(keys[1], -(-int(ends[-1]) // CHUNK))
    strings = jax.lax.map(lambda k: lab.only(lab.sample(labs, g.world, g.reference, k, CHUNK)), draws)
    part = [jax.tree.map(lambda x, i=i: x.reshape(-1, x.shape[-1])[ends[i] : ends[i + 1]], strings) for i in range(4)]
    sides = [[jax.tree.map(lambda x, s=s: x[s::2], p) for s in (0, 1)] for p in part[:3]]
    judges = jax.random.split(keys[2], 3)
    train, valid, test = (lab.compare(g, k, *two, sharpness=c.sharpness) for k, two in zip(judges, sides, strict=True))
    # Gumbel noise makes every pair of a ranking Bradley-Terry, and the whole Plackett-Luce
    worth = c.sharpness * lab.gold(g, part[3]) + jax.random.gumbel(keys[3], (c.rankings * c.k,))
    order = jnp.argsort(-worth.reshape(c.rankings, c.k), axis=1) + c.k * jnp.arange(c.rankings)[:, None]
    gold = {side: lab.gold(g, test[side]) for side in test}
    data = {"reference": g.reference, "train": train, "valid": valid, "test": test, "gold": gold}
    return {**data, "ranked": jax.tree.map(lambda x: x[order], part[3])}


def look(labs, state, data, hyper, key):
    """Gold accuracy, rank correlation, label loss and margins of one run on pairs that it never saw."""
    score = partial(lab.raw_score, labs, state.params["reward"])
    (vc, vr), (tc, tr) = ([score(data[name][side]) for side in ("chosen", "rejected")] for name in ("valid", "test"))
    worth = jnp.concatenate([data["gold"]["chosen"], data["gold"]["rejected"]])
    ranks = [jnp.argsort(jnp.argsort(x)).astype(jnp.float32) for x in (jnp.concatenate([tc, tr]), worth)]
    gap = data["gold"]["chosen"] - data["gold"]["rejected"]
    right = jnp.where(tc == tr, 0.5, (tc - tr) * gap > 0)
    return {
        "valid_loss": reward.bradley_terry(vc, vr).mean(), "loss": reward.bradley_terry(tc, tr).mean(), "margin": tc - tr,
        "accuracy": right.sum(where=gap != 0) / jnp.sum(gap != 0), "spearman": jnp.corrcoef(*ranks)[0, 1],
    }  # fmt: skip


def train(labs, c, data, grid, loss_fn, draw, steps, every):
    """All runs of a grid at once on what draw(data, hyper, key) gives: their curves {name: [runs, points, ...]}."""
    tx, (seeds, hyper) = lab.optimizer(c.lr, steps), grid
    data, keys = sweep.take(data, seeds), jax.vmap(partial(jax.random.fold_in, jax.random.key(c.seed + 1)))(seeds)

    @jax.jit
    @jax.vmap
    def begin(trunk, lm, key):
        fresh = lab.fresh(labs.judge, key)
        params = jax.tree.map(lambda a, b: jnp.where(lm, a, b), heads.graft(fresh, trunk), fresh)
        return lab.start(tx, {"reward": params})

    def step(state, data, hyper, key):
        state, metrics = make_train_step(loss_fn, tx)(state, {}, draw(data, hyper, key), key)
        return state, {"train_loss": metrics["loss"].value()}

    state = begin(data["reference"], hyper["lm"], keys)
    return sweep.fit(step, state, data, hyper, keys, steps=steps, every=every, observe=partial(look, labs))[1]


def by_pairs(labs, c, data):
    """Curves [n_pairs, start, seeds, points, ...] of reward models on pairs."""

    def draw(data, hyper, key):
        index = jax.random.randint(key, (c.batch_size,), 0, hyper["n"])
        return jax.tree.map(lambda x: x[index], data["train"])

    loss_fn, grid = reward.loss(partial(heads.scalars, labs.judge)), sweep.grid(c.seeds, n=c.pairs, lm=(False, True))
    curves = train(labs, c, data, grid, loss_fn, draw, c.steps, c.every)
    return {n: x.reshape(len(c.pairs), len(STARTS), c.seeds, *x.shape[1:]) for n, x in curves.items()}


def by_rankings(labs, c, data):
    """Curves [seeds, points, ...] of two ways to read the same rankings equally often, with as many completions a step."""
    whole, single = c.batch_size // (2 * c.k), c.batch_size // (2 * c.k) * c.k // 2
    better, worse = (jnp.asarray(x) for x in np.triu_indices(c.k, 1))

    def rankings(data, hyper, key):
        return {"ranked": lab.rows(data["ranked"], key, whole), "valid": jnp.ones((whole, c.k), bool)}

    def independent(data, hyper, key):
        a, b = jax.random.split(key)
        row, pair = jax.random.randint(a, (single,), 0, c.rankings), jax.random.randint(b, (single,), 0, len(better))
        sides = {"chosen": better[pair], "rejected": worse[pair]}
        return {side: jax.tree.map(lambda x, at=at: x[row, at], data["ranked"]) for side, at in sides.items()}

    scalars, grid = partial(heads.scalars, labs.judge), sweep.grid(c.seeds, lm=(True,))
    arms = {"rankings": (rankings, reward.ranked_loss(scalars), whole * len(better))}
    arms["pairs"] = (independent, reward.loss(scalars), single)
    every = {name: max(1, c.passes * c.rankings * len(better) // (pairs * LOOKS)) for name, (_, _, pairs) in arms.items()}
    return {n: train(labs, c, data, grid, f, draw, LOOKS * every[n], every[n]) for n, (draw, f, _) in arms.items()}


def chosen(curves, name):
    """A curve's value at the step with the lowest loss on the validation labels."""
    best, values = np.argmin(curves["valid_loss"], axis=-1), curves[name]
    index = best.reshape(best.shape + (1,) * (values.ndim - best.ndim))
    return np.take_along_axis(values, index, axis=best.ndim).squeeze(best.ndim)
