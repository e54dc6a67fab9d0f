"""Over-optimisation: reward models on more and fewer pairs, and what curves of gold and proxy against KL say."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.studies.lab import selection
from experiments.studies.lab.arms import fit_arms
from experiments.studies.lab.ground import Ground
from experiments.studies.lab.models import Lab, fresh, optimizer, train
from experiments.studies.lab.preferences import Judge, proxy, scores
from experiments.studies.lab.steps import observe, policy_step
from jaxllm.core.types import Key, Params
from jaxllm.losses import reward
from jaxllm.models import heads
from jaxllm.train import sweep


def judges(
    lab: Lab, seed: dict[str, Any], sizes: Any, noise: Any, key: Key, *, steps: int = 150, batch: int = 64, lr: float = 1e-3
) -> tuple[Judge, jax.Array]:  # fmt: skip
    """A seed's reward models, one for each of sizes [k] (the first so many pairs), and their scores of its strings: [k, m].

    seed: {ground, pairs, shuffled (pairs whose labels are a coin's), strings}; noise bool [k]: which learn from `shuffled`.
    """

    def one(n: jax.Array, noise: jax.Array, key: Key) -> tuple[Judge, jax.Array]:
        columns = jax.tree.map(partial(jnp.where, noise), seed["shuffled"], seed["pairs"])
        batch_of = lambda k: jax.tree.map(lambda x: x[jax.random.randint(k, (batch,), 0, n)], columns)  # noqa: E731
        loss_fn = reward.loss(partial(heads.scalars, lab.judge))
        params = train(loss_fn, optimizer(lr, steps), {"reward": fresh(lab.judge, key)}, batch_of, key, steps)
        raw = scores(lab, params["reward"], seed["strings"])
        judge = Judge(params["reward"], raw.mean(), raw.std())
        return judge, (raw - judge.mean) / judge.std

    sizes, noise = jnp.asarray(sizes), jnp.asarray(noise)
    return jax.vmap(one)(sizes, noise, jax.random.split(key, len(sizes)))


def optimise(
    lab: Lab, c: Any, g: Ground, judges: Judge, settings: list[tuple[int, float]]
) -> tuple[Params, dict[str, np.ndarray]]:
    """(policies [runs], curves {name: [settings, seeds, points]}) of RL on settings (which judge, kl_coef).

    g [seeds], judges [seeds, k]; c has the run's sizes.
    """
    seeds, grid = sweep.grid(c.seeds, row=np.arange(len(settings)))
    arm, kl_coef = (jnp.asarray(x)[grid["row"]] for x in zip(*settings, strict=True))
    of_run = {"ground": sweep.take(g, seeds), "judge": jax.tree.map(lambda x: x[seeds, arm], judges)}
    score = lambda d, record: proxy(lab, d["judge"], record)  # noqa: E731
    tx = optimizer(c.lr, c.steps * c.epochs)
    step = policy_step(lab, score, tx, batch=c.batch_size, epochs=c.epochs)
    look = observe(lab, c.look, proxy=score)
    return fit_arms(c, tx, step, look, of_run, {"kl_coef": kl_coef}, steps=c.steps, every=c.every)


def peak_facts(curves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What curves [seeds, points] of gold, proxy and kl say of each seed: {name: [seeds]}.

    peak, peak_kl: the best gold and where; inside: looks between it and the nearer end of the run; lost: gold from there to the
    end; proxy_rise: the proxy's gain from there to the end.
    """
    gold, rows = curves["gold"], np.arange(len(curves["gold"]))
    at, last = gold.argmax(axis=1), gold.shape[1] - 1
    return {
        "peak": gold[rows, at], "peak_kl": curves["kl"][rows, at], "inside": np.minimum(at, last - at),
        "lost": gold[rows, at] - gold[:, -1], "final": gold[:, -1], "kl": curves["kl"][:, -1],
        "proxy": curves["proxy"][:, -1], "proxy_rise": curves["proxy"][:, -1] - curves["proxy"][rows, at],
    }  # fmt: skip


def goodhart_fit(kl: np.ndarray, gold: np.ndarray, log: bool) -> np.ndarray:
    """(alpha, beta, R^2) of gold = d (alpha - beta f), d = sqrt(KL), f = log d (RL) or d (best-of-n): arXiv 2210.10760.

    Least squares over points [n] with KL above 0.01; nan where there are fewer than three.
    """
    kept = kl > 0.01
    if kept.sum() < 3:
        return np.full(3, np.nan)
    d, y = np.sqrt(kl[kept]), gold[kept]
    x = np.stack([d, -d * (np.log(d) if log else d)], axis=1)
    coefficients = np.linalg.lstsq(x, y, rcond=None)[0]
    return np.array([*coefficients, 1 - ((y - x @ coefficients) ** 2).sum() / ((y - y.mean()) ** 2).sum()])


def kl_at(kl: np.ndarray, proxy: np.ndarray, target: float) -> float:
    """The KL at which a curve [points] first reaches a proxy of `target`, interpolated between looks; nan if it never does."""
    reached = np.flatnonzero(proxy >= target)
    if not len(reached) or reached[0] == 0:
        return np.nan
    i = reached[0]
    return float(np.interp(target, proxy[i - 1 : i + 1], kl[i - 1 : i + 1]))


def judge_facts(c: Any, x: dict, bon: dict, scores: np.ndarray, gold: np.ndarray, logp: np.ndarray) -> dict[str, np.ndarray]:
    """What one reward model shows, {name: [seeds, ...]}: by RL's curves x [seeds, points], best-of-n, and its scores [seeds, m].

    c has best_of and match: at the proxy of best-of-`match` the two are compared.
    """
    each, pick = range(c.seeds), list(c.best_of).index(c.match)
    right = (scores[:, ::2] - scores[:, 1::2]) * (gold[:, ::2] - gold[:, 1::2])
    return peak_facts(x) | {
        "accuracy": np.array([(r[r != 0] > 0).mean() for r in right]),
        "rl_fit": np.stack([goodhart_fit(x["kl"][s], x["gold"][s], True) for s in each]),
        "bon_fit": np.stack([goodhart_fit(bon["kl"][s], bon["gold"][s], False) for s in each]),
        "bon_lost": bon["gold"].max(axis=1) - bon["gold"][:, -1],
        "kl_over": (bon["kl"] - bon["bound"]).max(axis=1),
        "drawn_over": np.array([selection.drawn_kl(scores[s], logp[s], c.match) - bon["bound"][pick] for s in each]),
        "kl_ratio": np.array([kl_at(x["kl"][s], x["proxy"][s], bon["proxy"][s, pick]) / bon["kl"][s, pick] for s in each]),
    }
