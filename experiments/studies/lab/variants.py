"""Six preference losses in one table: picked by number inside a compiled program, and alone on a bandit with two outcomes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments.studies.lab.labels import swapped
from experiments.studies.lab.models import Lab
from jaxllm.core.types import Key, TrainState
from jaxllm.losses import preference
from jaxllm.losses.preference import PairLogps, RowLogps
from jaxllm.train.step import make_train_step


def kto(logps: PairLogps, *, beta: float) -> jax.Array:
    """KTO [b] of both sides as rows of their own: which was compared with which is not used.

    Its kl is the mean log-ratio of the batch: without prompts every completion is as much another prompt's.
    """
    policy = jnp.concatenate([logps.chosen, logps.rejected])
    reference = jnp.concatenate([logps.ref_chosen, logps.ref_rejected])
    label = jnp.arange(policy.shape[0]) < logps.chosen.shape[0]
    kl = jax.lax.stop_gradient(jnp.maximum((policy - reference).mean(), 0.0))
    return preference.kto(RowLogps(policy, reference, label, kl), beta=beta).reshape(2, -1).mean(axis=0)


VARIANTS: dict[str, Callable[..., jax.Array]] = {
    "dpo": preference.dpo, "cdpo": partial(preference.cdpo, label_smoothing=0.1), "ipo": preference.ipo, "kto": kto,
    "simpo": lambda logps, *, beta: preference.simpo(logps, beta=beta, gamma=beta / 2),
    "reference_free": preference.reference_free,
}  # fmt: skip


def picked(logps: PairLogps, *, beta: float, which: jax.Array) -> jax.Array:
    """The losses [b] of the variant with number `which`, an array: all of them compile once."""
    return jnp.stack([fn(logps, beta=beta) for fn in VARIANTS.values()])[which]


def picked_step(lab: Lab, tx: Any, *, batch: int) -> Callable:
    """A step on data["pairs"], the first hyper["pairs"] of them, those swapped whose `chance` is below hyper["noise"]."""

    def step(state: TrainState, data: Any, hyper: Any, key: Key):
        index = jax.random.randint(key, (batch,), 0, hyper["pairs"])
        pairs = jax.tree.map(lambda x: x[index], data["pairs"])
        labelled = swapped(pairs, pairs["chance"] < hyper["noise"])
        loss_fn = preference.loss(lab.model, picked, beta=hyper["beta"], which=hyper["which"])
        state, metrics = make_train_step(loss_fn, tx)(state, {}, labelled, key)
        return state, {"loss": metrics["loss"].value()}

    return step


def margins(fn: Callable[..., jax.Array], *, beta: float, steps: int, chance: float = 1.0, rate: float = 0.5) -> jax.Array:
    """log pi(a)/pi(b) [steps] under gradient descent on the expected fn, from a uniform policy and reference.

    chance: how often a is preferred to b; 1 is a deterministic preference. Both outcomes are one token long.
    """

    def expected(margin: jax.Array) -> jax.Array:
        a, b = jax.nn.log_softmax(jnp.stack([margin, jnp.zeros(())])).reshape(2, 1)
        half, one = jnp.log(jnp.full(1, 0.5)), jnp.ones(1)
        there, back = (fn(PairLogps(x, y, half, half, one, one), beta=beta) for x, y in ((a, b), (b, a)))
        return jnp.sum(chance * there + (1 - chance) * back)

    def walk(margin: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        moved = margin - rate * jax.grad(expected)(margin)
        return moved, moved

    return jax.jit(lambda start: jax.lax.scan(walk, start, None, length=steps)[1])(jnp.zeros(()))
