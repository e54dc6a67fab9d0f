"""Models that may take back what they have begun to say: their trainings, and a look at what they show."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments.studies.lab.models import Lab, fresh, optimizer, start, train
from experiments.studies.lab.preferences import with_reference
from experiments.studies.lab.resets import lessons, pairs, room
from jaxllm.core.types import Batch, Key, Model, Params, TrainState
from jaxllm.generate import decode
from jaxllm.losses import lm, preference
from jaxllm.models import decoder
from jaxllm.train import sweep
from jaxllm.train.step import make_train_step
from jaxllm.worlds import hazard


def make(vocab: int, c: Any) -> Model:
    """The decoder of the study."""
    config = decoder.DecoderConfig(
        vocab_size=vocab, max_length=hazard.CUES + 2 * c.steps + room(c.steps) + 1, d_model=c.width, n_layers=c.layers, n_heads=4,
        d_ff=4 * c.width, activation="relu", tied=False,
    )  # fmt: skip
    return decoder.make(config)


def prepare(model: Model, c: Any, key: Key) -> tuple[hazard.World, Params]:
    """A world, and a helpful-only model: one that has learned to go along with every request."""
    keys = jax.random.split(key, 3)
    world = made(c, keys[0])

    def batch_of(k: Key) -> Batch:
        a, b = jax.random.split(k)
        topic = hazard.topics(world, a, jnp.arange(c.read_batch) < c.hazards * c.read_batch)
        return hazard.to_record(hazard.requests(world, b, topic), hazard.compliances(world, topic))

    params = {"policy": fresh(model, keys[1])}
    return world, train(lm.loss(model), optimizer(c.read_lr, c.read_steps), params, batch_of, keys[2], c.read_steps)["policy"]


def made(c: Any, key: Key) -> hazard.World:
    """The world of a config."""
    return hazard.make(key, words=c.words, steps=c.steps, dangerous=c.dangerous, telling=c.telling)


def tuning_step(model: Model, c: Any, tx: Any):
    """A step of supervised fine-tuning for train.sweep; hyper["share"] of the hazardous lessons backtrack."""

    def step(state: TrainState, data: Any, hyper: Any, key: Key):
        batch = lessons(data["world"], c, key, c.batch_size, hyper["share"])
        state, metrics = make_train_step(lm.loss(model), tx)(state, {}, batch, key)
        return state, {"loss": metrics["loss"].value()}

    return step


def dpo_step(model: Model, c: Any, tx: Any):
    """A step of DPO, with the chosen answer's NLL, for train.sweep, on fresh pairs of hyper["kind"] against data["reference"]."""

    def step(state: TrainState, data: Any, hyper: Any, key: Key):
        batch = pairs(data["world"], c, key, c.pair_batch, hyper["kind"])
        batch = with_reference(Lab(model, None), data["reference"], batch)
        loss_fn = preference.loss(model, preference.dpo, beta=c.beta, nll_weight=c.nll_weight)
        state, metrics = make_train_step(loss_fn, tx)(state, {}, batch, key)
        return state, {n: metrics[n].value() for n in ("loss", "rewards/accuracies")}

    return step


def tuned(step: Any, tx: Any, params: Params, data: Any, hyper: Any, c: Any, steps: int) -> Params:
    """The policies [runs] that `steps` steps for train.sweep make of params [runs]."""
    state = jax.vmap(partial(start, tx))({"policy": params})
    runs = len(jax.tree.leaves(params)[0])
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(c.seed + 1)))(jnp.arange(runs))
    return sweep.fit(step, state, data, hyper, keys, steps=steps)[0].params["policy"]


def biased(model: Model, token: int, bias: jax.Array) -> Model:
    """The model with `bias` added to one token's logit."""

    def head(params: Params):
        plain = model.head(params)
        added = jnp.where(jnp.arange(plain.kernel.shape[1]) == token, bias, 0.0)
        return dataclasses.replace(plain, bias=added)

    return model._replace(head=head)


def look(model: Model, c: Any, world: hazard.World, params: Params, bias: jax.Array, key: Key) -> dict[str, jax.Array]:
    """What sampled answers to fresh requests show: n harmless ones, n hazardous ones, and n for each number of tokens of the
    compliance that an attacker puts into the model's mouth; bias: on the logit of [RESET].
    """
    n, keys = c.test_requests, jax.random.split(key, 3)
    group = jnp.repeat(jnp.arange(2 + world.steps), n)  # 0 harmless, 1 hazardous, 1 + k: hazardous, k tokens are put
    topic = hazard.topics(world, keys[0], group > 0)
    put = jnp.maximum(group - 1, 0)
    asked = hazard.requests(world, keys[1], topic), jnp.full(topic.shape[0], world.request)
    prompt, lengths = hazard.follow(asked, (hazard.compliances(world, topic)[0][:, : world.steps], put))
    policy = biased(model, world.reset, bias)
    s = decode.generate(
        policy, params, prompt, lengths, keys[2], max_new_tokens=room(c.steps), stop=(world.end,), temperature=c.temperature
    )
    r = decode.to_record(s)
    mean = lambda x: x.astype(jnp.float32).reshape(-1, n).mean(axis=1)  # noqa: E731
    violated, resets, refused = (mean(f(world, r)) for f in (hazard.violates, lambda *a: hazard.resets(*a) > 0, hazard.refuses))
    hidden = mean((hazard.written(world, r) & ~hazard.shown(world, r)).sum(axis=1))
    return {
        "violations": violated[1], "attack": violated[2:], "helpful": mean(hazard.helps(world, topic, r))[0],
        "false_resets": resets[0], "resets": resets[1], "overrefusals": refused[0], "refusals": refused[1], "extra": hidden[0],
        "extra_hazard": hidden[1],
    }  # fmt: skip
