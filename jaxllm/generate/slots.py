"""Rows that come and go: a batch of fixed size, whose places are taken by requests as they arrive, one token a call.

Every setting of a request is an argument, so that a model has one program for a step and one for each length that prompts are
padded to, whoever asks for what.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxllm.core import ops
from jaxllm.core.types import Key, Model, Params
from jaxllm.generate.decode import prefill
from jaxllm.generate.sampling import choose_rows

SHORTEST = 64  # prompts are padded to this, to twice this and so on
COLD = 1e-5  # of temperatures
TOPS = 20  # the most alternatives that are told of a token


@struct.dataclass
class Sampling:
    """How rows are sampled, all [b]: keys, temperature (0: greedy), top_k (0: all), top_p."""

    key: Key
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array


@struct.dataclass
class Rows:
    """What the device keeps of b rows: the model's cache, the token int [b] that each reads next, how it is sampled."""

    cache: Any
    token: jax.Array
    sampling: Sampling


@struct.dataclass
class Read:
    """A prompt that has been read: a cache of one row, hidden [1, d] at its last token."""

    cache: Any
    hidden: jax.Array


@struct.dataclass
class Next:
    """Tokens drawn, int [b]; logps [b] under the model; the TOPS most likely ones as top_ids, top_logps [b, k], if asked for."""

    token: jax.Array
    logps: jax.Array
    top_ids: jax.Array
    top_logps: jax.Array


class Slots(NamedTuple):
    """empty() -> Rows; read(params, tokens [1, p], length) -> Read; place(params, rows, row, read, sampling [1], tops) and
    step(params, rows, active bool [b], tops) -> (rows, Next), which take the rows' buffers over."""

    empty: Callable[[], Rows]
    read: Callable[..., Read]
    place: Callable[..., tuple[Rows, Next]]
    step: Callable[..., tuple[Rows, Next]]


def buckets(length: int) -> tuple[int, ...]:
    """The lengths that prompts of at most `length` tokens are padded to."""
    sizes = [SHORTEST]
    while sizes[-1] < length:
        sizes.append(2 * sizes[-1])
    return (*sizes[:-1], length)


def sampling(key: Key, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Sampling:
    """That of one row; the key is folded with its positions. Below COLD it is greedy: dividing by less leaves float32."""
    temperature = 0.0 if temperature < COLD else temperature
    return Sampling(key[None], np.float32([temperature]), np.int32([top_k]), np.float32([top_p]))


def make_slots(model: Model, slots: int, length: int) -> Slots:
    """The compiled functions of `slots` rows of at most `length` tokens; params may be unstacked (`core.spec.unstack`).

    A row whose key is fold_in(key, i) draws what row i of `decode.generate` draws with that key, whatever the others do.
    """

    def draw(params: Params, hidden: jax.Array, at: jax.Array, s: Sampling, tops: jax.Array) -> Next:
        logits = ops.logits(model.head(params), hidden)
        keys = jax.vmap(jax.random.fold_in)(s.key, at)
        token, logps = choose_rows(keys, logits, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p)
        return Next(token, logps, *_tops(logits, tops))

    def empty() -> Rows:
        keys, zeros = jax.random.split(jax.random.key(0), slots), jnp.zeros(slots, jnp.int32)
        return Rows(model.init_cache(slots, length), zeros, Sampling(keys, jnp.zeros(slots), zeros, jnp.ones(slots)))

    def read(params: Params, tokens: jax.Array, n: jax.Array) -> Read:
        return Read(*prefill(model, params, tokens, n[None], length))

    def place(params: Params, rows: Rows, row: jax.Array, held: Read, s: Sampling, tops: jax.Array) -> tuple[Rows, Next]:
        found = draw(params, held.hidden, held.cache.length, s, tops)
        new = Rows(held.cache, found.token, s)
        return jax.tree.map(lambda pool, one: pool.at[row].set(one[0]), rows, new), found

    def step(params: Params, rows: Rows, active: jax.Array, tops: jax.Array) -> tuple[Rows, Next]:
        out = model.apply(params, rows.token[:, None], segments=active[:, None].astype(jnp.int32), cache=rows.cache)
        found = draw(params, out.hidden[:, 0], out.cache.length, rows.sampling, tops)
        return Rows(out.cache, found.token, rows.sampling), found

    over = partial(jax.jit, donate_argnums=1)
    return Slots(jax.jit(empty), jax.jit(read), over(place), over(step))


def _tops(logits: jax.Array, asked: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(ids, log-probabilities) [b, k] of the most likely tokens; zeros unless asked for."""
    k = min(TOPS, logits.shape[-1])

    def find() -> tuple[jax.Array, jax.Array]:
        best, ids = jax.lax.top_k(logits, k)
        return ids, best - jax.nn.logsumexp(logits, axis=-1, keepdims=True)

    shape = (logits.shape[0], k)
    return jax.lax.cond(asked, find, lambda: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape)))
