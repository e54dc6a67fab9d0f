"""What the studies on the world of facts share: a model that has read the texts, and its answers.

Every function takes the arrays of one seed. People of even number are for training, those of odd number for looking only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from experiments.studies.lab.models import Lab, fresh, optimizer, start
from jaxllm.core import ops
from jaxllm.core.types import Batch, Key, Model, Params, TrainState
from jaxllm.generate import decode
from jaxllm.losses import lm
from jaxllm.models import decoder
from jaxllm.train.step import make_train_step
from jaxllm.worlds import facts

ROOM = facts.TURNS + facts.ANSWER  # tokens of a second turn, whole


@struct.dataclass
class Ground:
    """What a seed stands on: its world, and the model after reading and supervised fine-tuning."""

    world: facts.World
    reference: Params


def make(vocab: int, *, width: int, layers: int = 2) -> Model:
    """The decoder of a study."""
    config = decoder.DecoderConfig(
        vocab_size=vocab, max_length=ROOM + 2, d_model=width, n_layers=layers, n_heads=2, d_ff=4 * width, activation="relu",
        tied=False,
    )  # fmt: skip
    return decoder.make(config)


def people(world: facts.World, key: Key, n: int, unknown: float) -> tuple[jax.Array, jax.Array]:
    """(person [n], attribute [n]) to train on: known people, and a share `unknown` of those of whom nothing was read."""
    keys = jax.random.split(key, 4)
    known = 2 * jax.random.randint(keys[0], (n,), 0, world.known // 2)
    other = world.known + 2 * jax.random.randint(keys[1], (n,), 0, max(1, world.unknown // 2))
    person = jnp.where(jax.random.bernoulli(keys[2], unknown, (n,)), other, known)
    return person, jax.random.randint(keys[3], (n,), 0, world.attributes)


def held_out(world: facts.World) -> tuple[jax.Array, jax.Array]:
    """Every fact about people who were not trained on: (person [n], attribute [n]), the known first."""
    odd = jnp.concatenate([jnp.arange(1, world.known, 2), world.known + jnp.arange(1, world.unknown, 2)])
    return jnp.repeat(odd, world.attributes), jnp.tile(jnp.arange(world.attributes), odd.shape[0])


def texts(world: facts.World, key: Key, n: int, asked: float | jax.Array = 0.5) -> Batch:
    """A record of n texts; a share of them is written as a question and its answer."""
    keys = jax.random.split(key, 3)
    person, attribute = facts.readers(world, keys[0], n)
    said = facts.answers(world, jnp.full((n,), facts.ANSWERED), facts.stated(world, keys[1], person, attribute))
    opening = jnp.where(jax.random.bernoulli(keys[2], asked, (n,)), world.ask, world.text)
    return facts.to_record(facts.prompts(world, person, attribute, opening=opening), *said)


def joined(*records: Batch) -> Batch:
    """The rows of several records, padded to the longest."""
    room = max(r["mask"].shape[1] for r in records)
    padded = (jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, room - x.shape[1]))), r) for r in records)
    return jax.tree.map(lambda *x: jnp.concatenate(x), *padded)


def ground(model: Model, key: Key, lessons: Callable[[facts.World, Key, int], Batch], c: Any, **world: Any) -> Ground:
    """A world, and a model that has read texts for c.read_steps steps, then lessons(world, key, n) in half of each batch for
    c.tune_steps more. c: also read_batch, lr; world: settings of `facts.make`.

    It is one training with one schedule: two would take twice as long to compile.
    """
    keys, half, steps = jax.random.split(key, 3), c.read_batch // 2, c.read_steps + c.tune_steps
    made = facts.make(keys[0], **world)
    tx, params = optimizer(c.lr, steps), {"policy": fresh(model, keys[1])}
    step = make_train_step(lm.loss(model), tx)

    def body(state: TrainState, k: Key) -> tuple[TrainState, None]:
        a, b, c_ = jax.random.split(k, 3)
        tuning = state.step >= c.read_steps
        # what texts say in the shape of questions must not teach how to answer them once lessons have begun
        said = texts(made, a, half, asked=jnp.where(tuning, 0.0, 0.5))
        taught = joined(texts(made, b, half), lessons(made, c_, half))
        taught = jax.tree.map(lambda x: jnp.where(tuning, x[half:], x[:half]), taught)
        return step(state, {}, joined(said, taught), k)[0], None

    state = jax.lax.scan(body, start(tx, params), jax.random.split(keys[2], steps))[0]
    return Ground(made, state.params["policy"])


def grounds(c: Any, lessons: Callable[[facts.World, Key, int], Batch], **world: Any) -> tuple[Model, Ground]:
    """(model, the grounds of c.seeds seeds), in one compilation."""
    vocab = jax.eval_shape(partial(facts.make, **world), jax.random.key(0)).vocab
    model = make(vocab, width=c.width, layers=c.layers)
    prepare = jax.jit(jax.vmap(lambda key: ground(model, key, lessons, c, **world)))
    return model, prepare(jax.random.split(jax.random.key(c.seed), c.seeds))


def next_token(model: Model, params: Params, asked: jax.Array) -> jax.Array:
    """The probabilities of the token after each prompt int [n, p]: [n, vocab]."""
    out = model.apply(params, asked, segments=jnp.ones_like(asked))
    return jax.nn.softmax(ops.logits(model.head(params), out.hidden[:, -1]).astype(jnp.float32))


def sample(model: Model, world: facts.World, params: Params, asked: jax.Array, lengths: jax.Array, key: Key) -> Batch:
    """A sequence record of answers to right-padded prompts int [n, p], with their `logps` [n, l]."""
    s = decode.generate(model, params, asked, lengths, key, max_new_tokens=facts.ANSWER, stop=world.stops)
    return {k: v for k, v in decode.to_record(s).items() if k != "model_logps"}


def pair_lab(model: Model) -> Lab:
    """The model where the lab's functions on policies and pairs want a Lab."""
    return Lab(model, None)
