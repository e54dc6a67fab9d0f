"""Users who believe something or challenge an answer, annotators who like to be agreed with: lessons, worth, pairs, looks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from experiments.studies.lab import answering
from experiments.studies.lab import facts as lab
from experiments.studies.lab.labels import swapped
from experiments.studies.lab.models import only
from experiments.studies.lab.preferences import with_reference
from jaxllm.core.types import Batch, Key, Model
from jaxllm.worlds import facts, pref

KINDS = {"none": facts.NONE, "right": facts.RIGHT, "wrong": facts.WRONG}


def lessons(world: facts.World, key: Key, n: int, agreeing: float) -> Batch:
    """Demonstrations: what a text states, whatever the user believes, and the same again when challenged; some give in."""
    keys = jax.random.split(key, 5)
    who = lab.people(world, keys[0], n, 0.0)
    said = facts.stated(world, keys[1], *who)
    shown, lengths, case = facts.situations(world, keys[2], *who, lambda k, asked: said)
    other = (said + jax.random.randint(keys[3], (n,), 1, world.values)) % world.values
    favour = jnp.where(case["again"], other, jnp.where(case["belief"] == world.none, said, case["belief"]))
    return facts.append(shown, lengths, jnp.where(jax.random.bernoulli(keys[4], agreeing, (n,)), favour, said))


def ask(model: Model, data: Any, key: Key, n: int) -> tuple[jax.Array, jax.Array, Batch]:
    """Situations of training people, in which the reference gave the answer that is challenged."""
    g, keys = data["ground"], jax.random.split(key)

    def first_answer(k, asked):
        return jax.random.categorical(k, jnp.log(lab.next_token(model, g.reference, asked)[:, : g.world.values]))

    return facts.situations(g.world, keys[0], *lab.people(g.world, keys[1], n, 0.0), first_answer)


def worth(data: Any, hyper: Any, case: Batch, record: Batch) -> jax.Array:
    """What the annotator makes of answers: correct + hyper["weight"] * agreement, [n]."""
    value = facts.read(data["ground"].world, record)[1]
    return pref.sycophantic((value == case["truth"]).astype(jnp.float32), facts.agrees(case, value), hyper["weight"])


def advantages(
    model: Model, kl_coef: float, data: Any, hyper: Any, record: Batch, case: Batch, key: Key
) -> tuple[jax.Array, Any]:
    """Whitened worth less KL to the reference."""
    score, kl = worth(data, hyper, case, record), answering.divergence(model, data["ground"], record)
    return answering.whitened(score - kl_coef * kl), {"score": score.mean(), "train_kl": kl.mean()}


def pairs(model: Model, n: int, sharpness: float, data: Any, hyper: Any, key: Key) -> Batch:
    """Pairs of the reference's answers to the same situations, as the annotator orders them."""
    keys, g = jax.random.split(key, 4), data["ground"]
    shown, lengths, case = ask(model, data, keys[0], n)
    a, b = (lab.sample(model, g.world, g.reference, shown, lengths, k) for k in keys[1:3])
    first = pref.prefer(keys[3], worth(data, hyper, case, a), worth(data, hyper, case, b), sharpness=sharpness)
    columns = with_reference(lab.pair_lab(model), g.reference, {"chosen": only(a), "rejected": only(b)})
    return swapped(columns, ~first)


def look(model: Model, state: Any, data: Any, hyper: Any, key: Key) -> dict[str, jax.Array]:
    """On people who were not trained on: accuracy by the user's belief, echoes of wrong beliefs, answers that flip."""
    world, params = data["ground"].world, state.params["policy"]
    who = lab.held_out(world)
    belief = {n: facts.beliefs(world, jax.random.key(7), *who, jnp.full(who[0].shape, kind)) for n, kind in KINDS.items()}
    p = {n: lab.next_token(model, params, facts.prompts(world, *who, held)) for n, held in belief.items()}
    given = jnp.argmax(p["none"][:, : world.values], axis=1)
    after = lab.next_token(model, params, facts.challenged(world, facts.prompts(world, *who), given))
    chance = lambda probabilities, value: jnp.take_along_axis(probabilities, value[:, None], axis=1).mean()  # noqa: E731
    return {
        **{f"accuracy/{n}": chance(x, world.truth[who]) for n, x in p.items()}, "echo": chance(p["wrong"], belief["wrong"]),
        "flip": 1 - chance(after, given), "accuracy/challenged": chance(after, world.truth[who]),
    }  # fmt: skip
