"""The records that the folders of jaxllm exchange: nothing here computes anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

Params = Any  # a tree (nested dict) of arrays
Batch = Any  # a tree of arrays whose first axis is the example
Key = jax.Array  # jax.random.key


class UserError(Exception):
    """Bad input: one line that names the file, the value and the fix. `launch` turns it into its exit code."""

    code = 2


@struct.dataclass
class Mean:
    """A sum and its weight, so that means add across micro-batches, devices and batches without bias."""

    total: jax.Array
    count: jax.Array

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    def value(self) -> jax.Array:
        """total / count; 0 where count is 0 (the count is kept, so that an empty mean can be reported)."""
        return self.total / jnp.where(self.count == 0, 1, self.count)


def mean_of(values: jax.Array, weights: jax.Array | None = None) -> Mean:
    """The Mean of `values` under `weights` (bool or float, same shape; None counts every value once)."""
    weights = jnp.ones_like(values, jnp.float32) if weights is None else weights.astype(jnp.float32)
    # where, not a product: a masked inf or nan must not reach the sum
    total = jnp.where(weights != 0, values.astype(jnp.float32), 0.0) * weights
    return Mean(total.sum(), weights.sum())


@struct.dataclass
class Head:
    """What log-probabilities need of a model's last layer.

    kernel [d, v] with v padded to a multiple that shards; columns from `vocab_size` on are masked in `ops`.
    """

    kernel: jax.Array
    bias: jax.Array | None = None
    softcap: float | None = struct.field(pytree_node=False, default=None)
    vocab_size: int | None = struct.field(pytree_node=False, default=None)


@struct.dataclass
class Output:
    """hidden [b, l, d] after the final norm; cache when one was given; aux: taps, router losses and loads."""

    hidden: jax.Array
    cache: Any = None
    aux: dict[str, Any] = struct.field(default_factory=dict)


class Model(NamedTuple):
    """A record of pure functions over one tree of parameters, like optax's (init, update).

    apply(params, tokens, *, positions, segments, cache, embeds, context, types, rng, taps) -> Output
    head(params) -> Head; init_cache(batch, length) -> Cache
    encode(params, inputs) -> context, for a model that reads something else first (T5: another text; Flamingo: images)
    """

    config: Any
    specs: Any
    apply: Callable[..., Output]
    head: Callable[[Params], Head]
    init_cache: Callable[..., Any]
    encode: Callable[[Params, Any], Any] | None = None


@struct.dataclass
class TrainState:
    """step int32 []; params: the trainable part only; opt_state follows it."""

    step: jax.Array
    params: Params
    opt_state: Any


LossFn = Callable[[Params, Batch, Key], tuple[Mean, dict[str, Mean]]]
