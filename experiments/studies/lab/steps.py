"""Steps and looks for train.sweep: data is a dict of what a run has, `ground` among it; states hold {"policy": ...}."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.studies.lab.ground import gold, kl, sample
from experiments.studies.lab.models import Lab, rows
from jaxllm.core.ops import model_logps
from jaxllm.core.types import Batch, Key, Mean, Params, TrainState, mean_of
from jaxllm.losses import lm, policy, preference
from jaxllm.train.step import make_train_step
from jaxllm.worlds import pref


def preference_step(lab: Lab, fn: Callable, tx: Any, *, batch: int = 64, names: tuple[str, ...] = ("beta",)) -> Callable:
    """A step on data["pairs"] with the sibling fn(logps, **{name: hyper[name]})."""

    def step(state: TrainState, data: Any, hyper: Any, key: Key):
        loss_fn = preference.loss(lab.model, fn, **{"beta": 1.0, **{n: hyper[n] for n in names}})
        state, metrics = make_train_step(loss_fn, tx)(state, {}, rows(data["pairs"], key, batch), key)
        return state, {n: metrics[n].value() for n in ("loss", "rewards/accuracies", "logps/chosen", "logps/rejected")}

    return step


def imitation_step(lab: Lab, tx: Any, *, batch: int = 64) -> Callable:
    """A step of supervised fine-tuning on the record data["demonstrations"]."""

    def step(state: TrainState, data: Any, hyper: Any, key: Key):
        state, metrics = make_train_step(lm.loss(lab.model), tx)(state, {}, rows(data["demonstrations"], key, batch), key)
        return state, {"loss": metrics["loss"].value()}

    return step


def policy_step(
    lab: Lab, score: Callable[[Any, Batch], jax.Array], tx: Any, *, batch: int = 128, epochs: int = 2, clip=0.2,
    pretraining: Callable[[Any, Key], Batch] | None = None,
):  # fmt: skip
    """A step of online RL: sample, score(data, record) [n] less hyper["kl_coef"] * KL, whiten, `epochs` clipped updates.

    With pretraining(data, key), a sequence record, hyper["ptx_coef"] * NLL per token of it is added (PPO-ptx, arXiv 2203.02155).
    """

    def loss_fn(params: Params, record: Batch, rng: Key):
        logps = jnp.where(record["mask"], model_logps(lab.model, params["policy"], record).logp, 0.0)
        losses = policy.ppo_policy(logps, record["logps"], record["advantages"], clip=clip)
        mean = mean_of(losses, record["mask"])
        if pretraining is not None:
            text = lm.loss(lab.model)(params, record["pretraining"], rng)[0].value()
            mean = Mean(mean.total + record["ptx_coef"] * text * mean.count, mean.count)
        return mean, {}

    def step(state: TrainState, data: Any, hyper: Any, key: Key):
        g = data["ground"]
        record = sample(lab, g.world, state.params["policy"], key, batch)
        divergence, scores = kl(lab, g.reference, record), score(data, record)
        total = scores - hyper["kl_coef"] * divergence
        centred = (total - total.mean()) / (total.std() + 1e-6)
        record["advantages"] = jnp.where(record["mask"], centred[:, None], 0.0)
        if pretraining is not None:
            record |= {"pretraining": pretraining(data, jax.random.fold_in(key, 1)), "ptx_coef": hyper["ptx_coef"]}
        for _ in range(epochs):
            state, _ = make_train_step(loss_fn, tx)(state, {}, record, key)
        return state, {"score": scores.mean(), "train_kl": divergence.mean()}

    return step


def observe(lab: Lab, n: int, **looks: Callable[[Any, Batch], jax.Array]) -> Callable:
    """What n fresh strings of the policy are worth: gold, KL to the reference, length, and looks {name: f(data, record) [n]}."""

    def look(state: TrainState, data: Any, hyper: Any, key: Key) -> dict[str, jax.Array]:
        g = data["ground"]
        record = sample(lab, g.world, state.params["policy"], key, n)
        values = {"gold": gold(g, record), "kl": kl(lab, g.reference, record), "length": pref.lengths(g.world, record)}
        return {name: v.mean() for name, v in {**values, **{k: f(data, record) for k, f in looks.items()}}.items()}

    return look
