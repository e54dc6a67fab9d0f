"""How token losses become one number: mask [b, l] -> weights [b, l], a column of the batch.

The loss is sum(weights * token loss) / rows. Weights are made over the whole batch before it is split, so that minibatches and
micro-batches add up to it: accumulate=1 and 8 agree. A mask that is False everywhere gives weights of 0.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def sequence_mean(mask: jax.Array) -> jax.Array:
    """1 / tokens of the row: the mean over rows of a row's mean (GRPO, arXiv 2402.03300). A row without tokens counts as 0."""
    return mask / jnp.maximum(mask.sum(axis=1, keepdims=True), 1).astype(jnp.float32)


def token_mean(mask: jax.Array) -> jax.Array:
    """rows / tokens of the batch: the mean over all tokens (DAPO, arXiv 2503.14476). Rows without tokens change nothing."""
    return spread(mask, mask.shape[0])


def constant(length: int) -> Callable[[jax.Array], jax.Array]:
    """1 / length for every token, `length` the longest completion that is possible (Dr.GRPO, arXiv 2503.20783)."""
    return lambda mask: mask / jnp.float32(length)


def spread(mask: jax.Array, total: jax.Array | float) -> jax.Array:
    """`total` shared evenly by the tokens of the mask: how a second term (PPO-ptx) takes the first one's denominator."""
    return mask * (jnp.asarray(total, jnp.float32) / jnp.maximum(mask.sum(), 1))
