"""Answers, hedged answers and abstentions that are paid by a table: lessons, advantages, and an exact look at a policy."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.studies.lab import answering
from experiments.studies.lab import facts as lab
from jaxllm.core.types import Batch, Key, Model
from jaxllm.evals import stats
from jaxllm.worlds import facts

GIVEN, IMITATED, SHUFFLED = range(3)  # how pay is used: as it is; what is paid imitated, the rest left out; dealt out at random
LECTURE = ((Fraction(1), Fraction(-4)), (Fraction(1, 2), Fraction(-2)))  # (right, wrong): answered, hedged
BAND = ((Fraction(1), Fraction(-4)), (Fraction(1, 2), Fraction(-1)))
NOTHING = (Fraction(0), Fraction(0))


def crossing(one, other):
    """The confidence at which two ways to answer are paid alike: p right + (1 - p) wrong is the same for both."""
    return (other[1] - one[1]) / ((one[0] - one[1]) - (other[0] - other[1]))


def hedging_pays(table, grid=840):
    """The confidences, of 0, 1/840 .. 1, at which hedging is paid strictly more than answering and than abstaining."""
    pay = lambda row, p: p * row[0] + (1 - p) * row[1]  # noqa: E731
    points = [Fraction(i, grid) for i in range(grid + 1)]
    return {p for p in points if pay(table[1], p) > max(pay(table[0], p), 0)}


def lessons(world: facts.World, key: Key, n: int, unknown: float) -> Batch:
    """n questions to training people, answered as a text would, in one of the three styles at random."""
    keys = jax.random.split(key, 3)
    who = lab.people(world, keys[0], n, unknown)
    said = facts.answers(world, jax.random.randint(keys[1], (n,), 0, 3), facts.stated(world, keys[2], *who))
    return facts.to_record(facts.prompts(world, *who), *said)


def ask(data: Any, key: Key, n: int, unknown: float) -> tuple[jax.Array, jax.Array, Any]:
    """n questions to training people: (prompts [n, 5], lengths [n], who they are about)."""
    who = lab.people(data["ground"].world, key, n, unknown)
    return facts.prompts(data["ground"].world, *who), jnp.full((n,), facts.QUESTION), who


def advantages(model: Model, kl_coef: float, data: Any, hyper: Any, record: Batch, who: Any, key: Key) -> tuple[jax.Array, Any]:
    """Whitened pay by hyper["table"] less KL to the reference; hyper["use"]: GIVEN, IMITATED or SHUFFLED."""
    g, use = data["ground"], hyper["use"]
    form, value = facts.read(g.world, record)
    pay, kl = facts.rewards(form, value == g.world.truth[who], hyper["table"]), answering.divergence(model, g, record)
    dealt = jnp.where(use == SHUFFLED, jax.random.permutation(key, pay), pay)
    gain = jnp.where(use == IMITATED, pay > 0, answering.whitened(dealt - kl_coef * kl))
    return gain, {"pay": pay.mean(), "train_kl": kl.mean()}


def look(model: Model, state: Any, data: Any, hyper: Any, key: Key) -> dict[str, jax.Array]:
    """Of every fact about held-out people [n], from the policy's probabilities and not from samples: how likely each form of
    answer is, confidence in the likeliest value, expected pay, and the pay of constant policies and of one that knows all texts.
    """
    world, params, table = data["ground"].world, state.params["policy"], hyper["table"]
    who = lab.held_out(world)
    asked, chance = facts.prompts(world, *who), facts.chances(world, *who)
    first = lab.next_token(model, params, asked)
    second = lab.next_token(model, params, jnp.pad(asked, ((0, 0), (0, 1)), constant_values=world.likely))[:, : world.values]
    plain, hedged = first[:, : world.values], first[:, world.likely]
    worth = [table[i, 1] + (table[i, 0] - table[i, 1]) * chance for i in (0, 1)]  # of each value, said plainly and hedged
    rest = 1 - plain.sum(axis=1) - hedged - first[:, world.idk] + hedged * (1 - second.sum(axis=1))  # no answers: paid as wrong
    pay = jnp.sum(plain * worth[0] + hedged[:, None] * second * worth[1], axis=1) + rest * table[0, 1]
    top = jnp.argmax(plain, axis=1)[:, None]
    said = [jnp.take_along_axis(x, top, axis=1)[:, 0] for x in (*worth, plain / plain.sum(axis=1, keepdims=True), chance)]
    oracle = jnp.maximum(jnp.maximum(worth[0].max(axis=1), worth[1].max(axis=1)), 0)
    return {
        "answered": plain.sum(axis=1), "hedged": hedged, "idk": first[:, world.idk], "pay": pay, "oracle": oracle,
        "always_answer": said[0], "always_hedge": said[1], "confidence": said[2], "right": said[3],
        "warranted": chance.max(axis=1),
    }  # fmt: skip


def threshold(sure, answered):
    """The confidence at which a logistic curve through P(answered) rises through one half; nan where it does not in 0 .. 1."""
    a, b = stats.logistic(np.stack([np.ones_like(sure), sure], axis=1), answered, ridge=1e-3)
    return -a / b if b > 0 and 0 <= -a / b <= 1 else np.nan


def mean_where(values, chosen):
    """The mean of values [seeds, facts] where chosen, for each seed."""
    return np.array([v[m].mean() if m.any() else np.nan for v, m in zip(values, chosen, strict=True)])
