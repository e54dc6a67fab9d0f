"""Points chosen on one half of the strings and measured on the other, so that the choice is no luck; and what training costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.studies.lab import selection
from experiments.studies.lab.ground import gold, kl, sample
from experiments.studies.lab.models import Lab
from jaxllm.core.types import Key, TrainState
from jaxllm.evals import frontier

Curves = dict[str, np.ndarray]  # {name: [settings, seeds, points]}; the second half's names begin with test_


def wins(gold: jax.Array, base: jax.Array) -> jax.Array:
    """How often a string of each worth [n] beats one of the reference's [m], ties half: [n]."""
    base = jnp.sort(base)
    return (jnp.searchsorted(base, gold - 1e-4) + jnp.searchsorted(base, gold + 1e-4)) / (2 * len(base))


def look(lab: Lab, n: int) -> Callable:
    """For train.sweep: gold, KL and win rate over the reference's worths data["base"], of n fresh strings and of n others."""

    def one(state: TrainState, data: Any, hyper: Any, key: Key) -> dict[str, jax.Array]:
        g = data["ground"]
        record = sample(lab, g.world, state.params["policy"], key, 2 * n)
        worth = gold(g, record)
        values = {"gold": worth, "kl": kl(lab, g.reference, record), "win": wins(worth, data["base"])}
        halves = {name: v.reshape(2, n).mean(axis=1) for name, v in values.items()}
        return {name: h[0] for name, h in halves.items()} | {f"test_{name}": h[1] for name, h in halves.items()}

    return one


def best_of(proxy: Any, gold: Any, sizes: Any) -> Curves:
    """Best-of-n by the proxy as curves [1, seeds, sizes], from strings [seeds, m]: even ones choose, odd ones measure."""
    won, out = np.asarray(jax.vmap(lambda x: wins(x, x))(gold)), {}
    proxy, gold = np.asarray(proxy, np.float64), np.asarray(gold, np.float64)
    for prefix, half in (("", slice(0, None, 2)), ("test_", slice(1, None, 2))):
        found = selection.best_of(proxy[:, half], gold[:, half], sizes)
        found["win"] = selection.best_of(proxy[:, half], won[:, half], sizes)["gold"]
        out |= {f"{prefix}{n}": found[n][None] for n in ("gold", "kl", "win")}
    return out


def points(x: Curves, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(kl, gold) of one seed where the points that no other beats on the first half's strings lie on the second's."""
    kept = frontier.pareto(x["kl"][:, seed].ravel(), x["gold"][:, seed].ravel())
    return x["test_kl"][:, seed].ravel()[kept], x["test_gold"][:, seed].ravel()[kept]


def best(x: Curves, name: str) -> np.ndarray:
    """The second half's value [seeds] at each seed's point of the most gold on the first half."""
    flat = {n: np.moveaxis(x[n], 1, 0).reshape(x[n].shape[1], -1) for n in ("gold", f"test_{name}")}
    return np.take_along_axis(flat[f"test_{name}"], flat["gold"].argmax(axis=1)[:, None], axis=1)[:, 0]


def steps_to_best(x: Curves, share: float = 0.95) -> int:
    """Steps until the best setting's mean over seeds first has this share of its most gold."""
    mean = x["test_gold"].mean(axis=1)
    curve = mean[mean.max(axis=1).argmax()]
    return int(x["step"][0, 0][np.argmax(curve >= share * curve.max())])


def flops(c: Any, policy: int, judge: int, dpo_steps: int, ppo_steps: int) -> dict[str, float]:
    """{DPO, PPO: FLOPs of one run} with so many parameters, 2 a parameter and token forward and 4 backward.

    Counted: sampling the pairs and the reference's log-probabilities of them, for PPO the reward model's training and scale,
    each step's sampling, reference, scores and updates.
    """
    token, drawn = c.length, 2 * c.pairs * c.length * 2 * policy
    trained = c.judge_steps * 2 * 64 * token * 6 * judge + 1024 * token * 2 * (policy + judge)
    step = {"DPO": 2 * c.batch_size * token * 6 * policy, "PPO": c.rl_batch * token * ((4 + 6 * c.epochs) * policy + 2 * judge)}
    return {"DPO": float(2 * drawn + dpo_steps * step["DPO"]), "PPO": float(drawn + trained + ppo_steps * step["PPO"])}
