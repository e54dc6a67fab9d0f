"""Models trained, and the two loops: DPO on every arm's pairs, and rounds of a model that rates itself (arXiv 2401.10020)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.studies import lab
from experiments.studies.ai_feedback import pool as made
from experiments.studies.ai_feedback import rubric
from experiments.studies.ai_feedback.pool import ARMS, LARGE
from experiments.studies.lab.arms import fit_arms
from jaxllm.losses import preference
from jaxllm.train import sweep
from jaxllm.train.optim import adamw
from jaxllm.worlds import pref

RATERS = ("rates itself", "rated by the first judge", "shuffled scores")  # of the rounds of self-rewarding


def prepare(labs, c, run):
    """What every seed has, after three trainings: of the small models, of the large ones, and what the judge is for."""
    keys = jax.random.split(jax.random.key(c.seed), c.seeds)
    s = jax.jit(jax.vmap(partial(made.lessons, c)))(keys)

    def fitted(one, shown, salt):
        salted = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, salt), len(shown)))(keys)
        stack = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *shown)
        return jax.jit(jax.vmap(jax.vmap(partial(made.fit, one, c))))(stack, salted)

    s["small"] = fitted(labs.small, [s["shown"][n] for n in made.SMALL], 1)
    run.note("the small models are trained")
    weak = jax.tree.map(lambda x: x[:, made.SMALL.index("rater")], s["small"])
    s["shown"]["student"] = jax.jit(jax.vmap(partial(made.relabelled, labs.small)))(s, weak)
    s["large"] = fitted(labs.large, [s["shown"][n] for n in LARGE], 2)
    run.note("the large models and judges are trained")
    needed = {n: s[n] for n in ("ground", "small", "large")}
    data = jax.jit(jax.vmap(partial(made.feedback, labs, c)))(needed, jax.vmap(lambda k: jax.random.fold_in(k, 3))(keys))
    judge = jax.tree.map(lambda x: x[:, LARGE.index("judge")], s["large"])
    return data, data["ground"].replace(reference=judge)


def wins(gold, base):
    """How often strings of worth gold [n] beat others for the same prompts, ties half."""
    return jnp.mean((gold > base + 1e-4) + 0.5 * (jnp.abs(gold - base) <= 1e-4))


def look(labs, c, state, data, hyper, key):
    """A small policy on the held-out prompts: gold, KL, and win rates over both dSFT models."""
    g = data["ground"]
    record = lab.sample(labs.small, g.world, state.params["policy"], key, c.test, data["begun"])
    gold, base = lab.gold(g, record), data["base"]
    kl = lab.kl(labs.small, g.reference, record)
    return {"gold": gold.mean(), "kl": kl.mean(), "win": wins(gold, base[0]), "win/large": wins(gold, base[1])}


def zephyr(labs, c, data):
    """Curves {name: [arms, seeds, looks]} of DPO on every arm's pairs."""
    seeds, grid = sweep.grid(c.seeds, arm=np.arange(len(ARMS)))
    of_run = {n: sweep.take(data[n], seeds) for n in ("ground", "begun", "base")}
    of_run["pairs"] = jax.tree.map(lambda x: x[seeds, grid["arm"]], data["pairs"])
    tx = lab.optimizer(c.dpo_lr, c.dpo_steps)
    step = lab.preference_step(labs.small, preference.dpo, tx, batch=c.batch_size)
    hyper = {"beta": jnp.full(len(seeds), c.beta)}
    return fit_arms(c, tx, step, partial(look, labs, c), of_run, hyper, steps=c.dpo_steps, every=c.dpo_steps // c.looks)[1]


def one_round(labs, c, tx):
    """A round of self-rewarding: four strings a prompt, rated; DPO on the best against a random other, from the latest policy."""
    update = lab.preference_step(labs.large, preference.dpo, tx, batch=c.batch_size)

    def step(state, data, hyper, key):
        keys, g, policy = jax.random.split(key, 5), data["ground"], state.params["policy"]
        begun = jnp.tile(pref.prompts(g.world, keys[0], c.round_prompts), (4, 1))
        drawn = lab.only(lab.sample(labs.large, g.world, policy, keys[1], len(begun), begun))
        rater = jax.tree.map(lambda own, first: jnp.where(hyper["who"] == 0, own, first), policy, g.reference)
        scores = rubric.rate(labs.large, g.world, rater, drawn).mean(axis=1)
        scores = jnp.where(hyper["who"] == 2, jax.random.permutation(keys[2], scores), scores).reshape(4, -1)
        best, other = rubric.choose(keys[3], scores)
        drawn = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), drawn)
        pairs = {"chosen": rubric.gather(drawn, best), "rejected": rubric.gather(drawn, other)}
        pairs = lab.with_reference(labs.large, policy, pairs)
        body = lambda s, k: update(s, {"pairs": pairs}, hyper, k)  # noqa: E731
        state, metrics = jax.lax.scan(body, state, jax.random.split(keys[4], c.round_steps))
        return state, {"loss": metrics["loss"].mean()}

    return step


def look_round(labs, c, state, data, hyper, key):
    """A large policy: gold, win rate over its beginning, and how well it still judges: its own strings, and the pool's."""
    g, policy = data["ground"], state.params["policy"]
    record = lab.sample(labs.large, g.world, policy, key, 2 * c.test, jnp.tile(data["begun"], (2, 1)))
    gold = lab.gold(g, record).reshape(2, -1)
    said = [rubric.rate(labs.large, g.world, policy, x).mean(axis=1) for x in (record, data["flat"])]
    return {
        "gold": gold.mean(), "win": wins(gold[0], data["base"][2]), "kl": lab.kl(labs.large, g.reference, record).mean(),
        "agreement/own": rubric.agreement(said[0].reshape(2, -1), gold),
        "agreement/pool": rubric.agreement(said[1].reshape(4, -1), data["gold"]),
    }  # fmt: skip


def self_rewarding(labs, c, data, ground):
    """Curves {name: [raters, seeds, rounds + 1]}."""
    seeds, hyper = sweep.grid(c.seeds, who=np.arange(len(RATERS)))
    pool = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), data["pool"])
    of_run = sweep.take({"ground": ground, "flat": pool} | {n: data[n] for n in ("begun", "base", "gold")}, seeds)
    hyper["beta"] = jnp.full(len(seeds), c.beta)
    tx = adamw(c.dpo_lr, b2=0.98, weight_decay=0.0)
    return fit_arms(c, tx, one_round(labs, c, tx), partial(look_round, labs, c), of_run, hyper, steps=c.rounds, every=1)[1]
